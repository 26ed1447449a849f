"""Errors of completed stacks, by kind of missing entry and by depth, in metres.

Everything is a sum and a count, so that batches and ranks of any size add up exactly.

Axes: N traces of all stacks, L layers, G groups, Q levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fulgurite.domains.ice_layers.spans import TensorSpans
from fulgurite.errors import ConfigError, DataError

__all__ = [
    "GROUPS",
    "LEVELS",
    "CompletionMetrics",
    "MaskedMAE",
    "MaskedRMSE",
    "Targets",
    "absent_layers",
    "interval_coverage",
    "normal_quantile",
]

GROUPS = (
    "missing", "gap", "absent", "extra", "heldout", "visible", "between", "open", "misled", "sound",
)  # fmt: skip
"""Kinds of entries: all missing ones, those of partly traced and of wholly absent layers, those
dropped at test, those held out in validation, and those that were given. Of missing ones those that
are a part of a measured sum which the truth confirms, those that are a part of none, those whose
sum is wrong because a pick beside them is on another boundary, and all but these."""

_WRONG = 0.3  # of a layer: picks are not as noisy as that

LEVELS = tuple(round(0.1 * k, 1) for k in range(1, 10))
"""Probabilities of the central intervals whose coverage is counted."""


def absent_layers(observed: Tensor, node_stack: Tensor) -> Tensor:
    """Whether a trace's layer has no pick anywhere in its stack.

    Args:
        observed: Shape: (N, L), bool.
        node_stack: Stack of each trace. Shape: (N,).

    Shape: to (N, L), bool.

    Example:
        >>> observed = torch.tensor([[True, False], [False, False], [False, True]])
        >>> absent_layers(observed, torch.tensor([0, 0, 1]))
        tensor([[False,  True],
                [False,  True],
                [ True, False]])
    """
    if not len(observed):
        return observed.clone()
    stacks = int(node_stack.max()) + 1
    picks = torch.zeros(stacks, observed.shape[1], device=observed.device)
    picks.index_add_(0, node_stack, observed.float())
    return (picks == 0)[node_stack]


def normal_quantile(level: float) -> float:
    """Half width of the central interval of a normal distribution [standard deviations].

    Example:
        >>> round(normal_quantile(0.9), 4)
        1.6449
    """
    return float(torch.special.ndtri(torch.tensor(0.5 + 0.5 * level, dtype=torch.float64)))


def interval_coverage(predicted: Tensor, truth: Tensor, std: Tensor, level: float = 0.9) -> Tensor:
    """Fraction of true values inside the central interval; entries with NaN do not count.

    Args:
        predicted: [m]. Shape: (...).
        truth: [m]. Shape: (...).
        std: [m]. Shape: (...).
        level: Probability of the interval.

    Shape: to (); NaN if nothing counts.

    Example:
        >>> zero = torch.zeros(4)
        >>> interval_coverage(zero, torch.tensor([0.0, 1.0, 2.0, torch.nan]), zero + 1)
        tensor(0.6667)
    """
    error = (predicted - truth).abs()
    valid = error.isfinite() & std.isfinite()
    return (error <= normal_quantile(level) * std)[valid].float().mean()


class _MaskedError(Metric):
    """A mean over the entries of a mask, of all batches and ranks."""

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("total", "count"):
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(name, zero, dist_reduce_fx="sum")

    def _size(self, error: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, predicted: Tensor, truth: Tensor, mask: Tensor) -> None:
        """Count a batch; what is outside the mask may be anything.

        Args:
            predicted: [m]. Shape: (N, L).
            truth: [m]. Shape: (N, L).
            mask: Shape: (N, L), bool.
        """
        error = predicted[mask].double() - truth[mask].double()
        self.total += self._size(error).sum()
        self.count += len(error)

    def compute(self) -> Tensor:
        """The mean; NaN of nothing. Shape: to ()."""
        return self.total / self.count


class MaskedMAE(_MaskedError):
    """Mean absolute error over the entries of a mask [m].

    Example:
        >>> metric = MaskedMAE()
        >>> truth = torch.tensor([1.0, torch.nan, 3.0])
        >>> metric.update(torch.zeros(3), truth, truth.isfinite())
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    def _size(self, error: Tensor) -> Tensor:
        return error.abs()


class MaskedRMSE(_MaskedError):
    """Root mean squared error over the entries of a mask, of all batches and ranks [m].

    Example:
        >>> metric = MaskedRMSE()
        >>> metric.update(torch.zeros(1), torch.tensor([3.0]), torch.tensor([True]))
        >>> metric.update(torch.zeros(3), torch.tensor([1.0, 1.0, 1.0]), torch.ones(3) > 0)
        >>> metric.compute()  # not the mean of the batches' 3 and 1
        tensor(1.7321, dtype=torch.float64)
    """

    def _size(self, error: Tensor) -> Tensor:
        return error.square()

    def compute(self) -> Tensor:
        """The root of the mean; NaN of nothing. Shape: to ()."""
        return super().compute().sqrt()


