"""Readers of sites from files, and the store of preprocessed images for episodes.

Shapes: R rows (sites) of the table, C channels, H W image.
"""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fulgurite.arithmetic import ceil_div
from fulgurite.data.exclusions import BadImage, Exclusion, name_some
from fulgurite.data.images import ImageRefused, decode_image, reading_image
from fulgurite.data.pool import run_in_processes
from fulgurite.data.store import ArrayStore, cache_folder, cached_store
from fulgurite.datamodules.cs_arm_bn.preprocess import Preprocess
from fulgurite.datamodules.cs_arm_bn.table import PlateTable, Rows
from fulgurite.errors import DataError
from fulgurite.extras import optional_import

__all__ = [
    "IMAGE_EXCLUSIONS",
    "FileReader",
    "PlateImages",
    "SiteReader",
]

#: Words in ``exclude`` that leave out sites whose images cannot be used.
IMAGE_EXCLUSIONS = ("unreadable", "constant", "nan")

_MAX_REMOTE_BYTES = 256 << 20  # largest file that is fetched [bytes]
_ANY_DEPTH = (
    "Or, with CsvPlates, take all its planes for channels and indices for values: "
    "`--data.init_args.source.init_args.any_depth=true`."
)
_LEAVE_OUT = "Or leave such sites out: `--data.init_args.exclude+=unreadable`."
_SiteKind = tuple[tuple[int, ...], str]  # shape and type of a site
_VERSION = 3  # version of the store; raised when its layout or content changes


def _open_source(path: str, remote: Sequence[str]) -> tuple[IO[bytes], int]:
    """Open a local file or an allowed address, and return its size [bytes].

    Raises:
        DataError: The address is not allowed.
        BadImage: The file cannot be fetched.
    """
    if "://" in path:
        if not path.startswith(tuple(remote)):
            raise DataError(
                f"The table of plates names the address {path}, and may name files only.",
                "If the table is to be trusted, allow the address: "
                "`--data.init_args.source.init_args.remote=[s3://BUCKET/]` (of JumpPlates, "
                "`prefixes={}` allows the public bucket). Else fetch the images.",
            )
        stream: IO[bytes] = _open_remote(path)
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        return stream, size
    return open(path, "rb"), os.path.getsize(path)


def _open_remote(path: str) -> io.BytesIO:
    import fsspec

    is_s3 = path.startswith("s3://")
    if is_s3:
        optional_import("s3fs", "plates", f"Reading {path}", "fetch the images")
    try:
        with fsspec.open(path, "rb", **({"anon": True} if is_s3 else {})) as file:
            return io.BytesIO(file.read(_MAX_REMOTE_BYTES))
    except Exception as error:  # a client raises nearly any exception
        raise BadImage(
            f"The image {path} cannot be fetched: {error}.",
            "Check the address, or fetch the images and give `root`.",
        ) from error


@contextmanager
def _open_image(path: str, remote: Sequence[str]) -> Iterator[tuple[IO[bytes], int]]:
    stream, size = _open_source(path, remote)
    with stream:
        yield stream, size


class SiteReader(ABC):
    """Reads the raw image of a site from its files."""

    #: Everything besides the files that determines the pixels; part of the cache key.
    recipe: str = ""

    @abstractmethod
    def __call__(self, paths: Sequence[str]) -> NDArray[Any]:
        """Return a raw site.

        Shape:
            - (C, H, W) uint8, uint16 or float.

        Raises:
            BadImage: The site cannot be read.
        """

    def fingerprint(self, paths: Sequence[str]) -> Iterator[str]:
        """Yield what changes with the files: size and time of those on this machine."""
        for path in paths:
            try:
                status = None if "://" in path else os.stat(path)
            except OSError:
                status = None
            yield path if status is None else f"{path} {status.st_size} {status.st_mtime_ns}"


