"""Decoding against Pillow, damaged files, and resizing."""

import io

import numpy as np
import pytest
from PIL import Image

from vpm_jax.data.decode import FILTERS, decode, resize
from vpm_jax.errors import UserError

ROWS, COLUMNS = np.mgrid[:128, :64]
PICTURE = np.stack([ROWS * 2, COLUMNS * 4, (ROWS + COLUMNS) % 256], -1).astype(np.uint8)


def encode(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


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


def test_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to view"
    assert decode(encode(Image.fromarray(PICTURE), "JPEG", exif=exif), "a.jpg").shape == (128, 64, 3)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.999])
def test_a_truncated_jpeg_is_an_error(kept, options):
    data = encode(Image.fromarray(PICTURE), "JPEG", **options)
    with pytest.raises(UserError, match=r"query/0001\.jpg is a damaged JPEG"):
        decode(data[: int(kept * len(data))], "query/0001.jpg")


def test_a_truncated_png_is_an_error():
    data = encode(Image.fromarray(PICTURE), "PNG")
    with pytest.raises(UserError, match=r"a\.png is a damaged image"):
        decode(data[: len(data) // 2], "a.png")


@pytest.mark.parametrize(("data", "found"), [(b"", "an empty file"), (b"hello world\n", "12 bytes .* b'hello wo'")])
def test_what_is_no_image(data, found):
    with pytest.raises(UserError, match=rf"a\.jpg is not an image: found {found}"):
        decode(data, "a.jpg")


def test_sixteen_bits_are_refused():
    with pytest.raises(UserError, match="more than 8 bits"):
        decode(encode(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "PNG"), "a.png")


@pytest.mark.parametrize("filter", FILTERS)
def test_resize(filter):
    box = PICTURE[10:90, 5:37]  # not contiguous
    out = np.zeros((2, 40, 16, 3), np.uint8)
    assert np.shares_memory(resize(box, (40, 16), filter, out[1]), out)
    assert not out[0].any() and np.array_equal(out[1], resize(box.copy(), (40, 16), filter))
    # Halved, each pixel is near the mean of four (the picture is linear but where its blue wraps around).
    mean = box.reshape(40, 2, 16, 2, 3).mean((1, 3))[..., :2]
    assert np.abs(out[1][2:-2, 2:-2, :2] - mean[2:-2, 2:-2]).max() <= 1


def test_unknown_filter():
    with pytest.raises(UserError, match=r"config\.data\.resize is 'best'"):
        resize(PICTURE, (4, 4), "best")
