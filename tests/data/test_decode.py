"""Decoding against Pillow, damaged files, and resizing."""

import io
import warnings

import numpy as np
import pytest
from images import PICTURE, encode, oriented, with_size
from PIL import Image, ImageOps
from raising import raises

from vpm_jax.data.decode import FILTERS, decode, from_pillow, resize
from vpm_jax.errors import UserError


def pillow(data):
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    ("form", "mode"),
    [("JPEG", mode) for mode in ("RGB", "L", "CMYK")]
    + [("PNG", mode) for mode in ("RGB", "L", "P", "RGBA", "LA", "1")]
    + [("TIFF", "CMYK"), ("BMP", "RGB")],
)
def test_any_usual_image_is_rgb(form, mode):
    data = encode(Image.fromarray(PICTURE).convert(mode), form)
    image = decode(data, "a.jpg")
    assert image.shape == (128, 64, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - pillow(data)).max() <= 1  # CMYK is rounded once more


def test_rgb_channel_order():
    image = decode(encode(Image.new("RGB", (16, 16), (250, 100, 3)), "JPEG"), "a.jpg")
    assert np.abs(image.reshape(-1, 3).mean(0) - (250, 100, 3)).max() < 3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_ignored_unless_asked(form):
    data = oriented(form, 6, lossless=True)  # "rotate by 90 degrees to view"
    assert decode(data, "a").shape == (128, 64, 3)
    np.testing.assert_array_equal(decode(data, "a", upright=True), np.rot90(decode(data, "a"), -1))


@pytest.mark.parametrize("value", range(10))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_orientation_is_that_of_pillow(form, value):
    data = oriented(form, value)
    shown = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.abs(decode(data, "a", upright=True).astype(int) - shown).max() <= 1
    assert np.abs(from_pillow(Image.open(io.BytesIO(data)), "a").astype(int) - shown).max() <= 1


def test_damaged_exif_changes_nothing():
    data = oriented("JPEG", 6)
    at = data.index(b"Exif")
    broken = data[: at + 6] + b"\xff" * 20 + data[at + 26 :]
    np.testing.assert_array_equal(decode(broken, "a", upright=True), decode(broken, "a"))
    # A short JFIF header: libjpeg-turbo decodes the file, Pillow does not open it.
    at = data.index(b"JFIF")
    broken = data[: at - 2] + b"\0\6JFIF" + data[at + 14 :]
    np.testing.assert_array_equal(decode(broken, "a", upright=True), decode(broken, "a"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped_or_shown_on_white(mode):
    image = Image.fromarray(PICTURE).convert("RGBA")
    image.paste((200, 30, 30, 0), (0, 0, 64, 60))  # no colour that anyone sees
    data = encode(image.quantize() if mode == "P" else image.convert(mode), "PNG")
    plain, seen = decode(data, "a"), decode(data, "a", upright=True)
    assert (seen[:60] == 255).all() and (plain[:60] != 255).all()
    np.testing.assert_array_equal(plain[60:], seen[60:])


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_picture_of_an_animation(form):
    frames = [Image.new("RGB", (20, 30), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], duration=100)
    for upright in (False, True):
        image = decode(data, "a", upright)
        assert image.shape == (30, 20, 3)
        assert np.abs(image.astype(int) - (250, 0, 0)).max() < 12


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF"])
def test_one_pixel(form):
    data = encode(Image.new("RGB", (1, 1), (200, 200, 200)), form)
    for upright in (False, True):
        np.testing.assert_allclose(decode(data, "a", upright), np.full((1, 1, 3), 200), atol=2)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize(("height", "width"), [(12_000, 9_000), (65_000, 65_000)])  # within and past twice the limit
@pytest.mark.parametrize("warnings_are_errors", [False, True])
def test_bombs_are_refused_before_memory_is_taken(form, height, width, warnings_are_errors):
    data = with_size(encode(Image.fromarray(PICTURE), form), height, width)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("error" if warnings_are_errors else "ignore", Image.DecompressionBombWarning)
        with pytest.raises(UserError, match=r"bomb has .* pixels, expected at most 89,478,485 \(Pillow's limit"):
            decode(data, "bomb")
    assert not heard


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_lower_limit_of_pixels(form):
    data = encode(Image.fromarray(PICTURE), form)
    assert decode(data, "a", most=128 * 64).shape == (128, 64, 3)
    with pytest.raises(UserError, match=r"^a has 128 x 64 pixels, expected at most 8,191: make"):
        decode(data, "a", most=128 * 64 - 1)


def test_filler_before_the_frame_of_a_jpeg_is_passed_over():
    data = encode(Image.fromarray(PICTURE), "JPEG")
    at = data.index(b"\xff\xc0")
    padded = data[:at] + b"\xff" * 5 + data[at:]
    np.testing.assert_array_equal(decode(padded, "a"), decode(data, "a"))
    with pytest.raises(UserError, match="Pillow's limit"):
        decode(data[:at] + b"\xff" * 5 + with_size(data, 65_000, 65_000)[at:], "a")


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.99])
def test_a_truncated_jpeg_is_an_error(kept, options):
    data = encode(Image.fromarray(PICTURE), "JPEG", **options)
    with pytest.raises(UserError, match=r"query/0001\.jpg is a damaged JPEG"):
        decode(data[: int(kept * len(data))], "query/0001.jpg")


