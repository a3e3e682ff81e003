"""A task: what is classified, into which classes, with which text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, IterableDatasetDict

from ..tuner.config import DEFAULT_TEMPLATE
from ..utils.markup import Markdown, escape, table_row
from ..utils.text import some
from .names import check_class_names, column_values, name_key
from .sampling import sample_shots, split_classes
from .texts import ClassTexts, Template, read_template, texts_for, texts_of

SPLITS = ("train", "validation", "test")
HALVES = ("base", "new")
MAX_CLASSES = 20  # rows of a table of a task


def task_features(class_names: tuple[str, ...]) -> Features:
    """Returns the columns that every split of a task has: `image` and `label`."""
    return Features({"image": Image(), "label": ClassLabel(names=list(class_names))})


@dataclass(frozen=True)
class Task:
    """Labelled images, their class names and the sentences that turn a class name into texts.

    Args:
        name: Name of the task, for tables and results.
        class_names: The N class names, in the order of the labels; no two alike, up to case, underscores and white space.
        splits: `datasets.Dataset` by split name (`train`, `validation`, `test`), each with the columns `image` (an
            image) and `label` (`int`, 0 to N - 1; the names of a `ClassLabel` must be those of `class_names`).
        template: The text of a class; `{}` stands for its name. Several, as a list, as a text file with one on each line, or by
            the name of a published set (`capt_peft.data.TEMPLATES`): a class has one text of each, of whose features the mean is
            taken.
        source: Where the images come from, as given to `load_task`; recorded with results.
        left_out: What `load_task` left out, one sentence for each reason.
        class_texts: Own texts, by class name, or a JSON file of them: a text or a list for each class that has them, in
            place of the template's; `{}` in a text stands for the class name.

    Raises:
        ValueError: A template without one `{}`, texts of another class, class names that do not match the labels or their names,
            or a split with other columns.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Dataset]
    template: Template = DEFAULT_TEMPLATE
    source: str = ""
    left_out: tuple[str, ...] = ()
    class_texts: ClassTexts | None = None

    def __post_init__(self) -> None:
        check_class_names(self.class_names)
        object.__setattr__(self, "template", read_template(self.template))
        object.__setattr__(self, "class_texts", texts_for(self.class_names, self.class_texts))
        for split, dataset in self.splits.items():
            if split not in SPLITS:
                raise ValueError(f"Unknown split {split!r} of task {self.name!r}. Allowed: {', '.join(SPLITS)}.")
            if not isinstance(dataset, Dataset):
                raise TypeError(
                    f"Split {split!r} of task {self.name!r} must be a datasets.Dataset, not {kind_of(dataset)}."
                )
            if set(dataset.column_names) != {"image", "label"}:
                raise ValueError(
                    f"Split {split!r} of task {self.name!r} has the columns {dataset.column_names}; it needs `image` "
                    "and `label`. `capt_peft.load_task` renames them."
                )
            labels = self.labels(split)
            if len(labels) and labels.dtype.kind not in "iu":
                raise ValueError(
                    f"The labels of split {split!r} of task {self.name!r} are {dataset.features['label']}; they must "
                    "be whole numbers, one for each image."
                )
            if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
                raise ValueError(
                    f"Split {split!r} of task {self.name!r} has labels from {labels.min()} to {labels.max()}, but "
                    f"there are {self.num_classes} class names (labels 0 to {self.num_classes - 1}). Give one class "
                    "name a label."
                )
            self._check_names(split, labels)

    def _check_names(self, split: str, labels: np.ndarray) -> None:
        """Raises a ValueError if the split itself calls one of its labels something else."""
        feature = self[split].features["label"]
        if not isinstance(feature, ClassLabel):
            return
        for label in np.unique(labels).tolist():
            here, there = self.class_names[label], feature.names[label] if label < len(feature.names) else None
            if there is None or name_key(here) != name_key(there):
                raise ValueError(
                    f"Label {label} is {here!r} in the class names of task {self.name!r}, but {there!r} in its split {split!r}. "
                    "Give the class names in the order of the split's ClassLabel, or bring its labels to yours: "
                    "`capt_peft.data.columns.named_as(split, class_names)`."
                )

    @property
    def num_classes(self) -> int:
        """The number of classes, N."""
        return len(self.class_names)

    @property
    def texts(self) -> list[str]:
        """The texts of the N classes, in the order of the labels; several for a class where it has several."""
        return [one.text for one in texts_of(self.class_names, self.template, self.class_texts)]

    def __getitem__(self, split: str) -> Dataset:
        if split not in self.splits:
            raise KeyError(f"Task {self.name!r} has no split {split!r}; it has {', '.join(self.splits) or 'none'}.")
        return self.splits[split]

    def labels(self, split: str) -> np.ndarray:
        """Returns the (n,) labels of a split, read at once and without its images."""
        # Not `Dataset.unique`: on selected rows that copies the images to a new file first.
        return column_values(self[split], "label")

    def few_shot(self, shots: int, seed: int, *, allow_fewer: bool = False) -> Task:
        """Returns the same task with `shots` training images per class, drawn by `seed`.

        Args:
            shots: Training images per class, at least 1.
            seed: An integer of at least 0; the same seed draws the same images.
            allow_fewer: Take all the images of a class that has fewer than `shots`, instead of raising.

        Raises:
            ValueError: A class with fewer than `shots` training images.
        """
        chosen = sample_shots(self.labels("train"), shots, seed, class_names=self.class_names, allow_fewer=allow_fewer)
        return replace(self, splits={**self.splits, "train": self["train"].select(chosen)})

    def select_classes(self, labels: Sequence[int]) -> Task:
        """Returns the task with only the classes of `labels`, renumbered from 0 in that order; splits without them are left out.

        Args:
            labels: At least two different labels.

        Raises:
            ValueError: Fewer than two labels, one that repeats, or one that the task does not have.
        """
        labels = list(labels)
        if len(labels) < 2 or len(set(labels)) < len(labels) or not set(labels) <= set(range(self.num_classes)):
            raise ValueError(
                f"labels={labels} must be at least two different labels of task {self.name!r}, which has 0 to "
                f"{self.num_classes - 1}."
            )
        names = tuple(self.class_names[label] for label in labels)
        lookup = np.full(self.num_classes, -1)
        lookup[labels] = np.arange(len(labels))
        splits = {split: relabelled(dataset, lookup, names) for split, dataset in self.splits.items()}
        own = texts_for(names, self.class_texts, strict=False)
        splits = {split: found for split, found in splits.items() if len(found)}
        return replace(self, class_names=names, splits=splits, class_texts=own)

    def half(self, which: str) -> Task:
        """Returns the base or the new half of the classes, as CoCoOp's protocol has them (arXiv 2203.05557).

        Args:
            which: "base" (the first half of the labels, rounded up) or "new".

        Raises:
            ValueError: Another word, or fewer than 4 classes, so that a half could not be classified.
        """
        if which not in HALVES:
            raise ValueError(f"{which!r} is not a half of the classes. Allowed: {', '.join(HALVES)}.")
        if self.num_classes < 4:
            raise ValueError(
                f"Task {self.name!r} has {self.num_classes} classes; base-to-new needs at least 4, two in each half."
            )
        return self.select_classes(split_classes(self.num_classes)[HALVES.index(which)])

    def summary(self) -> str:
        """Returns images by class and split as a Markdown table; below it classes without images, and what was left out."""
        counts, n = self.counts(), self.num_classes
        shown = n if n <= MAX_CLASSES else MAX_CLASSES - 1
        rows: list[tuple[str, list[int]]] = [
            (name, [numbers[i] for numbers in counts.values()]) for i, name in enumerate(self.class_names[:shown])
        ]
        if shown < n:
            rows.append((f"{n - shown:,} more", [sum(numbers[shown:]) for numbers in counts.values()]))
        rows.append((f"all {n:,}", [sum(numbers) for numbers in counts.values()]))
        lines = [table_row(["class", *counts]), table_row([Markdown("---"), *(Markdown("---:") for _ in counts)])]
        lines += [table_row([name, *(f"{number:,}" for number in numbers)]) for name, numbers in rows]
        notes = [*without_images(self.class_names, counts), *(f"left out: {note}" for note in self.left_out)]
        return "\n".join([*lines, *([""] if notes else []), *(f"- {escape(note)}" for note in notes)])

    def counts(self) -> dict[str, list[int]]:
        """Returns for each split the number of images of each of the N classes."""
        return {split: np.bincount(self.labels(split), minlength=self.num_classes).tolist() for split in self.splits}


