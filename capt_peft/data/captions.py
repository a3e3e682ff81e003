"""Images with captions, for retrieval: from a name, a folder, a file or the Hub."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, concatenate_datasets

from ..utils.text import shown, some
from .columns import find_column, is_image
from .names import is_string
from .parts import Part, placed_images, split_of
from .pixels import image_digests
from .sources import open_hub, open_local

CAPTIONED: dict[str, Callable[[str], CaptionedImages]] = {}  # made for a split, by name: `capt_peft.toy` adds its own
CAPTION_COLUMNS = ("caption", "captions", "text", "sentence", "sentences")  # preferred where several columns hold texts
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of folders as Datasets' `imagefolder` reads them

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionedImages:
    """Images, each with captions of its own.

    Args:
        name: A name, for tables and results.
        images: A `datasets.Dataset` of n images, with the column `image`.
        captions: The captions of each image, n tuples, none of them empty.
        source: Where they come from, as given to `load_captions`.

    Raises:
        ValueError: An image without captions, an empty caption, or another number of captions than of images.
    """

    name: str
    images: Dataset
    captions: tuple[tuple[str, ...], ...]
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.images) != len(self.captions):
            raise ValueError(
                f"{len(self.images)} images have captions for {len(self.captions)}. Give a tuple for each."
            )
        bare = [i for i, own in enumerate(self.captions) if not own or not all(_is_text(text) for text in own)]
        if bare:
            raise ValueError(
                f"{len(bare)} of the {len(self.captions)} images have no caption, or an empty one; the first is image {bare[0]}: "
                f"{shown(self.captions[bare[0]])}. Take them out."
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def texts(self) -> list[str]:
        """The m captions of all images, image by image."""
        return [text for own in self.captions for text in own]

    @property
    def owners(self) -> np.ndarray:
        """The place of the image (m,) that each of `texts` belongs to."""
        return np.repeat(np.arange(len(self)), [len(own) for own in self.captions])

    def sample(self, limit: int | None) -> CaptionedImages:
        """Returns this many of the images, drawn by seed 0; all of them for None or a larger number."""
        if limit is None or limit >= len(self):
            return self
        places = np.random.default_rng(0).permutation(len(self))[:limit].tolist()
        return self.select(places)

    def select(self, places: Sequence[int]) -> CaptionedImages:
        """Returns the images at these places, in their order, with their captions."""
        captions = tuple(self.captions[place] for place in places)
        return CaptionedImages(self.name, self.images.select(places), captions, self.source)

    def fingerprint(self) -> str:
        """Returns a hash of all images, by their encoded bytes, and captions, in their order."""
        digest = hashlib.sha256()
        for image, own in zip(image_digests(self.images), self.captions, strict=True):
            digest.update(image + "\0".join((*own, "")).encode() + b"\0")
        return digest.hexdigest()[:16]


def load_captions(
    name_or_path: str | Path,
    *,
    split: str = "test",
    name: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    revision: str | None = None,
) -> CaptionedImages:
    """Loads images with captions.

    Rows with the same image are one image with several captions. Nothing is dropped.

    Args:
        name_or_path: "captions", the toy images; a local path: a parquet file or a folder of them, what `save_to_disk` wrote, or
            a folder with a `metadata.csv` or `.jsonl` as Datasets' `imagefolder` reads it; or the id of a Hub dataset.
        split: The split, by its own name or as `load_task` knows it ("test" is also "testing" or "eval").
        name: Configuration of a Hub dataset.
        image_column: Column of the images; needed if there are several.
        caption_column: Column of the captions, each a text or a list of texts; several columns with commas. By default the only
            one with texts, or the only one called caption, captions, text, sentence or sentences.
        revision: Branch, tag or commit of a Hub dataset.

    Raises:
        FileNotFoundError: Nothing of that name, or an image file that is missing.
        ValueError: No such split or column, or images without captions.
    """
    source = str(name_or_path)
    if isinstance(name_or_path, str) and source in CAPTIONED:
        return CAPTIONED[source](split)
    path = Path(os.path.abspath(Path(source).expanduser()))
    if path.exists():
        splits = _open_metadata(path) or open_local(path).splits
    else:
        splits = open_hub(source, name, revision, list(CAPTIONED)).splits
    images, captions = [], []
    for part in _chosen(splits, split, source):
        image = find_column(part.dataset, image_column, "image", is_image, "images")
        images.append(placed_images(part, image))
        captions += _captions_in(part.dataset, caption_column)
    whole = concatenate_datasets(images)
    places, merged = _merged(image_digests(whole), captions)
    if len(places) < len(whole):
        logger.info(
            "%d rows of %s show %d images: equal images are one with several captions.", len(whole), source, len(places)
        )
        whole = whole.select(places)
    origin = f"{source}@{revision}" if revision else source
    found = CaptionedImages(
        f"{source}:{name}" if name else path.name if path.exists() else source, whole, merged, origin
    )
    logger.info("Captions %s: %d images, %d captions.", found.name, len(found), len(found.texts))
    return found


def _open_metadata(path: Path) -> dict[str, list[Part]] | None:
    """Opens a folder of images with a metadata file, at its top or in folders of splits; None if it has no such file."""
    if not path.is_dir() or not any(
        (folder / name).is_file() for folder in (path, *path.iterdir()) for name in METADATA
    ):
        return None
    loaded = datasets.load_dataset("imagefolder", data_dir=str(path))
    return {str(split): [Part(dataset)] for split, dataset in loaded.items()}


def _chosen(splits: dict[str, list[Part]], split: str, source: str) -> list[Part]:
    names = [name for name in splits if name == split] or [name for name in splits if split_of(name) == split]
    if len(names) != 1:
        raise ValueError(
            f"{source} has no split {split!r}, but {some(splits, 10, quote=True)}. Set `split` to one of them."
        )
    return splits[names[0]]


def _captions_in(dataset: Dataset, column: str | None) -> list[tuple[str, ...]]:
    """Returns the captions of each row, from one column or from several."""
    features = dataset.features
    usual = [name for name in CAPTION_COLUMNS if name in features and _holds_texts(features[name])]
    if column is None and len(usual) == 1:
        column = usual[0]
    names = [None] if column is None else [name.strip() for name in column.split(",")]
    columns = [
        find_column(dataset, name, "caption", _holds_texts, "captions (texts, or lists of them)") for name in names
    ]
    rows = [dataset.select_columns([name]).with_format("arrow")[:].column(name).to_pylist() for name in columns]
    return [
        tuple(text for cell in row for text in (cell if isinstance(cell, list) else [cell]))
        for row in zip(*rows, strict=True)
    ]


def _holds_texts(feature: Any) -> bool:
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
    return is_string(inner)


def _is_text(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())


def _merged(
    digests: Iterable[bytes], captions: Sequence[tuple[str, ...]]
) -> tuple[list[int], tuple[tuple[str, ...], ...]]:
    """Returns the place of the first row of each image, and the captions of all rows with that image."""
    first: dict[bytes, int] = {}
    merged: dict[int, tuple[str, ...]] = {}
    for place, (digest, own) in enumerate(zip(digests, captions, strict=True)):
        owner = first.setdefault(digest, place)
        merged[owner] = (*merged.get(owner, ()), *own)
    return list(merged), tuple(merged.values())
