"""Calibration: what an adapter stores so that its scores are probabilities and its answers can be "none of these"."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..utils.text import shown

_SHARES = ("false_rejection_rate", "false_positive_rate")
_NUMBERS = ("temperature", "threshold", *_SHARES, "strength")
_TEXTS = ("task", "split", "texts", "fingerprint", "base", "precision")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was fitted on images that an adapter had not learned from, and for which classifier it holds.

    It is `CaptConfig.calibration` as a record: there it is a dictionary of these fields, as JSON has them. Thresholds are on the
    model's own logits z, and the temperature changes the scores alone, softmax(z / temperature).

    Args:
        temperature: What the model's logits are divided by (Guo et al. 2017, arXiv 1706.04599), more than 0.
        threshold: The answer is "none of these" where an image's largest logit is below it (Hendrycks et al. 2022, arXiv
            1911.11132).
        false_rejection_rate: The share of images of these classes that `threshold` may reject, in (0, 1).
        class_thresholds: N thresholds for answers with any number of classes: a class is one of them where its logit is above
            its own.
        false_positive_rate: The share of images of other classes that each of `class_thresholds` may let through, in (0, 1).
        images: Number of images that all of it was fitted on.
        task: Name of the task that they are of.
        split: Its split.
        class_names: The N classes that it holds for, in the order of `class_thresholds`.
        texts: Digest of the texts of these classes.
        strength: The adapter's strength that it holds for, 0 to 1.
        fingerprint: The fingerprint of the adapter (`adapter_fingerprint`).
        base: The fingerprint of the base model's weights (`base_fingerprint`).
        precision: The type of these weights, such as "float32".

    Raises:
        TypeError: A field of another type.
        ValueError: A field out of range.
    """

    temperature: float
    threshold: float
    false_rejection_rate: float
    class_thresholds: list[float]
    false_positive_rate: float
    images: int
    task: str
    split: str
    class_names: list[str]
    texts: str
    strength: float
    fingerprint: str
    base: str
    precision: str

    def __post_init__(self) -> None:
        self._check_types()
        if not 0 < self.temperature <= sys.float_info.max:  # NaN fails too
            raise ValueError(f"calibration: temperature={shown(self.temperature)} must be a finite number above 0.")
        if not all(abs(value) <= sys.float_info.max for value in (self.threshold, *self.class_thresholds)):
            raise ValueError(f"calibration: threshold={shown(self.threshold)} and class_thresholds must be finite.")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"calibration: strength={shown(self.strength)} must be from 0 to 1.")
        for name in _SHARES:
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"calibration: {name}={shown(getattr(self, name))} must be above 0 and below 1.")
        if self.images < 1:
            raise ValueError(f"calibration: images={shown(self.images)} must be 1 or more.")
        if len(self.class_thresholds) != len(self.class_names):
            raise ValueError(
                f"calibration: {len(self.class_thresholds)} class_thresholds do not fit {len(self.class_names)} class_names."
            )

    def _check_types(self) -> None:
        kinds: dict[str, tuple[type, ...]] = dict.fromkeys(_NUMBERS, (int, float)) | dict.fromkeys(_TEXTS, (str,))
        for name, kind in {**kinds, "images": (int,)}.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(
                    f"calibration: {name}={shown(value)} must be {'text' if kind == (str,) else 'a number'}."
                )
        for name, kind in {"class_thresholds": (int, float), "class_names": (str,)}.items():
            value = getattr(self, name)
            if not isinstance(value, list) or not all(isinstance(v, kind) and not isinstance(v, bool) for v in value):
                what = "text" if kind == (str,) else "numbers"
                raise TypeError(f"calibration: {name}={shown(value)} must be a list of {what}.")

    def scores(self, logits: Tensor) -> Tensor:
        """Returns softmax(logits / temperature) of logits (B, N), as float64 on the CPU."""
        return (logits.detach().cpu().double() / self.temperature).softmax(-1)

    def accepts(self, logits: Tensor) -> Tensor:
        """Returns for each image (B,) whether it is one of the classes, and not "none of these"."""
        return logits.detach().cpu().double().amax(-1) >= self.threshold

    def above(self, logits: Tensor) -> Tensor:
        """Returns how far each logit (B, N) is above the threshold of its class, as float64 on the CPU."""
        return logits.detach().cpu().double() - torch.tensor(self.class_thresholds, dtype=torch.float64)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, in JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Calibration:
        """Reads what `to_dict` returned; what a later version has beside it is left out.

        Raises:
            TypeError: A field of another type.
            ValueError: A field is missing or out of range.
        """
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in content]
        if missing:
            raise ValueError(
                f"calibration has no {missing[0]}. Take it out of adapter_config.json, and fit one: capt-peft calibrate."
            )
        return cls(**{name: content[name] for name in names})
