"""From a name, a folder or a file to a `Task`: which splits, which columns, which class names."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from ..tuner.config import DEFAULT_TEMPLATE
from ..utils.text import some
from .catalog import CATALOG, Entry, recognize, to_catalog
from .columns import label_splits, rename_classes
from .images import check_image
from .names import ClassNames, check_given, column_values, is_number
from .parts import Opened, Splits, choose_splits, first_part
from .sampling import sample_shots, stratified_split
from .sources import open_hub, open_local
from .task import SPLITS, Task, encoded_images, kind_of, one_line, without_images
from .texts import ClassTexts, Template, read_class_texts, read_template

logger = logging.getLogger(__name__)

MADE: dict[str, Callable[[int], Task]] = {}  # tasks that are made from a seed, by name: `capt_peft.toy` adds its own
COOP_FRACTIONS = (0.5, 0.2, 0.3)
VALIDATION_FRACTION = 0.2
MAX_VALIDATION_PER_CLASS = 50
MAX_CHECKED_IMAGES = 5000


def load_task(
    name_or_path: str | Path,
    *,
    root: str | Path | None = None,
    name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: ClassNames | None = None,
    template: Template | None = None,
    class_texts: ClassTexts | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> Task:
    """Loads labelled images as a task.

    Labels go by name: every image keeps the class name that its own file or folder gives it, whatever order another file
    lists the names in. What was read is logged, and what was left out (hidden files, other formats); `Task.summary` shows it.

    Splits are found by their names (`train`/`training`, `validation`/`val`/`valid`/`dev`, `test`/`testing`/`eval`; case, digits
    and words such as `set` do not count).
    What is missing is made up, and logged: without a test split the validation split is the test split; with training
    images alone they are split 50/20/30 as CoOp does; a missing validation split is a fifth of the training images of
    each class, at most 50. All of it is stratified and drawn by `seed`.

    Args:
        name_or_path: In this order: a name of `list_tasks()`; a local path (`./digits` is a path, `digits` a name);
            the id of a Hub dataset. A path is a folder of class folders, with or without split folders around them; a
            parquet file, or a folder of them, where their names or folders begin with their split; what `save_to_disk` wrote;
            or a CoOp root with its `split_zhou_*.json` (or that file). A name of `CATALOG` is loaded from its Hub dataset,
            with its columns, splits, class names and template, which also serve CoOp's own folders (`docs/datasets.md`).
        root: Where a data set of `CATALOG` lies locally: its folder, in CoOp's layout or another, or the folder around that, as
            CoOp's `$DATA`. With another name, what has that name in `root` is loaded.
        name: Configuration of a Hub dataset.
        image_column: Column of the images; needed if there are several.
        label_column: Column of the labels; needed if there is no or more than one `ClassLabel`. A column of strings
            gives the class names itself, sorted (numbers by their value); a column of whole numbers needs `class_names`.
        class_names: Class names instead of those in the data, in the order that the labels shall have. A list of the data's
            own names is matched by name; a list of others is taken in order only where the labels are numbers, or where their
            order is published; else give a mapping from old to new names. Names that come from the data have their
            underscores turned into spaces; these stay as they are.
        template: Text of a class, with one `{}`; `a photo of a {}.` unless the catalog has a better one. Several: a list,
            a text file, or the name of a published set; see `Task`.
        class_texts: Own texts, by class name, or a JSON file of them; see `Task`.
        train_split: Name of the split to train on, where its name does not tell.
        validation_split: Likewise, to choose settings on.
        test_split: Likewise, to measure accuracy on.
        seed: An integer of at least 0: draws the splits that are missing, and the images of drawn tasks; those of `digits` are
            fixed.
        revision: Branch, tag or commit of a Hub dataset.

    Returns:
        A task whose splits have the columns `image` and `label`.

    Raises:
        TypeError: A data set instead of a name or path.
        FileNotFoundError: Nothing of that name, or an image file that is missing.
        ValueError: Columns, labels, class names, splits or image files that do not make a task.
    """
    if not isinstance(name_or_path, str | Path):
        raise TypeError(
            f"load_task takes a name, a path or a Hub id, not {kind_of(name_or_path)}. A datasets.Dataset with the columns "
            "`image` and `label` becomes a task by Task(name, class_names, {'train': dataset})."
        )
    template = None if template is None else read_template(template)
    class_texts = read_class_texts(class_texts)
    if class_names is not None:
        class_names = check_given(class_names)
    source, given = str(name_or_path), {"train": train_split, "validation": validation_split, "test": test_split}
    columns = {"image_column": image_column, "label_column": label_column}
    if isinstance(name_or_path, str) and source in MADE:
        _refuse(source, root=root, name=name, revision=revision, **columns, **given)
        return _customized(MADE[source](seed), class_names, template, class_texts)
    entry = CATALOG.get(source) if isinstance(name_or_path, str) else None
    path = _local_path(source, root, entry)
    if path is None:
        opened = _open_hub(source, entry, name, revision)
    else:
        _refuse(str(path), name=name, revision=revision)
        entry = entry or recognize(path)
        opened = open_local(
            entry.folder(path) if entry is not None else path, [name for name in given.values() if name is not None]
        )
    if opened.kind == "folder":
        columns["label_column"] = label_column or "label"
    splits, found_names, left_out = _labelled(entry, opened, columns, given, class_names)
    origin = str(path) if root is not None else entry.hub_id if entry is not None and path is None else source
    task = Task(
        name=_task_name(source, path if root is None else None, name),
        class_names=found_names,
        splits=_complete(splits, seed),
        template=template or (entry.template if entry is not None else DEFAULT_TEMPLATE),
        source=f"{origin}@{revision}" if revision else str(origin),
        left_out=tuple(left_out),
        class_texts=class_texts,
    )
    if opened.kind in ("folder", "coop") and sum(map(len, task.splits.values())) <= MAX_CHECKED_IMAGES:
        check_images(task)
    logger.info("Task %s: %s.", task.name, one_line(task.counts()))
    empty = without_images(task.class_names, task.counts())
    if empty:
        logger.warning("Task %s has %s.", task.name, "; ".join(empty))
    if left_out:
        logger.warning("Left out of task %s: %s.", task.name, "; ".join(left_out))
    return task


def list_tasks() -> list[str]:
    """Returns the names that `load_task` knows: first those without a network or files, then those of `CATALOG`."""
    return [*MADE, *CATALOG]


def check_images(task: Task, splits: Iterable[str] | None = None) -> None:
    """Opens every image of a task, so that a damaged one is found before training and not in the middle of it.

    `load_task` does this by itself for image files, unless there are more than 5,000.

    Args:
        task: The task.
        splits: Names of the splits to check; all by default.

    Raises:
        FileNotFoundError: An image file that does not exist.
        ValueError: An image that cannot be read. Either message names the file and says how many there are.
    """
    for split in task.splits if splits is None else splits:
        errors: list[Exception] = []
        with ThreadPoolExecutor() as pool:
            for batch in encoded_images(task[split]).iter(batch_size=256):
                errors += [error for error in pool.map(_problem, batch["image"]) if error is not None]
        if errors:
            message = f"{len(errors)} of the {len(task[split])} images of split {split!r} cannot be used. {errors[0]}"
            raise type(errors[0])(message) from errors[0]


def _problem(image: Any) -> FileNotFoundError | ValueError | None:
    try:
        check_image(image)
    except (FileNotFoundError, ValueError) as error:
        return error
    return None


def _local_path(source: str, root: str | Path | None, entry: Entry | None) -> Path | None:
    """Returns what to open locally, or None for the Hub."""
    if root is not None and not Path(root).expanduser().exists():
        raise FileNotFoundError(f"The root {str(root)!r} of {source!r} does not exist. Check the path.")
    if root is not None and entry is None:
        inside = Path(os.path.abspath(Path(root).expanduser())) / source
        if source == inside.name and inside.exists():
            return inside
        near = " or ".join(difflib.get_close_matches(source.lower(), CATALOG, 3, 0.5))
        raise ValueError(
            f"`root` says where a data set of the catalog lies ({', '.join(CATALOG)}), and {source!r} is not one of them, nor is "
            f"there anything of that name in {root}.{f' Did you mean {near}?' if near else ''} Give its path as the first "
            "argument."
        )
    if entry is not None and root is None:
        return None
    path = Path(os.path.abspath(Path(source if root is None else root).expanduser()))
    return path if path.exists() else None


def _open_hub(source: str, entry: Entry | None, name: str | None, revision: str | None) -> Opened:
    if entry is None:
        return open_hub(source, name, revision, list_tasks())
    if entry.hub_id is None:
        raise FileNotFoundError(
            f"The catalog knows no Hub dataset of {entry.title}. {entry.note} Give `root`, the folder it lies in."
        )
    try:
        return open_hub(entry.hub_id, name or entry.hub_config, revision, list_tasks())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{entry.title} could not be loaded from the Hub as {entry.hub_id}: {error.__cause__}. Check the network, "
            "and on the dataset's page whether it asks for consent; or give `root`, the folder of a local copy."
        ) from error


def _labelled(
    entry: Entry | None,
    opened: Opened,
    columns: Mapping[str, str | None],
    given: Mapping[str, str | None],
    class_names: ClassNames | None,
) -> tuple[dict[str, Dataset], tuple[str, ...], list[str]]:
    """Returns the task's splits, class names and what was left out, by the settings given or else by the entry."""
    if entry is not None:
        columns, given = _entry_settings(entry, opened.splits, columns, given)
    chosen, unused = choose_splits(opened.splits, given)
    left_out = [*opened.left_out, *unused]
    feature = first_part(chosen).dataset.features.get(columns["label_column"])
    numbered = is_number(feature)
    if numbered and class_names is not None:
        return *label_splits(chosen, **columns, class_names=_in_number_order(class_names)), left_out
    if entry is None:
        splits, names = label_splits(chosen, **columns)
        ordered = False
    else:
        known = entry.class_names if numbered and entry.labels_in_order else None
        splits, names = label_splits(chosen, **columns, class_names=known)
        images = sum(map(len, splits.values()))
        ordered = isinstance(feature, ClassLabel) or numbered
        splits, names = to_catalog(splits, names, entry, ordered=ordered)
        dropped = images - sum(map(len, splits.values()))
        left_out += [f"{dropped:,} images of {', '.join(entry.left_out)}, which CoOp leaves out"] if dropped else []
        ordered = names == entry.class_names
    if class_names is not None:
        splits, names = rename_classes(splits, names, class_names, ordered=ordered)
    return splits, names, left_out


