"""load_image and check_image: every kind of image becomes upright RGB, and damage names the file."""

import os
import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from capt_peft.data import PixelTransform, load_image
from capt_peft.data.images import check_image

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def save(path, pixels=PIXELS, **settings):
    Image.fromarray(pixels).save(path, **settings)
    return path


def cut(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def test_a_file_is_read_by_string_path_or_row_of_a_dataset(tmp_path):
    path = save(tmp_path / "a.png")
    rows = (
        {"bytes": path.read_bytes(), "path": "a.png"},
        {"bytes": None, "path": str(path)},
        {"bytes": path.read_bytes()},
    )
    for given in (path, str(path), *rows):
        np.testing.assert_array_equal(np.asarray(load_image(given)), PIXELS)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBA", "LA", "PA", "RGBX", "RGBa", "La"]
)
def test_every_mode_becomes_rgb(mode):
    image = Image.new("RGB", (4, 4), "white")
    for step in {"PA": ("P", "PA"), "RGBa": ("RGBA", "RGBa"), "La": ("LA", "La")}.get(mode, (mode,)):
        image = image.convert(step)
    image = load_image(image)
    assert image.mode == "RGB" and image.size == (4, 4) and min(image.getpixel((0, 0))) >= 254  # LAB rounds


def test_transparency_is_laid_over_white():
    assert load_image(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.info["transparency"] = 0
    assert load_image(palette).getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    path = save(tmp_path / "grey.png", grey)
    assert np.asarray(load_image(path))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(load_image(Image.fromarray(grey.astype(np.int32))))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["array", "tiff"])
def test_dark_grey_of_32_bits_is_read_by_its_content(tmp_path, kind):
    image = Image.fromarray(np.array([[0, 10, 240]], dtype=np.int32))
    if kind == "tiff":
        image.save(tmp_path / "grey.tif")
        image = tmp_path / "grey.tif"
    assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 10, 240]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@pytest.mark.parametrize("read", [load_image, check_image])
@pytest.mark.parametrize(("brightest", "bits"), [(240, 8), (1023, 10), (4095, 12)])
def test_16_bit_grey_that_would_be_all_but_black_is_refused(tmp_path, suffix, read, brightest, bits):
    values = np.array([[0, 10, brightest]], dtype=np.uint16)
    path = save(tmp_path / f"grey.{suffix}", values)
    words = rf"grey\.{suffix} has grey values up to {brightest} where 65535 is white.* values of {bits} bits"
    with pytest.raises(ValueError, match=words):
        read(path)
    if bits > 8:
        with pytest.raises(ValueError, match=f"values of {bits} bits were saved as 16-bit"):
            read(Image.fromarray(values.astype(np.int32)))
    black = save(tmp_path / f"black.{suffix}", np.zeros((2, 2), dtype=np.uint16))
    assert load_image(black).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_whose_white_is_zero_is_not_read_as_a_negative(tmp_path, kind, compression):
    white = 1 if kind is np.float32 else np.iinfo(kind).max
    image = Image.fromarray(np.array([[0, white]], dtype=kind))
    image.save(tmp_path / "grey.tif", compression=compression)
    content = bytearray((tmp_path / "grey.tif").read_bytes())
    tag = content.index(struct.pack("<HHI", 262, 3, 1))  # the photometric interpretation, a short
    content[tag + 8] = 0
    (tmp_path / "grey.tif").write_bytes(content)
    assert np.asarray(load_image(tmp_path / "grey.tif"))[0, :, 0].tolist() == [255, 0]


def test_a_transparent_value_of_16_bit_grey_is_white(tmp_path):
    image = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
    image.save(tmp_path / "grey.png", transparency=0)
    image = Image.open(tmp_path / "grey.png")
    image.info["transparency"] = 0
    assert np.asarray(load_image(image))[0, :, 0].tolist() == [255, 1, 255]


def test_float_grey_is_in_the_unit_range():
    assert load_image(Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32))).getpixel((1, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="0 to 200"):
        load_image(Image.fromarray(np.array([[0.0, 200.0]], dtype=np.float32)))


def test_the_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    image = load_image(save(tmp_path / "a.jpg", exif=exif))
    assert image.size == (12, 20)
    assert load_image(image).size == (12, 20)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3), (6, 5, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_arrays_are_images_with_channels_last(shape, dtype):
    array = np.full(shape, 255 if dtype == np.uint8 else 1.0, dtype=dtype)
    image = load_image(array)
    assert image.size == (5, 6) and image.getpixel((4, 5)) == (255, 255, 255)


def test_a_float_array_is_rounded_to_the_nearest_of_256_values():
    np.testing.assert_array_equal(np.asarray(load_image(PIXELS / 255)), PIXELS)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 6, 5), np.uint8), "channels last"),
        (np.zeros((0, 5, 3), np.uint8), "channels last"),
        (np.zeros(5, np.uint8), "channels last"),
        (np.zeros((6, 5), np.int64), "uint8"),
        (np.full((6, 5), 1.5), r"from 1.5 to 1.5"),
        (np.full((6, 5), -0.1), r"\[0, 1\]"),
        (np.full((6, 5), np.nan), r"\[0, 1\]"),
    ],
)
def test_other_arrays_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


