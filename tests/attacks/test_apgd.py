"""APGD: its checkpoints and losses are the paper's, its step shrinks, and it finds more than PGD does."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from toy_models import CLASSES, accuracy, epsilon_for, make_model, seeded, some_images

from capt_peft.attacks import APGD, PGD, ThreatModel
from capt_peft.attacks.apgd import checkpoint_steps, target_classes
from capt_peft.attacks.losses import cross_entropy, dlr, margin, targeted_dlr, targeted_margin

NORMS = ["linf", "l2"]


@pytest.fixture
def model() -> nn.Sequential:
    return make_model()


@pytest.fixture
def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images with the model's own predictions as labels, so that clean accuracy is 1."""
    images = some_images()
    return images, model(images).argmax(1)


def some_logits(classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    logits = torch.randn(32, classes, generator=seeded(2), dtype=torch.float64)
    return logits, torch.arange(32) % classes


def test_the_checkpoints_of_100_steps_are_the_papers() -> None:
    assert checkpoint_steps(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_the_checkpoints_follow_the_papers_formula_exactly() -> None:
    shares = [Fraction(0), Fraction(22, 100)]
    while shares[-1] <= 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - Fraction(3, 100), Fraction(6, 100)))
    for steps in range(1, 1001):
        assert checkpoint_steps(steps) == [math.ceil(share * steps) for share in shares[1:-1]]


@pytest.mark.parametrize("classes", [3, 5, 10])
def test_no_scale_or_shift_of_the_logits_changes_dlr(classes: int) -> None:
    logits, labels = some_logits(classes)
    for changed in (7 * logits, 1e-4 * logits, logits + 100, 1e4 * logits - 3):
        torch.testing.assert_close(dlr(changed, labels), dlr(logits, labels), rtol=1e-6, atol=1e-9)
        if classes > 3:
            targets = (labels + 1) % classes
            expected = targeted_dlr(logits, labels, targets)
            torch.testing.assert_close(targeted_dlr(changed, labels, targets), expected, rtol=1e-6, atol=1e-9)


def test_losses_by_hand() -> None:
    logits = torch.tensor([[5.0, 3.0, 1.0, 0.0], [1.0, 4.0, 2.0, -1.0]])
    labels, targets = torch.tensor([0, 2]), torch.tensor([2, 0])
    # -(z_y - best other) / (z_(1) - z_(3)): -(5 - 3) / (5 - 1) and -(2 - 4) / (4 - 1)
    torch.testing.assert_close(dlr(logits, labels), torch.tensor([-0.5, 2 / 3]))
    # -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2): -(5 - 1) / (5 - 0.5) and -(2 - 1) / (4 - 0)
    torch.testing.assert_close(targeted_dlr(logits, labels, targets), torch.tensor([-8 / 9, -0.25]))
    torch.testing.assert_close(targeted_margin(logits, labels, targets), torch.tensor([-4.0, -1.0]))
    torch.testing.assert_close(margin(logits, labels), torch.tensor([-2.0, 2.0]))


@pytest.mark.parametrize("loss", [dlr, margin])
def test_losses_are_positive_exactly_where_the_model_is_wrong(loss: object) -> None:
    logits, labels = some_logits()
    wrong = logits.argmax(1) != labels
    assert callable(loss) and torch.equal(loss(logits, labels) > 0, wrong) and 0 < wrong.sum() < 32


def test_equal_logits_leave_the_ratios_finite() -> None:
    for loss in (dlr(torch.ones(2, 4), torch.arange(2)), targeted_dlr(torch.ones(2, 4), *torch.arange(4).view(2, 2))):
        assert torch.equal(loss, torch.zeros(2))


def test_targets_are_ranked_among_the_other_classes() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [5.0, 1.0, 1.0, 9.0]])
    labels = torch.tensor([1, 0])  # one the best class, one the second
    ranked = [target_classes(logits, labels, rank).tolist() for rank in (1, 2, 3)]
    assert ranked == [[2, 3], [3, 1], [0, 2]]  # equal logits: the lower class first


