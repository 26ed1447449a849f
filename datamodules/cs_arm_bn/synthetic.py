"""Generated plates: cells and batch effects, written as files of JUMP.

Shapes: R sites of a plate, C = 5 channels, S side of an image.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fulgurite.data.pool import run_in_processes
from fulgurite.data.store import cache_folder
from fulgurite.datamodules.cs_arm_bn.cells import PHENOTYPES, Phenotype, render_cells
from fulgurite.datamodules.cs_arm_bn.effects import SHARES, LabSetting, draw_effect
from fulgurite.datamodules.cs_arm_bn.jump import CHANNELS, JumpPlates
from fulgurite.datamodules.cs_arm_bn.jump_options import JumpFiles
from fulgurite.datamodules.cs_arm_bn.preprocess import Preprocess
from fulgurite.datamodules.cs_arm_bn.sources import PlateSource
from fulgurite.datamodules.cs_arm_bn.table import PlateTable
from fulgurite.errors import ConfigError
from fulgurite.io import atomic_write, file_lock
from fulgurite.options import (
    ClosedUnitInterval,
    NonNegativeInt,
    PositiveInt,
    check_arguments,
    check_options,
    list_options,
    make_options,
    restrict_number,
)

__all__ = ["NEGATIVE_CONTROL", "PlateWorld", "SyntheticPlates", "class_wells", "control_wells"]

if not TYPE_CHECKING:  # in this order: jsonargparse reads blocks of TYPE_CHECKING
    NumSites = restrict_number("NumSites", int, (">=", 1), ("<=", 99))
    ImageSide = restrict_number("ImageSide", int, (">=", 8), ("<=", 4096))
    NumWells = restrict_number("NumWells", int, (">=", 1), ("<=", 4))
    NumControls = restrict_number("NumControls", int, (">=", 0), ("<=", 32))
    Strength = restrict_number("Strength", float, (">=", 0), ("<=", 10))
else:
    NumSites = int
    ImageSide = int
    NumWells = int
    NumControls = int
    Strength = float

_OPTION = "data.init_args.source.init_args.world"
#: Identifier of DMSO.
NEGATIVE_CONTROL = "JCP2022_033924"
_EMPTY = "JCP2022_999999"
_ROWS = "ABCDEFGHIJKLMNOP"
_VERSION = 2  # version of the generating code; raised when the plates change

#: Wells of each positive control on every COMPOUND plate of JUMP. Source: docs/papers/cs_arm_bn.md
#: section 2.2.
_CLASS_WELLS = {
    "JCP2022_012818": ("D24", "H01", "L24", "P01"),
    "JCP2022_025848": ("C01", "G24", "K01", "O24"),
    "JCP2022_035095": ("A24", "E01", "I24", "M01"),
    "JCP2022_037716": ("B01", "F24", "J01", "N24"),
    "JCP2022_046054": ("D01", "H24", "L01", "P24"),
    "JCP2022_050797": ("C24", "G01", "K24", "O01"),
    "JCP2022_064022": ("B24", "F01", "J24", "N01"),
    "JCP2022_085227": ("A01", "E24", "I01", "M24"),
}
_NAMES = {
    NEGATIVE_CONTROL: ("negcon", "DMSO"),
    "JCP2022_037716": ("poscon", "AMG900"),
    "JCP2022_025848": ("poscon", "dexamethasone"),
    "JCP2022_046054": ("poscon", "FK-866"),
    "JCP2022_035095": ("poscon", "LY2109761"),
    "JCP2022_064022": ("poscon", "NVS-PAK1-1"),
    "JCP2022_050797": ("poscon", "quinidine"),
    "JCP2022_012818": ("poscon", "TC-S-7004"),
    "JCP2022_085227": ("poscon", "aloxistatin"),
}
# Folder of the files on the machine that wrote tables of the PathName form.
_ELSEWHERE = "/mnt/bucket/"
_BUCKET = "s3://cellpainting-gallery/"
#: Instruments: the second laboratory differs as source_8 from source_3 (docs/papers/cs_arm_bn.md
#: sections 2.1, 6.3).
_LABS = (
    ("source_3", LabSetting()),
    ("source_8", LabSetting(spread=2.0, blur=(0.6, 1.6), scale=1 / 1.18, haze=0.2)),
    ("source_11", LabSetting(spread=1.5, blur=(0.4, 1.3), scale=1.05, haze=0.1)),
)


def class_wells(count: int = 4) -> dict[str, tuple[str, ...]]:
    """Return the first ``count`` of JUMP's four wells for each positive control.

    Example:
        >>> class_wells(1)["JCP2022_085227"]
        ('A01',)
    """
    return {jcp: wells[:count] for jcp, wells in _CLASS_WELLS.items()}


def control_wells(count: int = 32) -> tuple[str, ...]:
    """Return ``count`` wells of columns 2 and 23, evenly spaced over the plate.

    Example:
        >>> control_wells(4)
        ('A02', 'A23', 'I02', 'I23')
    """
    rows = [_ROWS[int(i * 16 / max(1, (count + 1) // 2))] for i in range((count + 1) // 2)]
    return tuple(f"{row}{column}" for row in rows for column in ("02", "23"))[:count]


@dataclass(frozen=True)
class _SyntheticPlate:
    """One plate to be written."""

    lab: int
    batch: int
    number: int
    source: str
    batch_name: str
    name: str

    @property
    def folder(self) -> str:
        """The plate's folder of images, which is not named like the plate.

        Source: docs/papers/cs_arm_bn.md section 4.1.
        """
        return f"{self.name}__2026-01-{self.number % 28 + 1:02}T10_00_00-Measurement1"


@dataclass(frozen=True)
class _PlateRecipe:
    """Parameters that determine every pixel."""

    seed: int
    size: int
    sites: int
    wells_per_class: int
    controls: int
    batches: tuple[int, ...]
    plates: tuple[int, ...]
    strength: float
    random_layout: bool
    dead_wells: float

    def list_plates(self) -> list[_SyntheticPlate]:
        plates = []
        for lab, (batches, per_batch) in enumerate(zip(self.batches, self.plates, strict=True)):
            for batch in range(batches):
                for k in range(per_batch):
                    # numbers, of which the first have leading zeros: see the traps of 4.1
                    number = batch * per_batch + k
                    name = f"{lab:02}{1000 + 37 * number}" if lab == 0 else f"J1{lab}{number:04}"
                    batch_name = f"CP_{25 + batch}" if lab == 0 else f"J{batch + 1}"
                    plates.append(_SyntheticPlate(lab, batch, k, _LABS[lab][0], batch_name, name))
        return plates

    def labs(self) -> tuple[tuple[str, LabSetting], ...]:
        """Return the laboratories; at strength 0 their instruments are equal."""
        return tuple((name, setting.scale_towards(self.strength)) for name, setting in _LABS)

    def layout(self, plate: _SyntheticPlate) -> dict[str, str]:
        """Return the perturbation of each used well of a plate."""
        wells = {well: jcp for jcp, ws in class_wells(self.wells_per_class).items() for well in ws}
        wells |= dict.fromkeys(control_wells(self.controls), NEGATIVE_CONTROL)
        if self.random_layout:
            key = (self.seed, 4, plate.lab, plate.batch, plate.number)
            shuffled = np.random.default_rng(key).permutation(sorted(wells.values()))
            wells = dict(zip(sorted(wells), map(str, shuffled), strict=True))
        return wells


def render_plate(
    recipe: _PlateRecipe, plate: _SyntheticPlate
) -> tuple[list[tuple[str, str]], NDArray[np.uint16]]:
    """Return (well, site) of each site of a plate and its image.

    Args:
        recipe: The recipe of a source: :attr:`SyntheticPlates.recipe`.
        plate: One of its plates, as ``recipe.list_plates()`` gives them.

    Shape:
        - (R, C, S, S) uint16.
    """
    setting = recipe.labs()[plate.lab][1]
    effect = draw_effect(
        recipe.seed,
        plate.lab,
        plate.batch,
        plate.number,
        setting=setting,
        strength=recipe.strength,
    )
    generator = np.random.default_rng((recipe.seed, 5, plate.lab, plate.batch, plate.number))
    layout = recipe.layout(plate)
    wells = sorted(layout)
    names = Phenotype.names()
    kinds = [PHENOTYPES.get(layout[well], Phenotype()) for well in wells]
    values = {name: np.array([float(getattr(kind, name)) for kind in kinds]) for name in names}
    at_edge = np.array([well[0] in "AP" or well[1:] in ("01", "24") for well in wells])
    light = 1 - 0.5 * effect.edge * at_edge
    values["density"] = values["density"] * (1 - effect.edge * at_edge)
    jitter = generator.normal(0, 1, (2, len(wells)))  # wells differ a little, whatever the plate
    values["density"] = values["density"] * np.exp(0.08 * jitter[0])
    light = light * np.exp(0.04 * jitter[1])
    if recipe.dead_wells:
        controls = np.array([layout[well] == NEGATIVE_CONTROL for well in wells])
        dead = controls & (generator.uniform(size=len(wells)) < recipe.dead_wells)
        values["density"] = np.where(dead, 0.02, values["density"])
    for name in ("rna", "er", "agp", "mito", "dna"):
        values[name] = values[name] * light
    values = {name: np.repeat(value, recipe.sites) for name, value in values.items()}
    clean = render_cells(values, recipe.size, setting.scale, generator)
    images = effect(clean, generator)
    counts = np.clip(np.rint(images * 6_000 + 100), 0, 65_535).astype(np.uint16)
    start = 0 if plate.lab else 1  # some sources number sites from 0
    sites = [(well, str(site + start)) for well in wells for site in range(recipe.sites)]
    return sites, counts


def _file_name(plate: _SyntheticPlate, well: str, site: str, channel: int) -> str:
    """Return a file name in the style of the laboratory's microscope."""
    if plate.lab:
        key = f"{plate.name}{well}{site}{channel}"
        unique = str(uuid.uuid5(uuid.NAMESPACE_OID, key)).upper()
        return f"HTS_{well}_s{site}_w{channel + 1}{unique}.tif"
    row, column = _ROWS.index(well[0]) + 1, int(well[1:])
    return f"r{row:02}c{column:02}f{int(site):02}p01-ch{channel + 1}sk1fk1fl1.tiff"


