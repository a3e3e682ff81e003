"""Suites: the data sets of a benchmark, and the settings that all its methods share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..toy.tasks import SHIFTS, TOY_TASKS


@dataclass(frozen=True)
class Suite:
    """The data sets of a benchmark.

    Args:
        name: Its name.
        tasks: Data sets in distribution, by their names in `list_tasks()`.
        source: The one of them that adapters are tuned on for other data sets and for shifts.
        shifts: Test sets with the classes of `source`, or a part of them.
        settings: Fields of `CaptTrainingArguments` and `CaptConfig` for all methods. As a user's, they win over the recipe of a
            method, and cannot change what the method is.
        method_settings: The same, for one method.
        attacks: Names of the attacks that measure robust accuracy.
        limit: Test images per data set, drawn by seed 0; None: all.
        few_classes: Data sets with fewer than 4 classes, which base-to-new leaves out.
    """

    name: str
    tasks: tuple[str, ...]
    source: str
    shifts: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    method_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    attacks: tuple[str, ...] = ("pgd-20",)
    limit: int | None = None
    few_classes: tuple[str, ...] = ()


# coupled prompts are as many in both towers, and no more than the shortest template has words
_COUPLED = {"num_text_tokens": 3, "num_vision_tokens": 3}
# on some toy tasks the 40 steps of all methods are less than an epoch, so that a schedule by epoch would tune nothing
_BY_STEP = {"lr_schedule": "step"}

_PAPER = (
    "imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397", "dtd",
    "eurosat", "ucf101",
)  # fmt: skip

SUITES = {
    "toy": Suite(
        "toy",
        tasks=("digits", *TOY_TASKS),
        source="shapes",
        shifts=tuple(SHIFTS),
        # so small that the whole comparison takes two CPU cores an hour and a half
        settings={"epsilon": "4/255", "attack_steps": 2, "max_steps": 40, "dataloader_pin_memory": False},
        # of 0.1, 0.3 and 1, the best for each method on validation images of four tasks (docs/results.md)
        method_settings={
            "capt": {"learning_rate": 0.3},
            "trades-maple": {**_COUPLED, "learning_rate": 1.0},
            "fap": {**_COUPLED, **_BY_STEP, "learning_rate": 1.0},
            "pmg-aft": {"learning_rate": 0.1},
            "adv-maple": {**_COUPLED, **_BY_STEP, "learning_rate": 1.0},
            "adv-vlp": {"learning_rate": 0.3},
            "adv-vp": {"learning_rate": 0.3},
            "adv-tp": {**_BY_STEP, "num_text_tokens": 3, "learning_rate": 0.1},
        },
        limit=100,
        few_classes=("sizes",),
    ),
    "paper": Suite(
        "paper",
        tasks=_PAPER,
        source="imagenet",
        shifts=("imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r"),
        # MaPLe and FAP tune with this text everywhere; zero-shot has the hand-written ones
        settings={"template": "a photo of a {}."},
        attacks=("pgd-100",),
    ),
}


def get_suite(name: str) -> Suite:
    """Returns a suite by name.

    Raises:
        ValueError: An unknown name.
    """
    if name not in SUITES:
        raise ValueError(
            f"Unknown suite {name!r}. Allowed: {', '.join(SUITES)}, and a `Suite` of your own (--suite own)."
        )
    return SUITES[name]
