"""Evaluations by a published protocol: what the record carries, whose figure it is, and the gap to AutoAttack."""

from dataclasses import replace

import pytest
from toy_models import make_model, some_images

from capt_peft import evaluate
from capt_peft.attacks import ThreatModel, get_protocol, parse_attack
from capt_peft.evaluation import Evaluation
from capt_peft.results.accuracy import Accuracy

MODEL = make_model()
IMAGES = some_images(12)
DATA = IMAGES, MODEL(IMAGES).argmax(1)
ONE = ThreatModel("linf", "1/255")


def measured(name, *beside, epsilon="1/255", **settings):
    attacks = [
        *get_protocol(name).attacks_at(epsilon),
        *(parse_attack(other, ThreatModel("linf", epsilon)) for other in beside),
    ]
    return evaluate(MODEL, DATA, attacks, protocol=name, signs=False, progress=False, **settings)


def with_wrong(evaluation, **wrong):
    """The same evaluation with other figures: the attack of each name is wrong on these images, of those that are right clean."""
    rows, n = evaluation.examples.to_pylist(), evaluation.clean.n
    for row in rows:
        row["label"] = row["clean_prediction"] = 0
        row["prediction"] = int(row["index"] in wrong[row["attack"].replace("-", "_").split("_step")[0]])
    outcomes = tuple(
        replace(o, accuracy=Accuracy(n - len(wrong[o.name.replace("-", "_").split("_step")[0]]), n))
        for o in evaluation.attacks
    )
    worst = {ONE: Accuracy(n - len(set().union(*wrong.values())), n)}
    examples = evaluation.examples.from_pylist(rows, evaluation.examples.schema)
    return replace(evaluation, clean=Accuracy(n, n), attacks=outcomes, worst_case=worst, examples=examples)


def test_the_record_carries_the_name_and_its_figure_is_that_of_its_attack(tmp_path):
    evaluation = measured("ttc", "pgd-2", output=tmp_path / "r.json")
    assert evaluation.configuration["protocol"] == "ttc" and evaluation.protocol is get_protocol("ttc")
    assert evaluation.by_protocol(ONE) == evaluation.attacks[0].accuracy
    assert evaluation.by_protocol(ThreatModel("linf", "4/255")) is None and evaluation.gap_to_autoattack(ONE) is None
    figure = f"{100 * evaluation.attacks[0].accuracy.value:.1f}% robust."
    assert (
        "Measured by the protocol ttc (Test-time Counterattacks; Xing et al., CVPR 2025, arXiv 2503.03613)."
        in evaluation.table()
    )
    assert f"L-inf 1/255: {figure}" in evaluation.table()
    assert Evaluation.load(tmp_path / "r.json") == evaluation


def test_without_a_protocol_nothing_says_so():
    evaluation = evaluate(MODEL, DATA, [parse_attack("pgd-2", ONE)], signs=False, progress=False)
    assert "protocol" not in evaluation.configuration and "protocol" not in evaluation.table()
    assert evaluation.protocol is evaluation.by_protocol(ONE) is evaluation.gap_to_autoattack(ONE) is None


def test_the_gap_is_of_the_protocols_attacks_alone_to_autoattack_on_the_same_images():
    plain = measured("fap", "apgd-ce-1")
    renamed = replace(plain.attacks[1], attack={**plain.attacks[1].attack, "name": "autoattack"})
    n = plain.clean.n
    one, two = Accuracy(n - 1, n), Accuracy(n - 3, n)
    evaluation = replace(plain, attacks=(replace(plain.attacks[0], accuracy=one), replace(renamed, accuracy=two)))
    assert evaluation.gap_to_autoattack(ONE) == pytest.approx(200 / n)
    assert f"robust, gap to AutoAttack {200 / n:.1f} points." in evaluation.table()


def test_of_several_attacks_the_worst_case_counts_and_others_beside_do_not():
    evaluation = with_wrong(measured("robustvlm", "fgsm"), apgd_ce_100x5={0}, apgd_t={1}, fgsm={2, 3})
    n = evaluation.clean.n
    assert evaluation.by_protocol(ONE) == Accuracy(n - 2, n)
    assert replace(evaluation, examples=None).by_protocol(ONE) is None  # nobody knows which images they are
    both = replace(evaluation, attacks=evaluation.attacks[:2], worst_case={ONE: Accuracy(n - 2, n)}, examples=None)
    assert both.by_protocol(ONE) == Accuracy(n - 2, n)
    assert replace(both, attacks=both.attacks[:1]).by_protocol(ONE) is None


def test_an_attack_of_other_settings_is_not_the_protocols_whatever_the_record_says():
    evaluation = measured("ttc")
    other = replace(evaluation.attacks[0], attack={**evaluation.attacks[0].attack, "step_size": 0.1})
    assert replace(evaluation, attacks=(other,)).by_protocol(ONE) is None


def test_a_protocol_of_another_version_is_named_and_has_no_figure():
    evaluation = measured("ttc")
    later = replace(evaluation, configuration={**evaluation.configuration, "protocol": "later|"})
    assert later.protocol is None and later.by_protocol(ONE) is None
    assert r"Measured by the protocol later\|, which this version does not know." in later.table()


@pytest.mark.parametrize(
    ("attacks", "settings", "words"),
    [
        (["pgd-100"], {}, r"protocol fap measures pgd-100-step0\.003922 at L-inf 1/255"),
        ([], {}, "there is no attack"),
        (None, {"attack_target": "frozen"}, "is of white-box attacks"),
        (None, {"protocol": "few-shot"}, "Unknown protocol 'few-shot'"),
    ],
)
def test_what_contradicts_the_protocol_is_refused(attacks, settings, words):
    chosen = get_protocol("fap").attacks_at() if attacks is None else [parse_attack(name, ONE) for name in attacks]
    with pytest.raises(ValueError, match=words):
        evaluate(MODEL, DATA, chosen, **{"protocol": "fap", "progress": False, **settings})
