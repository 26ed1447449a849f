"""The command ``fulgurite export``."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from fulgurite import __version__
from fulgurite.errors import ConfigError
from fulgurite.export.exportable import ExportableNetwork, ExportRequest, no_network_error
from fulgurite.export.formats import FORMATS, check_difference
from fulgurite.export.trained import TrainedRun, load_trained_run
from fulgurite.io import atomic_write, checksum, to_file_name
from fulgurite.run_folders import write_json

__all__ = ["export_run", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``fulgurite export``.

    Raises:
        ConfigError: An option is unknown, or the network cannot be exported.
        CheckpointError: There is no such run or checkpoint.
    """
    parser = argparse.ArgumentParser(
        "fulgurite export",
        description="Write the network of a trained run as a file that needs no fulgurite, read it "
        "again, and compare it with the network. Some systems have options of their own, such as "
        "--plate of cs_arm_bn.",
    )
    parser.add_argument("run", type=Path, help="a run folder, or a checkpoint in one")
    parser.add_argument("--to", required=True, choices=[*FORMATS], help="format of the file")
    parser.add_argument(
        "--ckpt_path",
        choices=["best", "last"],
        help="checkpoint of a run folder (default: best where there is one)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the file (default: in exported/ of the run)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file that is there already"
    )
    options, words = parser.parse_known_args(argv)
    path = export_run(
        options.run,
        options.to,
        which=options.ckpt_path,
        out=options.out,
        overwrite=options.overwrite,
        own_options=_read_own_options(words),
    )
    print(f"export: recorded in {path}")
    return 0


def _read_own_options(words: Sequence[str]) -> dict[str, str]:
    """Read ``--name value`` and ``--name=value``, whose names the module knows.

    Raises:
        ConfigError: A word is no option, or an option has no value.

    Example:
        >>> _read_own_options(["--plate", "A", "--depth=3"])
        {'plate': 'A', 'depth': '3'}
    """
    values: dict[str, str] = {}
    pending = list(words)
    while pending:
        word = pending.pop(0)
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"--[A-Za-z]\w*", name):
            raise ConfigError(f"'{word}' is no option.", "See `fulgurite export --help`.")
        if not equals:
            if not pending or pending[0].startswith("--"):
                raise ConfigError(f"{name} has no value.", f"Give {name}=VALUE.")
            value = pending.pop(0)
        if name[2:] in values:
            raise ConfigError(f"{name} comes twice.", "Give it once.")
        values[name[2:]] = value
    return values


def export_run(
    run: Path,
    to: str,
    *,
    which: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    own_options: Mapping[str, str] | None = None,
) -> Path:
    """Write the network of a run, check the file, and write a card beside it.

    Args:
        run: A run folder, or a checkpoint in one.
        to: The format, one of :data:`~fulgurite.export.formats.FORMATS`.
        which: ``last`` or ``best`` of a folder; None takes ``best`` where there is one.
        out: The file; None puts it into ``exported`` of the run folder.
        overwrite: Replace a file that is there.
        own_options: Options that the module names in ``export_options``.

    Returns:
        The file. The card is beside it, with ``.json`` at the end of its name.

    Raises:
        ConfigError: The module has no network to hand over or no such option, or the network
            cannot be written in the format.
        CheckpointError: There is no such run or checkpoint.
        MissingExtraError: A package is missing.
        RunError: The file gives something else than the network; nothing is left of it.
    """
    chosen_format = FORMATS[to]
    chosen_format.require_packages(to)
    if out is not None:
        _check_suffix(out, to)
    trained = load_trained_run(run, which)
    own_options = dict(own_options or {})
    _check_own_options(trained.module, own_options)
    path = out or _default_path(trained, own_options, chosen_format.suffix)
    if _card_path(path).is_dir():
        raise ConfigError(
            f"{_card_path(path)}, where the card of the file goes, is a folder.",
            "Name another file with --out.",
        )
    if not overwrite:
        for file in (path, _card_path(path)):
            if file.exists():
                raise ConfigError(
                    f"{file} is there already.", "Name another with --out, or give --overwrite."
                )
    exportable = _ask_module(trained, own_options)
    card = _describe(trained, exportable, to, own_options)
    with atomic_write(path) as temporary:
        chosen_format.write(exportable, temporary, card)
        difference = chosen_format.measure(exportable, temporary)
        check_difference(difference, to)
        card |= {"difference": difference, "sha256": checksum(temporary)}
    write_json(_card_path(path), card)
    _report(trained, exportable, to, difference)
    return path


