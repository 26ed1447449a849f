"""``fulgurite plates``: write a template of a plate table, and check your own table."""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml

from fulgurite.datamodules.cs_arm_bn.site_names import is_address
from fulgurite.datamodules.cs_arm_bn.sources import refuse_shared_files
from fulgurite.datamodules.cs_arm_bn.table import PlateTable
from fulgurite.datamodules.cs_arm_bn.table_files import read_table
from fulgurite.datamodules.cs_arm_bn.tables import CsvPlates, ImageFiles
from fulgurite.errors import ConfigError, DataError, FulguriteError
from fulgurite.io import data_path, write_text

__all__ = ["COLUMNS", "check_plates", "describe_classes", "main", "template"]

#: Columns of a table that :class:`CsvPlates` reads, with their meaning.
COLUMNS = {
    "source": "laboratory; a split between laboratories goes by it",
    "batch": "plates that were made together",
    "plate": "name of the plate; with source and batch it is one domain",
    "well": "row and column, such as A01 (A1 is the same)",
    "site": "number or name of the image within the well",
    "role": "query or control; controls are the untreated wells that the network adapts to",
    "label": "name of the class of a query; empty where it is unknown, and for controls",
    "path_<channel>": "file of each channel (16-bit TIFF, PNG, JPEG, .npy), relative to the table; "
    "or one column `path` for files that hold all channels",
    "lab": "optional: one name for sources that are one laboratory",
    "official": "optional: train, val, or the name of a test, for OfficialSplit",
}
_CHANNELS = ("DNA", "Actin")
_LAYOUT = {
    **{f"{row}01": ("control", "") for row in "ABCD"},
    **{f"{row}02": ("query", "compound-A") for row in "ABC"},
    **{f"{row}03": ("query", "compound-B") for row in "ABC"},
    "D02": ("query", ""),
}


