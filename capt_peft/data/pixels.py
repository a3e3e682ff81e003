"""PixelDataset: a split of a task as pixels, for training and evaluation."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from ..randomness import example_generator
from ..utils.files import open_regular
from .names import column_values
from .task import encoded_images
from .transforms import PixelTransform

logger = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30
_DIGESTED_AT_ONCE = 32
_LONG = 10.0  # seconds after which a log line says what takes so long


class PixelDataset(Dataset[dict[str, Any]]):
    """Images as pixels in [0, 1], with their labels and places.

    Without augmentation the pixels never change, and are kept in memory while they fit into 1 GiB.

    Args:
        dataset: A split of a task: columns `image` and `label`.
        transform: Turns an image into pixels.
        seed: Seed of the augmentation.
        labels: The (n,) labels, where they are not to be those of the column `label`; see `labels_by_name`.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: PixelTransform,
        seed: int = 0,
        *,
        labels: np.ndarray | None = None,
    ) -> None:
        self.dataset = encoded_images(dataset)
        self.transform = transform
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self.labels: list[int] = (column_values(dataset, "label") if labels is None else labels).tolist()
        height, width = transform.size
        fits = len(dataset) * 3 * height * width * 4 <= CACHE_BYTES
        self._cache: dict[int, torch.Tensor] | None = {} if fits and not transform.augment else None

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Makes the augmentation of this epoch the current one; the Trainer's data loader calls it."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns `pixels` (3, H, W) float32 in [0, 1], `labels` (a class index) and `index` (the place in the split)."""
        pixels = self._cache.get(index) if self._cache is not None else None
        if pixels is None:
            generator = None
            if self.transform.augment:
                generator = example_generator(self.seed, index, epoch=int(self._epoch), stream="augmentation")
            pixels = self.transform(self.dataset[index]["image"], generator)
            if self._cache is not None:
                self._cache[index] = pixels
        return {"pixels": pixels, "labels": self.labels[index], "index": index}


def digest_images(dataset: datasets.Dataset) -> str:
    """Returns a hash of all images and labels of a split, in their order.

    An image counts by its encoded bytes, or by those of its file; a label by the name of its class where the split names them.
    Nothing is decoded: 10,000 images of 3 kB take 0.1 s, and large ones as long as reading their files.

    Args:
        dataset: A split: columns `image` and `label`.

    Raises:
        FileNotFoundError: A file is missing; it is named.
        ValueError: An image is empty, or its path is that of a folder, pipe or device.
    """
    feature = dataset.features["label"]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    labels = column_values(dataset, "label").tolist()
    digest = hashlib.sha256()
    begun: float | None = time.monotonic()
    for place, (label, image) in enumerate(zip(labels, _encoded(dataset), strict=True)):
        name = names[label] if names and 0 <= label < len(names) else label
        digest.update(f"{name}\0".encode() + _image_digest(image, place))
        if begun is not None and time.monotonic() - begun > _LONG:
            logger.info("Reading %d images for their hash, by which a changed one is noticed.", len(labels))
            begun = None
    return digest.hexdigest()[:16]


def _encoded(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """Yields the images as their bytes or path, some at a time: `dataset[index]` takes a hundred times as long."""
    batches = encoded_images(dataset).select_columns(["image"]).with_format("arrow")
    table: pa.Table
    for table in batches.iter(batch_size=_DIGESTED_AT_ONCE):
        yield from table.column("image").to_pylist()


def _image_digest(image: dict[str, Any] | None, place: int) -> bytes:
    content, path = (image or {}).get("bytes"), (image or {}).get("path")
    if content is not None:
        return hashlib.sha256(content).digest()
    if path is None:
        raise ValueError(f"Image {place} of the split is empty: it has neither bytes nor a path.")
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").digest()
