"""Which split is which, by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .parts import Part, Splits
from .task import SPLITS

SPLIT_NAMES = {
    "train": ("train", "training", "trainval"),
    "validation": ("validation", "val", "valid", "dev", "validate"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ALIASES = {alias: split for split, aliases in SPLIT_NAMES.items() for alias in aliases}
_FILLERS = {"set", "data", "dataset", "split", "images", "image", "imgs", "img", "seg", "partial"}


def split_of(name: str) -> str | None:
    """Returns the split (`train`, `validation` or `test`) that a name stands for, or None.

    Case, digits and words that say nothing do not count: `training_set`, `seg_train`, `val2017`, `Test-images`.
    """
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word and word not in _FILLERS]
    if len(words) != 1 or not name.isascii():
        return None
    return _ALIASES.get(words[0]) or _ALIASES.get(re.sub("(set|data)$", "", words[0]))


def choose_splits(
    available: Mapping[str, list[Part]], given: Mapping[str, str | None]
) -> tuple[dict[str, list[Part]], list[str]]:
    """Returns which of the available splits is which, by the names given or else by alias, and a note of those not used."""
    listed = ", ".join(available)
    chosen = {split: name for split, name in given.items() if name is not None}
    for split, name in chosen.items():
        if name not in available:
            raise ValueError(f"There is no split {name!r} for `{split}_split`. Available: {listed}.")
    if len(set(chosen.values())) < len(chosen):
        raise ValueError(f"One split cannot serve twice, got {chosen}: accuracy would be measured on training images.")
    for split in SPLITS:
        names = [name for name in available if split_of(name) == split and name not in chosen.values()]
        if split in chosen or not names:
            continue
        if len(names) > 1:
            raise ValueError(f"Several splits could be the {split} split: {', '.join(names)}. Set `{split}_split`.")
        chosen[split] = names[0]
    if not chosen and len(available) > 1:
        raise ValueError(f"The split names do not tell which is which: {listed}. Set `train_split` and `test_split`.")
    chosen = chosen or {"train": next(iter(available))}
    for name in chosen.values():
        if not count(available[name]):
            raise ValueError(f"Split {name!r} is empty. Give another one, or remove it.")
    unused = [f"{name!r} ({count(available[name]):,} images)" for name in available if name not in chosen.values()]
    notes = [f"splits that are not used: {', '.join(unused)}"] if unused else []
    return {split: available[chosen[split]] for split in SPLITS if split in chosen}, notes


def count(parts: Sequence[Part]) -> int:
    """Returns the number of images of a split."""
    return sum(len(part.dataset) for part in parts)


def first_part(splits: Splits) -> Part:
    """Returns the part that decides over columns and class names: the first of the first split."""
    return next(iter(splits.values()))[0]
