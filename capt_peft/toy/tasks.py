"""The classification tasks that need no download: the toy suite, which mirrors the paper's 14 data sets.

Eleven are in distribution. `digits` is real: 1,797 scans of handwritten digits, which no drawing has seen. The
others ask for one fact of the images of `images`, in images drawn from random streams of their own and with pairs of facts that
`images.draw`, and so the pre-training of tiny CLIP, never puts into one image. Three are distribution shifts of `shapes`.

================  =====================================  =====================================================
task              classes                                held-out pairs (every image of the task has one)
================  =====================================  =====================================================
digits            10 digits                              (scans)
shapes            10 shapes                              (shape, color)
colors            10 colours of a shape                  (shape, color)
sizes             small, medium, large                   (shape, size)
positions         9 places of a shape                    (shape, position)
counts            two to five shapes                     (shape, count)
backgrounds       10 colours of the ground               (color, background)
textures          10 textures                            (texture, color)
letters           26 capital letters                     (letter, font)
numerals          10 digits in many fonts                (color, background)
inks              10 colours of a letter                 (color, background)
shapes_corrupted  as shapes; test images only            noisy, blurred, pale or coarse
shapes_sketched   as shapes; test images only            outlines, dark on white
shapes_recolored  as shapes; test images only            colours that were never drawn
================  =====================================  =====================================================
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from datasets import Dataset
from PIL import Image, ImageFilter, ImageOps
from pyarrow import compute
from pyarrow.parquet import read_table

from ..data.loading import MADE
from ..data.task import SPLITS, Task, task_features
from .glyphs import DIGITS
from .images import FACTS, draw_facts, is_held_out, sample_facts

DIGITS_FILE = Path(__file__).with_name("digits.parquet")
Render = Callable[[Image.Image, np.random.Generator], Image.Image]


class ToyTask(NamedTuple):
    """What a procedural task asks for: the fact, its held-out pair, what is drawn and the text of a class."""

    fact: str
    held_out: tuple[str, str]
    kind: str
    template: str


TOY_TASKS = {
    "shapes": ToyTask("shape", ("shape", "color"), "object", "a photo of a {}."),
    "colors": ToyTask("color", ("shape", "color"), "object", "a photo of a {} shape."),
    "sizes": ToyTask("size", ("shape", "size"), "object", "a photo of a {} shape."),
    "positions": ToyTask("position", ("shape", "position"), "object", "a photo of a shape in the {}."),
    "counts": ToyTask("count", ("shape", "count"), "objects", "a photo of {}."),
    "backgrounds": ToyTask("background", ("color", "background"), "object", "a photo of a shape on a {} background."),
    "textures": ToyTask("texture", ("texture", "color"), "texture", "a photo of a {} texture."),
    "letters": ToyTask("letter", ("letter", "font"), "letter", "a photo of the letter {}."),
    "numerals": ToyTask("digit", ("color", "background"), "digit", "a photo of the digit {}."),
    "inks": ToyTask("color", ("color", "background"), "letter", "a photo of a {} letter."),
}


def corrupt(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Returns an image made noisy, blurred, pale or coarse, each as likely."""
    kind = rng.integers(4)
    if kind == 0:
        noisy = np.asarray(image, np.float32) + rng.normal(0, rng.uniform(20, 45), (*image.size[::-1], 3))
        return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))
    if kind == 1:
        return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(1, 1.8))))
    if kind == 2:
        gray = Image.new("RGB", image.size, (128, 128, 128))
        return Image.blend(image, gray, float(rng.uniform(0.55, 0.75)))
    side = int(rng.integers(9, 14))
    return image.resize((side, side), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def sketch(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Returns the outlines of an image, dark on white, with a pencil's unevenness."""
    smooth = image.filter(ImageFilter.GaussianBlur(0.7))
    # the strongest edge of the three channels: two colours can be equally bright
    edges = [np.asarray(channel.filter(ImageFilter.FIND_EDGES), np.float32) for channel in smooth.split()]
    strength = np.max(edges, axis=0)
    strength[[0, -1]] = strength[:, [0, -1]] = 0  # the filter leaves the frame as it is
    line = np.clip(strength / max(np.percentile(strength, 97), 1), 0, 1) * rng.uniform(0.75, 1, strength.shape)
    return Image.fromarray((255 * (1 - line)).round().astype(np.uint8)).convert("RGB")


def recolor(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Returns an image in a negative's colours, its channels in another order."""
    channels = ImageOps.invert(image).split()
    return Image.merge("RGB", [channels[i] for i in rng.permutation(3)])


SHIFTS: dict[str, tuple[str, Render]] = {
    "shapes_corrupted": ("shapes", corrupt),
    "shapes_sketched": ("shapes", sketch),
    "shapes_recolored": ("shapes", recolor),
}


def procedural_tasks() -> list[str]:
    """Returns the names of the tasks that need no network and no files, the shifts last."""
    return ["digits", *TOY_TASKS, *SHIFTS]


def procedural_class_names(name: str) -> tuple[str, ...]:
    """Returns the class names of any of `procedural_tasks()`, without drawing an image."""
    if name == "digits":
        return DIGITS
    drawn, _ = SHIFTS.get(name, (name, None))
    values = FACTS[TOY_TASKS[drawn].fact]
    return tuple(f"{value} shapes" for value in values) if name == "counts" else values


def load_procedural_task(name: str, seed: int = 0) -> Task:
    """Returns any of `procedural_tasks()`; the digits are the same for every seed."""
    return load_digits_task() if name == "digits" else load_toy_task(name, seed=seed)


def load_toy_task(
    name: str, seed: int = 0, train_per_class: int = 64, validation_per_class: int = 20, test_per_class: int = 40
) -> Task:
    """Draws a procedural task; every image holds a pair of facts that pre-training never showed (see the module).

    Args:
        name: A key of `TOY_TASKS`, or of `SHIFTS`, which have test images alone.
        seed: Any non-negative integer; the same seed draws the same task.
        train_per_class: Images per class in the training split, at least 1.
        validation_per_class: The same for the validation split.
        test_per_class: The same for the test split.

    Raises:
        ValueError: An unknown name, or less than one image per class.
    """
    if name not in TOY_TASKS and name not in SHIFTS:
        raise ValueError(f"Unknown procedural task {name!r}. Allowed: {', '.join([*TOY_TASKS, *SHIFTS])}.")
    sizes = {"train": train_per_class, "validation": validation_per_class, "test": test_per_class}
    for split, size in sizes.items():
        if size < 1:
            raise ValueError(f"{split}_per_class is {size}; it must be at least 1.")
    drawn, render = SHIFTS.get(name, (name, None))
    task, values, class_names = TOY_TASKS[drawn], FACTS[TOY_TASKS[drawn].fact], procedural_class_names(name)
    splits = {}
    for number, (split, size) in enumerate(sizes.items()):
        if render is not None and split != "test":
            continue
        rng = np.random.default_rng([seed, crc32(name.encode()), number])
        labels = [label for label in range(len(values)) for _ in range(size)]
        images = [_draw_held_out(task, values[label], rng) for label in labels]
        if render is not None:
            images = [render(image, rng) for image in images]
        splits[split] = Dataset.from_dict({"image": images, "label": labels}, features=task_features(class_names))
    return Task(name, class_names, splits, task.template, source=name)


def _draw_held_out(task: ToyTask, value: str, rng: np.random.Generator) -> Image.Image:
    """An image of the class `value` with a held-out pair of the task."""
    while True:
        facts = sample_facts(rng, task.kind)
        if facts.get(task.fact) == value and is_held_out(facts, task.held_out):
            return draw_facts(facts, rng)


def load_digits_task() -> Task:
    """Loads 1,797 scans of handwritten digits, 8 x 8 pixels, bright on black: the test images of Alpaydin & Kaynak (1998).

    The splits are fixed and stratified: 797 images to train on, 300 for validation, 700 to test. The file names its source and
    licence.
    """
    table = read_table(DIGITS_FILE)
    splits = {}
    for split in SPLITS:
        part = table.filter(compute.field("split") == split)
        scans = np.array(part["pixels"].to_pylist(), float).reshape(-1, 8, 8) * 255 / 16
        images = [Image.fromarray(scan.round().astype(np.uint8)).convert("RGB") for scan in scans]
        columns = {"image": images, "label": part["label"].to_pylist()}
        splits[split] = Dataset.from_dict(columns, features=task_features(DIGITS))
    return Task("digits", DIGITS, splits, "a photo of the digit {}.", source="digits")


MADE.update({name: partial(load_procedural_task, name) for name in procedural_tasks()})
