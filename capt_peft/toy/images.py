"""Procedural captioned images, of 32 x 32 pixels.

An image is drawn from its facts, such as `{"shape": "star", "color": "red", "size": "large"}`, and a caption states
some of them. `draw` makes what `examples/pretrain_tiny_clip.py` trains on. Some pairs of facts it never puts into one image:
those where the positions of the two values in `FACTS` add up to a multiple of five, a fifth of all pairs. The tasks of
`tasks` are made of these.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .glyphs import CANVAS, DIGITS, FONTS, LETTERS, glyph_mask

SIDE = 32  # pixels per side of the finished image
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

Facts = dict[str, str]
SIZES = {"small": (8.0, 10.5), "medium": (13.0, 17.0), "large": (23.0, 30.0)}  # radius in canvas pixels
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
FACTS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "position": POSITIONS,
    "number": ("one", "many"),
    "count": ("two", "three", "four", "five"),
    "background": tuple(COLORS),
    "texture": TEXTURES,
    "letter": LETTERS,
    "digit": DIGITS,
    "font": FONTS,
}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT_PAIRS = (
    ("shape", "color"),
    ("shape", "size"),
    ("shape", "position"),
    ("shape", "count"),
    ("color", "background"),
    ("texture", "color"),
    ("letter", "font"),
)
KINDS = {"object": 0.24, "objects": 0.14, "texture": 0.12, "letter": 0.15, "digit": 0.35}  # shares of `draw`
_SCAN_SHARE = 0.55  # of the digits; the other fonts share the rest


def is_held_out(facts: Facts, pair: tuple[str, str]) -> bool:
    """Returns whether the facts hold a pair of values that pre-training never sees together."""
    first, second = pair
    if first not in facts or second not in facts:
        return False
    return (FACTS[first].index(facts[first]) + FACTS[second].index(facts[second])) % 5 == 0


def sample_facts(rng: np.random.Generator, kind: str) -> Facts:
    """Returns what an image of a kind (of `KINDS`) shows, held-out pairs included."""

    def pick(name: str) -> str:
        return FACTS[name][rng.integers(len(FACTS[name]))]

    facts = {"color": pick("color"), "background": pick("background")}
    while facts["background"] == facts["color"]:
        facts["background"] = pick("background")
    if kind == "object":
        facts |= {"shape": pick("shape"), "number": "one", "size": pick("size"), "position": pick("position")}
        if facts["size"] == "large":
            del facts["position"]  # it fills the image
    elif kind == "objects":
        facts |= {"shape": pick("shape"), "number": "many", "count": pick("count")}
    elif kind == "texture":
        facts |= {"texture": pick("texture")}
    elif kind == "letter":
        facts |= {"letter": pick("letter"), "font": pick("font")}
    else:
        facts |= {"digit": pick("digit"), "font": "scan" if rng.random() < _SCAN_SHARE else pick("font")}
    if facts.get("font") == "scan" and rng.random() < 0.85:
        color, background = ("white", "black") if rng.random() < 0.85 else ("black", "white")
        facts |= {"color": color, "background": background}
    return facts


def draw_facts(facts: Facts, rng: np.random.Generator) -> Image.Image:
    """Returns an RGB image of 32 x 32 pixels that shows `facts`, as `sample_facts` draws them."""
    ground = draw_background(facts["background"], rng)
    if "texture" in facts:
        mask = draw_texture(facts["texture"], rng)
        return to_image(blend(draw_color(facts["background"], rng), draw_color(facts["color"], rng), mask), rng)
    if "font" in facts:
        scan = facts["font"] == "scan"
        canvas = glyph_mask(facts.get("letter") or facts["digit"], facts["font"], rng)
        if scan and facts["background"] in ("black", "white"):
            pale, dark = (0.0, 1.0) if facts["background"] == "black" else (1.0, 0.0)
            return to_image(blend(np.full(3, pale, np.float32), np.full(3, dark, np.float32), to_mask(canvas)), rng)
        mask = to_mask(canvas)
        if not scan:
            mask = np.roll(mask, rng.integers(-2, 3, 2), (0, 1))
        return to_image(blend(ground, draw_color(facts["color"], rng), mask), rng)
    return to_image(blend(ground, draw_color(facts["color"], rng), to_mask(_draw_shapes(facts, rng))), rng)


def _draw_shapes(facts: Facts, rng: np.random.Generator) -> Image.Image:
    """A canvas with one shape at its place, or several apart from each other."""
    angle = rng.normal(0, 0.12)
    if facts["number"] == "many":
        radius, places = scatter(FACTS["count"].index(facts["count"]) + 2, rng)
        return draw_shapes(facts["shape"], places, radius, angle)
    radius, middle = rng.uniform(*SIZES[facts["size"]]), CANVAS / 2
    row, column = divmod(POSITIONS.index(facts.get("position", "center")), 3)
    reach = max(middle - radius - 1, 0)
    x, y = (middle + (third - 1) * reach + rng.uniform(-2.5, 2.5) for third in (column, row))
    return draw_shapes(facts["shape"], [(x, y)], radius, angle)


def draw(rng: np.random.Generator) -> tuple[Image.Image, Facts]:
    """Returns an image (RGB, 32 x 32 pixels) for pre-training, never with a held-out pair, and its facts; see `caption`."""
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    facts = sample_facts(rng, kind)
    while any(is_held_out(facts, pair) for pair in HELD_OUT_PAIRS):
        facts = sample_facts(rng, kind)
    return draw_facts(facts, rng), facts


def caption(facts: Facts, rng: np.random.Generator) -> tuple[str, Facts]:
    """Returns a caption of an image that shows `facts`, and those that it states: it is true of every image with these."""
    stated = {name: facts[name] for name, share in _STATED.items() if name in facts and rng.random() < share}
    if "shape" in facts:
        stated = (stated or {"shape": facts["shape"]}) | {"number": facts["number"]}
    if "texture" in facts:
        stated = {}
    return phrase(stated | {name: facts[name] for name in ("texture", "letter", "digit") if name in facts}, rng)


def phrase(stated: Facts, rng: np.random.Generator) -> tuple[str, Facts]:
    """Returns a sentence that states the given facts, and all that it states by that: shapes have a number."""
    words, stated = describe(stated, rng)
    opening = _OPENINGS[rng.integers(len(_OPENINGS))]
    return f"{opening}{words}{'.' if rng.random() < 0.8 else ''}", stated


def describe(stated: Facts, rng: np.random.Generator) -> tuple[str, Facts]:
    """Returns the words of `phrase`, without an opening and a full stop: "a red star in the top left"."""
    if "texture" in stated:
        words = f"a {stated['texture']} texture"
    elif "letter" in stated or "digit" in stated:
        noun, sign = ("letter", stated["letter"]) if "letter" in stated else ("digit", stated["digit"])
        if noun == "digit":
            sign = NUMBER_WORDS[int(sign)] if rng.random() < 0.5 else sign
            noun = "number" if rng.random() < 0.25 else "digit"
        words = " ".join(word for word in ("the", stated.get("color"), noun, sign) if word)
    else:
        stated = {"number": "many" if "count" in stated else "one"} | stated
        words = _shape_words(stated, stated["number"] == "one")
    if "background" in stated:
        words += f" on a {stated['background']} background"
    return words, stated


_OPENINGS = ("a photo of ",) * 6 + ("a picture of ", "an image of ", "a drawing of ", "")
_STATED = {"shape": 0.7, "color": 0.4, "size": 0.3, "position": 0.3, "count": 0.85, "background": 0.25}


def _shape_words(stated: Facts, single: bool) -> str:
    noun = stated.get("shape", "shape")
    if not single:
        noun += "es" if noun == "cross" else "s"
    words = ("a" if single else stated.get("count"), stated.get("size"), stated.get("color"), noun)
    joined = " ".join(word for word in words if word)
    return f"{joined} in the {stated['position']}" if "position" in stated else joined


# ------------------------------------------------------------------------------------------------- pixels
# Masks and pictures are float32 arrays in [0, 1]: masks (32, 32), pictures (32, 32, 3).


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
    mask = _pattern(name, u, v, rng.uniform(3, 6), rng.uniform(0.35, 0.6), rng)
    return mask.astype(np.float32).reshape(SIDE, 2, SIDE, 2).mean((1, 3))


def _pattern(
    name: str, u: np.ndarray, v: np.ndarray, waves: float, duty: float, rng: np.random.Generator
) -> np.ndarray:
    """Returns where a texture is bright, at coordinates (64, 64) along and across it."""
    across, along = u * waves, v * waves
    match name:
        case "striped":
            return across % 1 < duty
        case "checkered":
            return (np.floor(across) + np.floor(along)) % 2 == 0
        case "dotted":
            return np.hypot(across % 1 - 0.5, along % 1 - 0.5) < 0.2 + duty / 4
        case "grid":
            return (across % 1 < 0.25) | (along % 1 < 0.25)
        case "shaded":
            return (u - u.min()) / (u.max() - u.min())
        case "brick":
            return (along % 1 > 0.22) & ((u * waves / 2 + 0.5 * (np.floor(along) % 2)) % 1 > 0.12)
        case "zigzag":
            return (along + 0.9 * np.abs((u * waves * 0.7) % 1 - 0.5) * 2) % 1 < duty
        case "wavy":
            return (along + 0.35 * np.sin(u * 2 * math.pi * rng.uniform(1.2, 2))) % 1 < duty
        case "ringed":
            x, y = rng.uniform(0.3, 0.7, 2)
            return (np.hypot(_X - x, _Y - y) * waves * 1.3) % 1 < duty
    raise ValueError(f"There is no texture {name!r}.")


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
