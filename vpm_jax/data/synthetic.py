"""Synthetic pedestrians: a re-ID dataset without real people, rendered on first use in the Market-1501 layout.

`ensure` renders the dataset once; every byte is determined by its arguments. This module has the cameras, their images
and the folder; `vpm_jax.data.pedestrians` has the people and how they are drawn.

The dataset poses a re-ID problem: people of a family differ in only one or two attributes, every camera has its own
light and color cast, viewpoints hide a print or reveal a backpack, boxes are slightly off, and objects occlude people.
Attributes range from hair to shoes, so that every region is informative.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from vpm_jax.data.pedestrians.canvas import Canvas, Paint
from vpm_jax.data.pedestrians.figure import Pose, draw_person
from vpm_jax.data.pedestrians.people import Color, person
from vpm_jax.disk import disk_trouble
from vpm_jax.errors import UserError

VERSION = 1  # part of the folder's name; increase it with any change of the images
HEIGHT, WIDTH = 128, 64
_SCALE = 2  # images are drawn at twice their size
TRAIN, TEST, STRANGERS = 0, 1, 2  # disjoint streams of people

Progress = Callable[[int, int], None]


def ensure(
    root: Path | str,
    seed: int = 0,
    train_identities: int = 200,
    test_identities: int = 200,
    images_per_camera: int = 2,
    cameras: int = 4,
    progress: Progress | None = None,
) -> Path:
    """The folder of a synthetic dataset under `root`, rendered if it does not exist.

    It contains `bounding_box_train`, `query` (one image per test identity and camera) and `bounding_box_test` (the
    other images of test identities, strangers as distractors `0000`, bad boxes as junk `-1`). Images are 128 x 64 JPEGs
    named like `0002_c1s1_000151_01.jpg`. A temporary folder is renamed at the end, so an incomplete dataset never
    appears.

    Args:
      root: the parent folder.
      seed: of all random numbers.
      train_identities: number of identities for training.
      test_identities: number of identities for evaluation.
      images_per_camera: images of each identity per camera.
      cameras: number of cameras, which all see every identity.
      progress: called with (finished images, all images) after each image.

    Raises:
      UserError: for numbers out of range, a full disk, a folder that cannot be written, or one that lacks images.
    """
    counts = dict(train=train_identities, test=test_identities, images=images_per_camera, cameras=cameras)
    _check(**counts)
    root, shots = Path(root), list(_shots(**counts))
    folder = root / folder_name(seed, train_identities, test_identities, images_per_camera, cameras)
    if folder.is_dir():
        if missing := [shot.path for shot in shots if not (folder / shot.path).is_file()]:
            raise UserError(
                f"{folder} lacks {len(missing):,} of its {len(shots):,} images, such as {missing[0]}: delete the "
                "folder to render them again."
            )
        return folder
    # A unique name, since another process may be rendering too.
    temporary = root / f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}"
    try:
        for split in ("bounding_box_train", "query", "bounding_box_test"):
            (temporary / split).mkdir(parents=True)
        for done, shot in enumerate(shots, 1):
            (temporary / shot.path).write_bytes(encode(seed, shot))
            if progress is not None:
                progress(done, len(shots))
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same bytes
                raise
    except OSError as error:
        size = f"about {max(1, round(len(shots) * 4 / 1024))} MB"
        trouble = disk_trouble(error) or f"{error.strerror or error}: choose another folder"
        raise UserError(
            f"The synthetic pedestrians ({size}) could not be rendered into {str(root)!r}, which config.data.root "
            f"sets: {trouble}.",
            code="not-written",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def folder_name(seed: int, train_identities: int, test_identities: int, images_per_camera: int, cameras: int) -> str:
    """The name of the folder that `ensure` renders with these arguments."""
    counts = f"train{train_identities}-test{test_identities}-images{images_per_camera}-cameras{cameras}"
    return f"synthetic-v{VERSION}-seed{seed}-{counts}"


def _check(train: int, test: int, images: int, cameras: int) -> None:
    where = "config.data.synthetic"
    if train < 1 or test < 1 or train + test > 9999:
        raise UserError(
            f"{where} has {train} training and {test} test identities, expected at least 1 each and at most 9999 "
            "together, because file names have four digits for them."
        )
    if not 2 <= cameras <= 9:
        raise UserError(
            f"{where}.cameras is {cameras}, expected 2 to 9, so that queries have matches in other cameras."
        )
    if not 2 <= images <= 99:
        raise UserError(
            f"{where}.images_per_camera is {images}, expected 2 to 99: one for the query and the rest for the gallery."
        )


# ---- Shots ----


@dataclass(frozen=True)
class Shot:
    """One image to render."""

    path: str
    stream: int
    index: int  # of the person in the stream
    camera: int
    take: int  # of this person by this camera
    kind: str = "person"  # "person" | "junk" | "distractor"


def _shots(train: int, test: int, images: int, cameras: int) -> Iterator[Shot]:
    def name(identity: int, camera: int, frame: int, take: int) -> str:
        return f"{identity:04d}_c{camera}s{1 + frame % 3}_{frame * 25 % 1_000_000 + 1:06d}_{take + 1:02d}.jpg"

    for number in range(train + test):
        stream, index = (TRAIN, number) if number < train else (TEST, number - train)
        for camera in range(1, cameras + 1):
            for take in range(images):
                split = "bounding_box_train" if stream == TRAIN else "bounding_box_test" if take else "query"
                file = name(number + 1, camera, 7 * number + 3 * take, take)
                yield Shot(f"{split}/{file}", stream, index, camera, take)
    # Junk and distractors are about a tenth of the gallery each, as in Market-1501.
    for extra in range(-(-test * cameras * (images - 1) // 10)):
        camera = 1 + extra % cameras
        junk = f"-1_c{camera}s1_{extra * 25 + 1:06d}_01.jpg"
        yield Shot(f"bounding_box_test/{junk}", TEST, extra * 7 % test, camera, images + extra, "junk")
        distractor = f"0000_c{camera}s1_{extra * 25 + 1:06d}_01.jpg"
        yield Shot(f"bounding_box_test/{distractor}", STRANGERS, extra, camera, 0, "distractor")


# ---- Cameras ----


@dataclass(frozen=True)
class Camera:
    """Properties shared by all images of a camera."""

    yaw: float  # the mean direction in which people walk
    spread: float  # its standard deviation
    pitch: float
    light: np.ndarray  # direction to the light: right, down, towards the viewer
    ambient: float
    gain: float
    cast: np.ndarray  # a factor per channel
    contrast: float
    saturation: float
    haze: float
    blur: float
    noise: float
    quality: int
    scene: np.ndarray  # float32 [3, h, w], larger than an image


@functools.lru_cache(maxsize=16)
def camera(seed: int, number: int) -> Camera:
    """Camera `number` (from 1), determined by the seed and the number."""
    rng = np.random.default_rng((seed, 23, number))
    start = np.random.default_rng((seed, 24)).uniform(0, 2 * np.pi)
    light = np.array([rng.uniform(-0.8, 0.8), rng.uniform(-0.9, -0.3), rng.uniform(0.3, 0.8)])
    warm = rng.normal(0, 0.10)
    return Camera(
        yaw=start + (number - 1) * 2.4,  # the golden angle, so that cameras see different sides
        spread=rng.uniform(0.5, 0.9),
        pitch=rng.uniform(0.06, 0.26),
        light=light / np.linalg.norm(light),
        ambient=rng.uniform(0.4, 0.65),
        gain=rng.uniform(0.75, 1.25),
        cast=np.exp([warm, rng.normal(0, 0.04), -warm + rng.normal(0, 0.04)]).astype(np.float32),
        contrast=rng.uniform(0.8, 1.25),
        saturation=rng.uniform(0.55, 1.05),
        haze=rng.uniform(0.0, 0.10),
        blur=rng.uniform(0.35, 0.95),
        noise=rng.uniform(0.006, 0.025),
        quality=int(rng.integers(62, 90)),
        scene=_scene(rng),
    )


def _texture(rng: np.random.Generator, shape: tuple[int, int], size: float, stretch: float = 1.0) -> np.ndarray:
    """Smooth noise with standard deviation 1 and grains of `size` pixels."""
    noise = cv2.GaussianBlur(rng.normal(0, 1, shape).astype(np.float32), (0, 0), sigmaX=size * stretch, sigmaY=size)
    return noise / noise.std()


def _scene(rng: np.random.Generator) -> np.ndarray:
    """A street, 330 x 900 pixels: the ground in perspective, a background, and clutter at its foot."""
    height, width = 330, 900
    horizon = int(rng.uniform(0.18, 0.42) * height)
    scene = np.empty((height, width, 3), np.float32)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    # The ground, with grain and joints in perspective.
    ground = np.array(((0.55, 0.54, 0.53), (0.62, 0.57, 0.50), (0.43, 0.44, 0.46), (0.52, 0.46, 0.43))[rng.integers(4)])
    far = 1 / np.maximum(y - horizon + 12, 4)
    tone = 1 + 0.05 * _texture(rng, (height, width), 1.2, 2.5) + 0.07 * _texture(rng, (height, width), 14, 3)
    if rng.random() < 0.7:
        depth, across = 2600 * far, (x - width / 2) * far * rng.uniform(3, 6)
        joints = (np.abs(depth % 6 - 3) > 2.7) | (np.abs(across % 1 - 0.5) > 0.46)
        tone -= 0.13 * cv2.GaussianBlur(joints.astype(np.float32), (0, 0), 0.8)
    scene[:] = ground * tone[..., None]
    # The background.
    back = ("wall", "windows", "hedge", "hedge", "shop")[rng.integers(5)]
    top = scene[:horizon]
    shape = top.shape[:2]
    if back == "hedge":
        leaves = 0.5 * _texture(rng, shape, 2) + 0.5 * _texture(rng, shape, 8)
        top[:] = np.array((0.24, 0.36, 0.17)) * (1 + 0.35 * leaves[..., None])
    else:
        wall = np.array(
            ((0.62, 0.60, 0.57), (0.50, 0.36, 0.30), (0.33, 0.34, 0.37), (0.70, 0.66, 0.56))[rng.integers(4)]
        )
        top[:] = wall * (1 + 0.06 * _texture(rng, shape, 3, 2)[..., None])
        for left in range(int(rng.integers(0, 60)), width, int(rng.integers(70, 150))):
            if back == "windows":
                cv2.rectangle(top, (left, 12), (left + 38, horizon - 30), (0.20, 0.24, 0.29), -1)
                cv2.rectangle(top, (left, 12), (left + 38, horizon - 30), (0.75, 0.75, 0.73), 2)
            elif back == "shop":
                color = rng.uniform(0.15, 0.85, 3).tolist()
                cv2.rectangle(top, (left, 4), (left + 60, 30), color, -1)
                cv2.rectangle(top, (left, 34), (left + 56, horizon), (0.14, 0.15, 0.17), -1)
    top *= np.linspace(1.05, 0.85, horizon, dtype=np.float32)[:, None, None]
    cv2.rectangle(scene, (0, horizon - 3), (width, horizon + 2), (0.36, 0.35, 0.34), -1)  # the curb
    # Clutter: bicycles, posts, bins.
    for _ in range(int(rng.integers(6, 18))):
        at, foot = int(rng.integers(0, width)), horizon + int(rng.integers(0, 50))
        color = (rng.uniform(0.08, 0.75) * rng.uniform(0.6, 1.2, 3)).tolist()
        match rng.integers(4):
            case 0 | 1:
                _bicycle(scene, at, foot, int(rng.integers(22, 34)), color)
            case 2:
                tall = int(rng.integers(60, 160))
                cv2.rectangle(scene, (at, foot - tall), (at + int(rng.integers(4, 9)), foot), color, -1)
            case _:
                wide = int(rng.integers(25, 70))
                cv2.rectangle(scene, (at, foot - int(rng.integers(25, 60))), (at + wide, foot), color, -1)
    return _planes(np.clip(cv2.GaussianBlur(scene, (0, 0), 1.3), 0, 1))


def _planes(picture: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(picture.transpose(2, 0, 1))


def _picture(planes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(planes.transpose(1, 2, 0))


def _bicycle(picture: np.ndarray, x: int, foot: int, radius: int, color: Color) -> None:
    """Draws a bicycle from the side, its left wheel standing at (x, foot)."""
    left, right = (x, foot - radius), (x + int(2.3 * radius), foot - radius)
    saddle, bar = (x + int(0.8 * radius), foot - int(2.1 * radius)), (x + int(1.9 * radius), foot - int(2.2 * radius))
    pedal = (x + int(1.1 * radius), foot - radius)
    for wheel in (left, right):
        cv2.circle(picture, wheel, radius, (0.10, 0.10, 0.11), 3)
        cv2.circle(picture, wheel, 3, (0.5, 0.5, 0.5), -1)
        for spoke in np.linspace(0, np.pi, 5):
            d = (radius * np.array((np.cos(spoke), np.sin(spoke)))).astype(int)
            cv2.line(picture, (wheel - d).tolist(), (wheel + d).tolist(), (0.45, 0.45, 0.45), 1)
    for a, b in ((left, pedal), (pedal, bar), (saddle, pedal), (saddle, bar), (bar, right), (left, saddle)):
        cv2.line(picture, a, b, color, 3)
    cv2.ellipse(picture, saddle, (9, 4), 0, 0, 360, (0.08, 0.08, 0.08), -1)


# ---- Images ----


def render(seed: int, shot: Shot) -> np.ndarray:
    """The image of a shot: uint8 [128, 64, 3] RGB."""
    rng = np.random.default_rng((seed, 31, shot.stream, shot.index, shot.camera, shot.take))
    cam = camera(seed, shot.camera)
    who = person(seed, shot.stream, shot.index)
    height, width = HEIGHT * _SCALE, WIDTH * _SCALE
    # A detection box with small errors, or large ones for junk and half of the distractors.
    tall = rng.uniform(0.88, 0.97) * height
    x, ground = width * (0.5 + rng.normal(0, 0.035)), height * (0.965 + rng.normal(0, 0.012))
    if shot.kind == "junk" or (shot.kind == "distractor" and rng.random() < 0.5):
        x += width * rng.choice((-1, 1)) * rng.uniform(0.15, 0.45)
        ground += height * rng.uniform(-0.3, 0.45)
        tall *= rng.uniform(0.7, 1.6)
    top, left = int(rng.integers(0, cam.scene.shape[1] - height)), int(rng.integers(0, cam.scene.shape[2] - width))
    light = cam.light + rng.normal(0, 0.12, 3)
    canvas = Canvas(
        pixels=cam.scene[:, top : top + height, left : left + width].copy(),
        light=light / np.linalg.norm(light),
        ambient=cam.ambient,
        seed=int(rng.integers(1000)),
    )
    stretch = rng.uniform(1.15, 1.4)  # boxes are resized to 1:2
    if rng.random() < 0.22:  # a person further back
        other = person(seed, STRANGERS, int(rng.integers(400)))
        aside = rng.choice((-1, 1)) * rng.uniform(0.25, 0.55) * width
        pose, scale = _pose(rng, cam), tall * rng.uniform(0.72, 0.9)
        draw_person(canvas, other, pose, x + aside, ground - 0.07 * height, scale, stretch)
    _shadow(canvas, x, ground, tall)
    # Boxes are fitted to people, so stature is only partly visible.
    scale = tall * (0.4 + 0.6 / who.stature)
    draw_person(canvas, who, _pose(rng, cam), x, ground, scale, stretch)
    if rng.random() < 0.18:
        _occlude(rng, seed, cam, canvas, tall, stretch)
    return _expose(rng, cam, canvas.pixels)


def encode(seed: int, shot: Shot) -> bytes:
    """The JPEG of a shot."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, camera(seed, shot.camera).quality]
    return cv2.imencode(".jpg", cv2.cvtColor(render(seed, shot), cv2.COLOR_RGB2BGR), quality)[1].tobytes()


