"""Image files as arrays of their own depth: PNG, JPEG, TIFF and ``.npy``.

Nothing is converted in silence. What a file holds comes back in its own depth, or the file is
refused; :func:`to_uint8` and :func:`to_channels` are the conversions that a reader may ask for.

Axes: H W image, C channels, P planes of a file.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.errors import DataError, FulguriteError, MissingExtraError
from fulgurite.extras import suggest_extra
from fulgurite.foreign import check_tiff, open_picture, read_array, reading

__all__ = [
    "ImageRefused",
    "decode_image",
    "decode_picture",
    "decode_tiff",
    "reading_image",
    "to_channels",
    "to_uint8",
]

_TIFF_SUFFIXES = (".tif", ".tiff")
_MOST_PLANES = 1000  # of a TIFF
# what the values of a TIFF are: black at 0, RGB, and YCbCr, which the decoder turns into RGB
_BRIGHTNESS = (1, 2, 6)
_OTHER_COLOURS = {0: "are white at 0", 3: "are indices of a colour map"}
_EXIF_KEYS = frozenset(("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"))
_ORIENTATION = 0x0112
_GREY_ALPHA, _COLOURS = 4, (2, 6)  # colour types of PNG
_SIXTEEN_BITS = "Save it as a 16-bit grey image without transparency."


class ImageRefused(ValueError):
    """An image file is whole, but it holds something else than was asked for.

    Args:
        problem: The rest of a sentence that begins with the name of the file.
        hint: One sentence: what to do about it.
        needs_package: Whether it could be read if a package were installed.
        needs_any_depth: Whether ``any_depth`` of :func:`decode_image` reads it.
    """

    def __init__(
        self, problem: str, hint: str, needs_package: bool = False, needs_any_depth: bool = False
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint
        self.needs_package = needs_package
        self.needs_any_depth = needs_any_depth


# --- what readers ask for -------------------------------------------------------------------------


@contextmanager
def reading_image(
    name: str,
    otherwise: str,
    error: Callable[[str, str], FulguriteError] = DataError,
    again: str = "Fetch the file again.",
) -> Iterator[None]:
    """Turn whatever decoding raises into one error that names the image.

    Args:
        name: Name of the image.
        otherwise: What else can be done than what the error says.
        error: The error to raise.
        again: What to do about a damaged file.

    Raises:
        FulguriteError: ``error``, if the image is damaged, refused or not there.
        MissingExtraError: The compression of the image needs a package that is not installed.

    Example:
        >>> with reading_image("a.png", "Or remove it."):
        ...     raise ImageRefused("has 2 planes", "Split it.")
        Traceback (most recent call last):
        ...
        fulgurite.errors.DataError: The image a.png has 2 planes. Split it. Or remove it.
    """
    hint = f"{again} {otherwise}"
    with reading(name, "The image", hint, error=error, fault="is damaged or none"):
        try:
            yield
        except ImageRefused as refused:
            problem = f"The image {name} {refused.problem}."
            if refused.needs_package:
                raise MissingExtraError(problem, refused.hint) from refused
            raise error(problem, f"{refused.hint} {otherwise}") from refused
        except FileNotFoundError as missing:
            raise error(f"There is no image {name}.", f"{again} {otherwise}") from missing


def decode_image(
    stream: IO[bytes],
    size: int,
    suffix: str,
    *,
    is_channel: bool,
    any_depth: bool = False,
    is_picture: bool = False,
) -> NDArray[Any]:
    """Decode the file of a microscope image, or of a picture.

    Args:
        stream: The file.
        size: Size of the file [bytes].
        suffix: Suffix of its name, in lower case; it decides the format.
        is_channel: Whether the file is one grey channel, and not all channels of a site.
        any_depth: Accept TIFFs other than of one 16-bit plane, and take the indices of a colour map
            for values.
        is_picture: Refuse TIFFs whose values are not the brightness or the RGB of an upright image.

    Returns:
        Values as the file has them; 0 and 255 for a file of one bit.

    Shape:
        - (H, W), (H, W, C) or (C, H, W).

    Raises:
        ImageRefused: The file holds something else.
        Exception: What the decoder of a damaged file raises.
    """
    if suffix in _TIFF_SUFFIXES:
        return _check_numbers(
            decode_tiff(
                stream, size, is_channel=is_channel, any_depth=any_depth, is_picture=is_picture
            )
        )
    if suffix == ".npy":
        return _check_numbers(read_array(stream, size))
    return decode_picture(stream, is_grey=is_channel, takes_indices=any_depth)


def to_uint8(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale 16-bit values to 8 bits, so that 65535 becomes 255; 8-bit values stay.

    Raises:
        ImageRefused: The values are of another type.

    Example:
        >>> to_uint8(np.array([0, 128, 129, 65535], np.uint16)).tolist()
        [0, 0, 1, 255]
    """
    if pixels.dtype == np.uint16:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ImageRefused(f"holds {pixels.dtype}", "Save it with 8 or 16 bits.")
    return pixels


