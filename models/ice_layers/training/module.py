"""The LightningModule of completion: network, hiding, loss, metrics and completed stacks.

Axes: B stacks, N traces of all of them, L layers, P physical fields. What a batch holds:
:mod:`fulgurite.models.ice_layers.data.batches`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from fulgurite.base import save_options
from fulgurite.domains.ice_layers.codes import Provenance
from fulgurite.domains.ice_layers.spans import Spans, TensorSpans
from fulgurite.errors import ConfigError
from fulgurite.models.ice_layers.data.batches import known_truth
from fulgurite.models.ice_layers.data.graph import Track
from fulgurite.models.ice_layers.data.hiding import held_out
from fulgurite.models.ice_layers.data.normalise import Normalised
from fulgurite.models.ice_layers.networks.features import find_contradicted
from fulgurite.models.ice_layers.output.completion import Gaps, fill, measure_gaps
from fulgurite.models.ice_layers.training.ice_module import IceModule
from fulgurite.models.ice_layers.training.metrics import Targets
from fulgurite.models.ice_layers.training.options import (
    CompletionInputs,
    CompletionLoss,
    CompletionPrediction,
)
from fulgurite.models.ice_layers.training.uncertainty import entry_features, mean_and_std
from fulgurite.options import check_arguments
from fulgurite.sampling import rank_and_world

__all__ = ["IceCompletion"]

_TRAPPED = 0.7  # of the error of each layer's mean, above which a network only copies
_PER_BATCH = 4096  # held-out residuals of a batch that calibration keeps


class IceCompletion(IceModule):
    """Completes stacks: fills what is missing from what is visible and from physics.

    Training hides observed entries and asks for all. Validation hides a fixed part of the observed
    entries, scores it, calibrates the uncertainty on it, and stops a run that only copies.

    Args:
        network: The network, or what makes it from (layers, fields), such as the class
            :class:`~fulgurite.models.ice_layers.CompletionNet`.
        inputs: What networks are shown, and what training hides from them.
        loss: The robust loss, and the entries that it counts.
        prediction: What networks predict, how many of them, and what becomes of it.
        optimizer: Makes the optimizer.
        scheduler: Makes the scheduler, stepped after each step.
        weights: Checkpoint of a run whose networks and statistics are the start.
        allow_seen: Start from ``weights``, and test, though they have seen flight segments of the
            test: for segments that only share their names.

    Raises:
        ConfigError: Options do not fit together.
        CheckpointError: ``weights`` cannot be read or does not fit.

    Source: docs/papers/ice_layers.md sections 1 and 7.
    """

    monitor = "val/heldout_mae"
    inputs: CompletionInputs
    loss: CompletionLoss
    prediction: CompletionPrediction

    def __init__(
        self,
        network: Callable[[int, int], nn.Module] | nn.Module,
        inputs: CompletionInputs = CompletionInputs(),
        loss: CompletionLoss = CompletionLoss(),
        prediction: CompletionPrediction = CompletionPrediction(),
        *,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        weights: str | None = None,
        allow_seen: bool = False,
    ) -> None:
        records = {"inputs": inputs, "loss": loss, "prediction": prediction}
        super().__init__(
            network,
            **check_arguments(IceCompletion.__init__, records, "model.init_args"),
            optimizer=optimizer,
            scheduler=scheduler,
            weights=weights,
            allow_seen=allow_seen,
        )
        save_options(self, "network", "optimizer", "scheduler")
        prefix = "model.init_args"
        if self.prediction.keep_boundaries == "trusted" and self.inputs.outlier is None:
            raise ConfigError(
                f"{prefix}.prediction.keep_boundaries=trusted, and {prefix}.inputs.outlier=null "
                "trusts all picks.",
                f"Set {prefix}.inputs.outlier=2, or {prefix}.prediction.keep_boundaries=all.",
            )
        if self.loss.entries == "hidden" and self.inputs.thickness != "hidden":
            raise ConfigError(
                f"{prefix}.loss.entries=hidden, and nothing is hidden with "
                f"inputs.thickness={self.inputs.thickness}.",
                f"Set {prefix}.loss.entries=observed.",
            )
        self._held_out: list[tuple[Tensor, Tensor]] = []
        self._layer_mean_error = torch.zeros(2, dtype=torch.float64)

    # --- prediction ----------------------------------------------------------------------------

    def visible(self, observed: Tensor) -> Tensor:
        """What the network is shown at evaluation. Shape: (N, L), bool."""
        return torch.zeros_like(observed) if self.inputs.thickness == "none" else observed

    def find_consistent_spans(
        self, x: Normalised, spans: TensorSpans
    ) -> tuple[TensorSpans | None, Tensor | None]:
        """Spans that the network is trained with, none that others contradict, and what it sees.

        Args:
            x: The batch.
            spans: Measured spans that may be known.

        Returns:
            The spans, and their :meth:`shared` as an input of the network; None for none.
        """
        if self.prediction.keep_boundaries == "none":
            return None, None
        limit, is_blind = self.inputs.outlier, self.inputs.thickness == "none"
        is_filtered = limit is not None and spans.sums
        if is_blind and not is_filtered:
            return spans, None
        shared = self.shared(x, spans)
        if limit is not None and is_filtered:
            z = torch.where(spans.between, shared, x.thickness)
            off = find_contradicted(z, spans.known, x.track, x.distance, limit=limit)
            spans = spans.keep(~off | spans.observed)
            shared = torch.where(spans.between, shared, torch.nan)
        return spans, None if is_blind else shared

    @contextlib.contextmanager
    def _use_dropout(self, x: Normalised, active: bool) -> Iterator[None]:
        """Switch dropout on, with random numbers that depend on the batch alone."""
        if not active:
            yield
            return
        layers = [m for m in self.networks.modules() if isinstance(m, nn.Dropout)]
        if not any(m.p for m in layers):
            raise ConfigError(
                f"model.init_args.prediction.mc_samples={self.prediction.mc_samples}, and the "
                "network has no dropout.",
                "Set model.init_args.network.init_args.transformer.dropout above 0, or "
                "prediction.mc_samples=0.",
            )
        before = [m.training for m in layers]
        with torch.random.fork_rng(devices=[x.pos.device] if x.pos.is_cuda else []):
            torch.manual_seed(len(x.pos))
            for m in layers:
                m.train()
            try:
                yield
            finally:
                for m, was in zip(layers, before, strict=True):
                    m.train(was)

    def predict(self, x: Normalised, spans: TensorSpans) -> tuple[Tensor, Tensor]:
        """Predicted thickness and its standard deviation over members and samples [m].

        Args:
            x: The batch.
            spans: Measured spans that the networks may see.

        Raises:
            ConfigError: The networks were to be compiled, and could not be.

        Shape: to (N, L) and (N, L), float64.
        """
        mean, std, _ = self._predict_constrained(x, spans)
        return mean, std

    def _predict_constrained(
        self, x: Normalised, spans: TensorSpans
    ) -> tuple[Tensor, Tensor, TensorSpans | None]:
        """As :meth:`predict`, and the spans whose sums were kept; None for none."""
        visible = self.visible(spans.observed)
        sums, shared = self.find_consistent_spans(x, spans)
        samples = self.prediction.mc_samples
        with self._use_dropout(x, bool(samples)), self._explain_compilation():
            outs = [
                self.metres(self.forward_member(network, x, visible, shared), x)
                for network in self.networks
                for _ in range(max(1, samples))
            ]
        constraints = spans if self.prediction.keep_boundaries == "all" else sums
        if constraints is not None:
            outs = [constraints.constrain(out) for out in outs]
        return *mean_and_std(torch.stack(outs)), constraints

    def forward(self, batch: Any) -> Tensor:
        """Predicted thickness of all entries [m], observed ones too. Shape: to (N, L), float64."""
        x = self.normalise(batch)
        return self.predict(x, x.spans)[0]

    def fill(self, batch: Any) -> dict[str, Tensor]:
        """Complete the stacks of a batch.

        Returns:
            ``predicted`` [m]; ``thickness`` [m], completed, NaN where left missing;
            ``provenance``; ``std`` [m], NaN where observed or not calibrated. Shape of each:
            (N, L).
        """
        x = self.normalise(batch)
        predicted, ensemble_std, constraints = self._predict_constrained(x, x.spans)
        self.check_finite(predicted)
        gaps = measure_gaps(x.observed, x.distance, x.track)
        std = self.calibration(self._features(gaps, ensemble_std, x.spans))
        if constraints is not None:
            std = constraints.project_std(std)
        return fill(
            batch.thickness, x.observed, gaps, predicted, std=std, max_gap=self.prediction.max_gap
        )

    def compile_networks(self) -> None:
        """Compile the networks, which happens when they are called next.

        Stacks of other sizes than before are compiled for any size, once.
        """
        for network in self.networks:
            network.compile()

    @contextlib.contextmanager
    def _explain_compilation(self) -> Iterator[None]:
        """Say in one line that the networks could not be compiled."""
        try:
            yield
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise ConfigError(
                "model.init_args.prediction.compile=true, and the networks could not be compiled: "
                f"{' '.join(str(error).split())[:200]}",
                "Install a C++ compiler (or name it by CXX), or set prediction.compile=false.",
            ) from error

    def _features(self, gaps: Gaps, ensemble_std: Tensor, spans: TensorSpans) -> Tensor:
        between = spans.between
        if self.prediction.keep_boundaries == "none":
            between = torch.zeros_like(between)
        return entry_features(gaps, ensemble_std, between)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """What :meth:`fill` gives, and the number of the stack of each trace."""
        return {**self.fill(batch), "stack": batch.stack[Track.of_batch(batch).stack]}

    # --- training ------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Load ``weights``, and warn of the identity trap."""
        super().on_fit_start()
        if self.inputs.thickness == "observed":
            warnings.warn(
                "model.init_args.inputs.thickness=observed shows the network what it is asked for: "
                "it will learn to copy, and fill gaps with garbage. Use inputs.thickness=hidden.",
                stacklevel=2,
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss over observed entries, a part of which the networks do not see."""
        x = self.normalise(batch, unseen=True)
        generator = self.generator(batch_idx)
        losses = []
        for network in self.networks:
            visible_spans, mask = x.spans, x.observed
            if self.inputs.thickness == "hidden":
                hidden = self.inputs.hiding(x.spans.picked, x.track, generator)
                visible_spans = x.spans.hide(hidden)
                if self.loss.entries == "hidden":
                    mask = x.observed & ~visible_spans.observed
            visible = self.visible(visible_spans.observed)
            sums, shared = self.find_consistent_spans(x, visible_spans)
            out = self.forward_member(network, x, visible, shared)
            losses.append(self.objective(self.keep_sums(out, x, sums), x, mask))
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x.track.sizes))
        return loss

    def keep_sums(self, out: Tensor, x: Normalised, spans: TensorSpans | None) -> Tensor:
        """Scale the output of a network so that the layers of a measured sum add up to it.

        Args:
            out: Standardised thickness.
            x: The batch.
            spans: Measured spans; None for none, of which the output stays as it is.

        Shape: (N, L) to (N, L).
        """
        if spans is None:
            return out
        constrained = self.standardise(spans.constrain(self.metres(out, x)), x).to(out.dtype)
        return torch.where(spans.between, constrained, out)

    # --- evaluation ----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics."""
        self._held_out = []
        self._layer_mean_error = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.metrics.reset()

    def on_test_start(self) -> None:
        """Refuse test segments that have been seen, and compile the networks if asked for.

        Raises:
            DataError: A segment of the test has been seen.
        """
        super().on_test_start()
        if self.prediction.compile:
            self.compile_networks()

    def on_test_epoch_start(self) -> None:
        """Reset the metrics."""
        self.metrics.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score held-out observed entries, and missing ones where the truth is known."""
        x = self.normalise(batch)
        visible_spans = x.spans.hide(held_out(x.spans.picked, x.track, batch.stack))
        hidden = x.observed & ~visible_spans.observed
        predicted, ensemble_std = self.predict(x, visible_spans)
        self.check_finite(predicted)
        features = self._features(
            measure_gaps(visible_spans.observed, x.distance, x.track), ensemble_std, visible_spans
        )
        error = (predicted - batch.thickness)[hidden]
        plain = (self.normaliser.thickness_mean - batch.thickness)[hidden].abs()
        self._layer_mean_error += torch.stack([plain.sum(), hidden.sum().double()])
        some = slice(None, None, 1 + len(error) // _PER_BATCH)
        self._held_out.append((error[some], features[hidden][some]))
        targets = Targets(
            known_truth(batch),
            x.observed,
            x.track.stack,
            held_out=hidden,
            measured=batch.thickness,
            spans=visible_spans,
        )
        self.metrics.update(predicted, targets)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score missing entries where the truth is known, and picks that were taken away."""
        completed = self.fill(batch)
        left_missing = completed["provenance"] == Provenance.LEFT_MISSING
        targets = Targets(
            known_truth(batch),
            batch.observed,
            Track.of_batch(batch).stack,
            dropped=getattr(batch, "dropped", None),
            measured=batch.thickness,
            spans=Spans.of_batch(batch),
        )
        predicted = torch.where(left_missing, torch.nan, completed["predicted"])
        self.metrics.update(predicted, targets, std=completed["std"])

    def on_validation_epoch_end(self) -> None:
        """Log the errors, calibrate the uncertainty, and look for the identity trap.

        Raises:
            ConfigError: The networks only copy what they see.
        """
        residuals = self._held_out
        if rank_and_world()[1] > 1:
            dist.all_reduce(self._layer_mean_error)
            parts: list[Any] = [None] * rank_and_world()[1]
            dist.all_gather_object(parts, [tuple(t.cpu() for t in pair) for pair in residuals])
            residuals = [pair for part in parts for pair in part]
        if residuals:
            residual, features = (torch.cat(part) for part in zip(*residuals, strict=True))
            self.calibration.fit(residual, features)
        metrics = self._log("val")
        ratio, error = metrics.get("identity_ratio", 0.0), metrics.get("heldout_mae", 0.0)
        # a good network has a high ratio too: it denoises little of what it sees, and knows well
        # what it does not see; one that only copies is no better than each layer's mean, unless
        # a prior fills for it
        copies = self.inputs.thickness == "observed"
        useless = copies or error > _TRAPPED * self._layer_mean_mae()
        if ratio > (self.inputs.trap_ratio or torch.inf) and useless:
            raise ConfigError(
                f"The network copies what it sees: its error on held-out observed entries is "
                f"{error:.3f} m, {ratio:.1f} times that on visible ones.",
                "Set model.init_args.inputs.thickness=hidden, or hide more with "
                "model.init_args.inputs.hiding; model.init_args.inputs.trap_ratio=null goes on "
                "regardless.",
            )

    def _layer_mean_mae(self) -> float:
        """Mean absolute error of each layer's mean on held-out entries [m]."""
        total, count = self._layer_mean_error
        return float(total / count.clamp_min(1))

    def on_test_epoch_end(self) -> None:
        """Log the errors."""
        metrics = self._log("test")
        if not {"missing_rmse", "extra_rmse"} & metrics.keys():
            warnings.warn(
                "Nothing was asked for whose thickness is known: the errors are those of entries "
                "that the network sees. Set data.init_args.evaluation.drop=0.3 to take some of "
                "them away.",
                stacklevel=2,
            )

    def on_predict_start(self) -> None:
        """Load ``weights``, compile networks if asked, and warn where intervals are not known."""
        super().on_predict_start()
        if self.prediction.compile:
            self.compile_networks()
        if not self.calibration.fitted:
            warnings.warn(
                "The network was validated on fewer than 50 held-out picks, or never, so the "
                "uncertainty of what it fills is NaN. Fit with more in data.init_args.split.val.",
                stacklevel=2,
            )

    def _log(self, stage: str) -> dict[str, float]:
        # the metric adds up over ranks by itself: what is logged is equal on all of them
        warnings.filterwarnings("ignore", ".*recommended to use.*sync_dist=True.*")
        metrics: dict[str, float] = self.metrics.compute()
        for name, value in metrics.items():
            metric = f"{stage}/{name}"
            self.log(metric, value, prog_bar=metric == self.monitor, batch_size=1)
        return metrics
