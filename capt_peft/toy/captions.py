"""Captioned toy images for retrieval: no two of them are alike, and every caption is true of one image alone.

They are drawn from random streams of their own. Shapes, several shapes, letters and digits are a quarter each; textures are left
out, whose captions state nothing but the texture.
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset, Features, Image

from ..data.captions import CAPTIONED, CaptionedImages
from .images import Facts, describe, draw_facts, sample_facts

NAME = "captions"
SPLITS = ("validation", "test")
KINDS = ("object", "objects", "letter", "digit")
_UNSTATED = ("font", "number")  # what no caption says, and what it says by its nouns


def load_toy_captions(split: str = "test", seed: int = 0, images: int = 500) -> CaptionedImages:
    """Draws captioned images: the first caption of each states all of its facts, the second, where there is one, all but one.

    Args:
        split: "validation" or "test", which share no random numbers.
        seed: Any non-negative integer; the same seed draws the same images and captions.
        images: How many images, from 1 to 1,000.

    Raises:
        ValueError: Another split, or number of images.
    """
    if split not in SPLITS:
        raise ValueError(f"The toy captions have no split {split!r}. Allowed: {', '.join(SPLITS)}.")
    if not 1 <= images <= 1000:
        raise ValueError(f"images={images} must be from 1 to 1,000: there are not many more that differ.")
    rng = np.random.default_rng([seed, 3, SPLITS.index(split)])
    facts: list[Facts] = []
    while len(facts) < images:
        drawn = sample_facts(rng, KINDS[len(facts) % len(KINDS)])
        if not any(_true_of(_stated(one), other) for other in facts for one, other in ((drawn, other), (other, drawn))):
            facts.append(drawn)
    pictures = [draw_facts(each, rng) for each in facts]
    captions = tuple(_captions(each, facts, rng) for each in facts)
    dataset = Dataset.from_dict({"image": pictures}, features=Features({"image": Image()}))
    return CaptionedImages(NAME, dataset, captions, source=NAME)


def _captions(facts: Facts, all_facts: list[Facts], rng: np.random.Generator) -> tuple[str, ...]:
    stated = _stated(facts)
    found = [describe(stated, rng)[0]]
    for left_out in rng.permutation(list(stated)).tolist():
        fewer = {name: value for name, value in stated.items() if name != left_out}
        if left_out not in ("letter", "digit", "count") and sum(_true_of(fewer, other) for other in all_facts) == 1:
            return (*found, describe(fewer, rng)[0])
    return tuple(found)


def _stated(facts: Facts) -> Facts:
    return {name: value for name, value in facts.items() if name not in _UNSTATED}


def _true_of(stated: Facts, facts: Facts) -> bool:
    return stated.items() <= facts.items()


CAPTIONED[NAME] = load_toy_captions
