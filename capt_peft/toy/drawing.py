"""Pixels of the procedural images: colours, shapes, textures, backgrounds and their composition.

Masks and pictures are float32 arrays in [0, 1]: masks (32, 32), pictures (32, 32, 3).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .glyphs import CANVAS

SIDE = 32  # pixels a side of the finished image
COLORS = {
    "red": (215, 30, 35),
    "yellow": (245, 220, 40),
    "green": (40, 155, 60),
    "blue": (35, 75, 215),
    "purple": (130, 40, 165),
    "pink": (250, 150, 190),
    "brown": (120, 72, 35),
    "black": (18, 18, 18),
    "gray": (128, 128, 128),
    "white": (242, 242, 242),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond", "crescent", "hexagon")
TEXTURES = ("striped", "checkered", "dotted", "grid", "noisy", "shaded", "zigzag", "brick", "wavy", "ringed")


def draw_color(name: str, rng: np.random.Generator) -> np.ndarray:
    """Returns a shade (3,) of the colour `name`."""
    shade = np.array(COLORS[name]) * rng.uniform(0.88, 1.0) + rng.normal(0, 8, 3)
    return np.clip(shade / 255, 0, 1).astype(np.float32)


def _polygon(corners: int, inner: float = 1.0) -> np.ndarray:
    """A regular polygon, or a star where `inner` is below 1, in the unit circle, one corner up."""
    number = corners * (2 if inner < 1 else 1)
    angles = np.arange(number) * 2 * math.pi / number - math.pi / 2
    radii = np.where(np.arange(number) % 2, inner, 1.0) if inner < 1 else np.ones(number)
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


@cache
def _outline(shape: str) -> np.ndarray:
    """Corners (P, 2) of a shape in the unit circle, y downward."""
    if shape in ("circle", "ring"):
        return _polygon(40)
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x / 17, -(y + 2.5) / 16], axis=1)
    if shape == "cross":
        a, b = 0.32, 0.95
        quarter = np.array([(-a, -b), (a, -b), (a, -a)])
        turn = np.array([(0, 1), (-1, 0)])  # by a right angle, of row vectors
        return np.concatenate([quarter @ np.linalg.matrix_power(turn, quarters) for quarters in range(4)])
    if shape == "square":
        return np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    if shape == "diamond":
        return np.array([(0, -1), (0.65, 0), (0, 1), (-0.65, 0)])
    if shape == "crescent":
        outer = np.linspace(math.pi / 3, 5 * math.pi / 3, 24)
        inner = np.linspace(5 * math.pi / 3, math.pi / 3, 24)
        curve = np.stack([np.cos(outer), np.sin(outer)], axis=1)
        return np.concatenate(
            [curve, np.stack([0.55 + 0.87 * np.cos(inner) * 0.6, 0.87 * np.sin(inner)], axis=1)[1:-1]]
        )
    return {"triangle": _polygon(3), "star": _polygon(5, 0.42), "hexagon": _polygon(6)}[shape]


def draw_shapes(shape: str, places: list[tuple[float, float]], radius: float, angle: float) -> Image.Image:
    """Returns a canvas with filled shapes around `places`, in its pixels as is `radius`; `angle` in radians."""
    canvas = Image.new("L", (CANVAS, CANVAS))
    pencil = ImageDraw.Draw(canvas)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = _outline(shape) @ turn.T * radius
    for x, y in places:
        pencil.polygon((corners + np.array((x, y))).reshape(-1).tolist(), fill=255)
        if shape == "ring":
            hole = radius * 0.55
            pencil.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    return canvas


def scatter(count: int, rng: np.random.Generator) -> tuple[float, list[tuple[float, float]]]:
    """Returns a radius, and places on the canvas for `count` shapes of that radius, apart from each other."""
    radius = rng.uniform(7.5, 12.0)
    while True:
        radius *= 0.93
        places: list[tuple[float, float]] = []
        for x, y in rng.uniform(radius, CANVAS - radius, (12, 2)).tolist():
            if all(math.hypot(x - a, y - b) > 2 * radius + 3 for a, b in places):
                places.append((x, y))
        if len(places) >= count:
            return radius, places[:count]


def to_mask(canvas: Image.Image) -> np.ndarray:
    """Scales a canvas of 64 x 64 pixels down to a mask."""
    return np.asarray(canvas.reduce(CANVAS // SIDE), dtype=np.float32) / 255


_Y, _X = (axis.astype(np.float32) / SIDE for axis in np.mgrid[0 : 2 * SIDE, 0 : 2 * SIDE] / 2)


def draw_texture(name: str, rng: np.random.Generator) -> np.ndarray:
    """Returns a mask with a texture: its period, phase, direction and duty drawn by `rng`."""
    if name == "noisy":
        cells = int(rng.choice([8, 16, 32]))
        return np.kron(rng.random((cells, cells)), np.ones((SIDE // cells, SIDE // cells))).astype(np.float32)
    angle = rng.uniform(0, math.pi)
    if name in ("checkered", "grid", "brick"):
        angle = rng.normal(0, 0.06)
    u = math.cos(angle) * _X + math.sin(angle) * _Y + rng.random()
    v = -math.sin(angle) * _X + math.cos(angle) * _Y + rng.random()
    waves, duty = rng.uniform(3, 6), rng.uniform(0.35, 0.6)
    mask = _PATTERNS[name](u, v, waves, duty, rng)
    return mask.astype(np.float32).reshape(SIDE, 2, SIDE, 2).mean((1, 3))


def _shaded(u: np.ndarray, v: np.ndarray, waves: float, duty: float, rng: np.random.Generator) -> np.ndarray:
    return (u - u.min()) / (u.max() - u.min())


def _brick(u: np.ndarray, v: np.ndarray, waves: float, duty: float, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(v * waves)
    return ((v * waves) % 1 > 0.22) & ((u * waves / 2 + 0.5 * (row % 2)) % 1 > 0.12)


def _zigzag(u: np.ndarray, v: np.ndarray, waves: float, duty: float, rng: np.random.Generator) -> np.ndarray:
    return (v * waves + 0.9 * np.abs((u * waves * 0.7) % 1 - 0.5) * 2) % 1 < duty


def _wavy(u: np.ndarray, v: np.ndarray, waves: float, duty: float, rng: np.random.Generator) -> np.ndarray:
    return (v * waves + 0.35 * np.sin(u * 2 * math.pi * rng.uniform(1.2, 2))) % 1 < duty


def _ringed(u: np.ndarray, v: np.ndarray, waves: float, duty: float, rng: np.random.Generator) -> np.ndarray:
    x, y = rng.uniform(0.3, 0.7, 2)
    return (np.hypot(_X - x, _Y - y) * waves * 1.3) % 1 < duty


_PATTERNS = {
    "striped": lambda u, v, waves, duty, rng: (u * waves) % 1 < duty,
    "checkered": lambda u, v, waves, duty, rng: (np.floor(u * waves) + np.floor(v * waves)) % 2 == 0,
    "dotted": lambda u, v, waves, duty, rng: np.hypot((u * waves) % 1 - 0.5, (v * waves) % 1 - 0.5) < 0.2 + duty / 4,
    "grid": lambda u, v, waves, duty, rng: ((u * waves) % 1 < 0.25) | ((v * waves) % 1 < 0.25),
    "shaded": _shaded,
    "brick": _brick,
    "zigzag": _zigzag,
    "wavy": _wavy,
    "ringed": _ringed,
}


def draw_background(color: str, rng: np.random.Generator) -> np.ndarray:
    """Returns a picture of one colour: plain, shaded, faintly textured or noisy."""
    shade = draw_color(color, rng)
    kind = rng.random()
    if kind < 0.5:
        return np.broadcast_to(shade, (SIDE, SIDE, 3))
    pattern = draw_texture("shaded" if kind < 0.75 else TEXTURES[rng.integers(len(TEXTURES))], rng)
    return blend(shade, draw_color(color, rng) * rng.uniform(0.8, 1.0), pattern)


def blend(background: np.ndarray, foreground: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the picture with `foreground` where `mask` is 1; both a picture or a colour (3,)."""
    return background + mask[..., None] * (foreground - background)


def to_image(picture: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Returns a picture as an RGB image, half of the time with a little noise."""
    if rng.random() < 0.5:
        picture = picture + rng.uniform(0.01, 0.06) * rng.standard_normal(picture.shape)
    return Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