def _in_number_order(class_names: ClassNames) -> tuple[str, ...]:
    """Returns the names of whole numbers by number."""
    if not isinstance(class_names, Mapping):
        return tuple(class_names)
    numbers = [str(number) for number in range(len(class_names))]
    if set(class_names) != set(numbers):
        raise ValueError(
            f"The labels are whole numbers, so `class_names` needs a name for each of 0 to {len(numbers) - 1}; it has "
            f"{some(class_names, 5, quote=True)}."
        )
    return tuple(class_names[number] for number in numbers)


def _entry_settings(
    entry: Entry, available: Splits, columns: Mapping[str, str | None], given: Mapping[str, str | None]
) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """Returns the columns and splits to use: those given, or else the entry's, where the data has them."""
    present = set(first_part(available).dataset.column_names)
    chosen = dict(columns)
    for key, column in (("image_column", entry.image_column), ("label_column", entry.label_column)):
        if chosen[key] is None and column in present:
            chosen[key] = column
    if any(given.values()):
        return chosen, dict(given)
    if entry.test_only and len(available) == 1:
        return chosen, {"test": next(iter(available))}
    return chosen, {split: name for split, name in entry.splits.items() if name in available}


def _task_name(source: str, path: Path | None, config: str | None) -> str:
    if path is None:
        return f"{source}:{config}" if config else source
    if path.is_dir():
        return path.name
    return path.parent.name if path.suffix in (".json", ".txt") else path.stem


