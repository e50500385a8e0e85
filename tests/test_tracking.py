"""vpm_jax.tracking: boxes on a frame are described like crops, and what the frame cuts off does not count."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_runs import make_run

from vpm_jax import VPM, UserError
from vpm_jax.data.decode import resize
from vpm_jax.matching import embedding
from vpm_jax.tracking import Encoder

RANDOM = np.random.default_rng(3)
FRAME = RANDOM.integers(0, 256, (120, 160, 3), np.uint8)  # RGB
BOXES = [(10, 20, 40, 80), (100, 0, 160, 120), (70.4, 30.2, 100.6, 90.5)]
CROPS = [FRAME[20:80, 10:40], FRAME[0:120, 100:160], FRAME[30:91, 70:101]]


@pytest.fixture(scope="module", params=["stretch", "pad"])
def model(request, tmp_path_factory) -> VPM:
    run = tmp_path_factory.mktemp(request.param) / "run"
    make_run(run, data__fit=request.param, data__aspect=2.0)
    return VPM.load(run)


@pytest.fixture(scope="module")
def encoder(model) -> Encoder:
    return Encoder(model, "rgb")


def test_a_box_is_described_like_its_crop(model, encoder, tmp_path):
    expected = model.embedding(CROPS)
    np.testing.assert_allclose(encoder.encode(FRAME, BOXES), expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    Image.fromarray(CROPS[0]).save(tmp_path / "a.png")
    np.testing.assert_allclose(encoder([str(tmp_path / "a.png"), *CROPS[1:]]), expected, atol=1e-5)
    detections = SimpleNamespace(xyxy=np.array(BOXES, np.float32))
    np.testing.assert_allclose(encoder.extract_features(detections, FRAME), expected, atol=1e-5)


def test_colors_are_those_that_were_said(model, encoder, tmp_path):
    other, frame = Encoder(model, "bgr"), FRAME[..., ::-1]
    np.testing.assert_array_equal(other.encode(frame, BOXES), encoder.encode(FRAME, BOXES))
    Image.fromarray(CROPS[0]).save(tmp_path / "a.png")  # a file says its colors itself
    images = [tmp_path / "a.png", CROPS[1][..., ::-1]]
    np.testing.assert_allclose(other(images), encoder(CROPS[:2]), atol=1e-5)
    for form in (np.asarray, jnp.asarray):
        np.testing.assert_array_equal(other(form(frame)), encoder(FRAME))
    assert not np.allclose(other.encode(FRAME, BOXES), encoder.encode(FRAME, BOXES), atol=1e-3)


# A person of 60 x 30 pixels (twice as high as wide, as the network's input), of whom the frame shows two thirds: the
# box, what it shows, the input's rows of that, and which of the three regions are in the frame.
CUT = {
    "head": ((50, -20, 80, 40), FRAME[0:40, 50:80], slice(21, 64), [False, True, True]),
    "legs": ((50, 80, 80, 140), FRAME[80:120, 50:80], slice(0, 43), [True, True, False]),
}


@pytest.mark.parametrize("side", CUT)
def test_what_the_frame_cuts_off_does_not_count(model, encoder, side):
    box, shown, rows, inside = CUT[side]
    pixels = np.empty((1, 64, 32, 3), np.uint8)
    if model.config.data.fit == "stretch":
        inputs = (resize(shown, (64, 32), model.config.data.resize, pixels[0])[None],)
    else:
        pixels[:] = np.rint(255 * np.array(model.config.data.mean))
        pixels[0, rows] = resize(shown, (43, 32), model.config.data.resize)
        valid = np.zeros((1, *model.inputs(shown)[1].shape[1:]), bool)
        cells = valid.shape[1]
        valid[:, round(rows.start / 64 * cells) : round(rows.stop / 64 * cells)] = True
        inputs = (pixels, valid)
    outputs = model.step(*inputs)
    expected = embedding(np.asarray(outputs["features"])[:1], np.asarray(outputs["visibility"])[:1] * inside)
    vector = encoder.encode(FRAME, [box])
    np.testing.assert_allclose(vector, expected, atol=1e-5)
    np.testing.assert_array_equal(vector.reshape(3, -1).any(1), inside)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_a_changing_number_of_people_compiles_few_programs(model, monkeypatch):
    sizes, step = [], model.step
    monkeypatch.setattr(model, "step", lambda *inputs: sizes.append(len(inputs[0])) or step(*inputs))
    encoder = Encoder(model, "bgr", batch=4)
    for count in range(10):
        assert len(encoder.encode(FRAME, BOXES[:1] * count)) == count
    assert set(sizes) == {1, 2, 4}


@pytest.mark.parametrize("boxes", [[], np.empty((0, 4)), np.empty(0, np.float32)])
def test_nobody_has_no_vectors(model, encoder, boxes):
    nobody = encoder.encode(FRAME, boxes)
    assert nobody.shape == (0, model.embedding(CROPS[0]).shape[1]) and nobody.dtype == np.float32
    assert encoder([]).shape == nobody.shape


@pytest.mark.parametrize(
    "frame, boxes, message",
    [
        (FRAME, [BOXES[0], (10, 20, 10, 80)], r"Box 1 is \[10.0, 20.0, 10.0, 80.0\], .* frame shows nothing"),
        (FRAME, [(40, 20, 10, 80)], "Box 0 .* expected left < right"),
        (FRAME, [(-50, 20, -10, 80)], "a 160 x 120 frame shows nothing"),
        (FRAME, [(np.nan, 20, 10, 80)], "Box 0"),
        (FRAME, [(0, 0, np.inf, 80)], "Box 0"),
        (FRAME, [(0, 0, 10, 80, 0.9)], r"list \[1, 5\], expected numbers \[N, 4\]"),
        (FRAME, BOXES[0], r"tuple \[4\]"),
        (FRAME, SimpleNamespace(xyxy=BOXES), "SimpleNamespace and not an array of numbers, expected numbers"),
        (FRAME, [BOXES[0], (10, 20)], "list and not an array of numbers, expected numbers"),
        (FRAME, None, r"NoneType \[\], expected numbers"),
        (FRAME / 255, BOXES, r"The frame is float64 \(120, 160, 3\), expected uint8"),
        (FRAME[..., 0], BOXES, r"The frame is uint8 \(120, 160\)"),
        (FRAME[None], BOXES, r"The frame is uint8 \(1, 120, 160, 3\)"),
        (FRAME[:0], BOXES, r"The frame is uint8 \(0, 160, 3\)"),
        ("frame.jpg", BOXES, "The frame is str, expected uint8"),
        ([[1], [1, 2]], BOXES, "The frame is list, expected uint8"),
        (None, BOXES, "The frame is NoneType, expected uint8"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(encoder, frame, boxes, message):
    with pytest.raises(UserError, match=message) as error:
        encoder.encode(frame, boxes)
    assert error.value.code in ("bad-frame", "bad-boxes")


def test_an_encoder_takes_a_loaded_model():
    with pytest.raises(UserError, match=r"model is str, expected a VPM: load it with VPM\.load"):
        Encoder("runs/market", "bgr")


def test_colors_must_be_said(model):
    with pytest.raises(TypeError):
        Encoder(model)
    with pytest.raises(UserError, match=r"'bgr' .* or 'rgb'"):
        Encoder(model, "gray")
