"""The 15 common corruptions of Hendrycks & Dietterich (2019, arXiv 1903.12261), at 5 severities, on numpy and Pillow.

Parameters are the published ones: those of CIFAR-10-C for images whose shorter side is below 85 pixels, those of ImageNet-C for
larger ones (85 is midway between 32 and 224). Lengths in pixels are those for 32 and for 224 pixels, and only what the authors
give as a share of the side grows with it. Where the result differs from the authors':

- frost lies over the image as a drawn texture of crystals; the authors' comes from photographs;
- motion blur, also of snow, is computed here with the kernel of ImageMagick, on floats, and not by ImageMagick;
- results are rounded to 8 bits, not cut, and are not saved as JPEG afterwards, as ImageNet-C's are;
- random numbers depend on the image, the kind, the severity and the seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from typing import Any
from zlib import crc32

import numpy as np
from datasets import Dataset
from PIL import Image, ImageOps

from .images import load_image
from .task import Task, encoded_images, task_features

Array = np.ndarray[Any, np.dtype[np.float64]]
SEVERITIES = (1, 2, 3, 4, 5)
SMALL, LARGE = 32, 224  # the sides that the parameters are published for
_LIMIT = math.sqrt(SMALL * LARGE)
_RESIZED = 256  # ImageNet-C's shorter side before the centre is cut out


def corrupt(image: Image.Image, kind: str, severity: int, seed: int = 0) -> Image.Image:
    """Returns an image with a common corruption, of the same size.

    Args:
        image: Of mode RGB, at the size at which a model sees it.
        kind: One of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: An integer of at least 0; an image gets the same corruption for the same seed, wherever it lies.

    Raises:
        ValueError: An unknown kind, or a severity out of range.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"Unknown corruption {kind!r}. Allowed: {', '.join(CORRUPTIONS)}.")
    if severity not in SEVERITIES:
        raise ValueError(f"severity={severity!r} of {kind} must be a whole number from 1 to 5.")
    function, small, large = CORRUPTIONS[kind]
    pixels = np.asarray(image)
    rng = np.random.default_rng([seed, crc32(pixels.tobytes()), *pixels.shape[:2], crc32(kind.encode()), severity])
    strength = (small if min(image.size) < _LIMIT else large)[severity - 1]
    if kind in ("pixelate", "jpeg_compression"):  # these are Pillow's own
        result: Image.Image = function(image, strength)
        return result
    corrupted = function(pixels / 255, strength, rng)
    return Image.fromarray((corrupted.clip(0, 1) * 255).round().astype(np.uint8))


def corrupted(task: Task, kind: str, severity: int, seed: int = 0) -> Task:
    """Returns a shift of a task: its test images with a common corruption, named such as "digits-fog-3".

    Images are first brought to the size that the parameters are published for: a square of 32 pixels where the shorter side is
    below 85, else the central 224 x 224 after resizing the shorter side to 256.

    Args:
        task: With a test split.
        kind: One of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: An integer of at least 0.

    Raises:
        KeyError: No test split.
        ValueError: An unknown kind, or a severity out of range.
    """
    images = [corrupt(_framed(load_image(row)), kind, severity, seed) for row in encoded_images(task["test"])["image"]]
    columns = {"image": images, "label": task.labels("test").tolist()}
    test = Dataset.from_dict(columns, features=task_features(task.class_names))
    return replace(task, name=f"{task.name}-{kind}-{severity}", splits={"test": test})


