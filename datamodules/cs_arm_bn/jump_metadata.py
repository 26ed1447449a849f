"""Metadata tables of JUMP Cell Painting (``jump-cellpainting/datasets``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fulgurite.datamodules.cs_arm_bn.site_names import name_wells
from fulgurite.datamodules.cs_arm_bn.table_files import find_table, read_table
from fulgurite.errors import DataError
from fulgurite.io import data_path

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["JumpMetadata"]


class JumpMetadata:
    """The tables of plates, wells and perturbations of JUMP.

    Args:
        folder: Folder of the tables, absolute or relative to ``FULGURITE_DATA``.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._controls: pd.DataFrame | None = None

    @property
    def folder(self) -> Path:
        """Folder of the tables."""
        return data_path(self._folder)

    def _read(self, name: str, *columns: str) -> pd.DataFrame:
        return read_table(self.folder / name, [f"Metadata_{column}" for column in columns])

    def read_plates(self) -> pd.DataFrame:
        """Return the table of plates.

        Raises:
            DataError: It is missing or damaged, or lacks a column.
        """
        return self._read("plate", "Source", "Batch", "Plate", "PlateType")

    def read_controls(self) -> pd.DataFrame:
        """Return the table of control perturbations, which is read once.

        Raises:
            DataError: It is missing or damaged, lacks a column, or describes a perturbation twice.
        """
        if self._controls is None:
            names = ("JCP2022", "pert_type", "Name", "modality")
            table = self._read("perturbation_control", *names)
            table = table.drop_duplicates([f"Metadata_{name}" for name in names])
            twice = table["Metadata_JCP2022"].duplicated()
            if twice.any():
                raise DataError(
                    "The table perturbation_control has two different rows of "
                    f"{table['Metadata_JCP2022'][twice].iloc[0]}.",
                    "Keep one row for each perturbation.",
                )
            self._controls = table
        return self._controls

    def read_wells(self) -> pd.DataFrame:
        """Return the source, plate, well and perturbation (``jcp``) of each well.

        Raises:
            DataError: The table is missing or damaged, or gives a well two perturbations.
        """
        wells = self._read("well", "Source", "Plate", "Well", "JCP2022")
        wells = wells.drop_duplicates().rename(
            columns={
                "Metadata_Source": "source",
                "Metadata_Plate": "plate",
                "Metadata_Well": "well",
                "Metadata_JCP2022": "jcp",
            }
        )[["source", "plate", "well", "jcp"]]
        wells["well"] = name_wells(wells, ["source", "plate"], "The well table")
        twice = wells.duplicated(["source", "plate", "well"])
        if twice.any():
            row = wells[twice].iloc[0]
            raise DataError(
                f"The well table gives well {row['well']} of plate {row['plate']} of "
                f"{row['source']} two perturbations.",
                "Keep one row for each well.",
            )
        return wells

    def read_identifiers(self) -> tuple[set[str], list[str], list[str]]:
        """Return the identifiers in perturbation tables, the existing and the missing tables.

        Raises:
            DataError: An existing table is damaged, or lacks a column.
        """
        names: dict[bool, list[str]] = {True: [], False: []}
        identifiers: set[str] = set()
        for name in ("compound", "crispr", "orf"):
            there = find_table(self.folder / name) is not None
            names[there].append(name)
            if there:
                identifiers |= set(self._read(name, "JCP2022")["Metadata_JCP2022"])
        return identifiers, names[True], names[False]
