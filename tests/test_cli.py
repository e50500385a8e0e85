"""Configs with overrides from the command line, and how a command ends: one sentence, exit code 1, no traceback."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import CONFIGS

from vpm_jax import cli
from vpm_jax.config import flatten, to_json
from vpm_jax.disk import disk_trouble, writing
from vpm_jax.errors import UserError

MARKET = str(CONFIGS / "market.py")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "3", 3),
        ("loss.margin", "0.5", 0.5),
        ("loss.margin", "2", 2.0),
        ("stage2.learning_rate", "1e-3", 0.001),
        ("tracker", "tensorboard,wandb", "tensorboard,wandb"),
        ("match.squared", "true", True),
        ("optim.nesterov", "False", False),
        ("data.root", "/data/a=b:c", "/data/a=b:c"),
        ("data.root", "7", "7"),
        ("data.root", "", ""),
        ("model.grid", "(4,2)", (4, 2)),
        ("model.grid", "[4, 2]", (4, 2)),
        ("eval.gammas", "0.5,1", (0.5, 1)),
        ("eval.gammas", "1.0", (1.0,)),
        ("stage1.decay_epochs", "()", ()),
        ("data.synthetic.cameras", "3", 3),
    ],
)
@pytest.mark.parametrize("form", ["equals", "space"])
def test_an_override_is_read_as_the_type_it_replaces(key, text, value, form):
    arguments = [f"--config.{key}={text}"] if form == "equals" else [f"--config.{key}", text]
    found = flatten(cli.load_config(MARKET, arguments))[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--config.model.widht=3", "did you mean model.width?"),
        ("--config.epochs=3", "did you mean stage1.epochs or stage2.epochs?"),
        ("--config.synthetic=3", "no config key 'synthetic'"),
        ("--config.qqqqqq=3", "python -m vpm_jax.config lists the keys"),
        ("--config.tensorboard=true", "key 'tensorboard' no longer exists: set tracker to tensorboard"),
        ("--config.seed=three", "--config.seed=three: expected a whole number, such as 0."),
        ("--config.seed=1.5", "a whole number"),
        ("--config.seed=True", "a whole number"),
        ("--config.loss.margin=wide", "expected a number, such as 1.0"),
        ("--config.loss.margin=1e999", "finite"),
        ("--config.optim.nesterov=1", "expected true or false"),
        ("--config.model.grid=(a,b)", "expected numbers in brackets, such as (6, 1)"),
        ("--config.model.grid=(4.5,1)", "(rows, cols)"),
        ("--config.model.depth=20", "expected one of 10, 18, 34, 50, 101"),
        ("--config.seed", "--config.seed has no value"),
        ("--config.eval", "--config.eval is a group of keys: set one of eval.batch, eval.crop, eval.every, "),
        (
            "--config.data.synthetic=3",
            "--config.data.synthetic is a group of keys: set one of data.synthetic.cameras, ",
        ),
        ("--wrokdir=runs/a", "Unknown argument '--wrokdir=runs/a'"),
        ("runs/a", "Unknown argument 'runs/a'"),
    ],
)
def test_a_wrong_override_is_one_sentence(argument, sentence):
    with pytest.raises(UserError) as error:
        cli.load_config(MARKET, [argument])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "start", "warmup", "words"),
    [
        ([], 10.0, 3.0, ""),
        (["--config.stage2.epochs=20"], 10.0, 3.0, ""),  # both still happen
        (["--config.stage2.epochs=80"], 10.0, 3.0, ""),
        (["--config.stage2.epochs=2"], 0.5, 0.15, "stage2.triplet_start: 10 -> 0.5, stage2.warmup_epochs: 3 -> 0.15"),
        (["--config.stage2.epochs=8"], 2.0, 0.6, "stage2.triplet_start: 10 -> 2, stage2.warmup_epochs: 3 -> 0.6"),
        (
            ["--config.stage2.warmup_epochs=1", "--config.stage2.epochs=2"],
            0.5,
            1.0,
            "stage2.triplet_start: 10 -> 0.5 (",
        ),
    ],
)
def test_a_schedule_follows_a_stage_that_became_too_short_for_it(overrides, start, warmup, words, capsys):
    config = cli.load_config(f"{MARKET}:small", overrides)
    assert (config.stage2.triplet_start, config.stage2.warmup_epochs) == (start, warmup)
    said = capsys.readouterr().out
    assert words in said and bool(words) == bool(said)


def test_a_variant_is_passed_on():
    assert cli.load_config(f"{MARKET}:small").recipe == "small"
    assert cli.load_config(MARKET).recipe == "paper"


@pytest.mark.parametrize(
    ("text", "variant", "sentence"),
    [
        (None, "", "no such file"),
        ("def get_config(:\n", "", "(SyntaxError: "),
        ("import nothing_like_this\n", "", "No module named 'nothing_like_this'"),
        ("x = 1\n", "", "(KeyError: 'get_config')"),
        ("def get_config():\n    return {}\n", "", "returned dict, expected a ConfigDict"),
        ("def get_config():\n    raise ValueError('first\\nsecond')\n", "", "(ValueError: first)"),
        ("def get_config():\n    pass\n", "small", "has no variants: leave out :small"),
        (
            "from vpm_jax.config import default\ndef get_config():\n    c = default()\n    c.sede = 1\n    return c\n",
            "",
            "sede",
        ),
    ],
)
def test_a_config_file_that_is_none_is_one_sentence(tmp_path, text, variant, sentence):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        cli.load_config(f"{path}:{variant}" if variant else str(path))
    assert str(path) in str(error.value)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_variant_names_the_known_ones():
    with pytest.raises(
        UserError, match=r"^--config \S+market\.py:large: there is no such variant, only small and pretrained\.$"
    ):
        cli.load_config(f"{MARKET}:large")


@pytest.mark.parametrize(
    ("spec", "file", "variant", "workdir"),
    [
        ("market", "market.py", "", "market"),
        ("market:small", "market.py", "small", "market-small"),
        ("configs/market.py:small", "market.py", "small", "market-small"),
        ("mine.py", "mine.py", "", "mine"),
        ("~/mine.py:small", "mine.py", "small", "mine-small"),
        ("a:b.py", "a:b.py", "", "a:b"),
        ("a:b.py:small", "a:b.py", "small", "a:b-small"),
        ("C:\\mine.py:small", "C:\\mine.py", "small", "C:\\mine-small"),
        ("runs/old/config.json", "config.json", "", "old"),
    ],
)
def test_configs_are_found_by_name_and_by_path(tmp_path, monkeypatch, spec, file, variant, workdir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs" / "old").mkdir(parents=True)
    for name in ("mine.py", "a:b.py", "C:\\mine.py", "runs/old/config.json"):
        (tmp_path / name).touch()
    found = cli.find_config(spec)
    assert (found[0].name, found[1]) == (file, variant) and found[0].is_file()
    assert cli.default_workdir(spec) == Path("runs", workdir)


@pytest.mark.parametrize("spec", ["markte", "market.py", "none/market.py:small", "C:\\none.py", "a:b.py", ""])
def test_an_unknown_config_lists_the_recipes(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"^--config .*no such file, expected a recipe \(duke, market, .*config\.json\.$"
    ):
        cli.find_config(spec)


def test_recipes_are_found_beside_the_package_and_inside_it(tmp_path, monkeypatch):
    assert {path.parent for path in cli.recipes().values()} == {CONFIGS}
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "installed.py").touch()
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli.py"))
    assert cli.recipes() == {"installed": tmp_path / "recipes" / "installed.py"}


def test_a_saved_config_is_a_config(tmp_path):
    config = cli.load_config("market:small", ["--config.seed=3"])
    (tmp_path / "config.json").write_text(to_json(config))
    again = cli.load_config(str(tmp_path / "config.json"), ["--config.loss.margin=0.5"])
    assert flatten(again) == flatten(config) | {"loss.margin": 0.5}
    with pytest.raises(UserError, match=r"a saved config has no variants: leave out :small"):
        cli.load_config(f"{tmp_path / 'config.json'}:small")
    (tmp_path / "config.json").write_text("{}}")
    with pytest.raises(UserError, match=r"config\.json is not a config that this version can read"):
        cli.load_config(str(tmp_path / "config.json"))


def test_a_config_file_leaves_nothing_beside_itself(tmp_path):
    (tmp_path / "mine.py").write_text("from vpm_jax.config import small as get_config\n")
    cli.load_config(str(tmp_path / "mine.py"))
    assert os.listdir(tmp_path) == ["mine.py"]


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("This was found: do that."), 1, "This was found: do that."),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            1,
            "runs/a could not be written: the disk is full",
        ),
        (OSError(errno.EROFS, "Read-only file system", "runs/a"), 1, "runs/a could not be written: that file system"),
        (MemoryError(), 1, "Out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"), 1, "allocating 9 bytes)"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (KeyboardInterrupt("Interrupted: go on."), 130, "Interrupted: go on."),
    ],
)
def test_what_a_user_can_mend_ends_a_command_with_one_sentence(capsys, monkeypatch, error, code, sentence):
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        cli.run(raising(error))
    assert end.value.code == code
    found = capsys.readouterr().err
    assert found.startswith("error: ")
    assert sentence in found
    assert found.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), OSError(errno.EIO, "Input/output error"), RuntimeError("a bug")]
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        cli.run(raising(error))


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("train", "--resume maybe"),
        ("evaluate", ""),
        ("report", "--workdir runs --gamma half"),
        ("search", "index pictures"),
        ("export", "--workdir runs"),
        ("convert", ""),
        ("prepare", ""),
        ("extents", "pictures"),
        ("benchmark", "step --batch many"),
        ("reproduce", "--table 9"),
    ],
)
def test_wrong_arguments_are_one_sentence(module, arguments):
    with pytest.raises(UserError, match=rf"^[^\n]*: see python -m vpm_jax\.{module}.* --help\.$"):
        importlib.import_module(f"vpm_jax.{module}").main(arguments.split())


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (143, 143)])
def test_the_commands_exit_code(returned, code):
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: returned)
    assert end.value.code == code


def test_commands_show_no_log_of_xla(monkeypatch):
    """It calls a slow compile a bug of XLA."""
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    with pytest.raises(SystemExit):
        cli.run(lambda: 0)
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"


def test_a_reader_that_leaves_is_no_traceback():
    program = "from vpm_jax import cli\ncli.run(lambda: [print('line') for _ in range(100000)] and None)"
    process = subprocess.run(
        f'{sys.executable} -c "{program}" | head -1', shell=True, capture_output=True, text=True, timeout=60
    )
    assert process.stdout == "line\n"
    assert process.stderr == ""


def test_the_work_goes_on_when_nobody_reads(tmp_path):
    program = "from pathlib import Path; from vpm_jax import cli\n"
    program += f"def main():\n for _ in range(100000): print('line')\n Path({str(tmp_path / 'result')!r}).touch()\n"
    process = subprocess.Popen([sys.executable, "-c", program + "cli.run(main)"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "result").exists()


def test_a_closed_terminal_and_other_encodings_end_no_command(tmp_path):
    controller, terminal = os.openpty()
    os.close(controller)
    with open(terminal, "w") as closed, cli.unfailing(closed) as stream:
        print("line", file=stream)
    with open(tmp_path / "file", "w", encoding="ascii") as file, cli.unfailing(file) as stream:
        print("Zo\xeb \udcff", file=stream)
    assert (tmp_path / "file").read_bytes() == b"Zo\\xeb \\udcff\n"


def test_disk_trouble_is_found_in_what_libraries_make_of_it():
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = RuntimeError("the writer failed")
    wrapped.__cause__ = full
    assert "disk is full" in disk_trouble(full)
    assert "disk is full" in disk_trouble(wrapped)
    assert "disk is full" in disk_trouble(ValueError("UNKNOWN: writing 'd/1': No space left on device [OS error 28]"))
    assert disk_trouble(ValueError("No such thing")) is None


@pytest.mark.parametrize("check", [cli.check_output, cli.check_folder])
def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path, monkeypatch, check):
    check("--output", tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--output .*below: .*file is a file, expected a folder: choose another\.$"):
        check("--output", tmp_path / "file" / "deep" / "below")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=r"^--output .*below: permission denied: choose another folder or change its"):
        check("--output", tmp_path / "none" / "below")
    read_only = SimpleNamespace(f_flag=os.ST_RDONLY)
    monkeypatch.setattr(os, "statvfs", lambda path: read_only)
    with pytest.raises(UserError, match=r"^--output .*new: that file system is read-only: choose another folder\.$"):
        check("--output", tmp_path / "new")
    assert os.listdir(tmp_path) == ["file"]


def test_writing_says_which_path_and_why(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "below"
    sentence = rf"^{path} could not be written: Not a directory: choose another folder\.$"
    with pytest.raises(UserError, match=sentence), writing(path):
        path.mkdir()
