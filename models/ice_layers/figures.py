"""Figures of completed stacks, and of how right they and their uncertainty are.

Axes: N traces, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fulgurite.models.ice_layers.metrics import normal_quantile
from fulgurite.models.ice_layers.output import PROVENANCE, CompletedStack
from fulgurite.plotting import COLORS, heatmap, new_figure, use_integer_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["boundary_depths", "calibration_figure", "depth_figure", "depth_table", "layers_figure"]

_KINDS = dict(zip(PROVENANCE, ("#000000", "#0072B2", "#E69F00", "#D9D9D9"), strict=True))
_HALF = normal_quantile(0.9)


def boundary_depths(thickness: NDArray[np.float64]) -> NDArray[np.float64]:
    """Depth of each layer's lower boundary below the surface [m].

    It is unknown below the first layer that is missing. Shape: (N, L) to (N, L).

    Example:
        >>> boundary_depths(np.array([[1.0, 0.5, np.nan, 1.0]]))
        array([[1. , 1.5, nan, nan]])
    """
    return np.cumsum(thickness, axis=1)


def layers_figure(
    stack: CompletedStack, truth: NDArray[np.float64] | None = None, shown: int = 12
) -> Figure:
    """Draw a stack before and after, with where values are from and how sure they are.

    Args:
        stack: Completed.
        truth: True thickness [m], where it is known. Shape: (N, L).
        shown: At most so many boundaries are drawn, evenly over depth.
    """
    figure, axes = new_figure(2, 2, width=6.0, height=3.6)
    (before, after), (kinds, spread) = axes
    layers = stack.observed.shape[1]
    drawn = np.unique(np.linspace(0, layers - 1, min(shown, layers)).astype(int))
    along = stack.distance / 1000
    depth = boundary_depths(stack.thickness)
    _boundaries(before, along, depth, stack, drawn, seen_only=True)
    _boundaries(after, along, depth, stack, drawn, seen_only=False)
    if truth is not None:
        for k, values in enumerate(boundary_depths(truth)[:, drawn].T):
            label = "truth" if not k else None
            after.plot(along, values, color=COLORS[2], lw=0.7, ls=":", label=label)
    before.set_title(f"{stack.stack}: as traced")
    after.set_title("completed")
    bottom = max(1e-3, float(np.nanmax(depth, initial=0.0)) * 1.2)  # with room for the legend
    for ax in (before, after):
        ax.set(ylim=(bottom, 0), xlabel="along track [km]", ylabel="depth [m]")
    handles, labels = after.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))  # one entry for each kind of line
    after.legend(unique.values(), unique.keys(), fontsize=6, loc="lower center", ncols=3)
    _provenance(kinds, stack)
    heatmap(
        spread, np.asarray(stack.std, np.float64).T, title="standard deviation [m]",
        xlabel="trace", ylabel="layer (1: newest)", first_row=1,
    )  # fmt: skip
    return figure


def _boundaries(
    ax: Axes,
    along: NDArray[np.float64],
    depth: NDArray[np.float64],
    stack: CompletedStack,
    drawn: NDArray[np.int64],
    seen_only: bool,
) -> None:
    """Lower boundaries of layers, coloured by where their layer's thickness is from."""
    for k in drawn:
        kind, line = stack.provenance[:, k], depth[:, k]
        for value, name in enumerate(PROVENANCE[: 1 if seen_only else 3]):
            part = np.where(kind == value, line, np.nan)
            if not np.isfinite(part).any():
                continue  # no entry of the legend either
            # dots, too: a trace between two others of another kind makes no line
            ax.plot(along, part, color=_KINDS[name], lw=1.0, marker=".", ms=1.5, label=_words(name))
        if not seen_only:
            half = np.where(np.isfinite(stack.std[:, k]), _HALF * stack.std[:, k], np.nan)
            label = "90 % of the layer's thickness"
            ax.fill_between(
                along, line - half, line + half, color=_KINDS["filled"], alpha=0.2, lw=0,
                label=label if np.isfinite(half).any() else None,
            )  # fmt: skip


def _words(name: str) -> str:
    return name.replace("_", " ")


def _provenance(ax: Axes, stack: CompletedStack) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    ax.imshow(
        stack.provenance.T, aspect="auto", interpolation="nearest", vmin=0,
        vmax=len(_KINDS) - 1, cmap=ListedColormap(list(_KINDS.values())),
        extent=(-0.5, len(stack.provenance) - 0.5, stack.provenance.shape[1] + 0.5, 0.5),
    )  # fmt: skip
    ax.grid(visible=False)
    ax.set(title="where values are from", xlabel="trace", ylabel="layer (1: newest)")
    patches = [
        Patch(color=color, label=_words(name))
        for value, (name, color) in enumerate(_KINDS.items())
        if (stack.provenance == value).any()
    ]
    ax.legend(handles=patches, fontsize=6, loc="lower left", framealpha=0.9)


def depth_figure(errors: Mapping[str, Mapping[int, float]]) -> Figure:
    """Draw the error of missing entries by depth.

    Args:
        errors: For each method, the root mean squared error [m] by number of the layer, as
            :meth:`fulgurite.models.ice_layers.CompletionMetrics.by_depth`.
    """
    figure, axes = new_figure()
    ax = axes[0][0]
    for name, values in errors.items():
        ax.plot([*values], [*values.values()], marker="o", ms=3, label=name)
    ax.set(title="missing entries by depth", xlabel="layer (1: newest)", ylabel="RMSE [m]")
    ax.set_ylim(bottom=0)
    use_integer_ticks(ax)
    if errors:
        ax.legend(fontsize=7)
    return figure


def depth_table(errors: Mapping[str, Mapping[int, float]], digits: int = 3) -> str:
    """The error of missing entries by depth, as a Markdown table.

    Args:
        errors: As of :func:`depth_figure`.
        digits: After the point.

    Example:
        >>> print(depth_table({"ridge": {1: 0.1, 2: 0.12}, "kriging": {2: 0.05}}))
        | RMSE [m] | layer 1 | layer 2 |
        | --- | --- | --- |
        | ridge | 0.100 | 0.120 |
        | kriging | – | 0.050 |
    """
    layers = sorted({layer for values in errors.values() for layer in values})
    rows: list[Sequence[str]] = [["RMSE [m]", *(f"layer {k}" for k in layers)]]
    rows.append(["---"] * (len(layers) + 1))
    for name, values in errors.items():
        cells = [f"{values[k]:.{digits}f}" if k in values else "–" for k in layers]
        rows.append([name, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def calibration_figure(coverages: Mapping[str, Mapping[float, float]]) -> Figure:
    """Draw how many true values intervals hold against how many they should hold.

    Args:
        coverages: For each method, the coverage by probability of the interval, as
            :meth:`fulgurite.models.ice_layers.CompletionMetrics.calibration`.
    """
    figure, axes = new_figure(width=3.6)
    ax = axes[0][0]
    ax.plot([0, 1], [0, 1], color="#8C8C8C", lw=0.8, ls="--")
    for name, values in coverages.items():
        ax.plot([*values], [*values.values()], marker="o", ms=3, label=name)
    ax.set(
        title="intervals of missing entries", xlabel="probability of the interval",
        ylabel="share of true values inside", xlim=(0, 1), ylim=(0, 1),
    )  # fmt: skip
    if coverages:
        ax.legend(fontsize=7)
    return figure
