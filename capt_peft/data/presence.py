"""Whether a data set of the catalog lies in a folder whole, told from names of files, without opening an image."""

from __future__ import annotations

import os
from pathlib import Path

from .catalog import Entry
from .parquet import parquet_files
from .parts import split_of
from .sources import find_split_file, open_listed


def lacking(entry: Entry, root: str | Path | None) -> str:
    """Returns why a data set cannot be used, as the end of a sentence about it, or "" if nothing is known to be missing.

    Args:
        entry: The data set.
        root: CoOp's `$DATA`, the folder around the folders of all data sets; None: the Hub, which is not asked.
    """
    if root is None:
        return "" if entry.hub_id else "is not on the Hub and has to lie below --root"
    inside = [Path(root, name) for name in (entry.coop_folder, entry.name) if name]
    folder = next((path for path in inside if path.is_dir()), None)
    if folder is None:
        return f"is missing: {root} has no folder {inside[0].name}"
    try:
        split_file = find_split_file(folder)
        if split_file is not None:
            splits = open_listed(split_file)
            return _of_classes(len(next(iter(splits.values())).features["label"].names), entry, folder)
        place = entry.folder(Path(root))
        saved = any((place / name).is_file() for name in ("dataset_dict.json", "state.json"))
        why = "" if saved else _lacking_folders(entry, place)
        return "" if why and parquet_files(place) else why  # looked for last, as that takes long
    except (FileNotFoundError, ValueError) as error:
        return f"is not whole: {str(error).rstrip('.')}"


def _lacking_folders(entry: Entry, folder: Path) -> str:
    """Returns what a folder of class folders, or of split folders with these, lacks."""
    splits = {split_of(path.name): path for path in _folders(folder) if split_of(path.name)}
    if not splits:
        return _of_classes(len(list(filter(_has_files, _folders(folder)))), entry, folder)
    if not entry.test_only and "train" not in splits:
        return f"is not whole: {folder} has no training images"
    if not splits.keys() & {"test", "validation"}:
        return f"is not whole: {folder} has neither test nor validation images"
    of_each = [_of_classes(len(list(filter(_has_files, _folders(path)))), entry, path) for path in splits.values()]
    return next(filter(None, of_each), "")


def _of_classes(found: int, entry: Entry, folder: Path) -> str:
    whole = found >= entry.num_classes
    return "" if whole else f"is not whole: {folder} has images of {found:,} of its {entry.num_classes:,} classes"


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _has_files(folder: Path) -> bool:
    with os.scandir(folder) as found:
        return any(True for _ in found)
