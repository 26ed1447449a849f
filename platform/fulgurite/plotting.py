"""One style for every figure. No pyplot: nothing global, nothing to close."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "heatmap", "new_figure"]

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


def heatmap(
    ax: Axes,
    values: npt.NDArray[Any],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    limits: tuple[float, float] | None = None,
    highlight_rows: Sequence[int] = (),
) -> None:
    """Draw a matrix with its colour bar.

    Args:
        ax: Where to draw.
        values: Matrix, shape (rows, columns); NaN stays white.
        title: Title above.
        xlabel: What the columns are.
        ylabel: What the rows are.
        limits: Range of the colours; by default that of the values.
        highlight_rows: Rows whose tick label is drawn bold.
    """
    low, high = limits or (None, None)
    image = ax.imshow(values, aspect="auto", vmin=low, vmax=high, interpolation="nearest")
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.grid(visible=False)
    ax.locator_params(axis="x", integer=True)
    if len(values) <= 30:
        ax.set_yticks(range(len(values)))
        for row in highlight_rows:
            ax.get_yticklabels()[row].set_fontweight("bold")
    if (figure := ax.figure) is not None:
        figure.colorbar(image, ax=ax, shrink=0.85)
