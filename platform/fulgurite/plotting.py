"""One style for every figure. No pyplot: nothing global, nothing to close."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fulgurite.io import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "MetricCurves", "heatmap", "new_figure", "save_figure", "use_integer_ticks"]

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C",
    "#7F3C8D", "#A6761D", "#66A61E", "#1B1B6F",
)  # fmt: skip


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = 4.5, height: float = 3.2
) -> tuple[Figure, npt.NDArray[Any]]:
    """A figure and its axes.

    Args:
        rows: Rows of axes.
        columns: Columns of axes.
        width: Width of one of them [inch].
        height: Height of one of them [inch].

    Returns:
        The figure and an array of axes, shape (rows, columns).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=120)
    axes = np.asarray(figure.subplots(rows, columns, squeeze=False))
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_prop_cycle(color=COLORS)
    return figure, axes


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure as PNG, whole or not at all.

    Args:
        figure: The figure.
        file: The file.
    """
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", dpi="figure")


def heatmap(
    ax: Axes,
    values: npt.NDArray[Any],
    *,
    limits: tuple[float, float] | None = None,
    highlight_rows: Sequence[int] = (),
    first_row: int = 0,
    names: Sequence[str] = (),
) -> None:
    """Draw a matrix with its colour bar; ``ax.set`` names it and its axes.

    Args:
        ax: Where to draw.
        values: Matrix, shape (rows, columns); NaN stays white.
        limits: Range of the colours; by default that of the values.
        highlight_rows: Rows whose tick label is drawn bold.
        first_row: Number of the first row.
        names: Names of the rows and columns of a square matrix, whose values are written into it
            where they are legible.
    """
    low, high = limits or (None, None)
    rows, columns = values.shape
    image = ax.imshow(
        values, aspect="auto", vmin=low, vmax=high, interpolation="nearest",
        extent=(-0.5, columns - 0.5, first_row + rows - 0.5, first_row - 0.5),
    )  # fmt: skip
    ax.grid(visible=False)
    use_integer_ticks(ax)
    if rows <= 30:
        ax.set_yticks(range(first_row, first_row + rows))
        for row in highlight_rows:
            ax.get_yticklabels()[row].set_fontweight("bold")
    if names and len(names) == rows == columns <= 30:
        short = [name if len(name) <= 16 else f"{name[:15]}…" for name in names]
        ax.set_xticks(range(columns), short, rotation=90, fontsize=7)
        ax.set_yticks(range(first_row, first_row + rows), short, fontsize=7)
        if rows <= 12:
            _write_values(ax, values, first_row, (low, high))
    if (figure := ax.figure) is not None:
        figure.colorbar(image, ax=ax, shrink=0.85)


def _write_values(
    ax: Axes,
    values: npt.NDArray[Any],
    first_row: int,
    limits: tuple[float | None, float | None],
) -> None:
    """Write each value of a heat map into its cell, dark on light and light on dark."""
    low = np.nanmin(values, initial=0.0) if limits[0] is None else limits[0]
    high = np.nanmax(values, initial=0.0) if limits[1] is None else limits[1]
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "black" if value > (low + high) / 2 else "white"
            ax.text(
                column, row + first_row, f"{value:.2f}", ha="center", va="center", fontsize=6,
                color=color,
            )  # fmt: skip


def use_integer_ticks(ax: Axes) -> None:
    """Put the ticks of the horizontal axis on integers, for rounds, epochs and steps."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


class MetricCurves:
    """Metrics by epoch, to be drawn when training ends; plain values for a checkpoint.

    Args:
        titles: Title of a panel by metric.
    """

    def __init__(self, titles: Mapping[str, str]) -> None:
        self.titles = dict(titles)
        self.values: dict[str, dict[int, float]] = {}

    def add(self, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Keep the metrics of an epoch that have a title and are finite."""
        for name in self.titles:
            if name in metrics and np.isfinite(value := float(metrics[name])):
                self.values.setdefault(name, {})[epoch] = value

    def figure(self) -> Figure | None:
        """A panel for each metric that there is; None without any."""
        names = [name for name in self.titles if self.values.get(name)]
        if not names:
            return None
        figure, axes = new_figure(1, len(names))
        for ax, name in zip(axes[0], names, strict=True):
            epochs = sorted(self.values[name])
            ax.plot(epochs, [self.values[name][e] for e in epochs], marker="o", markersize=3)
            ax.set(title=self.titles[name], xlabel="epoch", ylabel=name)
            use_integer_ticks(ax)
        return figure

    def state_dict(self) -> dict[str, dict[int, float]]:
        """What was kept, as plain numbers."""
        return {name: dict(values) for name, values in self.values.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[int, float]]) -> None:
        """Go on where the checkpoint was written."""
        self.values = {name: dict(values) for name, values in state.items()}
