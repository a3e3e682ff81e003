"""Class names: their order, and which of the given names is which of the data's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .task import alike_names, check_class_names, name_places

ClassNames = Sequence[str] | Mapping[str, str]


def in_class_order(names: Iterable[str]) -> list[str]:
    """Returns the names in the order of their labels: numbers by their value, anything else as text."""
    ordered = sorted(set(names))
    return sorted(ordered, key=int) if are_numbers(ordered) else ordered


def are_numbers(names: Sequence[str]) -> bool:
    """Whether the names are whole numbers, as of folders that are called by their label."""
    return all(name.isdecimal() and len(name) < 20 for name in names)


def check_given(class_names: ClassNames) -> ClassNames:
    """Returns class names as given to `load_task`, checked without the data.

    Raises:
        ValueError: Fewer than two, empty ones, some that are alike, or no order, as in a set.
    """
    if not isinstance(class_names, Mapping):
        check_class_names(class_names)
        return tuple(class_names)
    check_class_names(tuple(class_names.values()))
    return {str(old): new for old, new in class_names.items()}


def renamed(found: Sequence[str], given: ClassNames, *, ordered: bool = False) -> tuple[tuple[str, ...], list[int]]:
    """Matches given class names with those of the data.

    Args:
        found: The N names of the data, in the order of its labels.
        given: A mapping from the data's names to others. Or a list: of the same names, in any order; or, where the data's
            names are the numbers 0 to N - 1 or 1 to N, or `ordered`, of other names in this order.
        ordered: Whether the order of the data's classes is published, so that a list of other names can follow it.

    Returns:
        The N names in the order of the new labels, and for each label of the data its new label.

    Raises:
        ValueError: Names that leave open which is which.
    """
    if len(given) != len(found):
        raise ValueError(
            f"The class names do not match the labels: {len(given)} names are given for {len(found)} classes "
            f"({_listed(found)}). Give one name for each class."
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
        raise ValueError(f"`class_names` has no new name for {lost[0]!r}. The data's names: {_listed(found)}.")
    order = _order(found) if are_numbers(found) else list(range(len(found))) if ordered else None
    if order is None or any(place is not None and place != i for place, i in zip(places, order, strict=True)):
        unknown = next(name for i, name in enumerate(old) if i not in places)
        raise ValueError(
            f"`class_names` has other names than the data ({unknown!r} is none of {_listed(found)}), and a list does not say "
            f"which is which. Give the old and new names: class_names={{{lost[0]!r}: {unknown!r}, ...}}."
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


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name[:40]) for name in names[:5]) + (", ..." if len(names) > 5 else "")


def check_apart(names: Sequence[str], called: Sequence[str] | None = None, where: str = "The data") -> None:
    """Raises a ValueError that names both, if two names of the data are one class name.

    Args:
        names: The class names as the data has them.
        called: What to call each in the message; by default the name itself.
        where: Where they come from.
    """
    alike = alike_names(names)
    if alike is not None:
        one, other = (called[i] if called is not None else repr(names[i]) for i in alike)
        raise ValueError(
            f"{where} has two classes of one name, {one} and {other} (case, underscores, white space and Unicode's form do not "
            "count). Rename one, or put their images together."
        )
