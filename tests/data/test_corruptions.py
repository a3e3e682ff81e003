"""Common corruptions: all 15 at 5 severities, the same for the same image, worse with severity, and exact where that is known."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from capt_peft import load_task
from capt_peft.data import CORRUPTIONS, corrupt, corrupted, parse_corruptions
from capt_peft.data import corruptions as module

SMOOTH = ("brightness", "contrast", "fog", "pixelate", "jpeg_compression", "defocus_blur", "zoom_blur")


def a_picture(side: int = 32, width: int | None = None) -> Image.Image:
    """Coloured bars and a disc, with edges at many angles."""
    y, x = np.mgrid[:side, : width or side] / side
    disc = (y - 0.5) ** 2 + (x - 0.5) ** 2 < 0.1
    channels = [np.where(disc, 0.9, 0.3 + 0.2 * np.sin(9 * x)), np.where(disc, 0.4, 0.5 * y), 0.5 * (x + y) / 2 + 0.2]
    return Image.fromarray((np.stack(channels, -1).clip(0, 1) * 255).astype(np.uint8))


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image, float) / 255


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(values(a) - values(b)).mean())


def test_there_are_the_15_published_kinds() -> None:
    assert list(CORRUPTIONS) == [
        *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    ]
    assert all(len(small) == len(large) == 5 for _, small, large in CORRUPTIONS.values())


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("size", [(32, 32), (20, 36), (8, 8), (224, 224)])
def test_every_kind_changes_an_image_and_keeps_its_size(kind: str, size: tuple[int, int]) -> None:
    image = a_picture(*size)
    for severity in (1, 5) if size == (32, 32) else (3,):
        changed = corrupt(image, kind, severity)
        assert changed.size == image.size and changed.mode == "RGB"
        assert distance(changed, image) > (0 if min(size) < 32 and kind in ("defocus_blur", "glass_blur") else 1e-4)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_depends_on_the_image_and_the_seed_alone(kind: str) -> None:
    image, state = a_picture(), np.random.get_state()[1].copy()
    first = corrupt(image, kind, 3)
    assert first.tobytes() == corrupt(image.copy(), kind, 3).tobytes()
    assert (corrupt(image, kind, 3, seed=1).tobytes() == first.tobytes()) == (kind in SMOOTH and kind != "fog")
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("side", [32, 96])
def test_the_highest_severity_is_farther_from_the_image_than_the_lowest(kind: str, side: int) -> None:
    image = a_picture(side)
    far = [np.mean([distance(corrupt(image, kind, each, seed), image) for seed in range(3)]) for each in (1, 5)]
    if (kind, side) not in (
        ("elastic_transform", 96),
        ("elastic_transform", 32),
    ):  # as published: other kinds of shifts
        assert far[1] > far[0]


@pytest.mark.parametrize(("side", "deviation"), [(32, 0.08), (84, 0.08), (85, 0.18), (224, 0.18)])
def test_noise_has_the_published_deviation_for_each_size(side: int, deviation: float) -> None:
    grey = Image.new("RGB", (side, side), (128, 128, 128))
    noise = values(corrupt(grey, "gaussian_noise", 3)) - 128 / 255
    assert abs(noise.std() - deviation) < 0.004
    share = (values(corrupt(grey, "impulse_noise", 3)) != 128 / 255).mean()
    assert abs(share - {0.08: 0.03, 0.18: 0.09}[deviation]) < 0.012
    shot = values(corrupt(grey, "shot_noise", 2)).std()
    assert abs(shot - (0.502 / {0.08: 250, 0.18: 25}[deviation]) ** 0.5) < 0.006


def test_brightness_keeps_hue_and_saturation_and_contrast_keeps_the_mean() -> None:
    image = a_picture()
    brighter = values(corrupt(image, "brightness", 3))
    before = values(image)
    expected = np.clip(before.max(-1) + 0.15, 0, 1)
    np.testing.assert_allclose(brighter.max(-1), expected, atol=1 / 255)
    np.testing.assert_allclose(
        brighter / brighter.max(-1, keepdims=True), before / before.max(-1, keepdims=True), atol=0.03
    )
    black = Image.new("RGB", (32, 32))
    np.testing.assert_allclose(values(corrupt(black, "brightness", 3)), 0.15, atol=1 / 255)
    flatter = values(corrupt(image, "contrast", 5))
    np.testing.assert_allclose(flatter.mean((0, 1)), before.mean((0, 1)), atol=1 / 255)
    np.testing.assert_allclose(flatter.std((0, 1)), 0.15 * before.std((0, 1)), atol=2 / 255)


def test_fog_and_frost_and_snow_lie_over_the_image() -> None:
    image = a_picture(224)
    fog = corrupt(image, "fog", 3)
    assert values(fog).max() <= values(image).max() + 1 / 255  # the authors scale back to the brightest pixel
    assert values(fog).std() < values(image).std()
    for kind in ("frost", "snow"):
        assert values(corrupt(image, kind, 1)).mean() > values(image).mean()


def test_pixelate_has_blocks_and_jpeg_is_pillows() -> None:
    image = a_picture(224)
    small = image.resize((89, 89), Image.Resampling.BOX).resize((224, 224), Image.Resampling.BOX)  # int(224 * 0.4)
    assert corrupt(image, "pixelate", 3).tobytes() == small.tobytes()
    file = BytesIO()
    image.save(file, "JPEG", quality=15)
    assert corrupt(image, "jpeg_compression", 3).tobytes() == Image.open(file).convert("RGB").tobytes()


@pytest.mark.parametrize(("mirrored", "mode"), [(True, "reflect"), (False, "nearest")])
@pytest.mark.parametrize("sigma", [0.4, 2.0, 30.0])
def test_the_gaussian_blur_is_that_of_scipy(sigma: float, mirrored: bool, mode: str) -> None:
    x = np.random.default_rng(0).random((20, 31, 3))
    expected = ndimage.gaussian_filter(x, (sigma, sigma, 0), mode=mode, truncate=3)
    np.testing.assert_allclose(module._smoothed(x, sigma, 3, mirrored=mirrored), expected, atol=1e-12)


def test_filters_and_samples_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    x, kernel = rng.random((20, 31, 3)), rng.random((5, 3))
    expected = np.stack([ndimage.correlate(x[..., i], kernel, mode="mirror") for i in range(3)], -1)
    np.testing.assert_allclose(module._filtered(x, kernel), expected, atol=1e-12)
    rows, columns = rng.uniform(-9, 30, (2, 20, 31))
    for edge, mode in ((True, "reflect"), (False, "mirror")):
        expected = np.stack(
            [ndimage.map_coordinates(x[..., i], [rows, columns], order=1, mode=mode) for i in range(3)], -1
        )
        np.testing.assert_allclose(module._sampled(x, rows, columns, edge=edge), expected, atol=1e-9)


@pytest.mark.parametrize("factor", [1.0, 1.05, 1.3, 2.5])
@pytest.mark.parametrize("side", [32, 33])
def test_the_zoom_is_that_of_scipy(factor: float, side: int) -> None:
    x = np.random.default_rng(0).random((side, side))
    kept = int(np.ceil(side / factor))
    start = (side - kept) // 2
    large = ndimage.zoom(x[start : start + kept, start : start + kept], factor, order=1)
    trim = (len(large) - side) // 2
    np.testing.assert_allclose(module._zoomed(x, factor), large[trim : trim + side, trim : trim + side], atol=1e-9)


def test_motion_moves_a_point_along_a_line() -> None:
    x = np.zeros((41, 41))
    x[20, 20] = 1
    for angle, (down, across) in {0: (0, -1), 90: (-1, 0), 45: (-1, -1)}.items():
        blurred = module._moved(x, 6, 3, angle)
        assert abs(blurred.sum() - 1) < 1e-12 and blurred[20, 20] > 0
        rows, columns = np.nonzero(blurred)
        assert (((rows - 20) * across - (columns - 20) * down) == 0).all() and len(rows) > 6


def test_clouds_fill_the_range_and_join_at_their_ends() -> None:
    clouds = module._plasma((64, 64), 2.0, np.random.default_rng(0))
    assert clouds.min() == 0 and clouds.max() == 1 and clouds.shape == (64, 64)
    rough = module._plasma((64, 64), 1.2, np.random.default_rng(0))
    inside, seam = (np.abs(np.diff(clouds, axis=0)).mean(), np.abs(clouds[0] - clouds[-1]).mean())
    assert seam < 4 * inside and np.abs(np.diff(rough, axis=0)).mean() > 2 * inside
    assert module._plasma((20, 33), 2.0, np.random.default_rng(0)).shape == (20, 33)


def test_a_corrupted_task_is_a_shift_of_its_test_images() -> None:
    digits = load_task("digits")
    few = digits.few_shot(1, 0)
    few = type(few)(few.name, few.class_names, {"test": few["test"].select(range(6))}, few.template, few.source)
    foggy = corrupted(few, "fog", 3)
    assert foggy.name == "digits-fog-3" and list(foggy.splits) == ["test"]
    assert foggy.class_names == few.class_names and foggy.template == few.template
    assert foggy.labels("test").tolist() == few.labels("test").tolist()
    image = foggy["test"][2]["image"]
    assert image.size == (32, 32)
    assert image.tobytes() == corrupt(module._framed(few["test"][2]["image"].convert("RGB")), "fog", 3).tobytes()
    with pytest.raises(KeyError, match="no split 'test'"):
        corrupted(type(few)("a", few.class_names, {}), "fog", 3)


@pytest.mark.parametrize(("size", "side"), [((8, 8), 32), ((84, 200), 32), ((85, 200), 224), ((640, 481), 224)])
def test_images_are_brought_to_the_size_of_the_parameters(size: tuple[int, int], side: int) -> None:
    assert module._framed(Image.new("RGB", size)).size == (side, side)


def test_names_of_corruptions_are_read() -> None:
    assert parse_corruptions("fog-3, snow-5") == ["fog-3", "snow-5"]
    assert parse_corruptions("fog") == [f"fog-{severity}" for severity in range(1, 6)]
    assert len(parse_corruptions("all")) == 75
    for text in ("fogg-3", "fog-6", "fog-0", "", "fog-", "fog,", "fog-3.0"):
        with pytest.raises(ValueError, match="is not a corruption: write all, or a kind"):
            parse_corruptions(text)
    with pytest.raises(ValueError, match="fog-3 is named twice"):
        parse_corruptions("fog-3,fog")


def test_unknown_kinds_and_severities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown corruption 'rain'\. Allowed: gaussian_noise, "):
        corrupt(a_picture(), "rain", 3)
    for severity in (0, 6, 2.5):
        with pytest.raises(ValueError, match="must be a whole number from 1 to 5"):
            corrupt(a_picture(), "fog", severity)  # type: ignore[arg-type]