def _pose(rng: np.random.Generator, cam: Camera) -> Pose:
    # Most people walk along the camera's direction, a quarter of them the other way.
    yaw = cam.yaw + rng.normal(0, cam.spread) + (np.pi if rng.random() < 0.25 else 0.0)
    walking = rng.random() < 0.8
    stride = rng.uniform(0.22, 0.46) if walking else rng.uniform(0.02, 0.10)
    return Pose(
        yaw=float(yaw),
        pitch=float(cam.pitch + rng.normal(0, 0.03)),
        phase=float(rng.uniform(0, 2 * np.pi)),
        stride=float(stride),
        swing=float(stride * rng.uniform(0.5, 1.3)),
        # Some hold a phone.
        bend=float(rng.uniform(0.15, 0.7) if rng.random() < 0.85 else rng.uniform(1.4, 2.2)),
        lean=float(rng.normal(0, 0.02)),
    )


def _shadow(canvas: Canvas, x: float, ground: float, tall: float) -> None:
    """Draws the shadow on the ground, away from the light."""
    height, width = canvas.pixels.shape[1:]
    mask = np.zeros((height, width), np.float32)
    reach = -canvas.light[0] * 0.28 * tall
    center, radii = (int(x + reach / 2), int(ground - 2)), (int(0.13 * tall + abs(reach) / 2), int(0.022 * tall))
    cv2.ellipse(mask, center, radii, 0, 0, 360, 1.0, -1)
    top = max(0, int(ground - 0.08 * tall))
    if top < height - 1:
        soft = cv2.blur(mask[top:], (15, 7))
        canvas.pixels[:, top:] *= 1 - 0.5 * soft


