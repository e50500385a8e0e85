"""A tracker with and without VPM's appearance, on rendered videos of synthetic pedestrians.

    pip install deep-sort-realtime trackers motmetrics filterpy && pip install --no-deps norfair  # it asks for NumPy 1
    OMP_NUM_THREADS=1 taskset -c 1 python docs/results/tracking.py --workdir runs/synthetic

People cross a street, are hidden by pillars, by a low wall and by each other, come near enough for the frame to cut off
their legs, leave, and return. Detections are noisy boxes of the whole person, which reach beyond the frame; some are
missed. Writes figures.json and tracking.png into docs/results/tracking; `docs/results/tables.py` fills the page.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import motmetrics
import norfair
import numpy as np
import supervision
from deep_sort_realtime.deepsort_tracker import DeepSort
from matplotlib.patches import Rectangle
from scipy.stats import t as student
from trackers import ByteTrackTracker, OCSORTTracker

from vpm_jax import VPM
from vpm_jax.benchmark.report import hardware, versions
from vpm_jax.data import synthetic
from vpm_jax.data.pedestrians.canvas import Canvas
from vpm_jax.data.pedestrians.figure import Pose, draw_person
from vpm_jax.data.pedestrians.people import FAMILY, person
from vpm_jax.overlay import with_palette
from vpm_jax.tracking import Encoder

FOLDER = Path(__file__).parent / "tracking"
FRAMES, PEOPLE, PER_SECOND = 240, 10, 12
HEIGHT, WIDTH, SCALE = 330, 900, 2  # drawn at twice the size of the video, as the training images
LEAST_SEEN = 0.25  # people of whom less is visible are not in the ground truth
IOU = 0.5
AGE = 60  # frames that a lost track is kept
THRESHOLDS = (0.05, 0.08, 0.12, 0.16, 0.2, 0.3)
TUNING, VIDEOS = range(900, 902), range(100, 106)  # seeds, of the people too; the model trained on those of seed 0


# ---- The video ----


@dataclass
class Frame:
    """A frame and its people: `boxes` [N, 4] left, top, right, bottom of whole people, and detections of some."""

    pixels: np.ndarray  # uint8 [H, W, 3] RGB
    identity: np.ndarray
    boxes: np.ndarray
    detected: np.ndarray  # [M, 4]


@dataclass
class Walk:
    """A walk across the street."""

    who: int
    start: int
    speed: float  # pixels per frame, negative to the left
    near: tuple[float, float]  # the ground line at the left and at the right
    yaw: float
    phase: float

    def at(self, frame: int) -> tuple[float, float, float]:
        """(x, ground line, height) in pixels."""
        x = (-150 if self.speed > 0 else WIDTH + 150) + self.speed * (frame - self.start)
        ground = float(np.interp(x, (0, WIDTH), self.near))
        return x, ground, 0.9 * (ground - 40)


def walks(rng: np.random.Generator) -> list[Walk]:
    result = []
    for who in range(PEOPLE):
        frame, side = int(rng.integers(-40, 100)), int(rng.choice((-1, 1)))
        while frame < FRAMES:
            speed, near = side * rng.uniform(8, 13), (rng.uniform(240, 330), rng.uniform(300, 560))
            yaw = side * np.pi / 2 + rng.normal(0, 0.2)
            result.append(Walk(who, frame, speed, near if rng.random() < 0.5 else near[::-1], yaw, rng.uniform(0, 6)))
            frame += int((WIDTH + 300) / abs(speed) + rng.uniform(5, 30))
            side = -side
    return result


def video(seed: int) -> Iterator[Frame]:
    rng = np.random.default_rng(seed)
    camera, paths = synthetic.camera(seed, 1), walks(rng)
    pillars = [(int(x), 0, int(x + rng.uniform(60, 90))) for x in (rng.uniform(150, 350), rng.uniform(600, 750))]
    covers = [*pillars, (420, 215, 560)]  # left, top, right; down to the lower edge
    colors = rng.uniform(0.2, 0.6, (3, 3))
    for number in range(FRAMES):
        canvas = Canvas(camera.scene[:, :HEIGHT, :WIDTH].copy(), camera.light, camera.ambient, seed)
        placed = sorted(((path, *path.at(number)) for path in paths), key=lambda item: item[2])  # far to near
        placed = [item for item in placed if item[0].start <= number and -150 <= item[1] <= WIDTH + 150]
        for path, x, ground, tall in placed:
            phase = path.phase + 2 * np.pi * abs(path.speed) * (number - path.start) / (0.8 * tall)
            pose = Pose(path.yaw, camera.pitch, phase, 0.35, 0.3, 0.3, 0.0)
            draw_person(canvas, person(seed, synthetic.TEST, FAMILY * path.who), pose, x, ground, tall)
        for (left, top, right), color in zip(covers, colors, strict=True):
            canvas.pixels[:, top:, left:right] = color[:, None, None]
            canvas.pixels[:, top : top + 6, left:right] *= 1.3
        pixels = exposed(camera, canvas.pixels, rng)
        boxes = np.array([(x - 0.2 * h, y - 1.02 * h, x + 0.2 * h, y + 0.02 * h) for _, x, y, h in placed])
        boxes = boxes.reshape(-1, 4)
        seen = np.array([visible(box, boxes[i + 1 :], covers) for i, box in enumerate(boxes)])
        there = seen >= LEAST_SEEN
        boxes, identity = boxes[there] / SCALE, np.array([p.who for p, *_ in placed], int)[there]
        found = rng.random(len(boxes)) < np.where(seen[there] < 0.5, 0.7, 0.95)
        size = (boxes[:, 3] - boxes[:, 1])[:, None]
        yield Frame(pixels, identity, boxes, (boxes + rng.normal(0, 0.02, boxes.shape) * size)[found])


def exposed(camera: synthetic.Camera, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The camera's color, haze and noise, at the size of the video."""
    image = cv2.resize(pixels.transpose(1, 2, 0), (WIDTH // SCALE, HEIGHT // SCALE), interpolation=cv2.INTER_AREA)
    gray = image.mean(axis=2, keepdims=True)
    image = (gray + camera.saturation * (image - gray)) * camera.gain * camera.cast
    image = camera.haze + (1 - camera.haze) * image.clip(0, 1) ** camera.contrast
    return (255 * (image + camera.noise * rng.standard_normal(image.shape)) + 0.5).clip(0, 255).astype(np.uint8)


def visible(box: np.ndarray, nearer: np.ndarray, covers: list[tuple[int, int, int]]) -> float:
    """The fraction of a grid of points of a person that neither the frame nor anything nearer hides."""
    x, y = np.meshgrid(np.linspace(box[0], box[2], 9)[2:-2], np.linspace(box[1], box[3], 18)[1:-1])
    seen = (x >= 0) & (x < WIDTH) & (y >= 0) & (y < HEIGHT)
    for left, top, right in covers:
        seen &= ~((x >= left) & (x < right) & (y >= top))
    for left, top, right, bottom in nearer:
        margin = 0.2 * (right - left)
        seen &= ~((x > left + margin) & (x < right - margin) & (y > top) & (y < bottom))
    return float(seen.mean())


# ---- Appearance ----


def histogram(frame: Frame, boxes: np.ndarray) -> np.ndarray:
    """A color histogram of each of three stripes of a box, [N, D]; what an appearance without learning can do."""
    rows = []
    for left, top, right, bottom in boxes.astype(int):
        crop = cv2.cvtColor(frame.pixels[top : bottom + 1, left : right + 1], cv2.COLOR_RGB2HSV)
        stripes = np.array_split(crop, 3) if len(crop) > 2 else [crop] * 3
        rows.append(
            np.concatenate(
                [cv2.calcHist([s], [0, 1, 2], None, [8, 4, 4], [0, 180, 0, 256, 0, 256]).ravel() for s in stripes]
            )
        )
    vectors = np.sqrt(np.array(rows, np.float32).reshape(-1, 384))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def described(encoder: Encoder, frames: list[Frame]) -> dict[str, list[np.ndarray]]:
    """{kind of appearance: vectors [M, D] of the detections of each frame}."""
    result: dict[str, list[np.ndarray]] = {"histogram": [], "ignored": [], "known": []}
    limits = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT]) / SCALE
    for frame in frames:
        shown = frame.detected.clip(0, limits)
        ignored = encoder.encode(frame.pixels, shown)
        known, cut = ignored.copy(), (shown != frame.detected).any(axis=1)
        if cut.any():
            known[cut] = encoder.encode(frame.pixels, frame.detected[cut])
        for name, vectors in (("histogram", histogram(frame, shown)), ("ignored", ignored), ("known", known)):
            result[name].append(vectors)
    return result


