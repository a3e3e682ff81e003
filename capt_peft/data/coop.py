"""CoOp's layout of a data set: a folder of images and a `split_zhou_*.json` that says which image is what."""

from __future__ import annotations

import json
from collections.abc import Iterable
from os.path import isfile
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image

from .names import check_apart

Entries = dict[str, list[tuple[str, int, str]]]
_PROBES = 20


def find_split_file(path: Path) -> Path | None:
    """Returns the split file at `path`, or the only one in the folder `path`; None if there is none.

    Raises:
        ValueError: Several split files in the folder.
    """
    if path.is_file():
        return path if path.suffix == ".json" else None
    found = sorted(path.glob("split_zhou_*.json"))
    if len(found) > 1:
        raise ValueError(
            f"{path} has several split files: {_listed(file.name for file in found)}. Give the path of one."
        )
    return found[0] if found else None


def open_coop(split_file: Path) -> dict[str, Dataset]:
    """Opens the images that a split file lists; their folder lies beside it, under any name.

    Args:
        split_file: JSON with the keys `train`, `val` and `test`, lists of [relative path, label, class name].

    Returns:
        A `Dataset` for each split with images, with the columns `image` (a path) and `label`.

    Raises:
        ValueError: A file of another form, or labels and class names that do not match.
        FileNotFoundError: A listed image that does not exist.
    """
    splits = read_split_file(split_file)
    class_names = _class_names(splits, split_file)
    folder = _image_folder(split_file.parent, splits)
    paths = {split: [str(folder / entry[0]) for entry in entries] for split, entries in splits.items()}
    listed = [path for split in paths.values() for path in split]
    missing = [path for path in listed if not isfile(path)]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(listed)} images that {split_file} lists do not exist, the first is "
            f"{missing[0]}. Extract the whole image archive beside the split file."
        )
    features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
    return {
        split: Dataset.from_dict({"image": paths[split], "label": [entry[1] for entry in entries]}, features=features)
        for split, entries in splits.items()
    }


def read_split_file(split_file: Path) -> Entries:
    """Reads and checks a split file; splits without entries are left out."""
    try:
        content = json.loads(split_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{split_file} is not valid JSON ({error}).") from error
    lists = isinstance(content, dict) and all(isinstance(entries, list) for entries in content.values())
    if not lists or not {"train", "test"} <= set(content):
        raise ValueError(f"{split_file} is not a split file of CoOp: it must have the keys `train`, `val` and `test`.")
    for split, entries in content.items():
        wrong = next((entry for entry in entries if not _is_entry(entry)), None)
        if wrong is not None:
            raise ValueError(
                f"{split_file} has the entry {wrong!r} in {split!r}; an entry is [relative path, label, class name]."
            )
    if not any(content.values()):
        raise ValueError(f"{split_file} lists no images.")
    return {split: [tuple(entry) for entry in entries] for split, entries in content.items() if entries}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and [type(value) for value in entry] == [str, int, str]


def _class_names(splits: Entries, split_file: Path) -> list[str]:
    """Returns the class names in the order of the labels, which must be 0 to N - 1 with one name each."""
    names: dict[int, str] = {}
    for entries in splits.values():
        for path, label, name in entries:
            if names.setdefault(label, name) != name:
                raise ValueError(
                    f"{split_file} calls label {label} both {names[label]!r} and {name!r} (at {path}): its class names "
                    "do not match its labels."
                )
    if set(names) != set(range(len(names))):
        raise ValueError(f"{split_file} has the labels {_listed(sorted(names))}; they must be 0 to {len(names) - 1}.")
    ordered = [names[label] for label in range(len(names))]
    check_apart(ordered, where=str(split_file))
    return ordered


def _image_folder(root: Path, splits: Entries) -> Path:
    """Finds what the paths are relative to: `root` or one of its folders (`images`, `jpg`, `2750`, ...)."""
    entries = [path for split in splits.values() for path, _, _ in split]
    probes = entries[:: max(1, len(entries) // _PROBES)]
    candidates = [root, *sorted(folder for folder in root.iterdir() if folder.is_dir())]
    found = {folder: sum(isfile(folder / path) for path in probes) for folder in candidates}
    best = max(candidates, key=lambda folder: found[folder])
    if not found[best]:
        raise FileNotFoundError(
            f"The images of {root} are missing: the listed {probes[0]} is neither there nor in a folder of it "
            f"({_listed(folder.name for folder in candidates[1:]) or 'it has none'}). Extract the image archive there."
        )
    return best


def _listed(values: Iterable[Any]) -> str:
    shown = [str(value) for value in values]
    return ", ".join(shown[:10]) + (", ..." if len(shown) > 10 else "")
