"""Splits of queries into training, validation and tests.

Shapes: R rows of the table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fulgurite.data.exclusions import name_some
from fulgurite.datamodules.cs_arm_bn.table import PlateTable, Rows
from fulgurite.errors import ConfigError, DataError

__all__ = [
    "Assignment",
    "GroupFolds",
    "HoldOut",
    "OfficialSplit",
    "Split",
    "check_assignment",
    "draw_held_out_wells",
]

_TEST_NAMES = {"lab": "new_lab", "batch": "new_batch", "plate": "new_plate", "image": "in_domain"}
_EMPTY: Rows = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Assignment:
    """Rows of queries in each part of a split.

    Attributes:
        train: Rows for training.
        val: Rows for model selection.
        tests: Rows of each test by its name.
        shared: Names of parts that may have plates of training.
    """

    train: Rows = field(default_factory=lambda: _EMPTY)
    val: Rows = field(default_factory=lambda: _EMPTY)
    tests: Mapping[str, Rows] = field(default_factory=dict)
    shared: tuple[str, ...] = ("in_domain", "new_wells")


def check_assignment(table: PlateTable, assignment: Assignment) -> Assignment:
    """Check that no row is in two parts, and no plate in two parts that must not share plates.

    Raises:
        DataError: A row or a plate is in two parts.
    """
    parts = {"train": assignment.train, "val": assignment.val, **assignment.tests}
    owner: dict[int, str] = {}
    occurrences = np.zeros(len(table), np.int64)
    for name, rows in parts.items():
        np.add.at(occurrences, rows, 1)
        if name in assignment.shared:
            continue
        for domain in np.unique(table.domain[rows]):
            other = owner.setdefault(int(domain), name)
            if other != name:
                raise DataError(
                    f"The plate {table.domains[domain]} is in {other} and in {name}.",
                    "Choose a split that keeps plates whole.",
                )
    if (occurrences > 1).any():
        row = int(occurrences.argmax())
        raise DataError(
            f"Row {row} of the plate table is in several parts of the split.",
            "Choose a split whose parts do not overlap.",
        )
    return assignment


def _labelled_rows(table: PlateTable) -> Rows:
    return np.flatnonzero(~table.control & (table.label >= 0))


def _group_names(table: PlateTable, by: str) -> NDArray[Any]:
    """Return the group of each row; batches differ between sources, plates between batches."""
    if by == "lab":
        return table.column("lab")
    if by == "batch":
        names: NDArray[Any] = table.column("lab") + "|" + table.column("batch")
        return names
    return table.column("domain")


def _split_size(fraction: float, total: int) -> int:
    """Return a number of groups: at least one for a fraction below 1, else the number itself."""
    if fraction >= 1:
        return int(fraction)
    return max(1, round(fraction * total)) if fraction > 0 else 0


def _draw_groups(
    names: Iterable[str], amount: float | list[str], key: Sequence[int], option: str
) -> set[str]:
    """Select groups, by name or at random; at least one must remain."""
    ordered = sorted(set(names))
    if isinstance(amount, list):
        groups = {name for name in ordered if name in amount or name.split("|")[-1] in amount}
        valid = {part for name in ordered for part in (name, name.split("|")[-1])}
        if absent := sorted(set(amount) - valid):
            raise DataError(
                f"There is no group {name_some(absent)} for {option} (of {name_some(ordered)}).",
                f"Set `--data.init_args.split.init_args.{option}` to names in the table.",
            )
        return groups
    count = _split_size(amount, len(ordered))
    if count >= len(ordered) and count:
        raise DataError(
            f"There are {len(ordered)} groups to take {count} for {option} from.",
            f"Lower `--data.init_args.split.init_args.{option}`.",
        )
    order = np.random.default_rng(list(key)).permutation(len(ordered))
    return {ordered[i] for i in order[:count]}


def draw_held_out_wells(table: PlateTable, count: int, key: Sequence[int]) -> NDArray[np.bool_]:
    """Mark the queries in ``count`` random well positions of each class, equal in all laboratories.

    Shape:
        - (R,) bool.

    Raises:
        DataError: A class has at most ``count`` positions.

    Source: docs/papers/cs_arm_bn.md section 2.4 (new_wells).
    """
    marked = np.zeros(len(table), np.bool_)
    wells = table.column("well")
    generator = np.random.default_rng(list(key))
    for c, name in enumerate(table.class_names):
        rows = np.flatnonzero(table.label == c)
        positions = sorted(set(wells[rows]))
        if positions and count >= len(positions):
            raise DataError(
                f"The class {name} has {len(positions)} well positions, and {count} are to be held "
                "out.",
                "Lower `--data.init_args.split.init_args.new_wells`.",
            )
        held_out = generator.permutation(len(positions))[:count]
        marked[rows[np.isin(wells[rows], [positions[i] for i in held_out])]] = True
    return marked


def _draw_stratified(
    table: PlateTable, rows: Rows, fraction: float, key: Sequence[int]
) -> NDArray[Any]:
    """Mark a fraction of the rows of each plate and class, at least one of two or more."""
    marked = np.zeros(len(table), np.bool_)
    generator = np.random.default_rng(list(key))
    group = table.domain[rows] * len(table.class_names) + table.label[rows]
    for number in np.unique(group):
        members = generator.permutation(rows[group == number])
        marked[members[: _split_size(fraction, len(members)) if len(members) > 1 else 0]] = True
    return marked


class Split(ABC):
    """A rule that assigns the labelled queries of a table to training, validation and tests."""

    @abstractmethod
    def assign(self, table: PlateTable) -> Assignment:
        """Return the parts, which have no unlabelled rows.

        Raises:
            DataError: The table does not allow this split.
        """


class HoldOut(Split):
    """Several settings from one training: in-domain, new wells, new plates, batches, laboratories.

    Queries of the training plates outside ``in_domain`` and ``new_wells`` are for training.
    Numbers below 1 are fractions (at least one group), others are counts, and 0 is none; batches
    and plates can also be named.

    Args:
        new_labs: Sources (laboratories) for testing only.
        new_batches: Batches of the other laboratories for testing only.
        val_batches: Batches for validation.
        new_plates: Plates of training batches for testing only.
        val_plates: Plates of training batches for validation (where batches are few).
        new_wells: Number of well positions of each class on training plates for testing only.
        in_domain: Fraction of the sites of each class on each training plate for testing only;
            other sites of their wells are for training.
        seed: Seed of the split.

    Raises:
        ConfigError: A number is negative or, above 1, no whole one, or ``in_domain`` is not below
            1.

    Source: docs/papers/cs_arm_bn.md section 2.4; several settings at once are inferred.
    """

    def __init__(
        self,
        *,
        new_labs: list[str] = [],  # noqa: B006  # copied below
        new_batches: float | list[str] = 0.25,
        val_batches: float | list[str] = 0.15,
        new_plates: float | list[str] = 0,
        val_plates: float | list[str] = 0,
        new_wells: int = 0,
        in_domain: float = 0.2,
        seed: int = 1234,
    ) -> None:
        amounts = (new_batches, val_batches, new_plates, val_plates, new_wells)
        if any(isinstance(amount, str) for amount in (new_labs, *amounts)):
            raise ConfigError(
                f"The split holds out {new_labs!r}, {new_batches!r}, {val_batches!r}, "
                f"{new_plates!r} and {val_plates!r}: a name alone is no list.",
                "Give lists of names under `--data.init_args.split.init_args`, such as "
                "`new_batches=[b4]`.",
            )
        numbers = [amount for amount in amounts if not isinstance(amount, list)]
        # not a number is not at least 0 either
        if not all(n >= 0 and (n < 1 or n % 1 == 0) for n in numbers) or not 0 <= in_domain < 1:
            raise ConfigError(
                f"The split holds out {new_batches} and {val_batches} batches, {new_plates} and "
                f"{val_plates} plates, {new_wells} wells and {in_domain} of the images.",
                "Set these to fractions below 1 or whole numbers, 0 or more, under "
                "`--data.init_args.split.init_args`, and `in_domain` below 1.",
            )
        self.new_labs = list(new_labs)
        self.new_batches = new_batches
        self.val_batches = val_batches
        self.new_plates = new_plates
        self.val_plates = val_plates
        self.new_wells = new_wells
        self.in_domain = in_domain
        self.seed = seed

    def assign(self, table: PlateTable) -> Assignment:
        """Return the parts: see :meth:`Split.assign`."""
        rows = _labelled_rows(table)
        remaining = np.zeros(len(table), np.bool_)
        remaining[rows] = True
        tests: dict[str, Rows] = {}
        lab, source = table.column("lab"), table.column("source")
        if absent := sorted(set(self.new_labs) - set(lab) - set(source)):
            raise DataError(
                f"The table has no laboratory {name_some(absent)}.",
                "Set `--data.init_args.split.init_args.new_labs` to sources in it "
                f"({name_some(sorted(set(source)))}).",
            )
        tested = np.isin(lab, self.new_labs) | np.isin(source, self.new_labs)
        if self.new_labs:
            tests["new_lab"] = np.flatnonzero(remaining & tested)
            remaining &= ~tested
        parts: dict[str, Rows] = {}
        for stream, (option, by, amount) in enumerate(
            (
                ("new_batches", "batch", self.new_batches),
                ("val_batches", "batch", self.val_batches),
                ("new_plates", "plate", self.new_plates),
                ("val_plates", "plate", self.val_plates),
            )
        ):
            names = _group_names(table, by)
            groups = _draw_groups(names[remaining], amount, (self.seed, stream), option)
            marked = remaining & np.isin(names, list(groups))
            parts[option] = np.flatnonzero(marked)
            remaining &= ~marked
        if self.new_batches:
            tests["new_batch"] = parts["new_batches"]
        if self.new_plates:
            tests["new_plate"] = parts["new_plates"]
        if self.new_wells:
            marked = remaining & draw_held_out_wells(table, self.new_wells, (self.seed, 4))
            tests["new_wells"] = np.flatnonzero(marked)
            remaining &= ~marked
        if self.in_domain:
            marked = _draw_stratified(
                table, np.flatnonzero(remaining), self.in_domain, (self.seed, 5)
            )
            tests["in_domain"] = np.flatnonzero(marked)
            remaining &= ~marked
        order = ("in_domain", "new_wells", "new_plate", "new_batch", "new_lab")
        val = np.union1d(parts["val_batches"], parts["val_plates"])
        return Assignment(
            np.flatnonzero(remaining), val, {name: tests[name] for name in order if name in tests}
        )


class GroupFolds(Split):
    """One fold of a cross-validation over laboratories, batches, plates or single images.

    The paper's cross-laboratory setting is ``group=lab, folds=2``, its new batches are
    ``group=batch, folds=5``, its in-domain one ``group=image``.

    Args:
        group: Unit that is in one fold only; ``image`` is stratified by class, and its folds share
            plates and wells.
        fold: Index of the test fold, from 0.
        folds: Number of folds.
        val_group: Unit that is in training or validation only; images if ``group`` is ``image``.
        val_fraction: Fraction of these groups for validation.
        new_wells: Number of well positions of each class that are excluded from training; if not
            0, only these are tested.
        seed: Seed of folds and validation.

    Raises:
        ConfigError: The fold does not exist, ``val_fraction`` is outside [0, 1), or ``new_wells``
            is negative.

    Source: docs/papers/cs_arm_bn.md section 2.4.
    """

    def __init__(
        self,
        group: Literal["lab", "batch", "plate", "image"] = "batch",
        fold: int = 0,
        folds: int = 5,
        *,
        val_group: Literal["batch", "plate"] = "batch",
        val_fraction: float = 0.15,
        new_wells: int = 0,
        seed: int = 1234,
    ) -> None:
        if not 0 <= fold < folds or folds < 2:
            raise ConfigError(
                f"There is no fold {fold} of {folds}.",
                "Set `--data.init_args.split.init_args.fold` from 0 to `folds` - 1.",
            )
        if not 0 <= val_fraction < 1 or new_wells < 0:
            raise ConfigError(
                f"The validation fraction is {val_fraction}, with {new_wells} new wells.",
                "Set `--data.init_args.split.init_args.val_fraction` in [0, 1) and `new_wells` to "
                "0 or more.",
            )
        self.group = group
        self.fold = fold
        self.folds = folds
        self.val_group = "image" if group == "image" else val_group
        self.val_fraction = val_fraction
        self.new_wells = new_wells
        self.seed = seed

    def assign(self, table: PlateTable) -> Assignment:
        """Return the parts: see :meth:`Split.assign`."""
        from sklearn.model_selection import GroupKFold, GroupShuffleSplit, StratifiedKFold

        rows = _labelled_rows(table)
        if self.group == "image":
            largest = int(np.bincount(table.label[rows], minlength=1).max())
            if largest < self.folds:
                raise DataError(
                    f"No class has more than {largest} labelled queries, for {self.folds} folds.",
                    "Lower `--data.init_args.split.init_args.folds`.",
                )
            folds = StratifiedKFold(self.folds, shuffle=True, random_state=self.seed)
            pairs = folds.split(rows, table.label[rows])
        else:
            groups = _group_names(table, self.group)[rows]
            if (count := len(set(groups))) < self.folds:
                raise DataError(
                    f"There are {count} groups by {self.group} for {self.folds} folds.",
                    "Lower `--data.init_args.split.init_args.folds`.",
                )
            folds = GroupKFold(self.folds, shuffle=True, random_state=self.seed)
            pairs = folds.split(rows, groups=groups)
        train_positions, test_positions = list(pairs)[self.fold]
        train, test = rows[train_positions], rows[test_positions]
        val = _EMPTY
        if self.val_fraction:
            if self.val_group == "image":
                marked = _draw_stratified(table, train, self.val_fraction, (self.seed, 6))
                val = np.flatnonzero(marked)
                train = train[~marked[train]]
            else:
                groups = _group_names(table, self.val_group)[train]
                count = len(set(groups))
                if count < 2 or np.ceil(self.val_fraction * count) >= count:
                    raise DataError(
                        f"The training fold has {count} group{'s' * (count > 1)} by "
                        f"{self.val_group}, of which validation would leave none.",
                        "Set `--data.init_args.split.init_args.val_group=plate`, or lower "
                        "`val_fraction`, down to 0 for no validation.",
                    )
                inner = GroupShuffleSplit(1, test_size=self.val_fraction, random_state=self.seed)
                inner_train, inner_val = next(inner.split(train, groups=groups))
                train, val = train[inner_train], train[inner_val]
        if self.new_wells:
            marked = draw_held_out_wells(table, self.new_wells, (self.seed, 4))
            train, val, test = train[~marked[train]], val[~marked[val]], test[marked[test]]
        return Assignment(
            np.sort(train),
            np.sort(val),
            {_TEST_NAMES[self.group]: np.sort(test)},
            ("in_domain", "val") if self.group == "image" else (),
        )


class OfficialSplit(Split):
    """The publisher's split, from the column ``official``.

    Words in that column: ``train``, ``val``, and names of tests (``in_domain``, ``new_batch``);
    rows with another word are not used.

    Args:
        tests: Names of the tests to use.

    Raises:
        ConfigError: ``tests`` is empty.
    """

    def __init__(self, tests: list[str] = ["in_domain", "new_batch"]) -> None:  # noqa: B006
        if not tests:
            raise ConfigError(
                "The official split has no test.",
                "Set `--data.init_args.split.init_args.tests`.",
            )
        self.tests = list(tests)

    def assign(self, table: PlateTable) -> Assignment:
        """Return the parts: see :meth:`Split.assign`."""
        if "official" not in table.frame.columns:
            raise DataError(
                "The plate table has no column 'official'.",
                "Set `--data.init_args.split` to HoldOut or GroupFolds.",
            )
        word = table.column("official")
        rows = _labelled_rows(table)
        parts = {name: rows[word[rows] == name] for name in ("train", "val", *self.tests)}
        if empty := [name for name in self.tests if not len(parts[name])]:
            raise DataError(
                f"No query is of the official part {empty[0]!r}.",
                f"Set `--data.init_args.split.init_args.tests` to parts of {sorted(set(word))}.",
            )
        return Assignment(parts["train"], parts["val"], {n: parts[n] for n in self.tests})
