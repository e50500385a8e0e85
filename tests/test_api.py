"""vpm_jax.VPM: any image in, the same features whatever its form, batch or padding; matching; loading."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from images import encode
from PIL import Image
from tiny import assert_equal
from tiny_runs import make_run

import vpm_jax
from vpm_jax import VPM, Description, UserError, api, cli, convert, models, region_distance, step
from vpm_jax.images import read

RANDOM = np.random.default_rng(5)
PICTURES = RANDOM.integers(0, 256, (5, 80, 30, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, config, state) of a tiny run with random weights."""
    folder = tmp_path_factory.mktemp("api") / "run"
    return folder, *make_run(folder)


@pytest.fixture(scope="module")
def model(run) -> VPM:
    return VPM.load(run[0])


@pytest.fixture(scope="module")
def described(model) -> Description:
    return model(PICTURES, batch=2)


# ---- What a model says ----


def test_the_model_says_what_its_network_computes(run, model, described):
    _, config, state = run
    pixels = np.stack([model.prepare(picture) for picture in PICTURES])
    variables = step.evaluated(state)
    _, out = jax.jit(models.create(config).apply)(variables, pixels)
    features = np.asarray(out["region_features"], np.float64)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    np.testing.assert_allclose(described.features, features, atol=1e-5)
    np.testing.assert_allclose(described.visibility, out["visibility"], rtol=1e-4)
    np.testing.assert_allclose(described.region_maps, out["probability"], atol=1e-6)
    np.testing.assert_allclose(described.region_maps.sum(axis=(1, 2)), described.visibility, rtol=1e-5)
    assert {getattr(described, name).dtype for name in ("features", "visibility", "region_maps")} == {np.dtype("f4")}
    assert model.grid == vpm_jax.RegionGrid(3, 1) and model.image_size == (64, 32)


@pytest.mark.parametrize("batch", [1, 2, 4, 64])
def test_neither_batch_nor_padding_changes_anything(model, described, batch):
    assert_equal(model(list(PICTURES), batch=batch), described, 1e-5)
    assert_equal(model.features(PICTURES[:1], batch=batch), described[0], 1e-5)


def test_iterators_are_read_as_they_are_used(model, described):
    taken = []

    def endless():
        while True:
            for picture in PICTURES:
                taken.append(len(taken))
                yield picture

    stream = model.stream(endless(), batch=2)
    first, second = next(stream), next(stream)
    stream.close()
    assert_equal(Description.concatenate([first, second]), described[:4])
    assert len(taken) <= 6  # one batch ahead


def test_no_images_have_no_features(model, described):
    nothing = model([])
    assert len(nothing) == 0
    assert_equal(nothing, described[:0])
    assert model.match(nothing, described).shape == (0, 5)
    assert model.embedding(nothing).shape == (0, model.embedding(described).shape[1])


# ---- Images ----

closed = io.BytesIO()
closed.close()


def stream(data: bytes) -> io.BytesIO:
    """An encoded image as it is after writing it: at its end."""
    file = io.BytesIO()
    file.write(data)
    return file


def test_every_form_of_an_image_is_the_same_image(model, tmp_path):
    picture = PICTURES[0]
    image = Image.fromarray(picture)
    (tmp_path / "a.png").write_bytes(encode(image))
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), encode(image), image, picture, encode(image, "BMP")]
    forms += [
        np.dstack([picture, np.full((80, 30), 255, np.uint8)]),
        image.convert("RGBA"),
        encode(image, "WEBP", lossless=True),
    ]
    other = Image.fromarray(PICTURES[1])
    forms += [
        encode(image, "PNG", save_all=True, append_images=[other]),
        bytearray(encode(image)),
    ]  # animated: its first
    forms += [jax.numpy.asarray(picture), stream(encode(image))]
    expected = model.prepare(picture)
    with (tmp_path / "a.png").open("rb") as file:
        for form in [*forms, file]:
            np.testing.assert_array_equal(model.prepare(form), expected, strict=True)
    assert_equal(model(stream(encode(image))), model(picture))  # one image, not a list of lines


