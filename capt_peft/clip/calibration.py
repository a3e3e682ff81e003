"""Which calibration holds for a classifier: the one that its adapter stores, if it is of this very classifier."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from ..tuner import Calibration, CaptConfig, adapters_in_use
from ..tuner.fingerprint import adapter_fingerprint
from ..utils.text import some

if TYPE_CHECKING:
    from .classifier import ZeroShotClassifier

HOW = "capt-peft calibrate ADAPTER fits one"


def texts_digest(classifier: ZeroShotClassifier) -> str:
    """Returns 16 hexadecimal digits of a SHA-256 of the texts of a classifier's classes, in their order."""
    texts = list(zip(classifier.text_labels, classifier.texts, strict=True))
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


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
    elif calibration.fingerprint != adapter_fingerprint(model, in_use[0]):
        why = "with other weights, or with the same in another precision"
    else:
        return calibration, ""
    return None, f"the adapter was calibrated {why}; {HOW}"
