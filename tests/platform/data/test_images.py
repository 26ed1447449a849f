"""Images of every mode and depth come back as they are, or are refused with a reason."""

import importlib.util
import io
import warnings

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fulgurite.data.images import (
    ImageRefused,
    decode_image,
    decode_picture,
    decode_tiff,
    reading_image,
    to_channels,
    to_uint8,
)
from fulgurite.errors import DataError, MissingExtraError
from fulgurite.testing.files import png16


def numbers(*shape, dtype=np.uint16, seed=0):
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top, shape, dtype, endpoint=True)


def saved(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return io.BytesIO(out.getvalue())


# --- PNG and JPEG


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_16_bits_are_read_whole_and_scaled_by_257(shape):
    pixels = numbers(*shape)
    decoded = decode_picture(io.BytesIO(png16(pixels)))
    assert decoded.dtype == np.uint16
    assert (decoded == (pixels[..., :3] if len(shape) == 3 else pixels)).all()
    assert (to_uint8(decoded) == np.rint(decoded / 257)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 65535))
def test_scaling_to_8_bits_rounds_to_the_nearest(value):
    assert int(to_uint8(np.array([value], np.uint16))[0]) == round(value / 257)


def test_modes_of_8_bits_keep_their_values():
    grey, colours = numbers(6, 5, dtype=np.uint8), numbers(6, 5, 3, dtype=np.uint8, seed=1)
    alpha = numbers(6, 5, dtype=np.uint8, seed=2)
    assert (decode_picture(saved(Image.fromarray(grey))) == grey).all()
    assert (decode_picture(saved(Image.fromarray(colours))) == colours).all()
    both = Image.fromarray(np.dstack([grey, alpha]), "LA")
    assert (decode_picture(saved(both)) == grey).all()
    both = Image.fromarray(np.dstack([colours, alpha]), "RGBA")
    assert (decode_picture(saved(both)) == colours).all()
    bits = Image.fromarray(grey > 99)
    assert (decode_picture(saved(bits)) == np.where(grey > 99, 255, 0)).all()
    ink = Image.fromarray(numbers(8, 8, 4, dtype=np.uint8), "CMYK")
    stream = saved(ink, "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(stream.getvalue())).convert("RGB"))
    assert (decode_picture(stream) == expected).all()


def test_a_colour_map_is_exact_or_refused_and_never_luma():
    indices = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("P")
    blue = [level for i in range(256) for level in (0, 0, i)]
    indices.putpalette(blue)
    colours = decode_picture(saved(indices))
    assert (colours == np.dstack([np.zeros((16, 16, 2)), np.arange(256).reshape(16, 16)])).all()
    with pytest.raises(ImageRefused, match="colour map"):
        decode_picture(saved(indices), is_grey=True)
    values = decode_picture(saved(indices), is_grey=True, takes_indices=True)
    assert (values.ravel() == np.arange(256)).all()
    indices.putpalette([level for i in range(256) for level in (255 - i,) * 3])
    assert (decode_picture(saved(indices), is_grey=True).ravel() == 255 - np.arange(256)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of Pillow, for a map with transparent colours
        decode_picture(saved(indices, transparency=bytes(range(256))))


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pictures_are_turned_as_their_exif_data_say(orientation, kind):
    image = Image.fromarray(numbers(6, 9, 3, dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = saved(image, kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(stream.getvalue())))
    assert (decode_picture(stream) == np.asarray(expected)).all()


def test_damaged_exif_data_leave_a_picture_as_it_is():
    image = Image.fromarray(numbers(6, 9, 3, dtype=np.uint8))
    stream = saved(image, exif=b"Exif\0\0nothing of the kind")
    assert (decode_picture(stream) == np.asarray(image)).all()


def test_what_pictures_are_not_read_for():
    frames = [Image.fromarray(numbers(4, 4, dtype=np.uint8, seed=s)) for s in range(3)]
    with pytest.raises(ImageRefused, match="3 frames"):
        decode_picture(saved(frames[0], save_all=True, append_images=frames[1:]))
    with pytest.raises(ImageRefused, match="16-bit grey image with transparency"):
        decode_picture(io.BytesIO(png16(numbers(4, 4, 2))))
    for kind in ("GIF", "BMP", "TIFF"):  # whatever the name says
        with pytest.raises(ValueError, match="neither a PNG nor a JPEG"):
            decode_picture(saved(frames[0], kind))


def test_grey_is_repeated_and_colours_become_the_luma_of_pillow():
    grey, colours = numbers(6, 5, dtype=np.uint8), numbers(6, 5, 3, dtype=np.uint8, seed=1)
    assert (to_channels(grey, 3) == grey).all()
    assert to_channels(grey, 3).shape == (3, 6, 5)
    assert (to_channels(colours, 3) == colours.transpose(2, 0, 1)).all()
    assert (to_channels(colours, 1)[0] == np.asarray(Image.fromarray(colours).convert("L"))).all()
    with pytest.raises(ImageRefused, match="float32"):
        to_uint8(np.ones((2, 2), np.float32))


# --- TIFF


def tiff(pixels, **options):
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, **({"photometric": "minisblack"} | options))
    return out.getvalue()


def read(content, **options):
    return decode_tiff(io.BytesIO(content), len(content), **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5)])
