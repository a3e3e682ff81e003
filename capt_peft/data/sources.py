"""Where images come from: the Hub, parquet files, saved datasets, folders of class folders, CoOp roots.

Each is opened as `datasets` by split, under the split names and columns that it came with. Nothing is ever written into
the user's folders; what `datasets` converts goes into its own cache.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict

from .coop import find_split_file, open_coop
from .folders import open_folder
from .parquet import check_hub_files, open_parquet, parquet_files
from .parts import Opened, Part, check_one_address, check_path
from .splits import split_of

logger = logging.getLogger(__name__)

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
        coop = open_coop(split_file)
        return Opened("coop", {split: [Part(dataset, str(split_file))] for split, dataset in coop.items()})
    files = parquet_files(path)
    if files:
        return open_parquet(files)
    if path.is_file():
        raise ValueError(f"{path} is neither a parquet file nor a split_zhou_*.json. Give one of these, or a folder.")
    return open_folder(path, chosen)


def open_hub(name_or_path: str, name: str | None, revision: str | None, known: Sequence[str]) -> Opened:
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
