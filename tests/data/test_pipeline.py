"""The grain pipelines: batches as a function of the step, pixels that agree with their labels, padding, errors."""

import multiprocessing
from typing import NamedTuple

import numpy as np
import pytest
from images import png, small_config, split_of

from vpm_jax.data import pipeline
from vpm_jax.data.decode import resize
from vpm_jax.data.pipeline import cut, eval_batches, train_batches
from vpm_jax.data.sampling import Sampler
from vpm_jax.errors import UserError
from vpm_jax.regions import CROPS, Crop, RegionGrid, pixel_box, project_regions


def noise(n, height=40, width=20):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)


def assert_equal(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert type(one[key]) is type(other[key]) is np.ndarray
            assert one[key].dtype == other[key].dtype and np.array_equal(one[key], other[key]), key


def test_a_batch_is_a_function_of_the_step():
    split, config = split_of(noise(20)), small_config(threads=0)
    batches = list(train_batches(config, split, 0, 20))
    assert len(batches) == 20  # both stages
    assert len({batch["image"].tobytes() for batch in batches}) == 20
    assert_equal(list(train_batches(config, split, 13, 20)), batches[13:])
    assert list(train_batches(config, split, 20, 20)) == []
    hosts = [list(train_batches(config, split, 5, 15, host, 4)) for host in range(4)]
    joined = [{key: np.concatenate([h[key] for h in batch]) for key in batch[0]} for batch in zip(*hosts, strict=True)]
    assert_equal(joined, batches[5:15])
    config.data.threads = 3
    assert_equal(list(train_batches(config, split, 0, 20)), batches)


@pytest.mark.parametrize("threads, workers, expected", [(0, 0, 6), (0, 4, 2), (3, 0, 3), (3, 4, 3)])
def test_threads_follow_the_cores(monkeypatch, threads, workers, expected):
    """Without data.threads, the processes share the cores, and no process has more than eight."""
    split, config, asked = split_of(noise(20)), small_config(threads=threads, workers=workers), []
    options = pipeline.grain.ReadOptions
    monkeypatch.setattr(pipeline.grain, "ReadOptions", lambda **keys: asked.append(keys["num_threads"]) or options())
    for cores, most in ((6, expected), (100, threads or 8)):
        monkeypatch.setattr(pipeline, "threads", lambda cores=cores: cores)
        train_batches(config, split, 0, 20).close()
        assert asked.pop() == most


def test_worker_processes_change_nothing():
    split, config = split_of(noise(20)), small_config()
    batches = list(train_batches(config, split, 7, 12))
    config.data.workers = 2
    assert_equal(list(train_batches(config, split, 7, 12)), batches)


def test_what_a_batch_holds():
    config = small_config(crop="any", flip=0.5)
    config.model.update(grid=(3, 2), stem="3x3")
    config.loss.min_cells = 2
    images = noise(20, 41, 23)
    split = split_of(images)
    for step, batch in enumerate(train_batches(config, split, 0, 20)):
        expected = Sampler(config, split.labels()).plan(step)
        assert batch["image"].shape == (8, 24, 12, 3) and batch["image"].dtype == np.uint8
        assert batch["labels"].shape == (8, 12, 6) and batch["labels"].dtype == np.int32
        assert batch["visible"].shape == (8, 6) and batch["visible"].dtype == bool
        assert batch["identity"].dtype == batch["camera"].dtype == np.int32
        assert np.array_equal(batch["identity"], expected.indices // 4)
        assert np.array_equal(batch["camera"], expected.indices % 6)
        for row, (index, flip, crop) in enumerate(zip(*expected[:3], strict=True)):
            image = images[index][:, ::-1] if flip else images[index]
            top, left, bottom, right = pixel_box(crop, 41, 23)
            pixels = resize(np.ascontiguousarray(image[top:bottom, left:right]), (24, 12))
            assert np.array_equal(batch["image"][row], pixels)
            actual = Crop(top / 41, left / 23, (bottom - top) / 41, (right - left) / 23)
            labels, visible = project_regions(actual, RegionGrid(3, 2), (12, 6), 2)
            assert np.array_equal(batch["labels"][row], labels) and np.array_equal(batch["visible"][row], visible)


class Painted(NamedTuple):
    """A batch of images painted with 20 times the number of the region, on a map of 24 x 8 cells."""

    row: np.ndarray  # of each cell's label
    col: np.ndarray
    expected: np.ndarray  # the value that each cell's label stands for
    low: np.ndarray  # the values in the middle of each cell
    high: np.ndarray


def painted(grid, steps, **data):
    rows, cols = grid
    height, width, h, w = 96, 48, 24, 8
    region = np.arange(height)[:, None] * rows // height * cols + np.arange(width)[None] * cols // width
    config = small_config(**data)
    config.data.update(height=16 * h, width=16 * w)
    config.model.update(grid=grid, stem="7x7", strides=(1, 2, 2))
    split = split_of([np.repeat(20 * region[..., None].astype(np.uint8), 3, -1)] * 20)
    for step, batch in enumerate(train_batches(config, split, 0, steps)):
        flips = Sampler(config, split.labels()).plan(step).flips
        row, col = np.divmod(batch["labels"], cols)
        expected = 20 * (row * cols + np.where(flips[:, None, None], cols - 1 - col, col))
        cells = batch["image"][..., 0].reshape(8, h, 16, w, 16)[:, :, 6:10, :, 6:10]
        for labels, visible in zip(batch["labels"], batch["visible"], strict=True):
            assert np.array_equal(np.unique(labels), np.flatnonzero(visible))  # the regions that some cell belongs to
        yield Painted(row, col, expected, cells.min((2, 4)), cells.max((2, 4)))


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("grid", [(6, 1), (3, 2)])
def test_pixels_agree_with_their_labels(crop, grid):
    """The middle of a cell shows the region that its label names."""
    sure = wrong = 0
    for found in painted(grid, 4, crop=crop):
        flat = found.low == found.high  # not on the blur between two regions
        sure, wrong = sure + flat.sum(), wrong + (flat & (found.low != found.expected)).sum()
    assert sure > 0.7 * 4 * found.low.size and wrong == 0


@pytest.mark.parametrize("crop", ["top", "left", "any", "none"])
@pytest.mark.parametrize("grid", [(6, 1), (3, 2)])
def test_labels_follow_a_moved_crop_exactly(crop, grid):
    """As above, where the boxes reach past the image: what lies there is white and belongs to the nearest region."""
    sure = wrong = white = 0
    for found in painted(grid, 6, crop=crop, pad=0.4, mean=(1.0, 1.0, 1.0)):
        beyond, flat = found.low == 255, (found.low == found.high) & (found.low < 255)
        white, sure = white + beyond.sum(), sure + flat.sum()
        wrong += (flat & (found.low != found.expected)).sum()
        for row, col, outside in zip(found.row, found.col, beyond, strict=True):
            # Down each column and along each row, a white cell has the label of the last cell inside.
            for axis, line in ((row[:, 0], outside.all(1)), (col[0], outside.all(0))):
                inside = np.flatnonzero(~line)
                assert (axis[: inside[0]] == axis[inside[0]]).all() and (axis[inside[-1] :] == axis[inside[-1]]).all()
    assert sure > 0.4 * 6 * beyond.size and white > 0.1 * 6 * beyond.size and wrong == 0


@pytest.mark.parametrize("hides", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(
    ("shape", "model"),
    [((6, 3), {"grid": (3, 2)}), ((12, 1), {"grid": (3, 1), "stem": "3x3", "locator": "row"})],
)
def test_erasing_fills_a_rectangle_and_hides_the_regions_it_covers(hides, shape, model):
    config = small_config(crop="any")
    config.model.update(model)
    split = split_of(noise(20))
    plain = list(train_batches(config, split, 0, 20))
    config.data.update(erasing=0.7, erasing_area=(0.1, 0.5), erasing_hides=hides)
    hidden = 0
    for step, (before, batch) in enumerate(zip(plain, train_batches(config, split, 0, 20), strict=True)):
        assert np.array_equal(batch["labels"], before["labels"])
        for row, (top, left, bottom, right) in enumerate(Sampler(config, split.labels()).plan(step).erased):
            expected = before["image"][row].copy()
            expected[top:bottom, left:right] = np.rint(255 * np.array(config.data.mean))
            assert np.array_equal(batch["image"][row], expected)
            erased = np.zeros((24, 12), bool)
            erased[top:bottom, left:right] = True
            labels = before["labels"][row].repeat(24 // shape[0], 0).repeat(12 // shape[1], 1)  # of every pixel
            for region, shown in enumerate(before["visible"][row]):
                lost = shown and hides < 1 and erased[labels == region].mean() > hides
                assert batch["visible"][row, region] == (shown and not lost)
                hidden += lost
    assert (hidden > 20) == (hides < 1)


def test_jitter_multiplies_brightness_and_contrast():
    config, split = small_config(crop="none"), split_of(noise(20))
    plain = list(train_batches(config, split, 0, 3))
    config.data.update(jitter=0.3, erasing=0.5)
    for step, (before, batch) in enumerate(zip(plain, train_batches(config, split, 0, 3), strict=True)):
        drawn = Sampler(config, split.labels()).plan(step)
        for row, ((brightness, contrast), box) in enumerate(zip(drawn.jitters, drawn.erased, strict=True)):
            expected = np.clip(contrast * (brightness * before["image"][row] - 128.0) + 128, 0, 255)
            outside = np.ones((24, 12), bool)  # an erased rectangle keeps the mean colour
            outside[box[0] : box[2], box[1] : box[3]] = False
            assert np.abs(batch["image"][row] - expected)[outside].max() <= 0.5


def test_a_row_locator_has_one_column():
    config = small_config()
    config.model.locator = "row"
    batch = next(train_batches(config, split_of(noise(20)), 0, 1))
    assert batch["labels"].shape == (8, 6, 1)


@pytest.mark.parametrize("box", [(-3, -5, 17, 6), (20, 10, 43, 27), (-1, -2, 41, 22), (5, -4, 9, 24)])
@pytest.mark.parametrize("flip", [False, True])
def test_past_the_image_lies_the_filling_colour(box, flip):
    image, (top, left, bottom, right) = noise(1)[0], box
    fill = np.array([7, 70, 200], np.uint8)
    wide = np.stack([np.pad(image[..., c], 9, constant_values=fill[c]) for c in range(3)], -1)
    wide = wide[:, ::-1] if flip else wide
    assert np.array_equal(cut(image, box, flip, fill), wide[top + 9 : bottom + 9, left + 9 : right + 9])


@pytest.mark.parametrize("box", [(0, 0, 40, 20), (3, 5, 17, 6), (10, 0, 40, 13)])
def test_flip_comes_before_the_crop(box):
    image, (top, left, bottom, right) = noise(1)[0], box
    assert np.array_equal(cut(image, box, True), image[:, ::-1][top:bottom, left:right])
    assert np.array_equal(cut(image, box, False), image[top:bottom, left:right])


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_sees_every_image_once_in_order(hosts):
    config, images = small_config(), noise(21, 24, 12)  # of the network's size: pixels pass unchanged
    config.eval.batch = 8
    split = split_of(images)
    parts = [list(eval_batches(config, split, host_index=host, host_count=hosts)) for host in range(hosts)]
    batches = [{key: np.concatenate([p[key] for p in batch]) for key in batch[0]} for batch in zip(*parts, strict=True)]
    assert len(batches) == 3
    whole = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    assert np.array_equal(whole["real"], np.arange(24) < 21)
    assert np.array_equal(whole["image"][:21], images) and not whole["image"][21:].any()
    assert np.array_equal(whole["identity"], [*split.identity, -1, -1, -1])
    assert np.array_equal(whole["camera"], [*split.camera, -1, -1, -1])


def test_evaluation_crops_at_a_fixed_gamma():
    config, images = small_config(), noise(10)
    batch = next(eval_batches(config, split_of(images), "bottom", 0.7))
    expected = [resize(np.ascontiguousarray(image[12:]), (24, 12)) for image in images]
    assert np.array_equal(batch["image"][:10], expected)


def test_evaluation_with_a_drawn_crop():
    config, images = small_config(), noise(40)
    first = next(eval_batches(config, split_of(images), "bilateral", 0.5))
    config.seed = 7
    assert_equal([next(eval_batches(config, split_of(images), "bilateral", 0.5))], [first])
    tops, bottoms = (
        next(eval_batches(config, split_of(images), crop, 0.5))["image"][:40] for crop in ("top", "bottom")
    )
    is_top, is_bottom = ((first["image"][:40] == other).all((1, 2, 3)) for other in (tops, bottoms))
    assert (is_top ^ is_bottom).all() and 8 < is_top.sum() < 32


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_sentence(workers):
    images = [png(image) for image in noise(20)]
    images[9] = images[9][:300]
    config = small_config(workers=workers)
    with pytest.raises(UserError, match=r"0009\.png is a damaged image") as caught:
        list(train_batches(config, split_of(images), 0, 20))
    assert not hasattr(caught.value, "__notes__") and caught.value.code == "damaged-image"


@pytest.mark.parametrize(
    ("batch", "found"), [(9, "9 images cannot be divided among 2 hosts"), (0, "config.eval.batch is 0")]
)
def test_batches_that_no_host_can_load(batch, found):
    config = small_config()
    config.eval.batch = batch
    with pytest.raises(UserError, match=found):
        eval_batches(config, split_of(noise(2)), host_index=0, host_count=2)


def test_steps_outside_the_schedule():
    with pytest.raises(ValueError, match="0 to 20"):
        train_batches(small_config(), split_of(noise(20)), 0, 21)


def test_images_that_cannot_be_read_are_replaced_by_others_of_their_identity(capsys):
    images = list(noise(20))
    broken = {5, 6, 17}
    data = [png(image)[:-40] if i in broken else image for i, image in enumerate(images)]
    strict, skipping = small_config(threads=0), small_config(threads=0, corrupt="skip")
    with pytest.raises(UserError, match=r"(000[56]|0017)\.png .*; or train with --config\.data\.corrupt=skip"):
        list(train_batches(strict, split_of(data), 0, 20))
    capsys.readouterr()

    found = list(train_batches(skipping, split_of(data), 0, 20))
    # As if the file held the image that takes its place.
    stand_in = {5: 7, 6: 7, 17: 18}
    mended = [images[stand_in.get(i, i)] for i in range(20)]
    expected = list(train_batches(strict, split_of(mended), 0, 20))
    for batch in (*found, *expected):
        batch.pop("camera")  # that of the image which is shown
    assert_equal(found, expected)
    asked = np.concatenate([Sampler(strict, split_of(images).labels()).plan(step).indices for step in range(20)])
    error = capsys.readouterr().err
    assert all(error.count(f"{i:04d}.png") == 1 for i in broken)  # each is named once
    times = int(np.isin(asked, list(broken)).sum())
    assert f"3 training images could not be read and were replaced {times} times" in error

    hosts = [list(train_batches(skipping, split_of(data), 3, 9, host, 2)) for host in range(2)]
    joined = [np.concatenate([h["image"] for h in batch]) for batch in zip(*hosts, strict=True)]
    assert all(np.array_equal(image, batch["image"]) for image, batch in zip(joined, found[3:9], strict=True))


def test_an_identity_without_any_readable_image_is_an_error():
    data = [png(image)[:-40] if i < 4 else image for i, image in enumerate(noise(20))]
    with pytest.raises(UserError, match=r"000[0-3]\.png"):
        list(train_batches(small_config(threads=0, corrupt="skip"), split_of(data), 0, 20))


def test_an_evaluation_never_skips():
    data = [png(image)[:-40] if i == 9 else image for i, image in enumerate(noise(12))]
    with pytest.raises(UserError, match=r"0009\.png"):
        list(eval_batches(small_config(threads=0, corrupt="skip"), split_of(data)))


def test_a_loader_process_that_dies_is_one_sentence():
    config = small_config(workers=1)
    for stage in (config.stage1, config.stage2):
        stage.steps_per_epoch = 500
    batches = train_batches(config, split_of(noise(20)), 0, 2000)
    next(batches)
    (worker,) = (child for child in multiprocessing.active_children() if child.name != "MainProcess")
    worker.kill()
    with pytest.raises(UserError, match=r"A loader process died \(exit code -9;.*fewer config\.data\.workers"):
        list(batches)
