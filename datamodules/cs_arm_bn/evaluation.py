"""Evaluation batches of plates: fixed queries and controls, and the probes of a test.

Shapes: L queries, N controls.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.cs_arm_bn.draws import (
    draw_shifted_batches,
    mislabel,
    pair_wrong_plates,
    sample_rows,
    split_into_batches,
)
from fulgurite.datamodules.cs_arm_bn.episodes import BatchRows
from fulgurite.datamodules.cs_arm_bn.options import EpisodeOptions, PlateEvaluationOptions
from fulgurite.datamodules.cs_arm_bn.table import PlateTable, Rows
from fulgurite.errors import ConfigError, DataError

__all__ = ["EvaluationPlan"]

_BATCHES, _CONTROLS, _SHIFT, _MISLABEL = range(2, 6)  # random streams of the seed; 1 is training


class EvaluationPlan:
    """Which rows are evaluated together, the same in every run.

    The batches of a plate do not depend on the other plates.

    Args:
        table: Table of the sites.
        episodes: Training episodes, whose sizes are the default.
        evaluation: Sizes of evaluation batches, and probes of the test.
        seed: Seed of the random numbers.

    Source: docs/papers/cs_arm_bn.md sections 1.3, 2.4, 6.3 and 6.4.
    """

    def __init__(
        self,
        table: PlateTable,
        episodes: EpisodeOptions,
        evaluation: PlateEvaluationOptions,
        seed: int,
    ) -> None:
        self.table = table
        self.options = evaluation
        self.num_queries, self.num_controls = evaluation.find_sizes(episodes)
        self.seed = seed

    def batches(self, rows: Rows, probes: bool) -> list[BatchRows]:
        """Return batches in which each of the queries counts once.

        Args:
            rows: Rows of queries.
            probes: Whether to apply label shift, wrong plates and mislabelled controls.

        Raises:
            ConfigError: There is no second plate whose controls could be given to a plate.
            DataError: The queries of a plate are of one class, which label shift cannot change.
        """
        plates = [int(d) for d in np.unique(self.table.domain[rows])]
        wrong = probes and self.options.control_plate == "wrong"
        control_plates = self._pair_wrong_plates(plates) if wrong else {d: d for d in plates}
        parts: list[BatchRows] = []
        for d in plates:
            generator = self._make_generator(_BATCHES, d)
            queries = rows[self.table.domain[rows] == d]
            if self.options.limit is not None and self.options.limit < len(queries):
                queries = sample_rows(queries, self.options.limit, generator)
            controls = self._select_controls(control_plates[d])
            if probes and self.options.mislabelled_controls:
                controls = mislabel(
                    controls,
                    self.table.rows_of(d, control=False),
                    self.options.mislabelled_controls,
                    self._make_generator(_MISLABEL, d),
                )
            if probes and self.options.label_shift is not None:
                batches = self._shift_labels(d, queries, self.options.label_shift)
            else:
                batches = split_into_batches(queries, self.num_queries, generator)
            parts += [BatchRows(d, part, counted, controls) for part, counted in batches]
        return parts

    def _make_generator(self, stream: int, domain: int) -> np.random.Generator:
        """Return a generator for one plate, independent of the other plates."""
        return np.random.default_rng((self.seed, stream, *self.table.domains[domain].encode()))

    def _select_controls(self, domain: int) -> Rows:
        rows = self.table.rows_of(domain, control=True)
        if self.num_controls >= len(rows):
            return rows
        generator = self._make_generator(_CONTROLS, domain)
        return np.sort(sample_rows(rows, self.num_controls, generator))

    def _pair_wrong_plates(self, plates: list[int]) -> dict[int, int]:
        if len(plates) < 2:
            raise ConfigError(
                "There is no second plate whose controls could be given to this one.",
                "Set `--data.init_args.evaluation.control_plate=own`, or test on several plates.",
            )
        names = self.table.column("source") + "|" + self.table.column("batch")
        batch = {int(d): str(b) for d, b in zip(self.table.domain, names, strict=True)}
        return pair_wrong_plates(plates, [batch[d] for d in plates])

    def _shift_labels(
        self, domain: int, queries: Rows, alpha: float
    ) -> list[tuple[Rows, NDArray[Any]]]:
        labels = self.table.label[queries]
        if len(np.unique(labels)) < 2:
            raise DataError(
                f"The {len(queries)} queries of plate {self.table.domains[domain]} are of one "
                "class: label shift changes nothing on it.",
                "Set `--data.init_args.evaluation.label_shift=null`, raise `limit`, or test "
                "plates with several classes.",
            )
        generator = self._make_generator(_SHIFT, domain)
        shifted = draw_shifted_batches(labels, self.num_queries, alpha, generator)
        return [(queries[rows], counted) for rows, counted in shifted]