@pytest.mark.parametrize("at", range(60, 120, 20))
def test_whatever_byte_of_a_png_changes_it_is_an_error(at):
    data = bytearray(encode(Image.fromarray(PICTURE)))
    data[at] ^= 1
    with raises("damaged-image"):
        decode(bytes(data), "a.png")


def test_a_truncated_png_is_an_error():
    data = encode(Image.fromarray(PICTURE), "PNG")
    with pytest.raises(UserError, match=r"a\.png is a damaged image"):
        decode(data[: len(data) // 2], "a.png")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"  # Pillow would start Ghostscript


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "an empty file"),
        (b"hello world\n", "12 bytes .* b'hello wo'"),
        (EPS, "70 bytes .* b'%!PS-Ado'"),
        (encode(Image.fromarray(PICTURE), "ICO"), r"\d+ bytes"),
    ],
)
def test_other_data_are_not_images(data, found):
    with pytest.raises(UserError, match=rf"a\.jpg is not an image: found {found}"):
        decode(data, "a.jpg")


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_of_sixteen_bits_the_upper_eight_are_kept(form):
    deep = encode(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), form)
    assert (decode(deep, "a") == 40_000 // 256).all()


def test_deeper_images_are_refused():
    with pytest.raises(UserError, match="more than 16 bits"):
        decode(encode(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"), "a.tif")


@pytest.mark.parametrize("lost", [1, 2])
def test_a_jpeg_may_lack_its_end_marker(lost):
    data = encode(Image.fromarray(PICTURE), "JPEG")
    np.testing.assert_array_equal(decode(data[:-lost], "a"), decode(data, "a"))
    for more in range(3, 12):
        with raises("damaged-image"):
            decode(data[:-more], "a")


def test_a_progressive_jpeg_cut_between_its_scans_is_an_error():
    data = encode(Image.fromarray(PICTURE), "JPEG", progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    for at in [*scans[1:], len(data) - 2]:
        with raises("damaged-image"):
            decode(data[:at], "a")


@pytest.mark.parametrize("filter", FILTERS)
def test_resize(filter):
    box = PICTURE[10:90, 5:37]  # not contiguous
    out = np.zeros((2, 40, 16, 3), np.uint8)
    assert np.shares_memory(resize(box, (40, 16), filter, out[1]), out)
    assert not out[0].any() and np.array_equal(out[1], resize(box.copy(), (40, 16), filter))
    # Halved, each pixel is near the mean of four (the picture is linear but where its blue wraps around).
    mean = box.reshape(40, 2, 16, 2, 3).mean((1, 3))[..., :2]
    assert np.abs(out[1][2:-2, 2:-2, :2] - mean[2:-2, 2:-2]).max() <= 1
