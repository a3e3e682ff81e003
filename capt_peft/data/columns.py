"""From the columns that a data set came with to `image` and `label`, and the class names of the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image, Value, concatenate_datasets

from .names import ClassNames, check_apart, column_values, in_class_order, is_number, is_string, labels_by_name, renamed
from .parts import Part, Splits, placed_images
from .task import relabelled, task_features, with_labels


def label_splits(
    splits: Splits,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """Brings all splits to the columns `image` and `label`, each image under the name that its own part of the data gives it.

    The first part decides over the columns, which are found by their types where they are not given, and over the order of the
    classes. Returns the N class names too; `class_names` are those of whole numbers, in their order.

    Raises:
        ValueError: Columns that are missing, ambiguous or of another type; images without a label; classes that the first
            part does not have, or has twice; whole numbers without names.
    """
    split, parts = next(iter(splits.items()))
    first = parts[0]
    image_column = find_column(first.dataset, image_column, "image", is_image, "images")
    label_column = find_column(
        first.dataset, label_column, "label", lambda feature: isinstance(feature, ClassLabel), "classes (a ClassLabel)"
    )
    found = _classes(parts, label_column, class_names)
    check_apart(found, where=first.called(split))
    names = tuple(found if found is class_names else (name.replace("_", " ").strip() for name in found))
    labelled, feature = {}, task_features(names)["label"]
    for split, parts in splits.items():
        done = [_labelled(part, part.called(split), image_column, label_column, found, first) for part in parts]
        labelled[split] = concatenate_datasets(
            [images.add_column("label", labels, feature=feature) for images, labels in done]
        )
    return labelled, names


def _labelled(
    part: Part, where: str, image_column: str, label_column: str, found: Sequence[str], first: Part
) -> tuple[Dataset, np.ndarray]:
    """Returns the images of a part and their labels, as places in the names `found`."""
    for column, suits in ((image_column, is_image), (label_column, _is_label)):
        feature = part.dataset.features.get(column)
        expected = first.dataset.features[column]
        if not (suits(feature) or feature == expected) or is_number(feature) != is_number(expected):
            raise ValueError(
                f"Column {column!r} of {where[0].lower() + where[1:] if where.startswith('The ') else where} is {feature}, but "
                f"elsewhere it is {expected}. All parts of the data need the same columns."
            )
    _check_labelled(column_values(part.dataset, label_column), where)
    labels = labels_by_name(part.dataset, found, where, label_column)
    return placed_images(part, image_column), labels


def named_as(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """Returns a split (`image`, `label`) whose labels count these class names, each image under the name that it had.

    Raises:
        ValueError: The split has images of a class that `class_names` lacks.
    """
    labels = labels_by_name(dataset, class_names)
    return with_labels(dataset, labels, tuple(class_names))


def rename_classes(
    splits: Mapping[str, Dataset], found: Sequence[str], given: ClassNames, *, ordered: bool = False
) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """Returns labelled splits and their class names under the names given to `load_task`; arguments as for `renamed`."""
    names, places = renamed(found, given, ordered=ordered)
    lookup = np.array(places, dtype=np.int64)
    return {split: relabelled(dataset, lookup, names) for split, dataset in splits.items()}, names


def find_column(dataset: Dataset, given: str | None, kind: str, suits: Callable[[Any], bool], expected: str) -> str:
    """Returns the column that is given, or else the only one whose feature suits.

    Args:
        dataset: Its columns are looked at.
        given: The column, if the user names it.
        kind: What it holds in a word, which is the beginning of the option that names it: "image", "label", "caption".
        suits: Tells by its feature whether a column can be it.
        expected: What it holds, in words for a message.

    Raises:
        ValueError: The named column is missing, or none or several suit.
    """
    columns = ", ".join(dataset.column_names)
    if given is not None:
        if given not in dataset.column_names:
            raise ValueError(f"There is no column {given!r}. Columns: {columns}. Set `{kind}_column` to one of them.")
        if kind != "label" and not suits(
            dataset.features[given]
        ):  # labels may also be texts and numbers, if they are named
            raise ValueError(f"Column {given!r} has no {expected} but {dataset.features[given]}. Columns: {columns}.")
        return given
    found = [str(column) for column, feature in dataset.features.items() if suits(feature)]
    if kind == "image":  # bytes and structures are images only where no column says that it is
        typed = [column for column in found if isinstance(dataset.features[column], Image)]
        found = typed or found
    if len(found) > 1:
        raise ValueError(
            f"Several columns could be the {kind}: {', '.join(found)}. Set `{kind}_column` to one of them."
        )
    if not found:
        raise ValueError(f"No column holds {expected}. Columns: {columns}. Set `{kind}_column` to the right one.")
    return found[0]


def is_image(feature: Any) -> bool:
    """Tells whether a column holds images, or their bytes or paths as other libraries write them into parquet files."""
    if isinstance(feature, Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, Image) or (
        isinstance(feature, dict) and len(feature) > 0 and set(feature) <= {"bytes", "path"}
    )


def _is_label(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) or is_string(feature) or is_number(feature)


def _check_labelled(labels: np.ndarray, where: str) -> None:
    # Arrow gives numbers with gaps as floats, and words with gaps as objects.
    numbers = labels.dtype.kind in "iuf"
    missing = int((np.isnan(labels) | (labels == -1)).sum()) if numbers else sum(label is None for label in labels)
    if missing:
        raise ValueError(
            f"{where} has no labels for {missing} of its {len(labels)} images (label -1 or none). Set `train_split` or "
            "`test_split` to a labelled split; the test splits of some published data sets are unlabelled."
        )


def _classes(parts: Sequence[Part], column: str, class_names: Sequence[str] | None) -> Sequence[str]:
    """Returns the names of the classes as the data has them, in the order of the labels."""
    feature = parts[0].dataset.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if is_string(feature):
        words = {word for part in parts for word in _words(part, column)}
        return in_class_order(words)
    if not is_number(feature):
        raise ValueError(
            f"Column {column!r} is {feature}; labels are a ClassLabel, strings or whole numbers. Choose another `label_column`, "
            "or cast this one (datasets: `cast_column`) to strings or whole numbers."
        )
    if class_names is None:
        raise ValueError(
            f"The labels in column {column!r} are numbers without names. Give `class_names` in their order."
        )
    return class_names


def _words(part: Part, column: str) -> set[str]:
    feature = part.dataset.features.get(column)
    if isinstance(feature, ClassLabel):
        return set(feature.names)
    return set(column_values(part.dataset, column)) - {None} if is_string(feature) else set()
