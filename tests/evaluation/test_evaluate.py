"""evaluate: what it counts, what it keeps, what it sees, and what it refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from helpers import TINY_CLIP, shake
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from toy_models import make_model, some_images
from transformers import CLIPModel

from capt_peft import (
    APGD,
    PGD,
    AutoAttack,
    CaptConfig,
    Square,
    ThreatModel,
    ZeroShotClassifier,
    evaluate,
    load_task,
)
from capt_peft.attacks import Patch
from capt_peft.evaluation import Evaluation
from capt_peft.evaluation import loop as loop_module
from capt_peft.randomness import example_generators
from capt_peft.results.accuracy import Accuracy

THREAT = ThreatModel("linf", "4/255")
STREAMED = datasets.IterableDataset.from_generator(lambda: iter([]))
ATTACKS = [PGD(THREAT, steps=3), PGD(THREAT, steps=10), Square(THREAT, queries=30)]


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def data(model):
    """Images with the model's predictions as labels, but for every fifth, which is wrong."""
    pixels = some_images(30)
    labels = model(pixels).argmax(1)
    labels[::5] = (labels[::5] + 1) % 5
    return pixels, labels


@pytest.fixture(scope="module")
def digits():
    return load_task("digits")


@pytest.fixture
def clip(processor, digits):
    return ZeroShotClassifier(
        CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32), processor, digits.class_names, digits.template
    ).eval()


@pytest.fixture
def tuned(processor, digits):
    """Tiny CLIP with an adapter that changes its answers."""
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    model = get_peft_model(base, CaptConfig(template=digits.template))
    shake(model)
    return ZeroShotClassifier(model, processor, digits.class_names, digits.template).eval()


def quiet(*args, **kwargs):
    return evaluate(*args, progress=False, **kwargs)


def test_the_figures_are_those_of_the_attacks(model, data):
    pixels, labels = data
    result = quiet(model, data, ATTACKS[:2], batch_size=7)
    assert result.clean.correct == 24
    for attack, outcome in zip(ATTACKS, result.attacks, strict=False):
        attacked = attack(model, pixels, labels, example_generators(0, range(30), stream="evaluation"))
        right = (model(pixels).argmax(1) == labels) & (model(attacked).argmax(1) == labels)
        assert outcome.accuracy.correct == int(right.sum())
        assert outcome.kind == "robust"
    assert 0 < result.attacks[1].accuracy.correct < 24


def test_the_worst_case_counts_an_image_that_any_attack_breaks(model, data):
    result = quiet(model, data, ATTACKS)
    rows = result.examples.to_pandas()
    broken = rows.groupby("index")["broken"].any()
    wrong = rows.groupby("index").apply(lambda r: (r["clean_prediction"] != r["label"]).any())
    assert result.worst_case[THREAT].correct == int((~broken & ~wrong).sum())
    assert result.robust == result.worst_case[THREAT]
    assert result.robust.correct <= min(outcome.accuracy.correct for outcome in result.attacks)


def test_the_union_counts_an_image_that_any_attack_of_any_threat_model_breaks(model, data, tmp_path):
    balls = [ThreatModel("linf", "3/255"), ThreatModel("l2", 0.1), ThreatModel("l1", 0.4)]
    attacks = [*(PGD(threat, steps=5) for threat in balls), Patch(ThreatModel("patch", "1/8"), steps=5, places=2)]
    result = quiet(model, data, attacks, output=tmp_path / "r.json", signs=False)
    rows = result.examples.to_pandas()
    stands = rows.groupby("index").apply(lambda r: (r["prediction"] == r["label"]).all())
    assert result.union.correct == int(stands.sum())
    assert 0 < result.union.correct < min(worst.correct for worst in result.worst_case.values())
    assert (
        f"| **robust** | L-inf 3/255, L2 0.1, L1 0.4, patch 0.125 | union | **{result.union.percent}** |"
        in result.table()
    )
    assert Evaluation.load(tmp_path / "r.json") == result


@pytest.mark.parametrize("radius", ["4/255", "8/255"])
def test_threat_models_of_one_norm_have_no_union(model, data, radius):
    attacks = [PGD(THREAT, steps=2), *([] if radius == "4/255" else [PGD(ThreatModel("linf", radius), steps=2)])]
    result = quiet(model, data, attacks, signs=False)
    assert result.union is None and "union" not in result.to_dict() and "union" not in result.table()


