"""Letters and digits drawn by strokes, and in the two fonts that Pillow carries: masks for the procedural images.

A glyph is written in a small notation: strokes separated by spaces, each a pen (`-` straight, `~` a smooth curve) and
its points, two digits each: x from 0 (left) to 9 (right), y from 0 (top) to 9 (bottom). `-10 ...` would be two strokes,
so points are joined without spaces: `-1080` is a bar at the top. Several spellings of a glyph are several hands.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONTS = ("sans", "bitmap", "plain", "hand", "scan")
DIGITS = tuple("0123456789")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

STROKES: dict[str, tuple[str, ...]] = {
    "0": ("~5021141628497885837150", "~50301416285978847250", "~602105275978867260", "~401115285978735140"),
    "1": ("-5059", "-235059", "-235059 -2989", "-6039", "-324059", "~325059 -5989", "-144059 -5979"),
    "2": (
        "~1231507182745519 -1989",
        "~123071735528081638 -3889",
        "~12307174371908 ~08276888",
        "~225071735429 -2979",
        "~13304060817355 -5519 -1999",
    ),
    "3": (
        "~113070826444 ~447486784908",
        "-108044 ~447587683908",
        "~11407263447587583908",
        "~204071725434 ~347477693919",
        "~124071746535 ~5567684919",
    ),
    "4": (
        "-69600696",
        "-201585 -6259",
        "-400686 -6359",
        "~401306 -0686 -6259",
        "-300585 -7249",
        "-59500787",
        "-500585 -6259",
    ),
    "5": (
        "-802014 ~14437486683908",
        "-702014 ~145485774918",
        "~8030134475783908",
        "-2014 ~145385783909 -2080",
        "-903024 ~245475774818",
        "-703024 -2464 ~647678491918",
    ),
    "6": (
        "~70311417396987653517",
        "~602205174978754516",
        "-6015 ~15184978856415",
        "~5033163859785534",
        "~804116285877755426",
    ),
    "7": (
        "-108039",
        "-108039 -2575",
        "-1080 ~805439",
        "-12108049",
        "-1080 ~805549 -1585",
        "~02205080 -8039 -2585",
        "~11307081 -8149 -3686",
    ),
    "8": (
        "~703012447668391725548270",
        "~40123464826040 ~4416285988865444",
        "~502133638150 ~531639798553",
        "~81502142677859282654736081",
        "~704021355676694938365472",
    ),
    "9": (
        "~82501214457482 -8279",
        "~72502113356572 ~7286683918",
        "~824012356582 -8249",
        "~824012356582 ~8287684918",
        "~81603012457481 ~8175593909",
        "~71402124546371 -7169",
        "~72402124546372 ~7265574818",
    ),
    "A": ("-094089 -1676", "-195089 -2676", "~0915408589 -1585"),
    "B": ("-1019 ~1060826414 ~1474876919", "-2029 ~2060724424 ~2464776929"),
    "C": ("~8260300306396987", "~8150212426385978"),
    "D": ("-1019 ~106083866919", "-2029 ~205074755929"),
    "E": ("-80101989 -1464", "-70202979 -2474"),
    "F": ("-801019 -1464", "-702029 -2464"),
    "G": ("~8260300306396986 -558589", "~715021242759787555"),
    "H": ("-1019 -8089 -1484", "-2029 -7079 -2575"),
    "I": ("-5059", "-2080 -5059 -2989", "-4049 -2060 -2969"),
    "J": ("-7077 ~77592907", "-3080 -6067 ~67593917"),
    "K": ("-1019 -801489", "-2029 -7025 -3579"),
    "L": ("-101989", "-202979"),
    "M": ("-0910458089", "-1910558099"),
    "N": ("-19108980", "-29207970"),
    "O": ("~401104184988948140", "~502114285978857350"),
    "P": ("-1910 ~1060826414", "-2920 ~2060736525"),
    "Q": ("~401104184988948140 -6699", "~502114285978857350 -5789"),
    "R": ("-1910 ~1060826414 -4489", "-2920 ~2060736525 -4579"),
    "S": ("~81502012447587592908", "~71503023547667493918"),
    "T": ("-1070 -4049", "-1090 -5059"),
    "U": ("-1016 ~16395986 -8680", "-2027 ~27395977 -7770"),
    "V": ("-004980", "-105990"),
    "W": ("-0029436990", "-1028546890"),
    "X": ("-1089 -8019", "-2079 -7029"),
    "Y": ("-104480 -4449", "-105490 -5459"),
    "Z": ("-10801989", "-20702979 -3565"),
}


CANVAS = 64  # pixels a side in which glyphs are drawn, twice the size of the images


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
    """Draws polylines, slanted and turned, fitted into the middle of a square.

    Args:
        lines: Polylines (P, 2), y downward.
        box: Width and height of the drawn glyph as fractions of the square; the width is an upper limit.
        pen: Width of the pen in pixels.
        slant: Shift to the right at the top, as a fraction of the height.
        angle: Turn in radians.
        side: Side of the square in pixels.

    Returns:
        A greyscale mask, 255 where there is ink.
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
    """Returns a letter or digit as a mask of 64 x 64 pixels, nearly filling it; 255 where there is ink.

    Args:
        character: A letter A-Z or a digit.
        font: One of `FONTS`: Pillow's `sans` and `bitmap`; `plain` strokes; `hand` strokes, uneven and slanted; `scan`,
            the same at 8 x 8 pixels.
        rng: Source of the hand's variety.
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
