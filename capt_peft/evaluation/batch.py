"""One batch: attacked, decided, and the record of what became of each image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..attacks import Attack, AttackResult, LogitsFn, ThreatModel
from ..attacks.base import Guarded, Report
from ..attacks.threat import check_images
from ..clip.classifier import ZeroShotClassifier
from ..defences import Through
from ..randomness import example_generators
from .subject import Decided, Subject

_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class BatchRecord:
    """What became of the images of a batch, or of several; lists have an entry per image, where nothing else is said."""

    index: list[int]  # their places in the dataset
    label: list[int]
    clean: list[int] = field(default_factory=list)  # the predicted classes before the attack
    prediction: list[int]  # and after it, where there was one
    confidence: list[float] = field(default_factory=list)  # the score of that prediction
    norm: list[float] = field(default_factory=list)  # the length of the perturbation
    broken_by: list[str | None] = field(default_factory=list)  # the attack, or part of one, that turned a right answer
    zero_gradients: list[float] = field(default_factory=list)  # shares at the first step, of images that had gradients
    decided: list[int] = field(default_factory=list)  # of a random defence, which decisions are right, as bits
    undefended: list[int] = field(default_factory=list)  # the prediction without the defence on the same image
    parts: list[dict[str, Any]] = field(default_factory=list)  # how many images each part of an attack got and broke
    notes: list[str] = field(default_factory=list)  # what had to be changed for the model
    attacked: int = 0  # images that were right before
    forwards: int = 0  # images that the attack ran the model on
    gradients: int = 0  # those of them with a gradient
    changed: int = 0  # images on which the attack's precision and float32 disagree about right or wrong

    def right(self) -> int:
        """Returns the number of images whose prediction is right or, of several decisions on each, of right decisions."""
        if self.decided:
            return sum(bits.bit_count() for bits in self.decided)
        return sum(a == b for a, b in zip(self.prediction, self.label, strict=True))

    def wrong(self) -> set[int]:
        """Returns the places of the images whose prediction is wrong."""
        rows = zip(self.index, self.prediction, self.label, strict=True)
        return {index for index, prediction, label in rows if prediction != label}

    def zero_gradient_share(self) -> float | None:
        """Returns the mean share of zero pixel gradients; None where the attack took none."""
        return sum(self.zero_gradients) / len(self.zero_gradients) if self.zero_gradients else None

    def to_dict(self) -> dict[str, Any]:
        """Returns the record in JSON types; without an attack, only what there is."""
        of_attacks = vars(self).keys() - {"decided", "undefended"} if self.clean else ()
        return {name: value for name, value in vars(self).items() if value or name in of_attacks}

    @classmethod
    def joined(cls, records: Iterable[Mapping[str, Any]]) -> BatchRecord:
        """Returns one record of several batches, as `to_dict` returned them: lists one after the other, numbers added up."""
        whole: dict[str, Any] = vars(cls(index=[], label=[], prediction=[]))
        batches = [vars(cls(**record)) for record in records]
        for name, empty in whole.items():
            values = [batch[name] for batch in batches]
            whole[name] = sum(values) if empty == 0 else list(chain.from_iterable(values))
        return cls(**whole)


Attacked = Sequence[tuple[Attack, BatchRecord]]  # each attack of an evaluation, and what became of all images


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


def score_batch(subject: Subject, pixels: Tensor, labels: Tensor, indices: list[int], seed: int) -> BatchRecord:
    """Records the predictions on a batch without an attack; arguments as for `attack_batch`."""
    check_images(pixels, labels)
    before = 0 if subject.counts is None else subject.counts[1].forwards
    found = subject.decide(pixels, labels, indices, seed)
    return BatchRecord(
        index=indices,
        label=labels.tolist(),
        prediction=found.prediction.tolist(),
        confidence=found.confidence,
        decided=found.bits(),
        undefended=[] if subject.undefended is None else subject.undefended(pixels).argmax(1).tolist(),
        forwards=0 if subject.counts is None else subject.counts[1].forwards - before,
    )


def attack_batch(
    subject: Subject,
    attack: Attack,
    pixels: Tensor,
    labels: Tensor,
    indices: list[int],
    seed: int,
    report: Report | None = None,
    clean: BatchRecord | None = None,
) -> tuple[BatchRecord, Tensor]:
    """Attacks the images of a batch that are classified correctly; returns what became of all, and the adversarial images.

    Leaving out the others changes no accuracy: an image counts as robust only if it is right before and after the attack. One
    that goes by transfer gets those that are right without the defence, too.

    Args:
        subject: What is attacked and what decides.
        attack: The attack; each image has random numbers of its own, by `seed` and place.
        pixels: (B, 3, H, W) in [0, 1].
        labels: (B,) class indices.
        indices: The B places of the images in their dataset.
        seed: Seed of the attack.
        report: Called as the attack goes on.
        clean: What `score_batch` recorded of these images; by default they are classified again.
    """
    if clean is None:
        clean = score_batch(subject, pixels, labels, indices, seed)
    before = _as_before(clean, labels, subject.decisions)
    transfers = subject.undefended is not None and isinstance(attack, Through) and attack.way == "transfer"
    undefended = torch.tensor(clean.undefended, device=labels.device) if transfers else None
    given = before.right.any(0) if undefended is None else before.right.any(0) | (undefended == labels)  # (B,)
    right = given.nonzero().squeeze(1)  # (A,)
    seen = subject.surface(attack)
    counted = _Counted(seen.logits_fn)
    counts: Any = counted if subject.counts is None else subject.counts[0]
    forwards, gradients = counts.forwards, counts.gradients
    adversarial, after = pixels.clone(), before
    result, rows = AttackResult(pixels[right], pixels.new_empty(0)), right.tolist()
    if len(right):
        generators = example_generators(seed, [indices[i] for i in rows], stream="evaluation", device=pixels.device)
        result = attack.run(counted, pixels[right], labels[right], generators, report=report)
        check_inside(attack.name, attack.threat_model, result.images, pixels[right])
        adversarial[right] = result.images
    forwards, gradients = counts.forwards - forwards, counts.gradients - gradients
    if len(right):
        after = _decide_again(subject, before, adversarial, labels, indices, seed, right)
        if undefended is not None:
            assert subject.undefended is not None
            found = subject.undefended(adversarial).argmax(1)
            undefended = torch.where(undefended == labels, found, undefended)
    record = BatchRecord(
        index=indices,
        label=labels.tolist(),
        clean=before.prediction.tolist(),
        prediction=after.prediction.tolist(),
        confidence=after.confidence,
        norm=attack.threat_model.norm_of(adversarial - pixels).tolist(),
        broken_by=_broken_by(attack.name, result, rows, (before.prediction == labels) & (after.prediction != labels)),
        zero_gradients=[share for share in result.zero_gradient_share.tolist() if not math.isnan(share)],
        decided=after.bits(),
        undefended=[] if undefended is None else undefended.tolist(),
        parts=[
            {"name": part.name, "attacked": part.attacked, "broken": int(part.broken.sum())} for part in result.parts
        ],
        notes=list(result.notes),
        attacked=len(right),
        forwards=forwards,
        gradients=gradients,
        changed=_changed(subject, adversarial, labels, after),
    )
    return record, adversarial


def _broken_by(name: str, result: AttackResult, rows: Sequence[int], turned: Tensor) -> list[str | None]:
    """Returns which attack, or part of one, has turned each right answer; None where it stands.

    Args:
        name: Name of the attack.
        result: Its result on the images of the batch at `rows`.
        rows: The rows that were attacked.
        turned: (B,) bool, which answers are wrong and were right.
    """
    broken = [(part.name, part.broken.tolist()) for part in result.parts]
    found: list[str | None] = [None] * len(turned)
    of_batch = turned.tolist()
    for place, row in enumerate(rows):
        if of_batch[row]:
            found[row] = next((part for part, by_part in broken if by_part[place]), name)
    return found


def _changed(subject: Subject, adversarial: Tensor, labels: Tensor, after: Decided) -> int:
    """Returns on how many images the attack's precision and float32 disagree about right or wrong."""
    if subject.precision == "float32" or subject.undefended is not None:
        return 0
    with torch.no_grad():
        in_low = subject.attacked(adversarial).argmax(1)
    return int(((in_low == labels) != (after.prediction == labels)).sum())