@pytest.mark.parametrize("way", ["above a worst case", "below what both leave", "of one norm", "not of the examples"])
def test_a_union_that_cannot_be_is_refused(model, data, tmp_path, way):
    output = tmp_path / "r.json"
    threats = [THREAT, ThreatModel("l2", 0.2)]
    result = quiet(model, data, [PGD(threat, steps=5) for threat in threats], output=output, signs=False)
    content = json.loads(output.read_text())
    worst = [each.correct for each in result.worst_case.values()]
    told, message = {
        "above a worst case": (min(worst) + 1, "has a union of threat models and a worst case of"),
        "below what both leave": (sum(worst) - result.clean.correct - 1, "says that a union of threat models leaves"),
        "of one norm": (result.union.correct, "not two norms"),
        "not of the examples": (result.union.correct - 1, "the union of the threat models leaves"),
    }[way]
    content["union"] = Accuracy(told, 30).to_dict()
    if way == "of one norm":
        content["attacks"], content["worst_case"] = content["attacks"][:1], content["worst_case"][:1]
    output.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Evaluation.load(output)
    older = {key: value for key, value in content.items() if key != "union"}
    if way != "of one norm":
        output.write_text(json.dumps(older))
        assert Evaluation.load(output).union is None  # of a version that did not count it


def test_a_patch_alone_is_measured_and_its_signs_are_not_those_of_balls(model, data):
    result = quiet(model, data, Patch(ThreatModel("patch", "1/4"), steps=5, places=3))
    assert result.robust.correct < result.clean.correct
    raised = {sign.name: sign.raised for sign in result.signs}
    assert raised["one_step_beats_many"] is None and raised["square_beats_white_box"] is None
    assert raised["accuracy_left_at_epsilon_1"] is False and raised["zero_gradients"] is False


def test_signs_are_looked_for_within_l1_as_in_other_balls(model, data):
    result = quiet(model, data, APGD(ThreatModel("l1", 1), steps=10))
    assert {sign.name: sign.raised for sign in result.signs}["accuracy_left_at_epsilon_1"] is False
    assert not any(sign.raised for sign in result.signs)


def test_every_example_has_a_row_for_every_attack(model, data):
    rows = quiet(model, data, ATTACKS, batch_size=8).examples.to_pandas()
    assert len(rows) == 30 * 3
    one = rows[rows["attack"] == "pgd-10"].sort_values("index")
    assert one["index"].tolist() == list(range(30))
    assert one["label"].tolist() == data[1].tolist()
    assert one["clean_prediction"].tolist() == model(data[0]).argmax(1).tolist()
    assert (one["broken"] == ((one["prediction"] != one["label"]) & (one["clean_prediction"] == one["label"]))).all()
    assert set(one["broken_by"].dropna()) == {"pgd-10"} and one["broken_by"].notna().equals(one["broken"])
    assert one["perturbation"].max() <= THREAT.epsilon + 1e-6
    assert (one[one["clean_prediction"] != one["label"]]["perturbation"] == 0).all()


def test_the_batch_size_does_not_change_the_figures(model, data):
    results = [quiet(model, data, ATTACKS, batch_size=size) for size in (30, 7, 1)]
    counted = [[replace(outcome, reliability=None) for outcome in r.attacks] for r in results]
    assert counted[1:] == [counted[0]] * 2
    assert all(sorted_rows(r) == sorted_rows(results[0]) for r in results)
    for outcomes in zip(*(r.attacks for r in results), strict=True):  # scores are rounded elsewhere
        assert [each.reliability.scores for each in outcomes[1:]] == [pytest.approx(outcomes[0].reliability.scores)] * 2


def sorted_rows(result):
    return sorted(map(str, result.examples.drop_columns(["score"]).to_pylist()))


