"""Square: its squares shrink as the paper says, it sees answers only, and it asks no more often than it may."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_models import CLASSES, accuracy, epsilon_for, make_model, seeded, some_images

from capt_peft.attacks import APGD, Square, ThreatModel
from capt_peft.attacks.square import _placed, _pyramid
from capt_peft.attacks.square_patch import random_corner, random_square

NORMS = ["linf", "l2", "l1"]
CPU = torch.device("cpu")
both_norms = pytest.mark.parametrize("norm", NORMS)
# Andriushchenko et al. 2020, section 4.1: p is halved at these of 10,000 queries
TABLE = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]


IMAGES = 0.3 + 0.4 * some_images(32)  # no pixel reaches the end of its range


@pytest.fixture
def model() -> nn.Sequential:
    """The toy model with a bias that spreads its predictions over the classes."""
    model = make_model()
    model[3].bias.data -= model(IMAGES).mean(0)
    return model


@pytest.fixture
def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    return IMAGES.clone(), model(IMAGES).argmax(1)


def length(delta: Tensor, norm: str) -> Tensor:
    flat = delta.double().flatten(1)
    return flat.norm({"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1)


def listening(seen: list[Tensor], model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The model, which writes down what it is asked."""

    def logits_fn(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return model(x)

    return logits_fn


def deaf(x: Tensor) -> Tensor:
    """Answers class 0 with the same logits whatever it sees: no proposal is ever kept."""
    return torch.eye(1, CLASSES).expand(len(x), -1)


@pytest.mark.parametrize("queries", [100, 1000, 5000, 10_000, 20_000])
@pytest.mark.parametrize("p_init", [0.8, 0.3])
def test_the_share_of_the_squares_is_halved_when_the_paper_says(queries: int, p_init: float) -> None:
    attack = Square(ThreatModel("linf", 0.1), queries=queries, p_init=p_init)
    shares = [attack._side(query, 20, 50) ** 2 / 1000 for query in range(queries)]
    halvings = [math.log2(p_init / share) for share in shares]
    assert halvings == pytest.approx([sum(query * 10_000 > at * queries for at in TABLE) for query in range(queries)])
    assert halvings[0] == pytest.approx(0) and halvings[-1] == pytest.approx(9)


@pytest.mark.parametrize(("side", "height", "width"), [(1, 5, 5), (3, 8, 12), (4, 9, 4), (5, 5, 5)])
def test_squares_have_their_side_and_lie_in_the_image_at_every_place(side: int, height: int, width: int) -> None:
    uniform = torch.cat([torch.tensor([0.0, 1 - 2**-24]), torch.rand(500, generator=seeded(0))])
    numbers, images = torch.stack([uniform, uniform.flip(0)], 1), torch.empty(502, 3, height, width)
    mask = random_square(numbers, side, images)
    assert mask.shape == (502, 1, height, width) and mask.dtype == torch.bool
    rows, columns = mask.any(3).squeeze(1), mask.any(2).squeeze(1)
    assert (rows.sum(1) == side).all() and (columns.sum(1) == side).all()
    assert torch.equal(mask.squeeze(1), rows[:, :, None] & columns[:, None, :])
    for line in (rows, columns):  # the rows of a square are next to each other
        assert (line.int().diff(dim=1).abs().sum(1) + line[:, 0].int() + line[:, -1].int() == 2).all()
    corners = set(zip(rows.int().argmax(1).tolist(), columns.int().argmax(1).tolist(), strict=True))
    assert len(corners) == (height - side + 1) * (width - side + 1)
    tile = torch.arange(1.0, side**2 + 1).view(1, side, side).expand(502, -1, -1)
    planes = _placed(tile, *random_corner(numbers, side, images), images)
    assert torch.equal(planes != 0, mask)
    assert torch.equal(planes[mask].view(502, -1), tile.flatten(1))


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 44])
def test_the_l2_tile_has_unit_length_and_two_halves_of_opposite_sign(side: int) -> None:
    tile = _pyramid(side, CPU)
    assert tile.shape == (side, side) and tile.norm().item() == pytest.approx(1)
    assert (tile[: side // 2] > 0).all() and (tile[side // 2 :] < 0).all()
    if side % 2:  # the peaks are in the middle column
        torch.testing.assert_close(tile, tile.flip(1))
        assert torch.equal(tile.abs().amax(1), tile[:, side // 2].abs())


def test_the_l2_tile_by_hand() -> None:
    # upper half, 1 x 3: 1 in the middle, 1 / 4 around it; lower half, 2 x 3: the same around its second row's middle;
    # each half of unit length, and so the whole of length sqrt(2)
    upper = torch.tensor([[0.25, 1.25, 0.25]])
    lower = torch.tensor([[0.25, 0.25, 0.25], [0.25, 1.25, 0.25]])
    torch.testing.assert_close(_pyramid(3, CPU), torch.cat([upper / upper.norm(), -lower / lower.norm()]) / 2**0.5)


@both_norms
def test_all_it_asks_lies_in_the_ball_and_the_range(norm: str) -> None:
    seen: list[Tensor] = []
    images, threat = some_images(8), epsilon_for(norm, 32)
    images[0], images[1] = 0, 1
    labels = make_model()(images).argmax(1)
    Square(threat, queries=60)(listening(seen, deaf), images, torch.zeros_like(labels))
    points = torch.stack(seen[1:-1]).double()
    assert points.shape == (60, 8, 3, 8, 8)
    assert points.min() >= 0 and points.max() <= 1
    assert max(length(point - images, norm).max() for point in points) <= threat.epsilon + 1e-6


def test_linf_starts_from_stripes_and_sets_squares_to_plus_or_minus_epsilon(batch: tuple[Tensor, Tensor]) -> None:
    seen: list[Tensor] = []
    images, epsilon = batch[0], 0.1
    attack = Square(ThreatModel("linf", epsilon), queries=100)
    attack(listening(seen, deaf), images, torch.zeros(32).long())
    start, *proposals = seen[1:-1]
    for point in (start, *proposals):
        torch.testing.assert_close((point - images).abs(), torch.full_like(images, epsilon))
    stripes = (start - images).sign()
    assert torch.equal(stripes, stripes[:, :, :1].expand_as(stripes))
    assert 0.4 < (stripes > 0).double().mean() < 0.6 and (stripes[0] != stripes[1]).any()
    for query, point in enumerate(proposals, start=1):
        side = max(round(attack._side(query, 8, 8)), 1)
        changed = (point - start).abs() > epsilon  # what has the other sign now
        colours = (point - images).sign()
        for image, colour in zip(changed.any(1), colours, strict=True):
            for axis in (0, 1):
                inside = image.any(axis).nonzero()
                assert len(inside) == 0 or inside.max() - inside.min() < side
            if side == 8:  # one colour each
                assert (colour.flatten(1) == colour[:, 0, :1]).all()
    assert any(((p - start).abs() > epsilon).any() for p in proposals[-20:])


def test_l2_spends_the_whole_length_on_every_point(batch: tuple[Tensor, Tensor]) -> None:
    seen: list[Tensor] = []
    Square(ThreatModel("l2", 0.5), queries=80)(listening(seen, deaf), batch[0], torch.zeros(32).long())
    start, *proposals = seen[1:-1]
    for point in (start, *proposals):
        torch.testing.assert_close(length(point - batch[0], "l2"), torch.full((32,), 0.5).double(), rtol=1e-5, atol=0)
    moved = [(point != start).flatten(1).any(1).all() for point in proposals]
    assert all(moved)


@both_norms
@pytest.mark.parametrize("shape", [(3, 8, 12), (3, 9, 2), (3, 5, 31), (3, 1, 1), (1, 7, 6)])
def test_images_of_any_shape_are_attacked(norm: str, shape: tuple[int, int, int]) -> None:
    images = 0.3 + 0.4 * torch.rand(16, *shape, generator=seeded(0))
    weight = torch.randn(images[0].numel(), 3, generator=seeded(1))

    def logits_fn(x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ weight

    labels, threat = logits_fn(images).argmax(1), ThreatModel(norm, 0.2 if norm == "linf" else 0.6)
    adversarial = Square(threat, queries=40)(logits_fn, images, labels)
    assert adversarial.isfinite().all() and adversarial.min() >= 0 and adversarial.max() <= 1
    assert length(adversarial - images, norm).max() <= threat.epsilon + 1e-6
    assert accuracy(logits_fn, adversarial, labels) < 1


@both_norms
@pytest.mark.parametrize(("queries", "restarts"), [(1, 1), (7, 1), (70, 1), (5, 3)])
def test_it_asks_as_often_as_it_may_and_for_the_verdict(
    batch: tuple[Tensor, Tensor], norm: str, queries: int, restarts: int
) -> None:
    seen: list[Tensor] = []
    Square(ThreatModel(norm, 0.1), queries=queries, restarts=restarts)(
        listening(seen, deaf), batch[0], torch.zeros(32).long()
    )
    assert len(seen) == 1 + restarts * (queries + 1) and torch.equal(seen[0], batch[0])


@both_norms
def test_it_asks_no_more_about_an_image_it_has_broken(
    model: nn.Module, batch: tuple[Tensor, Tensor], norm: str
) -> None:
    seen: list[Tensor] = []
    found = Square(epsilon_for(norm, 16), queries=100)(listening(seen, model), *batch)
    sizes = [len(x) for x in seen[1:-1]]
    assert sizes == sorted(sizes, reverse=True)
    assert accuracy(model, found, batch[1]) * 32 <= sizes[-1] < sizes[0] == 32


@both_norms
def test_a_proposal_is_kept_only_if_the_lead_shrinks(model: nn.Module, batch: tuple[Tensor, Tensor], norm: str) -> None:
    images, labels = (x[:1] for x in batch)
    seen: list[Tensor] = []
    attack = Square(epsilon_for(norm, 2), queries=80)
    found = attack(listening(seen, model), images, labels)
    with torch.no_grad():
        logits = torch.cat([model(x) for x in seen[1:-1]])
        best = logits.scatter(1, labels.expand(80)[:, None], -torch.inf).amax(1) - logits[:, labels.item()]
    assert best.max() < 0  # it stands, so that every query is asked
    assert torch.equal(found, seen[1:-1][best.argmax()])  # the best of all that it asked
    again = attack(model, found, labels)
    assert not torch.equal(again, found)


@both_norms
def test_models_without_gradients_are_attacked(model: nn.Module, batch: tuple[Tensor, Tensor], norm: str) -> None:
    first, second = (model[i].weight.detach().double().numpy() for i in (1, 3))
    shift, offset = (model[i].bias.detach().double().numpy() for i in (1, 3))

    def in_numpy(x: Tensor) -> Tensor:
        hidden = np.tanh(x.double().numpy().reshape(len(x), -1) @ first.T + shift)
        return torch.from_numpy(hidden @ second.T + offset)

    found = Square(epsilon_for(norm, 32), queries=100)(in_numpy, *batch)
    assert accuracy(in_numpy, found, batch[1]) < 0.6


@both_norms
def test_rounded_answers_stop_gradients_and_not_this(model: nn.Module, batch: tuple[Tensor, Tensor], norm: str) -> None:
    def rounded(x: Tensor) -> Tensor:
        return (4 * model(x)).round() / 4

    threat = epsilon_for(norm, 16)
    found = [attack(rounded, *batch) for attack in (APGD(threat, steps=10), Square(threat, queries=200))]
    blind, seeing = (accuracy(rounded, images, batch[1]) for images in found)
    assert seeing < blind - 0.2


@both_norms
def test_more_room_for_the_first_squares_changes_the_search(
    model: nn.Module, batch: tuple[Tensor, Tensor], norm: str
) -> None:
    found = [Square(epsilon_for(norm, 4), queries=100, p_init=share)(model, *batch) for share in (1, 0.1)]
    assert not torch.equal(*found)