def test_a_path_may_start_in_the_home_directory(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read("~/a.png"), PICTURES[0])
    assert cli.path("~/a.png") == tmp_path / "a.png"
    with pytest.raises(UserError, match=r"~nobody\.png cannot be read"):
        read("~nobody.png")


def test_pictures_are_upright_and_what_shines_through_is_white(tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    upright = np.rot90(PICTURES[0], -1)
    (tmp_path / "a.png").write_bytes(encode(Image.fromarray(PICTURES[0]), exif=tags))
    for form in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), Image.open(tmp_path / "a.png")):
        np.testing.assert_array_equal(read(form), upright)
    clear = np.dstack([PICTURES[0], np.zeros((80, 30), np.uint8)])
    for form in (clear, encode(Image.fromarray(clear)), Image.fromarray(clear)):
        assert (read(form) == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "HSV"])
def test_every_usual_mode_is_rgb(mode):
    image = Image.fromarray(PICTURES[0]).convert(mode)
    np.testing.assert_array_equal(read(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1), (1, 1), (1, 1, 3), (1, 400, 3), (700, 1, 4)])
def test_any_size_and_grey(model, shape):
    pixels = RANDOM.integers(0, 256, shape, dtype=np.uint8)
    assert model.prepare(pixels).shape == (64, 32, 3)
    if len(shape) == 2 or shape[2] == 1:
        assert (np.ptp(read(pixels), axis=-1) == 0).all()


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (b"", "image 1 is not an image: found an empty file"),
        (b"no picture", "image 1 is not an image"),
        (encode(Image.fromarray(PICTURES[0]), "JPEG")[:300], "image 1 is a damaged JPEG"),
        (encode(Image.fromarray(PICTURES[0]))[:300], "image 1 is a damaged image"),
        ("nowhere.jpg", "nowhere.jpg cannot be read (No such file or directory)"),
        ("a\0b", "cannot be read (embedded null byte)"),
        (Path(__file__).parent, "tests is a folder"),
        (3, "image 1 is of type int"),
        (None, "image 1 is of type NoneType"),
        (io.StringIO("text"), "image 1 is a file open as text"),
        (closed, "image 1 cannot be read (I/O operation on closed file"),
        (PICTURES[0] / 255, "image 1 is float64 (80, 30, 3), expected uint8"),
        (PICTURES[0][:0], "image 1 is uint8 (0, 30, 3)"),
        (PICTURES[0][..., :2], "image 1 is uint8 (80, 30, 2)"),
        (PICTURES, "image 1 is uint8 (5, 80, 30, 3)"),
        (Image.new("RGB", (0, 9)), "image 1 has 9 x 0 pixels"),
        ("/dev/null", "/dev/null is a pipe or a device"),
        (Image.new("F", (9, 9)), "image 1 has more than 16 bits per channel"),
        # Made in the test alone: they take gigabytes.
        (lambda: Image.new("1", (30000, 30000)), "expected at most 89,478,485"),
        (lambda: encode(Image.new("1", (30000, 30000))), "expected at most 89,478,485"),
        (lambda: encode(Image.new("1", (10000, 10000))), "expected at most 89,478,485"),
        (lambda: encode(Image.new("L", (10000, 10000)), "JPEG"), "image 1 has 10000 x 10000 pixels"),
    ],
)
def test_an_unreadable_image_is_one_sentence_that_names_it(model, bad, sentence):
    with pytest.raises(UserError) as error:
        model([PICTURES[0], bad() if callable(bad) else bad])
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("images", "sentence"), [(np.zeros(3, np.uint8), "1 axes"), (3, "of type int")])
def test_what_are_no_images(model, images, sentence):
    with pytest.raises(UserError, match=sentence):
        model(images)
    for batch in (0, 2.5, "8", None, True):
        with pytest.raises(UserError, match=f"^batch is {batch!r}, expected a whole number of at least 1"):
            model(PICTURES, batch=batch)


# ---- Matching ----