def test_an_ensemble_says_which_attack_broke_what_and_touches_survivors_only(model, data):
    class Short(AutoAttack):
        @property
        def parts(self):
            return (
                APGD(self.threat_model, steps=3),
                APGD(self.threat_model, loss="t", steps=5),
                Square(self.threat_model, queries=20),
            )

    result = quiet(model, data, Short(ThreatModel("linf", "3/255")), batch_size=10)
    (outcome,) = result.attacks
    names = [part["name"] for part in outcome.parts]
    assert names == ["apgd-ce-3", "apgd-t-5", "square-20"]
    left = result.clean.correct
    for part in outcome.parts:
        assert part["attacked"] == left
        left -= part["broken"]
    assert outcome.accuracy.correct == left and outcome.broken == 24 - left
    counts = result.examples.to_pandas()["broken_by"].value_counts()
    assert {p["name"]: p["broken"] for p in outcome.parts if p["broken"]} == counts.to_dict()
    assert outcome.notes == ("apgd-t-5: 4 targets instead of 9 (5 classes)",)


def test_the_cost_is_counted_and_is_what_the_attack_needs(model, data):
    result = quiet(model, data, [PGD(THREAT, steps=10), Square(THREAT, queries=10)], signs=False)
    assert result.attacks[0].forwards == result.attacks[0].gradients == 24 * 10
    assert 0 < result.attacks[1].forwards <= 24 * 12 and result.attacks[1].gradients == 0


def test_text_features_are_computed_once(tuned, digits, monkeypatch):
    runs = []
    encode = ZeroShotClassifier.encode_texts
    monkeypatch.setattr(ZeroShotClassifier, "encode_texts", lambda self: runs.append(1) or encode(self))
    quiet(tuned, digits["validation"].select(range(6)), ATTACKS, batch_size=2)
    assert len(runs) == 1


def test_an_image_costs_an_attack_of_k_steps_k_gradients_and_a_forward(clip, digits, monkeypatch):
    images = []
    features = ZeroShotClassifier.image_features
    monkeypatch.setattr(
        ZeroShotClassifier,
        "image_features",
        lambda self, p: images.append((len(p), p.requires_grad)) or features(self, p),
    )
    quiet(clip, digits["validation"].select(range(8)), PGD(THREAT, steps=5), signs=False)
    right = quiet(clip, digits["validation"].select(range(8)), signs=False).clean.correct
    assert sum(n for n, gradient in images if gradient) == 5 * right
    # the sample twice, 8 for clean accuracy, and the attacked ones to score; then the second call
    assert sum(n for n, gradient in images if not gradient) == (2 * 8 + 8 + right) + (2 * 8 + 8)


# ------------------------------------------------------------------------------------------------------ on disk


def test_what_is_saved_is_what_is_returned(model, data, tmp_path):
    path = tmp_path / "results.json"
    result = quiet(model, data, ATTACKS, output=path, details={"task": "noise"})
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "results.parquet"}
    content = json.loads(path.read_text())
    assert content == json.loads(json.dumps(result.to_dict()))
    assert content["configuration"]["task"] == "noise"
    assert content["configuration"]["attacks"][1]["steps"] == 10
    assert content["attacks"][0]["n"] == 30 and len(content["attacks"][0]["interval_95"]) == 2
    loaded = Evaluation.load(path)
    assert loaded == result
    assert pq.read_table(tmp_path / "results.parquet").equals(result.examples)


def test_the_adversarial_images_are_kept_as_they_were_scored(model, data, tmp_path):
    result = quiet(model, data, ATTACKS[1], batch_size=12, output=tmp_path / "r.json", save_images=True)
    kept = load_file(tmp_path / "r.safetensors")
    assert kept["index"].tolist() == list(range(30)) and torch.equal(kept["labels"], data[1])
    images = kept[str(ATTACKS[1].threat_model)]
    assert model(images).argmax(1).tolist() == result.examples["prediction"].to_pylist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.parquet", "r.safetensors"]


def test_images_of_another_evaluation_do_not_stay_beside_its_figures(model, data, tmp_path):
    path = tmp_path / "r.json"
    both = quiet(model, data, ATTACKS[:2], batch_size=10, output=path, save_images=True)
    result = quiet(model, data, ATTACKS[:1], batch_size=10, output=path, save_images=True, overwrite=True)
    assert result.has_images(path) and not both.has_images(path)


def test_images_that_are_gone_or_damaged_are_made_again(model, data, tmp_path):
    path, kept = tmp_path / "r.json", tmp_path / "r.safetensors"
    first = quiet(model, data, ATTACKS[0], output=path, save_images=True)
    content = kept.read_bytes()
    for damage in (kept.unlink, lambda: kept.write_bytes(b"something else")):
        damage()
        assert not first.has_images(path)
        assert quiet(model, data, ATTACKS[0], output=path, save_images=True) == first
        assert kept.read_bytes() == content


