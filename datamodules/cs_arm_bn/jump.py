"""Plates in the layout of JUMP Cell Painting (cpg0016): metadata tables, load_data and TIFFs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fulgurite.data.exclusions import Exclusion, check_exclude, exclude_hint, name_some
from fulgurite.datamodules.cs_arm_bn.jump_metadata import JumpMetadata
from fulgurite.datamodules.cs_arm_bn.jump_options import JumpFiles, Perturbations, PlateSelection
from fulgurite.datamodules.cs_arm_bn.site_names import find_same_channel, is_address, name_wells
from fulgurite.datamodules.cs_arm_bn.site_readers import FileReader, SiteReader
from fulgurite.datamodules.cs_arm_bn.sources import PlateSource, check_channels, locate
from fulgurite.datamodules.cs_arm_bn.table import PlateTable
from fulgurite.datamodules.cs_arm_bn.table_files import find_other_plate, find_table, read_table
from fulgurite.errors import DataError
from fulgurite.io import data_path
from fulgurite.options import make_options

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

__all__ = ["CHANNELS", "JumpPlates"]

#: Channels of Cell Painting, in the paper's order.
CHANNELS = ("RNA", "ER", "AGP", "Mito", "DNA")

#: Sources that are one laboratory: a split between them would not be one between laboratories.
_SAME_LAB = {"source_13": "source_7"}
_GALLERY = "s3://cellpainting-gallery/"
_EXCLUSIONS = (
    *("unknown_id", "missing_channel", "same_channel", "missing_plate", "empty_plate"),
    *("renamed_plate", "stray_well"),
)
_ID = r"JCP2022_\d{6}"
_UNIDENTIFIED = "JCP2022_UNKNOWN"  # identifier of thousands of wells in the published table
_OPTION = "--data.init_args.source.init_args"
_BAD_PLATES = {
    "missing_plate": "without load_data",
    "empty_plate": "whose load_data is empty or has a header only",
    "renamed_plate": "whose load_data is of another plate than its folder",
}


class JumpPlates(PlateSource):
    """JUMP-CP plates (cpg0016) on this machine, or images of the public bucket over S3.

    The classes are the positive controls (8 compounds), the controls are the negative ones (DMSO);
    both are taken from ``perturbation_control.csv``, never from a list of identifiers. Images are
    found through each plate's ``load_data`` (CSV or parquet), in its ``URL_Orig*`` or its
    ``PathName_Orig*`` and ``FileName_Orig*`` form.

    Args:
        root: Local copy of the bucket (with ``cpg0016-jump/``), absolute or relative to
            ``FULGURITE_DATA``.
        files: Where tables and images are.
        selection: Plates and wells to use.
        perturbations: What is a class, and whether other perturbations are predicted.
        channels: Names of the channels in ``load_data``, in the order of the images.
        exclude: Words for data to leave out and count instead of an error: sites with an
            ``unknown_id``, a ``missing_channel`` or one file for two channels (``same_channel``);
            plates without load_data (``missing_plate``), with one that holds no site
            (``empty_plate``) or that names another plate (``renamed_plate``); a class's
            ``stray_well``.

    Raises:
        ConfigError: ``channels`` is empty or has duplicates, or a word in ``exclude`` is unknown.

    Source: docs/papers/cs_arm_bn.md sections 2.1, 2.2 and 4.1.
    """

    def __init__(
        self,
        root: str,
        *,
        files: JumpFiles = JumpFiles(),
        selection: PlateSelection = PlateSelection(),
        perturbations: Perturbations = Perturbations(),
        channels: list[str] = list(CHANNELS),  # noqa: B006  # copied below
        exclude: list[str] = [],  # noqa: B006  # copied below
    ) -> None:
        self.root = root
        self.files = make_options(JumpFiles, files)
        self.selection = make_options(PlateSelection, selection)
        self.perturbations = make_options(Perturbations, perturbations)
        prefixes = self.files.prefixes
        self.prefixes = {_GALLERY: ""} if prefixes is None else dict(prefixes)
        self.exclude = check_exclude(exclude, _EXCLUSIONS, "source.init_args.exclude")
        self._channels = check_channels(channels)
        self._metadata: JumpMetadata | None = None

    def forget_tables(self) -> None:
        """Read tables again when they are needed, such as those of another root."""
        self._metadata = None

    @property
    def metadata(self) -> JumpMetadata:
        """The tables of plates, wells and perturbations."""
        if self._metadata is None:
            folder = self.files.metadata
            self._metadata = JumpMetadata(
                str(Path(self.root) / "metadata") if folder is None else folder
            )
        return self._metadata

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels."""
        return self._channels

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their identifiers."""
        table = self.metadata.read_controls()
        table = table[table["Metadata_Name"].notna()]
        names = dict(zip(table["Metadata_JCP2022"], table["Metadata_Name"], strict=True))
        return tuple(str(names.get(jcp, jcp)) for jcp in self._class_ids())

    @property
    def reader(self) -> SiteReader:
        """Reader of 16-bit TIFFs on this machine or at addresses that ``prefixes`` allows."""
        remote = [replacement for replacement in self.prefixes.values() if is_address(replacement)]
        return FileReader(self.in_channels, remote=remote if self.prefixes else [_GALLERY])

    def _class_ids(self) -> list[str]:
        """Return the identifiers of the classes, in the order of the labels.

        Raises:
            DataError: There is none.

        Source: docs/papers/cs_arm_bn.md section 2.2.
        """
        if self.perturbations.classes is not None:
            return self._require_classes(sorted(self.perturbations.classes))
        table = self.metadata.read_controls()
        is_class = (table["Metadata_pert_type"] == "poscon") & (
            table["Metadata_modality"] == self.perturbations.modality
        )
        return self._require_classes(sorted(table["Metadata_JCP2022"][is_class]))

    def _require_classes(self, identifiers: list[str]) -> list[str]:
        if not identifiers:
            raise DataError(
                "There is no class: the table perturbation_control has no poscon of the modality "
                f"{self.perturbations.modality}, or `classes` is empty.",
                f"Set `{_OPTION}.perturbations.classes` to identifiers, or `modality`.",
            )
        return identifiers

    def _select_plates(self) -> pd.DataFrame:
        table = self.metadata.read_plates()
        selected = table["Metadata_PlateType"].isin(self.selection.plate_types)
        selected &= ~table["Metadata_Batch"].isin(self.selection.skip_batches)
        for column, names in (
            ("Source", self.selection.sources),
            ("Plate", self.selection.plates),
        ):
            if names is None:
                continue
            values = table[f"Metadata_{column}"]
            if absent := sorted(set(names) - set(values)):
                raise DataError(
                    f"The plate table has no {column.lower()} {name_some(absent)}.",
                    f"Set `{_OPTION}.selection.{column.lower()}s` to names in it.",
                )
            selected &= values.isin(names)
        if not selected.any():
            raise DataError(
                "No plate of the plate table is chosen.",
                "Loosen `sources`, `plate_types`, `skip_batches` or `plates` of "
                f"`{_OPTION}.selection`.",
            )
        plates = table[selected].drop_duplicates(
            ["Metadata_Source", "Metadata_Batch", "Metadata_Plate"]
        )
        twice = plates.duplicated(["Metadata_Source", "Metadata_Plate"])
        if twice.any():
            row = plates[twice].iloc[0]
            raise DataError(
                f"The plate {row['Metadata_Plate']} of {row['Metadata_Source']} is in two batches, "
                "and the well table tells plates of a source by their names alone.",
                f"Leave one of the batches out by `{_OPTION}.selection.skip_batches`.",
            )
        return plates

    def load(self) -> PlateTable:
        """Return the table of sites.

        Raises:
            DataError: A table is missing or inconsistent, or a site has an unknown identifier or a
                missing path and is not to be excluded.
        """
        excluded: list[Exclusion] = []
        root = data_path(self.root)
        frame = self._read_plates(root, excluded)
        frame, notes = self._add_roles(frame, excluded)
        notes += self.selection.describe_unused_words(self.metadata.read_plates())
        frame = self._select_complete_sites(frame, excluded)
        frame = self._select_distinct_channels(frame, excluded)
        if self.selection.stray_rows is not None:
            frame = self._drop_stray_wells(frame, self.selection.stray_rows, excluded)
        frame["lab"] = frame["source"].replace(_SAME_LAB)
        for channel in self._channels:  # only for the remaining sites: a plate has many others
            column = f"path_{channel}"
            frame[column] = [locate(path, root, self.prefixes) for path in frame[column]]
        return PlateTable(frame, self.class_names, self._channels, excluded, notes=notes)

    def describe_fix(self, path: str) -> str:
        """Return a hint for missing images: see :meth:`PlateSource.describe_fix`."""
        prefixes = self.prefixes | {"/home/USER/bucket/": ""}
        return (
            f"Set `{_OPTION}.root` to the folder that stands for the bucket, or, where load_data "
            "begins paths in another way, say what takes the place of the beginning: "
            f"`{_OPTION}.files.prefixes={prefixes}`."
        )

    def _read_plates(self, root: Path, excluded: list[Exclusion]) -> pd.DataFrame:
        """Read the sites of all selected plates with usable load_data."""
        import pandas as pd

        parts = []
        bad: dict[str, list[tuple[str, int]]] = {}  # kind -> (description, rows) of each plate
        for source, batch, plate in self._select_plates()[
            ["Metadata_Source", "Metadata_Batch", "Metadata_Plate"]
        ].itertuples(index=False):
            name = f"{source}|{batch}|{plate}"
            table_path = root / self.files.load_data.format(source=source, batch=batch, plate=plate)
            file = find_table(table_path)
            if file is None:
                bad.setdefault("missing_plate", []).append((name, 0))
                continue
            try:
                part = read_table(table_path, ["Metadata_Well", "Metadata_Site"])
            except DataError as error:
                is_empty = isinstance(error.__cause__, pd.errors.EmptyDataError)
                if not is_empty and file.stat().st_size:
                    raise
                part = pd.DataFrame()
            if not len(part):
                bad.setdefault("empty_plate", []).append((name, 0))
            elif other := find_other_plate(part, (source, batch, plate)):
                bad.setdefault("renamed_plate", []).append((f"{name} names {other}", len(part)))
            else:
                parts.append(self._make_sites(part, (source, batch, plate), table_path))
        if not parts and set(bad) == {"missing_plate"}:
            raise DataError(
                f"None of the {len(bad['missing_plate'])} plates (first "
                f"{bad['missing_plate'][0][0]}) has a load_data table under {root}.",
                f"Set `{_OPTION}.root` (and `files.load_data`) to where they are.",
            )
        for kind, plates in bad.items():
            summary = (
                f"{len(plates)} plates {_BAD_PLATES[kind]}: {name_some([p for p, _ in plates])}"
            )
            exclusion = Exclusion(kind, summary, sum(rows for _, rows in plates))
            self._exclude_or_raise(excluded, exclusion, "plates")
        if not parts:
            raise DataError(
                f"No plate with a site is left ({'; '.join(e.description for e in excluded)}).",
                f"Choose other plates, or take words out of `{_OPTION}.exclude`.",
            )
        return pd.concat(parts, ignore_index=True)

    def _exclude_or_raise(self, excluded: list[Exclusion], exclusion: Exclusion, noun: str) -> None:
        """Record an exclusion, or raise if its word is not in ``exclude``."""
        if exclusion.kind not in self.exclude:
            raise DataError(
                f"There are {exclusion.description}.",
                "Correct the tables, or "
                + exclude_hint(
                    f"such {noun}", exclusion.kind, self.exclude, "source.init_args.exclude"
                ),
            )
        excluded.append(exclusion)

    def _drop_sites(
        self,
        frame: pd.DataFrame,
        wrong: NDArray[np.bool_] | pd.Series,
        excluded: list[Exclusion],
        *,
        kind: str,
        problem: str,
    ) -> pd.DataFrame:
        """Drop sites and record them, or raise if their word is not in ``exclude``."""
        count = int(wrong.sum())
        exclusion = Exclusion(kind, f"{count} sites {problem}", count)
        self._exclude_or_raise(excluded, exclusion, "sites")
        return frame[~wrong]

    def _make_sites(
        self, part: pd.DataFrame, plate: tuple[str, str, str], table_path: Path
    ) -> pd.DataFrame:
        """Return the sites of one load_data table, with its paths unchanged."""
        import pandas as pd

        frame = pd.DataFrame(
            {
                **dict(zip(("source", "batch", "plate"), plate, strict=True)),
                "well": part["Metadata_Well"],
                "site": part["Metadata_Site"],
            }
        )
        frame["well"] = name_wells(frame, ["source", "plate"], f"The table {table_path}")
        for channel in self._channels:
            url, name, folder = (f"{k}_Orig{channel}" for k in ("URL", "FileName", "PathName"))
            if url in part.columns:
                paths = part[url]
            elif name in part.columns and folder in part.columns:
                paths = part[folder].str.rstrip("/") + "/" + part[name]
            else:
                raise DataError(
                    f"The table {table_path} has no channel {channel} ({url}, or {name} and "
                    f"{folder}).",
                    f"Set `{_OPTION}.channels` to those it has.",
                )
            frame[f"path_{channel}"] = paths
        return frame

    def _add_roles(
        self, frame: pd.DataFrame, excluded: list[Exclusion]
    ) -> tuple[pd.DataFrame, list[str]]:
        wells = self.metadata.read_wells()
        frame = frame.merge(wells, on=["source", "plate", "well"], how="left", validate="m:1")
        table, classes = self.metadata.read_controls(), self._class_ids()
        kinds = dict(zip(table["Metadata_JCP2022"], table["Metadata_pert_type"], strict=True))
        if absent := sorted(set(classes) - set(frame["jcp"].dropna())):
            raise DataError(
                f"No chosen plate holds {name_some(absent)}.",
                f"Set `{_OPTION}.perturbations.classes` to identifiers that occur.",
            )
        frame = self._select_identified(frame, set(kinds), excluded)
        kind = frame["jcp"].map(kinds)
        modality = frame["jcp"].map(
            dict(zip(table["Metadata_JCP2022"], table["Metadata_modality"], strict=True))
        )
        is_class = frame["jcp"].isin(classes)
        is_control = (kind == "negcon") & (modality == self.perturbations.modality) & ~is_class
        other = ~is_class & ~is_control & kind.ne("empty")
        frame = frame.assign(
            role=is_control.map({True: "control", False: "query"}),
            label=frame["jcp"].map({jcp: c for c, jcp in enumerate(classes)}).fillna(-1),
        )
        used = is_class | is_control | (other if self.perturbations.treatments else False)
        notes = []
        if unused := int((~used).sum()):
            notes.append(f"{unused} sites of empty wells and other perturbations are not used")
        return frame[used], notes

    def _select_identified(
        self, frame: pd.DataFrame, controls: set[str], excluded: list[Exclusion]
    ) -> pd.DataFrame:
        """Return the sites whose perturbation is known or irrelevant.

        Unidentified wells of the published table are other perturbations: they matter only if
        ``treatments`` are used.
        """
        identified = frame["jcp"].fillna("").str.fullmatch(_ID) | frame["jcp"].isin(list(controls))
        listed, tables, absent = self.metadata.read_identifiers()
        if tables:
            unlisted = identified & ~frame["jcp"].isin(listed | controls)
            if unlisted.any() and absent:
                first = frame[unlisted].iloc[0]
                raise DataError(
                    f"There are {int(unlisted.sum())} sites whose perturbation, first "
                    f"{first['jcp']} in well {first['well']} of plate {first['source']}|"
                    f"{first['batch']}|{first['plate']}, is not in the tables "
                    f"{' and '.join(tables)}, and {self.metadata.folder} has no table "
                    f"{' and no table '.join(absent)}.",
                    f"Put {absent[0]}.csv.gz of jump-cellpainting/datasets there.",
                )
            identified &= ~unlisted
        if not self.perturbations.treatments:
            identified |= frame["jcp"] == _UNIDENTIFIED
        if identified.all():
            return frame
        first = frame[~identified].iloc[0]
        jcp = first["jcp"] if isinstance(first["jcp"], str) else "no identifier"
        return self._drop_sites(
            frame,
            ~identified,
            excluded,
            kind="unknown_id",
            problem=f"with an unknown perturbation, first {jcp} in well "
            f"{first['well']} of plate {first['source']}|{first['batch']}|{first['plate']}",
        )

    def _select_complete_sites(
        self, frame: pd.DataFrame, excluded: list[Exclusion]
    ) -> pd.DataFrame:
        """Select the sites that have a path for each channel."""
        missing = frame[[f"path_{c}" for c in self._channels]].isna()
        broken = missing.any(axis=1)
        if not broken.any():
            return frame
        row = frame[broken].iloc[0]
        channel = self._channels[int(missing[broken].iloc[0].to_numpy().argmax())]
        return self._drop_sites(
            frame,
            broken,
            excluded,
            kind="missing_channel",
            problem=f"without a path for a channel, first {channel} of site "
            f"{row['site']} in well {row['well']} of plate "
            f"{row['source']}|{row['batch']}|{row['plate']}",
        )

    def _select_distinct_channels(
        self, frame: pd.DataFrame, excluded: list[Exclusion]
    ) -> pd.DataFrame:
        """Select the sites whose channels are different files."""
        same, pair = find_same_channel(frame, self._channels)
        if not same.any():
            return frame
        row = frame[same].iloc[0]
        return self._drop_sites(
            frame,
            same,
            excluded,
            kind="same_channel",
            problem=f"with one file for two channels, first {pair[0]} and "
            f"{pair[1]} of site {row['site']} in well {row['well']} of plate "
            f"{row['source']}|{row['batch']}|{row['plate']}",
        )

    def _drop_stray_wells(
        self, frame: pd.DataFrame, max_rows: int, excluded: list[Exclusion]
    ) -> pd.DataFrame:
        count = frame.groupby(["source", "jcp", "well"])["site"].transform("size")
        stray = (count <= max_rows) & (frame["label"] >= 0)
        if not stray.any():
            return frame
        row = frame[stray].iloc[0]
        return self._drop_sites(
            frame,
            stray,
            excluded,
            kind="stray_well",
            problem=f"in wells that hold a class at most {max_rows} times in "
            f"a source, first {row['jcp']} in well {row['well']} of {row['source']}",
        )