def _format_csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


class _SyntheticPlateWriter(Dataset[Any]):
    """Writes plates: a job for :func:`run_in_processes`."""

    def __init__(self, root: Path, recipe: _PlateRecipe, plates: Sequence[_SyntheticPlate]) -> None:
        self.root, self.recipe, self.plates = root, recipe, plates

    def table_path(self, plate: _SyntheticPlate) -> Path:
        """Return the path of the plate's load_data table, which marks a complete plate."""
        folder = f"cpg0016-jump/{plate.source}/workspace/load_data_csv/{plate.batch_name}"
        return self.root / folder / plate.name / "load_data.csv"

    def __getitem__(self, number: int) -> None:
        import tifffile

        plate = self.plates[number]
        sites, images = render_plate(self.recipe, plate)
        inner = f"cpg0016-jump/{plate.source}/images/{plate.batch_name}/images/{plate.folder}"
        folder = self.root / inner
        folder.mkdir(parents=True, exist_ok=True)
        with_url = plate.lab % 2 == 0
        header = [f"Metadata_{k}" for k in ("Source", "Batch", "Plate", "Well", "Site")]
        kinds = ("URL",) if with_url else ("FileName", "PathName")
        header += [f"{kind}_Orig{channel}" for kind in kinds for channel in CHANNELS]
        rows: list[list[str]] = [header]
        for (well, site), image in zip(sites, images, strict=True):
            names = [_file_name(plate, well, site, c) for c in range(len(CHANNELS))]
            for name, pixels in zip(names, image, strict=True):
                tifffile.imwrite(folder / name, pixels, photometric="minisblack", metadata=None)
            row = [plate.source, plate.batch_name, plate.name, well, site]
            if with_url:
                row += [f"{_BUCKET}{inner}/{name}" for name in names]
            else:
                row += [*names, *[f"{_ELSEWHERE}{inner}/"] * len(names)]
            rows.append(row)
        with atomic_write(self.table_path(plate)) as temporary:
            temporary.write_text(_format_csv(rows))