def _occlude(rng: np.random.Generator, seed: int, cam: Camera, canvas: Canvas, tall: float, stretch: float) -> None:
    """Draws an object between the camera and the person."""
    height, width = canvas.pixels.shape[1:]
    color = tuple((rng.uniform(0.12, 0.7) * rng.uniform(0.75, 1.2, 3)).tolist())
    side = int(rng.choice((-1, 1)))
    match rng.integers(4):
        case 0:  # the side of another person
            other = person(seed, STRANGERS, int(rng.integers(400)))
            at = width * (0.5 + side * rng.uniform(0.42, 0.62))
            pose, ground, scale = _pose(rng, cam), height * rng.uniform(1.02, 1.2), tall * rng.uniform(1.05, 1.25)
            draw_person(canvas, other, pose, at, ground, scale, stretch)
        case 1:  # a post
            at, half = width * (0.5 + side * rng.uniform(0.1, 0.4)), rng.uniform(3, 7)
            y = np.array((height * (0.0 if rng.random() < 0.5 else rng.uniform(0.3, 0.6)), float(height)))
            canvas.solid(y, np.full(2, at), np.full(2, half), Paint(color), tall)
        case 2:  # a box, a bin, a low wall
            at, edge = width * (0.5 + side * rng.uniform(0.2, 0.6)), int(height * rng.uniform(0.6, 0.85))
            half = rng.uniform(18, 50)
            across = slice(max(int(at - half), 0), int(at + half))
            for top, bottom, light in ((edge, edge + 8, 1.25), (edge + 8, height, 0.85)):
                canvas.pixels[:, top:bottom, across] = light * np.array(color)[:, None, None]
        case _:
            picture = _picture(canvas.pixels)
            foot, radius = int(height * rng.uniform(0.96, 1.08)), int(rng.integers(26, 40))
            _bicycle(picture, int(rng.integers(-60, width - 30)), foot, radius, color)
            canvas.pixels = _planes(picture)


