"""Models with bad manners: they write to what they get, overwrite what they gave, count, draw, and return NaN."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_models import CLASSES, epsilon_for, make_model, some_images

from capt_peft.attacks import APGD, FAB, PGD, Attack, AutoAttack, SearchAttack, Square, ThreatModel
from capt_peft.attacks.base import pixel_gradient
from capt_peft.attacks.losses import margin


class SmallAutoAttack(AutoAttack):
    """The standard version with few steps."""

    @property
    def parts(self) -> tuple[SearchAttack, ...]:
        threat = self.threat_model
        return APGD(threat, steps=3), FAB(threat, steps=2, targets=2), Square(threat, queries=10)


ATTACKS: dict[str, Callable[[ThreatModel], Attack]] = {
    "pgd": lambda threat: PGD(threat, steps=4),
    "pgd-kl": lambda threat: PGD(threat, steps=3, loss="kl", restarts=2),
    "pgd-margin": lambda threat: PGD(threat, steps=3, loss="margin", restarts=2),
    "apgd-ce": lambda threat: APGD(threat, steps=5, restarts=2),
    "apgd-dlr-eot": lambda threat: APGD(threat, loss="dlr", steps=3, eot=2),
    "apgd-t": lambda threat: APGD(threat, loss="t", steps=3, targets=2),
    "fab": lambda threat: FAB(threat, targets=0, steps=3, restarts=2),
    "fab-t": lambda threat: FAB(threat, targets=2, steps=3),
    "square": lambda threat: Square(threat, queries=30, restarts=2),
    "autoattack": SmallAutoAttack,
}
every_attack = pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS)
MODEL = make_model()


def polite(x: Tensor) -> Tensor:
    return MODEL(x - 0.5)


def writes(x: Tensor) -> Tensor:
    return MODEL(x.sub_(0.5))


def writes_to_data(x: Tensor) -> Tensor:
    x.data.sub_(0.5)
    return MODEL(x)


def writes_without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        x -= 0.5
    return MODEL(x)


def writes_afterwards(x: Tensor) -> Tensor:
    logits = polite(x)
    x.data.zero_()
    return logits


class Overwrites:
    """Returns one and the same memory at each call, and keeps and spoils what it got before."""

    def __init__(self) -> None:
        self.memory, self.before = torch.zeros(64, CLASSES), torch.zeros(1)

    def __call__(self, x: Tensor) -> Tensor:
        self.before.data.fill_(torch.nan)
        self.before = x.detach()
        memory = self.memory.detach()[: len(x)]
        memory.copy_(polite(x))
        return memory


RUDE: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "in place": lambda: writes,
    "data": lambda: writes_to_data,
    "no_grad": lambda: writes_without_gradients,
    "afterwards": lambda: writes_afterwards,
    "one memory": Overwrites,
}


@every_attack
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("rude", RUDE.values(), ids=RUDE)
def test_what_a_model_writes_to_changes_no_bit_of_an_attack(
    make: Callable[[ThreatModel], Attack], norm: str, rude: Callable[[], Callable[[Tensor], Tensor]]
) -> None:
    threat, images = epsilon_for(norm, 6), some_images(12)
    labels, before = polite(images).argmax(1), images.clone()
    expected = make(threat).run(polite, images, labels)
    model = rude()
    result = make(threat).run(model, images, labels)
    assert torch.equal(result.images, expected.images) and torch.equal(images, before)
    torch.testing.assert_close(result.zero_gradient_share, expected.zero_gradient_share, equal_nan=True)
    given = make(threat).run(model, images, labels, clean_logits=model(images.clone()).detach()).images
    assert torch.equal(given, expected.images)
    assert threat.norm_of(given - images).max() <= threat.epsilon + 1e-6


@pytest.mark.parametrize("rude", RUDE.values(), ids=RUDE)
def test_a_pixel_gradient_is_taken_where_it_was_asked_for(rude: Callable[[], Callable[[Tensor], Tensor]]) -> None:
    images = some_images(6)
    loss = partial(margin, labels=torch.arange(6) % CLASSES)
    expected, model = pixel_gradient(polite, images, loss), rude()
    for _ in range(2):
        found = pixel_gradient(model, images, loss)
        pixel_gradient(model, 1 - images, loss)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(images, some_images(6))


class Changing(nn.Module):
    """A model in train mode whose statistics move, whose calls are counted, and whose neurons drop out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.model = nn.BatchNorm2d(3), nn.Dropout(0.3), make_model()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        return self.model(self.drop(self.norm(x)))

    def logits(self, x: Tensor) -> Tensor:
        return self(x)


class Holder:
    """An object that is no module and holds one."""

    def __init__(self, model: nn.Module) -> None:
        self.models = [model]

    def __call__(self, x: Tensor) -> Tensor:
        return self.models[0](x)

    def logits(self, x: Tensor) -> Tensor:
        return self.models[0](x)


GLOBAL = Changing()


def through_a_global(x: Tensor) -> Tensor:
    return GLOBAL(x)


WAYS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "module": lambda model: model,
    "method": lambda model: model.logits,  # type: ignore[return-value]
    "closure": lambda model: lambda x: model(x) * 2,
    "closure of a closure": lambda model: (lambda inner: lambda x: inner(x))(lambda x: model(x)),
    "partial": lambda model: partial(lambda m, x: m(x), model),
    "object": Holder,
    "method of an object": lambda model: Holder(model).logits,
    "global": lambda model: through_a_global,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", [ATTACKS["pgd"], ATTACKS["square"], ATTACKS["autoattack"]])
def test_an_attack_leaves_buffers_modes_and_random_numbers_as_they_were(
    make: Callable[[ThreatModel], Attack], way: Callable[[nn.Module], Callable[[Tensor], Tensor]]
) -> None:
    model = GLOBAL if way is WAYS["global"] else Changing()
    buffers = dict(model.named_buffers())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    labels = torch.arange(8) % CLASSES
    first = make(epsilon_for("linf", 4))(way(model), some_images(8), labels, 5)
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert (random.getstate(), str(np.random.get_state())) == numbers[1:]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert all(value is buffers[name] for name, value in model.named_buffers())
    assert all(module.training for module in (model, model.norm, model.drop))
    torch.rand(3)  # what a random model draws under attack follows from the attack's seed alone
    assert torch.equal(make(epsilon_for("linf", 4))(way(model), some_images(8), labels, 5), first)


def test_the_noise_of_a_random_model_under_attack_is_not_what_it_draws_next() -> None:
    drawn: list[Tensor] = []

    def noisy(x: Tensor) -> Tensor:
        drawn.append(torch.rand(4))
        return MODEL(x)

    PGD(epsilon_for("linf", 2), steps=3)(noisy, some_images(2), torch.zeros(2, dtype=torch.int64))
    under_attack = list(drawn)
    noisy(some_images(2))
    assert not any(torch.equal(drawn[-1], noise) for noise in under_attack)


@every_attack
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("call", [0, 2])
def test_logits_that_are_not_finite_are_refused_at_whatever_call_they_come(
    make: Callable[[ThreatModel], Attack], value: float, call: int
) -> None:
    calls = []

    def spoilt(x: Tensor) -> Tensor:
        calls.append(1)
        logits = MODEL(x)
        return logits if len(calls) <= call else logits + torch.tensor([value] + [0] * (CLASSES - 1))

    images = some_images(6)
    with pytest.raises(ValueError, match="logits that are not finite"):
        make(ThreatModel("linf", "1/255"))(spoilt, images, MODEL(images).argmax(1))
