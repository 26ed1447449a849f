"""Embeddings of another network in place of the images of plates.

Shapes: R rows of the plate table, E rows of the file, D numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.data.exclusions import BadImage, Exclusion, check_exclude, exclude_hint, name_some
from fulgurite.datamodules.cs_arm_bn.preprocess import Preprocess
from fulgurite.datamodules.cs_arm_bn.site_names import well_name
from fulgurite.datamodules.cs_arm_bn.site_readers import SiteReader
from fulgurite.datamodules.cs_arm_bn.sources import PlateSource
from fulgurite.datamodules.cs_arm_bn.table import PlateTable
from fulgurite.errors import DataError
from fulgurite.extras import optional_import
from fulgurite.foreign import check_parquet, read_arrays, reading
from fulgurite.io import data_path

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EmbeddedPlates", "KeepEmbedding", "read_embeddings"]

_KEYS = ("source", "batch", "plate", "well", "site")
_REQUIRED = ("plate", "well", "site")
_ROW = "row"
# columns of numbers that tables hold besides, of which the label would be the worst to learn from
_NO_NUMBERS = (
    *("label", "labels", "class", "class_id", "target", "role", "domain", "lab", "official"),
    *("split", "fold", "index", "level_0", "imagenumber", "objectnumber", "tablenumber"),
)
_NO_NUMBERS_START = ("unnamed:", "metadata", "path_")
_OPTION = "--data.init_args.source.init_args"


class KeepEmbedding(Preprocess):
    """Keeps embeddings unchanged, after a check that they are finite."""

    def __init__(self) -> None:
        super().__init__(downscale=1, intensity="full")

    def __repr__(self) -> str:
        return "KeepEmbedding()"

    def __call__(self, site: NDArray[Any]) -> NDArray[Any]:
        """Return the embedding.

        Shape:
            - site: (D, 1, 1) float32 -> the same.

        Raises:
            BadImage: The embedding has values that are not finite.
        """
        if not np.isfinite(site).all():
            raise BadImage("The embedding holds values that are not finite.", kind="nan")
        return site


class _EmbeddingReader(SiteReader):
    """Reads a row of a file of embeddings; each process reads the file once."""

    recipe = "embeddings"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: NDArray[np.float32] | None = None

    def __call__(self, paths: Sequence[str]) -> NDArray[Any]:
        """Return an embedding as an image of one pixel. Shape: (D, 1, 1)."""
        if self._values is None:
            self._values = read_embeddings(self.path).values
        embedding: NDArray[np.float32] = self._values[int(paths[0].rpartition("#")[2])]
        return embedding[:, None, None]

    def fingerprint(self, paths: Sequence[str]) -> Iterator[str]:
        """Yield the row, and size and time of the file."""
        yield paths[0].rpartition("#")[2]
        yield from super().fingerprint([str(self.path)])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_values": None}


class EmbeddedPlates(PlateSource):
    """The plates of another source, with an embedding of each site in place of its images.

    The file (``.npz`` or ``.parquet``) has one row for each site. It names the site by ``plate``,
    ``well`` and ``site``, with ``source`` and ``batch`` where plates of several share a name; or by
    ``row``, the number of the row in the plate table, from 0, if no site of it is left out. An npz
    holds them as arrays beside ``embeddings`` (E, D); a parquet file has them as columns beside one
    column of lists ``embedding``, or all its other columns are the numbers, whose names a
    checkpoint remembers (``label``, ``Metadata_…`` and the like are refused). Rows of sites that
    the table does not have are ignored and counted; wells A1 and A01 are the same.

    An embedding is served as an image of D channels and one pixel, so that every option of the
    data module and every method works; images need not exist.

    Args:
        source: Source of the plates.
        embeddings: File of embeddings, absolute or relative to ``FULGURITE_DATA``.
        exclude: Words for sites to leave out and count instead of an error:
            ``missing_embedding`` for sites that the file does not have.

    Raises:
        ConfigError: A word in ``exclude`` is unknown.

    Source: docs/papers/cs_arm_bn.md section 1.6 (TVN on embeddings of a foundation model).
    """

    def __init__(
        self,
        source: PlateSource,
        embeddings: str,
        exclude: list[str] = [],  # noqa: B006  # copied below
    ) -> None:
        self.source = source
        self.embeddings = embeddings
        self.exclude = check_exclude(exclude, ("missing_embedding",), "source.init_args.exclude")
        self._read: Embeddings | None = None

    @property
    def path(self) -> Path:
        """The file of embeddings."""
        return data_path(self.embeddings)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        return self.source.class_names

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the numbers of an embedding: those of their columns, where they have some."""
        return self._read_file().names

    @property
    def preprocess(self) -> Preprocess:
        """Keep embeddings unchanged."""
        return KeepEmbedding()

    @property
    def reader(self) -> SiteReader:
        """Reader of embeddings."""
        return _EmbeddingReader(self.path)

    def prepare(self) -> None:
        """Prepare the plates."""
        self.source.prepare()

    def _read_file(self) -> Embeddings:
        if self._read is None:
            self._read = read_embeddings(self.path)
        return self._read

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_read": None}

    def load(self) -> PlateTable:
        """Return the table of sites, with the row of the file as path.

        Raises:
            DataError: A site has no embedding in the file, or two.
        """
        table = self.source.load()
        keys, values = self._read_file().keys, self._read_file().values
        rows = (
            self._match_rows_by_number(keys, table)
            if _ROW in keys
            else self._match_rows(keys, table)
        )
        if (missing := rows < 0).any():
            frame = table.frame[missing]
            names = frame["domain"] + " " + frame["well"] + " site " + frame["site"]
            summary = f"{int(missing.sum())} of {len(table)} sites without an embedding"
            if "missing_embedding" not in self.exclude:
                raise DataError(
                    f"{self.path} has no embedding of {int(missing.sum())} of the {len(table)} "
                    f"sites: {name_some(list(names), 3)}.",
                    "Give one row for each site, or "
                    + exclude_hint(
                        "such sites", "missing_embedding", self.exclude, "source.init_args.exclude"
                    ),
                )
            table = table.drop(
                missing,
                Exclusion("missing_embedding", f"{summary}: {name_some(list(names), 3)}", 0),
            )
            rows = rows[~missing]
        frame = table.frame.drop(columns=[*table.path_columns])
        frame["path"] = [f"{self.path}#{row}" for row in rows]
        notes = (*table.notes, f"embeddings of {values.shape[1]} numbers from {self.path}")
        if unused := len(values) - len(np.unique(rows)):
            notes = (*notes, f"{unused} rows of it are of no site of the table")
        return PlateTable(frame, table.class_names, self.channels, table.excluded, notes=notes)

    def _match_rows_by_number(self, keys: pd.DataFrame, table: PlateTable) -> NDArray[np.int64]:
        """Return the row of the file for each row of the table; -1 for none. Shape: (R,)."""
        if left_out := sum(exclusion.count for exclusion in table.excluded):
            raise DataError(
                f"The column `row` of {self.path} numbers the sites of the plate table, of which "
                f"{left_out} are left out, so that others have their numbers.",
                f"Name sites by {', '.join(_REQUIRED)}, or remove these from the table.",
            )
        numbers = keys[_ROW].to_numpy()
        if numbers.dtype.kind not in "iu" or (numbers < 0).any() or (numbers >= len(table)).any():
            raise DataError(
                f"The column `row` of {self.path} does not number the {len(table)} sites of the "
                "plate table.",
                f"Give whole numbers from 0 to {len(table) - 1}, or the columns "
                f"{', '.join(_REQUIRED)}.",
            )
        self._refuse_twice(keys, [_ROW], f"{self.path}")
        rows = np.full(len(table), -1, np.int64)
        rows[numbers] = np.arange(len(numbers))
        return rows

    def _match_rows(self, keys: pd.DataFrame, table: PlateTable) -> NDArray[np.int64]:
        """Return the row of the file for each row of the table; -1 for none. Shape: (R,)."""
        import pandas as pd

        columns = [name for name in _KEYS if name in keys]
        file_keys = keys[columns].copy()
        file_keys["well"] = file_keys["well"].map(well_name)
        self._refuse_twice(file_keys, columns, f"{self.path}")
        table_keys = table.frame[columns].copy()
        table_keys["well"] = table_keys["well"].map(well_name)
        self._refuse_twice(table_keys, columns, "The plate table")
        rows = pd.MultiIndex.from_frame(file_keys).get_indexer(pd.MultiIndex.from_frame(table_keys))
        return np.asarray(rows, np.int64)

    @staticmethod
    def _refuse_twice(keys: pd.DataFrame, columns: list[str], origin: str) -> None:
        twice = keys.duplicated(columns)
        if twice.any():
            first = keys[twice].iloc[0]
            named = ", ".join(f"{name} {first[name]}" for name in columns)
            raise DataError(
                f"{origin} has two rows of {named} ({int(twice.sum())} such rows).",
                "Keep one row for each site; where plates share a name, give the columns source "
                "and batch in the file of embeddings.",
            )


