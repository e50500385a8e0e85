"""The benchmarks run and say what they measured."""

import itertools

from vpm_jax.benchmark import main, measure


def test_measure_leaves_out_the_warm_up():
    rate = measure(itertools.chain([1000], itertools.repeat(7, 3)), seconds=60, warm_up=1)
    assert rate.images == 21 and rate.wall > 0 and rate.per_second == 21 / rate.wall


def test_data(monkeypatch, capsys):
    monkeypatch.delenv("VPM_DATA", raising=False)
    arguments = ["--seconds=0.05", "--threads=2", "--config.data.height=64", "--config.data.width=32"]
    main(["data", *arguments])
    out = capsys.readouterr().out
    assert "64 x 32" in out and "generated JPEGs" in out
    for row in ("decode, resize: the limit", "train_batches, 1 thread ", "train_batches, 2 threads"):
        (line,) = (line for line in out.splitlines() if line.startswith(row))
        per_second, per_core = (float(number.replace(",", "")) for number in line[len(row) :].split()[:2])
        assert per_second > 0 and per_core > 0
