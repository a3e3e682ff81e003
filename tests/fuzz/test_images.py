"""Image files with anything in them: pixels in [0, 1] of the model's size, or an error that names the file."""

import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from fuzzing import LENGTHS, fuzz, memory_limit
from helpers import TINY_CLIP
from hypothesis import strategies as st
from PIL import Image

from capt_peft import ZeroShotClassifier, load_task
from capt_peft.data import PixelTransform, load_image
from capt_peft.data.pixels import PixelDataset

SUFFIXES = {
    "PNG": "png",
    "JPEG": "jpg",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
    "JPEG2000": "jp2",
}
MODES = {
    "PNG": ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"], "JPEG": ["L", "RGB", "CMYK"], "WEBP": ["RGB", "RGBA"], "GIF": ["L", "P"],
    "BMP": ["1", "L", "P", "RGB"], "TIFF": ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "I", "LAB"], "PPM": ["L", "RGB"],
    "JPEG2000": ["L", "RGB", "RGBA"],
}  # fmt: skip
KINDS = st.sampled_from([(kind, mode) for kind, modes in MODES.items() for mode in modes])
FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.booleans(), st.integers(0, 255)), max_size=4)
SHARES = st.just(1.0) | st.floats(0, 1)
SIZES = st.sampled_from([(1, 1), (7, 5), (300, 1), (1, 300), (2000, 3)])


@pytest.fixture(scope="module")
def classifier():
    return ZeroShotClassifier.from_pretrained(TINY_CLIP, class_names=["cat", "dog"])


def encoded(kind, mode, size=(24, 17), orientation=None):
    grey = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(grey)
    if mode in ("I;16", "F", "I"):
        image = Image.fromarray((grey[..., 0] / 256).astype({"I;16": np.uint16, "F": np.float32, "I": np.int32}[mode]))
    elif mode != "LAB":
        image = image.convert(mode)
    buffer, settings = BytesIO(), {}
    if orientation is not None:
        settings["exif"] = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01" + orientation
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def damaged(content, share, flips):
    content = bytearray(content[: int(share * len(content))])
    for place, early, byte in flips if content else []:
        content[int(place * (min(len(content), 100) if early else len(content)))] = byte
    return bytes(content)


def check(content, folder, classifier, suffix="png"):
    """Every way to the pixels gives them, or names the file."""
    path = folder / "images" / "cat" / f"broken.{suffix}"
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / "images" / name / "fine.png")
    path.write_bytes(content)
    try:
        for read in (read_alone, read_folder):
            gives_pixels(read, path, classifier)
    finally:
        path.unlink()


def gives_pixels(read, path, classifier):
    try:
        with memory_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what it mends
            read(path, classifier)
    except ValueError as error:
        assert path.name in str(error) and len(str(error)) < 2000


def read_alone(path, classifier):
    whole(classifier.transform.batch([path, str(path)]))
    best = classifier.predict(path)[0]
    assert sum(entry["score"] for entry in best) == pytest.approx(1, abs=1e-4)


def read_folder(path, classifier):
    task = load_task(path.parent.parent, train_split="train")
    augmented = PixelTransform(classifier.processor, augment=True)
    for transform in (classifier.transform, augmented):
        rows = PixelDataset(task["train"], transform)
        whole(torch.stack([rows[i]["pixels"] for i in range(len(rows))]))


def whole(pixels):
    assert pixels.shape[1:] == (3, 32, 32) and pixels.dtype == torch.float32
    assert torch.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1


@LENGTHS
def test_damaged_files_give_pixels_or_are_named(tmp_path, classifier, times):
    @fuzz(60 * times, KINDS, SHARES, FLIPS, st.none() | st.sampled_from(list(SUFFIXES.values())))
    def holds(kind, share, flips, suffix):
        check(damaged(encoded(*kind), share, flips), tmp_path, classifier, suffix or SUFFIXES[kind[0]])


@LENGTHS
def test_images_of_any_mode_and_size_give_pixels(tmp_path, classifier, times):
    @fuzz(30 * times, KINDS, SIZES)
    def holds(kind, size):
        check(encoded(*kind, size), tmp_path, classifier, SUFFIXES[kind[0]])


@LENGTHS
def test_files_that_are_no_images_are_named(tmp_path, classifier, times):
    magic = st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"P6\n", b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff\xe0"]
    )

    @fuzz(30 * times, magic, st.binary(max_size=80), st.sampled_from(list(SUFFIXES.values())))
    def holds(start, rest, suffix):
        check(start + rest, tmp_path, classifier, suffix)


@LENGTHS
def test_any_rotation_mark_is_applied_or_ignored(tmp_path, classifier, times):
    marks = st.binary(max_size=20) | st.integers(0, 2**16 - 1).map(lambda i: struct.pack("<HIHHI", 3, 1, i, 0, 0))

    @fuzz(30 * times, st.sampled_from(["PNG", "JPEG", "WEBP"]), marks)
    def holds(kind, mark):
        check(encoded(kind, "RGB", orientation=mark), tmp_path, classifier, SUFFIXES[kind])


def png_of(width, height):
    """A PNG that claims a size and holds nothing of it."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@LENGTHS
def test_claimed_sizes_are_refused_before_memory_is_taken(tmp_path, classifier, times):
    sides = st.sampled_from([0, 1, 2, 1000, 10_000, 13_000, 2**16, 2**31 - 1])

    @fuzz(20 * times, sides, sides)
    def holds(width, height):
        check(png_of(width, height), tmp_path, classifier)


@pytest.mark.parametrize("size", [(0, 5), (2**31 - 1, 2**31 - 1), (60_000, 60_000)])
def test_a_claimed_size_that_cannot_be_is_refused(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(*size))
    with pytest.raises(ValueError, match=r"bomb\.png"), memory_limit(0.5):
        load_image(path)
