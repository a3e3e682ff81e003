"""Reading images: files, arrays and PIL images become upright RGB, and damage is reported with the file's name."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# Pillow also opens formats that run other programs (EPS) or are no photographs; those stay closed.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def load_image(image: Any) -> Image.Image:
    """Reads an image, upright and in RGB.

    The EXIF rotation is applied. Transparency is laid over white, as the image processors of transformers do. 16-bit
    grey becomes 8-bit by its range (65,535 is white), not by clipping. Of an animation the first frame is taken.

    Args:
        image: A PIL image, a path, a (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) array that is uint8 or float in [0, 1],
            or the `{"bytes": ..., "path": ...}` of an undecoded image of `datasets`.

    Returns:
        A PIL image of mode RGB.

    Raises:
        FileNotFoundError: A path without a file.
        ValueError: A damaged or truncated file, a web address, too many pixels, or an array of another shape or range;
            the message names the file.
        TypeError: Something else.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image, getattr(image, "filename", "") or "The image")
    if isinstance(image, np.ndarray):
        return _to_rgb(_from_array(image), "The array")
    with _open(image) as (opened, name):
        return _to_rgb(opened, name)


def check_image(image: Any) -> None:
    """Raises what `load_image` would raise, but reads a JPEG only at low resolution, which is faster."""
    if isinstance(image, (Image.Image, np.ndarray)):
        load_image(image)
        return
    with _open(image) as (opened, name), _naming(name):
        opened.draft("RGB", (1, 1))
        opened.load()


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turns what Pillow raises for a file it cannot read into an error that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no image file {name}.") from error
    except IsADirectoryError as error:
        raise ValueError(f"{name} is a folder, not an image file.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is refused: it claims more pixels than Pillow opens safely ({error}). Make it smaller first."
        ) from error
    # This is all that damaged files of the formats above make Pillow raise.
    except (OSError, SyntaxError, ValueError, RuntimeError, struct.error) as error:
        raise ValueError(f"{name} cannot be read as an image; it may be damaged or cut short ({error}).") from error


@contextmanager
def _open(image: Any) -> Iterator[tuple[Image.Image, str]]:
    """Opens a path or an undecoded image of `datasets`, without reading its pixels yet."""
    name, source = "An image without a file name", image
    if isinstance(image, Mapping) and ("bytes" in image or "path" in image):
        source = image.get("path") if image.get("bytes") is None else BytesIO(image["bytes"])
        name = image.get("path") or name
        if source is None:
            raise ValueError("An image of the data set is empty: it has neither bytes nor a path.")
    elif isinstance(image, (str, os.PathLike)):
        name, source = os.fspath(image), Path(image)
        if "://" in name or name.startswith("data:"):
            raise ValueError(f"{name[:80]!r} is an address, and nothing is downloaded here. Give a local file.")
    else:
        raise TypeError(
            f"An image must be a PIL image, a path, or a (H, W, 3) array of uint8 or of floats in [0, 1]; got "
            f"{type(image).__name__}."
        )
    with _naming(name):
        opened = Image.open(source, formats=_formats())
    with opened:
        yield opened, name


@cache
def _formats() -> tuple[str, ...]:
    Image.init()  # Registers every format; an older Pillow lacks AVIF.
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    with _naming(name):
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        limit = 1.0 if image.mode == "F" else 65535.0
        return Image.fromarray(_to_8_bit(np.asarray(image, dtype=np.float64), limit, name)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if not array.size or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise ValueError(
            "An image array must have the shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), channels last; "
            f"got {array.shape}."
        )
    if array.dtype.kind == "f":
        array = _to_8_bit(array.astype(np.float64), 1.0, "The array")
    if array.dtype != np.uint8:
        raise ValueError(f"An image array must be uint8 (0 to 255) or float (0 to 1), got {array.dtype}.")
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array))


def _to_8_bit(values: np.ndarray, limit: float, name: str) -> np.ndarray:
    # Written so that NaN fails too.
    if not (values.min() >= 0 and values.max() <= limit):
        raise ValueError(
            f"{name} has values from {values.min():g} to {values.max():g}; pixels of this kind must be in "
            f"[0, {limit:g}]."
        )
    return np.round(values * (255 / limit)).astype(np.uint8)
