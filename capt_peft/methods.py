"""Named recipes: which prompts, which objective and which attack. None has a trainer of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .objectives import AdversarialCrossEntropy, CaptObjective, FapObjective, Objective
from .training.arguments import CaptTrainingArguments


@dataclass(frozen=True)
class Method:
    """A way to tune prompts on adversarial images.

    Args:
        source: Paper that it comes from.
        objective: Makes the objective from the training arguments; None: nothing is tuned.
        prompts: Fields of `CaptConfig` that belong to the method; other fields are the user's.
        attack: Fields of `CaptTrainingArguments` that belong to the method's training attack.
    """

    source: str
    objective: Callable[[CaptTrainingArguments], Objective] | None
    prompts: Mapping[str, Any] = field(default_factory=dict)
    attack: Mapping[str, Any] = field(default_factory=dict)


def _adversarial(args: CaptTrainingArguments) -> Objective:
    return AdversarialCrossEntropy()


METHODS: dict[str, Method] = {
    "zero-shot": Method("the hand-written template (arXiv 2103.00020); nothing is tuned", None),
    "capt": Method("arXiv 2405.11154", lambda args: CaptObjective(args.consistency, args.weighting)),
    "trades-maple": Method(
        "arXiv 1901.08573 with the prompts of arXiv 2210.03117",
        lambda args: CaptObjective(args.consistency, 0.0),
        {"coupling": "text_to_vision"},
    ),
    "fap": Method(
        "arXiv 2403.14774",
        lambda args: FapObjective(args.consistency),
        {"coupling": "vision_to_text"},
        {"attack_loss": "kl"},
    ),
    "adv-maple": Method("arXiv 2210.03117, as in arXiv 2403.14774", _adversarial, {"coupling": "text_to_vision"}),
    "adv-vlp": Method("independent prompts, as in arXiv 2403.14774", _adversarial, {"coupling": "none"}),
    "adv-vp": Method("deep vision prompts alone", _adversarial, {"coupling": "none", "text_depth": 0}),
    "adv-tp": Method("arXiv 2403.01849 (APT)", _adversarial, {"coupling": "none", "text_depth": 1, "vision_depth": 0}),
}


ALIASES = {"apt": "adv-tp"}


def method_name(name: str) -> str:
    """Returns the name under which `METHODS` has a method.

    Raises:
        ValueError: An unknown name.
    """
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise ValueError(f"Unknown method {name!r}. Allowed: {', '.join([*METHODS, *ALIASES])}.")
    return name


def get_method(name: str) -> Method:
    """Returns a method by name or alias.

    Raises:
        ValueError: An unknown name.
    """
    return METHODS[method_name(name)]
