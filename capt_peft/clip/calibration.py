"""Which calibration holds for a classifier: the one that its adapter stores, if it is of this very classifier."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from ..data.texts import texts_for, texts_of
from ..tuner import Calibration, CaptConfig, adapters_in_use
from ..tuner.fingerprint import adapter_fingerprint, base_fingerprint
from ..tuner.switching import base_parameters
from ..utils.text import some

if TYPE_CHECKING:
    from .classifier import ZeroShotClassifier

HOW = "capt-peft calibrate ADAPTER fits one"
_BASE_WEIGHTS: Any = WeakIdKeyDictionary()  # model -> the state of its base's parameters, and `base_weights`


def texts_digest(classifier: ZeroShotClassifier) -> str:
    """Returns 16 hexadecimal digits of a SHA-256 of the texts of a classifier's classes, in their order."""
    return _digest(zip(classifier.text_labels, classifier.texts, strict=True))


def _digest(texts: Iterable[tuple[int, str]]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def digest_as_loaded(config: Any, class_names: Sequence[str]) -> str:
    """Returns the digest of the texts that classes have where an adapter of this configuration is loaded without others."""
    own = texts_for(class_names, config.get("class_texts"), strict=False)
    return _digest((one.label, one.text) for one in texts_of(class_names, config["template"], own))


def precision_of(model: nn.Module) -> str:
    """Returns the type of a base model's weights, such as "float32", or their types."""
    return " and ".join(sorted({str(p.dtype).removeprefix("torch.") for _, p in base_parameters(model)}))


def base_weights(model: nn.Module) -> str | None:
    """Returns `base_fingerprint`, remembered while no weight is written to or replaced: to hash a whole CLIP takes seconds.

    PyTorch counts what is written to a tensor, but not what is written through its `data`, which stays unseen.
    """
    state = [_state(parameter) for _, parameter in base_parameters(model)]
    known = _BASE_WEIGHTS.get(model)
    if known is None or None in state or known[0] != state:
        known = _BASE_WEIGHTS[model] = state, base_fingerprint(model)
    return known[1]


def _state(parameter: Tensor) -> tuple[Any, ...] | None:
    """Returns what changes with a parameter's values; None where nothing tells."""
    if parameter.is_inference() or parameter.is_meta or is_traceable_wrapper_subclass(parameter):
        return None
    # a weak reference, because another tensor may get the memory of one that is gone
    storage = StorageWeakRef(parameter.untyped_storage())
    return id(parameter), parameter._version, storage, parameter.storage_offset(), parameter.dtype, parameter.shape


def calibration_for(classifier: ZeroShotClassifier) -> tuple[Calibration | None, str]:
    """Returns the calibration that holds for a classifier, or None and the reason why none does."""
    model: Any = classifier.model
    in_use = adapters_in_use(model)
    if len(in_use) != 1:
        acting = f"{len(in_use)} adapters act" if in_use else "no adapter acts"
        return None, f"a calibration belongs to one adapter, and {acting} here"
    config = model.peft_config[in_use[0]]
    if not isinstance(config, CaptConfig) or config.calibration is None:
        return None, f"the adapter has no calibration; {HOW}"
    calibration = Calibration.from_dict(config.calibration)
    names = list(classifier.class_names)
    if calibration.class_names != names:
        other = f"{len(calibration.class_names)} classes {some(calibration.class_names, 5, quote=True)}"
        why = f"for the {other}, not for the {len(names)} classes {some(names, 5, quote=True)}"
    elif calibration.texts != texts_digest(classifier):
        why = "for other texts of the classes"
    elif calibration.strength != config.strength:
        why = f"for strength {calibration.strength:g}, and it is {config.strength:g} here"
    elif calibration.precision != (precision := precision_of(model)):
        why = f"in {calibration.precision}, and its base model is in {precision} here"
    elif calibration.fingerprint != adapter_fingerprint(model, in_use[0]):
        why = "with other weights"
    elif calibration.base != base_weights(model):
        why = "on a base model with other weights"
    else:
        return calibration, ""
    return None, f"the adapter was calibrated {why}; {HOW}"