# ---- Tracking ----

Tracks = list[tuple[np.ndarray, np.ndarray]]  # (ids [T], boxes [T, 4]) of each frame


def deep_sort(frames: list[Frame], vectors: list[np.ndarray] | None, threshold: float = -1.0) -> Tracks:
    """DeepSORT. Without vectors, by motion and overlap alone (SORT): no distance is below the threshold."""
    tracker = DeepSort(max_age=AGE, n_init=3, max_cosine_distance=threshold, nn_budget=50, embedder=None)
    result = []
    for number, frame in enumerate(frames):
        detections = [([x, y, right - x, bottom - y], 1.0, "person") for x, y, right, bottom in frame.detected.tolist()]
        embeds = list(np.ones((len(detections), 1)) if vectors is None else vectors[number])
        tracks = [x for x in tracker.update_tracks(detections, embeds) if x.is_confirmed() and not x.time_since_update]
        result.append(
            (np.array([int(x.track_id) for x in tracks], int), boxes_of([x.to_ltrb(orig=True) for x in tracks]))
        )
    return result


def with_norfair(frames: list[Frame], vectors: list[np.ndarray] | None, threshold: float = 0.0) -> Tracks:
    """Norfair: motion and overlap; with vectors, a new track becomes a lost one of similar appearance."""

    def distance(new: norfair.TrackedObject, lost: norfair.TrackedObject) -> float:
        a, b = (np.mean([x.embedding for x in track.past_detections], axis=0) for track in (new, lost))
        return 1 - float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    looks = {} if vectors is None else {"reid_distance_function": distance, "reid_distance_threshold": threshold}
    tracker = norfair.Tracker(
        "iou",
        0.7,
        hit_counter_max=10,
        initialization_delay=2,
        past_detections_length=20,
        reid_hit_counter_max=AGE,
        **looks,
    )
    result = []
    for number, frame in enumerate(frames):
        embeddings = [None] * len(frame.detected) if vectors is None else list(vectors[number])
        detections = [
            norfair.Detection(box.reshape(2, 2), data=number, embedding=x)
            for box, x in zip(frame.detected, embeddings, strict=True)
        ]
        tracks = [x for x in tracker.update(detections) if x.last_detection.data == number]
        boxes = [x.last_detection.points.ravel() for x in tracks]
        result.append((np.array([x.id for x in tracks], int), boxes_of(boxes)))
    return result


