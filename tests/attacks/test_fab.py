"""FAB: its projection is the shortest there is, and its perturbations are about as short as the boundary allows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn
from toy_models import CLASSES, accuracy, epsilon_for, make_model, seeded, some_images

from capt_peft.attacks import APGD, FAB, ThreatModel
from capt_peft.attacks.fab import project_to_hyperplane

NORMS = ["linf", "l2", "l1"]
both_norms = pytest.mark.parametrize("norm", NORMS)
SHAPE = (3, 2, 2)


def length(delta: Tensor, norm: str) -> Tensor:
    flat = delta.double().flatten(1)
    return flat.norm({"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1)


def dual_length(normal: Tensor, norm: str) -> Tensor:
    return normal.flatten(1).norm({"linf": 1, "l2": 2, "l1": torch.inf}[norm], dim=1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).flatten(1).sum(1)


def some_problems(count: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Images with pixels at 0 and at 1, normals with zeros and equal entries, and reachable rises of both signs."""
    x = torch.rand(count, *SHAPE, generator=seeded(0), dtype=torch.float64)
    x = torch.where(x < 0.2, 0, torch.where(x > 0.8, 1, x))
    normal = torch.randn(count, *SHAPE, generator=seeded(1), dtype=torch.float64)
    normal[::3] = normal[::3].round()
    rise = dot(normal.clamp_min(0), 1 - x) - dot(normal.clamp_max(0), x)
    fall = dot(normal.clamp_min(0), x) - dot(normal.clamp_max(0), 1 - x)
    return x, normal, torch.minimum(rise, fall) * torch.linspace(-0.95, 0.95, count, dtype=torch.float64)


def shortest_linf(x: np.ndarray, normal: np.ndarray, rise: float) -> float:
    """Minimise t with -t <= delta <= t, normal . delta = rise and x + delta in [0, 1]."""
    n = len(x)
    ones = np.ones((n, 1))
    bounds = [(-value, 1 - value) for value in x] + [(0, None)]
    rows = np.vstack([np.hstack([np.eye(n), -ones]), np.hstack([-np.eye(n), -ones])])
    cost, equal = np.append(np.zeros(n), 1.0), np.append(normal, 0.0)[None]
    found = linprog(cost, A_ub=rows, b_ub=np.zeros(2 * n), A_eq=equal, b_eq=[rise], bounds=bounds)
    assert found.success
    return float(found.fun)


def shortest_l1(x: np.ndarray, normal: np.ndarray, rise: float) -> float:
    """Minimise the sum of delta's positive and negative parts with normal . delta = rise and x + delta in [0, 1]."""
    bounds = [(0, 1 - value) for value in x] + [(0, value) for value in x]
    found = linprog(np.ones(2 * len(x)), A_eq=np.append(normal, -normal)[None], b_eq=[rise], bounds=bounds)
    assert found.success
    return float(found.fun)


def shortest_l2(x: np.ndarray, normal: np.ndarray, rise: float) -> float:
    found = minimize(
        lambda delta: delta @ delta,
        np.zeros(len(x)),
        jac=lambda delta: 2 * delta,
        bounds=[(-value, 1 - value) for value in x],
        constraints={"type": "eq", "fun": lambda delta: normal @ delta - rise, "jac": lambda delta: normal},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    return float(np.sqrt(found.fun))


@both_norms
def test_the_projection_is_the_shortest_way_that_a_solver_finds(norm: str) -> None:
    x, normal, rise = some_problems()
    delta = project_to_hyperplane(x, normal, rise, norm)
    assert (x + delta).min() >= 0 and (x + delta).max() <= 1
    torch.testing.assert_close(dot(normal, delta), rise, rtol=0, atol=1e-9)
    solve = {"linf": shortest_linf, "l2": shortest_l2, "l1": shortest_l1}[norm]
    flat = zip(x.flatten(1).numpy(), normal.flatten(1).numpy(), rise.tolist(), strict=True)
    shortest = torch.tensor([solve(*problem) for problem in flat], dtype=torch.float64)
    torch.testing.assert_close(length(delta, norm), shortest, rtol=1e-6, atol=1e-7)
    free = rise.abs() / dual_length(normal, norm)  # the distance if pixels could leave the range
    assert (shortest >= free - 1e-9).all() and (shortest > 1.1 * free).sum() > 5 and (shortest < 1.001 * free).any()


@both_norms
@pytest.mark.parametrize("sign", [1, -1])
def test_a_hyperplane_out_of_reach_uses_all_the_room(norm: str, sign: int) -> None:
    x, normal, _ = some_problems()
    delta = project_to_hyperplane(x, normal, torch.full((24,), 100.0 * sign), norm)
    corner = torch.where(normal * sign > 0, 1 - x, torch.where(normal == 0, 0, -x))
    torch.testing.assert_close(delta, corner, rtol=0, atol=1e-12)


@both_norms
def test_zero_normals_and_zero_rises_move_nothing(norm: str) -> None:
    x, normal, rise = some_problems()
    assert torch.equal(project_to_hyperplane(x, normal * 0, rise, norm), torch.zeros_like(x))
    assert torch.equal(project_to_hyperplane(x, normal, rise * 0, norm), torch.zeros_like(x))


@both_norms
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6])
def test_no_scale_of_the_hyperplane_changes_the_projection(norm: str, scale: float) -> None:
    x, normal, rise = some_problems()
    expected = project_to_hyperplane(x, normal, rise, norm)
    scaled = project_to_hyperplane(x.float(), (normal * scale).float(), rise * scale, norm)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled.double(), expected, rtol=1e-4, atol=1e-5)


