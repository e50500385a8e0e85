"""What a run writes as it goes: lines all or nothing, files old or new, whatever a kill or a full disk does."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from types import SimpleNamespace

import pytest
from disk import largest_file
from raising import raises

from vpm_jax.disk import make_folder, replacing, write_atomically
from vpm_jax.errors import UserError
from vpm_jax.progress import Status, duration
from vpm_jax.runs.logs import MetricsLog, Records


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("ne")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        assert temporary.suffix == ".json"  # plots choose their format by it
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_names_that_are_not_utf8_are_written_in_any_locale(tmp_path):
    path = tmp_path / "a.md"
    write_atomically(path, "Zo\xeb " + os.fsdecode(b"\xff.png"))
    assert path.read_bytes() == b"Zo\xc3\xab \\xff.png"


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    path = tmp_path / "a.json"
    with replacing(path) as one, replacing(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # who ended last
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_finds_no_room_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    sentence = rf"^{path} could not be written: a file reached the size limit"
    with largest_file(100), pytest.raises(UserError, match=sentence):
        write_atomically(path, "new" * 100)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_records_after_the_checkpoint_and_a_line_cut_short_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Records(path)
    for step in (2, 4, 6):
        log.write({"step": step})
    log.close()
    with path.open("ab") as file:
        file.write(b'{"step": null}\n{"step": 7, "lo\xff')
    log = Records(path, step=4)
    log.write({"step": 5})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 5]


def test_a_record_is_on_the_disk_at_once(tmp_path):
    log = Records(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    log.close()


def test_a_record_that_finds_no_room_is_not_there_in_part(tmp_path):
    log = Records(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    with (
        largest_file(100),
        raises("not-written"),
    ):
        log.write({"step": 2, "text": "x" * 100})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    log = MetricsLog(tmp_path, tracker="tensorboard")
    log.write({"step": 3, "loss": 0.25, "accuracy_identity": [0.5, 0.75]})
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    for tag in (b"loss", b"accuracy_identity/0", b"accuracy_identity/1"):
        assert tag in events.read_bytes()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.25


def test_tensorboard_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'vpm_jax\[tensorboard\]'"):
        MetricsLog(tmp_path, tracker="tensorboard,wandb")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_made_and_tried(tmp_path):
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("")
    with raises("not-written"):
        make_folder(tmp_path / "file")
    with raises("not-written"):
        make_folder(tmp_path / "file" / "below")


def test_a_folder_that_takes_no_file_is_named_alone(tmp_path, monkeypatch):
    def full(dir):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(dir / "tmpabc"))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match=r"^[^ ]*/a could not be written: the disk quota is used up[^/]*$"):
        make_folder(tmp_path / "a")


def test_a_log_is_not_flooded_with_status_lines(capsys):
    status = Status(every=1000)
    for step in range(5):
        status.show(f"step {step}", final=step == 4)
    assert capsys.readouterr().out == "step 0\nstep 4\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")])
def test_duration(seconds, text):
    assert duration(seconds) == text


class FakeWandb:
    """The part of wandb that is used."""

    def __init__(self, error: Exception | None = None):
        self.error, self.runs = error, []

    def init(self, **arguments):
        if self.error:
            raise self.error
        run = SimpleNamespace(arguments=arguments, logged=[], finished=0)
        run.log = lambda values, step: run.logged.append((step, values))
        run.finish = lambda: setattr(run, "finished", run.finished + 1)
        self.runs.append(run)
        return run


def test_a_tracker_gets_every_number_and_a_resumed_run_is_the_same(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for step in (4, 8):
        log = MetricsLog(tmp_path, step - 4, tracker="wandb", config={"seed": 3})
        log.write({"step": step, "loss": 2.5, "accuracy": [0.5, 0.25], "name": "x"})
        log.close()
    first, second = wandb.runs
    assert first.logged == [(4, {"loss": 2.5, "accuracy/0": 0.5, "accuracy/1": 0.25})]
    assert second.logged[0][0] == 8 and first.finished == second.finished == 1
    assert first.arguments == second.arguments and first.arguments["id"]
    assert first.arguments["project"] == "mine" and first.arguments["name"] == tmp_path.name
    assert first.arguments["config"] == {"seed": 3} and first.arguments["resume"] == "allow"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_another_workdir_is_another_run_of_the_tracker(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        MetricsLog(tmp_path / name, tracker="wandb").close()
    assert wandb.runs[0].arguments["id"] != wandb.runs[1].arguments["id"]


def test_a_tracker_that_cannot_start_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        MetricsLog(tmp_path, tracker="wandb")
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(ConnectionError("no\nnetwork")))
    with pytest.raises(UserError, match=r"did not start \(no\): .*WANDB_MODE=offline") as error:
        MetricsLog(tmp_path, tracker="wandb")
    assert "\n" not in str(error.value)
    MetricsLog(tmp_path).close()  # and without one nothing of it is needed
