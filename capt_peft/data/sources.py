"""Where images come from: the Hub, parquet files, saved datasets, folders of class folders, CoOp roots.

Each is opened as `datasets` by split, under the split names and columns that it came with. Nothing is ever written into
the user's folders; what `datasets` converts goes into its own cache.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, Value

from .coop import find_split_file, open_coop
from .images import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval"),
}
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def split_of(name: str) -> str | None:
    """Returns the split (`train`, `validation` or `test`) that `name` is an alias of, or None."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def open_local(path: Path) -> tuple[str, dict[str, Dataset]]:
    """Opens a file or folder.

    Returns:
        The kind of source (`saved`, `coop`, `parquet` or `folder`) and its splits.

    Raises:
        ValueError: None of these layouts.
        FileNotFoundError: A listed image is missing.
    """
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return "saved", open_saved(path)
    split_file = find_split_file(path)
    if split_file is not None:
        return "coop", open_coop(split_file)
    files = parquet_files(path)
    if files:
        return "parquet", open_parquet(files)
    if path.is_file():
        raise ValueError(f"{path} is neither a parquet file nor a split_zhou_*.json. Give one of these, or a folder.")
    return "folder", open_folder(path)


def open_hub(name_or_path: str, name: str | None, revision: str | None, known: Sequence[str]) -> dict[str, Dataset]:
    """Loads a dataset of the Hugging Face Hub, from the local cache where it is there.

    Args:
        name_or_path: What the user gave, which is neither in the catalog nor a local path.
        name: Configuration of the dataset.
        revision: Branch, tag or commit.
        known: The names of the catalog, for the error.

    Raises:
        FileNotFoundError: No such dataset, or the Hub cannot be reached.
        ValueError: The Hub has it but it cannot be loaded so, as without a configuration's name.
    """
    tried = f"{name_or_path!r} is no task of the catalog ({', '.join(known)}) and no file or folder here"
    if not _HUB_ID.fullmatch(name_or_path):
        raise FileNotFoundError(f"{tried}. Check the path.")
    try:
        loaded = datasets.load_dataset(name_or_path, name=name, revision=revision)
    except OSError as error:
        raise FileNotFoundError(
            f"{tried}, and loading it from the Hugging Face Hub failed: {error}. Check the name, and the network: "
            "without one, only the catalog, local files and cached datasets can be loaded."
        ) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"The Hub dataset {name_or_path!r} (name={name!r}, revision={revision!r}) cannot be loaded: {error}"
        ) from error
    return dict(loaded)


def open_saved(path: Path) -> dict[str, Dataset]:
    """Opens what `save_to_disk` wrote; a lone dataset is its own split, or else `train`."""
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, DatasetDict):
        return dict(loaded)
    name = str(loaded.split)
    return {name if split_of(name) else "train": loaded}


def parquet_files(path: Path) -> dict[str, list[Path]]:
    """Finds parquet files and groups them by the split that their names begin with (`train-00000.parquet`).

    Args:
        path: A parquet file, or a folder that has some, or whose only folder with some has.

    Returns:
        Files by split; all under `train` when no name tells a split. Empty if there are none.

    Raises:
        ValueError: Some names tell a split and others do not.
    """
    if path.is_file():
        return {"train": [path]} if path.suffix == ".parquet" else {}
    files = sorted(path.glob("*.parquet"))
    if not files:
        below = {file.parent for file in path.glob("*/*.parquet")}
        files = sorted(below.pop().glob("*.parquet")) if len(below) == 1 else []
    words = {file: re.split(r"[^A-Za-z]", file.stem)[0] for file in files}
    unknown = [file for file, word in words.items() if split_of(word) is None]
    if unknown and len(unknown) < len(files):
        raise ValueError(
            f"The name of {unknown[0]} does not begin with a split (train, validation, test), but other names there "
            "do. Rename it, or move it away."
        )
    groups: dict[str, list[Path]] = {}
    for file, word in words.items():
        groups.setdefault("train" if unknown else word.lower(), []).append(file)
    return groups


def open_parquet(files: dict[str, list[Path]]) -> dict[str, Dataset]:
    """Opens parquet files by split, memory-mapped from the cache of `datasets`."""
    for file in (file for group in files.values() for file in group):
        try:
            pyarrow.parquet.read_schema(file)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{file} cannot be read as parquet; it may be damaged or cut short ({error}).") from error
    data_files = {split: [str(file.resolve()) for file in group] for split, group in files.items()}
    return dict(datasets.load_dataset("parquet", data_files=data_files))


def open_folder(root: Path) -> dict[str, Dataset]:
    """Opens a folder of class folders, or a folder of split folders of class folders.

    Returns:
        Splits with the columns `image` (a path) and `label` (the name of the class folder).

    Raises:
        ValueError: No class folders, a class folder without images, or a split folder without class folders.
    """
    splits = {folder.name: folder for folder in _folders(root) if split_of(folder.name)}
    # A folder named `test` that has images and siblings that are classes is a class itself.
    if not any(_folders(folder) for folder in splits.values()):
        return {"train": _open_class_folders(root)}
    flat = [folder for folder in splits.values() if not _folders(folder)]
    if flat:
        raise ValueError(
            f"The split folder {flat[0]} has no class folders, so its images have no labels. Move it away."
        )
    others = [folder.name for folder in _folders(root) if folder.name not in splits]
    if others:
        logger.warning("Only the split folders of %s are read; left out: %s.", root, ", ".join(others))
    return {name: _open_class_folders(folder) for name, folder in splits.items()}


def _open_class_folders(root: Path) -> Dataset:
    folders = _folders(root)
    if not folders:
        raise ValueError(
            f"{root} has no class folders. A folder of images needs a folder for each class (root/cat/1.png), or "
            "train, validation and test folders of these."
        )
    paths: list[str] = []
    labels: list[str] = []
    for folder in folders:
        found = _images(folder)
        if not found:
            raise ValueError(
                f"The class folder {folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}). Fill it or remove it."
            )
        paths += found
        labels += [folder.name] * len(found)
    return Dataset.from_dict(
        {"image": paths, "label": labels}, features=Features({"image": datasets.Image(), "label": Value("string")})
    )


def _folders(root: Path) -> list[Path]:
    """Returns the folders in `root` by name, without hidden ones and those that systems leave (`__MACOSX`)."""
    return sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith((".", "__")))


def _images(folder: Path) -> list[str]:
    return sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder)
        for file in files
        if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and not file.startswith(".")
    )
