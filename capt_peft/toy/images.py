"""Procedural captioned images.

An image is drawn from its facts, such as `{"shape": "star", "color": "red", "size": "large"}`, and a caption states
some of them. `draw` makes what `examples/pretrain_tiny_clip.py` trains on. Some pairs of facts it never puts into one image:
those where the positions of the two values in `FACTS` add up to a multiple of five, a fifth of all pairs. The tasks of
`tasks` are made of these.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from .drawing import (
    COLORS,
    SHAPES,
    TEXTURES,
    blend,
    draw_background,
    draw_color,
    draw_shapes,
    draw_texture,
    scatter,
    to_image,
    to_mask,
)
from .glyphs import CANVAS, DIGITS, FONTS, LETTERS, glyph_mask

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
    """Draws what an image shows, held-out pairs included.

    Args:
        rng: Source of chance.
        kind: A key of `KINDS`: one `object`, several `objects`, a `texture`, a `letter` or a `digit`.
    """

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
    """Draws one image for pre-training; never with a held-out pair.

    Args:
        rng: Source of chance; the same state draws the same image.

    Returns:
        An RGB image of 32 x 32 pixels and its facts, from which `caption` makes captions.
    """
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    facts = sample_facts(rng, kind)
    while any(is_held_out(facts, pair) for pair in HELD_OUT_PAIRS):
        facts = sample_facts(rng, kind)
    return draw_facts(facts, rng), facts


def caption(facts: Facts, rng: np.random.Generator) -> tuple[str, Facts]:
    """Puts some of the facts into words.

    Args:
        facts: What the image shows.
        rng: Source of chance.

    Returns:
        The caption, and the facts that it states: it is true of every image whose facts include these.
    """
    stated = {name: facts[name] for name, share in _STATED.items() if name in facts and rng.random() < share}
    if "shape" in facts:
        stated = (stated or {"shape": facts["shape"]}) | {"number": facts["number"]}
    if "texture" in facts:
        stated = {}
    return phrase(stated | {name: facts[name] for name in ("texture", "letter", "digit") if name in facts}, rng)


def phrase(stated: Facts, rng: np.random.Generator) -> tuple[str, Facts]:
    """Returns a sentence that states the given facts, and all that it states by that: shapes have a number."""
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
    opening = _OPENINGS[rng.integers(len(_OPENINGS))]
    return f"{opening}{words}{'.' if rng.random() < 0.8 else ''}", stated


_OPENINGS = ("a photo of ",) * 6 + ("a picture of ", "an image of ", "a drawing of ", "")
_STATED = {"shape": 0.7, "color": 0.4, "size": 0.3, "position": 0.3, "count": 0.85, "background": 0.25}


def _shape_words(stated: Facts, single: bool) -> str:
    noun = stated.get("shape", "shape")
    if not single:
        noun += "es" if noun == "cross" else "s"
    words = ("a" if single else stated.get("count"), stated.get("size"), stated.get("color"), noun)
    joined = " ".join(word for word in words if word)
    return f"{joined} in the {stated['position']}" if "position" in stated else joined
