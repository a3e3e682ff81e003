"""Pixels: the processor's own in [0, 1], augmentation from its generator alone, and a hash in which every image counts."""

import json
import math
import os
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor

from capt_peft.data import PixelTransform
from capt_peft.data.pixels import digest_images, random_crop_box
from capt_peft.data.task import encoded_images, task_features

SIZES = [(50, 40), (40, 50), (32, 32), (20, 90), (300, 200), (1, 1), (3, 7)]


def processor(**settings):
    return CLIPImageProcessor(**({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}} | settings))


def photo(width=50, height=40):
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", SIZES)
def test_normalising_the_pixels_gives_exactly_the_output_of_the_processor(size):
    image, clip = photo(*size), processor()
    transform = PixelTransform(clip)
    mean, std = (torch.tensor(values)[:, None, None] for values in transform.normalization)
    expected = clip(images=image, return_tensors="pt")["pixel_values"][0]
    tolerance = 0.0 if clip.backend == "pil" else 1e-6  # torchvision normalises and rescales in one step
    torch.testing.assert_close((transform(image) - mean) / std, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_float32_in_the_unit_range(size):
    pixels = PixelTransform(processor())(photo(*size))
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    assert pixels.min() >= 0 and pixels.max() <= 1


def test_black_is_0_and_white_is_1():
    transform = PixelTransform(processor())
    assert transform(Image.new("RGB", (32, 32), "white")).eq(1).all()
    assert transform(Image.new("RGB", (32, 32), "black")).eq(0).all()


def test_an_image_of_the_models_size_keeps_its_256_values():
    image = photo(32, 32)
    pixels = PixelTransform(processor())(image)
    np.testing.assert_array_equal((pixels * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(image))


def test_size_and_normalization_are_those_of_the_processor():
    transform = PixelTransform(
        processor(crop_size={"height": 24, "width": 28}, image_mean=[0, 0.5, 1], image_std=[1, 2, 3])
    )
    assert transform.size == (24, 28) and transform(photo()).shape == (3, 24, 28)
    assert transform.normalization == ((0.0, 0.5, 1.0), (1.0, 2.0, 3.0))


def test_a_processor_that_does_not_normalise_has_mean_0_and_std_1():
    assert PixelTransform(processor(do_normalize=False)).normalization == ((0.0,) * 3, (1.0,) * 3)


def test_a_processor_without_centre_crop_uses_its_size():
    transform = PixelTransform(SiglipImageProcessor(size={"height": 16, "width": 20}))
    assert transform.size == (16, 20) and transform(photo()).shape == (3, 16, 20)


@pytest.mark.parametrize("settings", [{"do_center_crop": False}, {"do_center_crop": False, "do_resize": False}])
def test_a_processor_without_a_fixed_size_is_refused(settings):
    with pytest.raises(ValueError, match="no fixed size"):
        PixelTransform(processor(**settings))


@pytest.mark.parametrize("settings", [{"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
def test_a_processor_without_the_unit_range_is_refused(settings):
    with pytest.raises(ValueError, match=r"does not bring pixels to \[0, 1\]"):
        PixelTransform(processor(**settings))


def test_something_that_is_no_processor_is_refused():
    with pytest.raises(TypeError, match="got str"):
        PixelTransform("openai/clip-vit-base-patch32")


def test_a_batch_is_the_stack_of_its_images():
    transform, images = PixelTransform(processor()), [photo(), photo(40, 50), photo(32, 32)]
    pixels = transform.batch(images)
    assert pixels.shape == (3, 3, 32, 32)
    assert all(torch.equal(pixels[i], transform(image)) for i, image in enumerate(images))
    with pytest.raises(ValueError, match="at least one"):
        transform.batch([])


def test_an_augmented_batch_draws_each_image_from_its_own_generator():
    transform, images = PixelTransform(processor(), augment=True), [photo(), photo()]
    pixels = transform.batch(images, [seeded(0), seeded(1)])
    assert torch.equal(pixels[1], transform(images[1], seeded(1)))
    with pytest.raises(ValueError):
        transform.batch(images, [seeded(0)])


def test_augmentation_follows_its_generator():
    transform, image = PixelTransform(processor(), augment=True), photo()
    assert torch.equal(transform(image, seeded(1)), transform(image, seeded(1)))
    assert not torch.equal(transform(image, seeded(1)), transform(image, seeded(2)))
    pixels = transform(image, seeded(1))
    assert pixels.shape == (3, 32, 32) and pixels.min() >= 0 and pixels.max() <= 1


def test_augmentation_needs_a_generator_and_leaves_the_global_state_alone():
    transform, state = PixelTransform(processor(), augment=True), torch.get_rng_state()
    transform(photo(), seeded(0))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"torch\.Generator"):
        transform(photo())


def test_without_augmentation_the_generator_is_not_touched():
    generator = seeded(0)
    before = generator.get_state()
    PixelTransform(processor())(photo(), generator)
    assert torch.equal(generator.get_state(), before)


def test_a_crop_of_everything_is_the_resized_image_flipped_half_of_the_time():
    image = photo(32, 32)
    transform, plain = (
        PixelTransform(processor(), augment=True, crop_scale=(1.0, 1.0)),
        PixelTransform(processor())(image),
    )
    results = [transform(Image.fromarray(np.asarray(image)), seeded(seed)) for seed in range(200)]
    # A square of the full area only has the ratio 1 when no drawn ratio fits, which is then nearly always.
    whole = [pixels for pixels in results if torch.equal(pixels, plain) or torch.equal(pixels, plain.flip(-1))]
    flipped = sum(torch.equal(pixels, plain.flip(-1)) for pixels in whole)
    assert len(whole) > 100 and 0.3 < flipped / len(whole) < 0.7


def test_flips_can_be_turned_off():
    image = photo(32, 32)
    transform = PixelTransform(processor(), augment=True, crop_scale=(1.0, 1.0), flip=False)
    mirrored = PixelTransform(processor())(image).flip(-1)
    assert not any(torch.equal(transform(image, seeded(seed)), mirrored) for seed in range(50))


def test_an_augmented_image_is_the_bicubic_resize_of_its_box():
    image = photo(90, 70)
    box = random_crop_box(90, 70, (0.08, 1.0), seeded(4))
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC, box=box))
    pixels = PixelTransform(processor(), augment=True, flip=False)(image, seeded(4))
    np.testing.assert_array_equal((pixels * 255).round().byte().permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("size", SIZES)
def test_random_boxes_lie_within_the_image(size):
    generator = seeded(0)
    for _ in range(200):
        left, top, right, bottom = random_crop_box(*size, (0.08, 1.0), generator)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_random_boxes_have_the_areas_and_ratios_asked_for():
    generator = seeded(0)
    boxes = [random_crop_box(1000, 1000, (0.2, 0.5), generator) for _ in range(500)]
    areas = [(right - left) * (bottom - top) / 1e6 for left, top, right, bottom in boxes]
    ratios = [(right - left) / (bottom - top) for left, top, right, bottom in boxes]
    assert 0.199 < min(areas) < 0.23 and 0.47 < max(areas) < 0.501
    assert 0.74 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.34
    assert abs(np.mean(np.log(ratios))) < math.log(4 / 3) / 5
    assert len({left for left, *_ in boxes}) > 100


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.1), (0.5, 1.5)])
def test_a_crop_scale_outside_0_to_1_is_refused(scale):
    with pytest.raises(ValueError, match="crop_scale"):
        PixelTransform(processor(), crop_scale=scale)


