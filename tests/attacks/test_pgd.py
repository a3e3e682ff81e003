"""PGD: it stays inside, finds the best point where that is known, disturbs nothing, and says what it cannot use."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_models import CLASSES, accuracy, epsilon_for, make_model, seeded, some_images

from capt_peft.attacks import PGD, Attack, ThreatModel, parse_attack
from capt_peft.attacks.base import pixel_gradient
from capt_peft.attacks.losses import LOSSES

NORMS = ["linf", "l2"]
THREAT = ThreatModel("linf", "8/255")


@pytest.fixture
def model() -> nn.Sequential:
    return make_model()


@pytest.fixture
def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images with the model's own predictions as labels, so that clean accuracy is 1."""
    images = some_images()
    return images, model(images).argmax(1)


@torch.no_grad()
def mean_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return F.cross_entropy(model(images), labels).item()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("epsilon", [0, "1/255", "4/255", 1])
@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_stays_in_the_ball_and_the_range(
    model: nn.Module, norm: str, epsilon: float | str, loss: str, dtype: torch.dtype
) -> None:
    threat, images = ThreatModel(norm, epsilon), some_images(8).to(dtype)
    images[0], images[1] = 0, 1
    labels = torch.arange(8) % CLASSES
    adversarial = PGD(threat, steps=3, loss=loss, restarts=2)(model.to(dtype), images, labels, seeded(0))
    assert adversarial.shape == images.shape and adversarial.dtype == dtype
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    delta = (adversarial.double() - images.double()).flatten(1)
    length = delta.abs().max(1).values if norm == "linf" else delta.norm(dim=1)
    assert (length <= threat.epsilon + 1e-6).all()
    if threat.epsilon > 0:
        assert (length > 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_epsilon_zero_returns_the_input_bitwise(model: nn.Module, norm: str, loss: str) -> None:
    images = some_images(8)
    adversarial = PGD(ThreatModel(norm, 0), loss=loss, step_size="1/255")(model, images, torch.zeros(8).long())
    assert torch.equal(adversarial.view(torch.int32), images.view(torch.int32))
    assert adversarial.data_ptr() != images.data_ptr()


def test_epsilon_zero_costs_no_forward() -> None:
    def unused(x: Tensor) -> Tensor:
        raise RuntimeError("the model was called")

    PGD(ThreatModel("linf", 0), loss="kl", restarts=2)(unused, some_images(2), torch.zeros(2).long())


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("targeted", [False, True])
def test_a_linear_model_gets_the_closed_form(loss: str, targeted: bool) -> None:
    weight = torch.randn(2, 192, generator=seeded(3))
    images, labels = 0.3 + 0.4 * some_images(6), torch.tensor([0, 1, 0, 1, 1, 0])
    away = (weight[1 - labels] - weight[labels]).view_as(images) * (-1 if targeted else 1)

    def attack(norm: str, epsilon: float) -> Tensor:
        # Steps longer than the ball, so that what is left of the random start shrinks fast.
        attack = PGD(ThreatModel(norm, epsilon), steps=20, step_size=2.0, loss=loss, targeted=targeted)
        return attack(lambda x: x.flatten(1) @ weight.T, images, labels, seeded(0))

    torch.testing.assert_close(attack("linf", 4 / 255), images + 4 / 255 * away.sign(), atol=1e-7, rtol=0)
    unit = away / away.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(attack("l2", 0.5), images + 0.5 * unit, atol=2e-6, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_fgsm_is_one_step_of_epsilon(model: nn.Module, batch: tuple[Tensor, Tensor], norm: str) -> None:
    images, labels = batch
    images = 0.3 + 0.4 * images
    threat = epsilon_for(norm, 4)
    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(pixels), labels, reduction="sum"), pixels)
    expected = images + threat.epsilon * threat.direction(gradient)
    adversarial = parse_attack("fgsm", threat)(model, images, labels)
    agree = (adversarial - expected).abs() < 1e-6
    assert agree.double().mean() > 0.999  # a gradient of a rounding error's size may have either sign


