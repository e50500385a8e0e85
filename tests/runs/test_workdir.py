"""The lock of a workdir: one holder, whatever died before, here or elsewhere; and the paths of a run's data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from disk import largest_file
from market_files import make_folder
from raising import raises

from vpm_jax import config as config_lib
from vpm_jax.data.inventory import Inventory
from vpm_jax.data.sources import load_dataset
from vpm_jax.errors import UserError
from vpm_jax.runs import locks
from vpm_jax.runs.locks import Lock
from vpm_jax.runs.workdir import WorkdirLock, find_run, read_run, with_absolute_paths, write_data


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(Lock, "BEAT", 0.05)
    monkeypatch.setattr(Lock, "PATIENCE", 0.3)


def left_behind(folder, **changes) -> None:
    """A lock as this process would have left it, with changes."""
    with WorkdirLock(folder):
        holder = json.loads((folder / ".lock").read_text())
    (folder / ".lock").write_text(json.dumps(holder | changes))


def test_a_second_training_is_refused_by_name(tmp_path):
    with WorkdirLock(tmp_path) as lock:
        with pytest.raises(
            UserError, match=rf"in use by another training run \(process {os.getpid()} on .*another --work"
        ):
            WorkdirLock(tmp_path).__enter__()
        lock.check()
    assert not list(tmp_path.iterdir())
    with WorkdirLock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Lock, "PATIENCE", 1e9)
    program = f"""
import time
from pathlib import Path
from vpm_jax.runs.workdir import WorkdirLock
with WorkdirLock(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(999)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {process.pid} on"):
        WorkdirLock(tmp_path).__enter__()
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie, which nobody has waited for yet
    with WorkdirLock(tmp_path):
        pass
    process.communicate()


def test_another_process_with_the_number_of_a_dead_one_is_not_its_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(Lock, "PATIENCE", 1e9)
    left_behind(tmp_path, started="long ago")
    with WorkdirLock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{}", "\r\n", "\udcff\udcfe", None])
def test_a_lock_from_elsewhere_that_nobody_touches_is_taken_over(tmp_path, capsys, text):
    left_behind(tmp_path, place="another machine", host="node7")
    if text is not None:  # its holder died while it wrote its name
        (tmp_path / ".lock").write_bytes(os.fsencode(text))
    with WorkdirLock(tmp_path) as lock:
        lock.check()
    assert ("on node7" if text is None else "unnamed process") in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_lock_from_elsewhere_that_is_touched_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(Lock, "PATIENCE", 60.0)
    left_behind(tmp_path, place="another machine", host="node7")
    touching = threading.Timer(0.2, os.utime, [tmp_path / ".lock"])
    touching.start()
    with pytest.raises(UserError, match="on node7"):
        WorkdirLock(tmp_path).__enter__()
    touching.join()
    assert (tmp_path / ".lock").exists()


def test_its_holder_touches_it(tmp_path):
    with WorkdirLock(tmp_path):
        before, end = (tmp_path / ".lock").stat().st_mtime_ns, time.monotonic() + 60
        while (tmp_path / ".lock").stat().st_mtime_ns == before:
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.mark.parametrize("attempt", range(5))
def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path, attempt):
    left_behind(tmp_path, started="long ago")
    locks, barrier = [Lock(tmp_path / ".lock") for _ in range(8)], threading.Barrier(8)

    def acquire(lock):
        barrier.wait()
        return lock.acquire()

    with ThreadPoolExecutor(8) as pool:
        refusals = list(pool.map(acquire, locks))
    holder = locks[refusals.index(None)]
    assert refusals.count(None) == 1 and not holder.is_lost()
    for lock in locks:
        lock.release()  # of which one is its holder's
    assert not list(tmp_path.iterdir())


def test_one_slow_to_write_its_name_does_not_share_the_lock_with_another(tmp_path, monkeypatch):
    slow, quick, made = Lock(tmp_path / ".lock"), Lock(tmp_path / ".lock"), os.open

    def open_slowly(path, *rest):
        file = made(path, *rest)
        monkeypatch.setattr(os, "open", made)
        assert quick.acquire() is None  # it saw for long enough that nobody fills the file
        return file

    monkeypatch.setattr(os, "open", open_slowly)
    assert f"process {os.getpid()} on" in slow.acquire() and not quick.is_lost()
    quick.release()
    assert slow.acquire() is None
    slow.release()


@pytest.mark.parametrize("attempt", range(5))
def test_what_many_take_in_turn_is_never_held_twice(tmp_path, attempt):
    left_behind(tmp_path, started="long ago")
    inside, most, taken = 0, 0, 0

    def work(_):
        nonlocal inside, most, taken
        for _ in range(10):
            lock = Lock(tmp_path / ".lock")
            if lock.acquire() is None:
                inside, taken = inside + 1, taken + 1
                most = max(most, inside)
                time.sleep(0.001)
                inside -= 1
                lock.release()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert most == 1 and taken > 0 and not list(tmp_path.iterdir())


