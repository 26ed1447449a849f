"""Readers of the raw images of a site: local files, and addresses that are allowed.

Shapes: C channels, H W image.
"""

from __future__ import annotations

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

from fulgurite.data.exclusions import BadImage
from fulgurite.data.images import ImageRefused, decode_image, reading_image
from fulgurite.datamodules.cs_arm_bn.site_names import is_address
from fulgurite.errors import DataError
from fulgurite.extras import optional_import

__all__ = ["LEAVE_OUT", "FileReader", "SiteReader"]

_MAX_REMOTE_BYTES = 256 << 20  # largest file that is fetched [bytes]
_ANY_DEPTH = (
    "Or, with CsvPlates, take all its planes for channels and indices for values: "
    "`--data.init_args.source.init_args.files.any_depth=true`."
)
#: How sites that cannot be read are left out, as the end of a hint.
LEAVE_OUT = "Or leave such sites out: `--data.init_args.exclude+=unreadable`."


def _open_source(path: str, remote: Sequence[str]) -> tuple[IO[bytes], int]:
    """Open a local file or an allowed address, and return its size [bytes].

    Raises:
        DataError: The address is not allowed.
        BadImage: The file cannot be fetched.
    """
    if is_address(path):
        if not path.startswith(tuple(remote)):
            raise DataError(
                f"The table of plates names the address {path}, and may name files only.",
                "If the table is to be trusted, allow the address: "
                "`--data.init_args.source.init_args.files.remote=[s3://BUCKET/]` (of JumpPlates, "
                "`files.prefixes={}` allows the public bucket). Else fetch the images.",
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
                status = None if is_address(path) else os.stat(path)
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
        if len(paths) > 1 and is_address(paths[0]):  # fetched in parallel
            with ThreadPoolExecutor(len(paths)) as pool:
                planes = list(pool.map(read, paths))
        else:
            planes = [read(path) for path in paths]
        if len({plane.shape for plane in planes}) > 1 or len({p.dtype for p in planes}) > 1:
            formats = ", ".join(f"{p.shape} {p.dtype}" for p in planes)
            raise BadImage(
                f"The channels of one site differ in size or type ({formats}), first {paths[0]}.",
                f"Give channels of one size and type. {LEAVE_OUT}",
            )
        site = np.stack(planes) if len(planes) > 1 else planes[0]
        if site.ndim == 2:
            site = site[None]
        elif len(planes) == 1 and site.shape[-1] == self.channels != site.shape[0]:
            site = np.moveaxis(site, -1, 0)
        if site.ndim != 3 or len(site) != self.channels:
            raise BadImage(
                f"The image {paths[0]} has the shape {site.shape}, not {self.channels} channels.",
                f"Give as many channels as `channels` names. {LEAVE_OUT}",
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
            reading_image(path, LEAVE_OUT, BadImage),
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