def test_something_else_is_refused():
    with pytest.raises(TypeError, match="got list"):
        load_image([[0, 1]])


@pytest.mark.parametrize(
    "address", ["https://example.org/cat.png", "hf://datasets/a/b.png", "data:image/png;base64,AAAA"]
)
def test_nothing_is_downloaded(address):
    with pytest.raises(ValueError, match="nothing is downloaded"):
        load_image(address)


@pytest.mark.parametrize("read", [load_image, check_image])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"no image file .*cat\.png"):
        read(tmp_path / "cat.png")


@pytest.mark.parametrize("read", [load_image, check_image])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tif", "webp"])
def test_a_truncated_file_is_named(tmp_path, read, suffix):
    path = cut(save(tmp_path / f"cat.{suffix}", np.tile(PIXELS, (5, 5, 1))))
    with pytest.raises(ValueError, match=rf"cat\.{suffix} cannot be read"):
        read(path)


@pytest.mark.parametrize("read", [load_image, check_image])
@pytest.mark.parametrize("content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_a_file_that_is_no_image_is_named(tmp_path, read, content):
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cat\.png cannot be read"):
        read(path)


def test_formats_that_are_not_for_photographs_stay_closed(tmp_path):
    save(tmp_path / "cat.pcx")
    with pytest.raises(ValueError, match=r"cat\.pcx cannot be read"):
        load_image(tmp_path / "cat.pcx")


@pytest.mark.parametrize("read", [load_image, check_image])
def test_what_is_not_a_regular_file_is_never_opened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.png", tmp_path / "link.png", "/dev/zero", {"bytes": None, "path": "/dev/zero"}):
        with pytest.raises(ValueError, match=r"(pipe|link|zero)\S* is a pipe, a device or a socket"):
            read(path)


@pytest.mark.parametrize("read", [load_image, check_image, PixelTransform(CLIPImageProcessor())])
@pytest.mark.parametrize("size", [(20000, 1), (1, 20000)])
def test_an_image_that_resizing_would_blow_up_is_refused_with_its_size(tmp_path, read, size):
    path = tmp_path / "line.png"
    Image.new("RGB", size).save(path)
    with pytest.raises(ValueError, match=rf"line\.png is {size[0]} x {size[1]} pixels"):
        read(path)


def test_the_size_after_resizing_is_bounded_for_large_models(tmp_path):
    Image.new("RGB", (900, 1)).save(tmp_path / "line.png")
    size = {"height": 336, "width": 336}
    transform = PixelTransform(CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=size))
    with pytest.raises(ValueError, match=r"line\.png is 900 x 1 pixels; resized"):
        transform(tmp_path / "line.png")


def test_a_path_that_is_not_utf_8_is_named_in_a_way_that_prints(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"caf\\udce9") as caught:
        load_image(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    str(caught.value).encode()


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(ValueError, match=r"(folder|cannot be read)"):
        load_image(tmp_path)


def test_an_image_that_claims_too_many_pixels_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"bomb\.png is refused: it claims more pixels"):
        load_image(path)


def test_damaged_bytes_are_named_by_their_path(tmp_path):
    content = cut(save(tmp_path / "a.png")).read_bytes()
    with pytest.raises(ValueError, match=r"train/cat\.png cannot be read"):
        load_image({"bytes": content, "path": "train/cat.png"})
    with pytest.raises(ValueError, match="without a file name"):
        load_image({"bytes": content, "path": None})
    with pytest.raises(ValueError, match="neither bytes nor a path"):
        load_image({"bytes": None, "path": None})


def test_an_opened_but_truncated_image_is_named(tmp_path):
    path = cut(save(tmp_path / "cat.png", np.tile(PIXELS, (5, 5, 1))))
    with pytest.raises(ValueError, match=r"cat\.png cannot be read"):
        load_image(Image.open(path))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000"])
def test_random_damage_never_raises_anything_else(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    buffer, rng = BytesIO(), np.random.default_rng(0)
    Image.fromarray(PIXELS).save(buffer, kind)
    for _ in range(150):
        content = bytearray(buffer.getvalue())
        for _ in range(int(rng.integers(1, 6))):
            content[rng.integers(0, min(len(content), 90))] = rng.integers(0, 256)
        try:
            load_image({"bytes": bytes(content), "path": "cat"})
        except ValueError as error:
            assert "cat" in str(error)
