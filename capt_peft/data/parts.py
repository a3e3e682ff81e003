"""What a source of images gives: splits in parts that keep their own columns, which split is which, what was left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import fspath
from os.path import isabs, isfile, join
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from ..utils.versions import small_bytes
from .images import printable
from .task import SPLITS, encoded_images


@dataclass(frozen=True)
class Part:
    """A part of a split: images and labels, in any columns, which are what its own files say."""

    dataset: Dataset
    where: str = ""  # the file that it comes from, for messages; empty where the split's name says enough
    folder: Path | None = None  # what image paths are relative to, if anything says so

    def called(self, split: str) -> str:
        """Returns what to call this part in a message."""
        return self.where or f"The {split} split"


Splits = Mapping[str, Sequence[Part]]


@dataclass(frozen=True)
class Opened:
    """An opened source: its parts by split, under the split names that it came with."""

    kind: str  # "hub", "saved", "coop", "parquet" or "folder"
    splits: dict[str, list[Part]]
    left_out: list[str] = field(default_factory=list)  # a sentence for each kind of thing


def check_path(path: Path) -> None:
    """Raises a ValueError for a path that `datasets` would not take as it is."""
    try:
        fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"The name of {printable(path)} is not UTF-8 and cannot be stored. Rename it.") from None


def check_one_address(path: Path) -> None:
    """Raises a ValueError for a path with `::`, which `datasets` takes for a chain of addresses."""
    if "::" in fspath(path):
        raise ValueError(f"{path} has '::' in its path, which `datasets` takes for a chain of addresses. Rename it.")


def placed_images(part: Part, column: str) -> Dataset:
    """Returns the dataset of a part with `image` alone: the images of `column`, whose relative paths are made absolute.

    Raises:
        ValueError: A relative path, and nothing that says what it is relative to.
        FileNotFoundError: An image file that does not exist.
    """
    dataset = part.dataset.select_columns([column])
    if column != "image":
        dataset = dataset.rename_column(column, "image")
    # Not `cast`, which would write a copy of the images beside those of a saved dataset.
    dataset = small_bytes(dataset, "image").cast_column("image", Image())
    table = encoded_images(dataset).with_format("arrow")[:]
    chunks = table.column("image").chunks
    paths = [path for chunk in chunks if chunk.field("bytes").null_count for path in chunk.field("path").to_pylist()]
    if all(path is None or isabs(path) for path in paths):
        return dataset
    rows = [_placed(row, part) for chunk in chunks for row in chunk.to_pylist()]
    dataset = dataset.add_column("placed", rows, feature=Image())
    return dataset.select_columns(["placed"]).rename_column("placed", "image")


def _placed(row: dict[str, Any] | None, part: Part) -> dict[str, Any] | None:
    if row is None or row["bytes"] is not None or not row["path"]:
        return row
    if part.folder is None and not isabs(row["path"]):
        raise ValueError(
            f"The data lists the image {row['path']!r}, and nothing says which folder that is relative to."
        )
    path = join(part.folder or "", row["path"])
    if not isfile(path):
        raise FileNotFoundError(
            f"{part.where or 'The data'} lists the image {row['path']!r}, and there is no file {path}. Put the images "
            "there; nothing is downloaded."
        )
    return {"bytes": None, "path": path}


# -------------------------------------------------------------------------------------------------- splits

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
