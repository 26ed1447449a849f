"""Options of the reader of JUMP: where files are, which plates are used, what the classes are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fulgurite.data.exclusions import name_some
from fulgurite.options import NonNegativeInt, check_options

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["JumpFiles", "Perturbations", "PlateSelection"]

_LOAD_DATA = "cpg0016-jump/{source}/workspace/load_data_csv/{batch}/{plate}/load_data"


@dataclass(frozen=True)
class JumpFiles:
    """Where the tables and images of JUMP are.

    Args:
        metadata: Folder with ``plate``, ``well`` and ``perturbation_control`` tables of
            ``jump-cellpainting/datasets``; by default ``metadata`` under the root.
        load_data: Path of a plate's table under the root, without suffix.
        prefixes: Replacements of the beginnings of paths or addresses in ``load_data``, relative to
            the root unless absolute. By default the public bucket's address becomes the root;
            ``{}`` reads images from the bucket, anonymously. Other addresses are read
            only if they begin with a replacement here.
    """

    metadata: str | None = None
    load_data: str = _LOAD_DATA
    prefixes: dict[str, str] | None = None

    def __post_init__(self) -> None:
        check_options(self, "data.init_args.source.init_args.files")


@dataclass(frozen=True)
class PlateSelection:
    """Which plates and wells of JUMP are used.

    Args:
        sources: Sources to use; by default all of the plate table.
        plate_types: Types of plates to use.
        skip_batches: Batches to leave out.
        plates: Plates to use; by default all.
        stray_rows: Largest number of rows of a stray well of a class in a source; stray wells are
            an error or excluded (the paper excludes those with 36 or fewer); null for no limit.
    """

    sources: list[str] | None = None
    plate_types: tuple[str, ...] = ("COMPOUND",)
    skip_batches: tuple[str, ...] = ()
    plates: list[str] | None = None
    stray_rows: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        check_options(self, "data.init_args.source.init_args.selection")

    def describe_unused_words(self, plates: pd.DataFrame) -> list[str]:
        """Describe chosen plate types and skipped batches that no plate has.

        Args:
            plates: The plate table.
        """
        notes = []
        for option, column in (("skip_batches", "Batch"), ("plate_types", "PlateType")):
            names = set(getattr(self, option)) - set(plates[f"Metadata_{column}"])
            if names:
                notes.append(f"{option} that no plate has: {name_some(sorted(names))}")
        return notes


@dataclass(frozen=True)
class Perturbations:
    """What is a class among the perturbations of JUMP.

    Args:
        modality: Kind of perturbation on the plates.
        classes: Identifiers (``JCP2022_...``) of the classes; by default the positive controls of
            the modality.
        treatments: Also use all other known perturbations as unlabelled queries, which are
            predicted but not trained on.
    """

    modality: Literal["compound", "crispr", "orf"] = "compound"
    classes: list[str] | None = None
    treatments: bool = False

    def __post_init__(self) -> None:
        check_options(self, "data.init_args.source.init_args.perturbations")
