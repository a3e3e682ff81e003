"""Class names: which is which in another spelling or order, and labels that go by them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from ..utils.text import some

ClassNames = Sequence[str] | Mapping[str, str]


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


def check_apart(names: Sequence[str], called: Sequence[str] | None = None, where: str = "The data") -> None:
    """Raises a ValueError that names both, as they are `called`, if two names of the data `where` are one class name."""
    alike = alike_names(names)
    if alike is not None:
        one, other = (called[i] if called is not None else repr(names[i]) for i in alike)
        raise ValueError(
            f"{where} has two classes of one name, {one} and {other} (case, underscores, white space and Unicode's form do not "
            "count). Rename one, or put their images together."
        )


def in_class_order(names: Iterable[str]) -> list[str]:
    """Returns the names in the order of their labels: numbers by their value, anything else as text."""
    ordered = sorted(set(names))
    return sorted(ordered, key=int) if are_numbers(ordered) else ordered


def are_numbers(names: Sequence[str]) -> bool:
    """Whether the names are whole numbers, as of folders that are called by their label."""
    return all(name.isdecimal() and len(name) < 20 for name in names)


def check_given(class_names: ClassNames) -> ClassNames:
    """Returns class names as given to `load_task`; raises what `check_class_names` raises."""
    if not isinstance(class_names, Mapping):
        check_class_names(class_names)
        return tuple(class_names)
    check_class_names(tuple(class_names.values()))
    return {str(old): new for old, new in class_names.items()}


def renamed(found: Sequence[str], given: ClassNames, *, ordered: bool = False) -> tuple[tuple[str, ...], list[int]]:
    """Returns given class names in the order of the new labels, and for each label of the data its new label.

    Args:
        found: The N names of the data, in the order of its labels.
        given: A mapping from the data's names to others. Or a list: of the same names, in any order; or, where the data's
            names are the numbers 0 to N - 1 or 1 to N, or `ordered`, of other names in this order.
        ordered: Whether the order of the data's classes is published, so that a list of other names can follow it.

    Raises:
        ValueError: Names that leave open which is which.
    """
    if len(given) != len(found):
        raise ValueError(
            f"The class names do not match the labels: {len(given)} names are given for {len(found)} classes "
            f"({some(found, 5, quote=True)}). Give one name for each class."
        )
    old = tuple(given)
    places = name_places(found, old)
    lost = [name for name, place in zip(found, places, strict=True) if place is None]
    if not lost:
        if not isinstance(given, Mapping):
            return old, [int(place) for place in places if place is not None]
        names = [given[old[place]] for place in places if place is not None]
        return tuple(names), list(range(len(found)))
    if isinstance(given, Mapping):
        raise ValueError(
            f"`class_names` has no new name for {lost[0]!r}. The data's names: {some(found, 5, quote=True)}."
        )
    order = _order(found) if are_numbers(found) else list(range(len(found))) if ordered else None
    if order is None or any(place is not None and place != i for place, i in zip(places, order, strict=True)):
        unknown = next(name for i, name in enumerate(old) if i not in places)
        raise ValueError(
            f"`class_names` has other names than the data ({unknown!r} is none of {some(found, 5, quote=True)}), and a list does "
            f"not say which is which. Give the old and new names: class_names={{{lost[0]!r}: {unknown!r}, ...}}."
        )
    return old, order


def _order(numbers: Sequence[str]) -> list[int] | None:
    """Returns for each number its place, if they are 0 to N - 1 or 1 to N."""
    values = [int(number) for number in numbers]
    first = min(values)
    return (
        [value - first for value in values]
        if first < 2 and sorted(values) == [*range(first, first + len(values))]
        else None
    )


# -------------------------------------------------------------------------------------------------- labels


def column_values(dataset: Dataset, column: str) -> np.ndarray:
    """Returns the (n,) values of a column of numbers or words, without touching the other columns."""
    values: np.ndarray = dataset.select_columns([column]).with_format("arrow")[:].column(column).to_numpy()
    return values


def is_string(feature: Any) -> bool:
    """Whether a column holds words."""
    return isinstance(feature, Value) and "string" in feature.dtype


def is_number(feature: Any) -> bool:
    """Whether a column holds whole numbers."""
    return isinstance(feature, Value) and "int" in feature.dtype


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


def check_other_classes(dataset: Dataset, class_names: Sequence[str]) -> None:
    """Raises a ValueError if a split with names for its labels has images of any of these classes (see `labels_by_name`)."""
    feature, labels = dataset.features["label"], np.unique(column_values(dataset, "label")).tolist()
    if not isinstance(feature, ClassLabel):
        return
    names = [feature.names[label] for label in labels]
    same = [name for name, place in zip(names, name_places(names, class_names), strict=True) if place is not None]
    if same:
        raise ValueError(
            f"Some images of no class (out_of_class) are of the class{'es' if len(same) > 1 else ''} {some(same, quote=True)}, "
            "which the classifier knows. Give images of other classes."
        )


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
