"""The threat model: what it reads, refuses, projects and draws."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capt_peft.attacks import ThreatModel, parse_fraction
from capt_peft.attacks.threat import check_images, check_label_range
from capt_peft.randomness import draw, example_generators, resolve_generator

NORMS = ["linf", "l2", "l1"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(batch: int = 4, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=seeded(seed))


def lengths(threat: ThreatModel, delta: torch.Tensor) -> torch.Tensor:
    """The norm in float64, by another route than the package's."""
    flat = delta.double().flatten(1)
    if threat.norm == "l1":
        return flat.abs().sum(1)
    return flat.abs().max(1).values if threat.norm == "linf" else flat.pow(2).sum(1).sqrt()


def assert_inside(threat: ThreatModel, moved: torch.Tensor, images: torch.Tensor) -> None:
    assert moved.min() >= 0 and moved.max() <= 1
    assert (lengths(threat, moved.double() - images.double()) <= threat.epsilon + 1e-6).all()


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("4/255", 4 / 255),
        (" 8 / 255 ", 8 / 255),
        ("0.5/255", 0.5 / 255),
        ("0.03", 0.03),
        ("1e-2", 0.01),
        (0.03, 0.03),
        (1, 1.0),
        ("0", 0.0),
        (-0.0, 0.0),
    ],
)
def test_fractions_are_read_exactly(value: float | str, number: float) -> None:
    assert parse_fraction(value) == number
    assert math.copysign(1, parse_fraction(value)) == 1


@pytest.mark.parametrize("value", ["4/0", "four", "", "4/255/2", "4//255", "1/-2", "0x1"])
def test_unreadable_text_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"write a fraction such as '4/255'"):
        parse_fraction(value)


@pytest.mark.parametrize("value", [-0.1, "-0.1", "-4/255", math.nan, "nan", math.inf, "inf", "1e999"])
def test_negative_and_unbounded_numbers_are_refused(value: float | str) -> None:
    with pytest.raises(ValueError, match="finite and at least 0"):
        parse_fraction(value)


@pytest.mark.parametrize("value", [None, True, [4], 1j])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="a number or a text"):
        parse_fraction(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("norm", "epsilon", "text"),
    [
        ("linf", "4/255", "L-inf 4/255"),
        ("linf", 4 / 255, "L-inf 4/255"),
        ("linf", 0.03, "L-inf 0.03"),
        ("linf", 0, "L-inf 0"),
        ("linf", "255/255", "L-inf 1"),
        ("l2", 0.5, "L2 0.5"),
        ("l2", "128/255", "L2 128/255"),
        ("l2", "1/7", "L2 0.142857"),
        ("l2", 3, "L2 3"),
        ("l1", 12, "L1 12"),
        ("l1", "255/255", "L1 1"),
        ("patch", "1/8", "patch 0.125"),
    ],
)
def test_a_threat_model_reads_as_people_write_it(norm: str, epsilon: float | str, text: str) -> None:
    assert str(ThreatModel(norm, epsilon)) == text


@pytest.mark.parametrize("norm", NORMS)
def test_settings_survive_json_exactly(norm: str) -> None:
    threat = ThreatModel(norm, "4/255")
    assert ThreatModel(**json.loads(json.dumps(threat.to_dict()))) == threat
    assert len({threat, ThreatModel(norm, 4 / 255)}) == 1


