"""Batches of stacks: training, validation, test and prediction.

Shapes: N traces (nodes), L layers (newest first).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from fulgurite.datamodules.ice_layers.dropping import drop_picks
from fulgurite.datamodules.ice_layers.options import LayerEvaluationOptions
from fulgurite.datamodules.ice_layers.splits import PARTS
from fulgurite.datamodules.ice_layers.stack import LayerStack
from fulgurite.devices import pins_memory
from fulgurite.errors import DataError
from fulgurite.extras import optional_import
from fulgurite.sampling import ContinuedSampler, UnrepeatedDistributedSampler, sampler_ranks

__all__ = ["StackLoaders"]

_DROP = 1  # random stream of `seed`


class StackLoaders(L.LightningDataModule):
    """Serves the stacks of a split as batches of PyG ``Data``; a subclass reads and splits them.

    Attributes:
        segments: Names of the flight segments, by number.
        stacks: Names of the stacks, by number.
        batch_size: Stacks of a training batch.
        evaluation: The batches of validation, test and prediction.
        num_workers: Processes that load batches.
        seed: Seed of the order of training and of what is dropped.
    """

    segments: tuple[str, ...]
    stacks: tuple[str, ...]
    batch_size: int
    evaluation: LayerEvaluationOptions
    num_workers: int
    seed: int
    predicts_input: bool = False  # stacks in no split, all of which are predicted
    _parts: dict[str, list[LayerStack]]
    _unpicked: list[LayerStack]  # without any pick, for prediction only
    _left_out: list[LayerStack]  # in no part, for prediction only
    _part_of: Mapping[str, str] | None  # where the files have a split of their own

    def _data(self, part: str, drop: float = 0.0) -> list[Any]:
        """PyG ``Data`` of a part."""
        first = sum(len(self._parts[p]) for p in PARTS[: PARTS.index(part)])
        data = []
        for k, stack in enumerate(self._parts[part], first):
            dropped = None
            if drop:  # by name: whatever other stacks there are
                key = (self.seed, _DROP, *stack.name.encode())
                picked = stack.known_spans.picked
                dropped = drop_picks(picked, drop, np.random.default_rng(key))
            data.append(stack.to_data(self.segments.index(stack.segment), k, dropped))
        return data

    def _unpicked_data(self, parts: Sequence[str]) -> list[Any]:
        """PyG ``Data`` of the stacks without any pick on the segments of some parts.

        Where the files have a split of their own, those of the parts themselves.
        """
        segments = {stack.segment for part in parts for stack in self._parts[part]}
        if set(parts) == set(PARTS):  # a segment without any pick is in no part
            segments |= {stack.segment for stack in self._unpicked}
        first = sum(map(len, self._parts.values()))
        return [
            stack.to_data(self.segments.index(stack.segment), k)
            for k, stack in enumerate(self._unpicked, first)
            if (
                stack.segment in segments
                if self._part_of is None
                else self._part_of[stack.name] in parts
            )
        ]

    def _loader(self, data: Sequence[Any], sampler: Any, batch_size: int) -> Any:
        pyg = optional_import("torch_geometric.loader.dataloader", "ice", "Batching stacks")
        # PyG's own DataLoader cannot be made again, as Lightning does for prediction
        return DataLoader(
            data,  # type: ignore[arg-type]  # a list is a dataset
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=pyg.Collater(data),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=pins_memory(),
            generator=torch.Generator(),  # loading leaves the run's randomness alone
        )

    def train_dataloader(self) -> Any:
        """Return the training stacks, in another order in each epoch.

        Raises:
            DataError: There are no training stacks.
        """
        if not self._parts["train"]:
            raise DataError(
                "No stack is left for training.",
                "Change `--data.init_args.split` or `--data.init_args.selection.traced`.",
            )
        data = self._data("train")
        rank, world = sampler_ranks(self.trainer)
        sampler: DistributedSampler[Any] = DistributedSampler(
            data,  # type: ignore[arg-type]  # a list is a dataset
            num_replicas=world,
            rank=rank,
            shuffle=True,
            seed=self.seed,
        )
        continued = ContinuedSampler(sampler, self.trainer, self.batch_size)
        return self._loader(data, continued, self.batch_size)

    def _evaluation(self, data: Sequence[Any]) -> Any:
        if not data:
            return []
        sampler = UnrepeatedDistributedSampler(len(data), sampler_ranks(self.trainer))
        return self._loader(data, sampler, self.evaluation.batch_size or self.batch_size)

    def val_dataloader(self) -> Any:
        """Return the validation stacks, if there are any."""
        return self._evaluation(self._data("val"))

    def test_dataloader(self) -> Any:
        """Return the test stacks, with a fraction ``evaluation.drop`` of picks hidden."""
        return self._evaluation(self._data("test", self.evaluation.drop))

    def predict_dataloader(self) -> Any:
        """Return every stack of the chosen part once, in order.

        Raises:
            DataError: The part has no stack.
        """
        predict = self.evaluation.predict
        predicts_all = self.predicts_input or predict == "all"
        parts = PARTS if predicts_all else (predict,)
        data = [item for part in parts for item in self._data(part)] + self._unpicked_data(parts)
        if predicts_all:
            first = len(self.stacks) - len(self._left_out)
            data += [
                stack.to_data(self.segments.index(stack.segment), k)
                for k, stack in enumerate(self._left_out, first)
            ]
        if not data:
            raise DataError(
                f"The part {predict} has no stack to predict.",
                "Set `--data.init_args.evaluation.predict=all`.",
            )
        return self._evaluation(data)