@dataclass(frozen=True, eq=False)
class Targets:
    """What predictions of a batch are scored against, and which entries the model was given.

    Args:
        truth: [m], NaN where unknown. Shape: (N, L).
        observed: Entries that the model was given. Shape: (N, L), bool.
        node_stack: Stack of each trace in this batch. Shape: (N,).
        dropped: Picks taken away at test, so no longer in ``observed``. Shape: (N, L), bool.
        held_out: Picks hidden in validation. Shape: (N, L), bool.
        measured: The picks [m], against which held-out and visible entries are scored, and
            dropped ones where the truth is unknown; ``truth`` by default. Shape: (N, L).
        spans: Measured spans that the model was given.
    """

    truth: Tensor
    observed: Tensor
    node_stack: Tensor
    dropped: Tensor | None = None
    held_out: Tensor | None = None
    measured: Tensor | None = None
    spans: TensorSpans | None = None


class CompletionMetrics(Metric):
    """All errors of completion, from one pass over the predictions.

    Missing entries are scored where the truth is known: of generated data everywhere, of real data
    nowhere but at picks that were taken away (``extra``, ``heldout``).

    :meth:`compute` gives ``<group>_rmse``, ``_mae`` and ``_bias`` [m] for each of
    :data:`GROUPS` that has entries; ``top_rmse``, ``middle_rmse`` and ``deep_rmse`` of missing
    entries by thirds of the layers, ``layer01_rmse`` and so on layer by layer;
    ``identity_ratio`` (error of held-out over that of given entries); ``moved_rmse``, how far
    picked boundaries below missing ones are from where they were picked [m]; and where there are
    standard deviations ``<group>_coverage90``, ``_width90`` [m] and ``missing_calibration``, the
    mean distance of coverage from :data:`LEVELS`.

    Args:
        layers: L.

    Raises:
        ConfigError: ``layers`` is not positive.

    Example:
        >>> metrics = CompletionMetrics(2)
        >>> truth = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
        >>> observed = torch.tensor([[True, False], [False, False]])
        >>> targets = Targets(truth, observed, torch.zeros(2, dtype=torch.long))
        >>> metrics.update(truth + 0.5, targets)
        >>> errors = metrics.compute()
        >>> errors["missing_rmse"], errors["gap_rmse"], errors["absent_rmse"]
        (0.5, 0.5, 0.5)

    Source: docs/papers/ice_layers.md sections 4.3 and 7.
    """

    full_state_update = False
    squares: Tensor
    sizes: Tensor
    sums: Tensor
    count: Tensor
    covered: Tensor
    widths: Tensor
    judged: Tensor
    moved: Tensor

    def __init__(self, layers: int, **options: Any) -> None:
        super().__init__(**options)
        if layers < 1:
            raise ConfigError(f"CompletionMetrics got {layers} layers.", "Give 1 or more.")
        self.layers = layers
        by_layer, by_level = (len(GROUPS), layers), (len(GROUPS), len(LEVELS))
        shapes: dict[str, tuple[int, ...]] = {}
        shapes |= dict.fromkeys(("squares", "sizes", "sums", "count"), by_layer)
        shapes |= {"covered": by_level, "widths": (len(GROUPS),), "judged": (len(GROUPS),)}
        shapes |= {"moved": (2,)}
        for name, shape in shapes.items():
            zeros = torch.zeros(shape, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")
        self._half = [normal_quantile(level) for level in LEVELS]
        self._whole: dict[str, Tensor] = {}  # of all ranks, when compute() saw them

    def reset(self) -> None:
        """Reset all sums."""
        super().reset()
        self._whole = {}

    def update(
        self,
        predicted: Tensor,
        targets: Targets,
        *,
        std: Tensor | None = None,
        noise: float = 0.0,
    ) -> None:
        """Count a batch.

        Args:
            predicted: [m]; NaN, left missing, does not count. Shape: (N, L).
            targets: What they are scored against.
            std: Standard deviation of the predictions [m], NaN where there is none. Shape: (N, L).
            noise: Standard deviation of a pick's own error [m], where ``std`` does not hold it.

        Raises:
            DataError: Shapes differ, or the number of layers is another one.
        """
        self._whole = {}
        truth, observed, spans = targets.truth, targets.observed, targets.spans
        held_out, dropped, measured = targets.held_out, targets.dropped, targets.measured
        shape = observed.shape
        arrays = (predicted, truth, std, dropped, held_out, measured)
        if shape[1:] != (self.layers,) or any(x is not None and x.shape != shape for x in arrays):
            raise DataError(
                f"CompletionMetrics for {self.layers} layers got arrays of "
                f"{[tuple(x.shape) for x in (observed, *arrays) if x is not None]}.",
                "Give arrays of one shape, traces by layers.",
            )
        none = torch.zeros_like(observed)
        held_out = none if held_out is None else held_out
        dropped = none if dropped is None else dropped & ~held_out
        visible = observed & ~held_out & ~dropped
        picks = visible | held_out | dropped
        missing = ~picks
        absent = absent_layers(picks, targets.node_stack)
        measured = truth if measured is None else measured
        reference = torch.where(truth.isfinite(), truth, measured)
        between = none if spans is None else spans.between & missing
        wrong = none if spans is None else between & (spans.misfit(truth).abs() > _WRONG * truth)
        groups = (
            missing, missing & ~absent, missing & absent, dropped, held_out, visible,
            between & ~wrong, missing & ~between, wrong, missing & ~wrong,
        )  # fmt: skip
        if spans is not None:
            off = spans.misfit(predicted)[spans.between & spans.first]
            off = off[off.isfinite()]
            self.moved += torch.stack([off.square().sum(), off.new_tensor(len(off))])
        for g, (name, mask) in enumerate(zip(GROUPS, groups, strict=True)):
            picked = name in ("heldout", "visible")
            # what is missing has no pick, whatever stands in its place
            target = measured if picked else reference if name == "extra" else truth
            self._add(g, predicted, target, mask, std=std, noise=noise if picked else 0.0)

    def _add(
        self,
        group: int,
        predicted: Tensor,
        target: Tensor,
        mask: Tensor,
        *,
        std: Tensor | None,
        noise: float,
    ) -> None:
        error = predicted.double() - target.double()
        mask = mask & error.isfinite()
        error = torch.where(mask, error, 0.0)
        self.squares[group] += error.square().sum(0)
        self.sizes[group] += error.abs().sum(0)
        self.sums[group] += error.sum(0)
        self.count[group] += mask.sum(0)
        if std is None:
            return
        judged = mask & std.isfinite()
        size, total_std = error[judged].abs(), (std[judged].double().square() + noise**2).sqrt()
        self.judged[group] += len(size)
        self.widths[group] += 2 * normal_quantile(0.9) * total_std.sum()
        for q, half in enumerate(self._half):
            self.covered[group, q] += (size <= half * total_std).sum()

    def compute(self) -> dict[str, float]:
        """Every metric that has entries, by name."""
        metrics: dict[str, float] = {}
        self._whole = {
            name: getattr(self, name).clone() for name in ("squares", "count", "covered", "judged")
        }
        count = self.count.sum(1)
        for g, name in enumerate(GROUPS):
            n = float(count[g])
            if not n:
                continue
            metrics[f"{name}_rmse"] = float((self.squares[g].sum() / n).sqrt())
            metrics[f"{name}_mae"] = float(self.sizes[g].sum() / n)
            metrics[f"{name}_bias"] = float(self.sums[g].sum() / n)
            if judged := float(self.judged[g]):
                metrics[f"{name}_coverage90"] = float(self.covered[g, LEVELS.index(0.9)]) / judged
                metrics[f"{name}_width90"] = float(self.widths[g]) / judged
        if float(self.moved[1]):
            metrics["moved_rmse"] = float((self.moved[0] / self.moved[1]).sqrt())
        if "heldout_mae" in metrics and metrics.get("visible_mae", 0.0) > 0:
            metrics["identity_ratio"] = metrics["heldout_mae"] / metrics["visible_mae"]
        calibration = self.calibration()
        if calibration:
            off = [abs(coverage - level) for level, coverage in calibration.items()]
            metrics["missing_calibration"] = sum(off) / len(off)
        g = GROUPS.index("missing")
        cuts = [round(k * self.layers / 3) for k in range(4)]
        for name, low, high in zip(("top", "middle", "deep"), cuts, cuts[1:], strict=False):
            if n := float(self.count[g, low:high].sum()):
                metrics[f"{name}_rmse"] = float((self.squares[g, low:high].sum() / n).sqrt())
        for number, value in self.by_depth().items():
            metrics[f"layer{number:02d}_rmse"] = value
        return metrics

    def by_depth(self, group: str = "missing") -> dict[int, float]:
        """Root mean squared error of each layer that has entries [m], the newest being 1.

        Of all ranks after :meth:`compute`, else of this one; so is :meth:`calibration`.
        """
        g = GROUPS.index(group)
        pairs = zip(self._sum("squares")[g].tolist(), self._sum("count")[g].tolist(), strict=True)
        return {k + 1: (s / n) ** 0.5 for k, (s, n) in enumerate(pairs) if n}

    def calibration(self, group: str = "missing") -> Mapping[float, float]:
        """Coverage of the central interval of each of :data:`LEVELS`; empty without intervals."""
        g = GROUPS.index(group)
        if not (judged := float(self._sum("judged")[g])):
            return {}
        covered = self._sum("covered")[g].tolist()
        return {level: n / judged for level, n in zip(LEVELS, covered, strict=True)}

    def _sum(self, name: str) -> Tensor:
        total: Tensor = self._whole[name] if name in self._whole else getattr(self, name)
        return total
