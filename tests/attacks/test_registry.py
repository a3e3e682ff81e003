"""Names of attacks: what is read from one is written as the same, a wrong one is answered, and own attacks join them."""

from __future__ import annotations

import json
import re
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from toy_models import make_model, some_images

from capt_peft.attacks import (
    APGD,
    CW,
    FAB,
    PGD,
    Attack,
    AttackResult,
    AutoAttack,
    Batch,
    Patch,
    Square,
    ThreatModel,
    attack_names,
    parse_attack,
    register_attack,
    registry,
)
from capt_peft.attacks.registry import fitting, known_attack
from capt_peft.benchmark import Plan, get_suite
from capt_peft.benchmark.cost import passes
from capt_peft.evaluation import evaluate

KNOWN = attack_names()
THREAT = ThreatModel("linf", "8/255")
# every example in the table: words that begin with the name of an attack, but for the placeholder
LISTED = re.findall(r"\b(?:fgsm|a?pgd|cw|fab|square|autoattack)(?:-(?!STEPS)\w+)*", " ".join([*KNOWN, *KNOWN.values()]))
EXAMPLES = sorted(set(LISTED) - {"pgd", "cw"})
PATCH = ThreatModel("patch", "1/4")


def test_the_table_holds_the_names_of_all_attacks() -> None:
    assert {type(parse_attack(name, THREAT)) for name in EXAMPLES} == {PGD, CW, APGD, FAB, Square, AutoAttack}
    assert len(EXAMPLES) == 17


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("threat", [THREAT, ThreatModel("l2", 0.5), ThreatModel("l1", 12)])
def test_every_name_in_the_table_is_that_of_the_attack_it_makes(name: str, threat: ThreatModel) -> None:
    attack = parse_attack(name, threat)
    assert attack.name == attack.to_dict()["name"] == name
    assert attack.threat_model == threat


@pytest.mark.parametrize("name", ["patch", "patch-50", "patch-50x30", "patch-20x3"])
def test_the_names_of_patches_are_read_and_lead_back(name: str) -> None:
    attack = parse_attack(name, PATCH)
    assert isinstance(attack, Patch) and attack.name == name
    assert known_attack(json.loads(json.dumps(attack.to_dict()))) == attack
    assert "patch" in KNOWN


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_attack_within_a_ball_is_refused_for_a_patch_and_a_patch_for_a_ball(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"'{name}': \w+ is built for linf, l2, l1, not for patch 0.25: use .*patch-20"
    ):
        parse_attack(name, PATCH)
    with pytest.raises(ValueError, match=r"'patch': Patch is built for patch, not for L-inf 8/255: use 'pgd-20'"):
        parse_attack("patch", THREAT)


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("apgd-ce", APGD(THREAT)),
        ("apgd-ce-50", APGD(THREAT, steps=50)),
        ("apgd-ce-50x5", APGD(THREAT, steps=50, restarts=5)),
        ("apgd-ce-100x5", APGD(THREAT, restarts=5)),
        ("apgd-dlr", APGD(THREAT, loss="dlr")),
        ("apgd-dlr-7", APGD(THREAT, loss="dlr", steps=7)),
        ("apgd-t", APGD(THREAT, loss="t")),
        ("apgd-t-20x2", APGD(THREAT, loss="t", steps=20, restarts=2)),
        ("fab", FAB(THREAT, targets=0)),
        ("fab-50", FAB(THREAT, targets=0, steps=50)),
        ("fab-t", FAB(THREAT)),
        ("fab-t-50x5", FAB(THREAT, steps=50, restarts=5)),
        ("square", Square(THREAT)),
        ("square-1000", Square(THREAT, queries=1000)),
        ("square-1000x2", Square(THREAT, queries=1000, restarts=2)),
        ("autoattack", AutoAttack(THREAT)),
        ("autoattack-plus", AutoAttack(THREAT, version="plus")),
        ("autoattack-rand", AutoAttack(THREAT, version="rand")),
    ],
)
def test_names_and_attacks_are_each_others(name: str, attack: Attack) -> None:
    assert attack.name == name
    assert parse_attack(name, THREAT) == attack


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("autoattack-standard", "autoattack"),
        ("apgd-ce-100", "apgd-ce"),
        ("apgd-t-100x1", "apgd-t"),
        ("fab-t-100", "fab-t"),
        ("square-5000", "square"),
        ("pgd-20x1", "pgd-20"),
    ],
)
def test_a_default_that_is_written_out_is_left_out_again(name: str, short: str) -> None:
    assert parse_attack(name, THREAT) == parse_attack(short, THREAT)
    assert parse_attack(name, THREAT).name == short


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (APGD(THREAT, loss="t", targets=3), "apgd-t-3targets"),
        (APGD(THREAT, targets=3), "apgd-ce"),  # which has no targets
        (APGD(THREAT, loss="dlr", steps=50, eot=20), "apgd-dlr-50-eot20"),
        (FAB(THREAT, targets=3, steps=20), "fab-t-20-3targets"),
        (Square(THREAT, p_init=0.3), "square-p0.3"),
        (Square(THREAT, queries=10, restarts=2, p_init=0.05), "square-10x2-p0.05"),
    ],
)
def test_a_name_tells_the_settings_that_are_not_the_default(attack: Attack, name: str) -> None:
    assert attack.name == name


