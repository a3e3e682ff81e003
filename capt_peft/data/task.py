"""A task: what is classified, into which classes, with which text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image

from .sampling import sample_shots

SPLITS = ("train", "validation", "test")
DEFAULT_TEMPLATE = "a photo of a {}."


def task_features(class_names: tuple[str, ...]) -> Features:
    """Returns the columns that every split of a task has: `image` and `label`."""
    return Features({"image": Image(), "label": ClassLabel(names=list(class_names))})


@dataclass(frozen=True)
class Task:
    """Labelled images, their class names and the sentence that turns a class name into a text.

    Args:
        name: Name of the task, for tables and results.
        class_names: The N class names, in the order of the labels; no two alike.
        splits: `datasets.Dataset` by split name (`train`, `validation`, `test`), each with the columns `image` (an
            image) and `label` (`int`, 0 to N - 1).
        template: The text of a class; `{}` stands for its name.
        source: Where the images come from, as given to `load_task`; recorded with results.

    Raises:
        ValueError: A template without one `{}`, class names that do not match the labels, or a split with other
            columns.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Dataset]
    template: str = DEFAULT_TEMPLATE
    source: str = ""

    def __post_init__(self) -> None:
        check_template(self.template)
        check_class_names(self.class_names)
        for split, dataset in self.splits.items():
            if split not in SPLITS:
                raise ValueError(f"Unknown split {split!r} of task {self.name!r}. Allowed: {', '.join(SPLITS)}.")
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

    @property
    def num_classes(self) -> int:
        """The number of classes, N."""
        return len(self.class_names)

    @property
    def texts(self) -> list[str]:
        """The N class texts, in the order of the labels."""
        return [self.template.format(name) for name in self.class_names]

    def __getitem__(self, split: str) -> Dataset:
        if split not in self.splits:
            raise KeyError(f"Task {self.name!r} has no split {split!r}; it has {', '.join(self.splits) or 'none'}.")
        return self.splits[split]

    def labels(self, split: str) -> np.ndarray:
        """Returns the (n,) labels of a split, read at once and without its images."""
        # Not `Dataset.unique`: on selected rows that copies the images to a new file first.
        return column_values(self[split], "label")

    def few_shot(self, shots: int, seed: int, *, allow_fewer: bool = False) -> Task:
        """Returns the same task with `shots` training images a class, drawn by `seed`.

        Args:
            shots: Training images a class, at least 1.
            seed: An integer of at least 0; the same seed draws the same images.
            allow_fewer: Take all the images of a class that has fewer than `shots`, instead of raising.

        Raises:
            ValueError: A class with fewer than `shots` training images.
        """
        chosen = sample_shots(self.labels("train"), shots, seed, class_names=self.class_names, allow_fewer=allow_fewer)
        return replace(self, splits={**self.splits, "train": self["train"].select(chosen)})


def column_values(dataset: Dataset, column: str) -> np.ndarray:
    """Returns the (n,) values of a column of numbers or words, without touching the other columns."""
    values: np.ndarray = dataset.select_columns([column]).with_format("arrow")[:].column(column).to_numpy()
    return values


def encoded_images(dataset: Dataset) -> Dataset:
    """Returns the dataset with its images not yet decoded, as `load_image` takes them to name a damaged file."""
    return dataset.cast_column("image", Image(decode=False))


def check_template(template: str) -> None:
    """Raises a ValueError unless `template` has exactly one place for the class name, `{}`."""
    if template.count("{}") != 1 or template.replace("{}", "").count("{") or template.replace("{}", "").count("}"):
        raise ValueError(f"The template {template!r} must hold exactly one {{}}, the place of the class name.")


def check_class_names(class_names: Sequence[str]) -> None:
    """Raises a ValueError unless there are at least two class names, none empty and no two alike."""
    if isinstance(class_names, str) or len(class_names) < 2:
        raise ValueError(f"At least two class names are needed, got {class_names!r}.")
    empty = [i for i, name in enumerate(class_names) if not isinstance(name, str) or not name.strip()]
    if empty:
        raise ValueError(
            f"The class name of label {empty[0]} is {class_names[empty[0]]!r}; it must be a word or words."
        )
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated:
        raise ValueError(f"Class names must differ, but {repeated[0]!r} stands for more than one label.")