class FileReader(SiteReader):
    """Reads a site from one file per channel, or from one file with all channels.

    TIFFs must have one 16-bit plane unless ``any_depth`` is set; PNGs have 8 or 16 bits, JPEGs 8;
    ``.npy`` holds (H, W), or (C, H, W) for a whole site. Transparency is left out, and images are
    rotated by their EXIF orientation.

    Args:
        channels: Number of channels C.
        any_depth: Accept TIFFs of other types, with several samples per pixel or several planes,
            and use the indices of a colour map as values of a channel.
        remote: Beginnings of allowed addresses; others are refused.
    """

    def __init__(self, channels: int, any_depth: bool = False, remote: Sequence[str] = ()) -> None:
        self.channels = channels
        self.any_depth = any_depth
        self.remote = tuple(remote)
        self.recipe = f"files {channels} {any_depth}"

    def __call__(self, paths: Sequence[str]) -> NDArray[Any]:
        """Return a raw site: see :meth:`SiteReader.__call__`."""
        read = partial(self.read_file, is_channel=len(paths) > 1 or self.channels == 1)
        if len(paths) > 1 and "://" in paths[0]:  # fetched in parallel
            with ThreadPoolExecutor(len(paths)) as pool:
                planes = list(pool.map(read, paths))
        else:
            planes = [read(path) for path in paths]
        if len({plane.shape for plane in planes}) > 1 or len({p.dtype for p in planes}) > 1:
            formats = ", ".join(f"{p.shape} {p.dtype}" for p in planes)
            raise BadImage(
                f"The channels of one site differ in size or type ({formats}), first {paths[0]}.",
                f"Give channels of one size and type. {_LEAVE_OUT}",
            )
        site = np.stack(planes) if len(planes) > 1 else planes[0]
        if site.ndim == 2:
            site = site[None]
        elif len(planes) == 1 and site.shape[-1] == self.channels != site.shape[0]:
            site = np.moveaxis(site, -1, 0)
        if site.ndim != 3 or len(site) != self.channels:
            raise BadImage(
                f"The image {paths[0]} has the shape {site.shape}, not {self.channels} channels.",
                f"Give as many channels as `channels` names. {_LEAVE_OUT}",
            )
        return site

    def read_file(self, path: str, is_channel: bool) -> NDArray[Any]:
        """Return the pixels of one file.

        Args:
            path: The file, or its address.
            is_channel: Whether it holds one channel of a site, not all of them.

        Shape:
            - (H, W), or with the channels where the file has them.

        Raises:
            BadImage: The file is no image, or none of the kind that is read.
        """
        with (
            reading_image(path, _LEAVE_OUT, BadImage),
            _open_image(path, self.remote) as (stream, size),
        ):
            suffix = Path(path).suffix.lower()
            try:
                return decode_image(
                    stream, size, suffix, is_channel=is_channel, any_depth=self.any_depth
                )
            except ImageRefused as refused:
                if refused.needs_any_depth:
                    refused.hint += f" {_ANY_DEPTH}"
                raise


class _PlateWriter(Dataset[None]):
    """Writes the images of plates into the cache: jobs for :func:`run_in_processes`."""

    def __init__(
        self,
        plates: Sequence[tuple[str, list[tuple[str, ...]]]],
        reader: SiteReader,
        preprocess: Preprocess,
        tolerated: frozenset[str],
    ) -> None:
        self.plates, self.reader, self.preprocess = plates, reader, preprocess
        self.tolerated = tolerated

    def __getitem__(self, number: int) -> None:
        key, sites = self.plates[number]
        cached_store(key, lambda folder: {"bad": self._write_plate(folder, sites)})

    def _write_plate(
        self, folder: Path, sites: list[tuple[str, ...]]
    ) -> dict[int, tuple[str, str]]:
        """Write the usable sites, and return the problems of the others."""
        counts, bad = self._write_sites(folder, sites, None)
        usual = max(counts, key=lambda kind: counts[kind], default=None)
        if usual != next(iter(counts), None):  # the first site is not of the most common kind
            _, bad = self._write_sites(folder, sites, usual)
        return bad

    def _write_sites(
        self, folder: Path, sites: list[tuple[str, ...]], kind: _SiteKind | None
    ) -> tuple[dict[_SiteKind, int], dict[int, tuple[str, str]]]:
        """Write the sites of one shape and type.

        Args:
            folder: Folder of the plate.
            sites: Files of each site.
            kind: Shape and type of stored images; by default those of the first site.

        Returns:
            Number of sites of each shape and type, in order of appearance, and the problems of
            rows that are not stored.
        """
        store: np.memmap[Any, Any] | None = None
        moments: NDArray[np.float64] | None = None
        counts: dict[_SiteKind, int] = {}
        bad: dict[int, tuple[str, str]] = {}
        for row, paths in enumerate(sites):
            try:
                image = _read_site(self.reader, self.preprocess, paths)
                site_kind = image.shape, image.dtype.str
                counts[site_kind] = counts.get(site_kind, 0) + 1
                kind = kind or site_kind
                if site_kind != kind:
                    raise BadImage(
                        f"The site at {paths[0]} is {image.shape} {image.dtype}, others of its "
                        f"plate are {kind[0]} {np.dtype(kind[1])}.",
                        f"Give images of one size and type. {_LEAVE_OUT}",
                    )
            except BadImage as error:
                if error.kind not in self.tolerated:
                    raise
                bad[row] = error.kind, error.problem
                continue
            if store is None or moments is None:
                shape = (len(sites), *image.shape)
                store = np.lib.format.open_memmap(folder / "images.npy", "w+", image.dtype, shape)
                moments = np.zeros((len(sites), 2, len(image)))
            store[row] = image
            flat = image.reshape(len(image), -1).astype(np.float64)
            moments[row] = flat.mean(1), (flat**2).mean(1)
        if store is not None:
            store.flush()
            np.save(folder / "moments.npy", moments)  # type: ignore[arg-type]
        return counts, bad