def test_attacks_are_run_under_the_threat_models_that_they_are_built_for() -> None:
    ball, patch = ThreatModel("linf", "4/255"), ThreatModel("patch", "1/8")
    assert fitting(["pgd-20", "patch-5"], [patch, ball]) == [("patch-5", patch), ("pgd-20", ball)]
    assert fitting(["pgd-20"], [patch]) == [("pgd-20", patch)]  # refused in a sentence
    assert fitting(["pdg-20"], [patch, ball]) == [("pdg-20", patch), ("pdg-20", ball)] and fitting(["pgd-20"], []) == []


def test_different_settings_have_different_names() -> None:
    attacks: list[Attack] = []
    for count in (1, 2, 100):
        for restarts in (1, 2):
            sized = {"steps": count, "restarts": restarts}
            attacks += [APGD(THREAT, loss=loss, **sized) for loss in ("ce", "dlr", "t")]  # type: ignore[arg-type]
            attacks += [APGD(THREAT, loss="t", targets=3, eot=eot, **sized) for eot in (1, 2)]  # type: ignore[arg-type]
            attacks += [FAB(THREAT, targets=targets, **sized) for targets in (0, 3, 9)]
            attacks += [Square(THREAT, queries=count, restarts=restarts, p_init=p) for p in (0.8, 0.5)]
            attacks += [PGD(THREAT, **sized)]  # type: ignore[arg-type]
    assert len({attack.name for attack in attacks}) == len(attacks)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "pgd",
        "apgd",
        "APGD-CE",
        "apgd-kl",
        "apgd-ce-",
        "apgd-ce-50x",
        "apgd-ce-x5",
        "apgd-ce 50",
        "apgd-t-3targets",
        "fab-t-t",
        "square-1000-2",
        "square-1e3",
        "autoattack-20",
        "auto-attack",
        "xapgd-ce",
        " square",
        "square\n",
        "apgd-ce-9999999999",
        None,
        20,
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown attack") as error:
        parse_attack(name, THREAT)
    assert repr(name) in str(error.value)
    assert all(shape in str(error.value) and meaning in str(error.value) for shape, meaning in KNOWN.items())


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("pdg-20", "pgd-20"),
        ("AutoAttack", "autoattack"),
        ("apgd_ce", "apgd-ce"),
        ("squares", "square"),
        ("deepfool", None),
    ],
)
def test_a_name_much_like_a_known_one_is_answered_with_that(name: str, near: str | None) -> None:
    with pytest.raises(ValueError, match=f"'{name}'. Did you mean {near}. Known" if near else f"'{name}'. Known"):
        parse_attack(name, THREAT)


@pytest.mark.parametrize("name", ["apgd-ce-0", "fab-t-10x0", "square-0", "pgd-10x0"])
def test_counts_of_zero_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="=0 must be 1 or more"):
        parse_attack(name, THREAT)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.startswith(("pgd", "fgsm", "cw"))])
