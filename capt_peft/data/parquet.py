"""Parquet files: which belong to which split, each read with its own columns and class names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import hf_hub_download

from ..utils.text import some
from .folders import is_hidden
from .images import IMAGE_SUFFIXES
from .names import name_key
from .parts import Opened, Part, check_one_address, check_path, split_of

_HUB_FILE = re.compile(r"hf://datasets/([^@]+)@([^/]+)/(.+\.parquet)")


def parquet_files(path: Path) -> dict[str, list[Path]]:
    """Finds the parquet file at a path, or those in and below it, by split; all under `train` when no name tells a split.

    The split is what the name of a file begins with (`train-00000.parquet`), or that of a folder around it
    (`default/train/0000.parquet`).

    Raises:
        ValueError: Some names tell a split and others do not, or files of several configurations.
    """
    if path.is_file():
        return {_word(path) or "train": [path]} if path.suffix.lower() == ".parquet" else {}
    files = sorted(_below(path))
    placed = {file: _split_and_config(file, path) for file in files}
    configs = sorted({config or "." for _, config in placed.values()})
    if len(configs) > 1:
        raise ValueError(
            f"{path} has parquet files in several folders that are not splits: {some(configs, 5)}. Give one of these."
        )
    unknown = [file for file, (word, _) in placed.items() if word is None]
    if unknown and len(unknown) < len(files):
        raise ValueError(
            f"The name of {unknown[0]} does not begin with a split (train, validation, test), but other names there "
            "do. Rename it, or move it away."
        )
    groups: dict[str, list[Path]] = {}
    for file, (word, _) in placed.items():
        groups.setdefault(word or "train", []).append(file)
    return groups


def _below(folder: Path, top: bool = True) -> Iterator[Path]:
    """Finds the parquet files in and below a folder, but not those that lie among the images of a class folder."""
    with os.scandir(folder) as entries:
        seen = [entry for entry in entries if not is_hidden(entry.name)]
    suffixes = [os.path.splitext(entry.name)[1].lower() for entry in seen]
    images = any(suffix in IMAGE_SUFFIXES for suffix in suffixes)
    for entry, suffix in zip(seen, suffixes, strict=True):
        if entry.is_dir(follow_symlinks=False):
            if top or not images:
                yield from _below(Path(entry.path), top=False)
        elif suffix == ".parquet" and os.path.isfile(entry.path) and (top or not images or _word(Path(entry.path))):
            yield Path(entry.path)


def _word(path: Path) -> str | None:
    """Returns the word that the name of a file or folder begins with, or the name itself, if it is a split's."""
    stem = path.stem if path.suffix.lower() == ".parquet" else path.name
    word = re.split(r"[^a-z]", stem.lower().removeprefix("partial-"))[0]
    return word if split_of(word) else stem if split_of(stem) else None


def _split_and_config(file: Path, root: Path) -> tuple[str | None, str]:
    """Returns the split of a file and the folder of its configuration, as its path below `root` tells them."""
    folders = file.relative_to(root).parts[:-1]
    named = [(place, word) for place, folder in enumerate(folders) if (word := _word(Path(folder))) is not None]
    own = _word(file)
    words = {word for _, word in named} | ({own} if own else set())
    if len({split_of(word) for word in words}) > 1:
        raise ValueError(
            f"The path of {file} names several splits: {', '.join(sorted(words))}. Rename the file or its folder."
        )
    config = folders[: named[0][0]] if named else folders
    return own or (named[-1][1] if named else None), "/".join(config)


