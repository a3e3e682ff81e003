"""One batch: the classifier that is attacked, the one that decides, and the record of what became of each image."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..attacks import Attack, AttackResult, LogitsFn, ThreatModel
from ..attacks.base import Guarded, Report
from ..attacks.threat import check_images
from ..clip.classifier import ZeroShotClassifier
from ..data.texts import Template, read_template
from ..randomness import example_generators
from ..tuner import adapters_in_use
from ..tuner.fingerprint import adapter_fingerprint, base_fingerprint, tensors_fingerprint
from ..tuner.others import settings_of
from ..utils.embedded import embedded_name
from ..utils.machine import tf32_in_use
from ..utils.modules import arrays_in, modules_in

TARGETS = ("tuned", "frozen")
OF_FLOAT32 = ("float32", "tf32")  # precisions of float32 weights
_ROUNDING = 1e-6
_CLEAN = ("index", "label", "prediction", "confidence")  # what is recorded where nothing was attacked


@dataclass(frozen=True)
class Subject:
    """A classifier as an evaluation uses it; the text features are computed once for all of it.

    Attributes:
        attacked: What attacks differentiate through: pixels (B, 3, H, W) in [0, 1] -> logits (B, N).
        scored: What decides whether an answer is right: the same in float32.
        attacked_is_other: Whether attacks see another function than the one that decides: of other texts, weights or precision.
        white_box: Whether attacks see the very model that is scored; robust accuracy is measured no other way.
        precision: The lowest precision of the parameters and of autocast around attacks, such as "float32", "tf32" or "bfloat16".
        device: Where the pixels go.
        description: Base model, adapter, their fingerprints, classes and their texts, for results.
        temperature: What logits are divided by before their softmax makes scores: an adapter's, where it is calibrated.
    """

    attacked: Guarded
    scored: Guarded
    attacked_is_other: bool
    white_box: bool
    precision: str
    device: torch.device
    description: dict[str, Any]
    temperature: float = 1.0

    def confidence(self, logits: Tensor) -> list[float]:
        """Returns the score of the predicted class of each image, by its logits (B, N)."""
        scores: list[float] = (logits.cpu().double() / self.temperature).softmax(1).amax(1).tolist()
        return scores


def subject_of(classifier: LogitsFn, attack_target: str = "tuned", attack_template: Template | None = None) -> Subject:
    """Returns a classifier as an evaluation uses it; arguments as for `evaluate`.

    Raises:
        ValueError: An unknown target, or a target or template for a callable that has none.
    """
    if attack_target not in TARGETS:
        raise ValueError(f"attack_target={attack_target!r} is unknown: it must be 'tuned' (white box) or 'frozen'.")
    if isinstance(classifier, ZeroShotClassifier):
        return _subject_of_clip(classifier, attack_target, attack_template)
    if attack_target != "tuned" or attack_template is not None:
        raise ValueError(
            "attack_target and attack_template need a ZeroShotClassifier: only it has an adapter and texts."
        )
    if not callable(classifier):
        raise ValueError(f"A classifier or a callable from pixels to logits is needed, got {classifier!r}.")
    return _subject_of_callable(classifier)


def _subject_of_clip(classifier: ZeroShotClassifier, target: str, template: Template | None) -> Subject:
    precision = _precision(classifier)
    precise = classifier if precision in OF_FLOAT32 else copy.deepcopy(classifier).float()
    scored = precise.with_fixed_texts()
    attacked = scored if precise is classifier else classifier.with_fixed_texts()
    seen = classifier
    if template is not None and (classifier.class_texts or read_template(template) != classifier.template):
        seen = ZeroShotClassifier(classifier.model, classifier.processor, classifier.class_names, template).eval()
        attacked = seen.with_fixed_texts()
    if target == "frozen":
        with classifier.frozen():
            attacked = _frozen(classifier, seen.with_fixed_texts())
    return Subject(
        attacked=Guarded(attacked),
        scored=Guarded(_in_float32(scored, classifier.device)),
        attacked_is_other=attacked is not scored,
        white_box=target == "tuned" and seen is classifier,
        precision=precision,
        device=classifier.device,
        description=describe(classifier),
        temperature=1.0 if (calibration := classifier.calibration) is None else calibration.temperature,
    )


def _subject_of_callable(function: LogitsFn) -> Subject:
    modules = modules_in(function)
    state = [(f"{i}.{name}", value) for i, each in enumerate(modules) for name, value in _tensors(each)]
    state += [(f"array {i}", value) for i, value in enumerate(arrays_in(function))]
    adapters = [adapter for module in modules for adapter in _adapters(module)]
    device, precise, precision = torch.device("cpu"), function, "float32"
    if isinstance(function, nn.Module):
        device = next((value.device for _, value in _tensors(function)), device)
        precision = _precision(function)
        precise = function if precision in OF_FLOAT32 else copy.deepcopy(function).float()
    return Subject(
        attacked=Guarded(function),
        scored=Guarded(_in_float32(precise, device)),
        attacked_is_other=precise is not function,
        white_box=True,
        precision=precision,
        device=device,
        description={
            "callable": getattr(function, "__qualname__", type(function).__qualname__),
            **({"fingerprint": tensors_fingerprint(state)} if state else {}),
            **({"adapters": adapters} if adapters else {}),
        },
    )


def describe(classifier: ZeroShotClassifier) -> dict[str, Any]:
    """Returns what a classifier is made of: base model, adapter, fingerprints, classes, texts, precision and pixels."""
    model: Any = classifier.model
    adapters = _adapters(model)
    adapter = None
    if adapters:
        adapter = {**adapters[0], "config": settings_of(model.peft_config[adapters[0]["name"]])}
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name = base.config._name_or_path
    return {
        "base": {"name": embedded_name(name) or name, "fingerprint": base_fingerprint(base)},
        "adapter": adapter,
        **({"adapters": adapters} if len(adapters) > 1 else {}),
        "class_names": list(classifier.class_names),
        "template": classifier.template,
        **({"class_texts": classifier.class_texts} if classifier.class_texts else {}),
        "precision": _precision(classifier),
        "pixels": classifier.transform.to_dict(),
    }


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in module.state_dict().items() if isinstance(value, Tensor)]


def _adapters(model: nn.Module) -> list[dict[str, Any]]:
    """Returns names and fingerprints of the adapters that act, of whatever PEFT method."""
    if not hasattr(model, "peft_config"):
        return []
    return [{"name": name, "fingerprint": adapter_fingerprint(model, name)} for name in adapters_in_use(model)]


def _frozen(classifier: ZeroShotClassifier, function: LogitsFn) -> LogitsFn:
    def logits(pixels: Tensor) -> Tensor:
        with classifier.frozen():
            return function(pixels)

    return logits


def _in_float32(function: LogitsFn, device: torch.device) -> LogitsFn:
    def logits(pixels: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return function(pixels).float()

    return logits


def _precision(model: nn.Module) -> str:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    found = lowest(dtypes)
    return "tf32" if found == "float32" and tf32_in_use(device) else found


def lowest(dtypes: Iterable[torch.dtype]) -> str:
    """Returns the name of the type of the fewest bits, such as "bfloat16"; "float32" where none has fewer."""
    least = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float32)
    return "float32" if torch.finfo(least).bits >= 32 else str(least).removeprefix("torch.")


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
    parts: list[dict[str, Any]] = field(
        default_factory=list
    )  # how many images each attack of an ensemble got and broke
    notes: list[str] = field(default_factory=list)  # what had to be changed for the model
    attacked: int = 0  # images that were right before
    forwards: int = 0  # images that the attack ran the model on
    gradients: int = 0  # those of them with a gradient
    changed: int = 0  # images on which the attack's precision and float32 disagree about right or wrong

    def right(self) -> int:
        """Returns the number of images whose prediction is right."""
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
        return {name: value for name, value in vars(self).items() if self.clean or name in _CLEAN}

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


def score_batch(subject: Subject, pixels: Tensor, labels: Tensor, indices: list[int]) -> BatchRecord:
    """Records the predictions on a batch without an attack; arguments as for `attack_batch`."""
    check_images(pixels, labels)
    logits = subject.scored(pixels)
    return BatchRecord(
        index=indices,
        label=labels.tolist(),
        prediction=logits.argmax(1).tolist(),
        confidence=subject.confidence(logits),
    )


def attack_batch(
    subject: Subject,
    attack: Attack,
    pixels: Tensor,
    labels: Tensor,
    indices: list[int],
    seed: int,
    report: Report | None = None,
) -> tuple[BatchRecord, Tensor]:
    """Attacks the images of a batch that are classified correctly; returns what became of all, and the adversarial images.

    Leaving out the others changes no accuracy: an image counts as robust only if it is right before and after the attack.

    Args:
        subject: What is attacked and what decides.
        attack: The attack; each image has random numbers of its own, by `seed` and place.
        pixels: (B, 3, H, W) in [0, 1].
        labels: (B,) class indices.
        indices: The B places of the images in their dataset.
        seed: Seed of the attack.
        report: Called as the attack goes on.
    """
    logits = subject.scored(pixels)  # (B, N)
    clean = logits.argmax(1)  # (B,)
    right = (clean == labels).nonzero().squeeze(1)  # (A,)
    counted = _Counted(subject.attacked.logits_fn)
    adversarial, prediction = pixels.clone(), clean.clone()
    result, rows = AttackResult(pixels[right], pixels.new_empty(0)), right.tolist()
    if len(right):
        generators = example_generators(seed, [indices[i] for i in rows], stream="evaluation", device=pixels.device)
        result = attack.run(counted, pixels[right], labels[right], generators, report=report)
        check_inside(attack.name, attack.threat_model, result.images, pixels[right])
        adversarial[right] = result.images
        logits[right] = subject.scored(result.images)
        prediction[right] = logits[right].argmax(1)
    before, after = clean.tolist(), prediction.tolist()
    broken = [(part.name, part.broken.tolist()) for part in result.parts]
    broken_by: list[str | None] = [None] * len(pixels)
    for place, row in enumerate(rows):
        if before[row] != after[row]:
            broken_by[row] = next((name for name, by_part in broken if by_part[place]), attack.name)
    changed = 0
    if subject.precision != "float32":
        with torch.no_grad():
            answers = subject.attacked(adversarial).argmax(1)
        changed = int(((answers == labels) != (prediction == labels)).sum())
    record = BatchRecord(
        index=indices,
        label=labels.tolist(),
        clean=before,
        prediction=after,
        confidence=subject.confidence(logits),
        norm=attack.threat_model.norm_of(adversarial - pixels).tolist(),
        broken_by=broken_by,
        zero_gradients=[share for share in result.zero_gradient_share.tolist() if not math.isnan(share)],
        parts=[
            {"name": part.name, "attacked": part.attacked, "broken": sum(by_part)}
            for part, (_, by_part) in zip(result.parts, broken, strict=True)
        ],
        notes=list(result.notes),
        attacked=len(right),
        forwards=counted.forwards,
        gradients=counted.gradients,
        changed=changed,
    )
    return record, adversarial


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
