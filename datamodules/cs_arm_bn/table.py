"""The one data contract: a table of sites, checked when it is built.

Shapes: R rows (sites) of the table, D domains (plates), K classes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.data.exclusions import Exclusion, exclude_hint, name_some
from fulgurite.data.names import find_alike, find_repeated, quote_names
from fulgurite.datamodules.cs_arm_bn.site_names import name_wells, refuse_alike_sites
from fulgurite.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "PlateTable",
    "position_accuracy",
]

_KEYS = ("source", "batch", "plate", "well", "site")
_REQUIRED = (*_KEYS, "role", "label")
_WRITTEN_WELL = "written_well"  # as the table of the user has it
Rows = NDArray[np.int64]


def position_accuracy(position: Rows, label: Rows, plate: Rows) -> tuple[float, float]:
    """Accuracy of predicting the class from the position on the plate alone, without images.

    The prediction is the most frequent class at the position on the *other* plates.

    Returns:
        The accuracy, and that of always predicting the most frequent class.

    Shape:
        - position, label, plate: (R,) int64 numbers from 0.

    Source: docs/papers/cs_arm_bn.md section 0 (7); the measure is inferred.

    Example:
        >>> layout = np.array([0, 1, 0, 1])
        >>> position_accuracy(layout, layout, np.array([0, 0, 1, 1]))
        (1.0, 0.5)
    """
    if not len(label):
        return 0.0, 0.0
    counts = np.zeros((position.max() + 1, label.max() + 1), np.int64)
    np.add.at(counts, (position, label), 1)
    right = 0
    for number in np.unique(plate):
        on_plate = plate == number
        others = counts.copy()
        np.subtract.at(others, (position[on_plate], label[on_plate]), 1)
        occupied = others.sum(1) > 0
        right += int(
            (others.argmax(1)[position[on_plate]] == label[on_plate])[
                occupied[position[on_plate]]
            ].sum()
        )
    return right / len(label), float(counts.sum(0).max() / len(label))


class PlateTable:
    """A table with one row for each site, for episodes and splits.

    Columns of the frame: ``source`` (laboratory), ``batch``, ``plate``, ``well``, ``site``, all
    read as text; ``role``, which is ``query`` or ``control``; ``label``, the class number of a
    query, -1 where it is unknown (that of a control is ignored); ``path``, or ``path_<channel>``
    for each channel. Optional: ``domain`` (``source|batch|plate`` by default), ``lab`` (for
    sources that are one laboratory; ``source`` by default), ``official`` (the publisher's split).

    Attributes:
        frame: The checked table, rows numbered from 0.
        class_names: Names of the K classes.
        channels: Names of the channels, in the order of the images.
        excluded: Exclusions so far.
        notes: Notes about the source for :meth:`report`.
        domains: Names of the D plates, in order of appearance.
        wells: Names of wells, each ``domain|well``.
        domain: Index of each row's plate. Shape: (R,) int64.
        well: Index of each row's well. Shape: (R,) int64.
        label: Class of each row, -1 if unknown. Shape: (R,) int64.
        control: Mask of the controls. Shape: (R,) bool.

    Args:
        frame: Table with the columns above.
        class_names: Names of the K classes, in the order of the labels.
        channels: Names of the channels.
        excluded: Exclusions by the reader.
        notes: Notes of the reader for the report.

    Raises:
        DataError: A column is missing, a role, label or path is invalid, a site is repeated, or
            two classes have one name.

    Source: docs/papers/cs_arm_bn.md sections 4.1 and 7.1.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"source": "lab", "batch": "1", "plate": "p", "site": "1",
        ...     "well": ["A01", "A02"], "role": ["query", "control"], "label": [0, -1],
        ...     "path": ["a.png", "b.png"]})
        >>> PlateTable(frame, ("only",), ("grey",)).domains
        ('lab|1|p',)
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        class_names: Sequence[str],
        channels: Sequence[str],
        excluded: Sequence[Exclusion] = (),
        *,
        notes: Sequence[str] = (),
    ) -> None:
        self.class_names = tuple(class_names)
        if (name := find_repeated(self.class_names)) is not None:
            raise DataError(f"Two classes are called {name!r}.", "Give each class its own name.")
        self.channels = tuple(channels)
        self.excluded = tuple(excluded)
        self.notes = tuple(notes)
        self.frame = self._check_frame(frame)
        number, names = self.frame["domain"].factorize()
        self.domain: Rows = number.astype(np.int64)
        self.domains: tuple[str, ...] = tuple(str(name) for name in names)
        number, names = (self.frame["domain"] + "|" + self.frame["well"]).factorize()
        self.well: Rows = number.astype(np.int64)
        self.wells: tuple[str, ...] = tuple(str(name) for name in names)
        self.label: Rows = self.frame["label"].to_numpy(np.int64)
        self.control: NDArray[np.bool_] = (self.frame["role"] == "control").to_numpy(np.bool_)

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def path_columns(self) -> tuple[str, ...]:
        """Columns with paths: ``path``, or one for each channel."""
        if "path" in self.frame.columns:
            return ("path",)
        return tuple(f"path_{channel}" for channel in self.channels)

    def _check_frame(self, frame: pd.DataFrame) -> pd.DataFrame:
        import pandas as pd

        for name in _REQUIRED:
            if name not in frame.columns:
                raise DataError(
                    f"The plate table has no column {name!r}.",
                    "Add the role (query or control) of each site."
                    if name == "role"
                    else f"Give the columns {', '.join(_REQUIRED)}.",
                )
        if not len(frame):
            left_out = "; ".join(exclusion.description for exclusion in self.excluded)
            raise DataError(
                f"The plate table is empty{f' without {left_out}' * bool(left_out)}.",
                "Give at least one site, or leave out less.",
            )
        frame = frame.reset_index(drop=True)
        optional = [name for name in ("domain", "lab") if name in frame.columns]
        for name in (*_KEYS, "role", *optional):
            if missing := int(frame[name].isna().sum()):
                raise DataError(
                    f"The column {name!r} of the plate table is empty in {missing} rows, first in "
                    f"row {int(frame[name].isna().to_numpy().argmax())}.",
                    f"Give the {name} of each site.",
                )
            frame[name] = frame[name].astype(str)
        if "domain" not in frame.columns:
            frame["domain"] = frame["source"] + "|" + frame["batch"] + "|" + frame["plate"]
        frame["domain"] = frame["domain"].astype(str)
        if _WRITTEN_WELL not in frame.columns:
            frame[_WRITTEN_WELL] = frame["well"]
        frame["well"] = name_wells(frame, ["domain"], "The plate table")
        if "lab" not in frame.columns:
            frame["lab"] = frame["source"]
        self._check_roles(frame)
        label = pd.to_numeric(frame["label"], errors="coerce")
        is_text = label.isna() & frame["label"].notna() & (frame["label"].astype(str) != "")
        label = label.fillna(-1)
        wrong = is_text | (label < -1) | (label >= len(self.class_names)) | (label % 1 != 0)
        wrong &= frame["role"] == "query"
        if wrong.any():
            row = frame[wrong].iloc[0]
            raise DataError(
                f"Well {row['well']} of plate {row['domain']} has the label {row['label']}, and "
                f"there are {len(self.class_names)} classes.",
                f"Number the classes from 0 to {len(self.class_names) - 1}; -1 is unknown.",
            )
        frame["label"] = label.where(frame["role"] == "query", -1).astype("int64")
        twice = frame.duplicated(["domain", "well", "site"])
        if twice.any():
            row = frame[twice].iloc[0]
            raise DataError(
                f"Site {row['site']} of well {row['well']} of plate {row['domain']} comes twice "
                f"({int(twice.sum())} such rows).",
                "Keep one row for each site.",
            )
        refuse_alike_sites(frame)
        self._check_paths(frame)
        for name in ("source", "batch", "lab"):
            several = frame.groupby("domain")[name].nunique()
            if (several > 1).any():
                raise DataError(
                    f"The domain {several.idxmax()} lies in {several.max()} values of {name!r}.",
                    "Give each plate a domain of its own, `source|batch|plate` for example.",
                )
        return frame

    @staticmethod
    def _check_roles(frame: pd.DataFrame) -> None:
        wrong = ~frame["role"].isin(["query", "control"])
        if wrong.any():
            row = frame[wrong].iloc[0]
            raise DataError(
                f"Well {row['well']} of plate {row['domain']} has the role {row['role']!r}.",
                "Give each site the role `query` or `control`.",
            )

    def _check_paths(self, frame: pd.DataFrame) -> None:
        names = ["path"] if "path" in frame.columns else [f"path_{c}" for c in self.channels]
        for name in names:
            if name not in frame.columns:
                raise DataError(
                    f"The plate table has no column {name!r}.",
                    f"Give `path`, or one of {', '.join(f'path_{c}' for c in self.channels)} for "
                    "each channel.",
                )
            missing = frame[name].isna() | (frame[name].astype(str) == "")
            if missing.any():
                row = frame[missing].iloc[0]
                raise DataError(
                    f"Site {row['site']} of well {row['well']} of plate {row['domain']} has no "
                    f"{name} ({int(missing.sum())} such sites).",
                    "Give the path of each channel.",
                )

    def paths(self, rows: Rows | slice = slice(None)) -> list[tuple[str, ...]]:
        """Return the files of sites, one for each channel or one for all."""
        files = self.frame[list(self.path_columns)].to_numpy(dtype=object)[rows]
        return [tuple(str(path) for path in row) for row in files]

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of the frame as an array of text."""
        return self.frame[name].astype(str).to_numpy(dtype=object)

    @property
    def written_wells(self) -> pd.Series:
        """Names of wells as they were before A1 became A01. Shape: (R,)."""
        return self.frame[_WRITTEN_WELL]

    def rows_of(self, domain: int, control: bool) -> Rows:
        """Return the rows of a plate's controls or queries, ascending."""
        return np.flatnonzero((self.domain == domain) & (self.control == control))

    def counts(self) -> NDArray[np.int64]:
        """Return the numbers of queries and controls of each plate.

        Shape:
            - (D, 2) int64.
        """
        counts = np.zeros((len(self.domains), 2), np.int64)
        np.add.at(counts, (self.domain, self.control.astype(np.int64)), 1)
        return counts

    def drop(self, rows: NDArray[np.bool_], exclusion: Exclusion) -> PlateTable:
        """Return the table without some rows, which are recorded as excluded.

        Raises:
            DataError: No row would remain.

        Shape:
            - rows: (R,) bool.
        """
        if rows.all():
            raise DataError(
                f"Without what is excluded ({exclusion.description}) no site is left.",
                f"Take `{exclusion.kind}` out of `--data.init_args.exclude`, or correct the data.",
            )
        return PlateTable(
            self.frame[~rows],
            self.class_names,
            self.channels,
            (*self.excluded, replace(exclusion, count=int(rows.sum()))),
            notes=self.notes,
        )

    def require_controls(self, minimum: int, exclude: Collection[str] = ()) -> PlateTable:
        """Return the table of plates with enough controls.

        Args:
            minimum: Smallest number of controls of a plate.
            exclude: Words for data to leave out; ``few_controls`` excludes such plates.

        Raises:
            DataError: A plate has fewer than ``minimum`` controls and is not to be excluded.
        """
        controls = self.counts()[:, 1]
        few = np.flatnonzero(controls < minimum)
        if not len(few):
            return self
        named = name_some([f"{self.domains[d]} ({controls[d]})" for d in few])
        if "few_controls" not in exclude:
            raise DataError(
                f"{len(few)} of {len(self.domains)} plates have fewer than {minimum} controls: "
                f"{named}.",
                "Lower `--data.init_args.episodes.min_controls`, or "
                + exclude_hint("such plates", "few_controls", exclude, "exclude"),
            )
        summary = f"{len(few)} plates with fewer than {minimum} controls: {named}"
        return self.drop(np.isin(self.domain, few), Exclusion("few_controls", summary, 0))

    def report(self) -> str:
        """Summarise the table: counts, missing data, and the class information of positions."""
        counts, frame = self.counts(), self.frame
        labelled = ~self.control & (self.label >= 0)
        lines = [
            f"{len(self)} sites on {len(self.domains)} plates, {frame['batch'].nunique()} batches "
            f"and {frame['lab'].nunique()} laboratories; {len(self.class_names)} classes, channels "
            f"{name_some(self.channels, 8)}",
            f"queries per plate {counts[:, 0].min()} to {counts[:, 0].max()}, controls "
            f"{counts[:, 1].min()} to {counts[:, 1].max()}",
        ]
        for column, noun in ((1, "controls"), (0, "queries")):
            if len(none := np.flatnonzero(counts[:, column] == 0)):
                named = name_some([self.domains[d] for d in none])
                lines.append(f"{len(none)} plates without {noun}: {named}")
        if unknown := int((~self.control & (self.label < 0)).sum()):
            lines.append(f"{unknown} queries without a label: for prediction only")
        if absent := sorted(set(range(len(self.class_names))) - set(self.label[labelled])):
            named = name_some([self.class_names[c] for c in absent])
            lines.append(f"{len(absent)} classes without a query: {named}")
        for names in find_alike(self.class_names):
            named = quote_names(names)
            lines.append(f"classes whose names are alike, and which may be one: {named}")
        if labelled.any() and len(np.unique(self.domain[labelled])) > 1:
            position = frame["well"].factorize()[0].astype(np.int64)[labelled]
            accuracy, chance = position_accuracy(
                position, self.label[labelled], self.domain[labelled]
            )
            lines.append(
                f"well position alone tells the class of {accuracy:.1%} of the queries (always the "
                f"most frequent class: {chance:.1%})"
                + ("; new_wells in the split checks it" if accuracy > chance + 0.1 else "")
            )
        lines += self.notes
        lines += [f"excluded ({e.kind}), {e.count} sites: {e.description}" for e in self.excluded]
        return "\n".join(lines)
