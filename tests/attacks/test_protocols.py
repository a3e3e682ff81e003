"""Published protocols: the attacks that each stands for, setting by setting, what they refuse, and CW by its usual name."""

import pytest
import torch
from toy_models import make_model, some_images

from capt_peft.attacks import CW, PGD, ThreatModel, get_protocol, known_protocols, parse_attack
from capt_peft.attacks.registry import known_attack
from capt_peft.data import TEMPLATES
from capt_peft.data.catalog import CATALOG

NAMES = ["fap", "apt", "tecoa", "robustvlm", "ttc", "rtpt"]


def pgd(steps, step_size, epsilon, name):
    return {
        "name": name, "threat_model": {"norm": "linf", "epsilon": epsilon}, "steps": steps, "step_size": step_size, "loss": "ce",
        "restarts": 1, "random_start": True, "targeted": False,
    }  # fmt: skip


def apgd(epsilon):
    common = {"threat_model": {"norm": "linf", "epsilon": epsilon}, "steps": 100, "eot": 1}
    return [
        {"name": "apgd-ce-100x5", "loss": "ce", "restarts": 5, **common},
        {"name": "apgd-t", "loss": "t", "restarts": 1, "targets": 9, **common},
    ]


@pytest.mark.parametrize(
    ("name", "epsilon", "attacks"),
    [
        ("fap", "1/255", [pgd(100, 1 / 255, 1 / 255, "pgd-100-step0.003922")]),
        ("apt", "4/255", [pgd(100, 1 / 255, 4 / 255, "pgd-100")]),
        ("apt", "1/255", [pgd(100, 0.25 / 255, 1 / 255, "pgd-100")]),
        ("tecoa", "1/255", [pgd(100, 1 / 255, 1 / 255, "pgd-100-step0.003922")]),
        ("robustvlm", "2/255", apgd(2 / 255)),
        ("robustvlm", "4/255", apgd(4 / 255)),
        ("robustvlm", "1/255", apgd(1 / 255)),
        ("ttc", "1/255", [pgd(10, 1 / 255, 1 / 255, "pgd-10-step0.003922")]),
        ("rtpt", "1/255", [pgd(7, 0.25 / 255, 1 / 255, "pgd-7-step0.0009804")]),
    ],
)
def test_the_attacks_of_each_protocol_at_each_radius(name, epsilon, attacks):
    assert [attack.to_dict() for attack in get_protocol(name).attacks_at(epsilon)] == attacks


def test_these_are_all_protocols_and_radii_the_usual_one_first():
    assert {name: of.epsilon for name, of in known_protocols().items()} == {
        "fap": ("1/255",), "apt": ("4/255", "1/255"), "tecoa": ("1/255",), "robustvlm": ("2/255", "4/255", "1/255"),
        "ttc": ("1/255",), "rtpt": ("1/255",),
    }  # fmt: skip
    assert all(get_protocol(n).attacks_at() == get_protocol(n).attacks_at(get_protocol(n).epsilon[0]) for n in NAMES)


def test_images_splits_and_texts():
    assert {of.split for of in known_protocols().values()} == {"test"}
    assert [get_protocol(name).images for name in NAMES] == [None, None, None, 1000, None, None]
    assert [get_protocol(name).template for name in NAMES] == [
        None, "a photo of a {}", "This is a photo of a {}", None, "This is a photo of a {}.", "a photo of a {}.",
    ]  # fmt: skip
    robustvlm = get_protocol("robustvlm")
    assert (robustvlm.images_in("imagenet"), robustvlm.images_in("dtd")) == (5000, 1000)
    assert (robustvlm.template_for("dtd"), robustvlm.template_for("oxford_pets")) == ("clip-dtd", None)
    assert set(robustvlm.templates) <= set(CATALOG) and set(robustvlm.templates.values()) <= set(TEMPLATES)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_a_source_and_every_other_attack_runs(name):
    protocol = get_protocol(name)
    given = {"attacks", "epsilon", "split", "images", "template"}
    given |= {"step_size"} & {key for key in ("step_size",) if protocol.step_size} | (
        {"beside"} if protocol.beside else set()
    )
    assert set(protocol.sources) == given and "commit" in protocol.read and protocol.differs
    threat = ThreatModel(protocol.norm, protocol.epsilon[0])
    for other in protocol.beside:
        attack = protocol.attack(other, threat)
        if isinstance(attack, PGD):
            assert attack.resolved_step_size == protocol.attacks_at()[0].resolved_step_size


