"""Defended classifiers: attacked by every way that knows the defence, and counted as often as they draw."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers import TINY_CLIP
from transformers import CLIPModel

from capt_peft import PGD, Defended, ThreatModel, ZeroShotClassifier, evaluate, load_task
from capt_peft.attacks import Patch
from capt_peft.defences import Defence, Identity, Purifier, Through, adaptive
from capt_peft.evaluation import Evaluation
from capt_peft.evaluation.batch import BatchRecord
from capt_peft.evaluation.signs import signs_of_defence
from capt_peft.results.accuracy import Accuracy
from capt_peft.results.defence import WithoutDefence, worst_of_decisions
from capt_peft.utils.files import DamagedFileError

THREAT = ThreatModel("linf", "4/255")
PGD5 = PGD(THREAT, steps=5)


@dataclass(frozen=True)
class Rounding(Purifier):
    """Rounds pixels to a few levels: a defence whose gradients are all zero."""

    levels: int = 8
    pattern: ClassVar[str] = "rounding"
    help: ClassVar[dict[str, str]] = {"rounding": "few levels"}
    name = "rounding"

    def purify(self, model, pixels):
        return (pixels * self.levels).round() / self.levels


@dataclass(frozen=True)
class Coin(Defence):
    """Is wrong on every image with a known probability, whatever the image is."""

    wrong: float = 0.25
    pattern: ClassVar[str] = "coin"
    help: ClassVar[dict[str, str]] = {"coin": "random"}
    random: ClassVar[bool] = True
    samples: ClassVar[int] = 2
    name = "coin"

    def logits(self, model, pixels):
        found = model(pixels)
        lost = torch.rand(len(found), 1) < self.wrong
        return torch.where(lost, -found, found)


@pytest.fixture(scope="module")
def classifier():
    from transformers import AutoProcessor

    digits = load_task("digits")
    model = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    return ZeroShotClassifier(
        model, AutoProcessor.from_pretrained(TINY_CLIP), digits.class_names, digits.template
    ).eval()


@pytest.fixture(scope="module")
def data():
    digits = load_task("digits")
    return digits["test"].select(range(24))


def measured(classifier, data, *args, **kwargs):
    return evaluate(classifier, data, *args, progress=False, batch_size=12, **kwargs)


@pytest.fixture(scope="module")
def plain(classifier, data):
    return measured(classifier, data, [PGD5])


def test_the_identity_is_measured_as_the_classifier_itself_by_every_way(classifier, data, plain):
    found = measured(Defended(classifier, Identity()), data, [PGD5])
    assert found.clean == plain.clean == found.undefended.clean
    rows = {o.way: o for o in found.attacks}
    assert list(rows) == ["transfer", "straight-through", "unrolled", "black-box"]
    expected = plain.examples.select(["index", "prediction", "perturbation", "score"])
    for way in ("transfer", "straight-through", "unrolled"):
        assert rows[way].accuracy == plain.robust
        of_way = found.examples.filter(found.examples["attack"].to_numpy(zero_copy_only=False) == rows[way].name)
        assert of_way.select(expected.column_names).equals(expected)  # bit for bit
        assert (rows[way].forwards, rows[way].gradients) == (plain.attacks[0].forwards, plain.attacks[0].gradients)
    assert found.undefended.worst_case[THREAT] == plain.robust
    assert found.robust.correct <= plain.robust.correct
    assert [sign.raised for sign in found.signs if sign.name == "gains_in_transfer_only"] == [False]


def test_a_defence_without_gradients_is_broken_straight_through(classifier, data):
    found = measured(Defended(classifier, Rounding(6)), data, [PGD(THREAT, steps=10)])
    rows = {o.way: o.accuracy.correct for o in found.attacks}
    assert rows["straight-through"] < rows["unrolled"]  # whose gradients are zero
    assert found.robust.correct <= rows["straight-through"]
    assert next(sign for sign in found.signs if sign.name == "zero_gradients").raised


@pytest.mark.parametrize(
    ("transfer", "without", "worst", "raised"),
    [(9, 5, 1, True), (9, 5, 5, True), (9, 5, 7, False), (5, 5, 1, False), (4, 5, 1, False)],
)
def test_gains_that_an_attacker_who_knows_the_defence_takes_away_raise_a_sign(transfer, without, worst, raised):
    def record(right, **more):
        prediction = [0] * right + [1] * (10 - right)
        return BatchRecord(index=list(range(10)), label=[0] * 10, clean=[0] * 10, prediction=prediction, **more)

    attacked = [(Through(PGD5, "transfer"), record(transfer)), (Through(PGD5, "unrolled"), record(worst))]
    undefended = WithoutDefence(Accuracy(10, 10), {THREAT: Accuracy(without, 10)}, 4.0)
    sign = signs_of_defence(attacked, undefended, {THREAT: Accuracy(worst, 10)})[0]
    assert (sign.name, sign.raised) == ("gains_in_transfer_only", raised)
    for share in (transfer, without, worst):
        assert f"{10.0 * share:.1f}%" in sign.sentence


def test_attacks_that_know_a_defence_and_break_less_than_those_that_do_not_raise_a_sign():
    def record(wrong):
        prediction = [1 if place in wrong else 0 for place in range(10)]
        return BatchRecord(index=list(range(10)), label=[0] * 10, clean=[0] * 10, prediction=prediction)

    def sign(transfer, unrolled):
        attacked = [(Through(PGD5, "transfer"), record(transfer)), (Through(PGD5, "unrolled"), record(unrolled))]
        worst = {THREAT: Accuracy(10 - len(transfer | unrolled), 10)}
        undefended = WithoutDefence(Accuracy(10, 10), {THREAT: Accuracy(5, 10)}, 1.0)
        return next(s for s in signs_of_defence(attacked, undefended, worst) if s.name == "transfer_beats_knowledge")

    assert (sign({0, 1, 2}, {0}).raised, sign({0, 1, 2}, {0}).value) == (True, 0.2)
    assert not sign({0, 1}, {0}).raised  # one image is no sign
    assert not sign({0}, {0, 1, 2}).raised


def test_only_the_adaptive_rows_are_called_robust(classifier, data):
    found = measured(Defended(classifier, Identity()), data, [PGD5])
    table = found.table()
    assert [o.kind for o in found.attacks] == ["transfer", "robust", "robust", "robust"]
    assert "| on images made without the defence | L-inf 4/255 | pgd-5 (transfer) |" in table
    assert "| **robust** | L-inf 4/255 | worst case |" in table and "without it" in table


def test_random_answers_are_counted_by_their_probability(classifier, data, plain, tmp_path):
    output = tmp_path / "random.json"
    found = measured(Defended(classifier, Coin()), data, [PGD5], decisions=20, output=output)
    clean = found.clean
    assert (clean.n, clean.decisions) == (24, 20)
    assert clean.value == pytest.approx(0.75 * plain.clean.value, abs=0.09)  # 3 standard deviations of 480 coins
    rows = {o.way: o.accuracy for o in found.attacks}
    assert set(rows) == {"transfer", "unrolled", "expectation", "black-box"}
    assert rows["transfer"].value <= 0.75 * plain.robust.value + 0.09
    assert found.robust.correct <= min(row.correct for row in rows.values())
    assert "classified 20 times" in found.table()
    again = Evaluation.load(output)
    assert (again, again.examples) == (found, found.examples)
    assert measured(Defended(classifier, Coin()), data, [PGD5], decisions=20) == found  # the same seed
    assert measured(Defended(classifier, Coin()), data, [PGD5], decisions=20, seed=1).clean != clean


def test_the_worst_case_of_random_answers_is_not_what_chance_breaks():
    generator = torch.Generator().manual_seed(0)
    n, decisions = 400, 8
    weights = 2 ** torch.arange(decisions)
    rows = [(weights * (torch.rand(n, decisions, generator=generator) < 0.7)).sum(1).tolist() for _ in range(5)]
    worst = worst_of_decisions(rows, n, decisions)
    assert worst.value == pytest.approx(0.7, abs=0.03)  # the smallest of five draws of each image would be about 0.5
    by_hand = sum(bits.bit_count() for bits in rows[0])
    assert worst_of_decisions(rows[:1], n, decisions) == Accuracy(by_hand, n, decisions)
    assert worst_of_decisions([rows[0], [0] * n], n, decisions).correct == 0


@pytest.mark.parametrize("change", ["undefended", "worst_case", "clean", "row", "parquet"])
def test_figures_that_the_examples_do_not_show_are_refused(classifier, data, tmp_path, change):
    output = tmp_path / "e.json"
    measured(Defended(classifier, Coin()), data, [PGD5], output=output)
    content = json.loads(output.read_text())
    if change == "parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(output.with_suffix(".parquet"))
        place = table.column_names.index("decided")
        bits = [min(bits + 1, 255) for bits in table["decided"].to_pylist()]
        pq.write_table(table.set_column(place, "decided", [bits]), output.with_suffix(".parquet"))
    else:
        of = {
            "undefended": content["undefended"]["worst_case"][0], "worst_case": content["worst_case"][0],
            "clean": content["clean"], "row": content["attacks"][1],
        }[change]  # fmt: skip
        lower = Accuracy(of["correct"] - 1, of["n"], of.get("decisions", 1))
        of |= lower.to_dict()
        output.write_text(json.dumps(content))
    with pytest.raises(DamagedFileError):
        Evaluation.load(output)


class Averaged(Coin):
    """Drawn as often for a gradient as defences are by default."""

    samples = Defence.samples


@pytest.mark.parametrize("defence", [Rounding(), Averaged()])
def test_deciding_costs_little_beside_the_attacks(classifier, data, defence, monkeypatch):
    images = []
    features = ZeroShotClassifier.image_features
    monkeypatch.setattr(
        ZeroShotClassifier, "image_features", lambda self, pixels: images.append(len(pixels)) or features(self, pixels)
    )
    attack = PGD(ThreatModel("linf", "1/255"), steps=20)
    found = measured(Defended(classifier, defence), data.select(range(12)), [attack])
    assert sum(images) <= 1.1 * sum(outcome.forwards for outcome in found.attacks) + 4 * 16  # and sample images
    assert found.undefended.forwards == 1


def test_a_killed_evaluation_of_a_defence_goes_on(classifier, data, tmp_path, monkeypatch):
    from capt_peft.evaluation import loop

    defended, output = Defended(classifier, Coin()), tmp_path / "e.json"
    whole = measured(defended, data, [PGD5])
    attack_batch, calls = loop.attack_batch, []

    def killed(*args, **kwargs):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return attack_batch(*args, **kwargs)

    monkeypatch.setattr(loop, "attack_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(defended, data, [PGD5], output=output)
    monkeypatch.setattr(loop, "attack_batch", attack_batch)
    again = measured(defended, data, [PGD5], output=output)
    assert (again, again.examples) == (whole, whole.examples)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attack_target": "frozen"}, "ways of its own"),
        ({"attack_template": "a {}"}, "ways of its own"),
        ({"out_of_class": torch.rand(2, 3, 32, 32)}, "out_of_class"),
        ({"decisions": 3}, "even number from 2 to 62"),
    ],
)
def test_what_has_no_meaning_with_a_defence_is_refused(classifier, data, settings, said):
    with pytest.raises(ValueError, match=said):
        measured(Defended(classifier, Coin()), data, [PGD5], **settings)


def test_half_precision_is_refused(classifier, data):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="measured in float32"):
        measured(Defended(classifier, Identity()), data, [PGD5])


def test_a_patch_goes_by_every_way_but_as_a_black_box_for_which_nothing_is_built(classifier, data):
    patch = ThreatModel("patch", "1/4")
    found = measured(Defended(classifier, Identity()), data, [Patch(patch, steps=2, places=1)])
    assert [outcome.way for outcome in found.attacks] == ["transfer", "straight-through", "unrolled"]
    assert found.robust == min((o.accuracy for o in found.attacks), key=lambda a: a.correct)
    (square,) = (sign for sign in found.signs if sign.name == "square_beats_white_box")
    assert square.raised is None and "Not checked" in square.sentence


def test_attacks_without_gradients_go_as_a_black_box_and_threat_models_without_one_get_square():
    from capt_peft import Square

    given = [PGD5, Square(THREAT, queries=10), PGD(ThreatModel("l2", 0.5), steps=5)]
    names = [(a.name, str(a.threat_model)) for a in adaptive(given, Rounding())]
    assert names == [
        ("pgd-5 (transfer)", "L-inf 4/255"), ("pgd-5 (straight-through)", "L-inf 4/255"), ("pgd-5 (unrolled)", "L-inf 4/255"),
        ("square-10 (transfer)", "L-inf 4/255"), ("square-10 (black-box)", "L-inf 4/255"),
        ("pgd-5 (transfer)", "L2 0.5"), ("pgd-5 (straight-through)", "L2 0.5"), ("pgd-5 (unrolled)", "L2 0.5"),
        ("square-200 (black-box)", "L2 0.5"),
    ]  # fmt: skip
    assert [a.samples for a in adaptive([PGD5], Coin())] == [1, 1, 2, 1]
    assert isinstance(adaptive([PGD5], Coin())[0], Through)