def to_channels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Turn a grey or colour image into one of 1 or 3 channels; grey of colours is their luma.

    Shape:
        - (H, W) or (H, W, 3) -> (C, H, W).

    Source: ITU-R 601-2, as Pillow computes it.

    Example:
        >>> to_channels(np.full((1, 1), 7, np.uint8), 3).tolist()
        [[[7]], [[7]], [[7]]]
    """
    from PIL import Image

    if pixels.ndim == 2:
        return np.repeat(pixels[None], channels, 0)
    if channels == 1:
        return np.asarray(Image.fromarray(pixels).convert("L"))[None]
    return pixels.transpose(2, 0, 1)


# --- PNG and JPEG ---------------------------------------------------------------------------------


def decode_picture(
    stream: IO[bytes], *, is_grey: bool = False, takes_indices: bool = False
) -> NDArray[Any]:
    """Decode a PNG or JPEG as it is to be looked at: turned as its EXIF data say.

    Transparency is left out; the colours below it stay. CMYK becomes RGB without a colour profile.

    Args:
        stream: The file.
        is_grey: Whether grey values are asked for, so that a colour map is ambiguous.
        takes_indices: Take the indices of a colour map for the grey values.

    Shape:
        - (H, W) grey or (H, W, 3) RGB, uint8 or uint16.

    Raises:
        ImageRefused: It has several frames, a colour map where grey is asked for, or a mode that is
            not read.
        Exception: What Pillow raises.
    """
    with open_picture(stream) as picture:
        if picture.format == "PNG" and getattr(picture, "n_frames", 1) > 1:
            raise ImageRefused(
                f"is an animation of {picture.n_frames} frames", "Save one frame per file."
            )
        depth, colour_type = _png_type(stream) if picture.format == "PNG" else (8, 0)
        if depth == 16 and colour_type in _COLOURS:
            pixels = _decode_deep_colours(stream)
        elif depth == 16 and colour_type == _GREY_ALPHA:
            raise ImageRefused("is a 16-bit grey image with transparency", _SIXTEEN_BITS)
        else:
            pixels = _decode_mode(picture, is_grey, takes_indices)
        return _turn_upright(pixels, _read_orientation(picture))


def _png_type(stream: IO[bytes]) -> tuple[int, int]:
    """Bits of a sample, and the colour type: bytes 24 and 25 of every PNG."""
    position = stream.tell()
    stream.seek(24)
    depth, colour_type = stream.read(2)
    stream.seek(position)
    return depth, colour_type


def _decode_mode(picture: Any, is_grey: bool, takes_indices: bool) -> NDArray[Any]:
    mode = picture.mode
    if mode == "P":
        return _decode_colour_map(picture, is_grey, takes_indices)
    if mode in ("1", "LA"):
        picture = picture.convert("L")
    elif mode in ("RGBA", "CMYK"):
        picture = picture.convert("RGB")
    elif mode not in ("L", "RGB", "I;16"):
        raise ImageRefused(
            f"has pixels of the kind {mode}", "Save it as grey or RGB with 8 bits, or 16-bit grey."
        )
    return np.asarray(picture)


def _decode_colour_map(picture: Any, is_grey: bool, takes_indices: bool) -> NDArray[Any]:
    if takes_indices and is_grey:
        return np.asarray(picture)
    # by way of RGBA, since Pillow warns where a colour of the map is transparent
    colours = np.asarray(picture.convert("RGBA"))[..., :3]
    if not is_grey:
        return colours
    if not (colours == colours[..., :1]).all():
        raise ImageRefused(
            "has a colour map, so that its grey values may be the indices or the brightness of the "
            "colours",
            "Save it as grey (in Fiji: Image > Lookup Tables > Grays), or as RGB.",
            needs_any_depth=True,
        )
    return np.ascontiguousarray(colours[..., 0])


def _decode_deep_colours(stream: IO[bytes]) -> NDArray[np.uint16]:
    """Read 16-bit colours, of which Pillow gives 8 bits: first the upper ones, then the lower."""
    halves = []
    for order in ("16B", "16L"):  # read as little-endian, the lower byte is the upper one
        stream.seek(0)
        with open_picture(stream) as picture:
            picture.tile = [
                tile._replace(args=tile.args.replace("16B", order)) for tile in picture.tile
            ]
            halves.append(np.asarray(picture)[..., :3].astype(np.uint16))
    upper, lower = halves
    return (upper << 8 | lower).astype(np.uint16)


def _read_orientation(picture: Any) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where there is none that can be read."""
    if not _EXIF_KEYS & picture.info.keys():
        return 1
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # viewers show pictures with damaged EXIF data as they are, too
        return 1
    return orientation if orientation in range(1, 9) else 1


def _turn_upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn and mirror an image as its EXIF orientation says."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


# --- TIFF -----------------------------------------------------------------------------------------