def open_parquet(files: dict[str, list[Path]]) -> Opened:
    """Opens parquet files by split, memory-mapped from the cache of `datasets`; a path is never a pattern."""
    splits: dict[str, list[Part]] = {}
    empty = []
    for split, group in files.items():
        features = {file: _features(file) for file in group}
        empty += [file for file in group if features[file] is None]
        full = [file for file in group if features[file] is not None]
        if not full:
            raise ValueError(f"{group[0]} has no rows, so the {split} split is empty. Fill it, or remove it.")
        # files of equal columns are read at once, which is faster for a thousand shards
        runs = [list(run) for _, run in groupby(full, key=lambda file: (features[file], file.parent))]
        splits[split] = [Part(_read(run), str(run[0]), run[0].parent) for run in runs]
    return Opened("parquet", splits, [f"{len(empty)} parquet files without rows: {empty[0]}"] if empty else [])


def _features(file: Path) -> Features | None:
    """Returns the columns of a parquet file as it describes them itself, or None if it has no rows."""
    check_path(file)
    check_one_address(file)
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            schema, rows = opened.schema_arrow, opened.metadata.num_rows
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} cannot be read as parquet; it may be damaged or cut short ({str(error)[:300]})."
        ) from error
    features = _columns(file, schema)
    repeated = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"{file} has two columns called {repeated!r}. Rename one.")
    return features if rows else None


def _columns(file: Path, schema: pyarrow.Schema) -> Features:
    """Returns the columns of a parquet file, or raises a ValueError that names one of a type that `datasets` does not have."""
    try:
        return Features.from_arrow_schema(schema)
    except (pyarrow.ArrowException, ValueError, TypeError, KeyError) as error:
        for field in schema:
            try:
                Features.from_arrow_schema(pyarrow.schema([field]))
            except (pyarrow.ArrowException, ValueError, TypeError, KeyError):
                raise ValueError(
                    f"Column {field.name!r} of {file} is {str(field.type)[:100]}, which `datasets` cannot read. Leave this "
                    "column out of the file, or write it as another type."
                ) from error
        raise ValueError(f"The columns of {file} cannot be read by `datasets`: {str(error)[:300]}") from error


def _read(files: list[Path]) -> Dataset:
    paths = [str(file.resolve()) for file in files]
    states = [os.stat(path) for path in paths]
    # What `datasets` keeps in its cache belongs to these: every write changes the ctime, which no one can set back.
    origins: list[Any] = [
        (path, *map(str, (s.st_mtime_ns, s.st_size, s.st_dev, s.st_ino, s.st_ctime_ns)))
        for path, s in zip(paths, states, strict=True)
    ]
    # made here, because paths that are given as such are taken for patterns
    data_files: Any = DataFilesDict({"train": DataFilesList(paths, origins)})
    try:
        return Dataset.from_parquet(data_files, split="train")
    except (DatasetGenerationError, pyarrow.ArrowException, ValueError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{files[0]} (or a file like it) cannot be read: {str(cause)[:300]}") from error


def check_hub_files(dataset: Dataset, addresses: Iterable[str]) -> None:
    """Raises a ValueError if a file that a split of the Hub was read from calls the labels something else than the split does.

    `datasets` reads all files with the columns of the first. Those that are not parquet, or not in the local cache, are not
    checked.
    """
    for address in addresses:
        file = _cached(address)
        features = _features(file) if file is not None else None
        for column, feature in (features or {}).items():
            here = dataset.features.get(column)
            if not isinstance(feature, ClassLabel) or not isinstance(here, ClassLabel):
                continue
            for label, (one, other) in enumerate(zip(feature.names, here.names, strict=False)):
                if name_key(one) != name_key(other):
                    raise ValueError(
                        f"Label {label} of column {column!r} is {one!r} in {address}, but {other!r} in the dataset. Its files "
                        "do not agree on the order of the classes. Download them and give their folder."
                    )


def _cached(address: str) -> Path | None:
    """Returns where a parquet file of the Hub lies, if it is in the local cache."""
    match = _HUB_FILE.fullmatch(address)
    if match is None:
        return Path(address) if address.endswith(".parquet") and os.path.isfile(address) else None
    try:
        repo, revision, name = match.groups()
        return Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision, local_files_only=True))
    except OSError:
        return None
