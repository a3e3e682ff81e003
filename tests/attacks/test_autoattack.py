"""AutoAttack: its parts are the published ones, each gets what the others left, and together they find the most."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from pyarrow.parquet import read_table
from torch import Tensor, nn
from torch.nn import functional as F
from toy_models import CLASSES, accuracy, epsilon_for, make_model, seeded, some_images

from capt_peft.attacks import (
    APGD,
    FAB,
    Attack,
    AttackResult,
    AutoAttack,
    SearchAttack,
    Square,
    ThreatModel,
    parse_attack,
)
from capt_peft.toy.tasks import DIGITS_FILE

NORMS = ["linf", "l2"]
both_norms = pytest.mark.parametrize("norm", NORMS)
THREAT = ThreatModel("linf", "8/255")


class SmallAutoAttack(AutoAttack):
    """The standard version with fewer steps, weak attacks first so that each of the four breaks something."""

    @property
    def parts(self) -> tuple[SearchAttack, ...]:
        threat = self.threat_model
        apgd = APGD(threat, steps=1), APGD(threat, loss="t", steps=2, targets=2)
        return Square(threat, queries=40), *apgd, FAB(threat, steps=5)


@pytest.fixture
def model() -> nn.Sequential:
    """The toy model with a bias that spreads its predictions over the classes."""
    model = make_model()
    model[3].bias.data -= model(some_images(256)).mean(0)
    return model


@pytest.fixture
def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images with the model's own predictions as labels, but for every eighth."""
    images = some_images()
    labels = model(images).argmax(1)
    labels[::8] = (labels[::8] + 1) % CLASSES
    return images, labels