def decode_tiff(
    stream: IO[bytes],
    size: int,
    *,
    is_channel: bool = True,
    any_depth: bool = False,
    is_picture: bool = False,
) -> NDArray[Any]:
    """Decode a TIFF: one plane of 16 bits, or with ``any_depth`` all planes of its one series.

    Args:
        stream: The file.
        size: Size of the file [bytes].
        is_channel: Whether the file is one channel: of a set of OME-TIFFs that describe each other,
            only the plane in this file is read then.
        any_depth: Accept other types, several samples of a pixel and several planes.
        is_picture: Refuse values that are not the brightness or the RGB of an upright image.

    Shape:
        - (H, W) uint16; with ``any_depth`` also (P, H, W) or (H, W, C), of any type.

    Raises:
        ImageRefused: It is truncated, or holds something else; its description promises planes
            that it does not hold; or it is compressed in a way that needs imagecodecs.
        Exception: What tifffile raises.
    """
    import tifffile

    # else the description of one file may name others
    with tifffile.TiffFile(stream, _multifile=False) as file:
        page = file.pages.first
        _refuse_truncated([page], size)
        if is_picture:
            _check_colours(page)
        if not any_depth:
            _check_plain(file, page)
        elif len(file.pages) > _MOST_PLANES:
            raise ImageRefused(f"has {len(file.pages):,} planes", "Give one site per file.")
        if not any_depth or (is_channel and len(file.pages) == 1):
            return _decode_pages(page, [page], size)
        series = _choose_series(file)
        return _decode_pages(series, [*series.pages], size)


def _check_plain(file: Any, page: Any) -> None:
    if page.dtype != np.uint16 or page.samplesperpixel != 1 or len(page.shape) != 2:
        raise ImageRefused(
            f"holds {page.dtype} of shape {page.shape}, not one 16-bit channel",
            "Export single-channel 16-bit images.",
            needs_any_depth=True,
        )
    if len(file.pages) > 1:
        raise ImageRefused(
            f"has {len(file.pages)} planes",
            "Give one plane per file.",
            needs_any_depth=True,
        )


def _check_colours(page: Any) -> None:
    """Refuse a page whose values are not those of an upright grey or RGB image."""
    kind = page.photometric
    if kind not in _BRIGHTNESS:
        meaning = _OTHER_COLOURS.get(kind, f"are {getattr(kind, 'name', kind)}")
        raise ImageRefused(f"has values that {meaning}", "Save it as grey, black at 0, or as RGB.")
    orientation = page.tags.valueof(_ORIENTATION, 1)
    if orientation != 1:
        raise ImageRefused(f"is stored turned (orientation {orientation})", "Save it upright.")


def _choose_series(file: Any) -> Any:
    """Return the one series of a file whose planes are all there."""
    # smaller copies of the same image are no series of their own
    others = [s for s in file.series[1:] if not all(p is None or p.is_reduced for p in s.pages)]
    if others:
        raise ImageRefused(
            f"holds {len(others) + 1} series, such as fields of a well", "Give one field per file."
        )
    series = file.series[0]
    absent = sum(plane is None for plane in series.pages)
    if absent:
        raise ImageRefused(
            f"describes {len(series.pages)} planes, of which {absent} are not in it",
            "Give all planes in one file, or one file per channel in columns `path_<channel>`.",
        )
    return series


def _decode_pages(image: Any, pages: list[Any], size: int) -> NDArray[Any]:
    """Decode a page or a series after checking its pages."""
    import tifffile

    _refuse_truncated(pages, size)
    compression, predictor = pages[0].compression, pages[0].predictor
    if compression == tifffile.COMPRESSION.LZMA:  # its decoder has no bound on what it expands to
        raise _refuse_codec(compression)
    try:
        _ = tifffile.TIFF.DECOMPRESSORS[compression], tifffile.TIFF.UNPREDICTORS[predictor]
    except KeyError as error:
        raise _refuse_codec(compression) from error
    check_tiff(pages, size)
    try:
        return np.asarray(image.asarray())
    except ImportError as error:
        raise _refuse_codec(compression) from error


def _refuse_codec(compression: Any) -> ImageRefused:
    name = getattr(compression, "name", None)
    is_absent = name not in (None, "LZMA") and importlib.util.find_spec("imagecodecs") is None
    if is_absent:
        return ImageRefused(
            f"is compressed by {name}, which needs imagecodecs",
            suggest_extra("plates"),
            needs_package=True,
        )
    return ImageRefused(
        f"is compressed by {name or compression}, which is not read",
        "Save it uncompressed or with deflate.",
    )


def _refuse_truncated(pages: list[Any], size: int) -> None:
    for page in pages:
        ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if not ends or max(ends) > size:
            raise ImageRefused(f"is truncated ({size:,} bytes)", "Fetch the file again.")


# --- NumPy ----------------------------------------------------------------------------------------


def _check_numbers(pixels: NDArray[Any]) -> NDArray[Any]:
    if pixels.dtype.kind == "b":
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype.kind not in "iuf":
        raise ImageRefused(f"holds {pixels.dtype}", "Save real numbers, such as uint16 or float32.")
    return pixels
