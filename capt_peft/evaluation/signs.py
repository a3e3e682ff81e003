"""Signs of masked gradients: when a robust accuracy should not be believed (Athalye et al. 2018; Carlini et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attacks import APGD, PGD, Square, ThreatModel
from ..attacks.base import pixel_gradient
from ..attacks.losses import cross_entropy
from ..randomness import example_generators
from ..results.evaluation import Sign
from .precision import precision_of
from .subject import Subject

PROBES = 100  # images that the probes are run on
REPEATS = 5  # forwards that must agree
MANY = 20  # steps that must beat one
QUERIES = 300  # of Square, where no black-box attack was asked for
FEW = 8  # images by which the precision is seen

RANDOM, ZERO, SQUARE, SQUARE_FEW, ONE_STEP, LEFT = 1e-4, 1e-3, 0.002, 0.02, 0.005, 0.0


def _sign(name: str, value: float, threshold: float, bad: str, good: str) -> Sign:
    raised = value > threshold
    return Sign(name, raised, value, threshold, bad if raised else good)


def probe(
    subject: Subject,
    pixels: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    threats: Sequence[ThreatModel],
    seed: int,
) -> dict[str, Any]:
    """Measures what signs need, on a few images.

    Args:
        subject: What attacks see, and what decides.
        pixels: (B, 3, H, W) in [0, 1].
        labels: (B,) class indices.
        indices: The images' places in their dataset.
        threats: The threat models of the evaluation.
        seed: Seed of the attacks.

    Returns:
        Numbers by name, in JSON types.
    """
    generators = partial(example_generators, seed, indices, stream="evaluation")
    logits_fn = subject.attacked

    def left(attack: APGD | PGD) -> float:
        adversarial = attack(logits_fn, pixels, labels, generators())
        with torch.no_grad():
            return float((logits_fn(adversarial).argmax(1) == labels).double().mean())

    with torch.no_grad():
        outputs = torch.stack([logits_fn(pixels).float() for _ in range(REPEATS)])  # (REPEATS, B, N)
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
        "precision": precision_of(logits_fn.logits_fn, pixels[:FEW], backward=True),
        "precision_that_decides": precision_of(subject.scored.logits_fn, pixels[:FEW]),
    }


def probe_black_box(
    subject: Subject, threat: ThreatModel, pixels: Tensor, labels: Tensor, indices: Sequence[int], seed: int
) -> int:
    """Returns how many images a few hundred queries of Square break and 20 steps of PGD do not: what gradients hide.

    Args:
        subject: What attacks see, and what decides.
        threat: The ball.
        pixels: (B, 3, H, W) in [0, 1]: images that the attacks of the evaluation left standing.
        labels: (B,) class indices.
        indices: The images' places in their dataset.
        seed: Seed of the attacks.
    """
    broken = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    for attack, breaks in ((Square(threat, queries=QUERIES), True), (PGD(threat, steps=MANY), False)):
        rows = broken.nonzero().squeeze(1)
        if len(rows) == 0:
            break
        generators = example_generators(seed, [indices[row] for row in rows.tolist()], stream="evaluation")
        adversarial = attack(subject.attacked, pixels[rows], labels[rows], generators)
        broken[rows] = (subject.scored(adversarial).argmax(1) != labels[rows]) == breaks
    return int(broken.sum())


def _are_probabilities(outputs: Tensor) -> bool:
    """Whether every row (B, N) is a distribution."""
    sums = (outputs.sum(1) - 1).abs()
    return bool((outputs >= 0).all() and (sums < 1e-3).all())


def read_signs(
    probed: dict[str, Any],
    zero_share: float | None,
    square_gain: float | None,
    black_box: Sequence[dict[str, Any]],
    precision: str,
    changed: int,
) -> tuple[Sign, ...]:
    """Turns measurements into signs.

    Args:
        probed: What `probe` returned.
        zero_share: Mean share of zero pixel gradients at the attacks' first steps; None where no attack has gradients.
        square_gain: Share of the images that Square broke and no white-box attack did, at its largest over the threat models;
            None where Square, or every white-box attack, was missing.
        black_box: What Square broke of a few images that the attacks had left standing, where it was not among them.
        precision: The precision of the parameters and of autocast around the attacks.
        changed: Adversarial images on which that precision and float32 disagree about right or wrong.
    """
    return (
        _one_step(probed),
        _square(square_gain) if square_gain is not None or not black_box else _few_queries(black_box),
        _left_at_everything(probed),
        _zero(probed, zero_share),
        _random(probed),
        _probabilities(probed),
        _precision(probed, precision, changed),
    )


def _one_step(probed: dict[str, Any]) -> Sign:
    gains = [many - one for one, many in zip(probed["one_step"], probed["many_steps"], strict=True)]
    if not gains:
        return Sign("one_step_beats_many", None, None, ONE_STEP, "Not checked: every epsilon is 0.")
    images = probed["images"]
    # the rounding of one image in a small probe does not count as a sign
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
            "Not checked: that needs a white-box attack that leaves images standing (autoattack has Square too).",
        )
    return _sign(
        "square_beats_white_box",
        gain,
        SQUARE,
        f"Square, which sees no gradients, breaks {100 * gain:.1f}% of all images where white-box attacks fail: gradients are "
        "masked, and robust accuracy is too high.",
        f"Square breaks {100 * gain:.1f}% of all images where white-box attacks fail.",
    )


def _few_queries(black_box: Sequence[dict[str, Any]]) -> Sign:
    worst = max(black_box, key=lambda found: found["broken"] / found["images"])
    gain, images = worst["broken"] / worst["images"], worst["images"]
    what = f"of {images} images that the attacks left standing within {worst['threat_model']}"
    return _sign(
        "square_beats_white_box",
        gain,
        max(SQUARE_FEW, 1 / images),  # one image in a small probe does not count as a sign
        f"{QUERIES} queries of Square, which sees no gradients, break {100 * gain:.1f}% {what}, where {MANY} steps of PGD fail: "
        "gradients are masked, and robust accuracy is too high.",
        f"{QUERIES} queries of Square break {100 * gain:.1f}% {what} and that {MANY} steps of PGD do not break.",
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


def _precision(probed: dict[str, Any], precision: str, changed: int) -> Sign:
    seen, decides = probed["precision"], probed["precision_that_decides"]
    low = precision if precision != "float32" else seen
    if low is None:
        return Sign(
            "low_precision",
            None,
            None,
            0.5,
            "Not checked: the model computes where PyTorch does not see it, as in NumPy.",
        )
    how = f"outcomes were decided in float32, which changed {changed} of them"
    if decides != "float32":
        how = f"and so did what decides the outcomes ({decides or 'unknown'})"
    return _sign(
        "low_precision",
        float(low != "float32"),
        0.5,
        f"The attack ran in {low}, which rounds gradients away; {how}. Attack in float32.",
        "The attack ran in float32.",
    )