def test_matching_is_equation_4(model, described):
    distance = model.match(described[:2], described)
    expected = region_distance(
        described.features[:2], described.visibility[:2], described.features, described.visibility
    )
    np.testing.assert_array_equal(distance, expected)
    np.testing.assert_allclose(model.match(PICTURES[:2], list(PICTURES)), expected, atol=1e-3)
    np.testing.assert_array_equal(np.diag(distance), 0)
    local, weight = model.match_regions(described[:2], described)
    for q, g, p in np.ndindex(local.shape):
        difference = described.features[q, p].astype(np.float64) - described.features[g, p]
        np.testing.assert_allclose(local[q, g, p], np.linalg.norm(difference), atol=1e-6)
        shares = described.visibility[q].astype(np.float64) * described.visibility[g]
        np.testing.assert_allclose(weight[q, g, p], shares[p] / shares.sum(), atol=1e-6)
    np.testing.assert_allclose((local * weight).sum(-1), distance, atol=1e-5)


def test_matching_follows_the_config(run, described):
    changed = VPM.load(run[0])
    changed.config.match.squared, changed.config.match.visibility = True, "uniform"
    squared = ((described.features[:, None] - described.features[None]) ** 2).sum(-1)
    np.testing.assert_allclose(changed.match(described, described), squared.mean(-1), atol=1e-5)
    np.testing.assert_allclose(changed.match_regions(described, described)[0], squared, atol=1e-5)
    blind = Description(described.features, np.zeros_like(described.visibility), described.region_maps)
    changed.config.match.visibility = "soft"
    assert np.isposinf(changed.match(blind, described)).all()
    assert not changed.match_regions(blind, described)[1].any()


def test_vectors_of_whole_images_rank_as_squared_matching(run, model, described):
    changed = VPM.load(run[0])
    changed.config.match.squared = True
    whole = replace(described, visibility=np.ones_like(described.visibility))
    order = np.argsort(changed.match(described, whole), axis=1)
    for vectors in (model.embedding(described, whole=True), model.embedding(whole)):
        np.testing.assert_array_equal(np.argsort(-model.embedding(described) @ vectors.T, axis=1), order)
    reduction = model.reduction(described, 12)
    short = model.embedding(described, whole=True, reduction=reduction)
    assert short.shape == (5, 12) and reduction.model == model.fingerprint
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-5)
    with pytest.raises(UserError, match="This reduction is another model's"):
        model.embedding(described, reduction=replace(reduction, model="a" * 16))


def test_features_of_another_model_are_refused(model, described):
    other = Description(described.features[:, :2], described.visibility[:, :2], described.region_maps[..., :2])
    with pytest.raises(UserError, match="another model's"):
        model.match(described, other)


# ---- Loading ----


@pytest.mark.parametrize("file", ["market", "market_released"])
def test_a_converted_model_is_the_same_model(tmp_path, file):
    make_run(tmp_path / "run", file)
    model = VPM.load(tmp_path / "run")
    convert.main([str(tmp_path / "run"), "--output", str(tmp_path / "a.safetensors")])
    (path,) = tmp_path.glob("a-*.safetensors")
    again = VPM.load(path)
    assert again.fingerprint == model.fingerprint
    assert_equal(again(PICTURES), model(PICTURES), 1e-6)
    assert again.config.model.locator == model.config.model.locator


def test_the_fingerprint_is_of_what_matters(run, model):
    _, config, state = run
    variables = {"params": dict(state.params), "batch_stats": dict(state.batch_stats)}
    assert api.fingerprint(config, variables) == model.fingerprint == VPM.load(run[0]).fingerprint
    for key, value, matters in [
        ("data.root", "elsewhere", False),
        ("model.dtype", "bfloat16", False),
        ("match.squared", True, False),
        ("model.bn_epsilon", 1e-3, True),
        ("data.resize", "cubic", True),
        ("data.mean", (0.5, 0.5, 0.5), True),
        ("model.locator_groups", 2, True),
    ]:
        changed = config.copy_and_resolve_references()
        tiny.set_key(changed, key, value)
        assert (api.fingerprint(changed, variables) != model.fingerprint) is matters, key
    for path, matters in [(("params", "locator_kernel"), True), (("params", "heads", "bias"), False)]:
        changed_variables = jax.tree_util.tree_map_with_path(
            lambda keys, x, path=path: x + 1e-3 if tuple(k.key for k in keys) == path else x, variables
        )
        assert (api.fingerprint(config, changed_variables) != model.fingerprint) is matters


