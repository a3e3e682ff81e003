"""The images of an evaluation, however they come."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from ..attacks import Attack, LogitsFn
from ..attacks.threat import check_images
from ..clip.classifier import ZeroShotClassifier
from ..data.names import check_other_classes, labels_by_name
from ..data.pixels import PixelDataset, digest_images
from ..data.task import kind_of
from ..utils.machine import moved

logger = logging.getLogger(__name__)

_HASHED_AT_ONCE = 256  # images


class Examples:
    """Images as pixels in [0, 1] and their labels.

    Args:
        data: A split of a task (columns `image` and `label`), or pixels (n, 3, H, W) in [0, 1] and labels (n,) int64.
        classifier: Makes pixels of images, and numbers the classes: labels are matched by the names that the split gives them.
        label: The label of all images of a split, whose own classes are then none of the classifier's; by default their own.

    Raises:
        TypeError: `data` is neither, or of the wrong dtype.
        ValueError: There are no images, numbers do not fit, pixels are not in [0, 1], or the classifier lacks a label's class
            or, with `label`, has it.
    """

    def __init__(
        self, data: datasets.Dataset | tuple[Tensor, Tensor], classifier: LogitsFn, *, label: int | None = None
    ) -> None:
        self._pixels: Any
        if isinstance(data, datasets.Dataset):
            if not isinstance(classifier, ZeroShotClassifier):
                raise TypeError(
                    "A callable takes no images: give pixels and labels, (pixels, labels), instead of a dataset."
                )
            if label is None:
                labels = labels_by_name(data, classifier.class_names, "The dataset").astype("int64")
            else:
                check_other_classes(data, classifier.class_names)
                labels = np.full(len(data), label)
            self.labels = torch.from_numpy(labels)
            self._pixels = PixelDataset(data, classifier.transform, labels=labels)
        elif isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
            self._pixels, self.labels = data
            if len(self._pixels):
                check_images(self._pixels, self.labels)
        else:
            raise TypeError(f"data must be a datasets.Dataset or (pixels, labels), not {kind_of(data)}.")
        if len(self.labels) == 0:
            raise ValueError("There are no images to evaluate on: the dataset is empty.")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns pixels (B, 3, H, W) and labels (B,) of the images at these places."""
        if isinstance(self._pixels, Tensor):
            pixels = self._pixels[list(indices)]
        else:
            pixels = torch.stack([self._pixels[i]["pixels"] for i in indices])
        return moved(pixels, device), moved(self.labels[list(indices)], device)

    def check_labels(self, num_classes: int) -> None:
        """Raises a ValueError unless every label is one of `num_classes`."""
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"Labels range from {low} to {high}, but the classifier knows {num_classes} classes (0 to {num_classes - 1}). "
                "Give it the class names of this dataset, in the order of its labels."
            )

    def warn_of_units(self, attacks: Sequence[Attack]) -> None:
        """Warns of L2 and L1 radii that only make sense in units of 0 to 255."""
        values = self.batch([0], torch.device("cpu"))[0].numel()
        far = {"l2": math.sqrt(values), "l1": float(values)}  # the length of a change of every pixel by its whole range
        threats = {a.threat_model for a in attacks if a.threat_model.norm in far}
        for threat in sorted(threats, key=lambda each: (each.norm, each.epsilon)):
            radius, share = threat.epsilon, threat.epsilon / far[threat.norm]
            if share > 1 / 5:
                logger.warning(
                    f"{threat.norm.upper()} epsilon={radius:g} changes every pixel by {share:.2g} of its range on average: "
                    f"epsilon is in units of [0, 1] pixels, so that {radius:g} levels of 255 are written '{radius:g}/255'."
                )

    def to_dict(self) -> dict[str, Any]:
        """Returns how many images there are, and a fingerprint of all of them and of their labels."""
        if not isinstance(self._pixels, Tensor):
            return {"n": len(self), "fingerprint": digest_images(self._pixels.dataset)}
        digest = hashlib.sha256(self.labels.numpy(force=True).tobytes())
        digest.update(f"{tuple(self._pixels.shape)} {self._pixels.dtype}".encode())
        for some in self._pixels.split(_HASHED_AT_ONCE):
            digest.update(some.contiguous().numpy(force=True).data)
        return {"n": len(self), "fingerprint": digest.hexdigest()[:16]}


def spread(values: Sequence[int], count: int) -> list[int]:
    """Returns `count` of the values, or all there are, at even distances."""
    places = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[place] for place in places.tolist()]