def _expose(rng: np.random.Generator, cam: Camera, pixels: np.ndarray) -> np.ndarray:
    """Applies the camera: optics, exposure, color and noise."""
    image = cv2.resize(_picture(pixels), (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    image = cv2.GaussianBlur(image, (0, 0), cam.blur * rng.uniform(0.8, 1.3))
    if rng.random() < 0.3:  # the edge of a large shadow across the image
        down, right = np.linspace(-1, 1, HEIGHT, dtype=np.float32), np.linspace(-1, 1, WIDTH, dtype=np.float32)
        beyond = float(rng.choice((-5, 5))) * (down[:, None] + rng.uniform(-0.8, 0.8) * right - rng.uniform(-0.6, 0.6))
        image = image * (1 - rng.uniform(0.15, 0.4) * np.clip(beyond + 0.5, 0, 1))[..., None].astype(np.float32)
    gray = image.mean(axis=2, keepdims=True)
    image = gray + cam.saturation * rng.uniform(0.9, 1.1) * (image - gray)
    image *= (cam.gain * rng.uniform(0.85, 1.15) * cam.cast * np.exp(rng.normal(0, 0.02, 3))).astype(np.float32)
    image = cam.haze + (1 - cam.haze) * np.minimum(np.maximum(image, 0), 1) ** cam.contrast
    image += cam.noise * cv2.blur(rng.standard_normal((HEIGHT, WIDTH, 3), np.float32), (2, 2))
    return np.clip(255 * image + 0.5, 0, 255).astype(np.uint8)