def test_any_depth_reads_types_and_planes(dtype, shape):
    pixels = numbers(*shape).astype(dtype)
    for options in ({}, {"imagej": dtype != np.uint32}, {"ome": True}):
        decoded = read(tiff(pixels, **options), is_channel=len(shape) == 2, any_depth=True)
        assert decoded.dtype == dtype
        assert (decoded == pixels).all()


def test_one_plane_is_asked_for_with_the_option_that_takes_more():
    for pixels, words in ((numbers(5, 6, 4), "5 planes"), (numbers(6, 4, dtype=np.uint8), "uint8")):
        with pytest.raises(ImageRefused, match=words) as refused:
            read(tiff(pixels))
        assert refused.value.needs_any_depth


def test_several_series_are_no_site(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tiff", ome=True) as file:
        for seed in range(2):
            file.write(numbers(2, 6, 5, seed=seed), photometric="minisblack")
    with pytest.raises(ImageRefused, match="2 series"):
        read((tmp_path / "a.ome.tiff").read_bytes(), is_channel=False, any_depth=True)


@pytest.mark.parametrize("ome", [False, True])
def test_smaller_copies_of_a_plane_are_no_series(tmp_path, ome):
    pixels = numbers(64, 64)
    with tifffile.TiffWriter(tmp_path / "a.tiff", ome=ome) as file:
        file.write(pixels, photometric="minisblack", subifds=1 if ome else 0, tile=(16, 16))
        file.write(pixels[::2, ::2], photometric="minisblack", subfiletype=1, tile=(16, 16))
    decoded = read((tmp_path / "a.tiff").read_bytes(), is_channel=False, any_depth=True)
    assert (decoded == pixels).all()


def test_promised_planes_that_are_absent_are_not_zeros():
    content = tiff(numbers(2, 6, 5), ome=True, metadata={"axes": "CYX"})
    longer = content.replace(b'SizeC="2"', b'SizeC="4"')
    assert longer != content
    with pytest.raises(ImageRefused, match="describes 4 planes, of which 2 are not in it"):
        read(longer, is_channel=False, any_depth=True)


def test_a_set_of_files_is_read_by_channel_at_any_depth():
    single = tiff(numbers(6, 5), ome=True, metadata={"axes": "YX"})
    of_two = single.replace(b'SizeC="1"', b'SizeC="2"')  # the other plane is in another file
    assert of_two != single
    assert (read(of_two, is_channel=True, any_depth=True) == numbers(6, 5)).all()
    assert (read(of_two, is_channel=True) == numbers(6, 5)).all()
    with pytest.raises(ImageRefused, match="1 are not in it") as refused:
        read(of_two, is_channel=False, any_depth=True)
    assert "path_<channel>" in refused.value.hint


def test_each_plane_must_be_whole():
    content = tiff(numbers(3, 30, 30))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        tag = file.pages[2].tags["StripOffsets"]
    spoilt = bytearray(content)
    size = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
    spoilt[tag.valueoffset : tag.valueoffset + size] = (len(content) - 5).to_bytes(size, "little")
    with pytest.raises(ImageRefused, match="truncated"):
        read(bytes(spoilt), is_channel=False, any_depth=True)


@pytest.mark.skipif(
    importlib.util.find_spec("imagecodecs") is not None, reason="imagecodecs is installed"
)
@pytest.mark.parametrize("any_depth", [False, True])
@pytest.mark.parametrize(
    ("code", "name"), [(5, "LZW"), (50000, "ZSTD"), (7, "JPEG"), (33003, "APERIO")]
)
def test_a_codec_that_is_not_installed_is_named(any_depth, code, name):
    content = bytearray(tiff(numbers(6, 5)))
    with tifffile.TiffFile(io.BytesIO(bytes(content))) as file:
        offset = file.pages.first.tags["Compression"].valueoffset
    content[offset : offset + 2] = code.to_bytes(2, "little")
    with (
        pytest.raises(
            MissingExtraError, match=r"imagecodecs.*pip install 'fulgurite\[plates\]'"
        ) as error,
        reading_image("a.tiff", "Or leave it out."),
    ):
        read(bytes(content), any_depth=any_depth)
    assert "a.tiff" in str(error.value)
    assert name in str(error.value)


def test_a_codec_that_is_not_read_is_no_damage():
    content = bytearray(tiff(numbers(6, 5)))
    with tifffile.TiffFile(io.BytesIO(bytes(content))) as file:
        offset = file.pages.first.tags["Compression"].valueoffset
    content[offset : offset + 2] = tifffile.COMPRESSION.LZMA.to_bytes(2, "little")
    with pytest.raises(ImageRefused, match="compressed by LZMA, which is not read") as refused:
        read(bytes(content))
    assert refused.value.hint == "Save it uncompressed or with deflate."


# --- NumPy, names of errors


def written(pixels, **options):
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, **options)
    return io.BytesIO(out.getvalue()), out.tell()