@pytest.mark.parametrize("targets", [1, 2, 3])
def test_each_target_gets_its_attempt(targets: int) -> None:
    """Of four classes only the one that comes last can be reached."""

    def logits_fn(x: Tensor) -> Tensor:
        top, bottom = x[:, :, :4].mean(dim=(1, 2, 3)), x[:, :, 4:].mean(dim=(1, 2, 3))
        return torch.stack([top * 0 + 0.6, bottom * 0.01 + 0.4, bottom * 0.01 + 0.3, top], dim=1)

    images, labels = torch.full((3, 3, 8, 8), 0.2), torch.zeros(3).long()
    attack = APGD(ThreatModel("linf", 0.5), loss="t", steps=10, targets=targets)
    assert accuracy(logits_fn, attack(logits_fn, images, labels), labels) == (0 if targets == 3 else 1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("steps", [10, 50])
def test_it_finds_no_less_than_pgd_of_as_many_steps(
    model: nn.Module, batch: tuple[Tensor, Tensor], norm: str, steps: int
) -> None:
    images, labels = batch
    threat = epsilon_for(norm, 8)
    plain, auto = (attack(model, images, labels) for attack in (PGD(threat, steps=steps), APGD(threat, steps=steps)))
    assert accuracy(model, auto, labels) <= accuracy(model, plain, labels)
    with torch.no_grad():
        stand = (model(auto).argmax(1) == labels) & (model(plain).argmax(1) == labels)
        gain = cross_entropy(model(auto), labels) - cross_entropy(model(plain), labels)
    assert stand.sum() > 10 and gain[stand].mean() > 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr", "t"])
def test_the_step_size_shrinks_until_the_best_point_is_found(norm: str, loss: str) -> None:
    """The label's lead is 1 on a line through the ball and grows on both sides: a fixed step jumps across."""
    direction = torch.randn(192, generator=seeded(4))
    images = 0.3 + 0.4 * some_images(8)
    threat = ThreatModel(norm, 0.1 if norm == "linf" else 1.0)
    middle = images.flatten(1) @ direction + 0.3 * threat.epsilon * direction.norm() * (8 if norm == "linf" else 1)

    def lead(x: Tensor) -> Tensor:
        return 1 + (x.flatten(1) @ direction - middle[: len(x)]).square()

    def logits_fn(x: Tensor) -> Tensor:
        return torch.stack([lead(x), *(lead(x) * 0 - k for k in range(3))], dim=1)

    labels = torch.zeros(8).long()
    auto = APGD(threat, loss=loss, targets=1)(logits_fn, images, labels)
    fixed = PGD(threat, steps=100, step_size=2 * threat.epsilon)(logits_fn, images, labels)
    assert (lead(images) > 1.1).all()
    assert (lead(auto) < 1.01).all() and (lead(fixed) > 1.1).all()


def test_an_image_leaves_once_it_is_misclassified(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    sizes: list[int] = []

    def counted(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return model(x)

    images, labels = batch
    found = APGD(epsilon_for("linf", 4), steps=20)(counted, images, labels)
    walk = sizes[1:-1]  # between the clean images and the verdict
    assert len(walk) == 21 and walk[0] == 64 and walk == sorted(walk, reverse=True)
    assert walk[-1] <= walk[0] - (accuracy(model, found, labels) < 1)
    with torch.no_grad():
        standing = (model(found).argmax(1) == labels).sum()
    assert standing <= walk[-1] < 64


@pytest.mark.parametrize("eot", [1, 5])
def test_each_step_averages_as_many_passes_as_asked(model: nn.Module, batch: tuple[Tensor, Tensor], eot: int) -> None:
    counts = {"forward": 0, "backward": 0}

    def counted(x: Tensor) -> Tensor:
        counts["forward"] += 1
        logits = model(x)
        if x.requires_grad:
            logits.register_hook(lambda _: counts.update(backward=counts["backward"] + 1))
        return logits

    APGD(ThreatModel("linf", 1e-5), steps=4, eot=eot)(counted, *batch)
    assert counts == {"forward": 4 * eot + 3, "backward": 4 * eot}  # and the clean images, the last point, the verdict


@pytest.mark.parametrize("norm", NORMS)
def test_averaged_gradients_find_more_in_a_noisy_model(
    model: nn.Module, batch: tuple[Tensor, Tensor], norm: str
) -> None:
    images, labels = batch

    def robust(eot: int) -> float:
        noise = seeded(9)

        def noisy(x: Tensor) -> Tensor:  # the logits are clean, their gradient is mostly noise
            hidden = torch.randn(x.shape, generator=noise)
            offset = hidden * (x - x.detach())
            return model(x) + 3 * offset.flatten(1).sum(1, keepdim=True) * torch.arange(CLASSES)

        return accuracy(model, APGD(epsilon_for(norm, 4), steps=20, eot=eot)(noisy, images, labels), labels)

    assert robust(20) < robust(1) - 0.1


def test_restarts_begin_at_different_points_of_the_ball() -> None:
    starts: list[Tensor] = []
    images, threat = 0.3 + 0.4 * some_images(4), ThreatModel("linf", 0.1)

    def standing(x: Tensor) -> Tensor:
        starts.append(x.detach().clone())
        return torch.eye(4, CLASSES) + 0 * x.sum()

    APGD(threat, steps=1, restarts=2)(standing, images, torch.arange(4))
    assert len(starts) == 7  # the clean images, then for each restart its start, its end and the verdict
    first, second = starts[1], starts[4]
    assert (first - second).abs().flatten(1).amax(1).min() > 0.1
    for start in (first, second):
        spread = (start - images) / threat.epsilon
        assert spread.abs().max() <= 1 + 1e-5 and abs(spread.mean()) < 0.1 and abs(spread.std() - 3**-0.5) < 0.05