def test_a_dead_lock_that_vanishes_as_it_is_taken_is_made_anew(tmp_path, monkeypatch):
    left_behind(tmp_path, started="long ago")
    lock, take_over = Lock(tmp_path / ".lock"), Lock._take_over

    def vanish(self, text):
        (tmp_path / ".lock").unlink()
        monkeypatch.setattr(Lock, "_take_over", take_over)
        return take_over(self, text)

    monkeypatch.setattr(Lock, "_take_over", vanish)
    assert lock.acquire() is None and not lock.is_lost()
    lock.release()


def test_a_look_tells_who_holds_it(tmp_path):
    path = tmp_path / ".lock"
    assert locks.holder(path) is None
    with WorkdirLock(tmp_path):
        assert f"process {os.getpid()} on" in locks.holder(path)
    left_behind(tmp_path, started="long ago")
    assert locks.holder(path) is None
    left_behind(tmp_path, place="another machine", host="node7")
    assert "on node7" in locks.holder(path) and "last seen 0:00 ago" in locks.holder(path)
    assert locks.holder(path, silence=-1) is None


def test_a_holder_that_lost_its_lock_learns_of_it(tmp_path):
    with WorkdirLock(tmp_path) as lock:
        (tmp_path / ".lock").unlink()
        lock.check()  # nobody else has it: it is made again
        left_behind_by_another = json.loads((tmp_path / ".lock").read_text()) | {"token": "another"}
        (tmp_path / ".lock").write_text(json.dumps(left_behind_by_another))
        with pytest.raises(UserError, match="has taken over"):
            lock.check()
        os.utime(tmp_path / ".lock", ns=(0, 0))
        time.sleep(10 * lock.BEAT)
        assert (tmp_path / ".lock").stat().st_mtime_ns == 0  # nor does it look alive for the other
    assert (tmp_path / ".lock").exists()  # the other's


def test_a_full_disk_leaves_no_lock(tmp_path):
    with largest_file(10), raises("not-written"):
        WorkdirLock(tmp_path).__enter__()
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_no_run_begins(tmp_path):
    (tmp_path / "file").write_text("")
    with raises("bad-output"):
        find_run(tmp_path / "file" / "run", resume=True)
    assert find_run(tmp_path / "new" / "run", resume=True) is None
    with pytest.raises(UserError, match=r"The path .*\\xff is not UTF-8, which checkpoints need: choose another"):
        find_run(tmp_path / os.fsdecode(b"\xff"), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_failed_before_its_first_checkpoint_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    assert find_run(tmp_path, resume=True) is find_run(tmp_path, resume=False) is None


def test_further_training_sets_are_found_from_any_folder_and_after_all_has_moved(tmp_path, monkeypatch):
    here, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    make_folder(here / "more")
    make_folder(here / "data" / "Market-1501")
    for folder in (here / "runs", elsewhere):
        folder.mkdir()
    files = sorted((here / "more" / "bounding_box_test").glob("*.jpg"))
    rows = (
        f"{path.relative_to(here)},{split},1" for path, split in zip(files, ("train", "query", "gallery"), strict=False)
    )
    (here / "own.csv").write_text("\n".join(["path,split,identity", *rows]))
    monkeypatch.setenv("VPM_DATA", "")
    monkeypatch.chdir(here)
    requested = config_lib.default()
    requested.data.name, requested.data.root = "csv", "own.csv"
    requested.data.also_train = "market1501:more,market1501"  # the second is in ./data
    train = load_dataset(requested.data).train
    saved = with_absolute_paths(requested)
    assert saved.data.also_train == f"market1501:{here / 'more'},market1501:{here / 'data'}"
    assert with_absolute_paths(saved) == saved
    write_data(here / "runs", Inventory.of(train), requested, saved)
    (here / "runs" / "config.json").write_text(config_lib.to_json(saved))

    monkeypatch.chdir(elsewhere)
    assert load_dataset(read_run(here / "runs", [])[1].data).train.names == train.names
    here.rename(tmp_path / "moved")
    assert load_dataset(read_run(tmp_path / "moved" / "runs", [])[1].data).train.names == train.names
    (tmp_path / "moved" / "more").rename(tmp_path / "lost")
    also = read_run(tmp_path / "moved" / "runs", [])[1].data.also_train
    assert also == f"market1501:more,market1501:{tmp_path / 'moved' / 'data'}"  # the first as it was given


def test_a_set_in_the_data_folder_needs_no_path(tmp_path):
    config = config_lib.default()
    make_folder(tmp_path / "Market-1501")
    config.data.name, config.data.root, config.data.also_train = "dukemtmc", str(tmp_path), "market1501"
    assert with_absolute_paths(config).data.also_train == "market1501"