Digits = tuple[nn.Sequential, Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Digits:
    """An MLP trained on 1,000 of the handwritten digits in three colours, and 60 digits that it has not seen."""
    scans = read_table(DIGITS_FILE).sort_by("scan")
    images = torch.tensor(scans["pixels"].to_pylist()).view(-1, 1, 8, 8).div(16).expand(-1, 3, -1, -1).contiguous()
    labels, noise = torch.tensor(scans["label"].to_pylist()), seeded(0)
    model = make_model(scale=1.0, classes=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        seen = (images[:1000] + 0.1 * torch.randn(1000, 3, 8, 8, generator=noise)).clamp(0, 1)
        optimizer.zero_grad()
        F.cross_entropy(model(seen), labels[:1000]).backward()
        optimizer.step()
    return model.requires_grad_(False), images[1000:1060], labels[1000:1060]


def robust(attack: Attack, digits: Digits) -> float:
    model, images, labels = digits
    return accuracy(model, attack(model, images, labels), labels)


@both_norms
def test_a_trained_model_is_no_more_robust_than_against_pgd_with_restarts(digits: Digits, norm: str) -> None:
    class Shorter(AutoAttack):
        @property
        def parts(self) -> tuple[SearchAttack, ...]:
            apgd_ce, apgd_t, *_ = super().parts
            shorter = replace(apgd_t, steps=40)  # type: ignore[type-var]
            return apgd_ce, shorter, FAB(self.threat_model, steps=3), Square(self.threat_model, queries=50)

    threat = epsilon_for(norm, 14 if norm == "linf" else 20)
    pgd, auto = robust(parse_attack("pgd-100x5", threat), digits), robust(Shorter(threat), digits)
    assert accuracy(*digits) > 0.9 and 0.2 < pgd < 0.8
    assert pgd - 0.1 < auto <= pgd


@both_norms
def test_square_alone_finds_no_more_than_gradients_do(digits: Digits, norm: str) -> None:
    """Where it does, gradients are masked: here they are not."""
    threat = epsilon_for(norm, 14 if norm == "linf" else 20)
    apgd, square = (robust(attack, digits) for attack in (APGD(threat), Square(threat, queries=500)))
    assert apgd - 0.002 <= square < accuracy(*digits)


@pytest.mark.parametrize("norm", NORMS)
def test_the_versions_are_the_published_ones(norm: str) -> None:
    threat = ThreatModel(norm, 0.1)
    apgd = {"steps": 100, "restarts": 1, "eot": 1}
    square = {"name": "square", "queries": 5000, "restarts": 1, "p_init": 0.8}
    apgd_t = {"name": "apgd-t", "loss": "t", "targets": 9, **apgd}
    fab_t = {"name": "fab-t", "targets": 9, "steps": 100, "restarts": 1}
    versions = {
        "standard": [{"name": "apgd-ce", "loss": "ce", **apgd}, apgd_t, fab_t, square],
        "plus": [
            {"name": "apgd-ce-100x5", "loss": "ce", **apgd, "restarts": 5},
            {"name": "apgd-dlr-100x5", "loss": "dlr", **apgd, "restarts": 5},
            {"name": "fab-100x5", "targets": 0, "steps": 100, "restarts": 5},
            square,
            apgd_t,
            fab_t,
        ],
        "rand": [
            {"name": "apgd-ce-eot20", "loss": "ce", **apgd, "eot": 20},
            {"name": "apgd-dlr-eot20", "loss": "dlr", **apgd, "eot": 20},
        ],
    }
    for version, parts in versions.items():
        attack = AutoAttack(threat, version=version)
        assert attack.to_dict()["parts"] == parts
        assert all(part.threat_model == threat for part in attack.parts)
    assert AutoAttack(threat) == AutoAttack(threat, version="standard")


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_results_can_keep_every_setting_of_every_part(version: str) -> None:
    attack = AutoAttack(THREAT, version=version)
    kept = json.loads(json.dumps(attack.to_dict()))
    assert kept == attack.to_dict() and set(kept) == {"name", "threat_model", "version", "parts"}
    assert AutoAttack(ThreatModel(**kept["threat_model"]), version=kept["version"]) == attack
    kinds = {"apgd": APGD, "fab": FAB, "square": Square}
    for part, settings in zip(attack.parts, kept["parts"], strict=True):
        name = settings.pop("name")
        assert name == part.name and kinds[name.split("-")[0]](THREAT, **settings) == part
        silent = {field.name for field in fields(part)} - {"_", "threat_model", *settings}  # type: ignore[arg-type]
        assert silent == ({"targets"} if isinstance(part, APGD) and part.loss != "t" else set())


def test_each_part_is_given_what_the_parts_before_left_standing(
    model: nn.Module, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = batch
    given: list[tuple[str, Tensor, Tensor]] = []
    run = SearchAttack.run

    def listening(self: SearchAttack, logits_fn: object, x: Tensor, y: Tensor, *rest: object, **more: object) -> object:
        given.append((self.name, x.clone(), y.clone()))
        return run(self, logits_fn, x, y, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(SearchAttack, "run", listening)
    attack = SmallAutoAttack(epsilon_for("linf", 8))
    result = attack.run(model, images, labels)
    standing = model(images).argmax(1) == labels
    assert standing.sum() == 56
    for part, piece, (name, x, y) in zip(attack.parts, result.parts, given, strict=True):
        assert piece.name == name == part.name and piece.attacked == len(x) == standing.sum()
        assert torch.equal(x, images[standing]) and torch.equal(y, labels[standing])  # the images themselves
        assert piece.broken.shape == (64,) and piece.broken.sum() > 0
        assert not (piece.broken & ~standing).any()  # nobody breaks what is broken
        standing = standing & ~piece.broken
    assert torch.equal(standing, model(result.images).argmax(1) == labels) and standing.any()


def test_no_forward_takes_more_images_than_its_part_was_given(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    sizes: dict[str, list[int]] = {"": []}

    def counted(x: Tensor) -> Tensor:
        list(sizes.values())[-1].append(len(x))
        return model(x)

    def report(name: str, stage: str, left: int) -> None:
        sizes.setdefault(name, [])

    result = SmallAutoAttack(epsilon_for("linf", 8)).run(counted, *batch, report=report)
    assert sizes.pop("") == [64]  # the clean images, once
    assert {name: max(given) for name, given in sizes.items()} == {part.name: part.attacked for part in result.parts}
    assert [part.attacked for part in result.parts] == sorted({part.attacked for part in result.parts}, reverse=True)


@both_norms
def test_what_a_part_breaks_stays_broken_and_in_the_ball_of_the_clean_image(
    model: nn.Module, batch: tuple[Tensor, Tensor], norm: str
) -> None:
    images, labels = batch
    threat = epsilon_for(norm, 8)
    first = SmallAutoAttack(threat).parts[0].run(model, images, labels, 7)
    result = SmallAutoAttack(threat).run(model, images, labels, 7)
    broken = result.parts[0].broken
    assert torch.equal(result.images[broken], first.images[broken])  # and no later part has touched it
    union = torch.stack([part.broken for part in result.parts]).any(0)
    assert torch.equal(model(result.images).argmax(1) != labels, union | (model(images).argmax(1) != labels))
    delta = (result.images - images).double().flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert length.max() <= threat.epsilon + 1e-6


def test_the_share_of_zero_gradients_is_that_of_the_first_part_with_gradients(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    def half_blind(x: Tensor) -> Tensor:
        return model(torch.cat([x[:, :, :4], x[:, :, 4:].detach()], dim=2))

    result = SmallAutoAttack(epsilon_for("linf", 8)).run(half_blind, *batch)
    square, *_ = result.parts
    seen = (half_blind(batch[0]).argmax(1) == batch[1]) & ~square.broken
    assert (result.zero_gradient_share[seen] == 0.5).all() and result.zero_gradient_share[~seen].isnan().all()


def test_nothing_left_costs_no_more_forwards(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return model(x)

    images = some_images()
    result = AutoAttack(THREAT).run(counted, images, (model(images).argmax(1) + 1) % CLASSES)
    assert calls == 1 and torch.equal(result.images, images)
    assert [(part.name, part.attacked, part.broken.any().item()) for part in result.parts] == [
        (name, 0, False) for name in ("apgd-ce", "apgd-t", "fab-t", "square")
    ]


def test_the_real_one_breaks_a_weak_model_and_says_what_it_changed(model: nn.Module) -> None:
    images = some_images(4)
    labels = model(images).argmax(1)
    weak: AttackResult = AutoAttack(epsilon_for("linf", 32)).run(model, images, labels)
    assert accuracy(model, weak.images, labels) == 0 and weak.notes == (
        "apgd-t: 4 targets instead of 9 (5 classes)",
        "fab-t: 4 targets instead of 9 (5 classes)",
    )
    assert [part.attacked for part in weak.parts] == [4, 0, 0, 0]
