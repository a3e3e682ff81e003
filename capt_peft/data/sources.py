"""Where images come from: the Hub, parquet files, saved datasets, folders of class folders, CoOp roots.

Each is opened as `datasets` by split, under the split names and columns that it came with. Nothing is ever written into
the user's folders; what `datasets` converts goes into its own cache.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Sequence
from os.path import isfile
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from ..utils.text import some
from .folders import open_folder
from .names import check_apart
from .parquet import check_hub_files, open_parquet, parquet_files
from .parts import Opened, Part, check_one_address, check_path, split_of

logger = logging.getLogger(__name__)

Entries = dict[str, list[tuple[str, int, str]]]  # of a split file of CoOp
AIRCRAFT = "images_variant_train.txt"  # FGVCAircraft's own lists, which CoOp reads: a line is an image and its class
_PROBES = 20  # listed images that are looked for in each folder
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def open_local(path: Path, chosen: Collection[str] = ()) -> Opened:
    """Opens a file or folder; `chosen` are names that the user called splits.

    Raises:
        ValueError: None of the layouts of `load_task`.
        FileNotFoundError: A listed image is missing.
    """
    check_path(path)
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{path} is neither a folder nor a regular file. Give one of these.")
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        check_one_address(path)
        opened = open_saved(path)
        return Opened("saved", {split: [Part(dataset, folder=path)] for split, dataset in opened.items()})
    split_file = find_split_file(path)
    if split_file is not None:
        coop = open_listed(split_file)
        return Opened("coop", {split: [Part(dataset, str(split_file))] for split, dataset in coop.items()})
    files = parquet_files(path)
    if files:
        return open_parquet(files)
    if path.is_file():
        raise ValueError(f"{path} is neither a parquet file nor a split_zhou_*.json. Give one of these, or a folder.")
    return open_folder(path, chosen)


def open_hub(name_or_path: str, name: str | None, revision: str | None, known: Sequence[str]) -> Opened:
    """Loads a dataset of the Hugging Face Hub, from the local cache where it is there; `known` are the names of the catalog.

    Raises:
        FileNotFoundError: No such dataset, or the Hub cannot be reached.
        ValueError: The Hub has it but it cannot be loaded so, as without a configuration's name.
    """
    tried = f"{name_or_path!r} is not a task of the catalog ({', '.join(known)}) and no file or folder here"
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
    check_hub_files(next(iter(loaded.values())), _hub_files(name_or_path, name, revision))
    return Opened("hub", {str(split): [Part(dataset)] for split, dataset in loaded.items()})


def _hub_files(name_or_path: str, name: str | None, revision: str | None) -> list[str]:
    """Returns the addresses of the files that a Hub dataset is read from; none where only its converted form is here."""
    try:
        files = datasets.load_dataset_builder(name_or_path, name=name, revision=revision).config.data_files
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        logger.info("The class names of the single files of %s cannot be compared: %s", name_or_path, str(error)[:300])
        return []
    return [address for split in (files or {}).values() for address in split]


def open_saved(path: Path) -> dict[str, Dataset]:
    """Opens what `save_to_disk` wrote; a lone dataset is its own split, or else `train`."""
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, DatasetDict):
        return dict(loaded)
    name = str(loaded.split)
    return {name if split_of(name) else "train": loaded}


# ------------------------------------------------------------------------------------------ CoOp's layout


def find_split_file(path: Path) -> Path | None:
    """Returns the split file at `path`, or the only one in the folder `path`; None if there is none.

    Raises:
        ValueError: Several split files in the folder.
    """
    if path.is_file():
        return path if path.suffix == ".json" or path.name == AIRCRAFT else None
    found = sorted((*path.glob("split_zhou_*.json"), *path.glob(AIRCRAFT)))
    if len(found) > 1:
        raise ValueError(
            f"{path} has several split files: {some((file.name for file in found), 10)}. Give the path of one."
        )
    return found[0] if found else None


def open_listed(split_file: Path) -> dict[str, Dataset]:
    """Opens the images that a split file names, in CoOp's form or FGVCAircraft's; see `open_coop` and `open_aircraft`."""
    return open_aircraft(split_file) if split_file.name == AIRCRAFT else open_coop(split_file)


def open_coop(split_file: Path) -> dict[str, Dataset]:
    """Opens the images that a split file lists, by split; their folder lies beside it, under any name.

    Args:
        split_file: JSON with the keys `train`, `val` and `test`, lists of [relative path, label, class name].

    Raises:
        ValueError: A file of another form, or labels and class names that do not match.
        FileNotFoundError: A listed image that does not exist.
    """
    return _listed(read_split_file(split_file), split_file)


def open_aircraft(train_list: Path) -> dict[str, Dataset]:
    """Opens the images that FGVCAircraft's lists name, by split; classes have the order of `variants.txt`.

    Args:
        train_list: `AIRCRAFT`; the lists of `val` and `test`, `variants.txt` and the folder `images` lie beside it.

    Raises:
        ValueError: A line of another form, or a class that `variants.txt` does not have.
        FileNotFoundError: A list or an image that does not exist.
    """
    labels = {name: label for label, name in enumerate(_lines(train_list.with_name("variants.txt")))}
    splits: Entries = {}
    for split in ("train", "val", "test"):
        file = train_list.with_name(AIRCRAFT.replace("train", split))
        for line in _lines(file):
            image, _, name = line.partition(" ")
            if name not in labels:
                raise ValueError(f"{file} has the line {line!r}; a line is an image and a class of variants.txt.")
            splits.setdefault(split, []).append((f"{image}.jpg", labels[name], name))
    return _listed(splits, train_list)


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist, which lists images or classes of FGVCAircraft. Put it there.")
    return file.read_text(encoding="utf-8").strip().splitlines()


def _listed(splits: Entries, split_file: Path) -> dict[str, Dataset]:
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
        for entry in entries:
            if not isinstance(entry, list) or [type(value) for value in entry] != [str, int, str]:
                raise ValueError(
                    f"{split_file} has the entry {entry!r} in {split!r}; an entry is [relative path, label, class name]."
                )
    if not any(content.values()):
        raise ValueError(f"{split_file} lists no images.")
    return {split: [tuple(entry) for entry in entries] for split, entries in content.items() if entries}


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
        raise ValueError(f"{split_file} has the labels {some(sorted(names), 10)}; they must be 0 to {len(names) - 1}.")
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
            f"({some((folder.name for folder in candidates[1:]), 10) or 'it has none'}). Extract the image archive there."
        )
    return best
