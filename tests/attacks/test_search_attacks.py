"""What all attacks that search have in common: where they stay, what they leave alone, what they say and refuse."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_models import CLASSES, accuracy, epsilon_for, make_model, seeded, some_images

from capt_peft.attacks import APGD, FAB, PGD, Attack, AutoAttack, SearchAttack, Square, ThreatModel
from capt_peft.attacks.losses import margin
from capt_peft.randomness import example_generators

NORMS = ["linf", "l2", "l1"]
THREAT = ThreatModel("linf", "8/255")


class SmallAutoAttack(AutoAttack):
    """The standard version with few steps."""

    @property
    def parts(self) -> tuple[SearchAttack, ...]:
        threat = self.threat_model
        apgd = APGD(threat, steps=3), APGD(threat, loss="t", steps=2, targets=2)
        return *apgd, FAB(threat, steps=2, targets=2), Square(threat, queries=10)


ATTACKS: dict[str, Callable[[ThreatModel], Attack]] = {
    "apgd-ce": lambda threat: APGD(threat, steps=5, restarts=2),
    "apgd-dlr": lambda threat: APGD(threat, loss="dlr", steps=5, restarts=2),
    "apgd-t": lambda threat: APGD(threat, loss="t", steps=3, targets=2),
    "fab": lambda threat: FAB(threat, targets=0, steps=3, restarts=2),
    "fab-t": lambda threat: FAB(threat, targets=2, steps=3, restarts=2),
    "square": lambda threat: Square(threat, queries=20, restarts=2),
    "autoattack": SmallAutoAttack,
}
every_attack = pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS)
both_norms = pytest.mark.parametrize("norm", NORMS)
gradient_attacks = pytest.mark.parametrize(
    "make", [make for name, make in ATTACKS.items() if name != "square"], ids=[n for n in ATTACKS if n != "square"]
)


def fair_model(classes: int = CLASSES) -> nn.Sequential:
    """The toy model with a bias that spreads its predictions over the classes."""
    model = make_model(classes=classes)
    model[3].bias.data -= model(some_images(256)).mean(0)
    return model


@pytest.fixture
def model() -> nn.Sequential:
    return fair_model()


@pytest.fixture
def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images with the model's own predictions as labels, so that clean accuracy is 1."""
    images = some_images(16)
    return images, model(images).argmax(1)


def lengths(threat: ThreatModel, delta: Tensor) -> Tensor:
    flat = delta.double().flatten(1)
    return flat.norm({"linf": torch.inf, "l2": 2, "l1": 1}[threat.norm], dim=1)


@every_attack
@both_norms
@pytest.mark.parametrize("levels", [1, 16, 255])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_stays_in_the_ball_and_the_range(
    model: nn.Module, make: Callable[[ThreatModel], Attack], norm: str, levels: int, dtype: torch.dtype
) -> None:
    threat, images = epsilon_for(norm, levels), some_images(8).to(dtype)
    images[0], images[1] = 0, 1
    model = model.to(dtype)
    labels = model(images).argmax(1)
    adversarial = make(threat)(model, images, labels)
    assert adversarial.shape == images.shape and adversarial.dtype == dtype and not adversarial.requires_grad
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    length = lengths(threat, adversarial.double() - images.double())
    assert (length <= threat.epsilon + 1e-6).all() and (length > 0).any()


@every_attack
@both_norms
def test_epsilon_zero_returns_the_input_bitwise(
    model: nn.Module, make: Callable[[ThreatModel], Attack], norm: str, batch: tuple[Tensor, Tensor]
) -> None:
    adversarial = make(ThreatModel(norm, 0))(model, *batch)
    assert torch.equal(adversarial.view(torch.int32), batch[0].view(torch.int32))
    assert adversarial.data_ptr() != batch[0].data_ptr()