def _read_site(reader: SiteReader, preprocess: Preprocess, paths: Sequence[str]) -> NDArray[Any]:
    raw = reader(paths)
    try:
        return preprocess(raw)
    except BadImage as error:
        raise BadImage(
            f"The site with {paths[0]} cannot be used: {error.problem}",
            "Look at the image, or leave such sites out: "
            f"`--data.init_args.exclude+={error.kind}`.",
            error.kind,
        ) from error


class PlateImages:
    """The preprocessed images of all sites of a table.

    With a cache, each plate is read once, by as many processes as there are cores, into a file
    that is then memory-mapped; plates are written atomically, so an interrupted run continues
    with the next plate. Without a cache, files are read whenever a site is used.

    Args:
        table: Table of the sites.
        reader: Reader of raw sites.
        preprocess: Preprocessing of raw sites before storage.
        exclude: Words of :data:`IMAGE_EXCLUSIONS` for sites to leave out and count.
        cache: Whether to store preprocessed images under ``FULGURITE_CACHE``.
    """

    def __init__(
        self,
        table: PlateTable,
        reader: SiteReader,
        preprocess: Preprocess,
        exclude: frozenset[str] = frozenset(),
        *,
        cache: bool = True,
    ) -> None:
        self.table = table
        self.reader = reader
        self.preprocess = preprocess
        self.exclude = exclude
        self.cache = cache
        self._paths = table.paths()
        #: Offset of each row in its plate's file.
        self._offset: Rows = np.zeros(len(table), np.int64)
        self._stores: dict[int, ArrayStore] = {}
        self._keys: list[str] = []
        if cache:
            for number in range(len(table.domains)):
                rows = np.flatnonzero(table.domain == number)
                self._offset[rows] = np.arange(len(rows))
                self._keys.append(f"plates/{self._make_key(rows)}")

    def _make_key(self, rows: Rows) -> str:
        digest = hashlib.sha256(f"{_VERSION} {self.reader.recipe} {self.preprocess}".encode())
        for row in rows:
            for text in self.reader.fingerprint(self._paths[row]):
                digest.update(text.encode() + b"\0")
        return digest.hexdigest()[:32]

    def prepare(self) -> None:
        """Read the plates that the cache does not have.

        Raises:
            DataError: An image cannot be used and is not to be excluded.
        """
        plates = [
            (key, [self._paths[row] for row in np.flatnonzero(self.table.domain == d)])
            for d, key in enumerate(self._keys)
            if not (cache_folder() / key).exists()
        ]
        writer = _PlateWriter(plates, self.reader, self.preprocess, self.exclude)
        for _ in run_in_processes(writer, len(plates)):
            pass

    def unreadable_rows(self) -> dict[str, Rows]:
        """Return the rows of unusable images, by kind.

        Raises:
            DataError: An image is unusable and its kind is not to be excluded.
        """
        rows_by_kind: dict[str, list[int]] = {}
        for d in range(len(self._keys)):
            rows = np.flatnonzero(self.table.domain == d)
            for offset, (kind, problem) in self._open_store(d).facts["bad"].items():
                if kind not in self.exclude:
                    raise BadImage(
                        problem,
                        "Look at the image, or leave such sites out: "
                        f"`--data.init_args.exclude+={kind}`.",
                        kind,
                    )
                rows_by_kind.setdefault(kind, []).append(int(rows[int(offset)]))
        return {kind: np.array(rows, np.int64) for kind, rows in rows_by_kind.items()}

    def drop_unreadable(self) -> tuple[PlateTable, PlateImages]:
        """Return the table without unusable images, and its images.

        Raises:
            DataError: An image is unusable and its kind is not to be excluded.
        """
        table, remaining = self.table, np.arange(len(self.table))
        for kind, rows in self.unreadable_rows().items():
            wrong = np.isin(remaining, rows)
            names = name_some([self._paths[row][0] for row in rows], 3)
            table = table.drop(wrong, Exclusion(kind, names, 0))
            remaining = remaining[~wrong]
        if len(remaining) == len(self.table):
            self._refuse_other_types()
            return self.table, self
        images = object.__new__(PlateImages)
        images.__dict__.update(self.__dict__)
        before = {name: number for number, name in enumerate(self.table.domains)}
        images.table = table
        images._paths = [self._paths[row] for row in remaining]
        images._offset = self._offset[remaining]
        images._keys = [self._keys[before[name]] for name in table.domains]
        images._stores = {}
        images._refuse_other_types()
        return table, images

    def _refuse_other_types(self) -> None:
        """Refuse plates stored with different types, and so with different scales."""
        types: dict[str, str] = {}
        for d, name in enumerate(self.table.domains if self.cache else ()):
            types.setdefault(str(self._open_store(d)["images"].dtype), name)
        if len(types) > 1:
            listed = ", ".join(f"{kind} on {name}" for kind, name in types.items())
            raise DataError(
                f"Plates have images of several types: {listed}.",
                "Give images of one type, or set `intensity` of the preprocessing to percentile.",
            )

    def _open_store(self, domain: int) -> ArrayStore:
        if domain not in self._stores:
            self._stores[domain] = ArrayStore(cache_folder() / self._keys[domain])
        return self._stores[domain]

    def __getitem__(self, row: int) -> NDArray[Any]:
        """Return the stored image of one row: (C, H, W) uint8, uint16 or float."""
        if self.cache:
            store = self._open_store(int(self.table.domain[row]))
            image: NDArray[Any] = store["images"][self._offset[row]]
            return image
        return _read_site(self.reader, self.preprocess, self._paths[row])

    def moments(self, rows: Rows, limit: int = 2_000) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return mean and standard deviation of each channel over sites, in stored units.

        Without a cache at most ``limit`` evenly spaced sites are read.

        Shape:
            - rows: (.,) int64 -> (C,) float64 and (C,) float64.
        """
        if not self.cache:
            step = max(1, ceil_div(len(rows), limit))
            sites = [self[row].astype(np.float64) for row in rows[::step]]
            site_moments = np.array([[s.mean((1, 2)), (s**2).mean((1, 2))] for s in sites])
        else:
            parts = []
            for d in np.unique(self.table.domain[rows]):
                moments = self._open_store(d)["moments"]
                parts.append(moments[self._offset[rows[self.table.domain[rows] == d]]])
            site_moments = np.concatenate(parts)
        mean, square = site_moments.mean(0)
        return mean, np.sqrt(np.maximum(square - mean**2, 1e-12))

    def sizes(self) -> dict[tuple[int, int], str]:
        """Return the sizes (h, w) of images, each with a plate that has it.

        Without a cache, only the first image is read, and its size is used for all.
        """
        if not self.cache:
            height, width = self[0].shape[-2:]
            return {(height, width): self.table.domains[0]}
        sizes: dict[tuple[int, int], str] = {}
        for d, name in enumerate(self.table.domains):
            height, width = self._open_store(d)["images"].shape[-2:]
            sizes.setdefault((height, width), name)
        return sizes

    def unit(self, row: int) -> float:
        """Full scale of the stored type: 255, 65535, or 1 for floating point."""
        dtype = self[row].dtype
        return 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)