@both_norms
def test_projections_of_different_images_do_not_mix(norm: str) -> None:
    x, normal, rise = some_problems()
    whole = project_to_hyperplane(x, normal, rise, norm)
    alone = [project_to_hyperplane(x[i : i + 1], normal[i : i + 1], rise[i : i + 1], norm) for i in range(24)]
    assert torch.equal(torch.cat(alone), whole)


# weights of different lengths, so that the boundary to the class with the next logit is often not the nearest
WEIGHT = torch.randn(CLASSES, 192, generator=seeded(3), dtype=torch.float64) * torch.tensor([[1], [2], [1], [4], [2]])


def linear(x: Tensor) -> Tensor:
    return (x - 0.5).flatten(1) @ WEIGHT.T


def boundaries(images: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """The labels (B,) of the linear model, and for each class its boundary's distance and its logit (B, N)."""
    logits = linear(images)
    labels = logits.argmax(1)
    normal = WEIGHT - WEIGHT[labels][:, None]  # (B, N, 192)
    gap = logits.gather(1, labels[:, None]) - logits
    distance = gap / normal.norm({"linf": 1, "l2": 2, "l1": torch.inf}[norm], dim=2)
    distance[gap == 0] = torch.inf
    return labels, distance, logits.scatter(1, labels[:, None], -torch.inf)


@both_norms
@pytest.mark.parametrize(
    ("share", "found"),
    [(10, (1, 1.051)), (1.04, (1, 1.04)), (1.01, (1, 1.01)), (0.98, None)],
)
def test_the_perturbation_of_a_linear_model_is_as_long_as_the_way_to_the_boundary(
    norm: str, share: float, found: tuple[float, float] | None
) -> None:
    """It stops within epsilon: with room to spare after its first step, which goes 5% beyond the boundary."""
    images = 0.4 + 0.2 * some_images(8).double()
    labels, distances, _ = boundaries(images, norm)
    for image, label, distance in zip(images, labels, distances.min(1).values, strict=True):
        attack = FAB(ThreatModel(norm, share * distance.item()), targets=0, steps=20)
        adversarial = attack(linear, image[None], label[None])
        broken = linear(adversarial).argmax(1).item() != label
        assert broken == (found is not None)
        if found is not None:
            assert found[0] <= length(adversarial - image, norm).item() / distance <= found[1] + 1e-6


@both_norms
def test_fab_crosses_the_nearest_boundary_and_fab_t_that_of_its_target(norm: str) -> None:
    images = 0.4 + 0.2 * some_images(64).double()
    labels, distance, others = boundaries(images, norm)
    threat = ThreatModel(norm, distance.min(1).values.max().item() * 2)
    nearest, runner_up = distance.argmin(1), others.argmax(1)
    assert (nearest != runner_up).sum() > 5 and len(labels.unique()) > 3
    found = linear(FAB(threat, targets=0)(linear, images, labels)).argmax(1)
    assert torch.equal(found, nearest)
    target = FAB(threat, targets=1, steps=1)(linear, images, labels)
    assert (linear(target).argmax(1) == runner_up).double().mean() > 0.9  # where no third class lies in between


@both_norms
@pytest.mark.parametrize("targets", [0, 1])
def test_the_range_of_pixels_bounds_the_perturbation(norm: str, targets: int) -> None:
    """Most of the pixels that the shortest way would move are at the end of their range already."""
    weight = torch.randn(2, 12, generator=seeded(5), dtype=torch.float64)
    images = torch.rand(6, *SHAPE, generator=seeded(6), dtype=torch.float64)
    images = torch.where(images < 0.35, 0, torch.where(images > 0.65, 1, images))
    logits = images.flatten(1) @ weight.T
    labels = logits.argmax(1)
    normal = (weight[1 - labels] - weight[labels]).view_as(images)
    gap = logits.max(1).values - logits.min(1).values
    shortest = length(project_to_hyperplane(images, normal, gap, norm), norm)
    reachable = gap < dot(normal.clamp_min(0), 1 - images) - dot(normal.clamp_max(0), images)
    assert reachable.sum() >= 4 and (shortest > 1.1 * gap / dual_length(normal, norm))[reachable].any()
    for row in reachable.nonzero().flatten().tolist():
        for share, broken in ((1.08, True), (0.98, False)):
            attack = FAB(
                ThreatModel(norm, min(share * shortest[row].item(), 1 if norm == "linf" else 12)),
                targets=targets,
                steps=20,
            )
            image, label = images[row : row + 1], labels[row : row + 1]
            found = attack(lambda x: x.flatten(1) @ weight.T, image, label)
            assert ((found.flatten(1) @ weight.T).argmax(1) != label).item() == broken


@both_norms
@pytest.mark.parametrize("targets", [0, 4])
def test_it_finds_about_what_apgd_finds(norm: str, targets: int) -> None:
    model, images = make_model(), some_images()
    labels = model(images).argmax(1)
    threat = epsilon_for(norm, 6)
    fab, apgd = FAB(threat, targets=targets, steps=20), APGD(threat, loss="dlr", steps=50)
    found = [accuracy(model, attack(model, images, labels), labels) for attack in (fab, apgd)]
    assert 0.1 < found[1] < 0.9 and found[0] <= found[1] + 2 / 64


def test_what_no_step_within_epsilon_breaks_comes_back_at_the_edge_of_the_ball() -> None:
    images = 0.4 + 0.2 * some_images(8).double()
    for norm in NORMS[:2]:  # within L1 the range of pixels is in the way
        labels, distance, _ = boundaries(images, norm)
        epsilon = distance.min().item() / 2
        adversarial = FAB(ThreatModel(norm, epsilon), targets=0, steps=3)(linear, images, labels)
        assert accuracy(linear, adversarial, labels) == 1
        torch.testing.assert_close(length(adversarial - images, norm), torch.full((8,), epsilon).double())


def spied(model: nn.Module, seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def logits_fn(x: Tensor) -> Tensor:
        if x.requires_grad:
            seen.append(x.detach().clone())
        return model(x)

    return logits_fn


@both_norms
def test_the_first_attempt_starts_at_the_image_and_the_others_half_of_epsilon_away(norm: str) -> None:
    model, images, seen = make_model(), 0.3 + 0.4 * some_images(8), []  # type: ignore[var-annotated]
    threat = ThreatModel(norm, 1e-4)
    FAB(threat, targets=0, steps=1, restarts=3)(spied(model, seen), images, model(images).argmax(1))
    assert len(seen) == 3 and torch.equal(seen[0], images) and not torch.equal(seen[1], seen[2])
    for start in seen[1:]:
        half = torch.full((8,), threat.epsilon / 2).double()
        torch.testing.assert_close(length(start - images, norm), half, rtol=1e-2, atol=1e-7)


def test_fab_t_looks_at_one_target_after_the_other() -> None:
    """Of four classes only the one that comes last can be reached."""

    def logits_fn(x: Tensor) -> Tensor:
        top, bottom = x[:, :, :4].mean(dim=(1, 2, 3)), x[:, :, 4:].mean(dim=(1, 2, 3))
        return torch.stack([top * 0 + 0.6, bottom * 0.01 + 0.4, bottom * 0.01 + 0.3, top], dim=1)

    images, labels = torch.full((3, 3, 8, 8), 0.2), torch.zeros(3).long()
    for targets, robust in ((1, 1), (2, 1), (3, 0), (9, 0)):
        attack = FAB(ThreatModel("linf", 0.5), targets=targets, steps=5)
        assert accuracy(logits_fn, attack(logits_fn, images, labels), labels) == robust


def test_an_image_leaves_once_a_point_within_epsilon_is_found() -> None:
    model, images, seen = make_model(), some_images(), []  # type: ignore[var-annotated]
    labels = model(images).argmax(1)
    found = FAB(epsilon_for("linf", 6), targets=0, steps=10)(spied(model, seen), images, labels)
    sizes = [len(x) for x in seen]
    assert len(sizes) == 10 and sizes[0] == 64 and sizes == sorted(sizes, reverse=True)
    assert accuracy(model, found, labels) * 64 <= sizes[-1] < 64
