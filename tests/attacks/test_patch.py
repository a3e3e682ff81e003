"""A square patch: what a threat model of one keeps, and an attack that finds the best place where it is known."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from toy_models import accuracy, make_model, seeded, some_images

from capt_peft.attacks import PGD, Patch, SearchAttack, ThreatModel
from capt_peft.attacks.base import AttackResult
from capt_peft.attacks.square_patch import covering_side, random_square, square_at, square_sums
from capt_peft.randomness import draw

QUARTER = ThreatModel("patch", "1/4")  # 2 x 2 of 8 x 8 pixels


def all_squares(images: Tensor, side: int) -> list[Tensor]:
    """The masks (1, 1, H, W) of every square of a side."""
    height, width = images.shape[2:]
    corners = [(row, column) for row in range(height - side + 1) for column in range(width - side + 1)]
    return [square_at(torch.tensor([row]), torch.tensor([column]), side, images[:1]) for row, column in corners]


def test_the_norm_is_the_side_of_the_square_around_all_changes() -> None:
    delta = torch.zeros(4, 3, 8, 10)
    delta[1, 0, 2, 3] = 1e-9
    delta[2, 0, 2, 3], delta[2, 2, 4, 4] = 1, -1
    delta[3, 1, 0, 0], delta[3, 1, 0, 9] = 1, 1
    assert covering_side(delta).tolist() == [0, 1, 3, 10]
    assert QUARTER.norm_of(delta).tolist() == [0, 1 / 8, 3 / 8, 10 / 8]


@pytest.mark.parametrize(("epsilon", "side"), [("1/8", 1), ("1/4", 2), (0.3, 2), (1, 8), (0, 0), (2 / 3, 5)])
def test_the_side_is_a_share_of_the_shorter_side_in_whole_pixels(epsilon: float | str, side: int) -> None:
    assert ThreatModel("patch", epsilon).side(torch.zeros(1, 3, 8, 12)) == side


def test_less_than_a_pixel_is_refused_and_a_ball_has_no_side() -> None:
    with pytest.raises(ValueError, match=r"0.1 of 8 pixels is less than a pixel: give epsilon '1/8' or more"):
        ThreatModel("patch", 0.1).side(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"L2 0.5 is not a patch"):
        ThreatModel("l2", 0.5).side(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"no length of a step"):
        QUARTER.direction(torch.ones(1, 3, 8, 8))


def test_the_projection_is_the_nearest_image_with_one_changed_square() -> None:
    images = torch.rand(6, 3, 5, 7, generator=seeded(0))
    astray = images + torch.randn(images.shape, generator=seeded(1))
    threat = ThreatModel("patch", 0.4)
    found = threat.project(astray, images)
    candidates = [torch.where(inside, astray.clamp(0, 1), images) for inside in all_squares(images, 2)]
    distances = torch.stack([(each - astray).square().sum((1, 2, 3)) for each in candidates])
    torch.testing.assert_close((found - astray).square().sum((1, 2, 3)), distances.amin(0))
    assert threat.norm_of(found - images).max() <= 0.4 and found.min() >= 0 and found.max() <= 1
    assert torch.equal(threat.project(found, images), found)


def test_random_starts_lie_at_every_place_with_any_pixels() -> None:
    images = torch.full((400, 3, 4, 4), 0.5)
    threat = ThreatModel("patch", 0.5)
    starts = threat.random_start(images, seeded(0))
    assert threat.norm_of(starts - images).max() <= 0.5
    places = {tuple((start != 0.5).any(0).nonzero()[0].tolist()) for start in starts}
    assert places == {(row, column) for row in range(3) for column in range(3)}
    assert starts.min() < 0.02 and starts.max() > 0.98


def test_sums_over_squares_by_hand() -> None:
    values = torch.arange(12.0, dtype=torch.float64).view(1, 3, 4)
    assert square_sums(values, 2).tolist() == [[[10, 14, 18], [26, 30, 34]]]


def test_on_a_linear_model_the_best_square_is_found() -> None:
    """It turns an image exactly where the square with the largest possible gain outweighs the lead."""
    weight = torch.randn(3, 8, 8, generator=seeded(3))
    images = some_images(40)
    gain = torch.where(weight > 0, weight * (1 - images), -weight * images).sum(1, keepdim=True)
    best = torch.stack([(gain * inside).sum((1, 2, 3)) for inside in all_squares(images, 2)]).amax(0)
    lead = best * torch.linspace(0.7, 1.3, len(images))
    offset = lead + (images * weight).sum((1, 2, 3))

    def logits_fn(x: Tensor) -> Tensor:
        rows = (x.flatten(1)[:, None] - images.flatten(1)).abs().sum(2).argmin(1)  # whose adversarial example it is
        return torch.stack([offset[rows], (x * weight).sum((1, 2, 3))], 1)

    labels = torch.zeros(40, dtype=torch.int64)
    adversarial = Patch(QUARTER, steps=30, places=1)(logits_fn, images, labels)
    assert torch.equal(logits_fn(adversarial).argmax(1) == 1, lead < best * (1 - 1e-5))
    assert QUARTER.norm_of(adversarial - images).max() <= 0.25


@dataclass(frozen=True)
class AtRandom(Patch):
    """The same climbs at random places."""

    def _fill(self, place: int, logits_fn: object, batch: object, clean_logits: Tensor) -> AttackResult:
        images = batch.images  # type: ignore[attr-defined]
        uniform = draw(torch.rand, (len(images), 2), batch.generators)  # type: ignore[attr-defined]
        inside = random_square(uniform, self.threat_model.side(images), images)

        def filled(pixels: Tensor) -> Tensor:
            return torch.where(inside, pixels, images)

        climb = PGD(ThreatModel("linf", 1), steps=self.steps, step_size=0.1)
        found = climb.perturb(lambda pixels: logits_fn(filled(pixels)), batch)  # type: ignore[operator, arg-type]
        return AttackResult(filled(found.images), found.zero_gradient_share)


@pytest.mark.parametrize("places", [2, 6])
def test_it_finds_at_least_what_random_places_and_random_pixels_find(places: int) -> None:
    model, images = make_model(), some_images(128)
    labels = model(images).argmax(1)
    left = accuracy(model, Patch(QUARTER, steps=10, places=places)(model, images, labels, 0), labels)
    at_random = [
        accuracy(model, AtRandom(QUARTER, steps=10, places=places)(model, images, labels, seed), labels)
        for seed in range(3)
    ]
    assert left <= min(at_random) and left < 0.95
    pixels = torch.ones(128, dtype=torch.bool)
    for seed in range(places * 20):
        pixels &= model(QUARTER.random_start(images, seeded(seed))).argmax(1) == labels
    assert left <= pixels.double().mean().item()


def test_more_places_and_larger_patches_never_help_the_defender() -> None:
    model, images = make_model(), some_images(64)
    labels = model(images).argmax(1)
    few, many = (Patch(QUARTER, steps=5, places=places)(model, images, labels, 0) for places in (1, 4))
    assert accuracy(model, many, labels) <= accuracy(model, few, labels)
    whole = Patch(ThreatModel("patch", 1), steps=20, places=1)(model, images, labels, 0)
    assert accuracy(model, whole, labels) == 0


def test_epsilon_zero_changes_nothing() -> None:
    model, images = make_model(), some_images(8)
    attack: SearchAttack = Patch(ThreatModel("patch", 0))
    assert torch.equal(attack(model, images, model(images).argmax(1)), images)


def test_every_step_is_reported_under_its_name_with_where_it_is() -> None:
    model, images, calls = make_model(), some_images(4), []
    attack = Patch(ThreatModel("patch", "1/8"), steps=2, places=2)
    attack.run(model, images, model(images).argmax(1), report=lambda *call: calls.append(call))
    assert [call[:2] for call in calls[:3]] == [
        ("patch-2x2", "place 1 of 2, step 1 of 2"),
        ("patch-2x2", "place 1 of 2, step 2 of 2"),
        ("patch-2x2", "place 2 of 2, step 1 of 2"),
    ]


def test_only_gradients_inside_of_the_square_are_counted() -> None:
    model, images = make_model(), some_images(8)
    result = Patch(QUARTER, steps=2, places=1).run(model, images, model(images).argmax(1))
    torch.testing.assert_close(result.zero_gradient_share, torch.zeros(8))
