"""From the columns that a data set came with to `image` and `label`, and the class names of the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image, Value

from .task import column_values, task_features


def label_splits(
    splits: Mapping[str, Dataset],
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: tuple[str, ...] | None = None,
) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """Brings all splits to the columns of a task.

    Args:
        splits: Datasets by split, with any columns; the first decides which are used and, of strings, the classes.
        image_column: Column of the images; found by its type if there is only one.
        label_column: Column of the labels: a `ClassLabel` (found by its type if there is only one), strings, or whole
            numbers.
        class_names: Names to use instead of those in the data; needed for whole numbers.

    Returns:
        The splits with the columns `image` and `label`, and the N class names.

    Raises:
        ValueError: Columns that are missing, ambiguous or of another type; images without a label; classes that only a
            later split has; class names that do not match the labels.
    """
    first_split, first = next(iter(splits.items()))
    image_column = _find_column(first, image_column, "image", _is_image)
    label_column = _find_column(first, label_column, "label", lambda feature: isinstance(feature, ClassLabel))
    feature = first.features[label_column]
    found = _classes(feature, label_column, first, class_names)
    if class_names is not None:
        check_number(class_names, len(found))
    values: dict[str, np.ndarray] = {}
    for split, dataset in splits.items():
        for column in (image_column, label_column):
            if dataset.features.get(column) != first.features[column]:
                raise ValueError(
                    f"Column {column!r} of the {split} split is {dataset.features.get(column)}, but {first_split} has "
                    f"{first.features[column]}. All splits need the same columns and classes."
                )
        values[split] = column_values(dataset, label_column)
        _check_labelled(values[split], split)
        if _is_string(feature):
            values[split] = _encode(values[split], found, split)
    names = class_names or tuple(name.replace("_", " ").strip() for name in found)
    return {split: with_labels(splits[split], image_column, values[split], names) for split in splits}, names


def with_labels(dataset: Dataset, image_column: str, labels: np.ndarray, class_names: tuple[str, ...]) -> Dataset:
    """Returns the images of a dataset, in the column `image`, with these (n,) labels beside them."""
    dataset = dataset.select_columns([image_column])
    if image_column != "image":
        dataset = dataset.rename_column(image_column, "image")
    # Not `cast`, which would write a copy of the images beside those of a saved dataset.
    dataset = dataset.cast_column("image", Image())
    return dataset.add_column("label", labels, feature=task_features(class_names)["label"])


def relabelled(dataset: Dataset, lookup: np.ndarray, names: tuple[str, ...]) -> Dataset:
    """Returns a dataset with `lookup[i]` for label i, of the classes `names`; images with the new label -1 are left out."""
    labels = lookup[column_values(dataset, "label")]
    # Added before the old column goes: `datasets` cannot add to a table whose part in memory has lost all its columns.
    dataset = dataset.add_column("relabelled", labels, feature=task_features(names)["label"])
    dataset = dataset.select_columns(["image", "relabelled"]).rename_column("relabelled", "label")
    return dataset if (labels >= 0).all() else dataset.select(np.flatnonzero(labels >= 0))


def check_number(class_names: Sequence[str], num_classes: int) -> None:
    """Raises a ValueError unless there is one class name for each class."""
    if len(class_names) != num_classes:
        raise ValueError(
            f"The class names do not match the labels: {len(class_names)} names are given for {num_classes} classes. "
            "Give one name for each label, in the order of the labels."
        )


def _find_column(dataset: Dataset, given: str | None, kind: str, suits: Callable[[Any], bool]) -> str:
    columns = ", ".join(dataset.column_names)
    if given is not None:
        if given not in dataset.column_names:
            raise ValueError(f"There is no column {given!r}. Columns: {columns}. Set `{kind}_column` to one of them.")
        if kind == "image" and not suits(dataset.features[given]):
            raise ValueError(f"Column {given!r} has no images but {dataset.features[given]}. Columns: {columns}.")
        return given
    found = [str(column) for column, feature in dataset.features.items() if suits(feature)]
    if len(found) > 1:
        raise ValueError(
            f"Several columns could be the {kind}: {', '.join(found)}. Set `{kind}_column` to one of them."
        )
    if not found:
        expected = "images" if kind == "image" else "classes (a ClassLabel)"
        raise ValueError(f"No column holds {expected}. Columns: {columns}. Set `{kind}_column` to the right one.")
    return found[0]


def _is_image(feature: Any) -> bool:
    """Whether a column holds images, or the bytes of images as other libraries write them into parquet files."""
    return isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature and len(feature) <= 2)


def _check_labelled(labels: np.ndarray, split: str) -> None:
    # Arrow gives numbers with gaps as floats, and words with gaps as objects.
    numbers = labels.dtype.kind in "iuf"
    missing = int((np.isnan(labels) | (labels == -1)).sum()) if numbers else sum(label is None for label in labels)
    if missing:
        raise ValueError(
            f"The {split} split has no labels for {missing} of its {len(labels)} images (label -1 or none). Set "
            f"`{split}_split` to a labelled split; the test splits of some published data sets are unlabelled."
        )


def _is_string(feature: Any) -> bool:
    return isinstance(feature, Value) and "string" in feature.dtype


def _classes(feature: Any, column: str, first: Dataset, class_names: tuple[str, ...] | None) -> list[str]:
    """Returns the names of the classes as the data has them, in the order of the labels."""
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if _is_string(feature):
        return sorted(set(column_values(first, column)) - {None})
    if not isinstance(feature, Value) or "int" not in feature.dtype:
        raise ValueError(f"Column {column!r} is {feature}; labels are a ClassLabel, strings or whole numbers.")
    if class_names is None:
        raise ValueError(
            f"The labels in column {column!r} are numbers without names. Give `class_names` in their order."
        )
    return list(class_names)


def _encode(words: np.ndarray, vocabulary: list[str], split: str) -> np.ndarray:
    unseen = sorted(set(words) - set(vocabulary))
    if unseen:
        raise ValueError(
            f"The {split} split has {len(unseen)} classes without training images: {', '.join(map(repr, unseen[:5]))}."
        )
    index = {name: label for label, name in enumerate(vocabulary)}
    return np.array([index[word] for word in words], dtype=np.int64)