def test_images_take_the_place_of_no_other_file(model, data, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match="is not one of an evaluation"):
        quiet(model, data, ATTACKS[0], output=tmp_path / "adapter_model.json", save_images=True)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"weights"


def test_an_l2_epsilon_in_levels_of_255_is_warned_of(model, data, caplog):
    quiet(model, data, PGD(ThreatModel("l2", 3), steps=1), signs=False)
    assert "in units of [0, 1] pixels, so that 3 levels of 255 are written '3/255'" in caplog.text
    caplog.clear()
    quiet(model, data, PGD(ThreatModel("l2", "128/255"), steps=1), signs=False)
    assert not caplog.text


class Killed(BaseException):
    pass


def test_a_killed_evaluation_goes_on_where_it_was_and_ends_in_the_same_file(model, data, tmp_path, monkeypatch):
    whole = tmp_path / "whole" / "r.json"
    quiet(model, data, ATTACKS, batch_size=8, output=whole)
    broken = tmp_path / "broken" / "r.json"
    attack_batch, runs = loop_module.attack_batch, []

    def killed_at(limit):
        def run(*args, **kwargs):
            if len(runs) == limit:
                raise Killed
            runs.append(1)
            return attack_batch(*args, **kwargs)

        return run

    for limit in (0, 3, 5, 11):
        monkeypatch.setattr(loop_module, "attack_batch", killed_at(limit))
        with pytest.raises(Killed):
            quiet(model, data, ATTACKS, batch_size=8, output=broken)
        assert not broken.exists()
    monkeypatch.setattr(loop_module, "attack_batch", killed_at(12))
    quiet(model, data, ATTACKS, batch_size=8, output=broken)
    assert len(runs) == 12  # 3 attacks on 4 batches: none twice
    assert broken.read_bytes() == whole.read_bytes()
    assert pq.read_table(broken.with_suffix(".parquet")).equals(pq.read_table(whole.with_suffix(".parquet")))
    assert not broken.with_suffix(".partial").exists()


