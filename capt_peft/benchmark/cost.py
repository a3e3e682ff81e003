"""What cells cost, guessed without their data sets: passes through the image tower, and hours on a GPU."""

from __future__ import annotations

from ..data.catalog import CATALOG
from ..defences import adaptive, parse_defence
from ..training import CaptTrainingArguments
from .plan import Cell, Target

_CLASSES, _ALL_SHOTS, _TEST_IMAGES = 10, 64, 400  # of data sets that the catalog does not know
# docs/performance.md, "On a GPU" (H200, ViT-B/32, float32): PGD-20 on 256 images takes 2.98 s, a step with 32 images and K = 3
# takes 0.150 s, which is the time to start its kernels. A text of 10 tokens is about a tenth of an image's operations.
GPU = "one NVIDIA H200, ViT-B/32, float32"
_PASSES_PER_SECOND = 256 * (2 * 20 + 1) / 2.98
_SECONDS_TO_START = 0.150 / (2 * 3 + 4)
_OF_A_TEXT, _RUN_AGAIN = 0.1, 256  # above as many classes, texts are run again in the backward pass


def measuring(cell: Cell) -> float:
    """Returns about how many images go through the image tower, forward or backward, when a cell is measured."""
    attacks = cell.parsed_attacks()
    if cell.defence:
        attacks = adaptive(attacks, parse_defence(cell.defence))  # at a pass a decision, which is too little
    images = sum(_measured(cell, target) for target in cell.targets)
    return images * (1 + sum(attack.passes for attack in attacks))


def tuning(cell: Cell) -> tuple[float, float]:
    """Returns how many steps a cell is tuned for, and how many images a step has; no steps for zero-shot."""
    if not cell.tuned:
        return 0.0, 0.0
    images = _drawn(cell)
    batch = min(_setting(cell, "per_device_train_batch_size"), images)
    steps = _setting(cell, "max_steps")
    return (steps if steps > 0 else images / batch * _setting(cell, "num_train_epochs")), batch


def passes(cell: Cell) -> float:
    """Returns about how many images go through the image tower, forward or backward, when a cell is run."""
    steps, batch = tuning(cell)
    return measuring(cell) + steps * batch * _passes_of_a_step(cell)


def gpu_seconds(cell: Cell, *, tuned: bool = False) -> float:
    """Returns about how many seconds a cell takes on `GPU`, at the pace that docs/performance.md measured.

    Args:
        cell: The cell.
        tuned: Whether its adapter is there already, so that it is measured only.
    """
    seconds = measuring(cell) / _PASSES_PER_SECOND
    if tuned or not cell.tuned:
        return seconds
    (steps, batch), classes = tuning(cell), _classes(cell)
    texts = _OF_A_TEXT * classes * (3 if classes > _RUN_AGAIN else 2)
    each = (batch * _passes_of_a_step(cell) + texts) / _PASSES_PER_SECOND
    return seconds + steps * max(each, _passes_of_a_step(cell) * _SECONDS_TO_START)


def duration(seconds: float) -> str:
    """Returns a duration as people read it: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _passes_of_a_step(cell: Cell) -> float:
    return 2 * _setting(cell, "attack_steps") + 4


def _setting(cell: Cell, name: str) -> float:
    return float(cell.settings.get(name, getattr(CaptTrainingArguments, name)))


def _counts(task: str) -> tuple[int, ...]:
    return CATALOG[task].counts if task in CATALOG else ()


def _classes(cell: Cell) -> int:
    if cell.task not in CATALOG:
        return _CLASSES
    return CATALOG[cell.task].num_classes // (2 if cell.train_classes == "base" else 1)


def _drawn(cell: Cell) -> float:
    """Returns how many images a cell is tuned on."""
    if cell.shots != "all":
        return float(_classes(cell) * int(cell.shots))
    counts = _counts(cell.task)
    return float(counts[0] if counts else _CLASSES * _ALL_SHOTS)


def _measured(cell: Cell, target: Target) -> float:
    """Returns how many images of a target a cell is measured on."""
    counts, asked = _counts(target.task), cell.images_in(target.task)
    if not counts:
        return float(asked or _TEST_IMAGES)
    there = counts[-1] / (1 if target.classes == "all" else 2)
    return float(min(asked or there, there))
