"""The store of preprocessed images for episodes.

Shapes: R rows (sites) of the table, C channels, H W image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fulgurite.arithmetic import ceil_div
from fulgurite.data.exclusions import BadImage, Exclusion, name_some
from fulgurite.data.pool import run_in_processes
from fulgurite.data.store import ArrayStore, cache_folder, cached_store
from fulgurite.datamodules.cs_arm_bn.preprocess import Preprocess
from fulgurite.datamodules.cs_arm_bn.site_readers import LEAVE_OUT, SiteReader
from fulgurite.datamodules.cs_arm_bn.table import PlateTable, Rows
from fulgurite.errors import DataError

__all__ = [
    "IMAGE_EXCLUSIONS",
    "PlateImages",
]

#: Words in ``exclude`` that leave out sites whose images cannot be used.
IMAGE_EXCLUSIONS = ("unreadable", "constant", "nan")

_SiteKind = tuple[tuple[int, ...], str]  # shape and type of a site
_VERSION = 3  # version of the store; raised when its layout or content changes


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
                        f"Give images of one size and type. {LEAVE_OUT}",
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

        The deviation of a channel that is the same everywhere is 1, so that it stays harmless where
        it is not. Without a cache at most ``limit`` evenly spaced sites are read.

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
        site_mean, site_square = site_moments[:, 0], site_moments[:, 1]
        mean = site_mean.mean(0)
        # within and between sites: the mean square minus the squared mean loses small deviations
        within = np.maximum(site_square - site_mean**2, 0).mean(0)
        variance = within + ((site_mean - mean) ** 2).mean(0)
        varies = variance > 1e-28 * (mean**2)  # more than what rounding leaves
        return mean, np.sqrt(np.where(varies, variance, 1))

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