def _check_suffix(out: Path, to: str) -> None:
    suffix = FORMATS[to].suffix
    if out.suffix != suffix:
        raise ConfigError(
            f"--out={out} does not end in {suffix}, and --to={to}.", f"Name a file *{suffix}."
        )
    if out.is_dir():
        raise ConfigError(f"--out={out} is a folder.", f"Name a file *{suffix} in it.")


def _card_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _default_path(trained: TrainedRun, own_options: Mapping[str, str], suffix: str) -> Path:
    words = [trained.checkpoint.stem, *own_options.values()]
    name = "-".join(map(to_file_name, words))
    return trained.folder / "exported" / f"{name}{suffix}"


def _check_own_options(module: LightningModule, own_options: Mapping[str, str]) -> None:
    """Refuse options that the module does not name.

    Raises:
        ConfigError: There is no such option.
    """
    known: Mapping[str, str] = getattr(module, "export_options", {})
    if unknown := [name for name in own_options if name not in known]:
        listed = ", ".join(f"--{name} ({meaning})" for name, meaning in known.items())
        raise ConfigError(
            f"There is no option --{unknown[0]} for {type(module).__name__}.",
            f"It has: {listed}." if listed else "It has none of its own; see `--help`.",
        )


def _ask_module(trained: TrainedRun, own_options: Mapping[str, str]) -> ExportableNetwork:
    """Ask the module for its network.

    Raises:
        ConfigError: The module has no network to hand over.
        RunError: What it hands over contradicts itself.
    """
    hand_over = getattr(trained.module, "export_network", None)
    if hand_over is None:
        raise no_network_error(trained.module)
    request = ExportRequest(trained.data, trained.data_state, own_options)
    exportable: ExportableNetwork = hand_over(request)
    exportable.network.eval()
    exportable.check()
    return exportable


def _describe(
    trained: TrainedRun, exportable: ExportableNetwork, to: str, own_options: Mapping[str, str]
) -> dict[str, Any]:
    """What the file is, of what, and how it is used; plain values."""
    packages = ("torch", "lightning", *FORMATS[to].packages)
    card: dict[str, Any] = {
        "format": to,
        "model": f"{type(trained.module).__module__}.{type(trained.module).__qualname__}",
        "run": str(trained.folder),
        "checkpoint": {
            "path": str(trained.checkpoint),
            "sha256": checksum(trained.checkpoint),
            "epoch": trained.epoch,
            "step": trained.step,
        },
        "options": dict(own_options),
        "inputs": [port.describe() for port in exportable.inputs],
        "outputs": [port.describe() for port in exportable.outputs],
        **exportable.facts,
        "notes": [*exportable.notes, *trained.notes],
        "versions": {"fulgurite": __version__}
        | {name: metadata.version(name) for name in packages}
        | {"torch": torch.__version__},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    return card


def _report(trained: TrainedRun, exportable: ExportableNetwork, to: str, difference: float) -> None:
    print(f"export: {trained.checkpoint} (epoch {trained.epoch})")
    for note in (*exportable.notes, *trained.notes):
        print(f"  note: {note}")
    if to == "safetensors":
        weights = (exportable.weights or exportable.network).state_dict()
        print(f"  {len(weights)} tensors, read again: equal bit for bit")
        return
    for word, ports in (("takes", exportable.inputs), ("gives", exportable.outputs)):
        for port in ports:
            print(f"  {word} {port}")
    print(
        f"  read again: largest difference to the trained network {difference:.1e} of its largest "
        f"output (or of 1), over {sum(1 for _ in exportable.examples())} inputs of several sizes"
    )
