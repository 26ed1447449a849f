"""Figures of completed stacks, and of how right they and their uncertainty are.

Axes: N traces, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fulgurite.arithmetic import ceil_div
from fulgurite.domains.ice_layers.codes import METRES, Provenance
from fulgurite.models.ice_layers.output.stacks import CompletedStack
from fulgurite.models.ice_layers.training.metrics import normal_quantile
from fulgurite.plotting import COLORS, heatmap, new_figure, use_integer_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "boundary_depths",
    "calibration_figure",
    "depth_figure",
    "depth_table",
    "layers_figure",
    "picked_depths",
]

_COLORS = dict(zip(Provenance, ("#000000", "#0072B2", "#E69F00", "#D9D9D9"), strict=True))
_HALF = normal_quantile(0.9)


def boundary_depths(thickness: NDArray[np.float64]) -> NDArray[np.float64]:
    """Depth of each layer's lower boundary below the surface [m].

    It is unknown below the first layer that is missing. Shape: (N, L) to (N, L).

    Example:
        >>> boundary_depths(np.array([[1.0, 0.5, np.nan, 1.0]]))
        array([[1. , 1.5, nan, nan]])
    """
    return np.cumsum(thickness, axis=1)


def picked_depths(stack: CompletedStack) -> NDArray[np.float64]:
    """Depth of each layer's lower boundary [m] where it was picked, NaN elsewhere.

    Shape: (N, L).
    """
    return np.where(stack.picked[:, 1:], boundary_depths(stack.thickness), np.nan)


def layers_figure(
    stack: CompletedStack, truth: NDArray[np.float64] | None = None, max_boundaries: int = 12
) -> Figure:
    """Draw the completed boundaries of a stack over the picked ones, and where values are from.

    A third panel shows the standard deviation of what was filled; where there is none, the title
    says why instead.

    Args:
        stack: Completed.
        truth: True thickness [m], where it is known. Shape: (N, L).
        max_boundaries: Most boundaries that are drawn, evenly over depth.
    """
    without = _explain_missing_std(stack)
    figure, axes = new_figure(2 if without else 3, 1, width=8.0, height=3.0)
    _draw_boundaries(axes[0][0], stack, truth, max_boundaries)
    _draw_provenance(axes[1][0], stack, without)
    if not without:
        std = np.asarray(stack.std, np.float64).T
        heatmap(axes[2][0], std, first_row=1)
        title = f"standard deviation of what was filled [{stack.unit}]"
        axes[2][0].set(title=title, xlabel="trace", ylabel="layer (1: newest)")
        _label_layers(axes[2][0], stack)
    return figure


def _explain_missing_std(stack: CompletedStack) -> str:
    """Why no uncertainty is drawn; empty where there is one."""
    if np.isfinite(stack.std).any():
        return ""
    filled = np.isin(stack.provenance, (Provenance.FILLED, Provenance.WHOLE_LAYER_FILLED))
    return "no uncertainty was calibrated" if filled.any() else "nothing was filled"


def _draw_boundaries(
    ax: Axes, stack: CompletedStack, truth: NDArray[np.float64] | None, max_boundaries: int
) -> None:
    """Depth of boundaries over distance: picked ones, completed ones over them, true ones."""
    layers = stack.observed.shape[1]
    drawn = np.unique(np.linspace(0, layers - 1, min(max_boundaries, layers)).astype(int))
    along = stack.distance / 1000
    depth = boundary_depths(stack.thickness)
    picked = np.where(np.isfinite(picked_depths(stack)), depth, np.nan)
    completed = np.where(np.isfinite(picked), np.nan, depth)
    for k in drawn:
        # dots, too: a trace between two others of another kind makes no line
        for part, color, style, label in (
            (picked[:, k], _COLORS[Provenance.OBSERVED], "-", "picked"),
            (completed[:, k], _COLORS[Provenance.FILLED], "--", "completed"),
        ):
            if np.isfinite(part).any():  # no entry of the legend either
                ax.plot(along, part, color=color, lw=1.0, ls=style, marker=".", ms=2, label=label)
        _shade_interval(ax, along, completed[:, k], stack.std[:, k])
        if truth is not None:
            line = boundary_depths(truth)[:, k]
            ax.plot(along, line, color=COLORS[2], lw=0.7, ls=":", label="truth")
    bottom = max(1e-3, float(np.nanmax(depth, initial=0.0)) * 1.25)  # with room for the legend
    ax.set(
        ylim=(bottom, 0),
        xlabel="along track [km]",
        ylabel=f"depth [{stack.unit}]",
        title=stack.stack,
    )
    _name_boundaries(ax, depth, drawn, stack)
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))  # one entry for each kind of line
    if unique:
        ax.legend(unique.values(), unique.keys(), fontsize=6, loc="lower center", ncols=4)


def _shade_interval(
    ax: Axes, along: NDArray[np.float64], depth: NDArray[np.float64], std: NDArray[np.float32]
) -> None:
    half = np.where(np.isfinite(depth), _HALF * std, np.nan)
    if np.isfinite(half).any():
        ax.fill_between(
            along, depth - half, depth + half, color=_COLORS[Provenance.FILLED], alpha=0.2, lw=0,
            label="90 % of the layer's thickness",
        )  # fmt: skip


def _name_boundaries(
    ax: Axes, depth: NDArray[np.float64], drawn: NDArray[np.int64], stack: CompletedStack
) -> None:
    """Write the layer of each drawn boundary, its lower one, at the right end of its line."""
    for k in drawn:
        finite = np.flatnonzero(np.isfinite(depth[:, k]))
        if len(finite):
            ax.annotate(
                _layer_label(stack, k), (stack.distance[finite[-1]] / 1000, depth[finite[-1], k]),
                xytext=(4, 0), textcoords="offset points", fontsize=6, va="center",
                annotation_clip=False,
            )  # fmt: skip


def _layer_label(stack: CompletedStack, k: int) -> str:
    """Number of a layer, from 1, and its name where it has one of its own."""
    name = stack.layer_names[k] if stack.layer_names else ""
    return str(k + 1) if not name or name == f"layer_{k + 1:02}" else f"{k + 1} {name[:20]}"


def _label_layers(ax: Axes, stack: CompletedStack) -> None:
    """Put the ticks of the vertical axis on the numbers of layers."""
    layers = stack.observed.shape[1]
    step = ceil_div(layers, 15)  # what is legible
    ticks = range(1, layers + 1, step)
    ax.set_yticks(ticks, [_layer_label(stack, k - 1) for k in ticks], fontsize=7)


def _spell(name: str) -> str:
    return name.replace("_", " ")


def _draw_provenance(ax: Axes, stack: CompletedStack, note: str) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    ax.imshow(
        stack.provenance.T, aspect="auto", interpolation="nearest", vmin=0,
        vmax=len(_COLORS) - 1, cmap=ListedColormap(list(_COLORS.values())),
        extent=(-0.5, len(stack.provenance) - 0.5, stack.provenance.shape[1] + 0.5, 0.5),
    )  # fmt: skip
    ax.grid(visible=False)
    title = "where thicknesses are from" + (f" ({note})" if note else "")
    ax.set(title=title, xlabel="trace", ylabel="layer (1: newest)")
    use_integer_ticks(ax)
    _label_layers(ax, stack)
    patches = [
        Patch(color=color, label=_spell(code.meaning))
        for code, color in _COLORS.items()
        if (stack.provenance == code).any()
    ]
    ax.legend(handles=patches, fontsize=6, loc="lower left", framealpha=0.9)


def depth_figure(errors: Mapping[str, Mapping[int, float]], unit: str = METRES) -> Figure:
    """Draw the error of missing entries by depth.

    Args:
        errors: For each method, the root mean squared error by number of the layer, as
            :meth:`fulgurite.models.ice_layers.CompletionMetrics.by_depth`.
        unit: Unit of the errors.
    """
    figure, axes = new_figure()
    ax = axes[0][0]
    for name, values in errors.items():
        ax.plot([*values], [*values.values()], marker="o", ms=3, label=name)
    ax.set(title="missing entries by depth", xlabel="layer (1: newest)", ylabel=f"RMSE [{unit}]")
    ax.set_ylim(bottom=0)
    use_integer_ticks(ax)
    if errors:
        ax.legend(fontsize=7)
    return figure


def depth_table(errors: Mapping[str, Mapping[int, float]], digits: int = 3) -> str:
    """The error of missing entries by depth, as a Markdown table.

    Args:
        errors: Errors by method and layer, as of :func:`depth_figure`.
        digits: Digits after the point.

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