@dataclass(frozen=True)
class Embeddings:
    """A file of embeddings.

    Attributes:
        keys: Keys of each row as text (``row`` as a number).
        values: Embeddings. Shape: (E, D).
        names: Names of the D numbers.
    """

    keys: pd.DataFrame
    values: NDArray[np.float32]
    names: tuple[str, ...]


def read_embeddings(path: Path) -> Embeddings:
    """Read a file of embeddings.

    Args:
        path: File of type ``.npz`` or ``.parquet``; see :class:`EmbeddedPlates`.

    Raises:
        DataError: The file is damaged, lacks the keys or the embeddings, or has columns of other
            numbers.
        MissingExtraError: The file is parquet, and pyarrow is not installed.
    """
    import pandas as pd

    if path.suffix not in (".npz", ".parquet"):
        raise DataError(
            f"The file of embeddings {path} is neither .npz nor .parquet.",
            f"Set `{_OPTION}.embeddings` to one of these.",
        )
    hint = "Write it again: one row for each site, with plate, well and site."
    if path.suffix == ".parquet":
        optional_import("pyarrow", "plates", f"The file of embeddings {path}")
    columns: tuple[str, ...] = ()
    with reading(path, "The file of embeddings", hint):
        if path.suffix == ".npz":
            arrays = read_arrays(path)
            values = arrays.pop("embeddings", None)
            names = [name for name in (*_KEYS, _ROW) if name in arrays]
            if values is None or any(arrays[n].shape != values.shape[:1] for n in names):
                raise ValueError("it has no array `embeddings` (E, D) with keys of (E,)")
            keys = pd.DataFrame({name: arrays[name] for name in names})
        else:
            check_parquet(path)
            keys, values, columns = _split_table(pd.read_parquet(path))
        if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.size:
            raise ValueError(f"the embeddings are {values.shape} {values.dtype}, not (E, D)")
        columns = columns or tuple(f"embedding {number}" for number in range(values.shape[1]))
        return Embeddings(_convert_keys(keys), np.ascontiguousarray(values, np.float32), columns)


