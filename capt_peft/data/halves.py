"""A task cut to some of its classes: base-to-new generalisation trains on one half and tests on both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .columns import relabelled
from .sampling import split_classes
from .task import Task

HALVES = ("base", "new")


def select_classes(task: Task, labels: Sequence[int]) -> Task:
    """Returns the task with only the classes of `labels`, renumbered from 0 in that order.

    Args:
        task: The task.
        labels: At least two different labels of it.

    Raises:
        ValueError: Fewer than two labels, one that repeats, or one that the task does not have.
    """
    labels = list(labels)
    if len(labels) < 2 or len(set(labels)) < len(labels) or not set(labels) <= set(range(task.num_classes)):
        raise ValueError(
            f"labels={labels} must be at least two different labels of task {task.name!r}, which has 0 to "
            f"{task.num_classes - 1}."
        )
    names = tuple(task.class_names[label] for label in labels)
    lookup = np.full(task.num_classes, -1)
    lookup[labels] = np.arange(len(labels))
    splits = {split: relabelled(dataset, lookup, names) for split, dataset in task.splits.items()}
    splits = {split: dataset for split, dataset in splits.items() if len(dataset)}
    return replace(task, class_names=names, splits=splits)


def half(task: Task, which: str) -> Task:
    """Returns the base or the new half of a task's classes, as CoCoOp's protocol has them (arXiv 2203.05557).

    Args:
        task: The task; at least 4 classes, so that either half can be classified.
        which: "base" (the first half of the labels, rounded up) or "new".

    Raises:
        ValueError: Another word, or fewer than 4 classes.
    """
    if which not in HALVES:
        raise ValueError(f"{which!r} is no half of the classes. Allowed: {', '.join(HALVES)}.")
    if task.num_classes < 4:
        raise ValueError(
            f"Task {task.name!r} has {task.num_classes} classes; base-to-new needs at least 4, two in each half."
        )
    return select_classes(task, split_classes(task.num_classes)[HALVES.index(which)])
