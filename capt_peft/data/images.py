"""Reading images: files, arrays and PIL images become upright RGB, and damage is reported with the file's name."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset((
    ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfi", ".jfif", ".jif", ".jp2", ".jpc", ".jpe", ".jpeg",
    ".jpf", ".jpg", ".jpx", ".pbm", ".pgm", ".pjp", ".pjpeg", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
))  # fmt: skip
MAX_ASPECT_RATIO = 1000
# Pillow also opens formats that run other programs (EPS) or are not photographs; those stay closed.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"
)  # fmt: skip


def load_image(image: Any) -> Image.Image:
    """Reads an image, upright and in RGB.

    The EXIF rotation is applied. Transparency is laid over white, as the image processors of transformers do. 16-bit
    grey becomes 8-bit by its range (65,535 is white, or black where a TIFF says so), not by clipping; 32-bit grey, whose range
    no file tells, counts as 8-bit up to 255 and as 16-bit up to 65,535. Of an animation the first frame is taken.

    Args:
        image: A PIL image, a path, a (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) array that is uint8 or float in [0, 1],
            or the `{"bytes": ..., "path": ...}` of an undecoded image of `datasets`.

    Returns:
        A PIL image of mode RGB.

    Raises:
        FileNotFoundError: A path without a file.
        ValueError: A damaged or truncated file, something that is not a regular file (a pipe, a device), a web address,
            too many pixels, one side more than 1,000 times the other, 16-bit grey whose values need no more than 12 bits (it
            would be almost black), or an array of another shape or range; the message names the file.
        TypeError: Something else.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image, image_name(image))
    if isinstance(image, np.ndarray):
        return _to_rgb(_from_array(image), "The array")
    with _open(image) as (opened, name):
        return _to_rgb(opened, name)


def check_image(image: Any) -> None:
    """Raises what `load_image` would raise, but reads a JPEG only at low resolution, which is faster."""
    if isinstance(image, (Image.Image, np.ndarray)):
        load_image(image)
        return
    with _open(image) as (opened, name):
        with _naming(name):
            opened.draft("RGB", (1, 1))
            opened.load()
        if opened.mode[0] in "IF":
            _to_rgb(opened, name)  # the range of its values decides


def image_name(image: Any) -> str:
    """Returns what to call an image in a message: its file if it has one."""
    if isinstance(image, Mapping):
        image = image.get("path")
    elif isinstance(image, Image.Image):
        image = getattr(image, "filename", None)
    return printable(image) if isinstance(image, (str, os.PathLike)) and os.fspath(image) else "The image"


def printable(path: str | os.PathLike[str]) -> str:
    """Returns a path as text that can be printed, also where its bytes are not UTF-8."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")


def looks_like_image(path: str) -> bool:
    """Whether a file begins like an image of a format that is read, whatever its name ends with."""
    with open(path, "rb") as file:
        start = file.read(16)
    if start[:2] == b"BM":  # two letters alone could begin a text
        return len(start) >= 6 and int.from_bytes(start[2:6], "little") == os.path.getsize(path)
    return start.startswith(_SIGNATURES) or (start[:4], start[8:12]) == (b"RIFF", b"WEBP") or start[4:12] == b"ftypavif"


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turns what Pillow raises for a file it cannot read into an error that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no image file {name}.") from error
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
        name, source = printable(image), image
    else:
        raise TypeError(
            f"An image must be a PIL image, a path, or a (H, W, 3) array of uint8 or of floats in [0, 1]; got "
            f"{type(image).__name__}."
        )
    if isinstance(source, (str, os.PathLike)):
        source = _regular_file(source, name)
    with _naming(name):
        opened = Image.open(source, formats=_formats())
    with opened:
        _check_sides(*opened.size, name)
        yield opened, name


def _regular_file(path: str | os.PathLike[str], name: str) -> Path:
    """Returns the path, if it may be opened: reading a pipe or a device need not end."""
    if "://" in name or name.startswith("data:"):
        raise ValueError(f"{name[:80]!r} is an address, and nothing is downloaded here. Give a local file.")
    with _naming(name):
        mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = (
            "a folder, not an image file" if stat.S_ISDIR(mode) else "a pipe, a device or a socket, not a regular file"
        )
        raise ValueError(f"{name} is {kind}. Give an image file.")
    return Path(path)


def _check_sides(width: int, height: int, name: str) -> None:
    """Raises a ValueError if resizing by the shorter side would make the longer one take gigabytes."""
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"{name} is {width} x {height} pixels; one side may be at most {MAX_ASPECT_RATIO} times the other, because the "
            "shorter one is resized to the model's size. Crop it, or remove it."
        )


@cache
def _formats() -> tuple[str, ...]:
    Image.init()  # Registers every format; an older Pillow lacks AVIF.
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_sides(*image.size, name)
    # turning the image loses what the file says
    bits, inverted = _grey_bits(image), getattr(image, "tag_v2", {}).get(262) == 0  # TIFF's WhiteIsZero
    with _naming(name):
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep_grey(image, bits, inverted, name)
    with _naming(name):
        if image.mode == "La":
            image = image.convert("LA")  # Pillow has no way from here to RGB
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _grey_bits(image: Image.Image) -> int | None:
    """Returns how many bits stand for the grey values of an image, or None if nothing says so (32 bits hold anything)."""
    bits = getattr(image, "tag_v2", {}).get(258, (32,))[0]  # TIFF's bits per sample
    if bits in range(9, 17):
        return int(bits)
    return None if image.mode == "I" and image.format != "PPM" else 16  # Pillow scales other formats to 16


def _from_deep_grey(image: Image.Image, bits: int | None, inverted: bool, name: str) -> Image.Image:
    """Returns grey of more than 8 bits as RGB; see `load_image`."""
    values = np.asarray(image, dtype=np.float64)
    brightest = values.max()
    if bits is None:
        bits = 8 if brightest <= 255 else 16
    used = 12 if bits == 16 else bits - 8  # cameras and scanners save values of 10 or 12 bits as 16-bit
    if image.mode != "F" and 0 < brightest < 2**used:
        white, black = ("black", "white") if inverted else ("white", "black")
        raise ValueError(
            f"{name} has grey values up to {brightest:g} where {2**bits - 1} is {white}, so it would be all but {black}; perhaps "
            f"values of {max(8, int(brightest).bit_length())} bits were saved as {bits}-bit. Scale its values to the whole "
            "range, or save it as 8-bit."
        )
    grey = _to_8_bit(values, 1.0 if image.mode == "F" else 2.0**bits - 1, name)
    if inverted:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


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
