"""What is measured: the logits that an attack sees, and those that decide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from ..attacks import LogitsFn
from ..classifier import ZeroShotClassifier
from ..tuner import PromptLayer
from ..tuner.fingerprint import base_fingerprint, tensors_fingerprint

TARGETS = ("tuned", "frozen")


@dataclass(frozen=True)
class Subject:
    """A classifier as an evaluation uses it; the text features are computed once for all of it.

    Attributes:
        attacked: What attacks differentiate through: pixels (B, 3, H, W) in [0, 1] -> logits (B, N).
        scored: What decides whether an answer is right: the same in float32.
        white_box: Whether attacks see the very model that is scored; robust accuracy is measured no other way.
        precision: The precision that attacks run in, such as "float32" or "bfloat16".
        device: Where the pixels go.
        description: Base model, adapter, their fingerprints, classes and template, for results.
    """

    attacked: LogitsFn
    scored: LogitsFn
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
    scored = _with_fixed_texts(precise)
    attacked = scored if precise is classifier else _with_fixed_texts(classifier)
    if attack_template is not None and attack_template != classifier.template:
        other = ZeroShotClassifier(classifier.model, classifier.processor, classifier.class_names, attack_template)
        attacked = _with_fixed_texts(other.eval())
    if attack_target == "frozen":
        with classifier.frozen():
            frozen_texts = _with_fixed_texts(classifier if attack_template is None else other)
        attacked = _frozen(classifier, frozen_texts)
    return Subject(
        attacked=attacked,
        scored=_without_autocast(scored, classifier.device),
        white_box=attack_target == "tuned" and attack_template in (None, classifier.template),
        precision=_precision(classifier),
        device=classifier.device,
        description=describe(classifier),
    )


def _plain_subject(function: LogitsFn) -> Subject:
    if not callable(function):
        raise ValueError(f"A classifier or a callable from pixels to logits is needed, got {function!r}.")
    description: dict[str, Any] = {"callable": getattr(function, "__qualname__", type(function).__qualname__)}
    device = torch.device("cpu")
    precise, precision = function, "float32"
    if isinstance(function, nn.Module):
        state = function.state_dict()
        description["fingerprint"] = tensors_fingerprint(state.items())
        device = next(iter(state.values())).device if state else device
        precision = _precision(function)
        if precision != "float32":
            precise = copy.deepcopy(function).float()
    return Subject(function, _without_autocast(precise, device), True, precision, device, description)


def describe(classifier: ZeroShotClassifier) -> dict[str, Any]:
    """Returns what a classifier is made of: base model, adapter, fingerprints, classes, template, precision and pixels."""
    model: Any = classifier.model
    adapter = None
    if adapter_in_use(classifier):
        name = model.active_adapters[0]
        tensors = get_peft_model_state_dict(model, adapter_name=name)
        config = {key: sorted(v) if isinstance(v, set) else v for key, v in model.peft_config[name].to_dict().items()}
        adapter = {"name": name, "fingerprint": tensors_fingerprint(tensors.items()), "config": config}
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        "base": {"name": base.config._name_or_path, "fingerprint": base_fingerprint(base)},
        "adapter": adapter,
        "class_names": list(classifier.class_names),
        "template": classifier.template,
        "precision": _precision(classifier),
        "pixels": classifier.transform.to_dict(),
    }


def adapter_in_use(classifier: ZeroShotClassifier) -> bool:
    """Whether the classifier's model has an adapter that is not switched off."""
    layers = [module for module in classifier.model.modules() if isinstance(module, PromptLayer)]
    off = bool(layers) and all(layer.disable_adapters for layer in layers)
    return isinstance(classifier.model, PeftModel) and not off


def _with_fixed_texts(classifier: ZeroShotClassifier) -> LogitsFn:
    texts = classifier.text_features()  # (N, D)

    def logits(pixels: Tensor) -> Tensor:
        return classifier.logits(classifier.image_features(pixels), texts)

    return logits


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
    """Returns the lowest precision that the model computes in, autocast included: "float32", "bfloat16", ..."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}
    device = next((p.device.type for p in model.parameters()), "cpu")
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    size: Callable[[torch.dtype], int] = lambda dtype: torch.finfo(dtype).bits  # noqa: E731
    lowest = min(dtypes, key=size)
    return "float32" if size(lowest) >= 32 else str(lowest).removeprefix("torch.")
