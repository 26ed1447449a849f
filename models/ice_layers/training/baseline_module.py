"""Baselines as a LightningModule, so that they stand in one table with the network.

Axes: B stacks, N traces of all of them, L layers, P physical fields.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from fulgurite.base import SystemModule, save_options
from fulgurite.domains.ice_layers.spans import Spans, TensorSpans
from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.models.ice_layers.baselines.covariance import KrigingStack, join_stacks, thin_stacks
from fulgurite.models.ice_layers.baselines.interpolation import (
    Ridge,
    along_then_across,
    along_track,
    fit_ridge,
    layer_means,
    own_layer_mean,
)
from fulgurite.models.ice_layers.baselines.kriging import Kriging
from fulgurite.models.ice_layers.baselines.kriging_fit import fit_kriging
from fulgurite.models.ice_layers.baselines.options import (
    KrigingFitOptions,
    LineOptions,
    RegressionOptions,
)
from fulgurite.models.ice_layers.data.batches import check_batch, known_truth, refuse_seen
from fulgurite.models.ice_layers.data.graph import Track
from fulgurite.models.ice_layers.data.hiding import held_out
from fulgurite.models.ice_layers.output.completion import fill, measure_gaps
from fulgurite.models.ice_layers.training.metrics import CompletionMetrics, Targets
from fulgurite.models.ice_layers.training.options import BaselinePrediction
from fulgurite.options import check_arguments, make_options
from fulgurite.sampling import rank_and_world

__all__ = ["BaselineCompletion", "BaselineMethod"]

BaselineMethod = Literal["mean", "layer_mean", "along", "linear", "ridge", "kriging"]

_FIELDS = ("thickness", "observed", "physics", "distance", "segment", "stack", "ptr")


class _Row(NamedTuple):
    """A stack of a loader, its number and that of its flight segment."""

    number: int
    segment: int
    stack: KrigingStack


class BaselineCompletion(SystemModule):
    """Completes stacks without a network; fitted on training stacks before the first epoch.

    Nothing is trained by gradients, so one epoch is enough.

    Args:
        method: ``mean``: each layer's mean over training stacks. ``layer_mean``: its mean in the
            stack itself. ``along``: lines along the track by the 300/60 m rule; what that leaves
            missing takes ``layer_mean``. ``linear``: lines along the track, then across layers.
            ``ridge``: regression of each layer on its physics. ``kriging``: on all that is
            observed, with a physics drift. Where there is nothing to go by, all take ``mean``.
        lines: How far lines along the track reach, in ``along``.
        regression: The regression on physics, in ``ridge`` and ``kriging``.
        fit: The fit of the covariance of ``kriging``.
        prediction: What becomes of what the method predicts.

    Attributes:
        trained_segments: Names of the flight segments that it was fitted on, or that decided what
            was fitted, which completed stacks carry for the leakage rule.

    Raises:
        ConfigError: ``method`` is unknown, or does not fit other options.

    Source: docs/papers/ice_layers.md sections 4.3 and 5; kriging:
    :mod:`fulgurite.models.ice_layers.baselines.kriging`.
    """

    monitor = None

    def __init__(
        self,
        method: BaselineMethod = "kriging",
        *,
        lines: LineOptions = LineOptions(),
        regression: RegressionOptions = RegressionOptions(),
        fit: KrigingFitOptions = KrigingFitOptions(),
        prediction: BaselinePrediction = BaselinePrediction(),
    ) -> None:
        super().__init__()
        check_arguments(BaselineCompletion.__init__, locals(), "model.init_args")
        save_options(self)
        self.method: BaselineMethod = method
        self.lines = make_options(LineOptions, lines)
        self.regression = make_options(RegressionOptions, regression)
        self.fit_options = make_options(KrigingFitOptions, fit)
        self.prediction = make_options(BaselinePrediction, prediction)
        if self.prediction.keep_boundaries == "trusted" and method != "kriging":
            option = "model.init_args.prediction.keep_boundaries"
            raise ConfigError(
                f"{option}=trusted, and {method} does not know which picks are contradicted.",
                f"Use {option}=all or none, or model.init_args.method=kriging.",
            )
        # a loss needs one, and so does DistributedDataParallel; it is never trained
        self.anchor = nn.Parameter(torch.zeros(1))
        self.trained_segments: tuple[str, ...] = ()
        self.means: Tensor | None = None
        self.ridge: Ridge | None = None
        self.kriging: Kriging | None = None
        self.metrics: CompletionMetrics | None = None

    # --- fitting -------------------------------------------------------------------------------

    def configure_optimizers(self) -> None:
        """Return no optimizer, since nothing is trained by gradients."""
        for message in ("this fit will run with no optimizer", "no gradient clipping will occur"):
            warnings.filterwarnings("ignore", f".*{message}.*")

    def on_train_start(self) -> None:
        """Fit on the training stacks of all ranks.

        Raises:
            DataError: Nothing is observed in the training stacks.
        """
        if self.means is not None:  # a run that goes on
            return
        rows = self._gather(self.trainer.train_dataloader)
        chosen_on = self._gather(self._set_up_validation()) if self._chooses else []
        self.fit(
            [row.stack for row in rows],
            [row.segment for row in rows],
            [row.stack for row in chosen_on],
        )
        if self._chooses and self.kriging is not None:
            drift = "logarithms of thickness" if self.kriging.drift.log else "thickness itself"
            judges = f"{len(chosen_on)} validation" if chosen_on else f"{len(rows)} training"
            rank_zero_info(f"Kriging takes a drift of {drift}, chosen on {judges} stacks.")
        if names := getattr(getattr(self.trainer, "datamodule", None), "segments", ()):
            segments = {names[row.segment] for row in [*rows, *chosen_on]}
            self.trained_segments = tuple(sorted(segments))

    @property
    def _chooses(self) -> bool:
        """Whether validation flights decide something."""
        return self.method == "kriging" and self.regression.kind == "auto"

    def _set_up_validation(self) -> Any:
        """The loaders of validation, also where no epoch of this fit is validated."""
        trainer = self.trainer
        if trainer.val_dataloaders is None and trainer.enable_validation:
            trainer.validating = True  # as Lightning does before an epoch that is validated
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True
        return trainer.val_dataloaders

    def _gather(self, loaders: Any) -> list[_Row]:
        """The stacks of loaders on all ranks, in the order of their numbers, each once."""
        loaders = loaders if isinstance(loaders, list) else [loaders]
        rows = [
            _Row(number, segment, stack)
            for loader in loaders
            if loader is not None
            for batch in loader
            for (number, stack), segment in zip(
                self._stacks(batch), batch.segment.tolist(), strict=True
            )
        ]
        if (world := rank_and_world()[1]) > 1:
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, rows)
            rows = [row for part in everyone for row in part]
        ordered = sorted(rows, key=lambda row: row.number)
        return list({row.number: row for row in ordered}.values())

    def fit(
        self,
        stacks: list[KrigingStack],
        segments: list[int] | None = None,
        validation: Sequence[KrigingStack] = (),
    ) -> None:
        """Fit on stacks.

        Args:
            stacks: The training stacks, on the CPU.
            segments: Number of the flight segment of each.
            validation: Stacks of other segments, on which ``kriging`` may choose its drift.

        Raises:
            DataError: There is no stack, or nothing is observed in them.
        """
        if not stacks:
            raise DataError("There is no training stack.", "Check `data.init_args.source`.")
        thickness, observed, physics = join_stacks(thin_stacks(stacks))
        self.means = layer_means(thickness, observed).double()
        if self.method == "ridge":
            penalty, log = self.regression.penalty, self.regression.kind == "log"
            self.ridge = fit_ridge(thickness, observed, physics, penalty, log=log)
        elif self.method == "kriging":
            self.kriging = fit_kriging(
                stacks,
                segments,
                fit=self.fit_options,
                drift=self.regression.kind,
                validation=validation,
            )

    def _stacks(
        self, batch: Any, visible_spans: TensorSpans | None = None
    ) -> Iterator[tuple[int, KrigingStack]]:
        """Number and arrays of each stack of a batch, on the CPU.

        Args:
            batch: A batch of PyG.
            visible_spans: Measured spans that the method may use; all of the batch by default.
        """
        check_batch(batch, _FIELDS)
        spans = Spans.of_batch(batch) if visible_spans is None else visible_spans
        is_free = self.prediction.keep_boundaries == "none"
        spans = (spans.single() if is_free else spans).to("cpu")
        arrays = [getattr(batch, name).cpu() for name in ("thickness", "physics", "distance")]
        bounds = batch.ptr.tolist()
        for number, first, stop in zip(batch.stack.tolist(), bounds, bounds[1:], strict=False):
            rows = slice(first, stop)
            thickness, physics, distance = (x[rows] for x in arrays)
            yield number, KrigingStack.of_spans(thickness, spans[rows], physics, distance)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Nothing: all was fitted before. The loss is 0 and has no optimizer.

        There is one so that settings which networks need (clipping of gradients, several ranks)
        can stay as they are.
        """
        return 0 * self.anchor.sum()

    # --- prediction ----------------------------------------------------------------------------

    def predict_stack(self, stack: KrigingStack) -> tuple[Tensor, Tensor]:
        """Predicted thickness of all entries and its standard deviation, NaN if unknown [m].

        Only kriging knows a standard deviation.

        Args:
            stack: The stack, on the CPU.

        Shape: to (N, L) and (N, L), float64.

        Raises:
            CheckpointError: Nothing was fitted.
            DataError: The stack has another number of layers than the training stacks.
        """
        if self.means is None:
            raise CheckpointError(
                "The baseline was not fitted.", "Fit it, or give the checkpoint of such a run."
            )
        if stack.thickness.shape[1] != len(self.means):
            raise DataError(
                f"A stack has {stack.thickness.shape[1]} layers, the training stacks had "
                f"{len(self.means)}.",
                "Use the data options of the run that was fitted.",
            )
        if self.kriging is not None:
            return self.kriging(stack, trust_all=self.prediction.keep_boundaries == "all")
        filled = stack.measured.constrain(self._fill(stack))
        return filled, torch.full_like(filled, torch.nan)

    def _fill(self, stack: KrigingStack) -> Tensor:
        """Predicted thickness of each layer for itself [m]. Shape: to (N, L), float64."""
        assert self.means is not None
        if self.ridge is not None:
            return self.ridge(stack.physics)
        thickness, observed = stack.thickness.double(), stack.observed
        distance = stack.distance.double()
        if self.method == "mean":
            return self.means.expand(thickness.shape).clone()
        if self.method == "linear":
            return along_then_across(thickness, observed, distance, self.means)
        filled = own_layer_mean(thickness, observed, self.means)
        if self.method == "along":
            longest = torch.inf if self.lines.max_length is None else self.lines.max_length
            lines = along_track(thickness, observed, distance, longest, reach=self.lines.reach)
            filled = torch.where(lines.isfinite(), lines, filled)
        return filled

    def predict(self, batch: Any, visible_spans: TensorSpans) -> tuple[Tensor, Tensor]:
        """:meth:`predict_stack` for a batch of which some spans are visible. Shape: (N, L) each."""
        pairs = [self.predict_stack(stack) for _, stack in self._stacks(batch, visible_spans)]
        mean, std = (torch.cat(part).to(batch.ptr.device) for part in zip(*pairs, strict=True))
        return mean, std

    def on_predict_start(self) -> None:
        """Say that a method has no uncertainty, where it has none."""
        if self.kriging is None:
            warnings.warn(
                f"The method {self.method} knows no uncertainty: that of what it fills is NaN.",
                stacklevel=2,
            )

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Complete a batch as :meth:`~fulgurite.models.ice_layers.IceCompletion.predict_step`."""
        predicted, std = self.predict(batch, Spans.of_batch(batch))
        track = Track.of_batch(batch)
        gaps = measure_gaps(batch.observed, batch.distance, track)
        completed = fill(
            batch.thickness,
            batch.observed,
            gaps,
            predicted,
            std=std.float(),
            max_gap=self.prediction.max_gap,
        )
        return {**completed, "stack": batch.stack[track.stack]}

    # --- evaluation ----------------------------------------------------------------------------

    @property
    def _noise(self) -> float:
        return self.kriging.noise if self.kriging is not None else 0.0

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics."""
        self._begin()

    def on_test_start(self) -> None:
        """Refuse test segments that the fit has seen.

        Raises:
            DataError: A segment of the test was fitted on.
        """
        refuse_seen(self.trained_segments, getattr(self.trainer, "datamodule", None))

    def on_test_epoch_start(self) -> None:
        """Reset the metrics."""
        self._begin()

    def _begin(self) -> None:
        # a rank without a stack takes part in the sums, too
        self.metrics = None
        if self.means is not None:
            self.metrics = CompletionMetrics(len(self.means)).to(self.device)

    def _evaluate(self, batch: Any, visible_spans: TensorSpans, hidden: Tensor | None) -> None:
        mean, std = self.predict(batch, visible_spans)
        assert self.metrics is not None
        targets = Targets(
            known_truth(batch),
            batch.observed,
            Track.of_batch(batch).stack,
            dropped=getattr(batch, "dropped", None),
            held_out=hidden,
            measured=batch.thickness,
            spans=visible_spans,
        )
        self.metrics.update(mean, targets, std=std, noise=self._noise)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score held-out observed entries, and missing ones where the truth is known."""
        if self.trainer.sanity_checking:  # that is before the fit
            return
        spans = Spans.of_batch(batch)
        visible_spans = spans.hide(held_out(spans.picked, Track.of_batch(batch), batch.stack))
        self._evaluate(batch, visible_spans, batch.observed & ~visible_spans.observed)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score missing entries where the truth is known, and dropped ones."""
        self._evaluate(batch, Spans.of_batch(batch), None)

    def _finish(self, stage: str) -> None:
        if self.metrics is None:
            return
        # what is logged below is equal on every rank already
        warnings.filterwarnings("ignore", ".*recommended to use.*sync_dist=True.*")
        errors: dict[str, float] = self.metrics.compute()
        self.log_dict({f"{stage}/{name}": value for name, value in errors.items()}, batch_size=1)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._finish("test")

    # --- checkpoint ----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what was fitted, as tensors."""
        state: dict[str, Any] = {}
        if self.means is not None:
            state["means"] = self.means
        if self.ridge is not None:
            state["ridge"] = dict(vars(self.ridge))
        if self.kriging is not None:
            state["kriging"] = self.kriging.state()
        checkpoint["ice_baseline"] = {"method": self.method, **state}
        checkpoint["ice_segments"] = list(self.trained_segments)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what was fitted.

        Raises:
            CheckpointError: The checkpoint is of another method.
        """
        state = checkpoint.get("ice_baseline", {})
        if state.get("method") != self.method:
            raise CheckpointError(
                f"The checkpoint is of method {state.get('method')}, not {self.method}.",
                "Set model.init_args.method to that of the checkpoint.",
            )
        self.trained_segments = tuple(checkpoint.get("ice_segments", ()))
        self.means = state.get("means")
        self.ridge = Ridge(**state["ridge"]) if "ridge" in state else None
        self.kriging = Kriging.from_state(state["kriging"]) if "kriging" in state else None
