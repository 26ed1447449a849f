"""What completion and deep-layer prediction share: networks, statistics, optimizer, leakage rule.

Axes: B stacks, N traces of all of them, L layers, P physical fields.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from fulgurite.base import SystemModule, build_network, scheduled
from fulgurite.domains.ice_layers.spans import TensorSpans
from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.export.exportable import ExportableNetwork, ExportRequest
from fulgurite.models.ice_layers.data.batches import (
    check_batch,
    read_segments,
    refuse_seen,
    segment_of_traces,
)
from fulgurite.models.ice_layers.data.graph import note_sizes
from fulgurite.models.ice_layers.data.normalise import Normalised, Normaliser, to_positive
from fulgurite.models.ice_layers.exporting import export_predictor
from fulgurite.models.ice_layers.networks.features import PhysicsPrior, find_contradicted
from fulgurite.models.ice_layers.training.losses import masked_robust_loss
from fulgurite.models.ice_layers.training.metrics import CompletionMetrics
from fulgurite.models.ice_layers.training.options import (
    CompletionPrediction,
    NetworkInputs,
    PredictionOptions,
    RobustLossOptions,
)
from fulgurite.models.ice_layers.training.schedule import TwoStageLR
from fulgurite.models.ice_layers.training.uncertainty import Calibration
from fulgurite.sampling import forget_training_data, rank_and_world
from fulgurite.tensor_files import read_state_dict

__all__ = ["IceModule"]

_OTHER_PRECISIONS = ("64-true", "16-true", "bf16-true")
_FIELDS = ("thickness", "observed", "physics", "pos", "distance", "stack", "ptr")


class IceModule(SystemModule):
    """What completion and deep-layer prediction share: networks, statistics, optimizer.

    The networks are made when the data or a checkpoint say how many layers and fields there are.

    Args:
        network: The network, or what makes it from (layers, fields).
        inputs: What networks are shown.
        loss: The robust loss.
        prediction: What networks predict, and how many of them.
        optimizer: Makes the optimizer.
        scheduler: Makes the scheduler, stepped after each step.
        weights: Checkpoint of a run whose networks and statistics are the start.
        allow_seen: Start from ``weights``, and test, though they have seen segments of the test.

    Attributes:
        trained_segments: Names of the flight segments that training or validation has seen, which
            completed stacks carry for the leakage rule.
    """

    monitor: str | None = None
    mode = "min"
    inputs: NetworkInputs
    loss: RobustLossOptions
    prediction: PredictionOptions

    def __init__(
        self,
        network: Callable[[int, int], nn.Module] | nn.Module,
        inputs: NetworkInputs,
        loss: RobustLossOptions,
        prediction: PredictionOptions,
        *,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        weights: str | None,
        allow_seen: bool,
    ) -> None:
        super().__init__()
        # Lightning says of each module that moves its batches that its DataModule does not
        warnings.filterwarnings("ignore", ".*overridden `transfer_batch_to_device` in `Lightning.*")
        if prediction.members > 1 and isinstance(network, nn.Module):
            raise ConfigError(
                f"model.init_args.prediction.members={prediction.members}, and there is one "
                "network.",
                f"Give what makes one, such as network={type(network).__name__}, or "
                "prediction.members=1.",
            )
        # in a partial: a module that is an attribute would be in the checkpoint twice
        self.make_network = functools.partial(build_network, network)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.inputs, self.loss, self.prediction = inputs, loss, prediction
        self.weights, self.allow_seen, self._begun = weights, allow_seen, False
        self.sizes: tuple[int, int] | None = None
        self.trained_segments: tuple[str, ...] = ()
        self.networks = nn.ModuleList()

    # --- building ------------------------------------------------------------------------------

    def build(self, layers: int, physics: int) -> None:
        """Make the networks; does nothing where they are there already.

        Args:
            layers: Number of layers, L.
            physics: Number of physical fields, P.

        Raises:
            DataError: The networks were made for other sizes.
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
        kind = self.prediction.prior
        self.prior = None if kind == "none" else PhysicsPrior(layers, physics, kind)
        self.networks.extend(
            self.make_network(layers, physics) for _ in range(self.prediction.members)
        )
        self.calibration = Calibration()
        self.metrics = CompletionMetrics(layers)
        self.to(self.device)

    def setup(self, stage: str) -> None:
        """Make the networks, and take the statistics of the training data.

        Raises:
            ConfigError: The data are of another system, or the precision is not that of networks
                with statistics in float64.
        """
        if (precision := str(self.trainer.precision)) in _OTHER_PRECISIONS:
            raise ConfigError(
                f"--trainer.precision={precision} converts the statistics of the data, too, which "
                "the networks of ice layers keep in float64.",
                "Set --trainer.precision=32-true or bf16-mixed.",
            )
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "layers") or not hasattr(data, "physics"):
            raise ConfigError(
                f"{type(self).__name__} cannot read {type(data).__name__}.",
                "Use data.class_path=fulgurite.datamodules.ice_layers.IceLayerDataModule.",
            )
        self.build(int(data.layers), len(data.physics))
        if stage == "fit" and self.weights is None:
            self.normaliser.set_statistics(data.statistics)
            if self.prior is not None:
                self._fit_prior(data)
        if stage == "fit":  # validation chooses the checkpoint, so it has been seen too
            segments = {s.segment for part in ("train", "val") for s in data.stacks_of(part)}
            self.trained_segments = tuple(sorted(segments.union(self.trained_segments)))

    def _begin(self) -> None:
        """Load ``weights``, once; a checkpoint of this run holds all that they did."""
        if self.weights is not None and not self._begun:
            self._load(self.weights)
        self._begun = True

    def _refuse_seen(self) -> None:
        if not self.allow_seen:
            also = ", or model.init_args.allow_seen=true if they only share their names"
            data = getattr(self.trainer, "datamodule", None)
            refuse_seen(self.trained_segments, data, also)

    def on_fit_start(self) -> None:
        """Load ``weights``.

        Raises:
            CheckpointError: ``weights`` cannot be read or does not fit.
            DataError: ``weights`` have seen segments of the test.
        """
        self._begin()
        self._refuse_seen()
        if self.trainer.ckpt_path:  # the schedule has asked how many batches there are
            forget_training_data(self.trainer)

    def on_validation_start(self) -> None:
        """Load ``weights``."""
        self._begin()

    def on_test_start(self) -> None:
        """Refuse test segments that training or validation has seen.

        Raises:
            DataError: A segment of the test has been seen.
        """
        self._begin()
        self._refuse_seen()

    def on_predict_start(self) -> None:
        """Load ``weights``."""
        self._begin()

    def _fit_prior(self, data: Any) -> None:
        """Fit on the training data of all ranks; drawing batches must not move random states."""
        assert self.prior is not None
        names = ("thickness", "observed", "physics")
        with torch.random.fork_rng():
            batches = [
                [*(getattr(batch, n) for n in names), segment_of_traces(batch)]
                for batch in data.train_dataloader()
            ]
        parts = [torch.cat(part) for part in zip(*batches, strict=True)]
        if (world := rank_and_world()[1]) > 1:
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, parts)
            parts = [torch.cat(part) for part in zip(*everyone, strict=True)]
        self.prior.cpu().fit(*parts)
        self.prior.to(self.device)

    def _load(self, path: str) -> None:
        """Networks, statistics, prior and calibration of a checkpoint."""
        checkpoint, tensors = read_state_dict(path, "model.init_args.weights")
        segments = read_segments(checkpoint)
        try:
            self.load_state_dict(tensors)
            self.trained_segments = tuple(sorted({*segments, *self.trained_segments}))
        except (RuntimeError, KeyError) as error:
            problem = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"model.init_args.weights={path} does not fit the networks: {problem}",
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
        self.trained_segments = read_segments(checkpoint)
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

        def make_scheduler(optimizer: torch.optim.Optimizer) -> Any:
            assert self.scheduler is not None
            scheduler = self.scheduler(optimizer)
            if isinstance(scheduler, TwoStageLR):
                scheduler.plan(int(self.trainer.estimated_stepping_batches))
            return scheduler

        return scheduled(
            self.optimizer(self.parameters()),
            None if self.scheduler is None else make_scheduler,
            "step",
        )

    def export_network(self, request: ExportRequest) -> ExportableNetwork:
        """Hand over the prediction of one stack: networks, statistics, prior and measured sums."""
        copied = copy.deepcopy(self).eval()
        copied.metrics = nn.Identity()  # type: ignore[assignment]
        notes = []
        prediction = self.prediction
        if isinstance(prediction, CompletionPrediction) and prediction.mc_samples:
            copied.prediction = dataclasses.replace(prediction, mc_samples=0)
            notes.append(
                "dropout is off in the exported network; `fulgurite predict` averages "
                f"{prediction.mc_samples} samples with it"
            )
        return export_predictor(
            copied, sizes=self.sizes, data_state=request.data_state, notes=tuple(notes)
        )

    # --- steps ---------------------------------------------------------------------------------

    def normalise(self, batch: Any, unseen: bool = False) -> Normalised:
        """Normalise a batch.

        Args:
            batch: A batch of PyG; see :mod:`fulgurite.models.ice_layers.data.batches`.
            unseen: Whether deviations are from a prior that does not know the batch's flight
                segments.

        Raises:
            DataError: The batch lacks a field.
        """
        check_batch(batch, _FIELDS)
        x: Normalised = self.normaliser(batch)
        if self.prior is None:
            return x
        expected = self.prior(batch.physics, segment_of_traces(batch) if unseen else None)
        deviation = self.prior.deviation(batch.thickness, expected).float()
        return dataclasses.replace(x, thickness=deviation, expected=expected)

    def forward_member(
        self, network: nn.Module, x: Normalised, visible: Tensor, shared: Tensor | None = None
    ) -> Tensor:
        """Normalised thickness of all entries from what is visible.

        Args:
            network: A network; with a true attribute ``sums`` it gets ``shared``.
            x: The batch.
            visible: Entries that it may see. Shape: (N, L), bool.
            shared: What :meth:`shared` says of measured sums that it may see. Shape: (N, L).

        Shape: to (N, L).

        Raises:
            ConfigError: The network gives something of another shape.
        """
        visible = self.mask_outliers(x, visible)
        options = {"shared": shared} if getattr(network, "sums", False) else {}
        out = network(
            x.thickness, visible, x.physics, x.pos, x.degrees, x.distance, x.track, **options
        )
        if not isinstance(out, Tensor) or out.shape != visible.shape:
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ConfigError(
                f"The network {type(network).__name__} gives {shape} for {tuple(visible.shape)} "
                "traces and layers.",
                "Let it return one number for each of them.",
            )
        return out

    def check_finite(self, predicted: Tensor) -> None:
        """Refuse predictions that are none; it waits for the device.

        Raises:
            ConfigError: A value is not finite.
        """
        if bool((is_finite := predicted.isfinite()).all()):
            return
        raise ConfigError(
            f"The network {type(self.networks[0]).__name__} gives {int((~is_finite).sum())} values "
            f"of {predicted.numel()} that are not finite.",
            "Thickness is NaN where it is not visible: a network of your own takes "
            "torch.where(visible, thickness, 0). If the training loss is NaN, lower the learning "
            "rate.",
        )

    def shared(self, x: Normalised, spans: TensorSpans) -> Tensor:
        """Normalised thickness of layers that share a measured sum as layers usually do.

        Shape: to (N, L), float32, NaN where no sum of several layers is known.
        """
        usual = x.expected
        if usual is None:
            usual = self.normaliser.thickness_mean.expand(spans.path.shape)
        in_proportion = spans.constrain(to_positive(usual))
        scores = self.standardise(in_proportion, x).float()
        return torch.where(spans.between, scores, torch.nan)

    def mask_outliers(self, x: Normalised, mask: Tensor) -> Tensor:
        """Entries of a mask that its others do not contradict. Shape: (N, L), bool."""
        if (limit := self.inputs.outlier) is None:
            return mask
        return mask & ~find_contradicted(x.thickness, mask, x.track, x.distance, limit=limit)

    def metres(self, out: Tensor, x: Normalised) -> Tensor:
        """What a network gives, as thickness above 0 [m]. Shape: (N, L), float64."""
        if self.prior is None or x.expected is None:
            return to_positive(self.normaliser.metres(out))
        return to_positive(self.prior.metres(out, x.expected))

    def standardise(self, thickness: Tensor, x: Normalised) -> Tensor:
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
        mask = mask & self.mask_outliers(x, x.observed)
        return masked_robust_loss(
            predicted, x.thickness, mask, self.loss.delta, kind=self.loss.kind, over_ranks=True
        )