def template() -> str:
    """Return an example table: four batches of one plate, two classes, one unlabelled well.

    Returns:
        Comma-separated values that :class:`CsvPlates` reads.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["source", "batch", "plate", "well", "site", "role", "label"]
    writer.writerow([*names, *(f"path_{channel}" for channel in _CHANNELS)])
    for batch in range(1, 5):
        plate = f"P{batch}"
        for well, (role, label) in sorted(_LAYOUT.items()):
            paths = [f"images/{plate}/{well}_s1_{channel}.tif" for channel in _CHANNELS]
            writer.writerow(["mylab", f"batch{batch}", plate, well, "1", role, label, *paths])
    return text.getvalue()


def check_plates(
    path: str,
    channels: list[str] | None = None,
    *,
    classes: list[str] | None = None,
    files: ImageFiles = ImageFiles(),
    exclude: Sequence[str] = (),
) -> tuple[PlateTable, list[str]]:
    """Read a table as ``CsvPlates`` does, and check which of its images exist.

    Args:
        path: Path of the table.
        channels: Names of the channels; by default those of the columns ``path_...``.
        classes: Names of the classes; by default all labels, sorted.
        files: Where the images are.
        exclude: Words for sites to leave out, as in :class:`CsvPlates`.

    Returns:
        The table, and its missing files (addresses are not looked for).

    Raises:
        DataError: The table cannot be used.
        ConfigError: The channels of a column ``path`` are not named, or an option is wrong.
    """
    if channels is None:
        columns = list(read_table(data_path(path)).columns)
        channels = [c.removeprefix("path_") for c in columns if c.startswith("path_")]
        if "path" in columns:
            raise ConfigError(
                f"The files in the column 'path' of {path} hold all channels, and nothing says "
                "which.",
                "Name them: `--channels=DNA,Actin`.",
            )
        if not channels:
            raise DataError(
                f"The table {path} has no column of paths.",
                "Give `path_<channel>` for each channel, or `path` for files of all channels.",
            )
    source = CsvPlates(path, channels, classes=classes, files=files, exclude=list(exclude))
    table = source.load()
    refuse_shared_files(table)
    names = dict.fromkeys(name for paths in table.paths() for name in paths)
    return table, [name for name in names if not is_address(name) and not os.path.isfile(name)]


def describe_classes(table: PlateTable) -> list[str]:
    """Count the sites, wells and plates of each class, of controls and of unlabelled queries."""
    labelled = np.where(table.control, len(table.class_names), table.label)
    kinds = [*enumerate(table.class_names), (len(table.class_names), "(controls)")]
    kinds += [(-1, "(no label)")] if (labelled < 0).any() else []
    lines = []
    for number, name in kinds:
        rows = labelled == number
        wells, plates = (len(np.unique(n[rows])) for n in (table.well, table.domain))
        lines.append(f"  {name}: {int(rows.sum())} sites in {wells} wells of {plates} plates")
    return lines


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}.", f"`{self.prog} --help` lists the options.")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "fulgurite plates", description="Plates of one's own: an example of a table, and a check."
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    write = commands.add_parser("template", help="write an example of a table")
    write.add_argument("--out", help="file that is written; printed if not given")
    check = commands.add_parser("check", help="read a table and say what it holds")
    check.add_argument("file", help="CSV, .csv.gz or parquet with a row for each site")
    check.add_argument("--channels", type=_parse_names, help="by default those of path_<channel>")
    check.add_argument("--classes", type=_parse_names, help="by default all labels, sorted")
    check.add_argument("--root", help="where relative paths start; by default beside the table")
    check.add_argument("--exclude", type=_parse_names, help="what to leave out and count")
    check.add_argument("--prefixes", type=_parse_pairs, help="{'/home/USER/plates/': ''}")
    return parser


def _parse_names(text: str) -> list[str]:
    """Parse names between commas, also in brackets."""
    names = _parse_yaml(text) if text.startswith("[") else text.split(",")
    if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of names, such as A,B")
    return [name.strip() for name in names]


def _parse_pairs(text: str) -> dict[str, str]:
    pairs = _parse_yaml(text)
    if not isinstance(pairs, dict) or not all(isinstance(new, str) for new in pairs.values()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no pairs of beginnings, such as {{'/home/USER/plates/': ''}}"
        )
    return {str(old): new for old, new in pairs.items()}


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no YAML") from error


def main(argv: list[str]) -> int:
    """Run the command line of ``fulgurite plates``.

    Raises:
        FulguriteError: The table cannot be used, or an option is wrong.
    """
    options = _make_parser().parse_args(argv)
    if options.command == "template":
        return _write_template(options.out)
    try:
        table, absent = check_plates(
            options.file,
            options.channels,
            classes=options.classes,
            files=ImageFiles(root=options.root, prefixes=options.prefixes or {}),
            exclude=options.exclude or (),
        )
    except FulguriteError as error:  # name the options of this command
        hint = error.hint.replace("--data.init_args.source.init_args.", "--")
        error.hint = hint.replace("--files.", "--")
        raise
    print(table.report())
    print("\n".join(describe_classes(table)))
    if absent:
        raise DataError(
            f"{len(absent)} images of the table {options.file} are not there, first {absent[0]}.",
            "Put them there, or give `--root` or `--prefixes`.",
        )
    addresses = sum(is_address(name) for paths in table.paths() for name in paths)
    if addresses:
        print(
            f"images: {addresses} addresses, which are not looked for (a run reads those that "
            "`--data.init_args.source.init_args.files.remote` allows)"
            + "; the others are all there"
            * (addresses < len(table) * len(table.path_columns))
        )
    else:
        print("images: all there")
    return 0


def _write_template(out: str | None) -> int:
    if out is None:
        print(template(), end="")
    else:
        if Path(out).exists():
            raise ConfigError(f"There is a file {out} already.", "Name another one with `--out`.")
        write_text(out, template())
    width = max(map(len, COLUMNS))
    print("One row for each site. Columns:", file=sys.stderr)
    for name, meaning in COLUMNS.items():
        print(f"  {name:<{width}}  {meaning}", file=sys.stderr)
    if out is not None:
        print(
            f"Written to {out}. Check your own with `fulgurite plates check {out}`, then train: "
            f"`fulgurite fit --config cs_arm_bn/own.yaml "
            f"--data.init_args.source.init_args.path={out}`.",
            file=sys.stderr,
        )
    return 0