@pytest.mark.parametrize(("steps", "random_start", "share"), [(20, True, 1 / 4), (10, True, 1 / 4), (3, True, 2 / 3)])
def test_the_default_step_size_is_that_of_the_field(steps: int, random_start: bool, share: float) -> None:
    assert PGD(THREAT, steps=steps, random_start=random_start).resolved_step_size == pytest.approx(share * 8 / 255)
    assert PGD(THREAT, steps=2).resolved_step_size == THREAT.epsilon
    assert PGD(THREAT, steps=1).resolved_step_size == pytest.approx(1.25 * THREAT.epsilon)
    assert PGD(THREAT, steps=1, random_start=False).resolved_step_size == THREAT.epsilon


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_never_help_the_defender(model: nn.Module, batch: tuple[Tensor, Tensor], norm: str) -> None:
    images, labels = batch
    threat = epsilon_for(norm, 8)
    found = [PGD(threat, steps=k)(model, images, labels, seeded(0)) for k in (1, 10, 50)]
    points = (images, threat.random_start(images, seeded(0)), *found)
    losses = [mean_loss(model, x, labels) for x in points]
    accuracies = [accuracy(model, x, labels) for x in points]
    assert losses[1:] == sorted(losses[1:]) and losses[2] > losses[0]
    assert accuracies[1:] == sorted(accuracies[1:], reverse=True)
    assert accuracies[0] == 1 and accuracies[-1] < 0.9


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_larger_ball_never_helps_the_defender(
    model: nn.Module, batch: tuple[Tensor, Tensor], norm: str, loss: str
) -> None:
    images, labels = batch
    accuracies = [
        accuracy(model, PGD(epsilon_for(norm, levels), steps=20, loss=loss)(model, images, labels), labels)
        for levels in (0, 1, 4, 16, 255)
    ]
    assert accuracies == sorted(accuracies, reverse=True)
    # KL moves away from the clean prediction, which need not end in another class.
    assert accuracies[0] == 1 and accuracies[-1] <= (0.5 if loss == "kl" else 0)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_restarts_never_help_the_defender(model: nn.Module, batch: tuple[Tensor, Tensor], loss: str) -> None:
    images, labels = batch
    threat = epsilon_for("linf", 4)
    once, five = (
        PGD(threat, steps=3, loss=loss, restarts=r)(model, images, labels, [seeded(i) for i in range(64)])
        for r in (1, 5)
    )
    broken_once, broken_five = (model(x).argmax(1) != labels for x in (once, five))
    assert (broken_five | ~broken_once).all()
    assert torch.equal(five[broken_once], once[broken_once])  # what one run breaks is not attacked again
    assert not torch.equal(five, once)
    with torch.no_grad():
        reference = model(images) if loss == "kl" else labels
        gain = LOSSES[loss](model(five).double(), reference) - LOSSES[loss](model(once).double(), reference)
    assert (gain[~broken_five] >= -1e-5).all() and gain[~broken_five].max() > 0


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_a_targeted_attack_reaches_its_targets(model: nn.Module, batch: tuple[Tensor, Tensor], loss: str) -> None:
    images, labels = batch
    targets = (labels + 1) % CLASSES
    threat = epsilon_for("linf", 64)
    untargeted = PGD(threat, steps=20, loss=loss)(model, images, labels)
    targeted = PGD(threat, steps=20, loss=loss, targeted=True, restarts=2)(model, images, targets)
    assert accuracy(model, targeted, targets) > accuracy(model, untargeted, targets) + 0.2
    assert accuracy(model, targeted, targets) > 0.9


def test_confident_models_are_attacked_where_cross_entropy_itself_has_no_gradient(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch

    def confident(x: Tensor) -> Tensor:
        return 1e4 * model(x)

    pixels = images.clone().requires_grad_()
    (plain,) = torch.autograd.grad(F.cross_entropy(confident(pixels), labels, reduction="sum"), pixels)
    assert (plain.flatten(1) == 0).all(1).double().mean() > 0.9
    attack = PGD(epsilon_for("linf", 8), steps=20, loss="ce")
    result = attack.run(confident, images, labels)
    assert result.zero_gradient_share.max() < 0.01
    assert accuracy(model, result.images, labels) <= accuracy(model, attack(model, images, labels), labels) + 0.05


def test_the_loss_ranks_and_points_like_cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    logits = model(images).detach().double().requires_grad_()
    ours, plain = LOSSES["ce"](logits, labels), F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(F.softplus(ours), plain)
    (a,), (b,) = (torch.autograd.grad(x.sum(), logits) for x in (ours, plain))
    torch.testing.assert_close(torch.cosine_similarity(a, b), torch.ones(len(labels), dtype=torch.float64))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("loss", "restarts"), [("ce", 1), ("ce", 4), ("kl", 3), ("margin", 4)])
