"""The committed configs, what `check` refuses, and what may change between a run and its continuation."""

from __future__ import annotations

import json
import runpy
from types import SimpleNamespace

import pytest
from paths import CONFIGS
from tiny import other, recipe

from vpm_jax import config as config_lib
from vpm_jax import keys
from vpm_jax.config import (
    RESUMABLE,
    changed_keys,
    check,
    default,
    flatten,
    from_json,
    set_key,
    small,
    stage,
    to_json,
)
from vpm_jax.config.__main__ import main as config_main
from vpm_jax.errors import UserError

SMALL = [(name, "small") for name in ("market", "market_plus", "own")]
ALL = [(path.stem, "") for path in sorted(CONFIGS.glob("*.py"))] + SMALL
ALL += [("market_plus", "tricks"), ("market", "pretrained"), ("market_fast", "large"), ("market_fast", "padded")]


def test_the_configs_of_the_readme_are_here():
    assert {name for name, _ in ALL} >= {"synthetic", "market", "market_released", "duke"}


@pytest.mark.parametrize(("file", "variant"), ALL)
def test_every_config_passes_the_check_and_survives_json(file, variant):
    config = recipe(file, variant)
    check(config)
    again = from_json(to_json(config), "config.json")
    assert flatten(again) == flatten(config)
    assert {key: type(value) for key, value in flatten(again).items()} == {
        key: type(value) for key, value in flatten(config).items()
    }


@pytest.mark.parametrize(
    ("file", "start"), [("market_plus", ("market", "small")), ("market_fast", ("market_fast", ""))]
)
def test_what_is_to_be_compared_can_be(file, start):
    lists = runpy.run_path(str(CONFIGS / f"{file}.py"))
    screen, evaluated = lists["SCREEN"], lists["EVALUATED"]
    assert screen["base"] == {} and len({str(changes) for changes in screen.values()}) == len(screen)
    for of, changes in [*((name, {}) for name in screen), *evaluated.values()]:
        base, trained, config = (recipe(*start) for _ in range(3))
        for key, value in screen[of].items():
            set_key(trained, key, value)
        assert (flatten(trained) == flatten(base)) == (of == "base")
        for key, value in (screen[of] | changes).items():
            set_key(config, key, value)
        check(config)
        # An evaluation keeps to the keys that `evaluate` takes.
        assert changed_keys(trained, config) == [] and bool(changes) == (flatten(trained) != flatten(config))


def test_json_that_lacks_a_newer_key_takes_its_default():
    text = to_json(small()).replace('"nesterov": true,', "")
    assert "nesterov" not in text
    assert flatten(from_json(text, "config.json")) == flatten(small())


@pytest.mark.parametrize(
    ("board", "before", "tracker"),
    [
        (False, "none", "none"),
        (True, "none", "tensorboard"),
        (False, "wandb", "wandb"),
        (True, "wandb", "tensorboard,wandb"),
    ],
)
def test_json_of_a_version_with_other_keys_is_read(board, before, tracker):
    saved = json.loads(to_json(small())) | {"tensorboard": board, "tracker": before}
    saved["model"]["name"] = "vpm"
    config = from_json(json.dumps(saved), "config.json")
    assert config.tracker == tracker
    config.tracker = "none"
    assert flatten(config) == flatten(small())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "config.json"),
        ('{"modle": {"width": 3}}', "(unknown key 'modle.width')"),
        ('{"model": {"wdith": 3}}', "(unknown key 'model.wdith')"),
        ('{"model": 3}', "model"),
        ('{"model": {"width": "wide"}}', "model.width is 'wide' (str), expected int"),
    ],
)
def test_json_of_something_else_is_refused_with_the_files_name(text, reason):
    with pytest.raises(UserError, match=r"^runs/a/config\.json is not a config") as error:
        from_json(text, "runs/a/config.json")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_the_config_of_a_workdir(tmp_path):
    assert config_lib.read(tmp_path) is None
    (tmp_path / "config.json").write_text(to_json(small()))
    assert flatten(config_lib.read(tmp_path)) == flatten(small())


def test_every_key_is_told_of_once_and_its_default_is_one_of_its_values():
    assert len({key.name for key in keys.KEYS}) == len(keys.KEYS) == len(flatten(default()))
    for key in keys.KEYS:
        assert key.values.holds(key.default) and 0 < len(key.meaning) < 120, key.name
        assert not key.meaning.endswith("."), key.name
    assert not set(keys.RETIRED) & {key.name for key in keys.KEYS}


