"""From images to pixels in [0, 1], the way the model's own image processor does it, and splits of a task as pixels."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..randomness import example_generator
from ..utils.files import open_regular
from .images import image_name, load_image
from .names import column_values
from .task import encoded_images

logger = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30
_DIGESTED_AT_ONCE = 32
_LONG = 10.0  # seconds after which a log line says what takes so long
MAX_RESIZED_PIXELS = 1 << 26
_NO_NORMALIZATION = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class PixelTransform:
    """Turns an image into the pixels that the model sees, in [0, 1] and before normalisation.

    Without augmentation this is the model's own image processor with `do_normalize=False`, so that
    `(pixels - mean) / std` is bit for bit what the processor would give. With augmentation it is APT's (and CoOp's): a
    random resized crop and a horizontal flip, drawn from the given generator alone. With `squash` the whole image is resized to
    the model's size whatever its shape, as FAP's code does with training images.

    Args:
        image_processor: The image processor of a model (`AutoImageProcessor`), or a processor that holds one.
        augment: Draw a random crop and flip instead of the processor's own resize and crop.
        crop_scale: Smallest and largest share of the image's area that a random crop takes, in (0, 1].
        flip: Flip half of the augmented images; turn it off where left and right matter (digits, letters).
        squash: Resize to the model's height and width without keeping the ratio of the two, and without a crop.

    Raises:
        ValueError: A processor whose output has no fixed size or is not in [0, 1] before normalisation.
        TypeError: Not an image processor.
    """

    def __init__(
        self,
        image_processor: Any,
        augment: bool = False,
        *,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
        squash: bool = False,
    ) -> None:
        image_processor = getattr(image_processor, "image_processor", image_processor)
        if not (hasattr(image_processor, "preprocess") and hasattr(image_processor, "to_dict")):
            raise TypeError(
                f"An image processor is needed, got {type(image_processor).__name__}. "
                "`transformers.AutoImageProcessor.from_pretrained` gives the one of a model."
            )
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale must be two shares of the image's area in (0, 1], ascending; got {crop_scale}."
            )
        if squash and augment:
            raise ValueError("squash and augment are two ways to bring an image to the model's size. Choose one.")
        self.image_processor = image_processor
        self.augment = augment
        self.squash = squash
        self.crop_scale = (float(crop_scale[0]), float(crop_scale[1]))
        self.flip = flip
        self._settings: dict[str, Any] = image_processor.to_dict()
        self.size = _output_size(self._settings)
        self.normalization = _normalization(self._settings)

    def __call__(self, image: Any, generator: torch.Generator | None = None) -> torch.Tensor:
        """Returns the pixels of one image.

        Args:
            image: Anything `load_image` reads.
            generator: Where the augmentation is drawn from; required with `augment=True`, not used otherwise.

        Returns:
            (3, H, W) float32 in [0, 1].

        Raises:
            ValueError: What `load_image` refuses, or an image so long that it would have more than 67 million pixels when its
                shorter side has the model's size.
        """
        name, image = image_name(image), load_image(image)
        height, width = self.size
        if self.squash:
            image = image.resize((width, height), Image.Resampling(self._settings["resample"]))
            return self._pixels(image, do_resize=False, do_center_crop=False)
        if not self.augment:
            self._check_resized(image, name)
            return self._pixels(image)
        if generator is None:
            raise ValueError("Augmentation needs a `torch.Generator`: it never draws from the global random state.")
        box = random_crop_box(image.width, image.height, self.crop_scale, generator)
        image = image.resize((width, height), Image.Resampling(self._settings["resample"]), box=box)
        if self.flip and torch.rand((), generator=generator).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._pixels(image, do_resize=False, do_center_crop=False)

    def batch(self, images: Sequence[Any], generators: Sequence[torch.Generator] | None = None) -> torch.Tensor:
        """Returns the pixels of several images, each drawn from its own generator when they are augmented.

        Returns:
            (B, 3, H, W) float32 in [0, 1].
        """
        if not len(images):
            raise ValueError("A batch needs at least one image.")
        drawn = [None] * len(images) if generators is None else generators
        return torch.stack([self(image, generator) for image, generator in zip(images, drawn, strict=True)])

    def to_dict(self) -> dict[str, Any]:
        """Returns what decides the pixels, for results: two runs with equal dictionaries saw equal images."""
        settings = self._settings
        return {
            "image_processor": settings.get("image_processor_type", type(self.image_processor).__name__),
            "backend": getattr(self.image_processor, "backend", "unknown"),
            "size": list(self.size),
            "resize": dict(settings["size"]) if settings.get("do_resize") else None,
            "center_crop": dict(settings["crop_size"]) if settings.get("do_center_crop") else None,
            "resample": Image.Resampling(settings["resample"]).name.lower(),
            "mean": list(self.normalization[0]),
            "std": list(self.normalization[1]),
            "augment": {"crop_scale": list(self.crop_scale), "flip": self.flip} if self.augment else None,
            **({"squash": True} if self.squash else {}),
        }

    def _check_resized(self, image: Image.Image, name: str) -> None:
        shorter = self._settings["size"].get("shortest_edge") if self._settings.get("do_resize") else None
        if shorter and shorter**2 * max(image.size) > MAX_RESIZED_PIXELS * min(image.size):
            raise ValueError(
                f"{name} is {image.width} x {image.height} pixels; resized so that the shorter side has {shorter}, it would take "
                f"more than {MAX_RESIZED_PIXELS:,} pixels. Crop it, or remove it."
            )

    def _pixels(self, image: Image.Image, **settings: bool) -> torch.Tensor:
        processed = self.image_processor(images=image, do_normalize=False, return_tensors="pt", **settings)
        pixels: torch.Tensor = processed["pixel_values"][0]
        return pixels


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Draws a box for a random resized crop, as torchvision's RandomResizedCrop does.

    The area is uniform in `scale`, the aspect ratio log-uniform in [3/4, 4/3]; after ten boxes that do not fit, the
    largest central one of an allowed ratio.

    Returns:
        left, top, right, bottom in pixels.
    """
    lowest, highest = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area, ratio, x, y = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = width * height * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp(lowest + ratio * (highest - lowest))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _output_size(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the height and width of everything that a processor with these settings gives out."""
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    resizes = settings.get("do_center_crop") or settings.get("do_resize")
    if not (resizes and size and size.get("height") and size.get("width")):
        raise ValueError(
            f"The image processor gives images of no fixed size (do_resize={settings.get('do_resize')}, "
            f"size={settings.get('size')}, do_center_crop={settings.get('do_center_crop')}). It must resize to a "
            "height and width, or crop the centre."
        )
    return int(size["height"]), int(size["width"])


def _normalization(settings: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and standard deviation that follow the [0, 1] pixels."""
    factor = settings.get("rescale_factor")
    if not settings.get("do_rescale") or factor is None or not math.isclose(factor * 255, 1.0, rel_tol=1e-6):
        raise ValueError(
            f"The image processor does not bring pixels to [0, 1] (do_rescale={settings.get('do_rescale')}, "
            f"rescale_factor={factor}), but epsilon is a fraction of that range. Set do_rescale=True and "
            "rescale_factor=1/255."
        )
    if not settings.get("do_normalize"):
        return _NO_NORMALIZATION
    return tuple(map(float, settings["image_mean"])), tuple(map(float, settings["image_std"]))


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
    for label, image in zip(labels, image_digests(dataset), strict=True):
        name = names[label] if names and 0 <= label < len(names) else label
        digest.update(f"{name}\0".encode() + image)
    return digest.hexdigest()[:16]


def image_digests(dataset: datasets.Dataset) -> Iterator[bytes]:
    """Yields a hash of each image of a split, as `digest_images` counts it, which tells what is raised."""
    begun: float | None = time.monotonic()
    for place, image in enumerate(_encoded(dataset)):
        yield _image_digest(image, place)
        if begun is not None and time.monotonic() - begun > _LONG:
            logger.info("Reading %d images for their hash, by which a changed one is noticed.", len(dataset))
            begun = None


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