def _write_metadata(root: Path, recipe: _PlateRecipe) -> None:
    """Write the tables of ``jump-cellpainting/datasets/metadata``."""
    plates = recipe.list_plates()
    tables: Mapping[str, list[list[str]]] = {
        "plate": [["Metadata_Source", "Metadata_Batch", "Metadata_Plate", "Metadata_PlateType"]],
        "well": [["Metadata_Source", "Metadata_Plate", "Metadata_Well", "Metadata_JCP2022"]],
    }
    for plate in plates:
        tables["plate"].append([plate.source, plate.batch_name, plate.name, "COMPOUND"])
        layout = recipe.layout(plate)
        for row in _ROWS:
            for column in range(1, 25):
                well = f"{row}{column:02}"
                jcp = layout.get(well, _EMPTY)
                tables["well"].append([plate.source, plate.name, well, jcp])
    # a plate of another type, which is not to be looked for
    tables["plate"].append([plates[0].source, plates[0].batch_name, "T2-1", "TARGET2"])
    for name, rows in tables.items():
        with atomic_write(root / "metadata" / f"{name}.csv.gz") as temporary:
            temporary.write_bytes(gzip.compress(_format_csv(rows).encode(), mtime=0))
    header = [f"Metadata_{k}" for k in ("JCP2022", "pert_type", "Name", "modality")]
    controls = [[jcp, kind, name, "compound"] for jcp, (kind, name) in _NAMES.items()]
    controls.append([_EMPTY, "empty", "Empty", "any"])
    with atomic_write(root / "metadata" / "perturbation_control.csv") as temporary:
        temporary.write_text(_format_csv([header, *controls]))


