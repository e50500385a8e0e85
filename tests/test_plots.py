"""The pictures are drawn, hold what they were given, and take what real runs hold."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vpm_jax import plots


def panel(figure, title):
    return next(axes for axes in figure.axes if title in (axes.get_title(), axes.get_title(loc="left")))


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def curves(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_gamma_curves(tmp_path, figures):
    results = {
        "VPM": {1.0: {"rank-1": 0.7, "mAP": 0.5}, 0.5: {"rank-1": 0.2, "mAP": 0.1}},
        "global": {0.5: {"rank-1": 0.1, "mAP": 0.05}},
    }
    plots.gamma_curves(tmp_path / "gamma.png", results, "a recipe", chance=0.01)
    assert curves(panel(figures[0], "rank-1"))["VPM"] == ([0.5, 1.0], [0.2, 0.7])
    assert curves(panel(figures[0], "mAP"))["VPM"] == ([0.5, 1.0], [0.1, 0.5])
    assert "chance (1%)" in curves(panel(figures[0], "rank-1"))
    assert "chance (1%)" not in curves(panel(figures[0], "mAP"))
    with Image.open(tmp_path / "gamma.png") as image:
        assert image.size == (1376, 624)
    plots.gamma_curves(tmp_path / "gamma.svg", results, "a recipe")
    assert "<svg" in (tmp_path / "gamma.svg").read_text()[:2000]


def test_gamma_curves_beside_the_papers(tmp_path, figures):
    values = {0.5: {"rank-1": 0.4, "mAP": 0.3}, 1.0: {"rank-1": 0.6, "mAP": 0.5}}
    seeds = {0.5: {"rank-1": [0.3, 0.4, 0.5], "mAP": [0.3] * 3}, 1.0: {"rank-1": [0.55, 0.6, 0.65], "mAP": [0.5] * 3}}
    results = {"global feature": values, "p = 2": seeds, "p = 8": values}
    published = {"p = 8": {0.5: {"rank-1": 0.7, "mAP": 0.5}, 0.9: {"rank-1": 0.9}}, "of others": values}
    plots.gamma_curves(tmp_path / "gamma.png", results, "title", published=published, shades=("p = 2", "p = 8"))
    axes = panel(figures[0], "rank-1")
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in dashed] == [([0.5, 0.9], [0.7, 0.9])]
    own = {line.get_label(): line for line in axes.lines}
    assert (
        dashed[0].get_color() is own["p = 8"].get_color() and own["p = 8"].get_color() is not own["p = 2"].get_color()
    )
    band = axes.collections[0].get_datalim(axes.transData)
    assert (band.y0, band.y1) == pytest.approx((0.3, 0.65))
    assert own["p = 2"].get_ydata() == pytest.approx([0.4, 0.6])
    assert legend(figures[0])[-2:] == ["± standard deviation over seeds", "Sun et al. (2019), in the same color"]
    # One published number makes no line, and the legend none.
    plots.gamma_curves(tmp_path / "gamma.png", {"p = 8": values}, "title", published={"p = 8": {1.0: {"rank-1": 0.9}}})
    assert legend(figures[1]) == ["p = 8"]
    assert "40%" in [label.get_text() for label in panel(figures[0], "mAP").get_yticklabels()]


def test_of_two_seeds_each_is_shown(tmp_path, figures):
    by_gamma = {0.5: {"rank-1": [0.2, 0.4], "mAP": [0.1, 0.2]}, 1.0: {"rank-1": [0.5, 0.6], "mAP": [0.3, 0.3]}}
    plots.gamma_curves(tmp_path / "gamma.png", {"VPM": by_gamma}, "title")
    axes = panel(figures[0], "rank-1")
    assert curves(axes)["VPM"][1] == pytest.approx([0.3, 0.55]) and not axes.collections
    dots = [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == "None"]
    assert dots == [[0.2, 0.5], [0.4, 0.6]] and legend(figures[0]) == ["VPM", "each seed (line: mean)"]


def test_ticks_of_gammas_are_apart(tmp_path, figures):
    near = {gamma / 100: {"rank-1": 0.5, "mAP": 0.4} for gamma in range(45, 101, 5)}
    plots.gamma_curves(tmp_path / "gamma.png", {"VPM": near}, "title")
    assert panel(figures[0], "mAP").get_xticks() == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert plots._apart([1.0]) == [1.0] and plots._apart([0.5, 1.0, 0.5]) == [0.5, 1.0]


def test_differences(tmp_path, figures):
    found = {
        "MVPM-1": {0.5: {"rank-1": [-4.0], "mAP": [-2.0]}, 1.0: {"rank-1": [1.0], "mAP": [0.5]}},
        "MVPM-2": {1.0: {"rank-1": [0.0, -1.0], "mAP": [0.2, 0.4]}},
    }
    plots.differences(tmp_path / "a.png", found, "title", "VPM", {"MVPM-2": {1.0: {"rank-1": -0.2}}})
    above, below = figures[0].axes
    assert [bar.get_height() for bar in above.patches] == [-4.0, 1.0, -0.5]
    assert [bar.get_height() for bar in below.patches] == pytest.approx([-2.0, 0.5, 0.3])
    centres = [bar.get_x() + bar.get_width() / 2 for bar in above.patches]
    assert centres[0] < 0 < centres[1] < 1 < centres[2]  # at 0.5, then side by side around 1.0
    expected = ["VPM (zero)", "MVPM-1", "MVPM-2", "pale: one seed", "each seed (bar: mean)", "Sun et al. (2019)"]
    assert legend(figures[0]) == expected
    assert [bar.get_facecolor()[3] for bar in above.patches] == [0.3, 0.3, 1.0]


def test_a_pdf_has_no_date(tmp_path):
    values = {"VPM": {1.0: {"rank-1": 0.5, "mAP": 0.4}}}
    plots.gamma_curves(tmp_path / "a.pdf", values, "title")
    data = (tmp_path / "a.pdf").read_bytes()
    assert data.startswith(b"%PDF") and b"CreationDate" not in data and b"/Type3" not in data


def line(step, **changes):
    values = dict(step=step, stage=1, loss=9.0 - step / 10, loss_region=1.0, loss_identity=8.0, learning_rate=0.1)
    values |= dict(grad_norm=3.0, accuracy_locator=0.5, accuracy_identity=[0.1, 0.2, 0.6], images_per_second=40.0)
    return json.dumps(values | changes) + "\n"


def test_training_curves(tmp_path, figures):
    path = tmp_path / "metrics.jsonl"
    # A run that resumed at step 2 and was killed while writing step 4.
    path.write_text(line(1) + line(2, loss=99.0) + line(2) + line(3, stage=2, loss_triplet=0.4) + line(4)[:30])
    plots.training_curves(tmp_path / "training.png", path, "a run")
    loss = curves(panel(figures[0], "loss"))
    np.testing.assert_allclose(loss["total (weighted)"], [[1, 2, 3], [8.9, 8.8, 8.7]])
    assert loss["triplet"] == ([3], [0.4])
    path.write_text(line(1, loss_triplet=0.4, weight_triplet=0.0) + line(2, loss_triplet=0.4, weight_triplet=1.0))
    plots.training_curves(tmp_path / "training.png", path)
    assert curves(panel(figures[1], "loss"))["triplet"] == ([2], [0.4])  # step 1 does not count it
    accuracy = panel(figures[0], "accuracy and shares")
    np.testing.assert_allclose(curves(accuracy)["identity (band: heads)"], [[1, 2, 3], [0.3] * 3])
    band = accuracy.collections[0].get_datalim(accuracy.transData)
    assert (band.y0, band.y1) == pytest.approx((0.1, 0.6))
    assert "comparable" not in curves(accuracy)
    assert list(figures[0].axes[2].get_xticks()) == [0, 1, 2, 3]
    assert figures[0].get_suptitle().startswith("a run\n3 steps, 40 images/s (median)")
    with Image.open(tmp_path / "training.png") as image:
        assert image.size == (1400, 896)


def test_training_curves_of_little(tmp_path, figures):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "loss": 2.0, "accuracy_identity": 0.5, "learning_rate": 0.0, "note": "x"}\n')
    plots.training_curves(tmp_path / "training.png", path)
    assert curves(panel(figures[0], "accuracy and shares"))["identity (band: heads)"] == ([5], [0.5])
    path.write_text("nothing\n[1]\n{}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no line with a step"):
        plots.training_curves(tmp_path / "training.png", path)


@pytest.mark.parametrize(
    ("last", "ticks"),
    [
        (1, [0, 1]),
        (60, [0, 10, 20, 30, 40, 50, 60]),
        (400, [0, 100, 200, 300, 400]),
        (3720, [0, 1000, 2000, 3000, 3720]),
    ],
)
def test_steps_are_labelled_at_round_numbers_and_the_last(last, ticks):
    assert plots._round_steps(last) == ticks


def test_running_mean():
    values = np.random.default_rng(0).random(30)
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(30)]
    np.testing.assert_allclose(plots._running_mean(values, 5), expected)
    values[10] = np.nan  # spoils no more than its neighbors
    assert np.flatnonzero(np.isnan(plots._running_mean(values, 5))).tolist() == [8, 9, 10, 11, 12]


def test_pyplot_stays_out():
    """Drawing must not choose a backend for the program that imports this."""
    check = "import sys, vpm_jax.overlay, vpm_jax.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_gains(tmp_path, figures):
    gained = {
        "flip": {"rank-1": [1.0, 3.0], "mAP": [2.0, 2.5]},
        "ema": {"rank-1": [-1.0, 0.5, 0.2], "mAP": [0.1, -0.4, 0.0]},
        "neck": {"rank-1": [-2.0], "mAP": [-3.0]},
    }
    plots.gains(tmp_path / "gains.png", gained, "a title")
    for metric in ("rank-1", "mAP"):
        axes = panel(figures[0], f"gain in {metric}, points")
        dots = [line for line in axes.lines if line.get_marker() == "o"]
        assert [list(line.get_xdata()) for line in dots] == [gain[metric] for gain in gained.values()]
        assert [line.get_markerfacecolor() == "white" for line in dots] == [False, False, True]
        several = [gained[part][metric] for part in ("flip", "ema")]
        ranges = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
        np.testing.assert_allclose(ranges, [(min(seeds), max(seeds)) for seeds in several])
        means = [lines.get_segments()[0][0][0] for lines in axes.collections]
        assert means == pytest.approx([np.mean(seeds) for seeds in several])
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["flip", "ema", "neck"]
    assert legend(figures[0]) == ["a seed", "one seed only", "range of the seeds", "their mean"]
    plots.gains(tmp_path / "gains.png", {"neck": gained["neck"]}, "a title")
    assert legend(figures[1]) == ["one seed only"]


def test_a_damaged_log_is_drawn_from_its_numbers(tmp_path):
    lines = [{"step": 1, "loss": 2.0, "images_per_second": 3.0}, {"step": 10**20, "loss": 1.0}]
    lines += [{"step": 2, "loss": 1.5, "images_per_second": [4.0, 4.0]}, {"step": "x"}, [1], {"step": 3, "loss": "low"}]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(plots.read_steps(log)) == [1, 2, 3]
    plots.training_curves(tmp_path / "training.png", log)
    assert (tmp_path / "training.png").stat().st_size
    assert plots.median_speed(plots.read_steps(log)) == 3.5