def _as_before(record: BatchRecord, labels: Tensor, decisions: int) -> Decided:
    """Returns what a record without an attack says that a classifier answered."""
    prediction = torch.tensor(record.prediction, device=labels.device)
    if decisions == 1:
        return Decided(prediction, record.confidence, (prediction == labels)[None])
    bits = torch.tensor(record.decided, device=labels.device)
    right = torch.stack([(bits >> number) & 1 for number in range(decisions)]).bool()
    return Decided(prediction, [], right)


def _decide_again(
    subject: Subject,
    before: Decided,
    adversarial: Tensor,
    labels: Tensor,
    indices: list[int],
    seed: int,
    attacked: Tensor,
) -> Decided:
    """Returns what a classifier answers after an attack; what was wrong before stays so.

    Args:
        subject: What decides.
        before: Its answers before the attack.
        adversarial: (B, 3, H, W) images, of which those at `attacked` (A,) are others than before.
        labels: (B,) class indices.
        indices: The places of the images in their dataset.
        seed: Seed of the evaluation.
        attacked: (A,) the rows that were attacked.
    """
    if subject.decisions > 1:  # all rows, so that what is drawn for an image is what was drawn before
        found = subject.decide(adversarial, labels, indices, seed)
        return Decided(found.prediction, [], before.right & found.right)
    found = subject.decide(adversarial[attacked], labels[attacked], indices, seed)
    prediction, confidence, right = before.prediction.clone(), list(before.confidence), before.right.clone()
    for row, new, score, stands in zip(
        attacked.tolist(), found.prediction.tolist(), found.confidence, found.right[0].tolist(), strict=True
    ):
        if right[0, row]:
            prediction[row], confidence[row], right[0, row] = new, score, stands
    return Decided(prediction, confidence, right)


def check_inside(name: str, threat_model: ThreatModel, adversarial: Tensor, pixels: Tensor) -> None:
    """Raises a ValueError if an attack has left its threat model: what it breaks then says nothing."""
    length = float(threat_model.norm_of(adversarial - pixels).max())
    low, high = (float(value) for value in adversarial.aminmax())
    if not (length <= threat_model.epsilon + _ROUNDING and low >= 0 and high <= 1):
        raise ValueError(
            f"The attack {name} has left its threat model {threat_model}: a perturbation has length {length:.6g}, "
            f"and pixels range from {low:.6g} to {high:.6g}. Project its images: threat_model.project(adversarial, images)."
        )


def outcomes(
    classifier: ZeroShotClassifier, attack: Attack, pixels: Tensor, labels: Tensor, indices: list[int], seed: int
) -> tuple[Tensor, Tensor]:
    """Attacks all images of a batch; arguments as for `attack_batch`, of a classifier in eval mode.

    Returns:
        The predicted classes (B,) of the clean and of the adversarial images.
    """
    logits_fn = Guarded(classifier.with_fixed_texts())
    generators = example_generators(seed, indices, stream="evaluation", device=pixels.device)
    adversarial = attack(logits_fn, pixels, labels, generators)
    with torch.no_grad():
        return logits_fn(pixels).argmax(-1), logits_fn(adversarial).argmax(-1)