@every_attack
@both_norms
def test_misclassified_images_come_back_unchanged(
    model: nn.Module, make: Callable[[ThreatModel], Attack], norm: str, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch[0], batch[1].clone()
    labels[::2] = (labels[::2] + 1) % CLASSES
    adversarial = make(epsilon_for(norm, 4))(model, images, labels)
    assert torch.equal(adversarial[::2], images[::2])
    assert (adversarial[1::2] != images[1::2]).flatten(1).any(1).all()


@every_attack
def test_pixels_that_rounding_put_outside_the_range_come_back_inside_it(
    model: nn.Module, make: Callable[[ThreatModel], Attack], batch: tuple[Tensor, Tensor]
) -> None:
    images = batch[0].clone()
    images[:, 0, 0, 0], images[:, 0, 0, 1] = 1 + 5e-7, -5e-7
    labels = model(images).argmax(1)
    labels[::2] = (labels[::2] + 1) % CLASSES
    adversarial = make(THREAT)(model, images, labels)
    assert adversarial.min() >= 0 and adversarial.max() <= 1


@every_attack
@both_norms
def test_what_stands_comes_back_with_a_smaller_lead(
    model: nn.Module, make: Callable[[ThreatModel], Attack], norm: str, batch: tuple[Tensor, Tensor]
) -> None:
    adversarial = make(epsilon_for(norm, 1))(model, *batch)
    standing = model(adversarial).argmax(1) == batch[1]
    clean, attacked = (margin(model(x), batch[1])[standing] for x in (batch[0], adversarial))
    assert len(clean) > 3 and (attacked >= clean).all() and (attacked > clean).any()


@every_attack
@both_norms
def test_a_larger_ball_never_helps_the_defender(
    model: nn.Module, make: Callable[[ThreatModel], Attack], norm: str, batch: tuple[Tensor, Tensor]
) -> None:
    found = [make(epsilon_for(norm, levels))(model, *batch) for levels in (0, 1, 4, 16, 64, 255)]
    accuracies = [accuracy(model, images, batch[1]) for images in found]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] == 1 and accuracies[-1] < 0.3


@pytest.mark.parametrize(
    "make",
    [
        lambda threat, restarts: APGD(threat, steps=3, restarts=restarts),
        lambda threat, restarts: FAB(threat, steps=4, targets=0, restarts=restarts),
        lambda threat, restarts: Square(threat, queries=10, restarts=restarts),
    ],
)
@both_norms
def test_restarts_never_help_the_defender(
    model: nn.Module, make: Callable[[ThreatModel, int], Attack], norm: str
) -> None:
    images = some_images(64)
    labels = model(images).argmax(1)
    once, five = (make(epsilon_for(norm, 5), restarts)(model, images, labels) for restarts in (1, 5))
    broken_once, broken_five = (model(x).argmax(1) != labels for x in (once, five))
    assert (broken_five | ~broken_once).all() and not torch.equal(five, once)
    assert torch.equal(five[broken_once], once[broken_once])  # what one attempt breaks is not attacked again
    margin_once, margin_five = (margin(model(x), labels)[~broken_five] for x in (once, five))
    assert (margin_five >= margin_once - 1e-6).all() and (margin_five > margin_once).any()


