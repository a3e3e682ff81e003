"""What is measured: the logits that an attack sees, and those that decide."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..attacks import LogitsFn
from ..attacks.base import Guarded
from ..clip.classifier import ZeroShotClassifier
from ..tuner import adapters_in_use
from ..tuner.fingerprint import adapter_fingerprint, base_fingerprint, tensors_fingerprint
from ..utils.modules import arrays_in, modules_in
from .precision import lowest

TARGETS = ("tuned", "frozen")


@dataclass(frozen=True)
class Subject:
    """A classifier as an evaluation uses it; the text features are computed once for all of it.

    Attributes:
        attacked: What attacks differentiate through: pixels (B, 3, H, W) in [0, 1] -> logits (B, N).
        scored: What decides whether an answer is right: the same in float32.
        attacked_is_other: Whether attacks see another function than the one that decides: of other texts, weights or precision.
        white_box: Whether attacks see the very model that is scored; robust accuracy is measured no other way.
        precision: The precision that attacks run in, such as "float32" or "bfloat16".
        device: Where the pixels go.
        description: Base model, adapter, their fingerprints, classes and template, for results.
    """

    attacked: Guarded
    scored: Guarded
    attacked_is_other: bool
    white_box: bool
    precision: str
    device: torch.device
    description: dict[str, Any]


def subject_of(classifier: LogitsFn, attack_target: str = "tuned", attack_template: str | None = None) -> Subject:
    """Returns a classifier as an evaluation uses it.

    Args:
        classifier: A `ZeroShotClassifier` in eval mode, or any callable from pixels in [0, 1] to logits.
        attack_target: "tuned": attacks see the model that is measured. "frozen": they see its base model, adapter off.
        attack_template: Text of a class that attacks see, with one `{}`; by default the classifier's own.

    Raises:
        ValueError: An unknown target, or a target or template for a callable that has none.
    """
    if attack_target not in TARGETS:
        raise ValueError(f"attack_target={attack_target!r} is unknown: it must be 'tuned' (white box) or 'frozen'.")
    if not isinstance(classifier, ZeroShotClassifier):
        if attack_target != "tuned" or attack_template is not None:
            raise ValueError(
                "attack_target and attack_template need a ZeroShotClassifier: only it has an adapter and texts."
            )
        return _plain_subject(classifier)
    precise = classifier if _precision(classifier) == "float32" else copy.deepcopy(classifier).float()
    scored = precise.with_fixed_texts()
    attacked = scored if precise is classifier else classifier.with_fixed_texts()
    seen = classifier
    if attack_template is not None and attack_template != classifier.template:
        seen = ZeroShotClassifier(classifier.model, classifier.processor, classifier.class_names, attack_template)
        attacked = seen.eval().with_fixed_texts()
    if attack_target == "frozen":
        with classifier.frozen():
            attacked = _frozen(classifier, seen.with_fixed_texts())
    return Subject(
        attacked=Guarded(attacked),
        scored=Guarded(_without_autocast(scored, classifier.device)),
        attacked_is_other=attacked is not scored,
        white_box=attack_target == "tuned" and seen is classifier,
        precision=_precision(classifier),
        device=classifier.device,
        description=describe(classifier),
    )


def _plain_subject(function: LogitsFn) -> Subject:
    if not callable(function):
        raise ValueError(f"A classifier or a callable from pixels to logits is needed, got {function!r}.")
    description: dict[str, Any] = {"callable": getattr(function, "__qualname__", type(function).__qualname__)}
    modules = modules_in(function)
    state = [(f"{i}.{name}", value) for i, each in enumerate(modules) for name, value in _tensors(each)]
    state += [(f"array {i}", value) for i, value in enumerate(arrays_in(function))]
    if state:
        description["fingerprint"] = tensors_fingerprint(state)
    if modules:
        adapters = [adapter for module in modules for adapter in _adapters(module)]
        if adapters:
            description["adapters"] = adapters
    device = torch.device("cpu")
    precise, precision = function, "float32"
    if isinstance(function, nn.Module):
        device = next((value.device for _, value in _tensors(function)), device)
        precision = _precision(function)
        if precision != "float32":
            precise = copy.deepcopy(function).float()
    return Subject(
        attacked=Guarded(function),
        scored=Guarded(_without_autocast(precise, device)),
        attacked_is_other=precise is not function,
        white_box=True,
        precision=precision,
        device=device,
        description=description,
    )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in module.state_dict().items() if isinstance(value, Tensor)]


def describe(classifier: ZeroShotClassifier) -> dict[str, Any]:
    """Returns what a classifier is made of: base model, adapter, fingerprints, classes, template, precision and pixels."""
    model: Any = classifier.model
    adapters = _adapters(model)
    adapter = None
    if adapters:
        settings = model.peft_config[adapters[0]["name"]].to_dict().items()
        adapter = {**adapters[0], "config": {key: sorted(v) if isinstance(v, set) else v for key, v in settings}}
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        "base": {"name": base.config._name_or_path, "fingerprint": base_fingerprint(base)},
        "adapter": adapter,
        **({"adapters": adapters} if len(adapters) > 1 else {}),
        "class_names": list(classifier.class_names),
        "template": classifier.template,
        "precision": _precision(classifier),
        "pixels": classifier.transform.to_dict(),
    }


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


def _without_autocast(function: LogitsFn, device: torch.device) -> LogitsFn:
    def logits(pixels: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return function(pixels).float()

    return logits


def _precision(model: nn.Module) -> str:
    """Returns the lowest precision of the parameters and of the autocast around: "float32", "bfloat16", ..."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    device = next((p.device.type for p in model.parameters()), "cpu")
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return lowest(dtypes)
