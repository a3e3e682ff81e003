"""The L1 ball within [0, 1]: the projection is the nearest point, steps are sparse, and attacks reach the known optimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toy_models import accuracy, make_model, seeded, some_images

from capt_peft.attacks import APGD, FAB, PGD, AutoAttack, Square, ThreatModel
from capt_peft.attacks.apgd import balls
from capt_peft.attacks.l1 import sparse_sign

SHAPE = (3, 4, 4)


def some_points(scale: float, batch: int = 32) -> tuple[Tensor, Tensor]:
    """Centres with pixels at both ends of the range, and points around them, in float64."""
    images = torch.rand(batch, *SHAPE, generator=seeded(0), dtype=torch.float64)
    images = torch.where(images < 0.2, 0, torch.where(images > 0.8, 1, images))
    points = images + scale * torch.randn(images.shape, generator=seeded(1), dtype=torch.float64)
    points[::4] = (points[::4] * 4).round() / 4  # equal distances, and pixels that do not move
    return points, images


def by_bisection(points: Tensor, images: Tensor, radius: float) -> Tensor:
    """The nearest point by another route: the multiplier of the ball's constraint, halved 200 times."""
    delta = points - images
    room = torch.where(delta > 0, 1 - images, images)
    low, high = torch.zeros(len(images), 1, 1, 1, dtype=torch.float64), delta.abs().amax((1, 2, 3), keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        size = torch.minimum((delta.abs() - middle).clamp_min(0), room)
        long = size.sum((1, 2, 3), keepdim=True) > radius
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    return images + delta.sign() * torch.minimum((delta.abs() - high).clamp_min(0), room)


@pytest.mark.parametrize("scale", [0.01, 0.3, 10])
@pytest.mark.parametrize("radius", [1e-3, 0.5, 5, 40])
def test_the_projection_is_that_of_an_independent_solver(scale: float, radius: float) -> None:
    points, images = some_points(scale)
    found = ThreatModel("l1", radius).project(points, images)
    torch.testing.assert_close(found, by_bisection(points, images, radius), atol=1e-6 * max(radius, 1), rtol=0)


@pytest.mark.parametrize("scale", [0.05, 1])
@pytest.mark.parametrize("radius", [0.2, 3])
def test_no_other_point_of_the_ball_and_the_range_is_nearer(scale: float, radius: float) -> None:
    """The variational inequality, `(y - p) . (z - p) <= 0` for all z in the set, which holds for the nearest point p alone."""
    points, images = some_points(scale)
    nearest = ThreatModel("l1", radius * (1 + 2**-20)).project(points, images)
    for seed in range(20):
        others = images + 4 * torch.randn(images.shape, generator=seeded(seed), dtype=torch.float64)
        others = by_bisection(others, images, radius)
        assert (others - images).abs().sum((1, 2, 3)).max() <= radius + 1e-9
        assert ((points - nearest) * (others - nearest)).sum((1, 2, 3)).max() <= 1e-5 * max(1, scale * radius)


def test_without_the_range_all_values_shrink_by_as_much() -> None:
    images = torch.full((1, 3, 1, 1), 0.5)
    astray = images + torch.tensor([3.0, -2.0, 0.5]).view(1, 3, 1, 1)
    moved = ThreatModel("l1", 3).into_ball(astray, images) - images  # 3 - 1 + 2 - 1 + 0
    torch.testing.assert_close(moved.flatten(), torch.tensor([2.0, -1.0, 0.0]), atol=1e-5, rtol=0)


def test_starts_are_uniform_in_the_ball() -> None:
    images = torch.full((4000, 1, 1, 2), 0.5)  # a square on its corner: uniform in the sum and the difference
    offset = (ThreatModel("l1", 0.25).random_start(images, seeded(0)) - images).flatten(1) / 0.25
    for values in (offset.sum(1), offset[:, 0] - offset[:, 1]):
        shares = torch.histc(values, bins=5, min=-1, max=1) / len(values)
        torch.testing.assert_close(shares, torch.full((5,), 0.2), atol=0.03, rtol=0)


def test_a_step_moves_the_largest_gradients_equally_and_leaves_out_what_is_at_the_end() -> None:
    gradient = torch.tensor([5.0, -4.0, 3.0, -2.0, 1.0, 0.0]).view(1, 3, 1, 2)
    count = torch.tensor([3])
    expected = torch.tensor([1.0, -1.0, 1.0, 0.0, 0.0, 0.0]) / 3
    assert torch.equal(sparse_sign(gradient, count).flatten(), expected)
    at = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.5]).view(1, 3, 1, 2)
    expected = torch.tensor([0.0, 0.0, 1.0, -1.0, 1.0, 0.0]) / 3
    assert torch.equal(sparse_sign(gradient, count, at).flatten(), expected)
    assert (sparse_sign(gradient, torch.tensor([6])).abs().sum() - 1).abs() < 1e-6  # a zero gradient stays