@every_attack
def test_the_same_seed_gives_the_same_bits(
    model: nn.Module, make: Callable[[ThreatModel], Attack], batch: tuple[Tensor, Tensor]
) -> None:
    attack = make(epsilon_for("linf", 2))
    first, again, other = (attack(model, *batch, seed) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    shared, same, another = (attack(model, *batch, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(shared, same) and not torch.equal(shared, another)
    assert torch.equal(attack(model, *batch), attack(model, *batch, 0))


@both_norms
def test_fab_draws_nothing_without_restarts(model: nn.Module, norm: str, batch: tuple[Tensor, Tensor]) -> None:
    attack = FAB(epsilon_for(norm, 4), targets=0, steps=5)
    assert torch.equal(attack(model, *batch, 1), attack(model, *batch, 2))


@every_attack
@both_norms
def test_a_result_does_not_depend_on_the_batch(
    model: nn.Module, make: Callable[[ThreatModel], Attack], norm: str, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = (x[:8] for x in batch)
    attack = make(epsilon_for(norm, 3))

    def row_by_row(x: Tensor) -> Tensor:  # a matrix product may round differently in another batch size
        return torch.cat([model(row[None]) for row in x])

    whole = attack(row_by_row, images, labels, 3)
    assert 0 < (model(whole).argmax(1) != labels).sum() < 8  # so that images leave the search at different times
    for rows in ([0, 1, 2, 3], [7, 2, 5], [6]):
        part = attack(row_by_row, images[rows], labels[rows], example_generators(3, rows))
        assert torch.equal(part, whole[rows])


@every_attack
@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_caller_is_disturbed(
    model: nn.Module, make: Callable[[ThreatModel], Attack], training: bool, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch
    model.train(training)
    model[1].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    clean = model(images).detach()
    images.requires_grad_()

    def snapshot() -> list[object]:
        tensors = [t.detach().clone() for t in (*model.parameters(), model[3].weight.grad, images, labels, clean)]
        flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        states = [torch.get_rng_state(), hash(random.getstate()), hash(str(np.random.get_state()))]
        return [tensors, flags, modes, images.grad, images.requires_grad, torch.is_grad_enabled(), states]

    before = snapshot()
    make(THREAT).run(model, images, labels, clean_logits=clean)
    make(THREAT)(model, images, labels)
    torch.testing.assert_close(snapshot(), before, rtol=0, atol=0)


@every_attack
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients_get_the_same_result(
    model: nn.Module, make: Callable[[ThreatModel], Attack], guard: Callable[[], torch.no_grad]
) -> None:
    attack, labels = make(THREAT), model(some_images(8)).argmax(1)
    expected = attack(model, some_images(8), labels)
    with guard():
        images = some_images(8)
        adversarial = attack(model, images, labels.clone())
        given = attack.run(model, images, labels.clone(), clean_logits=model(images)).images
        assert not torch.is_grad_enabled()
    assert torch.equal(adversarial, expected) and torch.equal(given, expected)


@every_attack
def test_given_clean_logits_save_one_forward(
    model: nn.Module, make: Callable[[ThreatModel], Attack], batch: tuple[Tensor, Tensor]
) -> None:
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return model(x)

    attack = make(THREAT)
    expected = attack(counted, *batch)
    needed, calls = calls, 0
    assert torch.equal(attack.run(counted, *batch, clean_logits=model(batch[0])).images, expected)
    assert calls == needed - 1


@every_attack
@pytest.mark.parametrize("given", [torch.float64, torch.float32, None])
def test_half_precision_models_are_attacked_whatever_precision_the_clean_logits_have(
    model: nn.Module, make: Callable[[ThreatModel], Attack], given: torch.dtype | None, batch: tuple[Tensor, Tensor]
) -> None:
    half = fair_model().bfloat16()

    def logits_fn(x: Tensor) -> Tensor:
        return half(x.bfloat16())

    labels = logits_fn(batch[0]).argmax(1)
    clean = None if given is None else logits_fn(batch[0]).to(given)
    adversarial = make(epsilon_for("linf", 16)).run(logits_fn, batch[0], labels, clean_logits=clean).images
    assert adversarial.dtype == torch.float32
    assert accuracy(logits_fn, adversarial, labels) < 0.8


def expected_notes(name: str, classes: int) -> list[str]:
    """What a model with few classes changes, for attacks of one step and 9 targets."""
    few = [f"{classes - 1} target{'s' * (classes > 2)} instead of 9 ({classes} classes)"] if classes < 10 else []
    short = {
        "apgd-dlr": [f"the margin instead of DLR, which needs 3 classes ({classes} here)"] if classes < 3 else [],
        "apgd-t": [f"the margin instead of targeted DLR, which needs 4 classes ({classes} here)"] * (classes < 4) + few,
        "fab-t": few,
    }
    return [f"{name}-1: {note}" for note in short.get(name, [])]


CLASS_COUNTS = [2, 3, 4, 8, 10, 1000]
WIDE = ThreatModel("linf", 0.5)
ONE_STEP: dict[str, SearchAttack] = {
    "apgd-ce": APGD(WIDE, steps=1),
    "apgd-dlr": APGD(WIDE, loss="dlr", steps=1),
    "apgd-t": APGD(WIDE, loss="t", steps=1),
    "fab": FAB(WIDE, targets=0, steps=1),
    "fab-t": FAB(WIDE, steps=1),
    "square": Square(WIDE, queries=20),
}


@pytest.mark.parametrize("name", ONE_STEP)
@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_any_number_of_classes_is_attacked_and_what_it_changes_is_said(name: str, classes: int) -> None:
    model, images = fair_model(classes), some_images(4)
    labels = model(images).argmax(1)
    result = ONE_STEP[name].run(model, images, labels)
    assert list(result.notes) == expected_notes(name, classes)
    targets = min(9, classes - 1) if name.endswith("-t") else 1
    assert len(list(ONE_STEP[name].attempts(classes))) == targets
    assert accuracy(model, result.images, labels) < 1


@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_autoattack_says_what_changes_in_each_of_its_parts(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoAttack, "parts", tuple(ONE_STEP.values()))
    model, images = fair_model(classes), some_images(4)
    result = AutoAttack(THREAT).run(model, images, model(images).argmax(1))
    assert list(result.notes) == [note for name in ONE_STEP for note in expected_notes(name, classes)]


def reports(attack: Attack, model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[tuple[str, str, int]]:
    calls: list[tuple[str, str, int]] = []
    told = attack.run(model, *batch, report=lambda *call: calls.append(call)).images
    assert torch.equal(told, attack(model, *batch))
    return calls


STANDS = ThreatModel("linf", 1e-5)  # nothing is broken, so that every attempt runs


@pytest.mark.parametrize(
    ("attack", "stages"),
    [
        (APGD(STANDS, steps=2), ["step 1 of 2", "step 2 of 2"]),
        (APGD(STANDS, loss="t", targets=2, steps=1), ["target 1 of 2", "target 2 of 2"]),
        (
            APGD(STANDS, loss="t", targets=2, steps=1, restarts=2),
            [f"target {target} of 2, restart {restart} of 2" for target in (1, 2) for restart in (1, 2)],
        ),
        (FAB(STANDS, targets=0, steps=1), [""]),
        (FAB(STANDS, targets=2, steps=2), [f"target {t} of 2, step {step} of 2" for t in (1, 2) for step in (1, 2)]),
        (Square(STANDS, queries=2, restarts=2), [f"restart {r} of 2, query {q} of 2" for r in (1, 2) for q in (1, 2)]),
        (Square(STANDS, queries=1001), [f"query {q:,} of 1,001" for q in range(1, 1002)]),
        (PGD(STANDS, steps=2), ["step 1 of 2", "step 2 of 2"]),
        (PGD(STANDS, steps=2, restarts=2), [f"restart {r} of 2, step {step} of 2" for r in (1, 2) for step in (1, 2)]),
    ],
    ids=lambda each: each.name if isinstance(each, Attack) else "",
)
def test_every_step_is_reported_with_where_it_is(
    model: nn.Module, attack: Attack, stages: list[str], batch: tuple[Tensor, Tensor]
) -> None:
    assert reports(attack, model, batch) == [(attack.name, where, 16) for where in stages]


@pytest.mark.parametrize("name", ["apgd-ce", "fab", "fab-t", "square"])
def test_a_report_counts_the_images_that_are_left(model: nn.Module, name: str, batch: tuple[Tensor, Tensor]) -> None:
    left = [left for *_, left in reports(ATTACKS[name](epsilon_for("linf", 4)), model, batch)]
    assert left[0] == 16 and left == sorted(left, reverse=True) and 0 < left[-1] < 16


def test_autoattack_reports_the_part_that_runs(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    attack = SmallAutoAttack(epsilon_for("linf", 4))
    result, calls = attack.run(model, *batch), reports(attack, model, batch)
    starts = {name: left for name, _, left in reversed(calls)}  # what each part had left at first
    assert starts == {part.name: part.attacked for part in result.parts if part.attacked}
    assert list(dict.fromkeys(name for name, *_ in calls)) == [part.name for part in result.parts]


def test_pgd_reports_what_each_restart_is_given(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    broken = int((model(PGD(epsilon_for("linf", 4), steps=2)(model, *batch)).argmax(1) != batch[1]).sum())
    calls = reports(PGD(epsilon_for("linf", 4), steps=2, restarts=3), model, batch)
    assert calls[2] == ("pgd-2x3", "restart 2 of 3, step 1 of 2", 16 - broken) and 0 < broken < 16


@pytest.mark.parametrize("norm", ["linf", "l2"])  # L1's closed form is in test_l1.py
@pytest.mark.parametrize(
    "attack",
    [
        lambda threat: APGD(threat, steps=20),
        lambda threat: APGD(threat, loss="dlr", steps=20),
        lambda threat: APGD(threat, loss="t", steps=20),
        lambda threat: FAB(threat, targets=0, steps=20),
        lambda threat: FAB(threat, steps=20),
        SmallAutoAttack,
    ],
)
def test_a_linear_model_is_broken_exactly_where_the_closed_form_says(
    attack: Callable[[ThreatModel], Attack], norm: str
) -> None:
    weight = torch.randn(2, 192, generator=seeded(3), dtype=torch.float64)
    images = 0.3 + 0.4 * some_images(64).double()
    logits = images.flatten(1) @ weight.T
    labels = logits.argmax(1)
    normal = weight[0] - weight[1]
    distance = (logits[:, 0] - logits[:, 1]).abs() / (normal.abs().sum() if norm == "linf" else normal.norm())
    epsilon = distance.median().item() * 1.0001
    assert epsilon < 0.3 if norm == "linf" else epsilon < 1  # no pixel reaches the end of its range
    near = (distance / epsilon - 1).abs() < 0.01  # FAB comes within a percent of the boundary
    adversarial = attack(ThreatModel(norm, epsilon))(lambda x: x.flatten(1) @ weight.T, images, labels)
    broken = (adversarial.flatten(1) @ weight.T).argmax(1) != labels
    assert torch.equal(broken[~near], (distance < epsilon)[~near]) and near.sum() < 5


@gradient_attacks
def test_a_model_that_ignores_its_pixels_stands_with_all_gradients_zero(
    make: Callable[[ThreatModel], Attack], batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch[0], torch.zeros(16).long()
    result = make(THREAT).run(lambda x: 0 * x.flatten(1)[:, :CLASSES] + torch.arange(CLASSES).flip(0), images, labels)
    assert (result.zero_gradient_share == 1).all()
    assert result.images.isfinite().all() and lengths(THREAT, result.images - images).max() <= THREAT.epsilon + 1e-6


@gradient_attacks
def test_zero_gradients_are_counted_for_each_image_that_is_attacked(
    model: nn.Module, make: Callable[[ThreatModel], Attack]
) -> None:
    images = some_images(4)

    def half_blind(x: Tensor) -> Tensor:
        return model(torch.cat([x[:, :, :4], x[:, :, 4:].detach()], dim=2))

    labels = half_blind(images).argmax(1)
    labels[3] = (labels[3] + 1) % CLASSES
    share = make(THREAT).run(half_blind, images, labels).zero_gradient_share
    torch.testing.assert_close(share, torch.tensor([0.5, 0.5, 0.5, torch.nan]), equal_nan=True)


@torch.no_grad()
def without_gradients(x: Tensor) -> Tensor:
    return x.flatten(1)[:, :CLASSES]


PARAMETER = nn.Parameter(torch.eye(4, CLASSES))


@gradient_attacks
@pytest.mark.parametrize("logits_fn", [without_gradients, lambda x: PARAMETER[: len(x)] * 2])
def test_models_without_gradients_are_sent_to_square(
    make: Callable[[ThreatModel], Attack], logits_fn: Callable[[Tensor], Tensor]
) -> None:
    labels = logits_fn(some_images(4)).argmax(1)
    with pytest.raises(ValueError, match="an attack that needs no gradients"):
        make(THREAT)(logits_fn, some_images(4), labels)


@every_attack
@pytest.mark.parametrize(
    ("logits_fn", "error", "message"),
    [
        (lambda x: x.flatten(1).sum(1), ValueError, r"shape \(4,\) for 4 images: logits must be \(4, N\)"),
        (lambda x: x.flatten(1)[:, :1], ValueError, "N >= 2 classes"),
        (lambda x: x.flatten(1)[:2, :CLASSES], ValueError, r"shape \(2, 5\) for 4 images"),
        (lambda x: x.flatten(1)[:, :CLASSES] / 0, ValueError, "logits that are not finite"),
        (lambda x: x.flatten(1)[:, :CLASSES].long(), TypeError, "returned torch.int64: logits must be a floating"),
        (lambda x: x.tolist(), TypeError, "returned list"),
        (lambda x: x.flatten(1)[:, :2], ValueError, "labels range from 0 to 3.*0 to 1, for 2 classes"),
    ],
)
def test_models_an_attack_cannot_use_are_refused(
    make: Callable[[ThreatModel], Attack],
    logits_fn: Callable[[Tensor], Tensor],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        make(THREAT)(logits_fn, some_images(4), torch.arange(4))


@every_attack
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"images": some_images(4) * 2 - 1}, ValueError, "before normalisation"),
        ({"images": some_images(4) / 0}, ValueError, "not finite"),
        ({"images": some_images(4).masked_fill(some_images(4) > 0.99, torch.nan)}, ValueError, "not finite"),
        ({"images": some_images(4).half()}, TypeError, "float32 or float64"),
        ({"images": (some_images(4) * 255).byte()}, TypeError, "8-bit pixels must be divided by 255"),
        ({"images": some_images(4)[0]}, ValueError, r"shape \(3, 8, 8\)"),
        ({"images": some_images(4)[:0]}, ValueError, "non-empty batch"),
        ({"labels": torch.arange(4) + 2}, ValueError, "0 to 4, for 5 classes"),
        ({"labels": torch.arange(4) - 1}, ValueError, "labels range from -1"),
        ({"labels": torch.arange(3)}, ValueError, "one for each image"),
        ({"labels": torch.arange(4).float()}, TypeError, "torch.int64"),
        ({"generator": [seeded(0)] * 5}, ValueError, "5 generators were given for 4 images"),
        ({"generator": -1}, ValueError, "a seed must be 0 or more"),
        ({"generator": 0.5}, TypeError, "generator must be"),
        ({"generator": True}, TypeError, "generator must be"),
        ({"clean_logits": torch.zeros(3, CLASSES)}, ValueError, "for 4 images"),
        ({"clean_logits": torch.eye(4, CLASSES + 1)}, ValueError, r"clean_logits have shape \(4, 6\)"),
    ],
)
def test_inputs_an_attack_cannot_use_are_refused(
    model: nn.Module,
    make: Callable[[ThreatModel], Attack],
    changed: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    given = {"images": some_images(4), "labels": torch.arange(4), **changed}
    with pytest.raises(error, match=message):
        make(THREAT).run(model, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("attack", "settings", "error", "message"),
    [
        (APGD, {"loss": "kl"}, ValueError, "unknown loss 'kl': it must be 'ce', 'dlr' or 't'"),
        (APGD, {"steps": 0}, ValueError, "steps=0 must be 1 or more"),
        (APGD, {"restarts": 1.5}, TypeError, "restarts=1.5 must be an integer"),
        (APGD, {"targets": 0}, ValueError, "targets=0 must be 1 or more"),
        (APGD, {"eot": True}, TypeError, "eot=True must be an integer"),
        (FAB, {"targets": -1}, ValueError, "targets=-1 must be 0 or more"),
        (FAB, {"steps": 0}, ValueError, "steps=0 must be 1 or more"),
        (FAB, {"restarts": 0}, ValueError, "restarts=0 must be 1 or more"),
        (Square, {"queries": 0}, ValueError, "queries=0 must be 1 or more"),
        (Square, {"restarts": "2"}, TypeError, "restarts='2' must be an integer"),
        (Square, {"p_init": 0}, ValueError, "p_init=0 must be more than 0"),
        (Square, {"p_init": 1.1}, ValueError, "at most 1"),
        (Square, {"p_init": float("nan")}, ValueError, "p_init=nan"),
        (AutoAttack, {"version": "custom"}, ValueError, "unknown version 'custom'.*'standard', 'plus', 'rand'"),
        *((attack, {"threat_model": "linf"}, TypeError, "must be a ThreatModel") for attack in (APGD, FAB, Square)),
        (AutoAttack, {"threat_model": "linf"}, TypeError, "must be a ThreatModel"),
    ],
)
def test_impossible_settings_are_refused(
    attack: type[Attack], settings: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attack(**{"threat_model": THREAT, **settings})  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "attack",
    [
        APGD(THREAT, loss="dlr", steps=7, restarts=2, eot=3),
        APGD(THREAT, loss="t", targets=4),
        FAB(THREAT, targets=0, restarts=3),
        FAB(ThreatModel("l2", 0.5), targets=4, steps=9),
        Square(THREAT, queries=11, restarts=2, p_init=0.3),
    ],
    ids=lambda attack: attack.name,
)
def test_results_can_keep_every_setting(attack: SearchAttack) -> None:
    kept = json.loads(json.dumps(attack.to_dict()))
    assert kept.pop("name") == attack.name
    threat = ThreatModel(**kept.pop("threat_model"))
    assert type(attack)(threat, **kept) == attack  # type: ignore[call-arg]
    settings = {field.name for field in fields(attack)} - {"threat_model", "_"}  # type: ignore[arg-type]
    unused = {"targets"} if isinstance(attack, APGD) and attack.loss != "t" else set()
    assert set(kept) == settings - unused
    assert asdict(attack).items() >= kept.items()  # type: ignore[call-overload]
