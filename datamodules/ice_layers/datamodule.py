"""Stacks of layers along flight lines: the data module of layer completion.

Shapes: N traces (nodes), L layers (newest first), P physical fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from fulgurite.base import save_options
from fulgurite.data.exclusions import Exclusion
from fulgurite.datamodules.ice_layers.flights import StackSource
from fulgurite.datamodules.ice_layers.generator.synthetic import SyntheticFlights
from fulgurite.datamodules.ice_layers.loaders import StackLoaders
from fulgurite.datamodules.ice_layers.options import (
    LayerEvaluationOptions,
    Part,
    SelectionOptions,
    SplitOptions,
)
from fulgurite.datamodules.ice_layers.prediction import find_input_stacks
from fulgurite.datamodules.ice_layers.readers.completed import (
    CompletedStacks,
    drop_overlapping,
    refuse_leaks,
    refuse_unlike,
)
from fulgurite.datamodules.ice_layers.readers.write_back import Written
from fulgurite.datamodules.ice_layers.splits import (
    PARTS,
    describe_parts,
    leave_guard,
    refuse_second_split,
    split_segments,
)
from fulgurite.datamodules.ice_layers.stack import (
    Array,
    Flights,
    LayerStack,
)
from fulgurite.datamodules.ice_layers.statistics import fit_statistics
from fulgurite.datamodules.ice_layers.tracks.records import describe_completed, times_below
from fulgurite.domains.ice_layers.codes import METRES
from fulgurite.domains.ice_layers.details import FlightDetails, LayerLabels
from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.options import NonNegativeInt, PositiveInt, check_arguments, make_options

__all__ = ["IceLayerDataModule"]

_CHOOSE = 2  # random stream of `seed`; 0 is the split, 1 what is dropped
_FRACTION = 1 / 7  # of segments, for validation and for the test


class IceLayerDataModule(StackLoaders):
    """Splits the flight segments of a source and serves stacks as batches of PyG ``Data``.

    Node-major, so that N may differ: ``thickness`` (N, L) float64 [m], NaN where missing;
    ``observed`` (N, L) bool, where the model may see it; ``dropped`` (N, L) bool, where it is known
    and kept from the model in a test; ``physics`` (N, L, P) float32; ``physics_flag`` (N,) uint8,
    1 where the nearest grid cell was used; ``pos`` (N, 2) float64 latitude and longitude [degrees];
    ``distance`` (N,) float64 along the track [m]; ``segment`` and ``stack`` (1,) int64, numbers in
    :attr:`segments` and :attr:`stacks`; ``truth`` (N, L) float64 [m] of generated data and
    ``provenance`` (N, L) uint8 of completed stacks.

    Args:
        source: The stacks; :class:`SyntheticFlights` if not given.
        completed: Completed stacks (of another run) to train on instead of the source's; validation
            and test stay the source's. Stops if the completing model has seen a test segment, and
            leaves out stacks that overlap validation or test segments.
        split: How flight segments are split into training, validation and test.
        selection: Which stacks of the parts are used.
        evaluation: The batches of validation, test and prediction.
        batch_size: Stacks of a training batch.
        num_workers: Processes that load batches; batches do not depend on it.
        seed: Seed of the split, the order of training and what is dropped, apart from the run's
            seed.

    Attributes:
        layer_names: Names of the layers, after :meth:`setup`.
        layer_age: Age of each layer's lower boundary at the flight [years], after :meth:`setup`.
        segments: Names of the flight segments, by number, after :meth:`setup`.
        stacks: Names of the stacks, by number, after :meth:`setup`.
        unit: Unit of thicknesses, ``m`` or ``range bins``; known after :meth:`setup`.
        shared_segments: Flight segments that the configuration keeps in several parts.
        statistics: Statistics of the training stacks, float64: ``thickness_mean`` (L,),
            ``thickness_std`` (), ``physics_mean`` and ``physics_std`` (P,), ``pos_mean`` and
            ``pos_std`` (2,).

    Raises:
        ConfigError: An argument is out of range.

    Source: docs/papers/ice_layers.md sections 1.8, 2, 3 and 7.
    """

    layer_names: tuple[str, ...]
    layer_age: Array

    def __init__(
        self,
        source: StackSource | None = None,
        completed: CompletedStacks | None = None,
        *,
        split: SplitOptions = SplitOptions(),
        selection: SelectionOptions = SelectionOptions(),
        evaluation: LayerEvaluationOptions = LayerEvaluationOptions(),
        batch_size: PositiveInt = 8,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 1234,
    ) -> None:
        super().__init__()
        check_arguments(IceLayerDataModule.__init__, locals(), "data.init_args")
        save_options(self, "source", "completed", logger=False)
        self.source = SyntheticFlights() if source is None else source
        self.completed = completed
        self.split = make_options(SplitOptions, split)
        self.selection = make_options(SelectionOptions, selection)
        self.evaluation = make_options(LayerEvaluationOptions, evaluation)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._parts: dict[str, list[LayerStack]] = {}
        self._unpicked: list[LayerStack] = []
        self._left_out: list[LayerStack] = []
        self._every: list[LayerStack] = []
        self._statistics: dict[str, Tensor] | None = None
        self.excluded: list[Exclusion] = []
        self.unit = METRES
        self._trained_unit: str | None = None
        self._part_of: Mapping[str, str] | None = None
        self.shared_segments: frozenset[str] = frozenset()

    @property
    def physics(self) -> tuple[str, ...]:
        """Names of the physical fields, known before :meth:`setup`."""
        return self.source.physics

    @property
    def num_physics(self) -> int:
        """P, known before :meth:`setup`."""
        return len(self.physics)

    @property
    def layers(self) -> int:
        """L; known before :meth:`setup` where the source says it.

        Raises:
            ConfigError: The source does not know it before its files are read.
        """
        if self._parts:
            return len(self.layer_names)
        if self.source.layers is None:
            raise ConfigError(
                "The number of layers is not known before the files are read.",
                "Set `--data.init_args.source.init_args.count` to it.",
            )
        return self.source.layers

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Mean and deviation of the training stacks, or those of a checkpoint.

        Raises:
            DataError: There are no training stacks, and no checkpoint was loaded.
        """
        if self._statistics is None:
            raise DataError(
                "There are no training stacks to measure mean and deviation of.",
                "Lower `--data.init_args.split.val` and `split.test`, or give a checkpoint with "
                "`--ckpt_path`.",
            )
        return self._statistics

    def predict_from(self, path: Path, trained: Mapping[str, Any]) -> None:
        """Predict all stacks of files, with the statistics of the training.

        Args:
            path: See :func:`~fulgurite.datamodules.ice_layers.prediction.find_input_stacks`.
            trained: What the checkpoint holds of this; empty to read the training's stacks.

        Raises:
            DataError: There are no such files at the path.
            CheckpointError: They have other physical fields than the training.
        """
        if not trained:
            self.prepare_data()
            self.setup()
            trained, self._parts = self.state_dict(), {}
        self.source = find_input_stacks(
            path, self.source, layers=trained["layers"], physics=trained["physics"]
        )
        self.load_state_dict(dict(trained))
        self.predicts_input = True

    def prepare_data(self) -> None:
        """Let the source write its files, once per machine."""
        self.source.prepare()
        if self.completed is not None and not self.predicts_input:
            self.completed.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read the stacks and split them; does nothing the second time.

        Raises:
            DataError: The data are unusable, or the split does not fit them.
        """
        if self._parts:
            return
        flights = self.source.load()
        picked = [stack for stack in flights.stacks if stack.observed.any()]
        parts: dict[str, list[LayerStack]] = {part: [] for part in PARTS}
        if not self.predicts_input:
            parts = self._split(flights, picked)
        self.unit = flights.unit
        self._check_unit()
        self._unpicked = [stack for stack in flights.stacks if not stack.observed.any()]
        self.excluded = list(flights.excluded)
        if self.completed is not None and not self.predicts_input:
            parts["train"] = self._load_completed(flights, parts)
        if years := self.split.guard:
            dates = [s.segment for part in ("val", "test") for s in parts[part]]
            parts["train"], near = leave_guard(parts["train"], dates, years)
            if near:
                description = f"training stacks within {years:g} years of an evaluated flight"
                self.excluded.append(Exclusion("guard", description, near))
        for part in self.selection.traced:
            parts[part] = [stack for stack in parts[part] if stack.observed.all()]
        count = self.selection.train_stacks
        if count is not None and count < len(parts["train"]):
            generator = np.random.default_rng((self.seed, _CHOOSE))
            indices = generator.permutation(len(parts["train"]))[:count]
            parts["train"] = [parts["train"][k] for k in np.sort(indices)]
        if not any(parts.values()) and not self._unpicked and not self.predicts_input:
            raise DataError(
                f"No stack is left of {flights.report()}.",
                "Take parts out of `--data.init_args.selection.traced`.",
            )
        self.layer_names, self.layer_age = flights.layer_names, flights.layer_age
        every = [*(stack for part in PARTS for stack in parts[part]), *self._unpicked]
        names = {stack.name for stack in every}
        self._left_out = [stack for stack in flights.stacks if stack.name not in names]
        segments = tuple(sorted({stack.segment for stack in every}))
        # behind the others, so that these keep their numbers
        others = {stack.segment for stack in self._left_out} - set(segments)
        self.segments = (*segments, *sorted(others))
        self.stacks = tuple(stack.name for stack in [*every, *self._left_out])
        self._parts = parts
        self._every = [*every, *self._left_out]
        if self._statistics is None and parts["train"]:
            self._statistics = fit_statistics(parts["train"])
        left_out = "".join(
            f"; {e.count} {e.description}" for e in self.excluded[len(flights.excluded) :]
        )
        if self._unpicked:
            left_out += f"; {len(self._unpicked)} stacks without any pick, for prediction only"
        rank_zero_info(
            f"Ice layers: {flights.report()}{left_out}\n"
            + (describe_parts(parts) if not self.predicts_input else "input: all are predicted")
        )

    def _split(self, flights: Flights, picked: Sequence[LayerStack]) -> dict[str, list[LayerStack]]:
        """Deal stacks out to the parts: as the files say, or else by flight segment.

        Raises:
            ConfigError: The files have a split of their own, and the options ask for another.
            DataError: There is no pick at all.
        """
        if not picked and (self.split.val, self.split.test) != (0, 0):
            raise DataError(
                f"No layer is picked in any of {flights.report()}: there is nothing to train on.",
                "Check `--data.init_args.source`; to complete such flights with a trained network, "
                "set `split.val` and `split.test` to 0, or give them by `predict --input`.",
            )
        if flights.split is None:
            segments = tuple(sorted({stack.segment for stack in picked}))
            val, test = (
                _FRACTION if fraction is None else fraction
                for fraction in (self.split.val, self.split.test)
            )
            split = split_segments(segments, val, test, self.split.order, seed=self.seed)
            return {
                part: [stack for stack in picked if stack.segment in set(split[part])]
                for part in PARTS
            }
        refuse_second_split(self.split.val, self.split.test, self.split.order)
        self.shared_segments = flights.split.shared
        self._part_of = part_of = flights.split.part
        return {part: [s for s in picked if part_of[s.name] == part] for part in PARTS}

    def _load_completed(
        self, flights: Flights, parts: dict[str, list[LayerStack]]
    ) -> list[LayerStack]:
        """Training stacks out of another run's completed ones, under the leakage rule."""
        assert self.completed is not None
        completed = self.completed.load()
        refuse_unlike(completed, flights)
        tested = {stack.segment for stack in parts["test"]} - self.shared_segments
        refuse_leaks(completed.stacks, tested)
        evaluated = [*parts["val"], *parts["test"]]
        usable, dropped = drop_overlapping(completed.stacks, evaluated, self.selection.overlap)
        self.excluded += [*completed.excluded, *dropped]
        names = {stack.name for stack in evaluated}
        return [
            replace(stack, name=f"{stack.name}_completed") if stack.name in names else stack
            for stack in usable
        ]

    @property
    def prediction_names(self) -> dict[str, tuple[str, ...]]:
        """Names of the codes in predictions, after :meth:`setup`."""
        return {"stack": self.stacks}

    def stacks_of(self, part: Part) -> list[LayerStack]:
        """The stacks of one part, after :meth:`setup`."""
        return list(self._parts[part])

    def describe_traces(self, number: int, thickness: Array) -> FlightDetails:
        """What the source says of the traces of a completed stack, after :meth:`setup`.

        Args:
            number: Number of the stack in :attr:`stacks`.
            thickness: Completed [m], NaN where it is left missing. Shape: (N, L).

        Returns:
            The arrays of which anything is known, and ``picked`` where the source knows boundaries.
        """
        stack = self._every[number]
        record = stack.record
        described = FlightDetails()
        if record is not None:
            described = describe_completed(record, thickness, stack.known_spans)
        if stack.spans is not None:
            surface = np.ones(len(thickness), np.bool_)
            if record is not None and record.surface is not None:
                surface = np.isfinite(record.surface)
            picked = np.concatenate([surface[:, None], stack.spans.picked], axis=1)
            described = replace(described, picked=picked)
        return described

    def describe_layers(self, number: int) -> LayerLabels:
        """Names and ages of the layers of a stack, after :meth:`setup`.

        Args:
            number: Number of the stack in :attr:`stacks`.
        """
        labels = self._every[number].labels
        age = self.layer_age if labels.age is None else labels.age
        return replace(labels, names=labels.names or self.layer_names, age=age)

    def check_write_back(self, folder: Path) -> None:
        """Refuse to write completed layers back where that is not possible, after :meth:`setup`.

        Args:
            folder: Folder to write to.

        Raises:
            ConfigError: The source reads no layer files, or they are in this folder.
            DataError: Times of traces repeat.
        """
        records: dict[str, list[FlightDetails]] = {}
        for stack in self._every:
            if stack.record is not None:
                records.setdefault(stack.segment, []).append(stack.record)
        self.source.check_write_back(folder, records)

    def write_back(self, folder: Path, numbers: Sequence[int], read: Callable[[int], Array]) -> str:
        """Write completed layers back into files of the kind that was read, by segment.

        Args:
            folder: Folder to write to.
            numbers: Numbers of the completed stacks in :attr:`stacks`.
            read: Gives the completed thickness (N, L) [m] of a stack by its number.

        Returns:
            What was written, in one line.
        """
        segments: dict[str, list[tuple[int, FlightDetails]]] = {}
        for number in sorted(numbers):
            if (record := self._every[number].record) is not None:
                segments.setdefault(self._every[number].segment, []).append((number, record))
        total = Written()
        for segment, its_records in sorted(segments.items()):
            stacks = [
                (record, times_below(record, read(number), self._every[number].known_spans))
                for number, record in its_records
            ]
            total += self.source.write_back(folder, segment, stacks)
        return total.report(len(segments), folder)

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run on other flights needs: statistics and what inputs mean."""
        if self._statistics is None:
            return {}
        return {
            "statistics": dict(self._statistics),
            "physics": list(self.physics),
            "layers": self.layers,
            "unit": self.unit,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the statistics of the training run.

        Raises:
            CheckpointError: The checkpoint was trained with other layers, fields or units.
        """
        if not state_dict:
            return
        for name, theirs, mine in (
            ("physical fields", tuple(state_dict["physics"]), self.physics),
            ("layers", state_dict["layers"], self.layers),
        ):
            if theirs != mine:
                raise CheckpointError(
                    f"The checkpoint was trained with the {name} {theirs}, these data have {mine}.",
                    "Give data with the same ones in the same order.",
                )
        self._trained_unit = state_dict.get("unit", METRES)
        if self._parts:
            self._check_unit()
        self._statistics = dict(state_dict["statistics"])

    def _check_unit(self) -> None:
        """Refuse thicknesses in another unit than those of a checkpoint, once both are known."""
        if self._trained_unit not in (None, self.unit):
            raise CheckpointError(
                f"The checkpoint was trained with thickness in {self._trained_unit}, these data "
                f"have it in {self.unit}.",
                "Give data in the same unit, such as by "
                "`--data.init_args.source.init_args.bins.size`.",
            )
