"""Which images: k shots of each class, stratified splits, and the base and new halves of the classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..randomness import check_seed


def sample_shots(
    labels: Any, shots: int, seed: int, *, class_names: Sequence[str] | None = None, allow_fewer: bool = False
) -> list[int]:
    """Draws `shots` images of each class, without replacement.

    The draws of a seed are nested (its 1-shot images are among its 4-shot images), and each class is drawn on its own:
    what is drawn of one class does not depend on the images of another.

    Args:
        labels: (n,) integers from 0: a list, an array, or the column of a `datasets.Dataset`.
        shots: Images per class, at least 1.
        seed: An integer of at least 0; the same seed draws the same images.
        class_names: The N class names in the order of the labels. A class without a single image counts as too small.
            Without them, the classes are the labels that occur.
        allow_fewer: Take all the images of a class that has fewer than `shots`, instead of raising.

    Returns:
        Indices into `labels`, ascending.

    Raises:
        ValueError: A class with fewer than `shots` images.
    """
    if not isinstance(shots, (int, np.integer)) or shots < 1:
        raise ValueError(f"shots must be a whole number of at least 1, got {shots!r}. For all images, do not sample.")
    by_class = _permutations(labels, seed)
    if class_names is not None:
        if by_class and max(by_class) >= len(class_names):
            raise ValueError(f"Label {max(by_class)} has no class name: there are {len(class_names)} class names.")
        by_class = {label: by_class.get(label, np.empty(0, dtype=np.int64)) for label in range(len(class_names))}
    small = {label: len(images) for label, images in by_class.items() if len(images) < shots}
    if small and not allow_fewer:
        label, count = next(iter(small.items()))
        called = f"{class_names[label]!r}" if class_names is not None else f"of label {label}"
        others = f" ({len(small) - 1} more classes have too few)" if len(small) > 1 else ""
        raise ValueError(
            f"Class {called} has {count} image{'s' if count != 1 else ''}, but {shots} are asked{others}. Ask for "
            "fewer shots, or pass `allow_fewer=True` to take all the images of such a class."
        )
    return sorted(int(index) for images in by_class.values() for index in images[:shots])


def split_classes(num_classes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Splits the labels into base and new classes, as CoCoOp's base-to-new protocol does.

    Args:
        num_classes: Number of classes N, at least 2.

    Returns:
        The first ceil(N / 2) labels (base) and the others (new).
    """
    if num_classes < 2:
        raise ValueError(f"Base and new classes need at least 2 classes, got {num_classes}.")
    half = math.ceil(num_classes / 2)
    return tuple(range(half)), tuple(range(half, num_classes))


def stratified_split(labels: Any, fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Splits images into parts that have the same share of every class.

    Of a class with n images each part gets round(n * fraction), the last part gets the rest, and the first part (the
    training images) gets at least one. CoOp makes the splits of Caltech101, DTD and EuroSAT so, with 0.5, 0.2 and 0.3.

    Args:
        labels: (n,) integers from 0.
        fractions: Share of each part, above 0, summing to 1.
        seed: An integer of at least 0; the same seed gives the same parts.

    Returns:
        For each part, its indices into `labels`, ascending.
    """
    if not fractions or min(fractions) <= 0 or not math.isclose(sum(fractions), 1.0):
        raise ValueError(f"The fractions of a split must be above 0 and sum to 1, got {tuple(fractions)}.")
    parts: list[list[int]] = [[] for _ in fractions]
    for images in _permutations(labels, seed).values():
        sizes = [round(len(images) * fraction) for fraction in fractions[:-1]]
        if sizes:
            sizes[0] = max(1, sizes[0])
        for part, chosen in zip(parts, np.split(images, np.cumsum(sizes, dtype=np.int64)), strict=True):
            part.extend(chosen.tolist())
    return [sorted(part) for part in parts]


def _permutations(labels: Any, seed: int) -> dict[int, np.ndarray]:
    """Returns the indices of each class that occurs, by ascending label, each in an order of its own."""
    check_seed(seed)
    # The slice turns a column of `datasets`, which reads row by row, into one read.
    values = np.asarray(labels[:])
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise ValueError(f"labels must be whole numbers in one dimension, got {values.dtype} of shape {values.shape}.")
    if values.size and values.min() < 0:
        raise ValueError(f"labels must be at least 0, got {values.min()}: some images have no label.")
    classes, counts = np.unique(values, return_counts=True)
    groups = np.split(np.argsort(values, kind="stable"), np.cumsum(counts)[:-1]) if values.size else []
    return {
        int(label): np.random.default_rng([int(seed), int(label)]).permutation(images)
        for label, images in zip(classes, groups, strict=True)
    }