def _split_table(table: pd.DataFrame) -> tuple[pd.DataFrame, NDArray[Any], tuple[str, ...]]:
    """Split a table into keys and embeddings: a column of lists, or a column per number.

    Returns:
        The keys, the embeddings, and the names of the columns per number.
    """
    if index := [name for name in table.index.names if name in (*_KEYS, _ROW)]:
        table = table.reset_index(index)  # pandas' index is a column of the file
    names = [name for name in (*_KEYS, _ROW) if name in table]
    if "embedding" in table:
        if (empty := table["embedding"].isna().to_numpy()).any():
            raise ValueError(f"`embedding` is empty in row {int(empty.argmax())}")
        lengths = table["embedding"].map(len)
        if lengths.nunique() != 1:
            raise ValueError("the lists in `embedding` differ in length")
        return table[names], np.stack([np.asarray(row) for row in table["embedding"]]), ()
    numbers = table.drop(columns=names)
    columns = tuple(map(str, numbers))
    if others := [c for c in columns if _is_no_number(c)]:
        raise ValueError(
            f"the columns {name_some(others, 3)} are no numbers of an embedding by their names: "
            "leave them out, or give the numbers as one column of lists `embedding`"
        )
    if wrong := [str(c) for c in numbers if numbers[c].dtype.kind not in "fiu"]:
        raise ValueError(f"the columns {name_some(wrong, 3)} are no numbers of an embedding")
    return table[names], numbers.to_numpy(), columns


def _is_no_number(column: str) -> bool:
    name = column.strip().casefold()
    return name in (*_NO_NUMBERS, *_KEYS, _ROW) or name.startswith(_NO_NUMBERS_START)


def _convert_keys(keys: pd.DataFrame) -> pd.DataFrame:
    """Convert keys to text, whole floats without a decimal point.

    Raises:
        ValueError: A key column is missing, has empty cells or fractions, or is one too many.
    """
    if _ROW in keys:
        if others := [name for name in keys if name != _ROW]:
            raise ValueError(f"it has `row` and {others[0]!r} to tell sites by: keep one of them")
        return keys[[_ROW]]
    if absent := [name for name in _REQUIRED if name not in keys]:
        raise ValueError(
            f"it has no {absent[0]!r}; name each row by {', '.join(_REQUIRED)} or `row`"
        )
    if (missing := keys.isna().any()).any():
        raise ValueError(f"the column {keys.columns[int(missing.argmax())]!r} has empty cells")
    numbers = [name for name in keys if keys[name].dtype.kind == "f"]
    if fractions := [name for name in numbers if (keys[name] % 1 != 0).any()]:
        raise ValueError(f"the column {fractions[0]!r} holds fractions")
    return keys.astype(dict.fromkeys(numbers, "int64")).astype(str)