def roboflow(frames: list[Frame], tracker: ByteTrackTracker | OCSORTTracker) -> Tracks:
    result = []
    for frame in frames:
        confidence = np.full(len(frame.detected), 0.9, np.float32)
        detections = supervision.Detections(frame.detected.astype(np.float32), confidence=confidence)
        found = tracker.update(detections)
        kept = found.tracker_id >= 0 if len(found) else np.zeros(0, bool)
        result.append((found.tracker_id[kept] if len(found) else np.zeros(0, int), boxes_of(found.xyxy[kept])))
    return result


def boxes_of(boxes: object) -> np.ndarray:
    return np.asarray(boxes, np.float64).reshape(-1, 4)


def measure(frames: list[Frame], tracks: Tracks) -> dict[str, float]:
    """IDF1 and MOTA in percent, identity switches, by motmetrics."""
    accumulator = motmetrics.MOTAccumulator(auto_id=True)
    for frame, (ids, boxes) in zip(frames, tracks, strict=True):
        distance = 1 - overlap(frame.boxes, boxes)
        accumulator.update(frame.identity, ids, np.where(distance > 1 - IOU, np.nan, distance))
    names = {"idf1": "IDF1", "num_switches": "switches", "mota": "MOTA"}
    found = motmetrics.metrics.create().compute(accumulator, metrics=list(names), name="video").iloc[0]
    return {title: float(found[name]) * (1 if name == "num_switches" else 100) for name, title in names.items()}


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union, [A, B]."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = (high - low).clip(0).prod(axis=2)
    area = [((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1])) for x in (a, b)]
    return both / (area[0][:, None] + area[1] - both)


# ---- The comparison ----

LOOKS = {
    "none": "no appearance",
    "histogram": "color histograms",
    "ignored": "VPM",
    "known": "VPM that knows what the frame cuts off",
}
TITLES = {
    **{f"Norfair {look}": f"Norfair, {words}" for look, words in LOOKS.items()},
    **{f"DeepSORT {look}": f"DeepSORT, {words}" for look, words in LOOKS.items()},
    "ByteTrack none": "ByteTrack (Roboflow), no appearance",
    "OC-SORT none": "OC-SORT (Roboflow), no appearance",
}
ASSOCIATIONS = {"Norfair": with_norfair, "DeepSORT": deep_sort}
Vectors = dict[str, list[np.ndarray]]


