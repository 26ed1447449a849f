"""``fulgurite predict --input PATH``: files that are in no split of the DataModule.

A DataModule that reads such files has a method ``predict_from``; see :class:`ReadsInputs`. Classes,
normalisation and vocabulary are those of the training, which the checkpoint holds; nothing is
measured on the files that are predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningDataModule

from fulgurite.data.listing import list_files
from fulgurite.errors import ConfigError, DataError
from fulgurite.io import data_path
from fulgurite.tensor_files import load_plain

__all__ = ["ReadsInputs", "list_input_files", "locate_input", "serve_input"]

_METHOD = "predict_from(path, trained)"


@runtime_checkable
class ReadsInputs(Protocol):
    """A DataModule that predicts files of a user."""

    def predict_from(self, path: Path, trained: Mapping[str, Any]) -> None:
        """Serve the files of a path by ``predict_dataloader``, and nothing else.

        Called once before ``prepare_data`` and ``setup``, which then read these files alone.

        Args:
            path: The file or folder that the user named; it exists.
            trained: What the checkpoint holds of the DataModule, as its ``state_dict`` returned
                it; empty without a checkpoint, or where it holds nothing. Then what is missing is
                to be read from the data of the configuration.

        Raises:
            DataError: The files cannot be read, or do not fit what was trained.
            ConfigError: The DataModule cannot predict files with its options.
        """
        ...


def serve_input(
    data: LightningDataModule | None, path: str, checkpoint: str | Path | None = None
) -> None:
    """Let a DataModule serve the files of a path for prediction.

    Args:
        data: The DataModule.
        path: Absolute, or relative to the current folder or else to ``FULGURITE_DATA``.
        checkpoint: The checkpoint that is predicted with; None without one.

    Raises:
        ConfigError: The DataModule does not read files for prediction.
        DataError: There is nothing at the path, or it cannot be read.
    """
    reader: object = data
    if not isinstance(reader, ReadsInputs):
        raise ConfigError(
            f"{type(data).__name__} predicts its own data alone, and --input={path} names others.",
            f"Leave --input out, or give the DataModule a method {_METHOD}: see "
            "docs/how_to/own_paper.md.",
        )
    located = locate_input(path)
    trained: Any = {}
    if checkpoint is not None:
        stored = load_plain(checkpoint, "--ckpt_path", mmap=True)
        trained = stored.get(type(data).__qualname__)  # Lightning's key
    reader.predict_from(located, trained if isinstance(trained, Mapping) else {})


def locate_input(path: str) -> Path:
    """Return the file or folder that ``--input`` names.

    Args:
        path: Absolute, or relative to the current folder or else to ``FULGURITE_DATA``.

    Raises:
        ConfigError: The path is empty.
        DataError: Nothing is there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     locate_input(folder) == Path(folder)
        True
    """
    if not path.strip():
        raise ConfigError("--input is empty.", "Name a file or folder, or leave --input out.")
    try:
        located = data_path(path)
    except DataError as error:
        raise DataError(
            f"--input={path}: {error.problem}",
            "Name a file or folder; relative paths are looked for in the current folder, then in "
            "the one that FULGURITE_DATA names.",
        ) from error
    if not located.exists():
        raise DataError(
            f"--input={path} is a pattern of names.", "Name one file, or the folder of all."
        )
    return located


def list_input_files(path: Path, suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    """Return the files that ``--input`` names: the file itself, or those of a folder.

    Args:
        path: A file of any name, or a folder, which is searched to the bottom.
        suffixes: What names of files in a folder end with.

    Returns:
        (name, path) of each file, by name; names are relative to the folder, with slashes.

    Raises:
        DataError: The folder has no such file, or cannot be read, or a file is empty.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("b.txt", "a.txt", "c.png"):
        ...         _ = (Path(folder) / name).write_bytes(b"text")
        ...     [name for name, _ in list_input_files(Path(folder), [".txt"])]
        ['a.txt', 'b.txt']
    """
    files = list_files(path, tuple(suffixes)) if path.is_dir() else [(path.name, path)]
    for _, file in files:
        if not file.stat().st_size:
            raise DataError(f"The file {file} is empty.", "Leave it out.")
    if not files:
        raise DataError(
            f"The folder --input={path} holds no file whose name ends with "
            f"{' or '.join(suffixes)}.",
            "Name another folder, or a file.",
        )
    return files
