"""Pixels against Pillow and torchvision's conventions: what a user of PyTorch must know to compare numbers.

Measured over 60 queries of Market-1501, cut at gamma 1 and 0.5 and brought to 384 x 128, as mean / max grey levels:

    decoding (libjpeg-turbo against Pillow)        0     / 0
    pil_bilinear, pil_bicubic                      0     / 0    Pillow itself
    linear   against Pillow's bilinear             0.28  / 1    rounding
    cubic    against Pillow's bicubic              0.78  / 15   a = -0.75 in OpenCV, -0.5 in Pillow
    area     against Pillow's bilinear             3.9   / 79   it repeats pixels when it enlarges
    linear   when it shrinks 128 x 64 by two       2.9   / 43   Pillow smooths before it shrinks, OpenCV does not
"""

from __future__ import annotations

import io
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import Given

from vpm_jax import models
from vpm_jax.config import default, set_key
from vpm_jax.data import synthetic
from vpm_jax.data.decode import decode, resize
from vpm_jax.data.pipeline import eval_batches
from vpm_jax.data.sources import load_dataset
from vpm_jax.regions import Crop, pixel_box

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A few synthetic pedestrians in the Market-1501 layout."""
    return synthetic.ensure(tmp_path_factory.mktemp("pedestrians"), 0, 2, 3, 2, 2)


@pytest.fixture(scope="module")
def files(folder) -> list[Path]:
    return sorted((folder / "query").glob("*.jpg"))


def with_pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def apart(ours, theirs) -> tuple[float, int]:
    """Mean and largest difference in grey levels."""
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    return float(difference.mean()), int(difference.max())


def assert_decoded_as_pillow(paths) -> None:
    assert len(paths) >= 6
    for path in paths:
        data = path.read_bytes()
        assert apart(decode(data, path.name), with_pillow(data)) == (0, 0), path


def test_decoding(files):
    assert_decoded_as_pillow(files)


def test_decoding_of_market(market):
    if not market.is_dir():
        pytest.skip("reads files of a folder")
    assert_decoded_as_pillow(sorted((market / "query").glob("*.jpg"))[::100])


@pytest.mark.parametrize(
    "filter, pillow, size, mean, most",
    [
        ("pil_bilinear", "bilinear", (384, 128), 0, 0),
        ("pil_bicubic", "bicubic", (384, 128), 0, 0),
        ("pil_bilinear", "bilinear", (64, 32), 0, 0),
        ("linear", "bilinear", (384, 128), 0.35, 1),
        ("cubic", "bicubic", (384, 128), 1, 20),
    ],
)
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_resizing(files, gamma, filter, pillow, size, mean, most):
    differences = []
    for path in files:
        image = decode(path.read_bytes(), path.name)
        top, left, bottom, right = pixel_box(Crop(0, 0, gamma, 1), *image.shape[:2])
        # Pillow's crop and the slice of the array are the same pixels; its sizes are (width, height).
        theirs = with_pillow(path.read_bytes()).crop((left, top, right, bottom)).resize(size[::-1], PILLOW[pillow])
        differences.append(apart(resize(image[top:bottom, left:right], size, filter), theirs))
    assert np.mean([d[0] for d in differences]) <= mean and max(d[1] for d in differences) <= most


def test_opencv_does_not_smooth_before_it_shrinks(files):
    """So a number that must match PyTorch's at less than the images' size needs Pillow's filter."""
    image = decode(files[0].read_bytes(), files[0].name)
    theirs = Image.fromarray(image).resize((32, 64), PILLOW["bilinear"])
    mean, most = apart(resize(image, (64, 32), "linear"), theirs)
    assert mean > 0.5 and most > 5


def test_what_the_backbone_sees(folder, files):
    """File to normalised floats: crop, exact Pillow filter, ToTensor, Normalize; float32 rounding apart."""
    config = default()
    for key, value in {
        "data.root": str(folder),
        "data.resize": "pil_bilinear",
        "data.height": 48,
        "data.width": 24,
        "model.dtype": "float32",
        "model.num_identities": 2,
        "eval.batch": 4,
    }.items():
        set_key(config, key, value)
    query = load_dataset(config.data).query
    assert [Path(name).name for name in query.names] == [path.name for path in files]
    model = models.create(config).clone(backbone=Given())
    pixels = np.concatenate([b["image"][b["real"]] for b in eval_batches(config, query, "top", 0.7)])
    # One function, of which only the normalisation is left to compile.
    ours = jax.jit(lambda x: model.init_with_output(jax.random.key(0), x)[0][1]["feature_map"])(pixels)

    for path, image, floats in zip(files, pixels, np.asarray(ours), strict=True):
        theirs = with_pillow(path.read_bytes())
        theirs = theirs.crop((0, 0, theirs.width, round(0.7 * theirs.height)))
        theirs = np.asarray(theirs.resize((24, 48), PILLOW["bilinear"]))
        assert apart(image, theirs) == (0, 0)
        mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
        np.testing.assert_allclose(floats, (theirs / 255 - mean) / std, rtol=0, atol=2e-6)
