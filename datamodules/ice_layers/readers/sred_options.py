"""Options of the Snow Radar Echogram Dataset (SRED): folders, physical fields, range bins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fulgurite.data.exclusions import name_some
from fulgurite.datamodules.ice_layers.readers.sred_file import FIELDS
from fulgurite.datamodules.ice_layers.readers.sred_parts import Shared
from fulgurite.datamodules.ice_layers.tracks.blocks import Density
from fulgurite.domains.ice_layers.codes import METRES, RANGE_BINS
from fulgurite.errors import ConfigError
from fulgurite.options import NonNegativeInt, check_options, restrict_number

__all__ = ["SredBins", "SredFields", "SredFolders"]

_OPTION = "data.init_args.source.init_args"

if not TYPE_CHECKING:  # in this order: jsonargparse reads blocks of TYPE_CHECKING
    BinSize = restrict_number("BinSize", float, (">=", 1e-4), ("<=", 10.0))
    SampleTime = restrict_number("SampleTime", float, (">=", 1e-13), ("<=", 1e-7))
else:
    BinSize = float
    SampleTime = float


@dataclass(frozen=True)
class SredFolders:
    """Folders of the data set that are its parts, and how stacks are split.

    Attributes:
        train: Folders of training files in the root; files in their subfolders count.
        val: Folders of validation files in it.
        test: Folders of test files in it.
        split: ``folders``, as above, or ``segments``: the files of all folders are put together and
            split by flight segment with ``split`` of the data module.
        shared: What to do with flight segments that are in several parts, whose neighbouring
            echograms leak: ``refuse`` them; ``drop`` their stacks from training where they are
            validated or tested, and from validation where they are tested; ``keep`` them.

    Raises:
        ConfigError: A value is unknown.
    """

    train: tuple[str, ...] = ("train_data",)
    val: tuple[str, ...] = ("val_for_training_data",)
    test: tuple[str, ...] = ("test_L_files/L1", "test_L_files/L2", "test_L_files/L3")
    split: Literal["folders", "segments"] = "folders"
    shared: Shared = "refuse"

    def __post_init__(self) -> None:
        check_options(self, f"{_OPTION}.folders")


@dataclass(frozen=True)
class SredFields:
    """Which physical fields are used, and which of their rows belongs to which layer.

    Attributes:
        names: Names of the physical fields to use.
        elevation: Use the elevation as a field, the last one.
        first_row: Row of a physical field that belongs to the first layer, counted from 0: row
            i + 1 for layer i, as the authors' forerunner has it.
        deeper: What physical fields are below their last row: ``refuse`` such files, or ``repeat``
            the last row, which the report counts.

    Raises:
        ConfigError: A field is unknown or comes twice, or a value is out of range.
    """

    names: tuple[str, ...] = FIELDS
    elevation: bool = True
    first_row: NonNegativeInt = 1
    deeper: Literal["refuse", "repeat"] = "refuse"

    def __post_init__(self) -> None:
        check_options(self, f"{_OPTION}.fields")
        if unknown := [name for name in self.names if name not in FIELDS]:
            raise ConfigError(
                f"SRED has no physical field {unknown[0]!r}.",
                f"Set `--{_OPTION}.fields.names` to some of {', '.join(FIELDS)}.",
            )
        if len(set(self.names)) < len(self.names):
            raise ConfigError(
                f"A physical field comes twice in {name_some(self.names, 12)}.",
                f"Set `--{_OPTION}.fields.names` to each once.",
            )


@dataclass(frozen=True)
class SredBins:
    """How long a range bin is; if nothing says it, thicknesses stay in range bins.

    So they are in the authors' code.

    Attributes:
        size: Depth of a range bin [m]; thicknesses are in metres then.
        time: Two-way travel time of a range bin [s], for metres through the refractive index of
            ``density``.
        density: Density of all layers [g cm⁻³], for ``time``; the file's ``curr_dens`` if None,
            which is that of snow at the surface by its mean.

    Raises:
        ConfigError: Options contradict each other, or one is out of range.
    """

    size: BinSize | None = None
    time: SampleTime | None = None
    density: Density | None = None

    def __post_init__(self) -> None:
        check_options(self, f"{_OPTION}.bins")
        if self.size is not None and self.time is not None:
            raise ConfigError(
                "Both size and time say how deep a range bin is.",
                f"Set one of `--{_OPTION}.bins.size` [m] and `--{_OPTION}.bins.time` [s].",
            )
        if self.density is not None and self.time is None:
            raise ConfigError(
                "The density of layers decides nothing without the time of a range bin.",
                f"Set `--{_OPTION}.bins.time` [s], or leave density out.",
            )

    @property
    def unit(self) -> str:
        """Unit of thicknesses."""
        return RANGE_BINS if self.size is None and self.time is None else METRES