@pytest.mark.parametrize(
    ("norm", "epsilon", "message"),
    [
        ("l3", 0.1, "unknown norm 'l3'.*'linf', 'l2', 'l1', 'patch'"),
        ("l1", -1, "at least 0"),
        ("patch", 2, "its side as a fraction of the image's"),
        ("linf", 4, "fraction of \\[0, 1\\]"),
        ("linf", -1 / 255, "at least 0"),
        ("l2", -1.0, "at least 0"),
        ("l2", math.inf, "finite"),
        ("linf", "4/0", "fraction such as"),
    ],
)
def test_an_impossible_threat_model_is_refused(norm: str, epsilon: float | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThreatModel(norm, epsilon)


@settings(max_examples=60, deadline=None)
@given(norm=st.sampled_from(NORMS), epsilon=st.floats(0, 1), scale=st.floats(1e-6, 1e3), seed=st.integers(0, 99))
def test_projection_ends_inside_the_ball_and_the_range(norm: str, epsilon: float, scale: float, seed: int) -> None:
    threat, images = ThreatModel(norm, epsilon), some_images(seed=seed)
    astray = images + scale * torch.randn(images.shape, generator=seeded(seed + 1))
    assert_inside(threat, threat.project(astray, images), images)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("epsilon", [0, 1e-5, 1e-4, 1 / 255, 0.5, 3, 300])
@pytest.mark.parametrize("level", [0.1, 0.7, 1.0])
def test_flat_images_do_not_round_out_of_the_ball(norm: str, epsilon: float, level: float) -> None:
    threat, images = ThreatModel(norm, epsilon), torch.full((1, 3, 224, 224), level)
    for astray in (torch.zeros_like(images), torch.ones_like(images), images + 1e-6):
        assert_inside(threat, threat.project(astray, images), images)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_leaves_points_of_the_ball_alone(norm: str) -> None:
    images = 0.5 + some_images() / 4
    inside = images + 1e-3
    assert torch.equal(ThreatModel(norm, 0.5).project(inside, images), inside)


def test_projection_onto_the_l2_ball_keeps_the_direction() -> None:
    images = torch.full((2, 3, 8, 8), 0.5)
    delta = torch.randn(images.shape, generator=seeded(0))
    moved = ThreatModel("l2", 0.25).project(images + delta, images) - images
    expected = 0.25 * delta / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0)


def test_norms_are_the_largest_change_the_euclidean_length_and_the_sum() -> None:
    delta = torch.zeros(2, 3, 2, 2)
    delta[0, 0, 0, 0], delta[0, 1, 1, 1] = -3.0, 4.0
    assert ThreatModel("linf", 1).norm_of(delta).tolist() == [4, 0]
    assert ThreatModel("l2", 1).norm_of(delta).tolist() == [5, 0]
    assert ThreatModel("l1", 1).norm_of(delta).tolist() == [7, 0]