def greatest_gain(images: Tensor, weight: Tensor, radius: float) -> Tensor:
    """The largest `weight . delta` in the ball and the range: the steepest values use all their room (proposition 2.3)."""
    room = torch.where(weight > 0, 1 - images, images).flatten(1)
    size, order = weight.abs().flatten().sort(descending=True)
    room = room[:, order]
    spent = torch.minimum(room, (radius - (room.cumsum(1) - room)).clamp_min(0))
    return (spent * size).sum(1)


@pytest.mark.parametrize(
    ("attack", "share"),
    [
        (lambda threat: PGD(threat, steps=40), 0.8),
        (lambda threat: APGD(threat, steps=100), 0.98),
        (lambda threat: APGD(threat, loss="dlr", steps=100), 0.98),
        (lambda threat: APGD(threat, loss="t", steps=100, targets=1), 0.98),
        (lambda threat: FAB(threat, steps=50, targets=1), 0.99),
    ],
)
@pytest.mark.parametrize("radius", [0.5, 4])
def test_on_a_linear_model_the_optimum_is_reached(attack: object, share: float, radius: float) -> None:
    weight = torch.randn(3, 8, 8, generator=seeded(3))
    images = some_images(48)
    gain = greatest_gain(images, weight, radius)
    lead = gain * torch.linspace(0.5, 1.2, len(images))  # the attack must gain more than this to turn an image
    offset = lead + (images * weight).sum((1, 2, 3))

    def logits_fn(x: Tensor) -> Tensor:
        rows = ((x.flatten(1)[:, None] - images.flatten(1)).abs().sum(2)).argmin(1)  # whose adversarial example it is
        return torch.stack([offset[rows], (x * weight).sum((1, 2, 3))], 1)

    labels = torch.zeros(len(images), dtype=torch.int64)
    adversarial = attack(ThreatModel("l1", radius))(logits_fn, images, labels)  # type: ignore[operator]
    broken = logits_fn(adversarial).argmax(1) == 1
    assert broken[lead < share * gain].all()
    assert not broken[lead > gain * (1 + 1e-4)].any()


def test_a_search_begins_in_larger_balls() -> None:
    threat = ThreatModel("l1", 2)
    assert balls(threat, 100) == [(ThreatModel("l1", 6), 30), (ThreatModel("l1", 4), 30), (threat, 40)]
    assert balls(threat, 2) == [(threat, 2)]
    assert [steps for _, steps in balls(threat, 7)] == [3, 3, 1]
    assert balls(ThreatModel("l2", 2), 100) == [(ThreatModel("l2", 2), 100)]


def test_what_only_a_larger_ball_breaks_is_not_broken() -> None:
    model = make_model()
    images = some_images(32)
    labels = model(images).argmax(1)
    threat = ThreatModel("l1", 1e-3)
    adversarial = APGD(threat, steps=10)(model, images, labels)
    assert threat.norm_of(adversarial - images).max() <= 1e-3 + 1e-6
    assert accuracy(model, adversarial, labels) > 0.9


def test_stronger_attacks_find_more() -> None:
    model, images = make_model(), some_images(64)
    labels = model(images).argmax(1)
    threat = ThreatModel("l1", 1.0)
    left = {
        name: accuracy(model, attack(model, images, labels), labels)
        for name, attack in {
            "noise": PGD(threat, steps=1, step_size=1e-9),
            "square": Square(threat, queries=100),
            "pgd": PGD(threat, steps=20),
            "apgd": APGD(threat, steps=50),
        }.items()
    }
    assert left["apgd"] <= left["pgd"] < left["square"] < left["noise"]


def test_autoattack_has_the_published_parts_for_it() -> None:
    parts = AutoAttack(ThreatModel("l1", 1)).parts
    assert [part.name for part in parts] == ["apgd-ce-100x5", "apgd-t-5targets", "fab-t", "square"]
