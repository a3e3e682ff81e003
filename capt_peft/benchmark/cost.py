"""How long cells should take: counted in images through the image tower, and timed on the machine at hand."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModel

from ..training import CaptTrainingArguments
from ..tuner.clip import image_features, image_size
from ..tuner.loading import load_pretrained
from .plan import ZERO_SHOT, Cell

CLASSES, ALL_IMAGES, TEST_IMAGES = 10, 64, 400  # guesses where the data set has not been read
# Forward and backward passes an image, about half of the images withstanding the cheap attacks
_ENSEMBLE, _FAB_STEP, _STEP, _QUERY = 8000.0, 30.0, 2.0, 1.0


def passes(cell: Cell) -> float:
    """Returns about how many images go through the image tower, forward or backward, when the cell is run."""
    return _training_passes(cell) + _measuring_passes(cell)


def _training_passes(cell: Cell) -> float:
    if cell.method == ZERO_SHOT:
        return 0.0
    settings = cell.settings
    batch = _setting(settings, "per_device_train_batch_size")
    per_class = ALL_IMAGES if cell.shots == "all" else int(cell.shots)
    images = per_class * CLASSES
    steps = int(settings.get("max_steps", -1))
    seen = steps * min(batch, images) if steps > 0 else images * _setting(settings, "num_train_epochs")
    return seen * (2 * _setting(settings, "attack_steps") + 4)


def _setting(settings: Mapping[str, Any], name: str) -> float:
    return float(settings.get(name, getattr(CaptTrainingArguments, name)))


def _measuring_passes(cell: Cell) -> float:
    images = (cell.limit or TEST_IMAGES) * len(cell.targets)
    return images * (1 + sum(map(attack_passes, cell.attacks)))


def attack_passes(name: str) -> float:
    """Returns about how many passes an attack of this name makes with an image."""
    numbers = [int(number) for number in re.findall(r"\d+", name)] or [0]
    steps, restarts = numbers[0], numbers[1] if len(numbers) > 1 else 1
    if name.startswith("autoattack"):
        return _ENSEMBLE
    if name.startswith("square"):
        return (steps or 5000) * restarts * _QUERY / 2
    if name.startswith("fab"):
        return (steps or 100) * restarts * _FAB_STEP
    targets = 9 if name.startswith("apgd-t") else 1
    return (steps or (1 if name == "fgsm" else 100)) * restarts * targets * _STEP


def seconds_a_pass(cells: Sequence[Cell], lines: Mapping[str, Mapping[str, Any]], model: str) -> float:
    """Returns the seconds of an image's pass: from cells that have ended, or else timed on the model for a moment.

    Args:
        cells: All cells.
        lines: The lines there are, by key.
        model: Folder or Hub id of the CLIP.
    """
    ended = [(cell, lines[cell.key]) for cell in cells if lines.get(cell.key, {}).get("status") == "finished"]
    if len(ended) >= 3:
        return sum(float(line["seconds"]) for _, line in ended) / sum(passes(cell) for cell, _ in ended)
    clip: Any = load_pretrained(AutoModel, model, dtype=torch.float32).eval()
    side = image_size(clip)
    pixels = torch.rand(32, 3, side, side, requires_grad=True)
    rounds: list[float] = []
    while len(rounds) < 3 or (sum(rounds) < 1 and len(rounds) < 20):
        start = time.perf_counter()
        torch.autograd.grad(image_features(clip, pixels).float().sum(), pixels)
        rounds.append(time.perf_counter() - start)
    return sorted(rounds)[len(rounds) // 2] / (2 * len(pixels))


def duration(seconds: float) -> str:
    """Returns a duration as people read it: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