def test_a_step_size_is_refused_by_attacks_that_set_their_own(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' sets its own step size: leave step_size='1/255' out"):
        parse_attack(name, THREAT, step_size="1/255")


@pytest.mark.parametrize("name", ["pgd-20", "pgd-20x2-margin", "fgsm"])
def test_a_step_size_is_taken_by_pgd_and_fgsm(name: str) -> None:
    attack = parse_attack(name, THREAT, step_size="1/255")
    assert isinstance(attack, PGD) and attack.resolved_step_size == pytest.approx(1 / 255)


@pytest.mark.parametrize(
    ("cheap", "dear", "factor"),
    [("fgsm", "pgd-10", 10), ("pgd-10", "pgd-20", 2), ("pgd-20", "pgd-20x5", 5), ("apgd-ce-20", "apgd-t-20", 9)],
)
def test_the_cost_of_an_attack_grows_with_its_steps_restarts_and_targets(cheap: str, dear: str, factor: int) -> None:
    assert parse_attack(dear, THREAT).passes == factor * parse_attack(cheap, THREAT).passes


def test_an_ensemble_costs_what_its_parts_cost() -> None:
    names = ("apgd-ce", "apgd-t", "fab-t", "square")
    assert parse_attack("autoattack", THREAT).passes == sum(parse_attack(name, THREAT).passes for name in names)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_settings_in_results_lead_back_to_the_attack(name: str) -> None:
    attack = parse_attack(name, THREAT)
    kept = json.loads(json.dumps(attack.to_dict()))
    found = known_attack(kept)
    assert type(found) is type(attack) and found.to_dict() == attack.to_dict()
    assert known_attack(kept | {"own": True}) is None


# ---------------------------------------------------------------------------------------------- an attack of your own


@dataclass(frozen=True)
class Flat(Attack):
    """Grey images, as near as the ball allows."""

    pattern = r"flat(?:-(?P<level>\d+))?"
    help: ClassVar[dict[str, str]] = {"flat-LEVEL": "flat-128 moves every pixel towards 128/255"}
    uses_gradients: ClassVar[bool] = False
    passes = 1.0
    threat_model: ThreatModel
    _: KW_ONLY
    level: int = 128

    @property
    def name(self) -> str:
        return f"flat-{self.level}"

    def perturb(self, logits_fn: Any, batch: Batch) -> AttackResult:
        goal = torch.full_like(batch.images, self.level / 255)
        return AttackResult(self.threat_model.project(goal, batch.images), torch.full((len(goal),), torch.nan))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> type[Attack]:
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    return register_attack(Flat)


def test_an_attack_from_outside_is_known_by_name_with_its_cost(registered: type[Attack]) -> None:
    assert parse_attack("flat", THREAT) == Flat(THREAT)
    attack = parse_attack("flat-7", THREAT)
    assert attack == Flat(THREAT, level=7) and attack.passes == 1
    assert attack.to_dict() == {"name": "flat-7", "threat_model": THREAT.to_dict(), "level": 7}
    with pytest.raises(ValueError, match=r"Did you mean flat-128\? .*flat-LEVEL \(flat-128 moves"):
        parse_attack("flat128", THREAT)
    with pytest.raises(ValueError, match="'flat' sets its own step size"):
        parse_attack("flat", THREAT, step_size="1/255")
    cell = Plan(get_suite("toy"), "none", ["zero-shot"], ["few-shot"], [1], [0], ["digits"], limit=4).cells()[0]
    assert passes(replace(cell, attacks=("flat",))) == 4 * (1 + 1)


def test_an_attack_from_outside_is_evaluated_and_shown_by_its_strength(
    registered: type[Attack], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = some_images(8)
    model = make_model()
    attack = parse_attack("flat-7", THREAT)
    evaluation = evaluate(model, (images, model(images).argmax(1)), attacks=[attack, Square(THREAT, queries=2)])
    outcome = evaluation.attacks[0]
    assert outcome.name == "flat-7" and outcome.gradients == 0 and outcome.forwards == 0
    moved = THREAT.project(torch.full_like(images, 7 / 255), images)
    assert outcome.accuracy.correct == (model(moved).argmax(1) == model(images).argmax(1)).sum()
    found = known_attack(json.loads(json.dumps(outcome.attack)))
    assert found == attack and not found.strong


def test_what_is_no_attack_with_a_name_is_not_registered(registered: type[Attack]) -> None:
    assert register_attack(Flat) is Flat  # a cell of a notebook that runs again
    for kind in (object, Attack, "flat"):
        with pytest.raises(TypeError, match="must be a subclass of Attack with a pattern and a help"):
            register_attack(kind)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="is that of Flat already"):
        register_attack(type("Other", (Flat,), {}))