def test_a_path_without_a_model_is_one_sentence(run, tmp_path):
    convert.main([str(run[0]), "--output", str(tmp_path / "backbone.safetensors"), "--backbone-only"])
    [backbone] = tmp_path.glob("backbone-*.safetensors")
    (tmp_path / "README.md").write_text("# Read me")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "empty").mkdir()
    for name, sentence in [
        ("nowhere", "does not exist: give the workdir"),
        ("backbone.safetensors", rf"does not exist: do you mean .*/{backbone.name}\?$"),
        ("empty", "holds no run"),
        ("text.safetensors", "text.safetensors"),
        (backbone.name, "without VPM's locator"),
        (
            "README.md",
            r"README\.md is not a model: expected the workdir of a training run, or a \.stablehlo or \.safetenso",
        ),
    ]:
        with pytest.raises(UserError, match=sentence) as error:
            VPM.load(tmp_path / name)
        assert "\n" not in str(error.value)
    for wrong in (None, 5, b"run", VPM):
        with pytest.raises(UserError, match=rf"is given as {type(wrong).__name__}, expected the path of"):
            VPM.load(wrong)


def test_weights_that_have_diverged_say_so(run):
    broken = VPM.load(run[0])
    step = broken.step
    broken.step = lambda pixels: {key: x * np.nan for key, x in step(pixels).items()}
    with pytest.raises(UserError, match="not finite"):
        broken(PICTURES)


def test_a_model_pickles(model, described):
    again = pickle.loads(pickle.dumps(model))
    assert repr(again) == repr(model)
    assert_equal(again(PICTURES, batch=2), described)


def test_a_description_is_saved_for_its_model(model, described, tmp_path):
    path = tmp_path / "gallery.npz"
    described.save(path)
    loaded = Description.load(path)
    assert_equal(loaded, described)
    np.testing.assert_array_equal(model.match(loaded, loaded[1:]), model.match(described, described[1:]))
    described[:0].save(path)
    assert len(Description.load(path)) == 0
    for other in (replace(loaded, model="0123456789abcdef"), replace(loaded, model="0123456789abcdef")[1:]):
        with pytest.raises(UserError, match=r"are another model's \(fingerprint 0123456789abcdef") as refused:
            model.match(described, other)
        assert refused.value.code == "other-model"


def test_a_damaged_description_is_refused(described, tmp_path):
    path = tmp_path / "gallery.npz"
    described.save(path)
    data = path.read_bytes()
    np.savez(tmp_path / "shapes.npz", features=np.zeros((2, 3, 4)), visibility=np.zeros((2, 2)), model="a")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text").write_bytes(b"no archive")
    (tmp_path / "short").write_bytes(data[: len(data) // 2])
    (tmp_path / "flipped").write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    central = data.index(b"PK\x01\x02")  # the first file of the zip's directory: its flags, its compression
    for at, value in ((8, 1), (10, 99)):
        (tmp_path / f"zip {at}").write_bytes(data[: central + at] + bytes([value]) + data[central + at + 1 :])
    damaged = ("shapes.npz", "arrays.npz", "array.npy", "text", "short", "flipped", "none", ".", "zip 8", "zip 10")
    for name in damaged:
        with pytest.raises(UserError, match="is not a saved Description") as error:
            Description.load(tmp_path / name)
        assert "pickle" not in str(error.value)  # NumPy's advice to load unsafely


def test_descriptions_are_shown_by_their_shapes(described):
    assert repr(described[:2]) == (
        "Description(2 images: features [2, 3, 32], visibility [2, 3], region_maps [2, 4, 2, 3])"
    )


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
def test_a_forked_process_says_so(run, model):
    child = os.fork()
    if not child:
        for use in (lambda: model(PICTURES), lambda: VPM.load(run[0])):
            try:
                use()
            except UserError as error:
                if error.code == "forked":
                    continue
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_importing_the_package_loads_no_jax():
    code = "import sys, vpm_jax, vpm_jax.regions; assert 'jax' not in sys.modules; vpm_jax.VPM; vpm_jax.Description"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"VPM", "Description"} <= set(dir(vpm_jax))
