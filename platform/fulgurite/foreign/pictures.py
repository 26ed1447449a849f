"""Pictures of others: what pillow decodes, and TIFF."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fulgurite.foreign.reading import expansion_limit

__all__ = ["check_tiff", "open_picture"]

_TIFF_LZMA, _TIFF_DEFLATE = 34925, (8, 32946)
_DEFLATES = 1032  # largest ratio of deflate


@contextmanager
def open_picture(source: str | Path | IO[bytes]) -> Iterator[Any]:
    """Open a PNG or JPEG with Pillow; other formats run what this project does not need.

    Raises:
        ValueError: The picture has another format, or more pixels than Pillow's
            ``Image.MAX_IMAGE_PIXELS``.
        Exception: What Pillow raises.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        opened = Image.open(source, formats=("PNG", "JPEG"))
    except UnidentifiedImageError as error:
        raise ValueError("it is neither a PNG nor a JPEG") from error
    with opened as picture:
        max_pixels = Image.MAX_IMAGE_PIXELS
        if max_pixels is not None and picture.width * picture.height > max_pixels:
            raise ValueError(
                f"{picture.width} x {picture.height} pixels are more than {max_pixels:,}"
            )
        yield picture


def check_tiff(pages: Iterable[Any], size: int) -> None:
    """Refuse a TIFF whose planes are out of proportion to the file.

    Args:
        pages: Planes, of ``tifffile``.
        size: Size of the file [bytes].

    Raises:
        ValueError: The planes are out of proportion, or their compression hides their size.
    """
    total = 0
    for page in pages:
        total += page.nbytes
        if total > expansion_limit(size) or not page.dataoffsets:
            raise ValueError(f"{size:,} bytes say that they hold {total:,}")
        if page.compression == _TIFF_LZMA:
            raise ValueError("it is compressed by LZMA")
        # the decoder takes as much memory as there is to expand, whatever a piece's size is
        if page.compression in _TIFF_DEFLATE and sum(page.databytecounts) * _DEFLATES > total:
            expected = math.prod(page.chunks) * page.dtype.itemsize
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                page.parent.filehandle.seek(offset)
                content = page.parent.filehandle.read(count)
                if len(zlib.decompressobj().decompress(content, expected + 1)) > expected:
                    raise ValueError("a piece of it expands beyond its size")
