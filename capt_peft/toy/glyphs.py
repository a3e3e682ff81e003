"""Letters and digits as masks for procedural images: drawn by strokes (`glyphs.yaml`), and in the fonts that Pillow carries."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont

FONTS = ("sans", "bitmap", "plain", "hand", "scan")
DIGITS = tuple("0123456789")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

CANVAS = 64  # pixels per side in which glyphs are drawn, twice the size of the images
_FILE = files(__package__) / "glyphs.yaml"  # which explains its notation
STROKES: dict[str, tuple[str, ...]] = {
    k: tuple(v) for k, v in yaml.safe_load(_FILE.read_text(encoding="utf-8")).items()
}


@cache
def parse_strokes(spelling: str) -> tuple[tuple[bool, np.ndarray], ...]:
    """Returns the strokes of a glyph's spelling: whether each is a curve, and its points (P, 2) in [0, 1]."""
    strokes = []
    for stroke in spelling.split():
        pen, digits = stroke[0], list(stroke[1:])
        if pen not in "-~" or len(digits) < 4 or len(digits) % 2:
            raise ValueError(
                f"The stroke {pen}{''.join(digits)!s} must be `-` or `~` and at least two points of two digits."
            )
        strokes.append((pen == "~", np.array(digits, dtype=float).reshape(-1, 2) / 9))
    return tuple(strokes)


@cache
def _spline_weights(num_points: int, closed: bool, steps: int = 4) -> np.ndarray:
    """Catmull-Rom as a matrix ((P - 1) * steps + 1, P): the curve passes through all of its points."""
    weights = np.zeros(((num_points - 1) * steps + 1, num_points))
    for row in range(len(weights)):
        segment, u = min(row // steps, num_points - 2), row / steps - min(row // steps, num_points - 2)
        before, after = segment - 1, segment + 2
        if closed:  # the last point repeats the first
            before, after = before % (num_points - 1), after % (num_points - 1)
        factors = (-u + 2 * u**2 - u**3, 2 - 5 * u**2 + 3 * u**3, u + 4 * u**2 - 3 * u**3, u**3 - u**2)
        for point, factor in zip((before, segment, segment + 1, after), factors, strict=True):
            weights[row, min(max(point, 0), num_points - 1)] += factor / 2
    return weights


def hand_strokes(character: str, rng: np.random.Generator, jitter: float) -> list[np.ndarray]:
    """Returns polylines (P, 2) of `character`: one of its spellings, its points moved by `jitter` (of the side)."""
    spellings = STROKES[character]
    strokes = parse_strokes(spellings[rng.integers(len(spellings))])
    points, index = np.unique(np.concatenate([stroke for _, stroke in strokes]), axis=0, return_inverse=True)
    points = (points + jitter * rng.standard_normal(points.shape))[index.reshape(-1)]  # strokes that met still meet
    lines, start = [], 0
    for curve, stroke in strokes:
        line = points[start : start + len(stroke)]
        closed = bool((stroke[0] == stroke[-1]).all())
        lines.append(_spline_weights(len(line), closed) @ line if curve else line)
        start += len(stroke)
    return lines


def stroke_mask(
    lines: list[np.ndarray], box: tuple[float, float], pen: float, slant: float, angle: float, side: int = CANVAS
) -> Image.Image:
    """Draws polylines (P, 2), y downward, into the middle of a square; returns a mask, 255 where there is ink.

    `box` is the width (an upper limit) and height as fractions of the square, `pen` in pixels, `slant` the shift to the right
    at the top as a fraction of the height, `angle` in radians.
    """
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1.0, -slant], [0.0, 1.0]])
    points = np.concatenate(lines) @ (turn @ shear).T
    low, extent = points.min(0), np.maximum(np.ptp(points, axis=0), 0.05)
    room = np.maximum(np.array(box) * side - pen, 1.0)
    scale = np.minimum(room / extent, [room[1] / extent[1] * 1.1, np.inf])  # a thin glyph stays thin
    points = (points - low - extent / 2) * scale + side / 2
    mask = Image.new("L", (side, side))
    pencil, start, radius = ImageDraw.Draw(mask), 0, pen / 2
    for line in lines:
        path = points[start : start + len(line)].tolist()
        pencil.line([(x, y) for x, y in path], fill=255, width=max(round(pen), 1), joint="curve")
        for x, y in (path[0], path[-1]):
            pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        start += len(line)
    return mask


@cache
def _font_mask(character: str, font: str) -> Image.Image:
    """The character in one of Pillow's fonts, cut at its edges."""
    face = ImageFont.load_default(size=48) if font == "sans" else ImageFont.load_default_imagefont()
    canvas = Image.new("L", (96, 96))
    ImageDraw.Draw(canvas).text((16, 16), character, fill=255, font=face)
    return canvas.crop(canvas.getbbox())


def font_mask(character: str, font: str, box: tuple[float, float], angle: float, side: int = CANVAS) -> Image.Image:
    """Draws a character in Pillow's font `sans` or `bitmap`, as `stroke_mask` draws polylines."""
    glyph = _font_mask(character, font)
    scale = min(box[0] * side / glyph.width, box[1] * side / glyph.height)
    size = max(round(glyph.width * scale), 2), max(round(glyph.height * scale), 2)
    glyph = glyph.resize(size, Image.Resampling.NEAREST if font == "bitmap" else Image.Resampling.BILINEAR)
    mask = Image.new("L", (side, side))
    mask.paste(glyph, ((side - size[0]) // 2, (side - size[1]) // 2))
    return mask.rotate(np.degrees(angle), Image.Resampling.BILINEAR) if angle else mask


def glyph_mask(character: str, font: str, rng: np.random.Generator) -> Image.Image:
    """Returns a letter A-Z or a digit as a mask of 64 x 64 pixels, nearly filling it; 255 where there is ink.

    The `FONTS`: Pillow's `sans` and `bitmap`; `plain` strokes; `hand` strokes, uneven and slanted; `scan`, the same at 8 x 8
    pixels.
    """
    if font == "scan":
        return scan_mask(character, rng)
    angle, width, height = rng.normal(0, 0.08), rng.uniform(0.6, 0.95), rng.uniform(0.75, 0.95)
    if font in ("sans", "bitmap"):
        return font_mask(character, font, (width, height), angle)
    hand = font == "hand"
    lines = hand_strokes(character, rng, 0.045 if hand else 0.01)
    slant = rng.normal(0.1, 0.2) if hand else 0.0
    return stroke_mask(lines, (width, height), rng.uniform(4, 13), slant, angle * (1.5 if hand else 0.5))


def scan_mask(character: str, rng: np.random.Generator) -> Image.Image:
    """Draws as the UCI scans of handwriting were prepared: a 32 x 32 bitmap, filled, counted in blocks of 4 x 4."""
    lines = hand_strokes(character, rng, rng.uniform(0.015, 0.055))
    box = rng.uniform(0.48, 0.76), rng.uniform(0.98, 1.06)
    pen = rng.uniform(3.5, 11.0 if character == "1" else 6.5)  # a one is scaled up the most, its stroke with it
    mask = stroke_mask(lines, box, pen, rng.normal(0.12, 0.16), rng.normal(0, 0.05), side=32)
    mask = mask.transform((32, 32), Image.Transform.AFFINE, (1, 0, rng.normal(0, 1.2), 0, 1, rng.normal(0, 0.5)))
    gain = rng.uniform(0.9, 1.2)
    counts = mask.reduce(4).point([min(round(gain * count), 255) for count in range(256)])
    return counts.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