def _refuse(source: str, **settings: Any) -> None:
    given = [key if key not in SPLITS else f"{key}_split" for key, value in settings.items() if value is not None]
    if given:
        raise ValueError(f"{source!r} is local or in the catalog and takes no {' or '.join(given)}. Leave it out.")


def _customized(
    task: Task, class_names: ClassNames | None, template: Template | None, class_texts: ClassTexts | None
) -> Task:
    """Returns the task with other class names, another template or own texts, where they are given."""
    if class_names is not None:
        splits, names = rename_classes(task.splits, task.class_names, class_names, ordered=True)
        task = replace(task, class_names=names, splits=splits)
    template = task.template if template is None else template
    return replace(task, template=template, class_texts=task.class_texts if class_texts is None else class_texts)


def _complete(splits: dict[str, Dataset], seed: int) -> dict[str, Dataset]:
    """Makes up the splits that are missing, as `load_task` documents."""
    splits = dict(splits)
    if "test" not in splits and "validation" in splits:
        logger.warning("There is no test split, so the validation split serves as one.")
        splits["test"] = splits.pop("validation")
    if "train" in splits and "validation" not in splits:
        train, labels = splits["train"], column_values(splits["train"], "label")
        if "test" not in splits:
            logger.warning("There is no split but the training images: they are split 50/20/30 by seed %d.", seed)
            parts = stratified_split(labels, COOP_FRACTIONS, seed)
        else:
            logger.info("There is no validation split, so a part of the training images becomes one, by seed %d.", seed)
            held_out = np.array(stratified_split(labels, (1 - VALIDATION_FRACTION, VALIDATION_FRACTION), seed)[1], int)
            few = sample_shots(labels[held_out], MAX_VALIDATION_PER_CLASS, seed, allow_fewer=True)
            parts = [np.setdiff1d(np.arange(len(labels)), held_out[few]).tolist(), held_out[few].tolist()]
        # Classes with a single image leave the other parts empty; such a part is no split.
        splits |= {split: train.select(part) for split, part in zip(SPLITS, parts, strict=False) if part}
    return {split: splits[split] for split in SPLITS if split in splits}