def tracked(name: str, frames: list[Frame], vectors: Vectors, threshold: float) -> Tracks:
    tracker, look = name.split()
    if tracker in ASSOCIATIONS:
        return ASSOCIATIONS[tracker](frames, *([None] if look == "none" else [vectors[look], threshold]))
    kind = {"ByteTrack": ByteTrackTracker, "OC-SORT": OCSORTTracker}[tracker]
    return roboflow(frames, kind(lost_track_buffer=AGE, frame_rate=30.0, minimum_consecutive_frames=3))


def prepared(seed: int, encoder: Encoder) -> tuple[list[Frame], Vectors]:
    frames = list(video(seed))
    return frames, described(encoder, frames)


def separation(frames: list[Frame], vectors: Vectors, regions: int) -> dict[str, float]:
    """How vectors of detections more than 30 frames apart tell people apart, and what the lowest region weighs."""
    limits = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT]) / SCALE
    identity, time_, cut, hidden = [], [], [], []
    for number, frame in enumerate(frames):
        for box in frame.detected:
            who = int(overlap(box[None], frame.boxes)[0].argmax())
            shown = box.clip(0, limits)
            cut.append(1 - np.prod(shown[2:] - shown[:2]) / np.prod(box[2:] - box[:2]))
            hidden.append(np.delete(overlap(frame.boxes[who][None], frame.boxes)[0], who).max(initial=0))
            identity.append(frame.identity[who])
            time_.append(number)
    clear = (np.array(cut) < 0.05) & (np.array(hidden) < 0.1)
    far = np.abs(np.subtract.outer(time_, time_)) > 30
    same = np.equal.outer(identity, identity)
    result = {}
    for look, each in vectors.items():
        array = np.concatenate([x for x in each if len(x)])
        distance = 1 - array @ array.T
        for title, chosen in (("all", far), ("clear", far & np.outer(clear, clear))):
            ours, others = distance[chosen & same], np.sort(distance[chosen & ~same])
            result |= {f"{look}: {title}, same": float(ours.mean()), f"{look}: {title}, others": float(others.mean())}
            result[f"{look}: {title}, ordered"] = float(1 - np.searchsorted(others, ours).mean() / len(others))
        if look != "histogram":
            lengths = np.linalg.norm(array.reshape(len(array), regions, -1), axis=2)[np.array(cut) > 0.25]
            result[f"{look}: length of the lowest region where a quarter is cut"] = float(lengths[:, -1].mean())
    return result