def test_a_damaged_piece_is_measured_again(model, data, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    monkeypatch.setattr(Evaluation, "save", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        quiet(model, data, ATTACKS, output=path)
    monkeypatch.undo()
    piece = path.with_suffix(".partial") / "jobs" / "01-000000.json"
    piece.write_text(piece.read_text()[:50])
    assert quiet(model, data, ATTACKS, output=path) == quiet(model, data, ATTACKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 1 now and was 0"),
        ({"batch_size": 5}, "batch_size is 5 now and was 128"),
        ({"attacks": [PGD(THREAT, steps=4)]}, r"attacks\[0\].name is \"pgd-4\" now and was \"pgd-3\""),
        ({"model": make_model(scale=3)}, "model.fingerprint"),
        ({"data": (some_images(20), torch.zeros(20, dtype=torch.int64))}, "data.n is 20 now and was 30"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_results_of_another_configuration_are_neither_mixed_nor_overwritten(
    model, data, tmp_path, monkeypatch, caplog, change, message, finished
):
    path = tmp_path / "r.json"
    if not finished:
        monkeypatch.setattr(Evaluation, "save", lambda *_: (_ for _ in ()).throw(Killed))
    try:
        quiet(model, data, ATTACKS[:1], output=path)
    except Killed:
        assert not finished
    monkeypatch.undo()
    before = sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    new = {"model": model, "data": data, "attacks": ATTACKS[:1], **change}
    settings = {k: v for k, v in new.items() if k in ("seed", "batch_size")}
    result = quiet(new["model"], new["data"], new["attacks"], output=path, **settings)
    assert re.search(message, caplog.text)
    assert Evaluation.load(path) == result == quiet(new["model"], new["data"], new["attacks"], **settings)
    assert sorted(p.read_bytes() for p in tmp_path.rglob("*old1*") if p.is_file()) == before or not finished
    assert quiet(model, data, ATTACKS[:1], output=tmp_path / "r.old1.json") == quiet(model, data, ATTACKS[:1])


def test_a_finished_evaluation_is_not_run_again_unless_asked(model, data, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    first = quiet(model, data, ATTACKS[:1], output=path)
    attack_batch, runs = loop_module.attack_batch, []
    monkeypatch.setattr(loop_module, "attack_batch", lambda *a, **k: runs.append(1) or attack_batch(*a, **k))
    assert quiet(model, data, ATTACKS[:1], output=path) == first and not runs
    assert quiet(model, data, ATTACKS[:1], output=path, overwrite=True) == first and runs


# ------------------------------------------------------------------------------------------------- what is attacked


def test_the_attack_goes_through_the_prompts(tuned, digits):
    """The prompts get a gradient of the attacked loss, and the adversarial images differ from those of the base."""
    images = digits["validation"].select(range(12))
    white = quiet(tuned, images, ATTACKS[1], signs=False)
    frozen = quiet(tuned, images, ATTACKS[1], attack_target="frozen")
    assert white.attacks[0].kind == "robust" and frozen.attacks[0].kind == "transfer"
    assert frozen.attacks[0].accuracy.correct >= white.attacks[0].accuracy.correct
    assert frozen.worst_case == {} and frozen.signs == ()
    assert "under a transferred attack" in frozen.table() and "robust" not in frozen.table()
    with pytest.raises(ValueError, match="0 threat models with white-box attacks"):
        _ = frozen.robust


def test_a_transfer_attack_is_made_on_the_base_and_scored_on_the_adapter(tuned, clip, digits, tmp_path):
    images = digits["validation"].select(range(6))
    quiet(tuned, images, ATTACKS[0], attack_target="frozen", output=tmp_path / "r.json", save_images=True)
    saved = load_file(tmp_path / "r.safetensors")
    pixels = tuned.transform.batch([row["image"] for row in images])
    right = (tuned(pixels).argmax(1) == saved["labels"]).nonzero().squeeze(1)
    by_hand = ATTACKS[0](
        clip, pixels[right], saved["labels"][right], example_generators(0, right.tolist(), stream="evaluation")
    )
    torch.testing.assert_close(saved[str(ATTACKS[0].threat_model)][right], by_hand, atol=1e-6, rtol=0)
    assert not torch.equal(saved[str(ATTACKS[0].threat_model)][right], pixels[right])


def test_attacks_can_see_another_text(tuned, digits):
    images = digits["validation"].select(range(6))
    other = quiet(tuned, images, ATTACKS[0], attack_template="a bad photo of the number {}.")
    assert other.attacks[0].kind == "transfer"
    assert other.configuration["attack_template"] == "a bad photo of the number {}."
    same = quiet(tuned, images, ATTACKS[0], attack_template=digits.template)
    assert same.attacks[0].kind == "robust"


def test_attacks_can_see_one_text_of_a_classifier_with_several(tuned, digits):
    images, own = digits["validation"].select(range(6)), {"7": ["a photo of the digit 7, drawn"]}
    several = [digits.template, "a drawing of the digit {}."]
    averaged = ZeroShotClassifier(tuned.model, tuned.processor, digits.class_names, several)
    described = ZeroShotClassifier(tuned.model, tuned.processor, digits.class_names, digits.template, class_texts=own)
    for classifier, seen, kind in (
        (averaged, None, "robust"),
        (averaged, several, "robust"),
        (averaged, digits.template, "transfer"),
        (tuned, several, "transfer"),
        (described, None, "robust"),
        (described, digits.template, "transfer"),  # its template, but not its texts
    ):
        found = quiet(classifier, images, ATTACKS[0], attack_template=seen)
        assert found.attacks[0].kind == kind and found.configuration["attack_template"] == seen
    model = quiet(described, images).configuration["model"]
    assert model["template"] == digits.template and model["class_texts"] == own
    assert quiet(averaged, images).configuration["model"]["template"] == several
    assert "class_texts" not in quiet(averaged, images).configuration["model"]


def test_results_of_other_texts_are_set_aside(clip, digits, tmp_path, caplog):
    images, names = digits["validation"].select(range(4)), digits.class_names
    for template, own, words in (
        ("a {}", None, ""),
        ("a {}", {"7": ["a seven", "7"]}, "model.class_texts is"),
        ("a {}", {"7": ["7", "a seven"]}, "model.class_texts.7[0] is"),
        (["a {}", "the {}"], None, "model.template is"),
    ):
        classifier = ZeroShotClassifier(clip.model, clip.processor, names, template, class_texts=own)
        caplog.clear()
        for _ in range(2):  # the second time it is there already
            quiet(classifier, images, output=tmp_path / "results.json")
        assert words in caplog.text and caplog.text.count("results.old") == (1 if words else 0)


def test_the_record_names_base_adapter_and_their_fingerprints(tuned, clip, digits):
    images = digits["validation"].select(range(2))
    model = quiet(tuned, images).configuration["model"]
    assert model["adapter"]["config"]["peft_type"] == "CAPT"
    assert model["template"] == digits.template and model["precision"] == "float32"
    shake(tuned.model, seed=5)
    again = quiet(tuned, images).configuration["model"]
    assert again["base"] == model["base"] and again["adapter"]["fingerprint"] != model["adapter"]["fingerprint"]
    bare = quiet(clip, images).configuration["model"]
    assert bare["adapter"] is None and bare["base"]["fingerprint"] == model["base"]["fingerprint"]
    assert bare["base"]["name"] == "tiny_clip"  # in whatever environment the package lies
    with tuned.frozen():
        assert quiet(tuned, images).configuration["model"]["adapter"] is None


def test_nothing_of_the_classifier_is_disturbed(tuned, digits):
    tuned.train()
    tuned.model.base_model.model.vision_model.eval()
    modes = {name: module.training for name, module in tuned.named_modules()}
    values = {name: p.clone() for name, p in tuned.named_parameters()}
    trainable = {name: p.requires_grad for name, p in tuned.named_parameters()}
    state = torch.get_rng_state()
    quiet(tuned, digits["validation"].select(range(4)), ATTACKS)
    assert {name: p.requires_grad for name, p in tuned.named_parameters()} == trainable
    assert {name: module.training for name, module in tuned.named_modules()} == modes
    assert all(torch.equal(values[name], p) and p.grad is None for name, p in tuned.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_epsilon_0_leaves_robust_equal_to_clean(clip, digits):
    result = quiet(clip, digits["validation"].select(range(20)), PGD(ThreatModel("linf", 0.0), steps=3), signs=False)
    assert result.robust == result.clean


def test_the_table_says_which_accuracy_it_is(model, data):
    result = quiet(model, data, [*ATTACKS[:2], PGD(ThreatModel("linf", "1/255"), steps=2)])
    table = result.table().splitlines()
    assert table[2].startswith("| clean | | | 80.0 (")
    assert table[3].startswith("| robust | L-inf 4/255 | pgd-3 |")
    assert any(line.startswith("| **robust** | L-inf 4/255 | worst case |") for line in table)
    assert not any("1/255 | worst case" in line and "4/255" not in line for line in table)
    assert "n = 30 images." in table


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"name": "digits", "split": "test"}, "n = 30 images of the test split of digits."),
        ({"name": "a|b"}, "n = 30 images of a\\|b."),
        ("digits", "n = 30 images."),
    ],
)
def test_the_table_says_what_the_images_are_of(model, data, task, words):
    assert words in quiet(model, data, details={"task": task}).table().splitlines()


class Small(AutoAttack):
    """AutoAttack of two parts with few steps."""

    @property
    def parts(self):
        return APGD(self.threat_model, loss="t", targets=2, steps=5), Square(self.threat_model, queries=30)


def test_the_bar_counts_images_as_they_are_decided_and_says_where_the_attack_is(model, data, monkeypatch):
    seen, expected = [], quiet(model, data, Small(THREAT), batch_size=10)

    class Bar(loop_module.tqdm):
        def update(self, n=1):
            super().update(n)
            seen.append((self.desc, self.n, self.postfix))

    monkeypatch.setattr(loop_module, "tqdm", Bar)
    assert evaluate(model, data, Small(THREAT), batch_size=10) == expected
    told = [(n, postfix) for desc, n, postfix in seen if desc.startswith("autoattack")]
    numbers = [n for n, _ in told]
    assert told[0] == (2, "apgd-t-5-2targets: target 1 of 2, step 1 of 5, 8 images left")  # two are misclassified
    assert any(postfix.startswith("square-30: query 30 of 30, ") for _, postfix in told)
    assert numbers == sorted(numbers) and numbers[-1] == 30 and {10, 20} <= {*numbers}
    assert len({*numbers}) > 6  # more often than by batches


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(model, data, seed):
    with pytest.raises(ValueError, match=f"seed={seed} must be a whole number from 0 to 4294967295"):
        quiet(model, data, seed=seed)


# ------------------------------------------------------------------------------------------------------ bad input


class Cheat(PGD):
    """An attack that leaves its threat model."""

    def run(self, logits_fn, images, labels, generator=None, **kwargs):
        result = super().run(logits_fn, images, labels, generator)
        return replace(result, images=(result.images + 0.1).clamp(0, 1))


GOOD = some_images(4)
LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("data", "kwargs", "error", "message"),
    [
        ((GOOD[:0], LABELS[:0]), {}, ValueError, "There are no images to evaluate on"),
        ((GOOD * 4 - 2, LABELS), {}, ValueError, "normalise inside the model"),
        ((GOOD * torch.nan, LABELS), {}, ValueError, "not finite"),
        ((GOOD.half(), LABELS), {}, TypeError, "need float32 or float64"),
        (((GOOD * 255).byte(), LABELS), {}, TypeError, "divided by 255"),
        ((GOOD, LABELS + 5), {}, ValueError, "Labels range from 5 to 5, but the classifier knows 5 classes"),
        ((GOOD, LABELS - 1), {}, ValueError, "labels range from -1 to -1"),
        ((GOOD, LABELS.float()), {}, TypeError, "torch.int64"),
        ((GOOD, LABELS[:3]), {}, ValueError, "one for each image"),
        (GOOD, {}, TypeError, r"must be a datasets.Dataset or \(pixels, labels\), not Tensor"),
        (STREAMED, {}, TypeError, r"not IterableDataset \(streamed, .*load it without streaming=True"),
        (
            (GOOD, LABELS),
            {"attacks": [ATTACKS[0], ATTACKS[0]]},
            ValueError,
            "pgd-3, L-inf 4/255 is given more than once",
        ),
        (
            (GOOD, LABELS),
            {"attacks": ["pgd-20"]},
            TypeError,
            r"attacks must be a list of objects such as .*, not \['pgd-20'\]",
        ),
        ((GOOD, LABELS), {"attacks": "pgd-20"}, TypeError, r"not \['pgd-20'\]"),
        ((GOOD, LABELS), {"attacks": [Cheat(THREAT, steps=1)]}, ValueError, "has left its threat model L-inf 4/255"),
        ((GOOD, LABELS), {"attack_target": "base"}, ValueError, "attack_target='base' is unknown"),
        ((GOOD, LABELS), {"attack_target": "frozen"}, ValueError, "need a ZeroShotClassifier"),
        ((GOOD, LABELS), {"batch_size": 0}, ValueError, "batch_size=0 must be 1 or more"),
        ((GOOD, LABELS), {"save_images": True}, ValueError, "save_images=True needs an output"),
        ((GOOD, LABELS), {"output": "results.txt"}, ValueError, "must end in .json"),
    ],
)
def test_bad_input_is_refused(model, data, kwargs, error, message):
    settings = {"attacks": ATTACKS[:1], **kwargs}
    if isinstance(data, tuple) and settings["attacks"][0].__class__ is Cheat:
        data = (data[0], model(data[0]).argmax(1))
    with pytest.raises(error, match=message):
        quiet(model, data, settings.pop("attacks"), **settings)
    assert not Path("results.txt").exists()


def test_a_model_of_one_class_and_a_dataset_for_a_callable_are_refused(digits):
    one = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    with pytest.raises(ValueError, match="N >= 2 classes"):
        quiet(one, (GOOD, LABELS), ATTACKS[0])
    with pytest.raises(TypeError, match="A callable takes no images"):
        quiet(one, digits["test"], ATTACKS[0])


def test_an_empty_dataset_and_a_label_without_a_name_are_refused(clip, processor, digits):
    with pytest.raises(ValueError, match="no images to evaluate"):
        quiet(clip, digits["validation"].select([]), ATTACKS[0])
    few = ZeroShotClassifier(clip.model, processor, digits.class_names[:5], digits.template)
    with pytest.raises(ValueError, match=r"images of the class '\d' .* none of the 5 classes"):
        quiet(few, digits["validation"], ATTACKS[0])
