"""The real ImageNet weights name drawn objects; skips without the weights (README, "Training on real data")."""

from __future__ import annotations

import math

import numpy as np
from keras_files import real_weights
from paths import REAL_DATA
from PIL import Image, ImageDraw, ImageFont

from vpm_jax.models.resnet import ResNet
from vpm_jax.pretrained import load

SIZE = 896  # drawn four times as large as the network sees it
MIDDLE = SIZE / 2
BLACK, WHITE = (15, 15, 15), (250, 248, 240)


def around(radius: float, turn: float, y: float = MIDDLE) -> tuple[float, float]:
    """The point at a clock's hand of this length, `turn` of a full turn after twelve."""
    return MIDDLE + radius * math.sin(math.tau * turn), y - radius * math.cos(math.tau * turn)


def disc(draw: ImageDraw.ImageDraw, radius: float, fill, y: float = MIDDLE) -> None:
    draw.ellipse([MIDDLE - radius, y - radius, MIDDLE + radius, y + radius], fill=fill)


def clock(draw: ImageDraw.ImageDraw) -> None:
    disc(draw, 448, (214, 206, 190))
    disc(draw, 400, (60, 40, 25))
    disc(draw, 360, WHITE)
    for minute in range(60):
        hour = minute % 5 == 0
        ends = around(300 if hour else 325, minute / 60), around(345, minute / 60)
        draw.line(ends, fill=BLACK, width=14 if hour else 5)
    draw.line([around(0, 0), around(190, 0.85)], fill=BLACK, width=26)
    draw.line([around(0, 0), around(290, 0.15)], fill=BLACK, width=16)
    disc(draw, 20, BLACK)


def umbrella(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle([0, 0, SIZE, SIZE], fill=(225, 230, 235))
    draw.pieslice([68, 120, 828, 880], 180, 360, fill=(200, 30, 40))
    for left in range(68, 828, 190):
        draw.pieslice([left, 455, left + 190, 545], 180, 360, fill=(225, 230, 235))
    for end in (258, 448, 638):
        draw.line([MIDDLE, 120, end, 470], fill=(140, 15, 25), width=6)
    draw.line([MIDDLE, 90, MIDDLE, 800], fill=(70, 50, 40), width=18)
    draw.arc([348, 740, 448, 860], 0, 180, fill=(70, 50, 40), width=18)


def traffic_light(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle([0, 0, SIZE, SIZE], fill=(150, 190, 230))
    draw.rectangle([423, 700, 473, SIZE], fill=(60, 60, 60))
    draw.rounded_rectangle([298, 60, 598, 720], 40, fill=(30, 32, 30))
    for y, colour in ((180, (240, 40, 30)), (390, (70, 60, 20)), (600, (20, 60, 30))):
        disc(draw, 95, BLACK, y)
        disc(draw, 85, colour, y)


def spider_web(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle([0, 0, SIZE, SIZE], fill=(25, 35, 25))
    for k in range(22):
        draw.line([around(0, 0), around(700, k / 22)], fill=(190, 195, 190), width=4)
        for radius in range(51, 442, 17):
            draw.line([around(radius, k / 22), around(radius, (k + 1) / 22)], fill=(170, 175, 170), width=3)


def stop_sign(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle([0, 0, SIZE, SIZE], fill=(140, 185, 235))
    draw.rectangle([430, 300, 466, SIZE], fill=(120, 120, 120))
    for radius, colour in ((330, WHITE), (312, (190, 20, 30))):
        draw.polygon([around(radius, (k + 0.5) / 8, y=380) for k in range(8)], fill=colour)
    draw.text((MIDDLE, 380), "STOP", fill=WHITE, font=ImageFont.load_default(200), anchor="mm")


# The classes by their number of the 1,000: the weights do not carry their names.
OBJECTS = {clock: 409, umbrella: 879, traffic_light: 920, spider_web: 815, stop_sign: 919}


def test_drawn_objects_are_named():
    real_weights()
    weights = load("keras", REAL_DATA)
    images = []
    for paint in OBJECTS:
        image = Image.new("RGB", (SIZE, SIZE), WHITE)
        paint(ImageDraw.Draw(image))
        images.append(np.asarray(image.resize((224, 224), Image.Resampling.LANCZOS), np.float32) / 255)
    x = (np.stack(images) - np.float32(weights.mean)) / np.float32(weights.std)
    network = ResNet(last_stride=2, stride_on=weights.stride_on, bn_epsilon=weights.bn_epsilon)
    stages = network.apply({"params": weights.params, "batch_stats": weights.batch_stats}, x)
    features = np.asarray(stages["stage4"]).mean((1, 2))
    logits = features @ weights.classifier["kernel"] + weights.classifier["bias"]
    found = {paint.__name__: int(c) for paint, c in zip(OBJECTS, logits.argmax(1), strict=True)}
    assert found == {paint.__name__: c for paint, c in OBJECTS.items()}
