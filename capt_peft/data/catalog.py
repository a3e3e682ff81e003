"""The published data sets that `load_task` knows by name (`catalog.yaml`), and how the labels of a copy become the catalog's."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..tuner.config import DEFAULT_TEMPLATE
from ..utils.files import read_entries
from ..utils.text import some
from .task import relabelled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A published data set: where its copies are, what their columns and splits are called, and its texts.

    Args:
        name: The name that `load_task` takes.
        title: The name in the literature.
        num_classes: The number of classes, N, as published.
        classes: Name of the file in `classes/` with the class names in the order of the labels, one per line; behind a
            tab, what the data itself calls the class where that is another word (a WordNet id, a folder).
        template: The hand-written text of a class, CoOp's where CoOp has one.
        hub_id: Dataset on the Hugging Face Hub, or None where no source confirms one of use here.
        hub_config: Its configuration, where it has several.
        image_column: Its column of images; None if it is the only one.
        label_column: Its column of labels.
        splits: Its split names, by the task's (`train`, `validation`, `test`); what is missing is made up.
        coop_folder: The folder of the data set below CoOp's `$DATA`.
        coop_split: CoOp's split file there, or the list of training images that it reads; None if CoOp has none.
        coop_images: Without a split file, the folder of class folders (or of split folders) below `coop_folder`.
        shift_of: The entry whose classes these are a part of, if this is a test set for models trained on that.
        labels_in_order: Whether a source confirms that label i of the Hub's copy is class i here; else labels are
            matched by their names alone.
        left_out: Classes of the data that CoOp, and so the catalog, leaves out.
        images: Images by the Hub's splits, where a source gives them; by CoOp's of what is not on the Hub.
        gigabytes: Size of the published archives, 10^9 bytes, where a source gives it.
        licence: What a source says of the licence.
        citation: The publication.
        sources: What was read for the above.
        note: What a user should know.
    """

    name: str
    title: str
    num_classes: int
    classes: str
    licence: str
    citation: str
    sources: tuple[str, ...]
    template: str = DEFAULT_TEMPLATE
    hub_id: str | None = None
    hub_config: str | None = None
    image_column: str | None = None
    label_column: str = "label"
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    coop_folder: str | None = None
    coop_split: str | None = None
    coop_images: str | None = None
    shift_of: str | None = None
    labels_in_order: bool = False
    left_out: tuple[str, ...] = ()
    images: str | None = None
    gigabytes: float | None = None
    note: str = ""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The N class names, in the order of the labels."""
        return tuple(names[0] for names in read_classes(self.classes))

    @property
    def counts(self) -> tuple[int, ...]:
        """The images of each split, training images first and test images last; () where no source gives them."""
        return tuple(int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", self.images or ""))

    @property
    def test_only(self) -> bool:
        """Whether there is a test split alone, as for a shift of ImageNet."""
        return set(self.splits) == {"test"}

    def folder(self, root: Path) -> Path:
        """Returns the folder to open: CoOp's in `root`, or that of the entry's name, or `root`; down to CoOp's class folders."""
        inside = (root / name for name in (self.coop_folder, self.name) if name is not None)
        root = next((folder for folder in inside if folder.is_dir()), root)
        return root / self.coop_images if self.coop_images is not None and (root / self.coop_images).is_dir() else root

    def is_coop_root(self, path: Path) -> bool:
        """Whether `path` is CoOp's folder of this data set, or its split file."""
        if self.coop_split is not None:
            return path.name == self.coop_split or (path / self.coop_split).is_file()
        return (
            path.name == self.coop_folder and self.coop_images is not None and (path / self.coop_images).is_dir()
        ) or (path.name == self.coop_images and path.parent.name == self.coop_folder)


@cache
def read_classes(name: str) -> tuple[tuple[str, ...], ...]:
    """Returns what a file of `classes/` calls each class: its name first, then the word of the data, if any."""
    text = (files(__package__) / "classes" / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(tuple(line.split("\t")) for line in text.splitlines())


def to_catalog(
    splits: Mapping[str, Dataset], found: tuple[str, ...], entry: Entry, *, ordered: bool = True
) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """Brings labelled splits to the class names of an entry, and their order.

    Names are matched by their words in any order, without case and punctuation ("AM General Hummer SUV 2000" and "2000
    AM General Hummer SUV"), or else by position where a source confirms the order. Classes that the data does not have
    are left out, so the names are as many as its classes. If a class matches nothing, all keep the names of the data.

    Args:
        splits: Datasets with the columns `image` and `label`.
        found: The class names of the data, in the order of its labels.
        entry: The entry of the catalog.
        ordered: Whether the order of `found` is the data's own, and not that of the alphabet.
    """
    places = _places(found, entry, ordered)
    unknown = [name for name, place in zip(found, places, strict=True) if place is None]
    if unknown:
        logger.warning(
            "%d of the %d classes of this copy of %s are not those of the catalog (%s), so the names and the order of "
            "the data are kept. Give `class_names` to use others.",
            *(len(unknown), len(found), entry.title, some(unknown, 5, quote=True)),
        )
        return dict(splits), found
    kept = sorted(place for place in places if place is not None and place >= 0)
    if len(kept) < entry.num_classes:
        logger.warning("This copy of %s has %d of its %d classes.", entry.title, len(kept), entry.num_classes)
    names = tuple(entry.class_names[place] for place in kept)
    lookup = np.array([kept.index(place) if place in kept else -1 for place in places], dtype=np.int64)
    return {split: relabelled(dataset, lookup, names) for split, dataset in splits.items()}, names


def _places(found: tuple[str, ...], entry: Entry, ordered: bool) -> list[int | None]:
    """Returns for each class of the data its label in the catalog, -1 if CoOp leaves it out, None if it has none."""
    index = {_words(name): place for place, names in enumerate(read_classes(entry.classes)) for name in names}
    index |= {_words(name): -1 for name in entry.left_out}
    if entry.labels_in_order and all(name.isdecimal() for name in found):  # folders called by their label
        return [int(name) if int(name) < entry.num_classes else None for name in found]
    places = [index.get(_words(name)) for name in found]
    matched = [place for place in places if place is not None and place >= 0]
    if len(set(matched)) < len(matched):
        places = [None] * len(found)
    agree = all(place is None or place == label for label, place in enumerate(places))
    if None in places and agree and ordered and entry.labels_in_order and len(found) == entry.num_classes:
        return list(range(entry.num_classes))
    return places


def _words(name: str) -> tuple[str, ...]:
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower().replace("'", "")
    return tuple(sorted(re.findall(r"[a-z0-9]+", spaced)))


CATALOG: dict[str, Entry] = {
    name: Entry(name=name, **{"classes": name, **values})
    for name, values in read_entries(files(__package__) / "catalog.yaml").items()
}


def recognize(path: Path) -> Entry | None:
    """Returns the entry whose CoOp folder (or split file) `path` is, or None."""
    return next((item for item in CATALOG.values() if item.is_coop_root(path)), None)
