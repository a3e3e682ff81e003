"""Signs of masked gradients: when a robust accuracy should not be believed (Athalye et al. 2018; Carlini et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attacks import APGD, PGD, LogitsFn, ThreatModel
from ..attacks.losses import cross_entropy, pixel_gradient
from ..randomness import example_generators

PROBES = 100  # images that the probes are run on
REPEATS = 5  # forwards that must agree
MANY = 20  # steps that must beat one

RANDOM, ZERO, SQUARE, ONE_STEP, LEFT = 1e-4, 1e-3, 0.002, 0.005, 0.0


@dataclass(frozen=True)
class Sign:
    """One sign of masked gradients.

    Attributes:
        name: Which sign.
        raised: Whether the evaluation shows it; None where it was not checked.
        value: What was measured; None where it was not.
        threshold: The value above which the sign is raised.
        sentence: What it means, for people.
    """

    name: str
    raised: bool | None
    value: float | None
    threshold: float | None
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the sign, for results."""
        return asdict(self)


def _sign(name: str, value: float, threshold: float, bad: str, good: str) -> Sign:
    raised = value > threshold
    return Sign(name, raised, value, threshold, bad if raised else good)


def probe(
    logits_fn: LogitsFn,
    pixels: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    threats: Sequence[ThreatModel],
    seed: int,
) -> dict[str, Any]:
    """Measures what signs need, on a few images.

    Args:
        logits_fn: What attacks see.
        pixels: (B, 3, H, W) in [0, 1].
        labels: (B,) class indices.
        indices: The images' places in their dataset.
        threats: The threat models of the evaluation.
        seed: Seed of the attacks.

    Returns:
        Numbers by name, in JSON types.
    """
    generators = partial(example_generators, seed, indices, stream="evaluation")

    def left(attack: APGD | PGD) -> float:
        adversarial = attack(logits_fn, pixels, labels, generators())
        with torch.no_grad():
            return float((logits_fn(adversarial).argmax(1) == labels).double().mean())

    with torch.no_grad():
        outputs = torch.stack([logits_fn(pixels.clone()).float() for _ in range(REPEATS)])  # (REPEATS, B, N)
    spread = (outputs - outputs[0]).flatten(1).norm(dim=1).max() / outputs[0].norm().clamp_min(1e-12)
    starts = threats[0].random_start(pixels, generators())
    _, _, gradient = pixel_gradient(logits_fn, starts, lambda logits: cross_entropy(logits, labels))
    norm = threats[0].norm
    everything = ThreatModel(norm, 1.0 if norm == "linf" else math.sqrt(pixels[0].numel()))
    steps = [(left(PGD(t, steps=1)), left(PGD(t, steps=MANY))) for t in threats if t.epsilon > 0]
    return {
        "images": len(pixels),
        "output_spread": float(spread),
        "probabilities": _are_probabilities(outputs[0]),
        "zero_gradient_share": float((gradient == 0).double().mean()),
        "one_step": [one for one, _ in steps],
        "many_steps": [many for _, many in steps],
        "unbounded": left(APGD(everything)),
    }


def _are_probabilities(outputs: Tensor) -> bool:
    """Whether every row (B, N) is a distribution."""
    sums = (outputs.sum(1) - 1).abs()
    return bool((outputs >= 0).all() and (sums < 1e-3).all())


def read_signs(
    probed: dict[str, Any], zero_share: float | None, square_gain: float | None, precision: str, changed: int
) -> tuple[Sign, ...]:
    """Turns measurements into signs.

    Args:
        probed: What `probe` returned.
        zero_share: Mean share of zero pixel gradients at the attacks' first steps; None where no attack has gradients.
        square_gain: Share of the images that Square broke and no white-box attack did, at its largest over the threat models;
            None where Square, or every white-box attack, was missing.
        precision: The precision that attacks ran in.
        changed: Adversarial images on which that precision and float32 disagree about right or wrong.
    """
    return (
        _one_step(probed),
        _square(square_gain),
        _left_at_everything(probed),
        _zero(probed, zero_share),
        _random(probed),
        _probabilities(probed),
        _precision(precision, changed),
    )


def _one_step(probed: dict[str, Any]) -> Sign:
    gains = [many - one for one, many in zip(probed["one_step"], probed["many_steps"], strict=True)]
    if not gains:
        return Sign("one_step_beats_many", None, None, ONE_STEP, "Not checked: every epsilon is 0.")
    images = probed["images"]
    # the rounding of one image in a small probe is no sign
    return _sign(
        "one_step_beats_many",
        max(gains),
        max(ONE_STEP, 1 / images),
        f"One step breaks more images than {MANY} steps ({100 * max(gains):.1f} points of {images} images): the gradients lead "
        "astray, and robust accuracy is too high.",
        f"{MANY} steps break at least as many images as one ({images} images).",
    )


def _square(gain: float | None) -> Sign:
    if gain is None:
        return Sign(
            "square_beats_white_box",
            None,
            None,
            SQUARE,
            "Not checked: that needs Square and a white-box attack (autoattack has both).",
        )
    return _sign(
        "square_beats_white_box",
        gain,
        SQUARE,
        f"Square, which sees no gradients, breaks {100 * gain:.1f}% of all images where white-box attacks fail: gradients are "
        "masked, and robust accuracy is too high.",
        f"Square breaks {100 * gain:.1f}% of all images where white-box attacks fail.",
    )


def _left_at_everything(probed: dict[str, Any]) -> Sign:
    left, images = probed["unbounded"], probed["images"]
    return _sign(
        "accuracy_left_at_epsilon_1",
        left,
        LEFT,
        f"{100 * left:.1f}% accuracy is left when the attack may change every pixel at will ({images} images): the attack fails.",
        f"No accuracy is left when the attack may change every pixel at will ({images} images).",
    )


def _zero(probed: dict[str, Any], zero_share: float | None) -> Sign:
    share = max(probed["zero_gradient_share"], zero_share or 0.0)
    return _sign(
        "zero_gradients",
        share,
        ZERO,
        f"{100 * share:.1f}% of the pixel gradients are exactly zero: the attack stands still there.",
        f"{100 * share:.2g}% of the pixel gradients are exactly zero.",
    )


def _random(probed: dict[str, Any]) -> Sign:
    return _sign(
        "random_outputs",
        probed["output_spread"],
        RANDOM,
        f"The same image gets different outputs (relative difference {probed['output_spread']:.1g}): measure with "
        "autoattack-rand, and repeat.",
        f"{REPEATS} forwards of the same images agree.",
    )


def _probabilities(probed: dict[str, Any]) -> Sign:
    return _sign(
        "probabilities_instead_of_logits",
        float(probed["probabilities"]),
        0.5,
        "The outputs are probabilities: the softmax flattens the gradients. Return logits.",
        "The outputs are logits.",
    )


def _precision(precision: str, changed: int) -> Sign:
    return _sign(
        "low_precision",
        float(precision != "float32"),
        0.5,
        f"The attack ran in {precision}, which rounds gradients away; outcomes were decided in float32, which changed {changed} "
        "of them. Attack in float32.",
        "The attack ran in float32.",
    )