def test_keys_of_a_fingerprint():
    """Another list or order is another fingerprint of every model: stores of features would be refused."""
    data = ("data.height", "data.width", "data.resize", "data.mean", "data.std")
    backbone = ("model.depth", "model.width", "model.stem", "model.strides", "model.last_stride", "model.stride_on")
    rest = ("model.bn_epsilon", "model.grid", "model.locator", "model.locator_groups", "model.locator_stage")
    assert keys.keys_with(keys.FEATURES) == (*data, *backbone, *rest, "match.feature", "eval.flip")


def test_what_may_differ():
    machine = {"data.root", "data.workers", "data.threads"}
    evaluation = {key.name for key in keys.KEYS if key.name.startswith(("match.", "eval."))}
    run = {
        "recipe",
        "data.corrupt",
        "log_every",
        "checkpoint_every",
        "checkpoint_seconds",
        "keep_checkpoints",
        "tracker",
        "parallel",
    }
    assert set(keys.keys_with(keys.PROCESS)) == machine
    test_set = {"data.also_train", "data.distractors", "data.corrupt"}
    assert set(keys.keys_with(keys.EVALUATE)) == machine | evaluation | test_set | {"data.height", "data.width"}
    assert set(RESUMABLE) == machine | evaluation | run | {"data.distractors"}
    assert set(keys.keys_with(keys.NO_RESULT)) == machine | run | {"eval.batch", "eval.every"}
    assert keys.keys_with(keys.WEIGHTS) == ("data.mean", "data.std", "model.stride_on", "model.bn_epsilon")
    assert keys.in_words(keys.keys_with(keys.EVALUATE)) == (
        "data.root, data.height, data.width, data.also_train, data.distractors, data.workers, data.threads, "
        "data.corrupt, match.*, eval.*"
    )


def test_what_weights_presuppose_is_set_in_a_copy():
    weights = SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0), stride_on="1x1", bn_epsilon=1e-3)
    config = default()
    changed = config_lib.for_weights(config, weights)
    assert flatten(config) == flatten(default())
    differ = {key: value for key, value in flatten(changed).items() if value != flatten(config)[key]}
    assert differ == {f"data.{k}": getattr(weights, k) for k in ("mean", "std")} | {
        f"model.{k}": getattr(weights, k) for k in ("stride_on", "bn_epsilon")
    }


def test_the_keys_are_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert config_main(["gamma", "log_every"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("log_every"))
    assert line.split(" ", 3)[:3] == ["log_every", "=", "10"]
    assert line.endswith("   steps between records of metrics.jsonl [at least 1] (resume)")
    assert any(line.startswith("match.gallery_gammas = ()") for line in lines)
    assert not any(line.startswith("model.") for line in lines) and max(map(len, lines)) <= 120
    assert config_main(["data.height", "eval.batch"]) == 0
    marks = [line.rpartition(" (")[2] for line in capsys.readouterr().out.splitlines() if " = " in line]
    assert marks == ["evaluate)", "resume, evaluate)"]
    assert config_main([]) == 0
    assert {line.split(" = ")[0] for line in capsys.readouterr().out.splitlines() if " = " in line} >= set(
        flatten(default())
    )
    with pytest.raises(UserError, match="No config key has widht in its name"):
        config_main(["widht"])
    with pytest.raises(UserError, match=r"--keys: see python -m vpm_jax\.config --help"):
        config_main(["--keys"])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.width", 0, "at least 1"),
        ("model.width", 2.5, "expected int"),
        ("model.width", True, "expected int"),
        ("model.depth", 19, "expected one of 10, 18, 34, 50, 101"),
        ("model.head_dropout", 1.0, "from 0 to 0.99"),
        ("model.grid", (6,), "(rows, cols)"),
        ("model.grid", (0, 1), "(rows, cols)"),
        ("data.crop", "middle", "expected one of top"),
        ("data.gamma", (0.9, 0.5), "0 < low <= high"),
        ("data.gamma", (0.5, 0.9, 0.8), "ascending quantiles"),
        ("data.gamma", (0.5,), "0 < low <= high"),
        ("match.gallery_gammas", (0.5, 1.0), "between 0 and 1"),
        ("data.pad", 0.5, "from 0 to 0.49"),
        ("data.erasing_area", (0.5, 0.4), "0 < low <= high <= 1"),
        ("data.erasing_area", (0.5, 1.4), "0 < low <= high <= 1"),
        ("match.feature", "after", "model.neck is"),
        ("eval.gammas", (), "in (0, 1]"),
        ("eval.gammas", (0.5, 1.5), "in (0, 1]"),
        ("stage2.learning_rate", float("nan"), "finite non-negative numbers"),
        ("stage2.learning_rate", -0.1, "finite non-negative numbers"),
        ("stage2.decay_epochs", (30, float("inf")), "finite non-negative numbers"),
        ("optim.weight_decay", -5e-4, "finite non-negative numbers"),
        ("stage1.schedule", "linear", "expected one of step, cosine"),
        ("tracker", "wandb,tensorboard", "expected one of none, tensorboard, wandb, tensorboard,wandb"),
        ("optim.nesterov", 1, "expected bool"),
        ("log_every", 0, "at least 1"),
        ("seed", -1, "finite non-negative numbers"),
        ("stage2.decay_epochs", (30, "forty"), "finite non-negative numbers"),
        ("data.mean", (0.5, 0.5), "three numbers"),
        ("data.std", (0.2,), "three numbers above 0"),
        ("data.std", (0.0, 0.2, 0.2), "three numbers above 0"),
        ("model.strides", (1, 2), "1 or 2 for stages 1 to 3"),
        ("model.strides", (1, 0, 2), "1 or 2 for stages 1 to 3"),
        ("model.strides", (1, 2, 1.5), "1 or 2 for stages 1 to 3"),
    ],
)
def test_a_value_that_no_part_can_use_is_refused_with_its_key(key, value, expected):
    config = default()
    set_key(config, key, value)
    with pytest.raises(UserError) as error:
        check(config)
    assert key in str(error.value)
    assert expected in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("rerank", True), ("gallery_gammas", (0.5,))])
