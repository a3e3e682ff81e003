"""The classifier of an evaluation: what attacks see of it, what decides, and what it is made of, for the record."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from ..attacks import Attack, LogitsFn
from ..attacks.base import Guarded
from ..clip.classifier import ZeroShotClassifier
from ..data.texts import Template, read_template
from ..defences import WAYS, Defended, Through, Undefended
from ..randomness import own_random_state
from ..tuner import adapters_in_use
from ..tuner.fingerprint import adapter_fingerprint, base_fingerprint, tensors_fingerprint
from ..tuner.others import settings_of
from ..utils.embedded import embedded_name
from ..utils.machine import tf32_in_use
from ..utils.modules import arrays_in, modules_in

TARGETS = ("tuned", "frozen")
OF_FLOAT32 = ("float32", "tf32")  # precisions of float32 weights
DECISIONS = 8  # of a random defence on each image
MOST_DECISIONS = 62  # which are bits of one number


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
        surfaces: What attacks see of a defended classifier, by the way that they go (`defences.WAYS`).
        undefended: What decides without the defence, if there is one.
        counts: What counts the images that the image tower runs on, under attack and when it decides.
        decisions: How often an image is classified: more than once where the defence is random.
    """

    attacked: Guarded
    scored: Guarded
    attacked_is_other: bool
    white_box: bool
    precision: str
    device: torch.device
    description: dict[str, Any]
    temperature: float = 1.0
    surfaces: Mapping[str, Guarded] = field(default_factory=dict)
    undefended: Guarded | None = None
    counts: tuple[Undefended, Undefended] | None = None
    decisions: int = 1

    def surface(self, attack: Attack) -> Guarded:
        """Returns what an attack sees."""
        return self.surfaces[attack.way] if isinstance(attack, Through) and self.surfaces else self.attacked

    def decide(self, pixels: Tensor, labels: Tensor, indices: Sequence[int], seed: int) -> Decided:
        """Classifies images, a random defence's several times: what is drawn follows from the seed and the batch alone."""
        if self.decisions == 1:
            logits = self.scored(pixels)
            prediction = logits.argmax(1)
            return Decided(prediction, self.confidence(logits), (prediction == labels)[None])
        answers = []
        for number in range(self.decisions):
            own = int(np.random.SeedSequence([seed, indices[0], number]).generate_state(1)[0])
            with own_random_state(own, self.device):
                answers.append(self.scored(pixels).argmax(1))
        found = torch.stack(answers)  # (R, B)
        return Decided(found.mode(0).values, [], found == labels)

    def confidence(self, logits: Tensor) -> list[float]:
        """Returns the score of the predicted class of each image, by its logits (B, N)."""
        scores: list[float] = (logits.cpu().double() / self.temperature).softmax(1).amax(1).tolist()
        return scores


@dataclass(frozen=True)
class Decided:
    """What a classifier answers on B images, in R decisions.

    Attributes:
        prediction: (B,) the answer, the most frequent one of several.
        confidence: Its score on each image; none of random answers.
        right: (R, B) bool, which answers are right.
    """

    prediction: Tensor
    confidence: list[float]
    right: Tensor

    def bits(self) -> list[int]:
        """Returns which decisions on each image are right, decision 0 as the lowest bit; none where there is one decision."""
        weights = 2 ** torch.arange(len(self.right), device=self.right.device)[:, None]
        return [] if len(self.right) == 1 else (self.right * weights).sum(0).tolist()


def subject_of(
    classifier: LogitsFn,
    attack_target: str = "tuned",
    attack_template: Template | None = None,
    decisions: int = DECISIONS,
) -> Subject:
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
            "attack_target and attack_template need a ZeroShotClassifier: only it has an adapter and texts, and a defended one "
            "is attacked by ways of its own."
        )
    if isinstance(classifier, Defended):
        return _subject_of_defended(classifier, decisions)
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


def check_decisions(decisions: int) -> None:
    """Raises a ValueError unless a random classifier's answers can be counted by halves, and as bits."""
    if not 2 <= decisions <= MOST_DECISIONS or decisions % 2:
        raise ValueError(f"decisions={decisions} must be an even number from 2 to {MOST_DECISIONS}.")


def _subject_of_defended(defended: Defended, decisions: int) -> Subject:
    classifier, random = defended.classifier, defended.defence.random
    check_decisions(decisions)
    subject = _subject_of_clip(classifier, "tuned", None)
    if subject.precision not in OF_FLOAT32:
        raise ValueError(
            f"A defended classifier is measured in float32, as its attacks differentiate the defence, and this one computes in "
            f"{subject.precision}: load it with dtype=torch.float32, without autocast."
        )
    attacked, decides = Undefended(classifier), Undefended(classifier)
    samples = defended.defence.samples
    surfaces = {way: Guarded(defended.surface(way, attacked, samples=samples)) for way in WAYS}
    return replace(
        subject,
        attacked=surfaces["unrolled"],
        scored=Guarded(_in_float32(defended.surface("black-box", decides), classifier.device)),
        attacked_is_other=True,
        temperature=1.0,  # a calibration is one of the classifier alone
        surfaces=surfaces,
        undefended=subject.scored,
        counts=(attacked, decides),
        decisions=decisions if random else 1,
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
