"""How much of a person pictures show: exact where the region maps are, and the crops that are drawn from it."""

from __future__ import annotations

import csv
import os
import shlex

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import make_run

from vpm_jax import cli, config, extents, regions
from vpm_jax.data.sampling import Sampler
from vpm_jax.errors import UserError
from vpm_jax.regions import Crop, RegionGrid, project_regions, visible_heights

RANDOM = np.random.default_rng(3)


def region_map(top, bottom, grid, shape, sure=1.0):
    """What a locator that is right and `sure` would say of a crop: [h, w, P]."""
    labels, _ = project_regions(Crop(top, 0, bottom - top, 1), grid, shape)
    return sure * np.eye(grid.count)[labels] + (1 - sure) / grid.count


@settings(deadline=None)  # a busy machine is no failure
@given(
    start=st.integers(0, 42),
    size=st.integers(6, 60),
    side=st.sampled_from(["top", "bottom", "middle"]),
    grid=st.sampled_from([RegionGrid(4), RegionGrid(6), RegionGrid(3, 2)]),
    shape=st.sampled_from([(16, 8), (24, 8), (24, 1)]),
)
def test_the_largest_crop_of_the_right_labels(start, size, side, grid, shape):
    top = {"top": 0, "bottom": 60 - size, "middle": start}[side]
    top, bottom = top / 60, min(top + size, 60) / 60
    if shape[1] == 1:
        grid = RegionGrid(grid.rows)
    [[found_top, found_bottom]] = visible_heights(region_map(top, bottom, grid, shape, sure=0.6)[None], grid)
    right = region_map(top, bottom, grid, shape)
    np.testing.assert_array_equal(region_map(found_top, found_bottom, grid, shape), right)
    assert found_bottom - found_top > bottom - top - 1e-9


def test_one_wrong_cell_decides_nothing():
    grid = RegionGrid(6)
    maps = region_map(0, 0.5, grid, (24, 8))[None]
    before = visible_heights(maps, grid)
    maps[0, 0, 0] = np.eye(6)[5]
    np.testing.assert_array_equal(visible_heights(maps, grid), before)


def test_padded_images_of_every_height_share_their_candidates():
    maps = np.zeros((24, 24, 8, 6))
    for index, image in enumerate(maps):
        image[: index + 1] = 1 / 6
    visible_heights(maps, RegionGrid(6))
    computed = regions._candidates.cache_info().misses
    visible_heights(maps, RegionGrid(6))
    assert regions._candidates.cache_info().misses == computed


def test_a_whole_person():
    for grid in (RegionGrid(4), RegionGrid(6), RegionGrid(3, 2)):
        maps = region_map(0, 1, grid, (24, 8), sure=0.5)[None]
        np.testing.assert_array_equal(visible_heights(maps, grid), [[0, 1]])


@pytest.mark.parametrize("bottoms", [0.0, 0.25, 1.0])
def test_training_crops_are_like_the_pictures(bottoms):
    kept = np.minimum(RANDOM.beta(2, 1, 2000) + 0.2, 1)
    from_below = RANDOM.random(2000) < bottoms
    pictures = np.where(from_below[:, None], np.stack([1 - kept, kept * 0 + 1], 1), np.stack([kept * 0, kept], 1))
    values = config.default()
    config.set_key(values, "data.whole", 0.4)  # what other crops the config had gives way
    config.set_key(values, "data.mix", 0.4)
    for key, value in extents.crop_keys(pictures).items():
        config.set_key(values, key, value)
    config.check(values)
    values.stage1.update(epochs=1, steps_per_epoch=100)
    sampler = Sampler(values, np.repeat(np.arange(64), 4))
    crops = np.array([crop for step in range(100) for crop in sampler.plan(step).crops])
    top, height = crops[:, 0], crops[:, 2]
    assert abs((top > 0.05).mean() - (pictures[:, 0] > 0.05).mean()) < 0.02
    steps = np.linspace(0.1, 0.9, 9)
    assert np.abs(np.quantile(height, steps) - np.quantile(kept, steps)).max() < 0.03
    assert np.quantile(kept, 0.005) < height.min() < np.quantile(kept, 0.015)
    assert np.all(crops[:, 3] == 1) and np.all((top == 0) | (np.abs(top + height - 1) < 1e-9))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, "50.0% of the images seem to show the bottom part or a middle part"),
        ({"data.crop": "bilateral"}, "25.0% of the images seem to show a middle part"),
        ({"data.mix": 0.3, "data.mix_crop": "bottom"}, "25.0% of the images seem to show a middle part"),
        ({"data.crop": "none"}, "75.0% of the images seem to show the top part or the bottom part or a middle part"),
        ({"data.crop": "any"}, ""),
        ({"data.mix": 0.3, "data.mix_crop": "any"}, ""),
    ],
)
def test_a_model_is_doubted_where_it_was_not_trained(changes, parts):
    values = config.default()
    for key, value in changes.items():
        config.set_key(values, key, value)
    pictures = np.array([(0, 1), (0, 0.5), (0.5, 1), (0.2, 0.8)])
    assert extents.unfamiliar_crops(values, pictures).startswith(parts) and bool(
        extents.unfamiliar_crops(values, pictures)
    ) == bool(parts)
    assert not extents.unfamiliar_crops(values, pictures[:1])


def test_the_command(tmp_path, capsys):
    make_run(tmp_path / "run")
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    odd = os.fsdecode(b"\xff.png")  # no UTF-8
    for name in ("a.jpg", "below/b.png", odd):
        Image.fromarray(RANDOM.integers(0, 256, (60, 30, 3), dtype=np.uint8)).save(folder / name, format="PNG")
    arguments = [str(folder), "--workdir", str(tmp_path / "run"), "--csv", str(tmp_path / "out.csv")]
    assert extents.main(arguments) == 0
    out = capsys.readouterr().out
    assert f"3 images in {folder}" in out
    read = cli.load_config("configs/market.py", shlex.split(out.splitlines()[-1]))
    assert len(read.data.gamma) == 11 and read.recipe.endswith("-transductive")
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["a.jpg", "below/b.png", "\\xff.png"]
    assert all(0 <= float(row["top"]) < float(row["bottom"]) <= 1 for row in rows)

    (folder / "c.jpg").write_text("no picture")
    assert extents.main(arguments) == 3
    found = capsys.readouterr()
    assert "c.jpg" in found.err and "\n3 images in" in found.out
    for name in ("a.jpg", "below/b.png", odd):
        (folder / name).write_text("no picture")
    with pytest.raises(UserError, match="None of the 4 images"):
        extents.main(arguments)


@pytest.mark.parametrize("change", [{"model__locator": "stripes"}, {"model__grid": (1, 1)}])
def test_a_model_that_does_not_find_regions_is_refused(tmp_path, change):
    make_run(tmp_path / "run", **change)
    Image.new("RGB", (20, 40)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="cannot locate regions"):
        extents.main([str(tmp_path), "--workdir", str(tmp_path / "run")])