def test_a_generator_an_image_makes_results_independent_of_the_batch(
    model: nn.Module, batch: tuple[Tensor, Tensor], norm: str, loss: str, restarts: int
) -> None:
    images, labels = (x[:8] for x in batch)
    attack = PGD(epsilon_for(norm, 3), steps=4, loss=loss, restarts=restarts)

    def row_by_row(x: Tensor) -> Tensor:  # a matrix product may round differently in another batch size
        return torch.cat([model(row[None]) for row in x])

    def run(rows: list[int]) -> tuple[Tensor, list[Tensor]]:
        generators = [seeded(i) for i in rows]
        return attack(row_by_row, images[rows], labels[rows], generators), [g.get_state() for g in generators]

    whole, states = run(list(range(8)))
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [7, 2, 5, 0], [6]):
        part, part_states = run(rows)
        assert torch.equal(part, whole[rows])
        assert all(torch.equal(state, states[row]) for state, row in zip(part_states, rows, strict=True))


@pytest.mark.parametrize("restarts", [1, 3])
def test_the_same_seed_gives_the_same_bits(model: nn.Module, batch: tuple[Tensor, Tensor], restarts: int) -> None:
    attack = PGD(epsilon_for("linf", 2), steps=3, restarts=restarts)
    first, again, other = (attack(model, *batch, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(attack(model, *batch), attack(model, *batch, 0))


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("restarts", [1, 2])
def test_nothing_of_the_caller_is_disturbed(
    model: nn.Module, batch: tuple[Tensor, Tensor], loss: str, training: bool, restarts: int
) -> None:
    images, labels = batch
    model.train(training)
    model[1].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    images.requires_grad_()

    def snapshot() -> list[object]:
        tensors = [t.detach().clone() for t in (*model.parameters(), model[3].weight.grad, images, labels)]
        flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        states = [torch.get_rng_state(), hash(random.getstate()), hash(str(np.random.get_state()))]
        return [tensors, flags, modes, images.grad, images.requires_grad, torch.is_grad_enabled(), states]

    before = snapshot()
    adversarial = PGD(THREAT, steps=2, loss=loss, restarts=restarts)(model, images, labels)
    torch.testing.assert_close(snapshot(), before, rtol=0, atol=0)
    assert model[1].weight.grad is None
    assert not adversarial.requires_grad
    images.requires_grad_(False)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_callers_without_gradients_get_the_same_result(
    model: nn.Module, guard: Callable[[], torch.no_grad], loss: str
) -> None:
    attack = PGD(THREAT, steps=3, loss=loss, restarts=2)
    labels = torch.arange(8) % CLASSES
    expected = attack(model, some_images(8), labels)
    with guard():
        adversarial = attack(model, some_images(8), labels.clone())
        assert not torch.is_grad_enabled()
    assert torch.equal(adversarial, expected)
    with guard():
        images = some_images(8)
        given = attack(model, images, labels.clone(), clean_logits=model(images))
    assert torch.equal(given, expected)


def test_half_precision_logits_are_attacked_in_full_precision(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    model = make_model().bfloat16()
    attack = PGD(epsilon_for("linf", 8), steps=10)
    adversarial = attack(lambda x: model(x.bfloat16()), images, labels)
    assert adversarial.dtype == torch.float32
    assert accuracy(make_model(), adversarial, labels) < 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adversarial = attack(make_model(), images, labels)
    assert adversarial.dtype == torch.float32
    assert accuracy(make_model(), adversarial, labels) < 0.5


def test_small_losses_do_not_vanish_in_half_precision_layers(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    model = make_model().half()

    def gradient(scale: float) -> Tensor:
        return pixel_gradient(lambda x: model(x.half()), images, lambda z: scale * LOSSES["ce"](z, labels))[2]

    assert (gradient(1.0) != 0).double().mean() > 0.99
    torch.testing.assert_close(gradient(1e-12), gradient(1.0), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "given_logits", "forwards", "backwards"),
    [
        ({"steps": 7}, False, 7, 7),
        ({"steps": 4, "loss": "kl"}, False, 5, 4),
        ({"steps": 4, "loss": "kl"}, True, 4, 4),
        ({"steps": 4, "loss": "kl", "restarts": 3}, True, 15, 12),
        ({"steps": 4, "restarts": 3}, False, 15, 12),
    ],
)
def test_an_attack_costs_no_more_forwards_than_it_says(
    model: nn.Module, settings: dict[str, object], given_logits: bool, forwards: int, backwards: int
) -> None:
    images, counts = some_images(4), {"forward": 0, "backward": 0}
    labels = model(images).argmax(1)
    clean = model(images).detach() if given_logits else None

    def counted(x: Tensor) -> Tensor:
        counts["forward"] += 1
        logits = model(x)
        if logits.requires_grad and x.requires_grad:
            logits.register_hook(lambda _: counts.update(backward=counts["backward"] + 1))
        return logits

    threat = ThreatModel("linf", 1e-4)  # nothing is broken, so that every restart runs
    PGD(threat, **settings)(counted, images, labels, clean_logits=clean)  # type: ignore[arg-type]
    assert counts == {"forward": forwards, "backward": backwards}


def test_given_clean_logits_are_the_kl_reference(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    attack = PGD(THREAT, steps=3, loss="kl")
    clean = model(images)
    assert torch.equal(attack(model, images, labels, clean_logits=clean), attack(model, images, labels))
    assert not torch.equal(attack(model, images, labels, clean_logits=clean.flip(0)), attack(model, images, labels))


def test_zero_gradients_are_counted_for_each_image(model: nn.Module) -> None:
    images = some_images(4)

    def half_blind(x: Tensor) -> Tensor:
        seen = torch.cat([x[:, :, :4], x[:, :, 4:].detach()], dim=2)
        return model(torch.cat([seen[:2], seen[2:] * 0]))

    share = PGD(THREAT, steps=2).run(half_blind, images, torch.zeros(4).long()).zero_gradient_share
    assert share.tolist() == [0.5, 0.5, 1, 1]


def test_pixel_gradients_of_different_images_do_not_mix(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    _, losses, gradient = pixel_gradient(model, images, lambda z: LOSSES["ce"](z, labels))
    _, loss, alone = pixel_gradient(model, images[3:4], lambda z: LOSSES["ce"](z, labels[3:4]))
    assert losses.shape == (64,)
    torch.testing.assert_close(loss, losses[3:4], rtol=1e-5, atol=0)
    torch.testing.assert_close(alone, gradient[3:4], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("pgd-20", PGD(THREAT, steps=20)),
        ("pgd-1", PGD(THREAT, steps=1)),
        ("fgsm", PGD(THREAT, steps=1, random_start=False)),
        ("fgsm-margin", PGD(THREAT, steps=1, random_start=False, loss="margin")),
        ("pgd-100x5", PGD(THREAT, steps=100, restarts=5)),
        ("pgd-20-kl", PGD(THREAT, steps=20, loss="kl")),
        ("pgd-10x2-margin", PGD(THREAT, steps=10, restarts=2, loss="margin")),
    ],
)
def test_names_and_attacks_are_each_others(name: str, attack: PGD) -> None:
    assert attack.name == name
    assert parse_attack(name, THREAT) == attack


def test_a_name_tells_the_settings_that_are_not_the_default() -> None:
    assert PGD(THREAT, steps=20, targeted=True, random_start=False).name == "pgd-20-targeted-nostart"
    assert parse_attack("pgd-100", THREAT, step_size="1/255").name == "pgd-100-step0.003922"
    assert PGD(THREAT, steps=20, step_size="2/255").name == "pgd-20"  # 2/255 is the default of 8/255


def test_results_can_keep_every_setting() -> None:
    attack: Attack = PGD(THREAT, steps=3, loss="kl", restarts=2)
    kept = json.loads(json.dumps(attack.to_dict()))
    assert kept.pop("name") == "pgd-3x2-kl"
    threat = ThreatModel(**kept.pop("threat_model"))
    assert threat == attack.threat_model
    rebuilt = PGD(threat, **kept)
    assert rebuilt.to_dict() == attack.to_dict()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps=0 must be 1 or more"),
        ({"steps": 1.5}, TypeError, "steps=1.5 must be an integer"),
        ({"steps": True}, TypeError, "steps=True must be an integer"),
        ({"restarts": 0}, ValueError, "restarts=0 must be 1 or more"),
        ({"step_size": 0}, ValueError, "step_size=0 must be more than 0"),
        ({"step_size": -0.1}, ValueError, "at least 0"),
        ({"step_size": "a/b"}, ValueError, "fraction such as"),
        ({"loss": "dlr"}, ValueError, "unknown loss 'dlr'.*'ce', 'kl', 'margin'"),
        ({"loss": "kl", "random_start": False}, ValueError, "needs random_start=True.*exactly zero"),
        ({"loss": "kl", "targeted": True}, ValueError, "takes no target class"),
        ({"restarts": 2, "random_start": False}, ValueError, "every restart is the same"),
        ({"threat_model": "linf"}, TypeError, "must be a ThreatModel"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PGD(**{"threat_model": THREAT, **settings})  # type: ignore[arg-type]


@torch.no_grad()
def without_gradients(x: Tensor) -> Tensor:
    return x.flatten(1)[:, :CLASSES]


PARAMETER = nn.Parameter(torch.ones(4, CLASSES))


@pytest.mark.parametrize(
    ("logits_fn", "error", "message"),
    [
        (without_gradients, ValueError, "does not pass gradients to its pixels"),
        (lambda x: PARAMETER * 2, ValueError, "does not pass gradients to its pixels"),
        (lambda x: x.flatten(1).sum(1), ValueError, r"shape \(4,\) for 4 images: logits must be \(4, N\)"),
        (lambda x: x.flatten(1)[:, :1], ValueError, "N >= 2 classes"),
        (lambda x: x.flatten(1)[:2, :CLASSES], ValueError, r"shape \(2, 5\) for 4 images"),
        (lambda x: x.flatten(1)[:, :CLASSES] / 0, ValueError, "logits that are not finite"),
        (lambda x: (x.flatten(1)[:, :CLASSES] * 0).sqrt(), ValueError, "gradient at the pixels is not finite"),
        (lambda x: x.flatten(1)[:, :CLASSES].long(), TypeError, "returned torch.int64: logits must be a floating"),
        (lambda x: x.tolist(), TypeError, "returned list"),
        (lambda x: x.flatten(1)[:, :2], ValueError, "labels range from 0 to 3.*0 to 1, for 2 classes"),
    ],
)
def test_models_an_attack_cannot_use_are_refused(
    logits_fn: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PGD(THREAT, steps=1)(logits_fn, some_images(4), torch.arange(4))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"images": some_images(4) * 2 - 1}, ValueError, "before normalisation"),
        ({"images": some_images(4).half()}, TypeError, "float32 or float64"),
        ({"labels": torch.arange(4) + 2}, ValueError, "0 to 4, for 5 classes"),
        ({"labels": torch.arange(3)}, ValueError, "one for each image"),
        ({"generator": [seeded(0)] * 5}, ValueError, "5 generators were given for 4 images"),
        ({"generator": 0.5}, TypeError, "generator must be"),
        ({"clean_logits": torch.zeros(4, 3)}, ValueError, r"clean_logits have shape \(4, 3\)"),
        ({"clean_logits": torch.zeros(3, CLASSES)}, ValueError, "for 4 images"),
    ],
)
@pytest.mark.parametrize("restarts", [1, 2])
def test_inputs_an_attack_cannot_use_are_refused(
    model: nn.Module, changed: dict[str, object], error: type[Exception], message: str, restarts: int
) -> None:
    given = {"images": some_images(4), "labels": torch.arange(4), **changed}
    with pytest.raises(error, match=message):
        PGD(THREAT, steps=1, loss="kl", restarts=restarts)(model, **given)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("norm", NORMS)
def test_noise_of_a_cpu_generator_serves_images_on_a_gpu(norm: str) -> None:
    threat, images = ThreatModel(norm, "8/255"), some_images(8).cuda()
    noisy = threat.random_start(images, seeded(0))
    assert noisy.is_cuda
    torch.testing.assert_close(noisy.cpu(), threat.random_start(images.cpu(), seeded(0)))
