"""The LightningModule of completion: network, hiding, loss, metrics and completed stacks.

Axes: B stacks, N traces of all of them, L layers, P physical fields. What a batch holds:
:mod:`fulgurite.models.ice_layers.data.batches`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from fulgurite.base import save_options
from fulgurite.domains.ice_layers.codes import Provenance
from fulgurite.domains.ice_layers.spans import Spans, TensorSpans
from fulgurite.errors import ConfigError
from fulgurite.models.ice_layers.data.batches import (
    KeptBoundaries,
    check_keep_boundaries,
    known_truth,
)
from fulgurite.models.ice_layers.data.graph import Track
from fulgurite.models.ice_layers.data.hiding import StructuredHiding, held_out
from fulgurite.models.ice_layers.data.normalise import Normalised
from fulgurite.models.ice_layers.networks.features import find_contradicted
from fulgurite.models.ice_layers.output.completion import Gaps, fill, measure_gaps
from fulgurite.models.ice_layers.training.ice_module import IceModule
from fulgurite.models.ice_layers.training.losses import LossKind
from fulgurite.models.ice_layers.training.uncertainty import entry_features, mean_and_std
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
        hiding: What training hides; by default as measured on real gaps.
        inputs: ``hidden``: observed thickness, a part of it hidden in training. ``physics``: none
            of it. ``observed``: all of it, which teaches the network to copy.
        loss: Kind of :func:`~fulgurite.models.ice_layers.training.losses.masked_robust_loss`.
        delta: Error at which the loss becomes linear, in standard deviations of thickness.
        loss_on: ``observed`` counts all observed entries, ``hidden`` only those not seen.
        prior: The network predicts what a ridge regression on physics leaves, see
            :class:`~fulgurite.models.ice_layers.networks.features.PhysicsPrior`; ``none`` as in
            the paper.
        members: Networks of an ensemble, trained side by side.
        outlier: Picks that differ from their neighbours along the track by more than so many
            standard deviations of thickness, or typical deviations from the prior, are neither
            shown to the network nor asked for in training; null trusts all.
        keep_boundaries: Which picked boundaries come out where they were picked: where layers are
            missing between two of them, what they add up to is known, and they share it in the
            proportions that the network predicts. ``all``; ``trusted``, all but those that
            ``outlier`` finds contradicted; or ``none``, which fills each layer for itself, as the
            paper does, so that picks below a gap are moved.
        mc_samples: Predictions with dropout at evaluation; 0 for one without.
        max_gap: Leave gaps missing that are longer [m], wholly absent layers among them.
        trap_ratio: Stop when the held-out error is so many times that of visible entries, and,
            unless ``inputs=observed``, no better than about that of each layer's mean; null never
            stops.
        optimizer: Makes the optimizer.
        scheduler: Makes the scheduler, stepped after each step.
        weights: Checkpoint of a run whose networks and statistics are the start.
        allow_seen: Start from ``weights``, and test, though they have seen flight segments of the
            test: for segments that only share their names.

    Raises:
        ConfigError: A number is out of range or a name is unknown.
        CheckpointError: ``weights`` cannot be read or does not fit.

    Source: arXiv 2604.20783; card sections 1 and 7.
    """

    monitor = "val/heldout_mae"

    def __init__(
        self,
        network: Callable[[int, int], nn.Module] | nn.Module,
        hiding: StructuredHiding | None = None,
        inputs: Literal["hidden", "physics", "observed"] = "hidden",
        loss: LossKind = "huber",
        *,
        delta: float = 1.0,
        loss_on: Literal["observed", "hidden"] = "observed",
        prior: Literal["none", "ridge", "relative", "log"] = "none",
        members: int = 1,
        outlier: float | None = None,
        keep_boundaries: KeptBoundaries = "all",
        mc_samples: int = 0,
        max_gap: float | None = None,
        trap_ratio: float | None = 5.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        weights: str | None = None,
        allow_seen: bool = False,
    ) -> None:
        super().__init__(
            network,
            optimizer,
            scheduler,
            weights,
            loss=loss,
            delta=delta,
            prior=prior,
            members=members,
            outlier=outlier,
            allow_seen=allow_seen,
        )
        save_options(self, "network", "hiding", "optimizer", "scheduler")
        prefix = "model.init_args"
        if inputs not in ("hidden", "physics", "observed"):
            raise ConfigError(
                f"{prefix}.inputs={inputs} is unknown.", "Use hidden, physics or observed."
            )
        if loss_on not in ("observed", "hidden"):
            raise ConfigError(f"{prefix}.loss_on={loss_on} is unknown.", "Use observed or hidden.")
        check_keep_boundaries(keep_boundaries)
        if keep_boundaries == "trusted" and outlier is None:
            raise ConfigError(
                f"{prefix}.keep_boundaries=trusted, and {prefix}.outlier=null trusts all picks.",
                f"Set {prefix}.outlier=2, or {prefix}.keep_boundaries=all.",
            )
        if mc_samples < 0:
            raise ConfigError(f"{prefix}.mc_samples={mc_samples} is negative.", "Give 0 or more.")
        if max_gap is not None and not max_gap >= 0:
            raise ConfigError(f"{prefix}.max_gap={max_gap} is no length.", "Give metres, or null.")
        self.hiding = StructuredHiding() if hiding is None else hiding
        if inputs == "hidden" and not self.hiding.hides:
            raise ConfigError(
                f"{prefix}.hiding hides nothing, so that the network would learn to copy.",
                f"Raise {prefix}.hiding.init_args.layer and segment, or ask for it with "
                f"{prefix}.inputs=observed.",
            )
        if loss_on == "hidden" and inputs != "hidden":
            raise ConfigError(
                f"{prefix}.loss_on=hidden, and nothing is hidden with inputs={inputs}.",
                f"Set {prefix}.loss_on=observed.",
            )
        self.inputs, self.loss_on, self.keep_boundaries = inputs, loss_on, keep_boundaries
        self.mc_samples, self.max_gap, self.trap_ratio = mc_samples, max_gap, trap_ratio
        self._held_out: list[tuple[Tensor, Tensor]] = []
        self._layer_mean_error = torch.zeros(2, dtype=torch.float64)

    # --- prediction ----------------------------------------------------------------------------

    def visible(self, observed: Tensor) -> Tensor:
        """What the network is shown at evaluation. Shape: (N, L), bool."""
        return torch.zeros_like(observed) if self.inputs == "physics" else observed

    def _consistent_spans(
        self, x: Normalised, spans: TensorSpans
    ) -> tuple[TensorSpans | None, Tensor | None]:
        """Spans that the network is trained with, none that others contradict, and what it sees.

        Args:
            x: The batch.
            spans: Measured spans that may be known.

        Returns:
            The spans, and their :meth:`shared` as an input of the network; None for none.
        """
        if self.keep_boundaries == "none":
            return None, None
        is_filtered = self.outlier is not None and spans.sums
        if self.inputs == "physics" and not is_filtered:
            return spans, None
        shared = self.shared(x, spans)
        if self.outlier is not None and is_filtered:
            z = torch.where(spans.between, shared, x.thickness)
            off = find_contradicted(z, spans.known, x.track, x.distance, limit=self.outlier)
            spans = spans.keep(~off | spans.observed)
            shared = torch.where(spans.between, shared, torch.nan)
        return spans, None if self.inputs == "physics" else shared

    @contextlib.contextmanager
    def _use_dropout(self, x: Normalised, active: bool) -> Iterator[None]:
        """Switch dropout on, with random numbers that depend on the batch alone."""
        if not active:
            yield
            return
        layers = [m for m in self.networks.modules() if isinstance(m, nn.Dropout)]
        if not any(m.p for m in layers):
            raise ConfigError(
                f"model.init_args.mc_samples={self.mc_samples}, and the network has no dropout.",
                "Set model.init_args.network.init_args.transformer.dropout above 0, or "
                "mc_samples=0.",
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

        Shape: to (N, L) and (N, L), float64.
        """
        visible = self.visible(spans.observed)
        sums, shared = self._consistent_spans(x, spans)
        with self._use_dropout(x, bool(self.mc_samples)):
            outs = [
                self.metres(self.forward_member(network, x, visible, shared), x)
                for network in self.networks
                for _ in range(max(1, self.mc_samples))
            ]
        if sums is not None:
            constraints = spans if self.keep_boundaries == "all" else sums
            outs = [constraints.constrain(out) for out in outs]
        return mean_and_std(torch.stack(outs))

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
        predicted, ensemble_std = self.predict(x, x.spans)
        gaps = measure_gaps(x.observed, x.distance, x.track)
        std = self.calibration(self._features(gaps, ensemble_std, x.spans))
        return fill(batch.thickness, x.observed, gaps, predicted, std=std, max_gap=self.max_gap)

    def _features(self, gaps: Gaps, ensemble_std: Tensor, spans: TensorSpans) -> Tensor:
        between = spans.between
        if self.keep_boundaries == "none":
            between = torch.zeros_like(between)
        return entry_features(gaps, ensemble_std, between)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """What :meth:`fill` gives, and the number of the stack of each trace."""
        return {**self.fill(batch), "stack": batch.stack[Track.of_batch(batch).stack]}

    # --- training ------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Load ``weights``, and warn of the identity trap."""
        super().on_fit_start()
        if self.inputs == "observed":
            warnings.warn(
                "model.init_args.inputs=observed shows the network what it is asked for: it will "
                "learn to copy, and fill gaps with garbage. Use inputs=hidden.",
                stacklevel=2,
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss over observed entries, a part of which the networks do not see."""
        x = self.normalise(batch, unseen=True)
        generator = self.generator(batch_idx)
        losses = []
        for network in self.networks:
            visible_spans, mask = x.spans, x.observed
            if self.inputs == "hidden":
                visible_spans = x.spans.hide(self.hiding(x.spans.picked, x.track, generator))
                mask = (
                    x.observed & ~visible_spans.observed if self.loss_on == "hidden" else x.observed
                )
            visible = self.visible(visible_spans.observed)
            sums, shared = self._consistent_spans(x, visible_spans)
            out = self.forward_member(network, x, visible, shared)
            losses.append(self.objective(self._constrain(out, x, sums), x, mask))
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x.track.sizes))
        return loss

    def _constrain(self, out: Tensor, x: Normalised, spans: TensorSpans | None) -> Tensor:
        """Output of a network whose layers of a measured sum add up to it. Shape: (N, L)."""
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

    def on_test_epoch_start(self) -> None:
        """Reset the metrics."""
        self.metrics.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score held-out observed entries, and missing ones where the truth is known."""
        x = self.normalise(batch)
        visible_spans = x.spans.hide(held_out(x.spans.picked, x.track, batch.stack))
        hidden = x.observed & ~visible_spans.observed
        predicted, ensemble_std = self.predict(x, visible_spans)
        features = self._features(
            measure_gaps(visible_spans.observed, x.distance, x.track), ensemble_std, visible_spans
        )
        error = (predicted - batch.thickness)[hidden]
        plain = (self.normaliser.thickness_mean - batch.thickness)[hidden].abs()
        self._layer_mean_error += torch.stack([plain.sum(), hidden.sum().double()])
        some = slice(None, None, 1 + len(error) // _PER_BATCH)
        self._held_out.append((error[some], features[hidden][some]))
        self.metrics.update(
            predicted, known_truth(batch), x.observed, x.track.stack, held_out=hidden,
            measured=batch.thickness, spans=visible_spans,
        )  # fmt: skip

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score missing entries where the truth is known, and picks that were taken away."""
        completed = self.fill(batch)
        left_missing = completed["provenance"] == Provenance.LEFT_MISSING
        self.metrics.update(
            torch.where(left_missing, torch.nan, completed["predicted"]),
            known_truth(batch),
            batch.observed,
            Track.of_batch(batch).stack,
            std=completed["std"],
            dropped=getattr(batch, "dropped", None),
            measured=batch.thickness,
            spans=Spans.of_batch(batch),
        )

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
        useless = self.inputs == "observed" or error > _TRAPPED * self._layer_mean_mae()
        if ratio > (self.trap_ratio or torch.inf) and useless:
            raise ConfigError(
                f"The network copies what it sees: its error on held-out observed entries is "
                f"{error:.3f} m, {ratio:.1f} times that on visible ones.",
                "Set model.init_args.inputs=hidden, or hide more with model.init_args.hiding; "
                "model.init_args.trap_ratio=null goes on regardless.",
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
                "that the network sees. Set data.init_args.drop=0.3 to take some of them away.",
                stacklevel=2,
            )

    def on_predict_start(self) -> None:
        """Load ``weights``, and warn where intervals are not known."""
        super().on_predict_start()
        if not self.calibration.fitted:
            warnings.warn(
                "The network was validated on fewer than 50 held-out picks, or never, so the "
                "uncertainty of what it fills is NaN. Fit with more in data.init_args.val.",
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