@pytest.mark.parametrize("scale", [1e-35, 1.0, 1e30])
def test_directions_have_length_one_at_any_scale(scale: float) -> None:
    gradient = scale * torch.randn(3, 3, 4, 4, generator=seeded(0))
    assert torch.equal(ThreatModel("linf", 1).direction(gradient), gradient.sign())
    direction = ThreatModel("l2", 1).direction(gradient)
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), torch.ones(3))
    cosine = torch.cosine_similarity(direction.double().flatten(1), gradient.double().flatten(1), eps=0)
    torch.testing.assert_close(cosine, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_gives_no_step(norm: str) -> None:
    assert (ThreatModel(norm, 1).direction(torch.zeros(2, 3, 4, 4)) == 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("epsilon", [0, "1/255", "4/255", 1])
def test_random_starts_are_inside(norm: str, epsilon: float | str) -> None:
    threat, images = ThreatModel(norm, epsilon), some_images()
    assert_inside(threat, threat.random_start(images, seeded(1)), images)


def test_linf_starts_are_uniform_in_the_ball() -> None:
    images = torch.full((64, 3, 16, 16), 0.5)
    offset = (ThreatModel("linf", 0.25).random_start(images, seeded(0)) - images) / 0.25
    shares = torch.histc(offset, bins=10, min=-1, max=1) / offset.numel()
    torch.testing.assert_close(shares, torch.full((10,), 0.1), atol=5e-3, rtol=0)


def test_l2_starts_are_uniform_in_the_ball() -> None:
    images = torch.full((4000, 1, 1, 2), 0.5)  # a disc: the square of the radius is uniform, and so is the angle
    threat = ThreatModel("l2", 0.25)
    offset = threat.random_start(images, seeded(0)) - images
    area = (threat.norm_of(offset) / 0.25).square()
    angle = torch.atan2(offset[..., 0], offset[..., 1]) / math.pi
    for values, low in ((area, 0), (angle, -1)):
        shares = torch.histc(values, bins=5, min=low, max=1) / len(values)
        torch.testing.assert_close(shares, torch.full((5,), 0.2), atol=0.03, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_starts_depend_on_the_generator_alone(norm: str) -> None:
    threat, images = ThreatModel(norm, "8/255"), some_images()
    before = torch.get_rng_state()
    first, again, other = (threat.random_start(images, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(threat.random_start(images), threat.random_start(images, 0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("norm", NORMS)
def test_a_generator_an_image_makes_rows_independent_of_the_batch(norm: str) -> None:
    threat, images = ThreatModel(norm, "8/255"), some_images(8)
    whole = threat.random_start(images, [seeded(i) for i in range(8)])
    for rows in ([0, 1, 2, 3], [7, 6, 5, 4], [3]):
        assert torch.equal(threat.random_start(images[rows], [seeded(i) for i in rows]), whole[rows])


@pytest.mark.parametrize("norm", NORMS)
def test_a_seed_gives_each_row_a_generator_of_its_own(norm: str) -> None:
    threat, images = ThreatModel(norm, "8/255"), some_images(8)
    whole = threat.random_start(images, 3)
    assert torch.equal(threat.random_start(images[:3], 3), whole[:3])
    assert torch.equal(threat.random_start(images, example_generators(3, range(8))), whole)
    assert not torch.equal(threat.random_start(images, 4), whole)


def test_noise_is_float32_whatever_the_images_are() -> None:
    images = some_images()
    single = ThreatModel("linf", "4/255").random_start(images, seeded(3))
    double = ThreatModel("linf", "4/255").random_start(images.double(), seeded(3))
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-7, rtol=0)
    assert draw(torch.rand, (2, 3), seeded(0)).dtype == torch.float32


@pytest.mark.parametrize(
    ("generator", "error", "message"),
    [
        ([seeded(0)] * 3, ValueError, "3 generators were given for 4 images"),
        (0.5, TypeError, "a seed, a torch.Generator, a sequence of them"),
        (True, TypeError, "a seed"),
        (-1, ValueError, "a seed must be 0 or more"),
        ([1, 2, 3, 4], TypeError, "one for each image"),
    ],
)
def test_other_generators_are_refused(generator: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve_generator(generator, 4, torch.device("cpu"))  # type: ignore[arg-type]


GOOD = torch.full((2, 3, 4, 4), 0.5)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (GOOD + 0.6, ValueError, r"range from 1.1 to 1.1.*\[0, 1\] before normalisation"),
        (GOOD * -1, ValueError, r"normalise inside the model"),
        (GOOD * math.nan, ValueError, "not finite"),
        (GOOD * math.inf, ValueError, "not finite"),
        (GOOD.half(), TypeError, "float16.*float32 or float64"),
        (GOOD.bfloat16(), TypeError, "bfloat16.*float32 or float64"),
        ((GOOD * 255).byte(), TypeError, "8-bit pixels must be divided by 255"),
        (GOOD[0], ValueError, r"shape \(3, 4, 4\).*\(B, 3, H, W\)"),
        (GOOD[:0], ValueError, "non-empty batch"),
        (GOOD.numpy(), TypeError, "torch.Tensor.*got ndarray"),
    ],
)
def test_other_images_are_refused(images: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_images(images, LABELS)


def test_images_a_rounding_error_outside_the_range_are_accepted() -> None:
    check_images(GOOD + 0.5 + 5e-7, LABELS)
    check_images(GOOD - 0.5 - 5e-7, LABELS)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([-1, 0]), ValueError, "range from -1 to 0"),
        (torch.tensor([0]), ValueError, r"shape \(1,\): \(2,\) is needed"),
        (torch.tensor([[0, 1]]), ValueError, r"shape \(1, 2\)"),
        (torch.tensor([0.0, 1.0]), TypeError, "float32: a torch.int64 tensor"),
        (torch.tensor([0, 1], dtype=torch.int32), TypeError, "int32: a torch.int64 tensor"),
        ([0, 1], TypeError, "list: a torch.int64 tensor"),
    ],
)
def test_other_labels_are_refused(labels: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_images(GOOD, labels)


def test_labels_of_classes_that_are_not_there_are_refused() -> None:
    check_label_range(torch.tensor([0, 2]), 3)
    with pytest.raises(ValueError, match=r"range from 0 to 3.*0 to 2, for 3 classes"):
        check_label_range(torch.tensor([0, 3]), 3)