def parse_corruptions(text: str) -> list[str]:
    """Returns the corruptions that a text names, as "fog-3": "all" are all 75, "fog" all five of a kind, with commas between.

    Raises:
        ValueError: An unknown kind, a severity out of range, or one named twice.
    """
    found: list[str] = []
    for word in (word.strip() for word in text.split(",")):
        kind, _, severity = word.rpartition("-")
        if word == "all":
            found += [f"{name}-{each}" for name in CORRUPTIONS for each in SEVERITIES]
        elif word in CORRUPTIONS:
            found += [f"{word}-{each}" for each in SEVERITIES]
        elif kind in CORRUPTIONS and severity in map(str, SEVERITIES):
            found.append(word)
        else:
            raise ValueError(
                f"{word!r} is not a corruption: write all, or a kind with or without a severity from 1 to 5, such as fog-3. "
                f"Kinds: {', '.join(CORRUPTIONS)}."
            )
    twice = next((name for i, name in enumerate(found) if name in found[:i]), None)
    if twice is not None:
        raise ValueError(f"The corruption {twice} is named twice.")
    return found


def _framed(image: Image.Image) -> Image.Image:
    """Returns the middle of an image at the size that parameters are published for."""
    side = SMALL if min(image.size) < _LIMIT else LARGE
    if side == SMALL:
        return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    factor = _RESIZED / min(image.size)
    width, height = (max(round(n * factor), _RESIZED) for n in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = ((n - side) // 2 for n in resized.size)
    return resized.crop((left, top, left + side, top + side))


# ------------------------------------------------------------------------------------------------------------ the kinds


def _gaussian_noise(x: Array, deviation: float, rng: np.random.Generator) -> Array:
    return x + rng.normal(0, deviation, x.shape)


def _shot_noise(x: Array, photons: float, rng: np.random.Generator) -> Array:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: Array, share: float, rng: np.random.Generator) -> Array:
    salt = rng.random(x.shape) < 0.5
    return np.where(rng.random(x.shape) < share, salt, x)


def _defocus_blur(x: Array, strength: tuple[float, float], rng: np.random.Generator) -> Array:
    radius, softness = strength
    reach = 8 if radius <= 8 else math.ceil(radius)
    y, z = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (y**2 + z**2 <= radius**2).astype(np.float64)
    soft = _kernel(1 if radius <= 8 else 2, softness)
    return _filtered(x, _filtered(disc / disc.sum(), np.outer(soft, soft)))


def _glass_blur(x: Array, strength: tuple[float, int, int], rng: np.random.Generator) -> Array:
    sigma, reach, rounds = strength
    height, width = x.shape[:2]
    source = np.arange(height * width).tolist()  # which pixel lies at each place
    for _ in range(rounds):
        moves = rng.integers(-reach, reach, (height, width, 2)).tolist()
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                across, down = moves[row - 1][column - 1]
                # the authors' exchange of two pixels copies one over the other, and so does this
                source[row * width + column] = source[(row + down) * width + column + across]
    smooth = _smoothed(x, sigma).reshape(height * width, -1)
    return _smoothed(smooth[source].reshape(x.shape), sigma)


def _motion_blur(x: Array, strength: tuple[int, float], rng: np.random.Generator) -> Array:
    return _moved(x, *strength, rng.uniform(-45, 45))


def _zoom_blur(x: Array, strength: tuple[float, float], rng: np.random.Generator) -> Array:
    end, step = strength
    factors = np.arange(1, end, step)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _snow(x: Array, strength: tuple[float, ...], rng: np.random.Generator) -> Array:
    mean, deviation, zoom, least, radius, sigma, kept = strength
    flakes = _zoomed(rng.normal(mean, deviation, x.shape[:2]), zoom)
    flakes = np.where(flakes < least, 0, flakes.clip(0, 1))
    flakes = _moved(flakes, int(radius), sigma, rng.uniform(-135, -45))[..., None]
    pale = np.maximum(x, (x @ np.array([0.299, 0.587, 0.114]))[..., None] * 1.5 + 0.5)
    return kept * x + (1 - kept) * pale + flakes + flakes[::-1, ::-1]


def _frost(x: Array, strength: tuple[float, float], rng: np.random.Generator) -> Array:
    kept, laid = strength
    ridges = [(1 - np.abs(2 * _plasma(x.shape, decay, rng) - 1)) ** 4 for decay in (1.3, 1.5)]
    crystals = np.maximum(*ridges)[..., None] * np.array([0.85, 0.95, 1.0])
    return kept * x + laid * crystals


def _fog(x: Array, strength: tuple[float, float], rng: np.random.Generator) -> Array:
    thickness, decay = strength
    brightest = x.max()
    return (x + thickness * _plasma(x.shape, decay, rng)[..., None]) * brightest / (brightest + thickness)


def _brightness(x: Array, more: float, rng: np.random.Generator) -> Array:
    value = x.max(2, keepdims=True)  # of HSV: hue and saturation stay where all channels grow by one factor
    brighter = (value + more).clip(0, 1)
    return np.where(value > 0, x / np.where(value > 0, value, 1), 1) * brighter


def _contrast(x: Array, kept: float, rng: np.random.Generator) -> Array:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * kept + mean


def _elastic(x: Array, strength: tuple[float, float, float], rng: np.random.Generator) -> Array:
    length, sigma, corners = (share * min(x.shape[:2]) for share in strength)
    height, width = x.shape[:2]
    middle, third = np.array([height // 2, width // 2]), min(height, width) // 3
    # three points, as (x, y), and where they are moved: the image is seen through the affine map back
    points = np.array([middle + third, [middle[0] + third, middle[1] - third], middle - third], np.float64)
    moved = points + rng.uniform(-corners, corners, points.shape)
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)  # (x, y, 1) @ back
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    x = _sampled(x, *(np.stack([columns, rows, np.ones_like(rows)], -1) @ back).transpose(2, 0, 1)[::-1], edge=False)
    shifts = [_smoothed(rng.uniform(-1, 1, (height, width)), sigma, 3, mirrored=True) * length for _ in range(2)]
    return _sampled(x, rows + shifts[1], columns + shifts[0], edge=True)


def _pixelate(image: Image.Image, share: float) -> Image.Image:
    width, height = (max(int(n * share), 1) for n in image.size)
    return image.resize((width, height), Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file, formats=["JPEG"]).convert("RGB")


# name: the function, and its strength at the five severities, for small images (CIFAR-10-C) and for large ones (ImageNet-C)
CORRUPTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.1), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (  # radius, softness of the disc's edge
        _defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": (  # deviation, reach, rounds
        _glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": (  # radius, deviation
        _motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": (  # largest zoom, which is left out, and step
        _zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": (  # mean, deviation, zoom and threshold of the flakes; radius and deviation of their fall; what is kept of the image
        _snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (  # shares of the image and of the frost
        _frost,
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": (  # thickness, decay of its details
        _fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (  # length and deviation of the shifts, shift of the corners; shares of the side (published: 244 / 224)
        _elastic,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        tuple(
            tuple(share * 244 / LARGE for share in shares)
            for shares in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
        ),
    ),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (_jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- image processing


def _fold(index: Any, length: int, *, edge: bool) -> Any:
    """Returns indices beyond the ends mirrored into 0 to `length` - 1; the pixel at the edge counts twice with `edge`."""
    if length == 1:
        return index * 0
    period = 2 * length - (0 if edge else 2)
    index = index % period
    return np.where(index >= length, period - index - (1 if edge else 0), index)


def _kernel(reach: int, sigma: float) -> Array:
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return weights / weights.sum()


@lru_cache(maxsize=64)
def _smoothing(length: int, sigma: float, truncate: float, mirrored: bool) -> Array:
    """Returns the matrix that smooths a line of pixels with a Gaussian; beyond its ends it is mirrored, or goes on as it ends."""
    reach = int(truncate * sigma + 0.5)
    places = np.arange(length)[:, None] + np.arange(-reach, reach + 1)
    places = _fold(places, length, edge=True) if mirrored else places.clip(0, length - 1)
    matrix = np.zeros((length, length))
    weights = _kernel(reach, sigma) if reach else np.ones(1)
    np.add.at(matrix, (np.arange(length)[:, None], places), weights)
    return matrix


def _smoothed(x: Array, sigma: float, truncate: float = 4, *, mirrored: bool = False) -> Array:
    """Returns an image (H, W) or (H, W, 3) after a Gaussian blur."""
    down, across = (_smoothing(n, sigma, truncate, mirrored) for n in x.shape[:2])
    return np.tensordot(down, np.moveaxis(np.tensordot(across, x, (1, 1)), 0, 1), 1)


def _filtered(x: Array, kernel: Array) -> Array:
    """Returns an image correlated with a kernel of odd sides; beyond its ends it is mirrored, without its edge."""
    height, width = x.shape[:2]
    reach = [n // 2 for n in kernel.shape]
    result = np.zeros_like(x)
    for i, j in zip(*np.nonzero(kernel), strict=True):
        rows = _fold(np.arange(height) + i - reach[0], height, edge=False)
        columns = _fold(np.arange(width) + j - reach[1], width, edge=False)
        result += kernel[i, j] * x[rows[:, None], columns]
    return result


def _moved(x: Array, radius: int, sigma: float, angle: float) -> Array:
    """Returns an image blurred along a line, whose weights fall from its start as half a Gaussian."""
    height, width = x.shape[:2]
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    result = np.zeros_like(x)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        across, down = (math.ceil(step * f(math.radians(angle)) - 0.5) for f in (math.cos, math.sin))
        rows, columns = (np.arange(height) + down).clip(0, height - 1), (np.arange(width) + across).clip(0, width - 1)
        result += weight * x[rows[:, None], columns]
    return result


def _zoomed(x: Array, factor: float) -> Array:
    """Returns the middle of an image, enlarged to its size."""
    for axis in (0, 1):
        length = x.shape[axis]
        kept = math.ceil(length / factor)
        size = round(kept * factor)
        places = np.linspace(0, kept - 1, size)[(size - length) // 2 :][:length] + (length - kept) // 2
        low = places.astype(int)
        share = (places - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        high = np.minimum(low + 1, length - 1)
        x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
    return x


def _sampled(x: Array, rows: Array, columns: Array, *, edge: bool) -> Array:
    """Returns an image's values at places (H, W) between its pixels; beyond its ends it is mirrored."""
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    result = np.zeros_like(x)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = np.abs(1 - i - (rows - top)) * np.abs(1 - j - (columns - left))
        here = _fold(top + i, x.shape[0], edge=edge), _fold(left + j, x.shape[1], edge=edge)
        result += weight[..., None] * x[here]
    return result


def _plasma(shape: tuple[int, ...], decay: float, rng: np.random.Generator) -> Array:
    """Returns clouds (H, W) in [0, 1] by the diamond-square algorithm, whose noise shrinks by `decay` ** 2 with each halving."""
    size = 1 << (max(shape[:2]) - 1).bit_length()
    clouds, step, amplitude = np.zeros((size, size)), size, 1.0
    while step >= 2:
        half = step // 2
        noise = amplitude * rng.uniform(-1, 1, (3, size // step, size // step))
        corners = clouds[::step, ::step]
        rows = corners + np.roll(corners, -1, 1)
        centres = (rows + np.roll(rows, -1, 0)) / 4 + noise[0]
        clouds[half::step, half::step] = centres
        clouds[::step, half::step] = (rows + centres + np.roll(centres, 1, 0)) / 4 + noise[1]
        clouds[half::step, ::step] = (corners + np.roll(corners, -1, 0) + centres + np.roll(centres, 1, 1)) / 4 + noise[
            2
        ]
        step, amplitude = half, amplitude / decay**2
    clouds -= clouds.min()
    return (clouds / max(clouds.max(), 1e-12))[: shape[0], : shape[1]]