def interval(values: np.ndarray) -> tuple[float, float]:
    """(mean, half of its 95 % confidence interval) over the videos."""
    return float(values.mean()), float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a run of configs/synthetic.py")
    args = parser.parse_args()
    model = VPM.load(args.workdir)
    encoder, started = Encoder(model, "rgb"), time.monotonic()
    # One threshold for VPM, so that its two variants differ in nothing but what they know.
    names = [f"{tracker} {look}" for tracker in ASSOCIATIONS for look in ("histogram", "ignored")]
    scored: dict[str, dict[float, list[float]]] = {name: {x: [] for x in THRESHOLDS} for name in names}
    for seed in TUNING:
        frames, vectors = prepared(seed, encoder)
        for name, by_threshold in scored.items():
            for threshold, found in by_threshold.items():
                found.append(measure(frames, tracked(name, frames, vectors, threshold))["IDF1"])
        print(f"tuned on video {seed} ({time.monotonic() - started:.0f} s)", flush=True)
    tuned = {name: {x: float(np.mean(values)) for x, values in found.items()} for name, found in scored.items()}
    thresholds = {name.replace("ignored", "known"): max(found, key=lambda x: found[x]) for name, found in tuned.items()}
    thresholds |= {name: thresholds[name.replace("ignored", "known")] for name in tuned}
    print(f"thresholds {thresholds}; IDF1 {tuned}", flush=True)

    results: dict[str, list[dict[str, float]]] = {name: [] for name in TITLES}
    counts = {"people in frames": 0, "detections": 0, "cut by the frame": 0}
    apart: list[dict[str, float]] = []
    first: tuple[list[Frame], dict[str, Tracks]] | None = None
    for seed in VIDEOS:
        frames, vectors = prepared(seed, encoder)
        tracks = {name: tracked(name, frames, vectors, thresholds.get(name, 0.0)) for name in TITLES}
        for name in TITLES:
            results[name].append(measure(frames, tracks[name]))
        first = first or (frames, tracks)
        apart.append(separation(frames, vectors, model.grid.count))
        for frame in frames:
            inside = (frame.detected >= 0).all(1) & (frame.detected <= [WIDTH / 2, HEIGHT / 2] * 2).all(1)
            values = len(frame.identity), len(frame.detected), int((~inside).sum())
            counts = {key: counts[key] + value for key, value in zip(counts, values, strict=True)}
        summary = {name: {k: round(v, 1) for k, v in found[-1].items()} for name, found in results.items()}
        print(f"video {seed} ({time.monotonic() - started:.0f} s): {summary}", flush=True)
    assert first is not None
    figures = {name: {key: np.array([x[key] for x in found]) for key in found[0]} for name, found in results.items()}
    rows = [["", "ID switches", "IDF1, %", "MOTA, %", "IDF1 beside the same tracker without appearance"]]
    for name, found in figures.items():
        cells = ["{:.1f} ± {:.1f}".format(*interval(found[key])) for key in ("switches", "IDF1", "MOTA")]
        without = figures[f"{name.split()[0]} none"]
        change = "" if found is without else "{:+.1f} ± {:.1f}".format(*interval(found["IDF1"] - without["IDF1"]))
        rows.append([TITLES[name], *cells, change])
    paired = {
        tracker: {
            key: interval(figures[f"{tracker} known"][key] - figures[f"{tracker} ignored"][key])
            for key in ("switches", "IDF1", "MOTA")
        }
        for tracker in ASSOCIATIONS
    }
    record = {
        "table": rows,
        "known minus ignored": paired,
        "thresholds": thresholds,
        "IDF1 of thresholds": tuned,
        "counts": counts,
        "distances": {key: float(np.mean([x[key] for x in apart])) for key in apart[0]},
        "videos": {name: {key: x.tolist() for key, x in found.items()} for name, found in figures.items()},
        "model": {"source": model.source, "fingerprint": model.fingerprint},
        "hardware": hardware(),
        "versions": versions(),
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "figures.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    picture(*first, figures)
    print(json.dumps({key: record[key] for key in ("table", "known minus ignored", "counts")}, indent=1))


def picture(frames: list[Frame], tracks: dict[str, Tracks], figures: dict[str, dict[str, np.ndarray]]) -> None:
    """Frames of the first video with the tracks' numbers, and the measures of every video."""
    shown, names = (84, 102, 120), ("DeepSORT none", "DeepSORT ignored")
    figure = plt.figure(figsize=(13, 8.4), layout="constrained")
    upper, lower = figure.subfigures(2, height_ratios=(1, 1))
    colors = plt.get_cmap("tab20")
    for name, row in zip(names, upper.subplots(2, len(shown)), strict=True):
        for number, axes in zip(shown, row, strict=True):
            axes.imshow(frames[number].pixels)
            for identity, (left, top, right, bottom) in zip(*tracks[name][number], strict=True):
                color = colors(int(identity) % 20)
                axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=color, lw=2))
                at = float(np.clip(left, 4, WIDTH / SCALE - 30)), max(top, 4)
                style = dict(facecolor=color, lw=0, pad=1.5)
                axes.text(*at, str(identity), color="white", va="top", fontsize=11, weight="bold", bbox=style)
            axes.set(xticks=[], yticks=[], xlim=(0, WIDTH / SCALE), ylim=(HEIGHT / SCALE, 0))
            axes.set_title(f"frame {number}" + f": {TITLES[name]}" * (number == shown[0]), fontsize=10, loc="left")
    charts = lower.subplots(1, 2, sharey=True)
    for axes, (key, label) in zip(charts, (("IDF1", "IDF1, %"), ("switches", "ID switches")), strict=True):
        for place, (name, found) in enumerate(figures.items()):
            mean, half = interval(found[key])
            color = "C0" if name.endswith(("ignored", "known")) else "0.2"
            axes.plot(found[key], np.full(len(found[key]), place), "o", color="0.7", ms=4)
            axes.errorbar(mean, place, xerr=half, fmt="s", color=color, capsize=4)
        axes.set_yticks(range(len(figures)), [TITLES[name] for name in figures])
        axes.set_xlabel(f"{label}: each video, mean and 95 % interval")
    charts[0].invert_yaxis()
    figure.savefig(FOLDER / "tracking.png", dpi=80)
    with_palette(FOLDER / "tracking.png")
    plt.close(figure)


if __name__ == "__main__":
    main()
