"""What both sides of the comparison with PyTorch are given: sizes, weights, images, schedules. NumPy only.

Weights and images come from RandomState, the one stream that NumPy promises never to change: the golden arrays hold
the results alone.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "parity.npz"
RECIPES = ("paper", "released")
BACKBONES = ((18, "3x3"), (50, "3x3"), (50, "1x1"))  # depth, which convolution of a bottleneck holds the stride

# One small network: ResNet of width 4 on 64 x 32 images, feature map 4 x 2.
WIDTH, HEIGHT, IMAGE_WIDTH = 4, 64, 32
REGIONS, IDENTITIES, DUMMY = 3, 4, 1
HEAD_DIM, GROUPS = 6, 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH, STEPS = 8, 10
DROPOUT = 0.5

# The schedules, step by step: (learning rate, weight of the triplet loss, whether momentum restarts). The paper's: two
# epochs of two steps without triplets, decayed by 0.1 after the first; then three epochs with, decayed after the
# second. The released one: five epochs of two steps, decayed by 0.2 after the third.
SCHEDULES = {
    "paper": (
        *[(0.1, 0, True), (0.1, 0, False), (0.01, 0, False), (0.01, 0, False)],
        *[(0.1, 1, True), (0.1, 1, False), (0.1, 1, False), (0.1, 1, False), (0.01, 1, False), (0.01, 1, False)],
    ),
    "released": ((0.1, 3, True), *[(0.1, 3, False)] * 5, *[(0.02, 3, False)] * 4),
}


def random(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The initial value of a tensor, by its PyTorch name and shape: kernels He-normal, batch norms no identity."""
    draw = random(name)
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return draw.uniform(0.5, 1.5, shape)
    if len(shape) == 1:
        return draw.normal(0, 0.1, shape)
    return draw.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)


def images(name: str, count: int = BATCH) -> np.ndarray:
    """uint8 [count, HEIGHT, IMAGE_WIDTH, 3]: coarse coloured patches under noise."""
    draw = random(name)
    coarse = draw.randint(0, 200, (count, HEIGHT // 8, IMAGE_WIDTH // 8, 3))
    return (coarse.repeat(8, 1).repeat(8, 2) + draw.randint(0, 56, (count, HEIGHT, IMAGE_WIDTH, 3))).astype(np.uint8)


def batch(recipe: str, step: int) -> dict[str, np.ndarray]:
    """A training batch: every region is invisible in some images, in equally many at each step."""
    draw = random(f"{recipe} batch {step}")
    visible = np.ones((BATCH, REGIONS), bool)
    visible[:3, 2] = False
    visible[0, 1] = False
    visible[7, 0] = visible[7, 1] = False  # shares no region with image 0
    order = draw.permutation(BATCH)
    return {
        "image": images(f"{recipe} images {step}"),
        "identity": np.arange(BATCH, dtype=np.int32) % IDENTITIES,
        "labels": draw.randint(0, REGIONS, (BATCH, 4, 1 if recipe == "released" else 2)).astype(np.int32),
        "visible": visible[order],
    }


def feature_map(recipe: str) -> np.ndarray:
    """[B, h, w, C], not negative, as the last ReLU leaves it."""
    return np.maximum(random(f"{recipe} feature map").normal(0.3, 1, (BATCH, 4, 2, 8 * WIDTH)), 0)


def dropout(recipe: str) -> dict[str, np.ndarray]:
    """What dropout kept: on the locator's input [B, h, w, C] (released) and on the heads' [B, heads, C]."""
    draw = random(f"{recipe} dropout")
    kept = {"dropout": draw.uniform(size=(BATCH, REGIONS + (recipe == "released"), 8 * WIDTH)) > DROPOUT}
    if recipe == "released":
        kept["locator_dropout"] = draw.uniform(size=(BATCH, 4, 2, 8 * WIDTH)) > DROPOUT
    return kept


def sample(values: np.ndarray, most: int = 48) -> np.ndarray:
    """What the golden file keeps of an array: all of it, or `most` numbers of it."""
    values = np.asarray(values, np.float64).ravel()
    if values.size <= most:
        return values
    return values[np.sort(random("sample").choice(values.size, most, replace=False))]


def save(arrays: dict[str, np.ndarray]) -> None:
    """Writes the golden file: three arrays, for an archive of a thousand would be mostly headers."""
    samples = [sample(values) for values in arrays.values()]
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        GOLDEN,
        names=np.frombuffer("\n".join(arrays).encode(), np.uint8),
        sizes=np.array([len(s) for s in samples], np.uint8),
        values=np.concatenate(samples),
    )


def load() -> dict[str, np.ndarray]:
    """{name: `sample` of the array} of the golden file."""
    with np.load(GOLDEN) as file:
        names = file["names"].tobytes().decode().split("\n")
        return dict(zip(names, np.split(file["values"], np.cumsum(file["sizes"].astype(int))[:-1]), strict=True))