COLOURS = np.arange(3 * 256, dtype=np.uint16).reshape(3, 256)
TURNED = [(274, 3, 1, 6, True)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"photometric": "miniswhite"}, "values that are white at 0"),
        ({"photometric": "palette", "colormap": COLOURS}, "are indices of a colour map"),
        ({"photometric": "cielab"}, "are CIELAB"),
        ({"extratags": TURNED}, r"stored turned \(orientation 6\)"),
    ],
)
def test_a_tiff_that_is_no_upright_picture_is_refused_as_one(options, words):
    shape = (4, 5, 3) if options.get("photometric") == "cielab" else (4, 5)
    pixels = numbers(*shape, dtype=np.uint8)
    stream, size = written(pixels, **options)
    with pytest.raises(ImageRefused, match=words):
        decode_image(stream, size, ".tif", is_channel=False, any_depth=True, is_picture=True)
    stream.seek(0)  # as measurements they are what is stored
    assert (decode_image(stream, size, ".tif", is_channel=False, any_depth=True) == pixels).all()


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_grey_and_rgb_tiffs_are_pictures(shape):
    pixels = numbers(*shape, dtype=np.uint8)
    stream, size = written(pixels, photometric="rgb" if len(shape) == 3 else "minisblack")
    decoded = decode_image(
        stream, size, ".tif", is_channel=len(shape) == 2, any_depth=True, is_picture=True
    )
    assert (decoded == pixels).all()


def test_a_tiff_of_one_bit_is_0_and_255():
    bits = numbers(4, 5) > 30000
    stream, size = written(bits, photometric="minisblack")
    decoded = decode_image(stream, size, ".tif", is_channel=True, any_depth=True)
    assert decoded.dtype == np.uint8
    assert (decoded == 255 * bits).all()


def test_arrays_of_another_byte_order_are_read():
    out = io.BytesIO()
    np.save(out, np.array([[1, 256]], ">u2"))
    decoded = decode_image(io.BytesIO(out.getvalue()), out.tell(), ".npy", is_channel=True)
    assert decoded.dtype == np.uint16
    assert decoded.tolist() == [[1, 256]]
    assert to_uint8(decoded).tolist() == [[0, 1]]


def test_arrays_are_numbers():
    def array(values):
        out = io.BytesIO()
        np.save(out, values)
        size = len(out.getvalue())
        return decode_image(io.BytesIO(out.getvalue()), size, ".npy", is_channel=True)

    assert array(np.array([[True, False]])).tolist() == [[255, 0]]
    assert array(np.ones((2, 2), np.float32)).dtype == np.float32
    for values in (np.ones((2, 2), complex), np.array([["a"]])):
        with pytest.raises(ImageRefused, match="holds"):
            array(values)


def test_each_fault_names_the_image_and_what_to_do():
    for raised, words in (
        (ImageRefused("has 2 planes", "Split it."), r"a\.png has 2 planes\. Split it\. Or not\."),
        (FileNotFoundError("gone"), r"There is no image a\.png\. Fetch the file again\. Or not\."),
        (EOFError("it ends"), r"a\.png is damaged or none \(it ends\)\. Fetch"),
    ):
        with pytest.raises(DataError, match=words), reading_image("a.png", "Or not."):
            raise raised
