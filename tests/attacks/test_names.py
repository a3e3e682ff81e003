"""Names of attacks: what is read from one is written as the same, and a wrong one is answered with those there are."""

from __future__ import annotations

import re

import pytest

from capt_peft.attacks import APGD, FAB, PGD, Attack, AutoAttack, Square, ThreatModel, parse_attack
from capt_peft.attacks.registry import KNOWN

THREAT = ThreatModel("linf", "8/255")
# every example in the table: words that begin with the name of an attack, but for the placeholder
LISTED = re.findall(r"\b(?:fgsm|a?pgd|fab|square|autoattack)(?:-(?!STEPS)\w+)*", " ".join([*KNOWN, *KNOWN.values()]))
EXAMPLES = sorted(set(LISTED) - {"pgd"})


def test_the_table_holds_the_names_of_all_attacks() -> None:
    assert {type(parse_attack(name, THREAT)) for name in EXAMPLES} == {PGD, APGD, FAB, Square, AutoAttack}
    assert len(EXAMPLES) == 15


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("threat", [THREAT, ThreatModel("l2", 0.5)])
def test_every_name_in_the_table_is_that_of_the_attack_it_makes(name: str, threat: ThreatModel) -> None:
    attack = parse_attack(name, threat)
    assert attack.name == attack.to_dict()["name"] == name
    assert attack.threat_model == threat


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


@pytest.mark.parametrize("name", ["apgd-ce-0", "fab-t-10x0", "square-0", "pgd-10x0"])
def test_counts_of_zero_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="=0 must be 1 or more"):
        parse_attack(name, THREAT)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.startswith(("pgd", "fgsm"))])
def test_a_step_size_is_refused_by_attacks_that_set_their_own(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' sets its own step size: step_size='1/255' is for pgd and fgsm"):
        parse_attack(name, THREAT, step_size="1/255")


@pytest.mark.parametrize("name", ["pgd-20", "pgd-20x2-margin", "fgsm"])
def test_a_step_size_is_taken_by_pgd_and_fgsm(name: str) -> None:
    attack = parse_attack(name, THREAT, step_size="1/255")
    assert isinstance(attack, PGD) and attack.resolved_step_size == pytest.approx(1 / 255)
