"""PixelDataset: a split of a task as pixels, for training and evaluation."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from torch.utils.data import Dataset

from ..randomness import example_generator
from .task import column_values, encoded_images
from .transforms import PixelTransform

CACHE_BYTES = 1 << 30


class PixelDataset(Dataset[dict[str, Any]]):
    """Images as pixels in [0, 1], with their labels and places.

    Without augmentation the pixels never change, and are kept in memory while they fit into 1 GiB.

    Args:
        dataset: A split of a task: columns `image` and `label`.
        transform: Turns an image into pixels.
        seed: Seed of the augmentation.
    """

    def __init__(self, dataset: datasets.Dataset, transform: PixelTransform, seed: int = 0) -> None:
        self.dataset = encoded_images(dataset)
        self.transform = transform
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self.labels: list[int] = column_values(dataset, "label").tolist()
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
