"""What becomes of one batch under one attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attacks import Attack, AttackResult, LogitsFn
from ..attacks.base import Guarded, Report
from ..clip.classifier import ZeroShotClassifier
from ..randomness import example_generators
from .subject import Subject

_ROUNDING = 1e-6


def outcomes(
    classifier: ZeroShotClassifier, attack: Attack, pixels: Tensor, labels: Tensor, indices: list[int], seed: int
) -> tuple[Tensor, Tensor]:
    """Attacks a batch and returns what the classifier says.

    Args:
        classifier: In eval mode.
        attack: The attack; each image has random numbers of its own, by `seed` and place.
        pixels: (B, 3, H, W) in [0, 1].
        labels: (B,) class indices.
        indices: The B places of the images in their dataset.
        seed: Seed of the attack.

    Returns:
        The predicted classes (B,) of the clean and of the adversarial images.
    """
    logits_fn = Guarded(classifier.with_fixed_texts())
    adversarial = attack(logits_fn, pixels, labels, example_generators(seed, indices, stream="evaluation"))
    with torch.no_grad():
        return logits_fn(pixels).argmax(-1), logits_fn(adversarial).argmax(-1)


class _Counted(Guarded):
    """Counts the images that a model is run on, and how many of them with a gradient."""

    def __init__(self, logits_fn: LogitsFn) -> None:
        super().__init__(logits_fn)
        self.forwards = self.gradients = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the logits (B, N)."""
        self.forwards += len(images)
        self.gradients += len(images) if images.requires_grad else 0
        return super().__call__(images)


@dataclass(frozen=True)
class Attacked:
    """A batch after an attack: what is recorded of it, and its adversarial images (B, 3, H, W)."""

    record: dict[str, Any]
    images: Tensor


def attack_batch(
    subject: Subject,
    attack: Attack,
    pixels: Tensor,
    labels: Tensor,
    indices: list[int],
    seed: int,
    report: Report | None = None,
) -> Attacked:
    """Attacks the images of a batch that are classified correctly, and records what became of each.

    Leaving out the others changes no accuracy: an image counts as robust only if it is right before and after the attack.

    Args:
        subject: What is attacked and what decides.
        attack: The attack; each image has random numbers of its own, by `seed` and place.
        pixels: (B, 3, H, W) in [0, 1].
        labels: (B,) class indices.
        indices: The B places of the images in their dataset.
        seed: Seed of the attack.
        report: Called as the attack goes on.

    Returns:
        `record`: lists over the B images (`clean` and `prediction`, the predicted classes before and after; `norm`, the length of
        the perturbation; `broken_by`, the attack that turned a right answer, or None), and what the attack cost and saw.
    """
    clean = subject.scored(pixels).argmax(1)  # (B,)
    right = (clean == labels).nonzero().squeeze(1)  # (A,)
    counted = _Counted(subject.attacked.logits_fn)
    adversarial, prediction = pixels.clone(), clean.clone()
    result = None
    if len(right):
        generators = example_generators(seed, [indices[i] for i in right.tolist()], stream="evaluation")
        result = attack.run(counted, pixels[right], labels[right], generators, report=report)
        _check_inside(attack, result.images, pixels[right])
        adversarial[right] = result.images
        prediction[right] = subject.scored(result.images).argmax(1)
    record = {
        "index": indices,
        "label": labels.tolist(),
        "clean": clean.tolist(),
        "prediction": prediction.tolist(),
        "norm": attack.threat_model.norm_of(adversarial - pixels).tolist(),
        "broken_by": _broken_by(attack.name, result, right, clean, prediction),
        "zero_gradients": _known(result),
        "parts": [] if result is None else _parts(result),
        "notes": [] if result is None else list(result.notes),
        "attacked": len(right),
        "forwards": counted.forwards,
        "gradients": counted.gradients,
        "changed": 0 if subject.precision == "float32" else _changed(subject, adversarial, prediction, labels),
    }
    return Attacked(record, adversarial)


def _check_inside(attack: Attack, adversarial: Tensor, pixels: Tensor) -> None:
    """Raises a ValueError if an attack has left its threat model: what it breaks then says nothing."""
    length = float(attack.threat_model.norm_of(adversarial - pixels).max())
    low, high = (float(value) for value in adversarial.aminmax())
    if not (length <= attack.threat_model.epsilon + _ROUNDING and low >= 0 and high <= 1):
        raise ValueError(
            f"The attack {attack.name} has left its threat model {attack.threat_model}: a perturbation has length {length:.6g}, "
            f"and pixels range from {low:.6g} to {high:.6g}. Project its images: threat_model.project(adversarial, images)."
        )


def _broken_by(
    name: str, result: AttackResult | None, right: Tensor, clean: Tensor, prediction: Tensor
) -> list[str | None]:
    found: list[str | None] = [None] * len(clean)
    for place, row in enumerate(right.tolist()):
        if clean[row] != prediction[row]:
            assert result is not None
            by = [part.name for part in result.parts if part.broken[place]]
            found[row] = by[0] if by else name
    return found


def _parts(result: AttackResult) -> list[dict[str, Any]]:
    return [{"name": p.name, "attacked": p.attacked, "broken": int(p.broken.sum())} for p in result.parts]


def _known(result: AttackResult | None) -> list[float]:
    """Returns the zero-gradient shares of the images that an attack took a gradient of."""
    shares = [] if result is None else result.zero_gradient_share.tolist()
    return [share for share in shares if share == share]  # NaN differs from itself


def _changed(subject: Subject, adversarial: Tensor, prediction: Tensor, labels: Tensor) -> int:
    with torch.no_grad():
        answers = subject.attacked(adversarial).argmax(1)
    return int(((answers == labels) != (prediction == labels)).sum())