def test_to_dict_tells_apart_what_changes_the_pixels():
    plain = PixelTransform(processor()).to_dict()
    assert plain["resample"] == "bicubic" and plain["size"] == [32, 32] and plain["backend"] in ("pil", "torchvision")
    assert plain == PixelTransform(processor()).to_dict() == json.loads(json.dumps(plain))
    others = (
        PixelTransform(processor(resample=2)),
        PixelTransform(processor(size={"shortest_edge": 48})),
        PixelTransform(processor(), augment=True),
        PixelTransform(processor(), augment=True, flip=False),
    )
    assert len({json.dumps(transform.to_dict()) for transform in (PixelTransform(processor()), *others)}) == 5


# ---------------------------------------------------------------------------------------------- digest

IMAGES = 1500  # more than were looked at before, and no multiple of a batch


def png(level):
    buffer = BytesIO()
    Image.fromarray(np.full((2, 2), level % 256, dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue() + level.to_bytes(4, "big")  # no two alike


CONTENT = [png(number) for number in range(IMAGES)]


def split(images, labels=None, names=("cat", "dog")):
    labels = [number % 2 for number in range(len(images))] if labels is None else labels
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=task_features(names))


def embedded(content):
    return [{"bytes": each, "path": None} for each in content]


@pytest.fixture(scope="module")
def known():
    return digest_images(split(embedded(CONTENT)))


@pytest.mark.parametrize("place", [0, 1, 31, 32, 700, 1023, 1024, IMAGES - 2, IMAGES - 1])
def test_one_changed_image_or_label_changes_the_hash(known, place):
    content = [*CONTENT]
    content[place] = content[place][:-1] + b"x"
    assert digest_images(split(embedded(content))) != known
    labels = [number % 2 for number in range(IMAGES)]
    labels[place] = 1 - labels[place]
    assert digest_images(split(embedded(CONTENT), labels)) != known


def test_the_order_counts_and_the_way_the_images_are_kept_does_not(known, tmp_path):
    whole = split(embedded(CONTENT))
    assert digest_images(encoded_images(whole)) == known
    assert digest_images(whole.select(range(IMAGES))) == known
    assert digest_images(whole.select([1, 0, *range(2, IMAGES)])) != known
    paths = []
    for number, content in enumerate(CONTENT[:40]):
        paths.append(str(tmp_path / f"{number}.png"))
        (tmp_path / f"{number}.png").write_bytes(content)
    assert digest_images(split(paths)) == digest_images(whole.select(range(40)))


def test_labels_count_by_the_names_of_their_classes(known):
    swapped = [1 - number % 2 for number in range(IMAGES)]
    assert digest_images(split(embedded(CONTENT), swapped, names=("dog", "cat"))) == known
    assert digest_images(split(embedded(CONTENT), names=("dog", "cat"))) != known


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing", "empty"])
def test_what_is_not_a_file_is_named_at_once_and_not_read(tmp_path, kind):
    path = tmp_path / "image.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    words = "Image 1 of the split is empty" if kind == "empty" else str(path)
    good = {"bytes": CONTENT[0], "path": None}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        digest_images(split([good, None if kind == "empty" else {"bytes": None, "path": str(path)}]))