def test_a_gallery_of_whole_people_is_neither_cropped_nor_reranked(key, value):
    config = default()
    config.match.gallery_whole = True
    check(config)
    config.match[key] = value
    with pytest.raises(UserError, match=f"match.{key}.*turn off one of them"):
        check(config)


def test_channels_that_do_not_divide_into_groups_are_refused():
    config = default()
    config.model.locator_groups = 7
    check(config)  # the pixel locator has none
    config.model.locator = "row"
    with pytest.raises(UserError, match=r"model\.locator_groups is 7, .* the 2048 channels"):
        check(config)
    config.model.locator_stage, config.model.depth, config.model.width = 3, 18, 28
    check(config)  # 4 * 28 channels


def test_only_padded_images_are_stretched_as_augmentation():
    config = default()
    config.data.stretch = 0.5
    with pytest.raises(UserError, match=r"data\.stretch is 0\.5 but data\.fit is 'stretch'.*set data\.fit to pad"):
        check(config)
    config.data.fit = "pad"
    check(config)


def test_an_int_may_stand_for_a_float():
    config = default()
    set_key(config, "loss.margin", 1)
    check(config)


def test_nothing_to_train_is_refused():
    config = default()
    config.stage1.epochs = config.stage2.epochs = 0
    with pytest.raises(UserError, match="nothing to train"):
        check(config)


def test_a_key_too_many_or_too_few_is_refused():
    config = default()
    with config.unlocked():
        config.model.depht = 18
    with pytest.raises(UserError, match=r"model\.depht.*unknown"):
        check(config)
    config = default()
    with config.unlocked():
        del config.optim["momentum"]
    with pytest.raises(UserError, match=r"optim\.momentum.*missing"):
        check(config)


def test_a_stage_refuses_a_misspelt_key():
    with pytest.raises(UserError, match="epoch: its keys are epochs"):
        stage(epoch=3)


@pytest.mark.parametrize("key", sorted(flatten(default())))
def test_a_changed_key_is_named_unless_it_may_change(key):
    saved, now = default(), default()
    value = other(flatten(saved)[key])
    set_key(now, key, value)
    allowed = key in RESUMABLE or key == "stage2.epochs"  # the step-wise schedule of the default
    expected = [] if allowed else [f"{key}: {flatten(saved)[key]} -> {value}"]
    assert changed_keys(saved, now) == expected


def test_only_the_last_stage_grows_and_only_where_its_schedule_ignores_the_end():
    saved = default()
    fewer, first, cosine = default(), default(), small()
    fewer.stage2.epochs -= 1
    first.stage1.epochs += 1
    cosine.stage2.epochs += 1
    assert changed_keys(saved, fewer) == ["stage2.epochs: 80 -> 79"]
    assert changed_keys(saved, first) == ["stage1.epochs: 50 -> 51"]
    assert changed_keys(small(), cosine) == [f"stage2.epochs: {small().stage2.epochs} -> {cosine.stage2.epochs}"]
    only_first = default()
    only_first.stage2.epochs = 0
    longer = default()
    longer.stage2.epochs, longer.stage1.epochs = 0, 60
    assert changed_keys(only_first, longer) == []