@dataclass(frozen=True)
class PlateWorld:
    """The laboratories, plates, wells and batch effects of generated plates.

    Args:
        batches: Number of batches of each of one to three laboratories.
        plates: Number of plates in each batch of each laboratory.
        sites: Number of sites of each well.
        size: Side of an image [pixels]; cells keep their size, so larger images have more cells.
        wells_per_class: Number of wells of each of the eight classes on a plate (one to four).
        controls: Number of wells of the negative control on a plate (up to 32).
        strength: Factor on every batch effect; 1 has the source's deviations, 0 none. At 1 a tiny
            ResNet trained for 350 steps is 41 points behind an adapted one on new batches (two
            seeds), more than the 10 to 35 that the source aims at.
        random_layout: Assign classes and controls to random wells instead of those of JUMP.
        dead_wells: Fraction of control wells with nearly no cells.

    Raises:
        ConfigError: A number is out of range, or ``batches`` and ``plates`` differ in length.

    Source: docs/papers/cs_arm_bn.md section 6.3.
    """

    batches: tuple[PositiveInt, ...] = (12, 3)
    plates: tuple[PositiveInt, ...] = (2, 2)
    sites: NumSites = 4
    size: ImageSide = 32
    wells_per_class: NumWells = 4
    controls: NumControls = 32
    strength: Strength = 1.15
    random_layout: bool = False
    dead_wells: ClosedUnitInterval = 0.0

    def __post_init__(self) -> None:
        check_options(self, _OPTION)
        if not 1 <= len(self.batches) == len(self.plates) <= len(_LABS):
            raise ConfigError(
                f"There cannot be {list(self.batches)} batches of {list(self.plates)} plates in "
                "the laboratories.",
                f"Set `--{_OPTION}.batches` and `plates` to lists of one positive number for each "
                f"of up to {len(_LABS)} laboratories.",
            )


class SyntheticPlates(PlateSource):
    """Plates of generated cells with nested batch effects, in the files of JUMP.

    They are generated once, by as many processes as there are cores, into the cache
    (``FULGURITE_CACHE``). A plate is complete when its ``load_data`` exists, so an interrupted run
    continues with the next plate. The first laboratory is ``source_3``; the second, ``source_8``,
    has another instrument and twice the variation; the third is between the two.

    Args:
        world: Laboratories, plates, wells and batch effects.
        seed: Seed of all random numbers.
        path: Folder to write to instead of the cache.

    Raises:
        ConfigError: The seed is negative.

    Source: docs/papers/cs_arm_bn.md section 6.3.
    """

    def __init__(
        self,
        world: PlateWorld = PlateWorld(),
        *,
        seed: NonNegativeInt = 0,
        path: str | None = None,
    ) -> None:
        check_arguments(SyntheticPlates.__init__, locals(), "data.init_args.source.init_args")
        self.world = world = make_options(PlateWorld, world)
        self.recipe = _PlateRecipe(seed=seed, **list_options(world))
        self.path = path

    @property
    def root(self) -> Path:
        """The folder with the content of the bucket."""
        if self.path is not None:
            return Path(self.path).expanduser().absolute()
        text = f"{_VERSION} {self.recipe} {SHARES} {self.recipe.labs()} {PHENOTYPES}"
        return cache_folder() / "synthetic-plates" / hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the eight classes."""
        return tuple(_NAMES[jcp][1] for jcp in sorted(_CLASS_WELLS))

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels."""
        return CHANNELS

    @property
    def preprocess(self) -> Preprocess:
        """Keep images unchanged: they are small, and their gain is part of the task."""
        return Preprocess(downscale=1, intensity="full")

    def prepare(self) -> None:
        """Write the missing plates."""
        root = self.root
        with file_lock(root.with_name(f"{root.name}.lock")):
            writer = _SyntheticPlateWriter(root, self.recipe, [])
            writer.plates = [
                p for p in self.recipe.list_plates() if not writer.table_path(p).exists()
            ]
            for _ in run_in_processes(writer, len(writer.plates)):
                pass
            if not (root / "metadata" / "perturbation_control.csv").exists():
                _write_metadata(root, self.recipe)

    def load(self) -> PlateTable:
        """Return the table of sites, as the reader of JUMP gives it."""
        self.prepare()  # does nothing if `prepare` ran on this machine
        return JumpPlates(
            str(self.root), files=JumpFiles(prefixes={_BUCKET: "", _ELSEWHERE: ""})
        ).load()
