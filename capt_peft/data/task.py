"""A task: what is classified, into which classes, with which text."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value

from .sampling import sample_shots
from .summary import markdown_table

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
        class_names: The N class names, in the order of the labels; no two alike, up to case, underscores and white space.
        splits: `datasets.Dataset` by split name (`train`, `validation`, `test`), each with the columns `image` (an
            image) and `label` (`int`, 0 to N - 1; the names of a `ClassLabel` must be those of `class_names`).
        template: The text of a class; `{}` stands for its name.
        source: Where the images come from, as given to `load_task`; recorded with results.
        left_out: What `load_task` left out, one sentence for each reason.

    Raises:
        ValueError: A template without one `{}`, class names that do not match the labels or their names, or a split with
            other columns.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Dataset]
    template: str = DEFAULT_TEMPLATE
    source: str = ""
    left_out: tuple[str, ...] = ()

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

    def summary(self) -> str:
        """Returns images by class and split as a Markdown table; below it classes without images, and what was left out."""
        return markdown_table(self.class_names, self.counts(), self.left_out)

    def counts(self) -> dict[str, list[int]]:
        """Returns for each split the number of images of each of the N classes."""
        return {split: np.bincount(self.labels(split), minlength=self.num_classes).tolist() for split in self.splits}


def describe_task(task: Task) -> str:
    """Returns what a task holds, and what was left out of it, as a Markdown table; the same as `task.summary()`."""
    return task.summary()


def column_values(dataset: Dataset, column: str) -> np.ndarray:
    """Returns the (n,) values of a column of numbers or words, without touching the other columns."""
    values: np.ndarray = dataset.select_columns([column]).with_format("arrow")[:].column(column).to_numpy()
    return values


def is_string(feature: Any) -> bool:
    """Whether a column holds words."""
    return isinstance(feature, Value) and "string" in feature.dtype


def labels_by_name(
    dataset: Dataset, class_names: Sequence[str], what: str = "The split", column: str = "label"
) -> np.ndarray:
    """Returns the (n,) labels of a split as places in `class_names`: matched by name where the split names its classes.

    Names match if they are equal or, where that leaves no doubt, if they differ by case, underscores, white space or Unicode's
    form alone. Labels of a plain integer column are places in `class_names` already.

    Args:
        dataset: A split with a column of labels: a `ClassLabel`, strings, or whole numbers.
        class_names: The N class names that labels shall count.
        what: What the split is, for messages.
        column: The column of the labels.

    Raises:
        ValueError: The split has images of a class that `class_names` lacks, images without a label, or labels out of range.
    """
    check_ordered(class_names)
    labels = column_values(dataset, column)
    feature = dataset.features[column]
    if not len(labels):
        return np.empty(0, dtype=np.int64)
    if is_string(feature) and None not in labels:
        words = sorted(set(labels))
        index = {word: label for label, word in enumerate(words)}
        return _places(words, np.array([index[word] for word in labels]), class_names, what)
    if labels.dtype.kind not in "iu":
        raise ValueError(
            f"{what} has images without a label, or labels that are not whole numbers (column {column!r}: {feature}). Remove or "
            "label them."
        )
    names = feature.names if isinstance(feature, ClassLabel) else class_names
    if not 0 <= labels.min() <= labels.max() < len(names):
        raise ValueError(
            f"{what} has labels from {labels.min()} to {labels.max()}, but there are {len(names)} class names (labels 0 to "
            f"{len(names) - 1}). Give one class name for each label."
        )
    return _places(names, labels.astype(np.int64), class_names, what)


def _places(names: Sequence[str], labels: np.ndarray, class_names: Sequence[str], what: str) -> np.ndarray:
    """Returns the place in `class_names` of each image, whose name is `names[label]`."""
    places = name_places(names, class_names) if names is not class_names else list(range(len(names)))
    lost = next((label for label in np.unique(labels).tolist() if places[label] is None), None)
    if lost is not None:
        here = f", whose label {lost} is {class_names[lost]!r}" if lost < len(class_names) else ""
        raise ValueError(
            f"{what} has images of the class {names[lost]!r} (label {lost}), which is none of the {len(class_names)} classes "
            f"asked for{here}. Give the class names of this data, or data of these classes."
        )
    return np.array([-1 if place is None else place for place in places], dtype=np.int64)[labels]


def name_places(names: Sequence[str], class_names: Sequence[str]) -> list[int | None]:
    """Returns for each name its place in `class_names`, None where none is the same name; see `labels_by_name`."""
    exact = {name: place for place, name in enumerate(class_names)}
    alike = Counter(map(name_key, class_names)), Counter(map(name_key, names))
    loose = {name_key(name): place for place, name in enumerate(class_names) if alike[0][name_key(name)] == 1}
    return [
        exact[name] if name in exact else loose.get(name_key(name)) if alike[1][name_key(name)] == 1 else None
        for name in names
    ]


def name_key(name: str) -> str:
    """Returns what a class name has in common with its other spellings: case, underscores, white space, Unicode's form."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").casefold().split())


def alike_names(names: Sequence[str]) -> tuple[int, int] | None:
    """Returns the places of the first two names that are the same by `name_key`, or None."""
    seen: dict[str, int] = {}
    for place, name in enumerate(names):
        first = seen.setdefault(name_key(name), place)
        if first != place:
            return first, place
    return None


def encoded_images(dataset: Dataset) -> Dataset:
    """Returns the dataset with its images not yet decoded, as `load_image` takes them to name a damaged file."""
    return dataset.cast_column("image", Image(decode=False))


def check_template(template: str) -> None:
    """Raises a ValueError unless `template` has exactly one place for the class name, `{}`."""
    if template.count("{}") != 1 or template.replace("{}", "").count("{") or template.replace("{}", "").count("}"):
        raise ValueError(f"The template {template!r} must hold exactly one {{}}, the place of the class name.")


def check_ordered(class_names: Sequence[str]) -> None:
    """Raises a ValueError unless class names have an order: a list, a tuple or the like; not a set, dict, generator or str."""
    listed = isinstance(class_names, Sequence) or (isinstance(class_names, np.ndarray) and class_names.ndim == 1)
    if isinstance(class_names, (str, bytes)) or not listed:
        raise ValueError(
            f"Class names must be a list in the order of the labels, not a {type(class_names).__name__}: "
            f"{str(class_names)[:80]}. Give a list, as ['cat', 'dog']."
        )


def check_class_names(class_names: Sequence[str]) -> None:
    """Raises a ValueError unless this is a list of at least two class names, none empty and no two alike (see `name_key`)."""
    check_ordered(class_names)
    if len(class_names) < 2:
        raise ValueError(f"At least two class names are needed, got {class_names!r}.")
    empty = [i for i, name in enumerate(class_names) if not isinstance(name, str) or not name.strip()]
    if empty:
        raise ValueError(
            f"The class name of label {empty[0]} is {class_names[empty[0]]!r}; it must be a word or words."
        )
    alike = alike_names(class_names)
    if alike is not None:
        one, other = (class_names[place] for place in alike)
        raise ValueError(
            f"Class names must differ, but {one!r} stands for more than one label."
            if one == other
            else f"Class names must differ by more than case, underscores, white space and Unicode's form, but labels "
            f"{alike[0]} and {alike[1]} are {one!r} and {other!r}. Rename one of them."
        )
