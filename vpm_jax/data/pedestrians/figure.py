"""Drawing a pedestrian: a walking 3D skeleton, rotated to the viewpoint and dressed.

Points on the body are (across, up, forward) in body heights, from the ground between the feet.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vpm_jax.data.pedestrians.canvas import Canvas, Paint
from vpm_jax.data.pedestrians.people import Color, Person, dimmed

Point = tuple[float, float, float]  # across (the person's left is positive), up, forward


class Pose(NamedTuple):
    """The pose of a person in one image. Angles are in radians."""

    yaw: float  # 0 faces the camera, pi shows the back
    pitch: float  # how far the camera looks down
    phase: float  # of the walking cycle
    stride: float  # largest angle of the thighs
    swing: float  # largest angle of the arms
    bend: float  # of the elbows
    lean: float


def draw_person(
    canvas: Canvas, who: Person, pose: Pose, x: float, ground: float, scale: float, stretch: float = 1.0
) -> None:
    """Draws a person who stands at (x, ground), `scale` pixels tall at average stature, widened by `stretch`."""
    _Figure(canvas, who, pose, x, ground, scale, stretch).draw()


def _ellipse(count: int = 11) -> tuple[np.ndarray, np.ndarray]:
    """Heights in [-1, 1] and half widths of a unit circle."""
    t = np.linspace(-np.pi / 2, np.pi / 2, count)
    return np.sin(t), np.cos(t)


def _between(a: Point, b: Point, t: float) -> Point:
    return a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), a[2] + t * (b[2] - a[2])


class _Figure:
    def __init__(self, canvas: Canvas, who: Person, pose: Pose, x: float, ground: float, scale: float, stretch: float):
        self.canvas, self.who, self.pose = canvas, who, pose
        # Python floats: NumPy scalars would promote float32 arrays to float64.
        self.x, self.ground, self.stretch = float(x), float(ground), float(stretch)
        self.scale = float(scale) * who.stature
        self.sin, self.cos = math.sin(pose.yaw), math.cos(pose.yaw)
        self.hip = 0.485 * who.legs
        self.top = self.hip + 0.335  # of the shoulders
        self.wide = 0.5 * (1 + who.weight)  # limbs thicken less than the trunk

    # -- from the body to the image

    def nearness(self, across: float, forward: float) -> float:
        return forward * self.cos - across * self.sin

    def at(self, across: float, up: float, forward: float) -> tuple[float, float]:
        sway = self.pose.lean * up
        px = (across * self.cos + forward * self.sin + sway) * self.stretch
        py = up * math.cos(self.pose.pitch) - self.nearness(across, forward) * math.sin(self.pose.pitch)
        return self.x + self.scale * px, self.ground - self.scale * py

    def paint(self, color: Color, second: Color = (0, 0, 0), pattern: str = "plain", folds: float = 0.0) -> Paint:
        return Paint(color, second, pattern, self.pose.yaw, folds)

    def limb(self, joints: list[Point], radii: tuple[float, ...], paint: Paint, cut: bool = False) -> None:
        points = [self.at(*joint) for joint in joints]
        self.canvas.limb(points, [r * self.scale * (1 + self.stretch) / 2 for r in radii], paint, self.scale, cut)

    def solid(self, knots: list[tuple[float, float, float, float]], paint: Paint) -> None:
        """Draws a solid through knots, from the top down: (height, half width, half depth, forward shift)."""
        centers, rows, halves = [], [], []
        for up, across, deep, forward in knots:
            cx, cy = self.at(0, up, forward)
            centers.append(cx)
            rows.append(cy)
            halves.append(self.scale * self.stretch * math.hypot(across * self.cos, deep * self.sin))
        # A camera that looks down can reverse the order of knots.
        ordered = np.maximum.accumulate(np.array(rows) + 1e-3 * np.arange(len(rows)))
        self.canvas.solid(ordered, np.array(centers), np.array(halves), paint, self.scale)

    # -- the parts

    def draw(self) -> None:
        who = self.who
        layers: list[tuple[float, Callable[[], None]]] = []  # (depth, drawing), back to front
        for side in (-1, 1):
            layers.append((-3 + self.nearness(0.05 * side, 0), functools.partial(self.leg, side)))
            # From the side, an arm is in front of the trunk or behind it; from the front, it hangs beside it.
            layers.append((0.1 if self.nearness(0.1 * side, 0) > -0.03 else -1.5, functools.partial(self.arm, side)))
        layers += [(-2.0, self.hips), (0.0, self.trunk), (0.05, self.straps), (0.3, self.head)]
        hair = 0.35 if self.cos < 0.25 else -0.5  # long hair hangs over the back
        layers += [(hair, self.hair_behind)]
        if who.bag == "backpack":
            layers.append((0.4 if self.cos < -0.1 else -1.0, self.backpack))
        elif who.bag != "none":
            layers.append((0.5 if self.nearness(0.12 * who.bag_side, 0) > -0.06 else -3.5, self.bag))
        for _, layer in sorted(layers, key=lambda item: item[0]):
            layer()

    def leg(self, side: int) -> None:
        who, pose, w = self.who, self.pose, self.wide
        swing = pose.phase + (0 if side > 0 else np.pi)
        thigh = pose.stride * math.sin(swing)
        shank = thigh - 0.08 - 1.5 * pose.stride * max(0.0, math.cos(swing)) ** 2
        hip, half = self.hip, (self.hip - 0.035) / 2
        out = 0.048 * w * side
        knee = (out * 1.05, hip - half * math.cos(thigh), half * math.sin(thigh))
        ankle = (out * 0.95, knee[1] - half * math.cos(shank), knee[2] + half * math.sin(shank))
        joints = [(out, hip, 0.0), knee, ankle]
        if who.lower in ("trousers", "slim", "wide"):
            self.limb([_between(ankle, knee, 0.3), ankle], (0.025 * w, 0.022 * w), self.paint(who.skin))
        else:
            self.limb(joints, (0.050 * w, 0.036 * w, 0.022 * w), self.paint(who.skin))
        # The shoe points down in the image when it moves towards a camera that looks down.
        tilt = 0.5 * (shank - 0.08)
        heel = (ankle[0], ankle[1] - 0.016, ankle[2] - 0.018)
        toe = (ankle[0] * 1.2, ankle[1] - 0.022 + 0.075 * math.sin(tilt), ankle[2] + 0.075)
        if who.shoes == "sneakers":
            sole = [(p[0], p[1] - 0.010, p[2]) for p in (heel, toe)]
            self.limb(sole, (0.021, 0.020), self.paint((0.85, 0.85, 0.83)))
        self.limb([heel, toe], (0.023, 0.019) if who.shoes != "sandals" else (0.021, 0.014), self.paint(who.shoe_color))
        if who.shoes == "sandals":
            self.limb([ankle, heel], (0.021, 0.02), self.paint(who.skin))
        if who.shoes == "boots":
            calf = _between(ankle, knee, 0.5)
            self.limb([calf, ankle, heel], (0.037 * w, 0.028 * w, 0.025), self.paint(who.shoe_color, folds=0.1))
        cloth = self.paint(who.lower_color, who.lower_second, who.lower_pattern, folds=0.13)
        if who.lower in ("trousers", "slim", "wide"):
            ease = {"trousers": 0.006, "slim": 0.0, "wide": 0.018}[who.lower]
            cuff = _between(ankle, knee, 0.04)
            if who.shoes == "boots" and who.lower == "slim":
                cuff = _between(ankle, knee, 0.45)
            self.limb([joints[0], knee, cuff], (0.058 * w, 0.042 * w + ease, 0.030 * w + ease), cloth, cut=True)
        elif who.lower == "shorts":
            hem = _between(joints[0], knee, 0.97)
            self.limb([joints[0], hem], (0.060 * w, 0.058 * w), cloth, cut=True)

    def hips(self) -> None:
        who, w, hip = self.who, self.who.weight, self.hip
        cloth = self.paint(who.lower_color, who.lower_second, who.lower_pattern, folds=0.13)
        waist = (hip + 0.10, 0.085 * w, 0.062 * w, 0.0)
        if "skirt" in who.lower:
            hem = hip - (0.17 if who.lower == "skirt" else 0.34)
            flare, sway = (0.118 if who.lower == "skirt" else 0.135), 0.02 * math.sin(self.pose.phase)
            low = 0.09 + 0.25 * self.pose.stride * (hip - hem)
            self.solid([waist, (hip, 0.105 * w, 0.085 * w, 0), (hem, flare * self.wide, low, sway)], cloth)
        else:
            self.solid([waist, (hip + 0.01, 0.104 * w, 0.08 * w, -0.005), (hip - 0.05, 0.098 * w, 0.07 * w, 0)], cloth)

    def trunk(self) -> None:
        who, w, s = self.who, self.who.weight, self.who.shoulders
        neck, top, hip = self.top + 0.035, self.top, self.hip
        self.solid([(neck + 0.03, 0.032, 0.033, 0.01), (top, 0.036, 0.038, 0.0)], self.paint(who.skin))
        belly = max(0.0, w - 1) * 0.12
        hem = {"coat": hip - 0.13, "jacket": hip - 0.01, "hoodie": hip, "tank": hip + 0.02}.get(who.upper, hip + 0.005)
        loose = {"tank": -0.006, "jacket": 0.010, "coat": 0.012, "hoodie": 0.012}.get(who.upper, 0.0)
        knots = [
            (neck, 0.034, 0.036, 0.0),
            (top + 0.012, 0.070 * s, 0.044, -0.004),
            (top - 0.020, 0.108 * s + loose, 0.058 * w, -0.006),
            (top - 0.11, 0.104 * s * (0.6 + 0.4 * w) + loose, 0.076 * w + loose, 0.004),
            (hip + 0.13, 0.086 * w + loose, 0.064 * w + loose + belly / 2, 0.002 + belly / 2),
            (hip + 0.03, 0.102 * w + loose, 0.078 * w + loose, 0.0),
        ]
        if hem < hip + 0.025:
            knots.append((hem, 0.106 * w + 1.3 * loose, 0.083 * w + 1.3 * loose, 0.0))
        self.solid(knots, self.paint(who.upper_color, who.upper_second, who.trunk_pattern, folds=0.12))
        if who.upper == "hoodie":
            y, r = _ellipse(7)
            knots = [(top + 0.03 - 0.03 * a, 0.07 * b, 0.05 * b, -0.035) for a, b in zip(y, r, strict=True)]
            self.solid(knots, self.paint(dimmed(who.upper_color, 0.85), folds=0.2))

    def arm_joints(self, side: int) -> list[Point]:
        """Shoulder, elbow, wrist and hand of an arm, which swings against the leg of its side."""
        angle = -self.pose.swing * math.sin(self.pose.phase + (0 if side > 0 else np.pi))
        out = (0.106 * self.who.shoulders + 0.004) * side
        joints = [(0.95 * out, self.top - 0.034, -0.004)]
        for bend, length, spread in ((0.0, 0.165, 1.17), (self.pose.bend, 0.135, 1.12), (self.pose.bend, 0.045, 1.10)):
            _, up, forward = joints[-1]
            joints.append(
                (out * spread, up - length * math.cos(angle + bend), forward + length * math.sin(angle + bend))
            )
        return joints

    def arm(self, side: int) -> None:
        who, w = self.who, self.wide
        shoulder, elbow, wrist, hand = self.arm_joints(side)
        bare = who.upper in ("tank", "tshirt")
        if bare:
            self.limb([shoulder, elbow, wrist, hand], (0.034 * w, 0.027 * w, 0.019 * w, 0.019), self.paint(who.skin))
        else:
            self.limb([wrist, hand], (0.019 * w, 0.019), self.paint(who.skin))
        if who.upper == "tank":
            return
        color = who.upper_second if who.upper_pattern == "raglan" else who.upper_color
        pattern = who.upper_pattern if who.upper_pattern in ("stripes", "checks", "dots") else "plain"
        cloth = self.paint(color, who.upper_second, pattern, folds=0.12)
        if who.upper == "tshirt":
            sleeve = _between(shoulder, elbow, 0.8)
            self.limb([shoulder, sleeve], (0.038 * w, 0.041 * w), cloth, cut=True)
        else:
            ease = 0.006 if who.upper in ("jacket", "coat", "hoodie") else 0.0
            self.limb([shoulder, elbow, wrist], (0.037 * w + ease, 0.033 * w + ease, 0.027 * w + ease), cloth, cut=True)

    def head(self) -> None:
        who = self.who
        up, forward = self.top + 0.112, 0.018
        if who.hair == "cap" and self.cos < 0:  # seen from behind, the head hides the brim
            self.brim(up)
        y, r = _ellipse(13)
        knots = [(up - 0.073 * a, 0.052 * b, 0.062 * b, forward) for a, b in zip(y, r, strict=True)]
        self.solid(knots, self.paint(who.skin))
        # The face is a slight shadow at the eyes, visible from the front.
        if self.cos > 0.2:
            for side in (-1, 1):
                eye = (0.022 * side, up + 0.008, forward + 0.05)
                self.limb([eye, (eye[0] * 1.3, eye[1], eye[2])], (0.008, 0.008), self.paint(dimmed(who.skin, 0.45)))
        if who.hair == "bald":
            return
        low = {"crop": 0.0, "cap": 0.004, "hat": 0.004}.get(who.hair, -0.012)
        full = 0.004 if who.hair == "crop" else 0.010
        color = who.hat_color if who.hair in ("cap", "hat") else who.hair_color
        # Hair sits further back than the head and leaves the face free.
        back = 0.0 if who.hair in ("cap", "hat") else 0.016
        y, r = y[: 9 if self.cos < 0.3 else 6], r[: 9 if self.cos < 0.3 else 6]
        knots = [
            (up + 0.008 - 0.080 * a, (0.052 + full) * b, (0.060 + full) * b, forward - back)
            for a, b in zip(y, r, strict=True)
        ]
        if self.cos > -0.3:  # the hairline over the forehead
            knots = [knot for knot in knots if knot[0] > up + 0.012 + low] + [
                (up + 0.022 + low, 0.06, 0.058, forward - back)
            ]
        self.solid(knots, self.paint(color, folds=0.15))
        if who.hair == "cap":
            if self.cos >= 0:
                self.brim(up)
        elif who.hair == "hat":
            brim = [
                (up + 0.036, 0.03, 0.03, forward),
                (up + 0.026, 0.10, 0.10, forward),
                (up + 0.018, 0.098, 0.098, forward),
            ]
            self.solid(brim, self.paint(dimmed(color, 0.85)))
        if -0.3 < self.cos < 0.75 and who.hair not in ("cap", "hat", "crop"):  # the side of the head
            self.limb(
                [(0, up + 0.03, -0.025), (0, up - 0.015, -0.036)],
                (0.044, 0.032),
                self.paint(who.hair_color, folds=0.15),
            )

    def brim(self, up: float) -> None:
        points = [(0.0, up + 0.03, 0.05), (0.0, up + 0.022, 0.115)]
        self.limb(points, (0.034, 0.020), self.paint(dimmed(self.who.hat_color, 0.8)))

    def hair_behind(self) -> None:
        who, up = self.who, self.top + 0.112
        paint = self.paint(who.hair_color, folds=0.2)
        if who.hair in ("medium", "long"):
            length = 0.10 if who.hair == "medium" else 0.21
            end = 0.062 if who.hair == "medium" else 0.055
            knots = [
                (up + 0.07, 0.02, 0.02, -0.005),
                (up + 0.04, 0.06, 0.045, -0.012),
                (up - 0.03, 0.068, 0.042, -0.03),
            ]
            knots += [(up - length, end, 0.032, -0.05), (up - length - 0.02, 0.03, 0.02, -0.05)]
            self.solid(knots, paint)
        elif who.hair == "ponytail":
            swing = 0.02 * math.sin(self.pose.phase)
            self.limb(
                [(0, up + 0.03, -0.065), (swing, up - 0.05, -0.085), (2 * swing, up - 0.15, -0.07)],
                (0.02, 0.026, 0.012),
                paint,
            )
        elif who.hair == "bun":
            self.limb([(0, up + 0.065, -0.04), (0, up + 0.06, -0.055)], (0.034, 0.032), paint)

    # -- what they carry

    def straps(self) -> None:
        who = self.who
        paint = self.paint(dimmed(who.bag_color, 0.7))
        s, deep = 0.066 * who.shoulders, 0.062 * who.weight
        if who.bag == "backpack" and self.cos > -0.1:
            for side in (-1, 1):
                if self.nearness(0.1 * side, 0.08) > 0:
                    path = [
                        (s * side, self.top + 0.012, 0.02),
                        (s * side, self.top - 0.06, deep),
                        (1.3 * s * side, self.top - 0.13, deep * 0.6),
                    ]
                    self.limb(path, (0.011, 0.012, 0.010), paint)
        elif who.bag == "shoulder":
            front = deep * (1 if self.cos > 0 else -1)
            side = who.bag_side
            path = [
                (-0.075 * side, self.top + 0.008, 0.3 * front),
                (0.0, self.top - 0.13, front),
                (0.10 * side, self.hip + 0.06, 0.5 * front),
            ]
            self.limb(path, (0.009, 0.009, 0.009), paint)

    def backpack(self) -> None:
        who = self.who
        center = -0.065 * who.weight - 0.045
        top = self.top - 0.005
        shape = (
            (0.0, 0.035, 0.02),
            (0.018, 0.075, 0.045),
            (0.07, 0.088, 0.056),
            (0.20, 0.092, 0.066),
            (0.245, 0.085, 0.055),
            (0.26, 0.06, 0.03),
        )
        self.solid([(top - down, a, d, center) for down, a, d in shape], self.paint(who.bag_color, folds=0.12))
        if self.cos < 0.3:  # the pocket
            pocket = ((0.13, 0.04, 0.02), (0.145, 0.06, 0.03), (0.21, 0.064, 0.03), (0.225, 0.05, 0.02))
            dark = dimmed(who.bag_color, 0.78)
            self.solid([(top - down, a, d, center - 0.045) for down, a, d in pocket], self.paint(dark, folds=0.12))

    def bag(self) -> None:
        who, side = self.who, self.who.bag_side
        if who.bag == "handbag":
            across, up, forward = self.arm_joints(side)[-1]
            grip = [(across, up, forward + 0.03), (across, up - 0.05, forward)]
            size, drop = (0.036, 0.062), 0.09
            self.limb(grip, (0.008, 0.01), self.paint(dimmed(who.bag_color, 0.7)))
        else:
            across, up, forward = 0.135 * side * self.wide, self.hip + 0.085, 0.01
            size, drop = (0.034, 0.058), 0.075
        # A flat box, widest when the person is seen from the side.
        half = math.hypot(size[0] * self.cos, size[1] * self.sin) + 0.012
        cx, cy = self.at(across, up - drop, forward)
        scale = self.scale
        y = cy + scale * np.array((-0.048, -0.038, 0.0, 0.045, 0.055))
        self.canvas.solid(
            y,
            np.full(5, cx),
            scale * self.stretch * half * np.array((0.7, 0.92, 1.0, 1.02, 0.85)),
            self.paint(who.bag_color, folds=0.12),
            scale,
        )
