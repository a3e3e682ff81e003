"""The images that a step works on at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .processes import COUNTED


@dataclass(frozen=True)
class Batch:
    """Training images.

    Attributes:
        pixels: (b, 3, H, W) float in [0, 1].
        labels: (b,) class indices.
        indices: Their places in the training set.
        counted: How many of them the loss is of: all, or none.
    """

    pixels: Tensor
    labels: Tensor
    indices: list[int]
    counted: int


def split_batch(inputs: dict[str, Any], size: int | None) -> list[Batch]:
    """Returns a batch of the data loader as parts of `size` images; None: in one part."""
    pixels, labels, indices = inputs["pixels"], inputs["labels"], inputs["index"].tolist()
    size = size or len(labels)
    if len(labels) <= size:
        return [Batch(pixels, labels, indices, inputs.get(COUNTED, len(labels)))]
    starts = range(0, len(labels), size)
    parts = [(pixels[i : i + size], labels[i : i + size], indices[i : i + size]) for i in starts]
    return [Batch(*part, counted=len(part[1])) for part in parts]