def describe_task(task: Task) -> str:
    """Returns what a task holds, and what was left out of it, as a Markdown table; the same as `task.summary()`."""
    return task.summary()


def kind_of(data: Any) -> str:
    """Returns what something that is not a split is, in words for a message."""
    if not isinstance(data, IterableDataset | IterableDatasetDict):
        return type(data).__name__
    return (
        f"{type(data).__name__} (streamed, but images are drawn and attacked by their places: load it without streaming=True, or "
        "keep a part of a split, Dataset.from_list(list(split.take(1000)), features=split.features))"
    )


def encoded_images(dataset: Dataset) -> Dataset:
    """Returns the dataset with its images not yet decoded, as `load_image` takes them to name a damaged file."""
    return dataset.cast_column("image", Image(decode=False))


def relabelled(dataset: Dataset, lookup: np.ndarray, names: tuple[str, ...]) -> Dataset:
    """Returns a dataset with `lookup[i]` for label i, of the classes `names`; images with the new label -1 are left out."""
    return with_labels(dataset, lookup[column_values(dataset, "label")], names)


def with_labels(dataset: Dataset, labels: np.ndarray, names: tuple[str, ...]) -> Dataset:
    """Returns a dataset with these labels (n,) in place of its own; images with the label -1 are left out."""
    # Added before the old column goes: `datasets` cannot add to a table whose part in memory has lost all its columns.
    dataset = dataset.add_column("relabelled", labels, feature=task_features(names)["label"])
    dataset = dataset.select_columns(["image", "relabelled"]).rename_column("relabelled", "label")
    return dataset if (labels >= 0).all() else dataset.select(np.flatnonzero(labels >= 0))


def without_images(class_names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> list[str]:
    """Returns for each split that lacks images of some classes a sentence that names these, at most 5."""
    notes = []
    for split, numbers in counts.items():
        names = [name for name, number in zip(class_names, numbers, strict=True) if not number]
        if names:
            notes.append(f"no {split} images of {some(map(repr, names), 5)}")
    return notes


def one_line(counts: Mapping[str, Sequence[int]]) -> str:
    """Returns the images of each split and class in a line, for the log."""
    classes = len(next(iter(counts.values()), ()))
    parts = [f"{sum(numbers):,} {split} ({_range(numbers)} per class)" for split, numbers in counts.items()]
    return f"{classes:,} classes; {', '.join(parts) or 'no'} images"


def _range(numbers: Sequence[int]) -> str:
    lowest, highest = min(numbers), max(numbers)
    return f"{lowest:,}" if lowest == highest else f"{lowest:,} to {highest:,}"