def test_a_radius_may_be_written_in_any_way_and_must_be_of_the_protocol():
    apt = get_protocol("apt")
    assert apt.radius(4 / 255) == apt.radius("8/510") == "4/255"
    assert (apt.step_size_at("4/255"), apt.step_size_at(1 / 255), get_protocol("fap").step_size_at("1/255")) == (
        "1/255", "1/1020", "1/255",
    )  # fmt: skip
    with pytest.raises(ValueError, match="protocol apt is of epsilon 4/255 or 1/255, not 8/255"):
        apt.attacks_at("8/255")
    with pytest.raises(ValueError, match="protocol fap is of the norm linf, not l2"):
        get_protocol("fap").attack("pgd-100", ThreatModel("l2", "1/255"))
    with pytest.raises(ValueError, match=r"Unknown protocol 'afp'\. Allowed: fap, apt, tecoa, robustvlm, ttc, rtpt"):
        get_protocol("afp")


def test_attacks_are_checked_by_their_settings_not_by_their_names():
    fap, threat = get_protocol("fap"), ThreatModel("linf", "1/255")
    fap.check([*fap.attacks_at(), parse_attack("autoattack", threat)])
    for attacks in ([parse_attack("pgd-100", threat)], [PGD(threat, steps=100, step_size="1/255", loss="margin")]):
        with pytest.raises(
            ValueError, match=r"protocol fap measures pgd-100-step0\.003922 at L-inf 1/255, which is not among"
        ):
            fap.check(attacks)
    with pytest.raises(ValueError, match="protocol fap measures pgd-100, and there is no attack"):
        fap.check([])
    with pytest.raises(ValueError, match="epsilon 1/255, not"):
        fap.check([*fap.attacks_at(), parse_attack("autoattack", ThreatModel("linf", "4/255"))])
    assert get_protocol("robustvlm").lacking(["apgd-t", "autoattack"]) == ["apgd-ce-100x5"]


# ------------------------------------------------------------------------------------------------------------ CW


@pytest.mark.parametrize(
    ("name", "same"), [("cw-20", "pgd-20-margin"), ("cw-3x2", "pgd-3x2-margin"), ("cw-1", "pgd-1-margin")]
)
def test_cw_is_pgd_with_the_margin_bit_for_bit_under_its_own_name(name, same):
    threat = ThreatModel("linf", "8/255")
    cw, margin = parse_attack(name, threat), parse_attack(same, threat)
    assert type(cw) is CW and (cw.name, margin.name) == (name, same)
    assert {**cw.to_dict(), "name": same} == margin.to_dict() and cw.passes == margin.passes
    assert known_attack(cw.to_dict()).to_dict() == cw.to_dict() and type(known_attack(margin.to_dict())) is PGD
    model, images = make_model(), some_images(16)
    labels = model(images).argmax(1)
    found = [attack.run(model, images, labels, 3).images for attack in (cw, margin)]
    assert torch.equal(*found) and not torch.equal(found[0], images)


def test_cw_has_no_other_loss():
    with pytest.raises(ValueError, match="CW is PGD with the loss 'margin'"):
        CW(ThreatModel("linf", "1/255"), loss="ce")
    with pytest.raises(ValueError, match="unknown attack 'cw-100-kl'"):
        parse_attack("cw-100-kl", ThreatModel("linf", "1/255"))
