"""Sampling: composition, coverage and distribution of what is drawn, and that it is a function of (seed, step)."""

import numpy as np
import pytest

from vpm_jax.config import default
from vpm_jax.data.sampling import Sampler, kept_ratios, uniform
from vpm_jax.errors import UserError
from vpm_jax.schedule import schedule, stage_at


def config_of(sampling="pk", epochs=5, identities=8, images=8, steps_per_epoch=0):
    """A configuration of one stage, the first."""
    config = default()
    config.stage1.update(
        epochs=epochs,
        sampling=sampling,
        identities=identities,
        images_per_identity=images,
        steps_per_epoch=steps_per_epoch,
    )
    config.stage2.epochs = 0
    return config


def labels_of(counts):
    """Labels of identities with so many images each, in a mixed order."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


def test_schedule_of_the_paper():
    config = default()
    first, second = schedule(config, 12936, 751)
    assert (first.steps_per_epoch, first.first_step, first.steps, first.sampling) == (202, 0, 50 * 202, "plain")
    assert (second.steps_per_epoch, second.first_step, second.steps, second.sampling) == (93, 10100, 80 * 93, "pk")
    assert first.batch == second.batch == 64
    config.stage1.steps_per_epoch = 0
    assert schedule(config, 12936, 751)[0].steps_per_epoch == 12936 // 64
    assert stage_at((first, second), 10099) is first and stage_at((first, second), 10100) is second
    with pytest.raises(ValueError, match="17540"):
        stage_at((first, second), 17540)


def test_a_stage_without_epochs_is_not_there():
    (stage,) = schedule(config_of(), 100, 9)
    assert (stage.name, stage.steps_per_epoch, stage.steps) == ("stage1", 1, 5)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda c: c.stage1.update(identities=4), "4 x 8 images in stage1"),
        (lambda c: c.stage2.update(identities=30), "config.stage2.identities is 30, but the training set has 20"),
    ],
)
def test_schedules_that_do_not_fit(change, found):
    config = default()
    change(config)
    with pytest.raises(UserError, match=found):
        Sampler(config, labels_of([5] * 20))


def test_a_split_without_images():
    with pytest.raises(UserError, match="no images"):
        Sampler(default(), np.zeros(0, int))


def test_balanced_batches():
    counts = [1, 3, 8, 9, 20, 5, 30, 12, 8, 2]
    labels = labels_of(counts)
    sampler = Sampler(config_of(identities=4, images=8), labels)
    for step in range(10):
        indices = sampler.plan(step).indices
        assert indices.dtype == np.int64
        identities, sizes = np.unique(labels[indices], return_counts=True)
        assert len(identities) == 4 and set(sizes) == {8}
        for identity in identities:
            times = np.unique(indices[labels[indices] == identity], return_counts=True)[1]
            # Without replacement, or each image equally often but for a remainder.
            assert len(times) == min(8, counts[identity]) and times.max() - times.min() <= 1


def test_a_balanced_epoch_visits_each_identity_once():
    labels = labels_of([9] * 751)
    sampler = Sampler(config_of(epochs=2), labels)
    epochs = [[labels[sampler.plan(e * 93 + s).indices[::8]] for s in range(93)] for e in range(2)]
    for epoch in epochs:
        assert len(np.unique(np.concatenate(epoch))) == 744
    assert not np.array_equal(epochs[0], epochs[1])


def test_balanced_passes_go_on_across_other_epochs():
    labels = labels_of([4] * 20)
    short = Sampler(config_of(identities=4, images=2, steps_per_epoch=3, epochs=5), labels)
    whole = Sampler(config_of(identities=4, images=2, epochs=3), labels)  # passes of 5 steps
    for step in range(15):
        assert np.array_equal(short.plan(step).indices, whole.plan(step).indices)
    assert len(np.unique(np.concatenate([labels[short.plan(step).indices] for step in range(5)]))) == 20


def test_every_image_of_an_identity_gets_drawn():
    sampler = Sampler(config_of(identities=1, images=4, epochs=200), np.zeros(10, int))
    times = np.bincount(np.concatenate([sampler.plan(step).indices for step in range(200)]), minlength=10)
    assert times.min() > 50 and times.max() < 110  # 80 expected, standard deviation 7


@pytest.mark.parametrize("images", [100, 64, 17])
def test_plain_passes_cover_every_image(images):
    sampler = Sampler(config_of("plain", identities=4, images=4, steps_per_epoch=50), np.zeros(images, int))
    drawn = np.concatenate([sampler.plan(step).indices for step in range(50)])
    passes = [drawn[first : first + images] for first in range(0, 800 - images, images)]
    for one in passes:
        assert np.array_equal(np.sort(one), np.arange(images))
    assert not np.array_equal(passes[0], passes[1]) and not np.array_equal(passes[0], np.arange(images))


def test_a_split_smaller_than_a_batch():
    indices = Sampler(config_of("plain", steps_per_epoch=3), np.zeros(10, int)).plan(1).indices
    assert len(indices) == 64 and set(np.bincount(indices)) <= {5, 6, 7}


def test_a_plan_depends_on_seed_and_step_alone():
    labels, config = labels_of([9] * 30), default()
    config.stage1.update(epochs=2, steps_per_epoch=5)
    sampler = Sampler(config, labels)
    forward = [sampler.plan(step) for step in range(20)]
    for step in (19, 3, 10, 0):  # both stages, in another order, by a new sampler
        again = Sampler(config, labels).plan(step)
        assert np.array_equal(again.indices, forward[step].indices)
        assert np.array_equal(again.flips, forward[step].flips) and again.crops == forward[step].crops
    assert len({p.crops for p in forward}) == len({p.indices.tobytes() for p in forward}) == 20
    config.seed = 1
    other = Sampler(config, labels).plan(3)
    assert not np.array_equal(other.indices, forward[3].indices) and other.crops != forward[3].crops


def test_distributions():
    config = config_of(epochs=300)
    config.data.gamma, config.data.flip, config.data.crop = (0.5, 13 / 12), 0.25, "bilateral"
    sampler = Sampler(config, labels_of([8] * 8))
    plans = [sampler.plan(step) for step in range(300)]
    crops = np.array([crop for p in plans for crop in p.crops])
    gamma = crops[:, 2]
    assert gamma.min() >= 0.5 and gamma.max() == 1
    assert abs((gamma == 1).mean() - 1 / 7) < 0.01
    # The rest is uniform: the largest gap between the two distribution functions (Kolmogorov).
    rest = np.sort(gamma[gamma < 1])
    assert np.abs((rest - 0.5) / 0.5 - np.arange(len(rest)) / len(rest)).max() < 1.6 / np.sqrt(len(rest))
    assert abs((crops[gamma < 1, 0] == 0).mean() - 0.5) < 0.015  # the top half as often as the bottom half
    flips = np.concatenate([p.flips for p in plans])
    assert flips.dtype == bool and abs(flips.mean() - 0.25) < 0.013
    assert abs(np.corrcoef(flips, gamma)[0, 1]) < 0.03


@pytest.mark.parametrize("gamma", [(0.5, 1.0), (0.3, 0.4, 0.4, 0.9, 1.2)])
def test_kept_ratios_have_the_quantiles_they_are_given(gamma):
    draws = np.append(np.arange(10_000) / 10_000, np.nextafter(1, 0))
    expected = np.minimum(1, np.interp(draws, np.linspace(0, 1, len(gamma)), gamma))
    np.testing.assert_allclose(kept_ratios(np.array(gamma), draws), expected, rtol=1e-12)


LEVERS = {
    "whole": {"whole": 0.3},
    "mix": {"mix": 0.4, "mix_crop": "left"},
    "pad": {"pad": 0.1},
    "jitter": {"jitter": 0.2},
    "erasing": {"erasing": 0.6, "erasing_area": (0.1, 0.3)},
}


@pytest.mark.parametrize("on", [{key} for key in LEVERS] + [set(LEVERS)])
def test_a_key_of_augmentation_changes_its_own_numbers_alone(on):
    config = config_of(epochs=3)
    labels = labels_of([8] * 8)
    before = [Sampler(config, labels).plan(step) for step in range(3)]
    assert not any(p.shifts.any() or p.erased.any() or (p.jitters != 1).any() for p in before)
    for lever in on:
        config.data.update(LEVERS[lever])
    moved = {
        "crops": on & {"whole", "mix"},
        "shifts": "pad" in on,
        "jitters": "jitter" in on,
        "erased": "erasing" in on,
    }
    for step, (old, new) in enumerate(zip(before, [Sampler(config, labels).plan(s) for s in (0, 1, 2)], strict=True)):
        for field in old._fields:
            assert np.array_equal(getattr(old, field), getattr(new, field)) != bool(moved.get(field)), (step, field)
        again = Sampler(config, labels).plan(step)
        assert all(np.array_equal(a, b) for a, b in zip(new, again, strict=True))


def test_distributions_of_the_augmentation():
    config = config_of(epochs=200)
    for lever in LEVERS.values():
        config.data.update(lever)
    config.data.gamma, config.data.height, config.data.width = (0.5, 0.9), 200, 100
    sampler = Sampler(config, labels_of([8] * 8))
    plans = [sampler.plan(step) for step in range(200)]  # 12800 images
    _, left, height, width = np.array([crop for p in plans for crop in p.crops]).T
    assert abs(((height == 1) & (width == 1)).mean() - 0.3) < 0.015
    assert abs(((height == 1) & (width < 1)).mean() - 0.4) < 0.015  # mix_crop: the left part
    assert abs(((height < 1) & (width == 1)).mean() - 0.3) < 0.015 and not left.any()
    for field, centre, spread in (("shifts", 0, 0.1), ("jitters", 1, 0.2)):
        values = np.sort((np.concatenate([getattr(p, field) for p in plans]).T - centre) / spread)
        uniformly = (np.arange(values.shape[1]) + 0.5) / values.shape[1] * 2 - 1
        assert np.abs(values).max() <= 1 and np.abs(values - uniformly).max() < 0.04
    top, left, bottom, right = boxes = np.concatenate([p.erased for p in plans]).T
    drawn = bottom > top
    assert not boxes[:, ~drawn].any() and abs(drawn.mean() - 0.6) < 0.015
    top, left, bottom, right = boxes[:, drawn]
    assert min(top.min(), left.min()) == 0 and bottom.max() == 200 and right.max() == 100  # inside, up to every border
    area, aspect = (bottom - top) * (right - left) / 20000, (bottom - top) / (right - left)
    fits = right - left < 100  # the widest ones are cut to the picture
    assert 0.09 < area[fits].min() < 0.11 and 0.29 < area.max() < 0.31 and fits.mean() > 0.8
    assert aspect[fits].min() > 0.28 and aspect.max() < 3.5 and abs(np.mean(aspect > 1) - 0.5) < 0.03
    assert abs(np.mean(top / (200 - bottom + top) < 0.5) - 0.5) < 0.03  # anywhere


def test_the_stream_never_changes():
    """A resumed run must draw what it would have drawn, under whatever NumPy it resumes with."""
    raw = np.random.Philox(np.random.SeedSequence([5, 1, 2, 7])).random_raw(1000)
    expected = [int(word) // 2048 / 2**53 for word in raw]
    assert uniform((5, 1, 2, 7), 1000).tolist() == expected
    assert uniform((0, 1, 2, 3), 3).tolist() == [0.3086497058394875, 0.47267774567140897, 0.4407060425329311]
    assert Sampler(config_of(), labels_of([9] * 30)).plan(4).indices[:8].tolist() == [
        255,
        18,
        121,
        177,
        150,
        176,
        63,
        267,
    ]
