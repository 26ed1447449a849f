"""The LightningModule of completion: network, hiding, loss, metrics and completed stacks.

A batch is PyG's, node-major: ``thickness`` (N, L) [m], ``observed`` (N, L), ``physics`` (N, L, P),
``pos`` (N, 2) [degrees], ``distance`` (N,) [m], ``stack`` (B,), ``ptr`` (B + 1,); where boundaries
were measured also ``span_start``, ``span_path`` and ``refraction`` (N, L) of
:class:`~fulgurite.models.ice_layers.spans.Spans`; of generated data ``truth`` (N, L) [m], and
``dropped`` (N, L) where observed entries were left out.

Axes: B stacks, N traces of all of them, L layers, P physical fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.base import SystemModule, build_network, save_options, scheduled
from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.foreign import read_state_dict
from fulgurite.models.ice_layers.completion import LEFT, Gaps, fill, gaps
from fulgurite.models.ice_layers.features import PhysicsPrior, PriorKind, contradicted
from fulgurite.models.ice_layers.graph import Track, note_sizes
from fulgurite.models.ice_layers.hiding import StructuredHiding, held_out
from fulgurite.models.ice_layers.losses import LossKind, masked_robust_loss
from fulgurite.models.ice_layers.metrics import CompletionMetrics
from fulgurite.models.ice_layers.schedule import TwoStageLR
from fulgurite.models.ice_layers.spans import Spans
from fulgurite.models.ice_layers.uncertainty import (
    Calibration,
    entry_features,
    mean_and_spread,
)
from fulgurite.sampling import forget_training_data, rank_and_world

__all__ = [
    "IceCompletion",
    "IceModule",
    "KeptBoundaries",
    "Normalised",
    "Normaliser",
    "check_batch",
    "check_kept",
    "known_truth",
    "positive",
    "refuse_seen",
]

KeptBoundaries = Literal["all", "trusted", "none"]
"""Which picked boundaries come out where they were picked."""

_FIELDS = ("thickness", "observed", "physics", "pos", "distance", "stack", "ptr")
_BEND = 0.01  # width of the bend that keeps thickness positive [m]
_TRAPPED = 0.7  # of the error of each layer's mean, above which a network only copies
_PER_BATCH = 4096  # held-out residuals of a batch that calibration keeps


@dataclasses.dataclass(frozen=True)
class Normalised:
    """A batch as networks read it.

    Args:
        thickness: z-scores, or deviations from a prior; NaN where not observed. Shape: (N, L),
            float32.
        observed: Shape: (N, L), bool.
        physics: z-scores. Shape: (N, L, P).
        pos: z-scores of latitude and longitude. Shape: (N, 2).
        degrees: Latitude and longitude. Shape: (N, 2), float64.
        distance: Along the track [m]. Shape: (N,).
        track: The stacks.
        spans: What was measured between picked boundaries.
        expected: What a prior expects [m]. Shape: (N, L).
    """

    thickness: Tensor
    observed: Tensor
    physics: Tensor
    pos: Tensor
    degrees: Tensor
    distance: Tensor
    track: Track
    spans: Spans
    expected: Tensor | None = None


class Normaliser(nn.Module):
    """z-scores with statistics of observed training entries, which the checkpoint holds.

    Args:
        layers: L.
        physics: P.
    """

    thickness_mean: Tensor
    thickness_std: Tensor
    physics_mean: Tensor
    physics_std: Tensor
    pos_mean: Tensor
    pos_std: Tensor

    def __init__(self, layers: int, physics: int) -> None:
        super().__init__()
        shapes = {"thickness_mean": (layers,), "thickness_std": (), "physics_mean": (physics,)}
        shapes |= {"physics_std": (physics,), "pos_mean": (2,), "pos_std": (2,)}
        for name, shape in shapes.items():
            fill = torch.zeros if name.endswith("mean") else torch.ones
            self.register_buffer(name, fill(shape, dtype=torch.float64))

    def take(self, statistics: dict[str, Tensor]) -> None:
        """Copy a DataModule's statistics.

        Raises:
            DataError: One is missing or has another shape.
        """
        for name, buffer in self.named_buffers():
            given = statistics.get(name)
            if given is None or given.shape != buffer.shape:
                raise DataError(
                    f"The data's statistics have {name} of "
                    f"{None if given is None else tuple(given.shape)}, not {tuple(buffer.shape)}.",
                    "Use data.class_path=fulgurite.datamodules.ice_layers.IceLayerDataModule.",
                )
            buffer.copy_(given)

    def forward(self, batch: Any) -> Normalised:
        """Normalise a batch."""
        thickness = self.scores(batch.thickness)
        offset = batch.pos - self.pos_mean
        whole_turns = 360.0 * torch.round(offset[:, 1:] / 360.0)  # across the date line
        offset = torch.cat([offset[:, :1], offset[:, 1:] - whole_turns], 1)
        return Normalised(
            thickness.float(),
            batch.observed,
            ((batch.physics - self.physics_mean) / self.physics_std).float(),
            (offset / self.pos_std).float(),
            batch.pos,
            batch.distance.float(),
            Track.of_batch(batch),
            Spans.of_batch(batch),
        )

    def metres(self, thickness: Tensor) -> Tensor:
        """The inverse for thickness [m]. Shape: (..., L), float64."""
        return thickness.double() * self.thickness_std + self.thickness_mean

    def scores(self, thickness: Tensor) -> Tensor:
        """z-scores of thickness [m]. Shape: (..., L), float64."""
        return (thickness.double() - self.thickness_mean) / self.thickness_std


def positive(thickness: Tensor) -> Tensor:
    """Thickness kept above 0, unchanged from some centimetres on [m].

    Example:
        >>> positive(torch.tensor([0.3, 0.0, -1.0]))
        tensor([3.0000e-01, 6.9315e-03, 1.0000e-04])

    Source: inferred; card section 1.4 names softplus as an option.
    """
    # at least a tenth of a millimetre: softplus underflows far below 0
    return (_BEND * F.softplus(thickness / _BEND)).clamp_min(1e-4)


class IceModule(SystemModule):
    """What completion and deep-layer prediction share: networks, statistics, optimizer.

    The networks are made when the data or a checkpoint say how many layers and fields there are.

    Args:
        network: The network, or what makes it from (layers, fields).
        optimizer: Makes the optimizer.
        scheduler: Makes the scheduler, stepped after each step.
        weights: Checkpoint of a run whose networks and statistics are the start.
        loss: See :func:`~fulgurite.models.ice_layers.losses.masked_robust_loss`.
        delta: Of the loss, in standard deviations of thickness.
        prior: The network predicts what a ridge regression on physics leaves, see
            :class:`~fulgurite.models.ice_layers.features.PhysicsPrior`; ``none`` as in the paper.
        members: Networks of an ensemble, trained side by side.
        outlier: Picks that differ from their neighbours along the track by more than so many
            standard deviations of thickness, or typical deviations from the prior, are neither
            shown to the network nor asked for in training; null trusts all.
        allow_seen: Start from ``weights``, and test, though they have seen segments of the test.

    Attributes:
        trained_segments: Names of the flight segments that training or validation has seen, which
            completed stacks carry for the leakage rule.
    """

    monitor: str | None = None
    mode = "min"

    def __init__(
        self,
        network: Callable[[int, int], nn.Module] | nn.Module,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        weights: str | None,
        loss: LossKind,
        delta: float,
        prior: Literal["none", "ridge", "relative", "log"],
        members: int,
        outlier: float | None,
        allow_seen: bool,
    ) -> None:
        super().__init__()
        # Lightning says of each module that moves its batches that its DataModule does not
        warnings.filterwarnings("ignore", ".*overridden `transfer_batch_to_device` in `Lightning.*")
        if not delta > 0:
            raise ConfigError(f"model.init_args.delta={delta} is not positive.", "Give it above 0.")
        if prior not in ("none", *get_args(PriorKind)):
            raise ConfigError(
                f"model.init_args.prior={prior} is unknown.",
                f"Use none, {', '.join(get_args(PriorKind))}.",
            )
        if outlier is not None and not outlier > 0:
            raise ConfigError(
                f"model.init_args.outlier={outlier} is not positive.", "Give it above 0, or null."
            )
        if members < 1:
            raise ConfigError(f"model.init_args.members={members} is too few.", "Give 1 or more.")
        if members > 1 and isinstance(network, nn.Module):
            raise ConfigError(
                f"model.init_args.members={members}, and there is one network.",
                f"Give what makes one, such as network={type(network).__name__}, or members=1.",
            )
        # in a partial: a module that is an attribute would be in the checkpoint twice
        self.make_network = functools.partial(build_network, network)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.weights, self.loss, self.delta = weights, loss, delta
        self.prior_kind, self.members, self.outlier = prior, members, outlier
        self.allow_seen, self._begun = allow_seen, False
        self.sizes: tuple[int, int] | None = None
        self.trained_segments: tuple[str, ...] = ()
        self.networks = nn.ModuleList()

    # --- building ------------------------------------------------------------------------------

    def build(self, layers: int, physics: int) -> None:
        """Make the networks; does nothing where they are there already.

        Args:
            layers: L.
            physics: P.

        Raises:
            DataError: They are there for other sizes.
            ConfigError: The network was made for other sizes.
        """
        if self.sizes is not None:
            if self.sizes != (layers, physics):
                raise DataError(
                    f"The data have {layers} layers and {physics} physical fields, the network "
                    f"{self.sizes[0]} and {self.sizes[1]}.",
                    "Use the data options of the run that trained it.",
                )
            return
        self.sizes = (layers, physics)
        network = self.make_network.args[0]
        made_for = getattr(network, "sizes", self.sizes) if isinstance(network, nn.Module) else None
        if made_for not in (None, self.sizes):
            self.sizes = None
            raise ConfigError(
                f"The data have {layers} layers and {physics} physical fields, and the network "
                f"was made for {made_for[0]} and {made_for[1]}.",
                f"Make it with {type(network).__name__}({layers}, {physics}), or give the class.",
            )
        self.normaliser = Normaliser(layers, physics)
        kind = self.prior_kind
        self.prior = None if kind == "none" else PhysicsPrior(layers, physics, kind)
        self.networks.extend(self.make_network(layers, physics) for _ in range(self.members))
        self.calibration = Calibration()
        self.metrics = CompletionMetrics(layers)
        self.to(self.device)

    def setup(self, stage: str) -> None:
        """Make the networks, and take the statistics of the training data.

        Raises:
            ConfigError: The data are of another system.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "layers") or not hasattr(data, "physics"):
            raise ConfigError(
                f"{type(self).__name__} cannot read {type(data).__name__}.",
                "Use data.class_path=fulgurite.datamodules.ice_layers.IceLayerDataModule.",
            )
        self.build(int(data.layers), len(data.physics))
        if stage == "fit" and self.weights is None:
            self.normaliser.take(data.statistics)
            if self.prior is not None:
                self._fit_prior(data)
        if stage == "fit":  # validation chooses the checkpoint, so it has been seen too
            seen = {s.segment for part in ("train", "val") for s in data.stacks_of(part)}
            self.trained_segments = tuple(sorted(seen.union(self.trained_segments)))

    def _begin(self) -> None:
        """Take up ``weights``, once; a checkpoint of this run holds all that they did."""
        if self.weights is not None and not self._begun:
            self._load(self.weights)
        self._begun = True

    def _refuse_seen(self) -> None:
        if not self.allow_seen:
            also = ", or model.init_args.allow_seen=true if they only share their names"
            data = getattr(self.trainer, "datamodule", None)
            refuse_seen(self.trained_segments, data, also)

    def on_fit_start(self) -> None:
        """Take up ``weights``.

        Raises:
            CheckpointError: ``weights`` cannot be read or does not fit.
            DataError: They have seen segments of the test.
        """
        self._begin()
        self._refuse_seen()
        if self.trainer.ckpt_path:  # the schedule has asked how many batches there are
            forget_training_data(self.trainer)

    def on_validation_start(self) -> None:
        """Take up ``weights``."""
        self._begin()

    def on_test_start(self) -> None:
        """Refuse test segments that training or validation has seen.

        Raises:
            DataError: It has.
        """
        self._begin()
        self._refuse_seen()

    def on_predict_start(self) -> None:
        """Take up ``weights``."""
        self._begin()

    def _fit_prior(self, data: Any) -> None:
        """Fit on the training data of all ranks; drawing batches must not move random states."""
        assert self.prior is not None
        names = ("thickness", "observed", "physics")
        with torch.random.fork_rng():
            found = [
                [*(getattr(batch, n) for n in names), segment_of_traces(batch)]
                for batch in data.train_dataloader()
            ]
        parts = [torch.cat(part) for part in zip(*found, strict=True)]
        if (world := rank_and_world()[1]) > 1:
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, parts)
            parts = [torch.cat(part) for part in zip(*everyone, strict=True)]
        self.prior.cpu().fit(*parts)
        self.prior.to(self.device)

    def _load(self, path: str) -> None:
        """Networks, statistics, prior and calibration of a checkpoint."""
        checkpoint, tensors = read_state_dict(path, "model.init_args.weights")
        seen = _segments(checkpoint)
        try:
            self.load_state_dict(tensors)
            self.trained_segments = tuple(sorted({*seen, *self.trained_segments}))
        except (RuntimeError, KeyError) as error:
            what = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"model.init_args.weights={path} does not fit the networks: {what}",
                "Use the network and the number of layers of the run.",
            ) from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how large the networks are, and which segments they have seen."""
        checkpoint["ice_sizes"] = self.sizes
        checkpoint["ice_segments"] = list(self.trained_segments)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the networks, where no data have said how large they are.

        Raises:
            CheckpointError: The checkpoint is of another kind of model.
        """
        sizes = checkpoint.get("ice_sizes")
        if (
            not isinstance(sizes, list | tuple)
            or len(sizes) != 2
            or not all(type(n) is int and 0 <= n < 10_000 for n in sizes)
        ):
            raise CheckpointError(
                "The checkpoint holds no network of ice layers.", "Give one of such a run."
            )
        self.build(*sizes)
        self.trained_segments = _segments(checkpoint)
        self._begun = True

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch without waiting for the device, with the sizes of its stacks noted."""
        if hasattr(batch, "to") and isinstance(getattr(batch, "ptr", None), Tensor):
            note_sizes(batch)
            return batch.to(device, non_blocking=device.type != "cpu")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def configure_optimizers(self) -> Any:
        """The optimizer with its scheduler; a two-stage schedule learns how long training is."""

        def made(optimizer: torch.optim.Optimizer) -> Any:
            assert self.scheduler is not None
            scheduler = self.scheduler(optimizer)
            if isinstance(scheduler, TwoStageLR):
                scheduler.plan(int(self.trainer.estimated_stepping_batches))
            return scheduler

        return scheduled(
            self.optimizer(self.parameters()), None if self.scheduler is None else made, "step"
        )

    # --- steps ---------------------------------------------------------------------------------

    def read(self, batch: Any, unseen: bool = False) -> Normalised:
        """Normalise a batch.

        Args:
            batch: See the top of the file.
            unseen: Deviations are from a prior that does not know the batch's flight segments.

        Raises:
            DataError: It lacks a field.
        """
        check_batch(batch, _FIELDS)
        x: Normalised = self.normaliser(batch)
        if self.prior is None:
            return x
        expected = self.prior(batch.physics, segment_of_traces(batch) if unseen else None)
        deviation = self.prior.deviation(batch.thickness, expected).float()
        return dataclasses.replace(x, thickness=deviation, expected=expected)

    def run(
        self, network: nn.Module, x: Normalised, visible: Tensor, spans: Spans | None = None
    ) -> Tensor:
        """Normalised thickness of all entries from what is visible.

        Args:
            network: One that has an attribute ``sums``, and it is true, is told of spans.
            x: The batch.
            visible: What it may see. Shape: (N, L), bool.
            spans: Measured sums that it may know, equally.

        Shape: to (N, L).
        """
        visible = self.trusted(x, visible)
        known = {}
        if spans is not None and getattr(network, "sums", False):
            known["shared"] = self.shared(x, spans)
        return network(  # type: ignore[no-any-return]
            x.thickness, visible, x.physics, x.pos, x.degrees, x.distance, x.track, **known
        )

    def shared(self, x: Normalised, spans: Spans) -> Tensor:
        """Normalised thickness of layers that share a measured sum as layers usually do.

        Shape: to (N, L), float32, NaN where no sum of several layers is known.
        """
        usual = x.expected
        if usual is None:
            usual = self.normaliser.thickness_mean.expand(spans.path.shape)
        in_proportion = spans.constrain(positive(usual))
        scores = self.normalised(in_proportion, x).float()
        return torch.where(spans.between, scores, torch.nan)

    def trusted(self, x: Normalised, mask: Tensor) -> Tensor:
        """Entries of a mask that its others do not contradict. Shape: (N, L), bool."""
        if self.outlier is None:
            return mask
        return mask & ~contradicted(x.thickness, mask, x.track, x.distance, self.outlier)

    def metres(self, out: Tensor, x: Normalised) -> Tensor:
        """What a network gives, as thickness above 0 [m]. Shape: (N, L), float64."""
        if self.prior is None or x.expected is None:
            return positive(self.normaliser.metres(out))
        return positive(self.prior.metres(out, x.expected))

    def normalised(self, thickness: Tensor, x: Normalised) -> Tensor:
        """The inverse of :meth:`metres`. Shape: (N, L), float64."""
        if self.prior is None or x.expected is None:
            scores: Tensor = self.normaliser.scores(thickness)
            return scores
        return self.prior.deviation(thickness, x.expected)

    def generator(self, batch_idx: int) -> torch.Generator:
        """Random numbers of a training step: the same after an interruption."""
        rank = rank_and_world()[0]
        step = self.trainer.global_step if self._trainer is not None else 0
        seed = torch.initial_seed() % 2**20
        # the batch too: with accumulated gradients several have one step
        mixed = ((seed * 1_000_003 + step) * 1_000_003 + batch_idx) * 1_003 + rank
        return torch.Generator().manual_seed(mixed % 2**63)

    def objective(self, predicted: Tensor, x: Normalised, mask: Tensor) -> Tensor:
        """The loss of one network over the entries in ``mask``. Shape: to ()."""
        mask = mask & self.trusted(x, x.observed)
        return masked_robust_loss(
            predicted, x.thickness, mask, self.delta, self.loss, over_ranks=True
        )


class IceCompletion(IceModule):
    """Completes stacks: fills what is missing from what is visible and from physics.

    Training hides observed entries and asks for all. Validation hides a fixed part of the observed
    entries, scores it, calibrates the uncertainty on it, and stops a run that only copies.

    Args:
        network: The network, or what makes it from (layers, fields), such as the class
            :class:`~fulgurite.models.ice_layers.CompletionNet`.
        hiding: What training hides; by default as measured in the card.
        inputs: ``hidden``: observed thickness, a part of it hidden in training. ``physics``: none
            of it. ``observed``: all of it, which teaches the network to copy.
        loss: See :func:`~fulgurite.models.ice_layers.losses.masked_robust_loss`.
        delta: Of the loss, in standard deviations of thickness.
        loss_on: ``observed`` counts all observed entries, ``hidden`` only those not seen.
        prior: The network predicts what a ridge regression on physics leaves, see
            :class:`~fulgurite.models.ice_layers.features.PhysicsPrior`; ``none`` as in the paper.
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
            network, optimizer, scheduler, weights, loss, delta, prior, members, outlier, allow_seen
        )
        save_options(self, "network", "hiding", "optimizer", "scheduler")
        where = "model.init_args"
        if inputs not in ("hidden", "physics", "observed"):
            raise ConfigError(
                f"{where}.inputs={inputs} is unknown.", "Use hidden, physics or observed."
            )
        if loss_on not in ("observed", "hidden"):
            raise ConfigError(f"{where}.loss_on={loss_on} is unknown.", "Use observed or hidden.")
        check_kept(keep_boundaries)
        if keep_boundaries == "trusted" and outlier is None:
            raise ConfigError(
                f"{where}.keep_boundaries=trusted, and {where}.outlier=null trusts all picks.",
                f"Set {where}.outlier=2, or {where}.keep_boundaries=all.",
            )
        if mc_samples < 0:
            raise ConfigError(f"{where}.mc_samples={mc_samples} is negative.", "Give 0 or more.")
        if max_gap is not None and not max_gap >= 0:
            raise ConfigError(f"{where}.max_gap={max_gap} is no length.", "Give metres, or null.")
        self.hiding = StructuredHiding() if hiding is None else hiding
        if inputs == "hidden" and not self.hiding.hides:
            raise ConfigError(
                f"{where}.hiding hides nothing, so that the network would learn to copy.",
                f"Raise {where}.hiding.init_args.layer and segment, or ask for it with "
                f"{where}.inputs=observed.",
            )
        if loss_on == "hidden" and inputs != "hidden":
            raise ConfigError(
                f"{where}.loss_on=hidden, and nothing is hidden with inputs={inputs}.",
                f"Set {where}.loss_on=observed.",
            )
        self.inputs, self.loss_on, self.keep_boundaries = inputs, loss_on, keep_boundaries
        self.mc_samples, self.max_gap, self.trap_ratio = mc_samples, max_gap, trap_ratio
        self._held: list[tuple[Tensor, Tensor]] = []
        self._plain = torch.zeros(2, dtype=torch.float64)

    # --- prediction ----------------------------------------------------------------------------

    def visible(self, observed: Tensor) -> Tensor:
        """What the network is shown at evaluation. Shape: (N, L), bool."""
        return torch.zeros_like(observed) if self.inputs == "physics" else observed

    def _sums(self, x: Normalised, spans: Spans) -> Spans | None:
        """Sums that the network is told and trained with: none that others contradict."""
        if self.keep_boundaries == "none":
            return None
        if self.outlier is None or not spans.sums:
            return spans
        known = spans.observed | spans.between
        z = torch.where(spans.between, self.shared(x, spans), x.thickness)
        off = contradicted(z, known, x.track, x.distance, self.outlier)
        return spans.keep(~off | spans.observed)

    @contextlib.contextmanager
    def _dropping(self, x: Normalised, active: bool) -> Iterator[None]:
        """Dropout with random numbers of the batch's own."""
        if not active:
            yield
            return
        layers = [m for m in self.networks.modules() if isinstance(m, nn.Dropout)]
        if not any(m.p for m in layers):
            raise ConfigError(
                f"model.init_args.mc_samples={self.mc_samples}, and the network has no dropout.",
                "Set model.init_args.network.init_args.dropout above 0, or mc_samples=0.",
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

    def predict(self, x: Normalised, spans: Spans) -> tuple[Tensor, Tensor]:
        """Predicted thickness of all entries and its spread over members and samples [m].

        Args:
            x: The batch.
            spans: What the networks may know of it; observed layers alone are shown.

        Shape: to (N, L) and (N, L), float64.
        """
        visible, sums = self.visible(spans.observed), self._sums(x, spans)
        told = None if self.inputs == "physics" else sums
        with self._dropping(x, bool(self.mc_samples)):
            outs = [
                self.metres(self.run(network, x, visible, told), x)
                for network in self.networks
                for _ in range(max(1, self.mc_samples))
            ]
        if sums is not None:
            kept = spans if self.keep_boundaries == "all" else sums
            outs = [kept.constrain(out) for out in outs]
        return mean_and_spread(torch.stack(outs))

    def forward(self, batch: Any) -> Tensor:
        """Predicted thickness of all entries [m], observed ones too. Shape: to (N, L), float64."""
        x = self.read(batch)
        return self.predict(x, x.spans)[0]

    def fill(self, batch: Any) -> dict[str, Tensor]:
        """Complete the stacks of a batch.

        Returns:
            ``predicted`` [m]; ``thickness`` [m], completed, NaN where left missing;
            ``provenance``; ``std`` [m], NaN where observed or not calibrated. Shape of each:
            (N, L).
        """
        x = self.read(batch)
        predicted, spread = self.predict(x, x.spans)
        found = gaps(x.observed, x.distance, x.track)
        std = self.calibration(self._features(found, spread, x.spans))
        return fill(batch.thickness, x.observed, found, predicted, std, self.max_gap)

    def _features(self, found: Gaps, spread: Tensor, spans: Spans) -> Tensor:
        between = spans.between
        if self.keep_boundaries == "none":
            between = torch.zeros_like(between)
        return entry_features(found, spread, between)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """What :meth:`fill` gives, and the number of the stack of each trace."""
        return {**self.fill(batch), "stack": batch.stack[Track.of_batch(batch).stack]}

    # --- training ------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Take up ``weights``, and warn of the identity trap."""
        super().on_fit_start()
        if self.inputs == "observed":
            warnings.warn(
                "model.init_args.inputs=observed shows the network what it is asked for: it will "
                "learn to copy, and fill gaps with garbage. Use inputs=hidden.",
                stacklevel=2,
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss over observed entries, a part of which the networks do not see."""
        x = self.read(batch, unseen=True)
        generator = self.generator(batch_idx)
        losses = []
        for network in self.networks:
            shown, mask = x.spans, x.observed
            if self.inputs == "hidden":
                shown = x.spans.hide(self.hiding(x.spans.picked, x.track, generator))
                mask = x.observed & ~shown.observed if self.loss_on == "hidden" else x.observed
            visible = self.visible(shown.observed)
            sums = self._sums(x, shown)
            out = self.run(network, x, visible, None if self.inputs == "physics" else sums)
            losses.append(self.objective(self._constrained(out, x, sums), x, mask))
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x.track.sizes))
        return loss

    def _constrained(self, out: Tensor, x: Normalised, spans: Spans | None) -> Tensor:
        """What a network gives, with layers of a measured sum adding up to it. Shape: (N, L)."""
        if spans is None:
            return out
        kept = self.normalised(spans.constrain(self.metres(out, x)), x).to(out.dtype)
        return torch.where(spans.between, kept, out)

    # --- evaluation ----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start to count."""
        self._held = []
        self._plain = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.metrics.reset()

    def on_test_epoch_start(self) -> None:
        """Start to count."""
        self.metrics.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score held-out observed entries, and missing ones where the truth is known."""
        x = self.read(batch)
        shown = x.spans.hide(held_out(x.spans.picked, x.track, batch.stack))
        hidden = x.observed & ~shown.observed
        predicted, spread = self.predict(x, shown)
        features = self._features(gaps(shown.observed, x.distance, x.track), spread, shown)
        error = (predicted - batch.thickness)[hidden]
        plain = (self.normaliser.thickness_mean - batch.thickness)[hidden].abs()
        self._plain += torch.stack([plain.sum(), hidden.sum().double()])
        some = slice(None, None, 1 + len(error) // _PER_BATCH)
        self._held.append((error[some], features[hidden][some]))
        self.metrics.update(
            predicted, known_truth(batch), x.observed, x.track.stack, held_out=hidden,
            measured=batch.thickness, spans=shown,
        )  # fmt: skip

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score missing entries where the truth is known, and picks that were taken away."""
        made = self.fill(batch)
        left = made["provenance"] == LEFT
        self.metrics.update(
            torch.where(left, torch.nan, made["predicted"]),
            known_truth(batch),
            batch.observed,
            Track.of_batch(batch).stack,
            made["std"],
            dropped=getattr(batch, "dropped", None),
            measured=batch.thickness,
            spans=Spans.of_batch(batch),
        )

    def on_validation_epoch_end(self) -> None:
        """Log the errors, calibrate the uncertainty, and look for the identity trap.

        Raises:
            ConfigError: The networks copy.
        """
        held = self._held
        if rank_and_world()[1] > 1:
            dist.all_reduce(self._plain)
            parts: list[Any] = [None] * rank_and_world()[1]
            dist.all_gather_object(parts, [tuple(t.cpu() for t in pair) for pair in held])
            held = [pair for part in parts for pair in part]
        if held:
            residual, features = (torch.cat(part) for part in zip(*held, strict=True))
            self.calibration.fit(residual, features)
        found = self._log("val")
        ratio, error = found.get("identity_ratio", 0.0), found.get("heldout_mae", 0.0)
        # a good network has a high ratio too: it denoises little of what it sees, and knows well
        # what it does not see; one that only copies is no better than each layer's mean, unless
        # a prior fills for it
        useless = self.inputs == "observed" or error > _TRAPPED * self._plain_mae()
        if ratio > (self.trap_ratio or torch.inf) and useless:
            raise ConfigError(
                f"The network copies what it sees: its error on held-out observed entries is "
                f"{error:.3f} m, {ratio:.1f} times that on visible ones.",
                "Set model.init_args.inputs=hidden, or hide more with model.init_args.hiding; "
                "model.init_args.trap_ratio=null goes on regardless.",
            )

    def _plain_mae(self) -> float:
        """Mean absolute error of each layer's mean on held-out entries [m]."""
        total, count = self._plain
        return float(total / count.clamp_min(1))

    def on_test_epoch_end(self) -> None:
        """Log the errors."""
        found = self._log("test")
        if not {"missing_rmse", "extra_rmse"} & found.keys():
            warnings.warn(
                "Nothing was asked for whose thickness is known: the errors are those of entries "
                "that the network sees. Set data.init_args.drop=0.3 to take some of them away.",
                stacklevel=2,
            )

    def on_predict_start(self) -> None:
        """Take up ``weights``, and warn where intervals are not known."""
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
        found: dict[str, float] = self.metrics.compute()
        for name, value in found.items():
            metric = f"{stage}/{name}"
            self.log(metric, value, prog_bar=metric == self.monitor, batch_size=1)
        return found


def _segments(checkpoint: dict[str, Any]) -> tuple[str, ...]:
    """Names of the segments that a checkpoint's networks have seen.

    Raises:
        CheckpointError: It says none.
    """
    names = checkpoint.get("ice_segments")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            "The checkpoint does not say which flight segments it has seen.",
            "Give a checkpoint of a run of ice_layers.",
        )
    return tuple(names)


def segment_of_traces(batch: Any) -> Tensor:
    """Number of each trace's flight segment. Shape: (N,)."""
    segment: Tensor = batch.segment[Track.of_batch(batch).stack]
    return segment


def known_truth(batch: Any) -> Tensor:
    """True thickness [m], NaN where nobody knows it. Shape: (N, L)."""
    truth: Tensor | None = getattr(batch, "truth", None)
    return torch.full_like(batch.thickness, torch.nan) if truth is None else truth


def refuse_seen(trained: Collection[str], data: Any, also: str = "") -> None:
    """Refuse to start from, or to test, what has seen segments of the test.

    Segments that the data share between parts by the user's word are not refused.

    Args:
        trained: Names of the flight segments that training or validation has seen.
        data: The DataModule, after its setup.
        also: What else the mend is.

    Raises:
        DataError: It has.

    Source: card section 2 (leakage rule).
    """
    tested = {s.segment for s in data.stacks_of("test")} if hasattr(data, "stacks_of") else set()
    tested -= getattr(data, "shared_segments", frozenset())
    if seen := sorted(tested & set(trained)):
        raise DataError(
            f"The checkpoint was trained or validated on flight segments of the test: "
            f"{', '.join(seen[:3])}{', …' if len(seen) > 3 else ''}.",
            "Use its run's data options (val, test, order, seed of data.init_args, and of the "
            f"source){also}.",
        )


def check_kept(kept: str) -> None:
    """Refuse an unknown value of ``keep_boundaries``.

    Raises:
        ConfigError: It is.
    """
    if kept not in get_args(KeptBoundaries):
        raise ConfigError(
            f"model.init_args.keep_boundaries={kept} is unknown.",
            f"Use one of {', '.join(get_args(KeptBoundaries))}.",
        )


def check_batch(batch: Any, fields: Iterable[str]) -> None:
    """Refuse a batch of other data.

    Raises:
        DataError: It lacks a field.
    """
    if missing := [name for name in fields if getattr(batch, name, None) is None]:
        raise DataError(
            f"A batch lacks {', '.join(missing)}.",
            "Use data.class_path=fulgurite.datamodules.ice_layers.IceLayerDataModule.",
        )
