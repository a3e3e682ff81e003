"""Model cards: every figure comes from the files of the adapter, and the Hub's own tools read it."""

import copy
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from records import THREAT, card_from
from safetensors.torch import load_file, save_file

from capt_peft import APGD, FAB, PGD, AutoAttack, Square, ThreatModel
from capt_peft.attacks import Attack, register_attack, registry
from capt_peft.clip.calibration import digest_as_loaded
from capt_peft.evaluation import Accuracy
from capt_peft.results.card import TEMPLATE, CardDetails, write_card
from capt_peft.results.corrupted import CorruptedAccuracy

ROOT = Path(__file__).parents[2]


def test_the_template_at_the_top_is_the_one_that_is_used():
    assert TEMPLATE.read_text() == (ROOT / "model_card.md").read_text(), "cp model_card.md capt_peft/"
    assert not TEMPLATE.is_symlink() and TEMPLATE.read_text().startswith("{#-")


def test_the_card_of_a_run_holds_its_figures(adapter, results):
    card = (adapter / "README.md").read_text()
    after = results["evaluation"]["after"]
    for kind, cell in (("clean", "| capt | clean |  |  |"), ("robust", "| capt | robust | L-inf 4/255 | pgd-2 |")):
        low, high = after[kind]["interval_95"]
        assert f"{cell} {100 * after[kind]['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f}) | 20 |" in card
    for fact in (
        "import capt_peft",
        'from_pretrained("adapter")',
        results["adapter"]["config"]["base_model_fingerprint"],
        results["adapter"]["fingerprint"],
        "1 images per class (10 in all)",
        "| seed | 42 |",
        f", torch {results['versions']['torch']}, ",
        "only within the threat model",
        "arXiv:2405.11154",
        "It was measured with PGD alone here",
    ):
        assert fact in card
    first = card.split("```python\n")[1].splitlines()[0]
    assert first.startswith("import capt_peft")
    assert "{{" not in card and "{%" not in card and "{#" not in card
    assert "prompts for\n`tiny_clip` (embedded in capt-peft), tuned on digits" in card
    for local in (ROOT, adapter.parent):  # paths of this machine say nothing elsewhere
        assert str(local) not in card


def test_the_hubs_own_tools_read_the_metadata(results):
    card = ModelCard(card_from(results, "someone/tiny-capt"))
    assert card.data.model_name == "tiny-capt" and card.data.library_name == "peft"
    assert card.data.base_model is None  # an embedded model is no id of the Hub
    clean, robust = card.data.eval_results
    assert clean.metric_name == "clean accuracy" and robust.metric_name == "robust accuracy (pgd-2, L-inf 4/255)"
    assert clean.metric_value == pytest.approx(results["evaluation"]["after"]["clean"]["accuracy"], abs=1e-6)
    assert robust.metric_args["n"] == 20 and robust.dataset_name == "digits" and robust.dataset_split == "test"


@pytest.mark.parametrize(("n", "shown"), [(12, 20), (20, 20), (30, 30)])
def test_the_metadata_has_one_figure_of_each_name_that_of_most_images(results, evaluation, n, shown):
    """Whichever is the better one; the table keeps both."""
    run, own = Accuracy(5, 20), Accuracy(n - 1, n)
    results["evaluation"]["after"] = dict.fromkeys(("clean", "robust"), run.to_dict())
    changed = {**evaluation, "clean": own.to_dict(), "reliability": None}
    changed["worst_case"] = [{**evaluation["worst_case"][0], **own.to_dict()}]
    changed["attacks"] = [{**evaluation["attacks"][0], **own.to_dict(), "reliability": None}]
    results["evaluation"]["attack"] = changed["attacks"][0]["attack"]
    card = card_from(results, "a", changed)
    found = ModelCard(card).data.eval_results
    assert [one.metric_name for one in found] == ["clean accuracy", "robust accuracy (pgd-2, L-inf 4/255)"]
    expected = own if n >= 20 else run  # of as many images the later evaluation
    assert [(one.metric_args["n"], one.metric_value) for one in found] == [(shown, round(expected.value, 6))] * 2
    assert card.count("\n| capt |") == (2 if n == 20 else 4)


def test_a_union_of_threat_models_and_accuracy_under_corruptions_are_in_the_card(results, evaluation):
    changed = copy.deepcopy(evaluation)
    plain = card_from(results, "a", evaluation)
    assert "| union |" not in plain and "common corruptions" not in plain
    other = {"norm": "l1", "epsilon": 12.0}
    changed["attacks"][1]["attack"]["threat_model"] = other
    correct = [changed["attacks"][i]["correct"] for i in (0, 1)]
    first = changed["worst_case"][0]
    changed["worst_case"] = [
        {"threat_model": threat, **Accuracy(count, 12).to_dict()}
        for threat, count in zip((first["threat_model"], other), correct, strict=True)
    ]
    changed["union"] = Accuracy(min(correct), 12).to_dict()
    changed["corruptions"] = CorruptedAccuracy({"fog-3": Accuracy(6, 12), "snow-3": Accuracy(3, 12)}, 0.1).to_dict()
    card = card_from(results, "a", changed)
    assert f"| robust | L-inf 4/255, L1 12 | union | {Accuracy(min(correct), 12).percent} |" in card
    assert "which are not an adversary: 37.5% on average" in card and "| fog | 50.0 | 50.0 |" in card
    names = [one.metric_name for one in ModelCard(card).data.eval_results]
    assert "robust accuracy (union, L-inf 4/255, L1 12), n = 12" in names
    assert not any("corruption" in name for name in names)


def test_what_is_known_of_the_scores_is_in_the_card(results, evaluation):
    text = card_from(results, "a", evaluation)
    shown = f"{100 * evaluation['reliability']['ece']:.1f}% clean"
    assert f"Expected calibration error (15 bins, scores at the model's own temperature): {shown};" in text
    assert '"none of these"' not in text
    shares = {name: Accuracy(5, 10).to_dict() for name in ("right", "wrong", "accepted")}
    outcome = {
        "attack": None,
        **shares,
        "rejected": Accuracy(0, 10).to_dict(),
        "auroc": 0.75,
        "aurc": 0.25,
        "curve": [],
    }
    evaluation["rejection"] = {"threshold": 8.5, "outcomes": [outcome]}
    evaluation["configuration"]["temperature"] = 0.5
    calibration = calibration_of(results)
    config = {**results["adapter"]["config"], "calibration": calibration}
    text = card_from(results, "a", evaluation, config=config)
    assert (
        'With "none of these" below a largest logit of 8.5. Attacks try to get the 10 images of the classes accepted'
        in text
    )
    assert "| 0.750 | 0.250 |" in text and "AUROC: 1 is best, 0.5 is chance; risk area: 0 is best." in text
    assert CALIBRATED in text and "so it is not shown" not in text
    for field, value in (("temperature", 3.0), ("threshold", 7.0), ("fingerprint", "another")):
        changed = {**config, "calibration": {**calibration, field: value}}
        text = card_from(results, "a", evaluation, config=changed)
        assert "Expected calibration error" not in text and "largest logit of" not in text
        assert "evaluation.json has the calibration error at another temperature or threshold" in text


def calibration_of(results):
    config = results["adapter"]["config"]
    return {
        "fingerprint": results["adapter"]["fingerprint"], "temperature": 0.5, "threshold": 8.5, "false_rejection_rate": 0.05,
        "images": 300, "split": "validation", "task": "digits", "class_names": config["class_names"],
        "texts": digest_as_loaded(config, config["class_names"]), "base": config["base_model_fingerprint"],
        "precision": "float32",
    }  # fmt: skip


CALIBRATED = (
    'temperature 0.5; "none of these" where the largest logit is below 8.5, at most 5% of images of its classes'
)


def test_the_card_shows_a_calibration_only_if_it_holds_for_the_adapter_as_it_is_loaded(results):
    config, calibration = results["adapter"]["config"], calibration_of(results)
    assert CALIBRATED in card_from(results, "a", config={**config, "calibration": calibration})
    nameless = {**config, "class_names": None, "calibration": calibration}
    assert CALIBRATED in card_from(results, "a", config=nameless)
    others = {
        "fingerprint": "another", "class_names": ["a", "b"], "texts": "0f", "precision": "bfloat16", "base": "another",
    }  # fmt: skip
    for field, value in others.items():
        changed = {**config, "calibration": {**calibration, field: value}}
        assert "largest logit is below" not in card_from(results, "a", config=changed)


def test_a_base_on_the_hub_is_linked(results):
    results["adapter"]["config"]["base_model_name_or_path"] = "openai/clip-vit-base-patch32"
    text = card_from(results, "someone/capt")
    assert ModelCard(text).data.base_model == "openai/clip-vit-base-patch32"
    assert "`openai/clip-vit-base-patch32`" in text


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("evaluation", "after", "robust"), Accuracy(1, 20).to_dict(), "| pgd-2 | 5.0 ("),
        (("evaluation", "before", "clean"), Accuracy(19, 20).to_dict(), "| zero-shot | clean |  |  | 95.0 ("),
        (
            ("evaluation", "after"),
            dict.fromkeys(("clean", "robust"), Accuracy(7, 77).to_dict()),
            "Measured on 77 images",
        ),
        (("evaluation", "attack", "threat_model", "epsilon"), 8 / 255, "Threat model: **L-inf 8/255**"),
        (("seed",), 12, "| seed | 12 |"),
        (("training", "seconds"), 4321.0, "| time | 4321 s"),
        (("versions", "torch"), "9.9", "torch 9.9"),
        (("adapter", "parameters", "trainable"), 1234567, "1,234,567 parameters"),
        (("configuration", "training", "learning_rate"), 0.07, "learning rate 0.07"),
    ],
)
def test_a_number_changed_in_the_results_changes_in_the_card(folder, results, path, value, expected):
    assert expected not in card_from(results, "a")
    changed = copy.deepcopy(results)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "results.json").write_text(json.dumps(changed))
    assert expected in write_card(folder).read_text()


@pytest.mark.parametrize(
    ("steps", "most", "epochs", "words"),
    [
        (5, 5, 60.0, "5 steps"),
        (1, 5, 60.0, "1 step"),
        (None, 5, 60.0, "5 steps planned"),
        (1200, -1, 60.0, "1,200 steps, 60 epochs planned"),
        (3, None, 0.5, "3 steps, 0.5 epochs planned"),
        (None, -1, 60.0, "60 epochs planned"),
    ],
)
def test_a_card_says_how_long_it_was_tuned_and_not_what_max_steps_cut_short(results, steps, most, epochs, words):
    training, arguments = results["training"], results["configuration"]["training"]
    training["steps"], arguments["num_train_epochs"] = steps, epochs
    arguments["max_steps"] = most
    for of in (training, arguments):  # as in records that did not say
        for name in [name for name, value in of.items() if name in ("steps", "max_steps") and value is None]:
            del of[name]
    assert f", {words}, batches of up to 32 on 1 process |" in card_from(results, "a")


def test_an_evaluation_stands_beside_the_runs_own_figures(results, evaluation):
    card = card_from(results, "someone/capt", evaluation)
    assert "| zero-shot | robust | L-inf 4/255 | pgd-2 |" in card
    own = [line for line in card.splitlines() if line.startswith("| capt |")]
    assert [line.split("|")[4].strip() for line in own] == ["", "pgd-2", "", "pgd-2", "pgd-5", "worst case"]
    assert [line.split("|")[-2].strip() for line in own] == ["20"] * 2 + ["12"] * 4
    assert "Measured on 20 images of the test split of digits, and on 12 images of the test split" in card
    assert "- not raised: zero_gradients. 0% of the pixel gradients are exactly zero." in card
    assert "square_beats_white_box. " in card
    names = [result.metric_name for result in ModelCard(card).data.eval_results]
    assert names[-1] == "robust accuracy (worst case, L-inf 4/255), n = 12"
    assert names[:2] == ["clean accuracy, n = 20", "robust accuracy (pgd-2, L-inf 4/255), n = 20"]
    fewer = copy.deepcopy(results)
    for kind in ("clean", "robust"):
        fewer["evaluation"]["after"][kind] = Accuracy(1, 12).to_dict()  # of as many images as the evaluation
    rows = [line for line in card_from(fewer, "someone/capt", evaluation).splitlines() if line.startswith("| capt |")]
    assert [line.split("|")[4].strip() for line in rows] == ["", "pgd-2", "pgd-5", "worst case"]
    raised = copy.deepcopy(evaluation)
    raised["signs"][0]["raised"] = True
    assert "- **raised**: one_step_beats_many." in card_from(results, "a", raised)


class Own(PGD):
    """An attack of somebody else's, with the name of a strong one."""

    @property
    def name(self):
        return "autoattack"

    def to_dict(self):
        return {**super().to_dict(), "name": self.name, "own": True}


@dataclass(frozen=True)
class Outside(Attack):
    """An attack that somebody else registers."""

    pattern = r"outside-(?P<level>\d+)"
    help: ClassVar[dict[str, str]] = {"outside-LEVEL": "moves pixels towards a level"}
    threat_model: ThreatModel
    level: int = 128

    @property
    def name(self):
        return f"outside-{self.level}"


@pytest.mark.parametrize(
    ("attacks", "alone"),
    [
        ([PGD(THREAT, steps=2), PGD(THREAT, steps=5)], "PGD"),
        ([PGD(THREAT, steps=2, loss="margin", random_start=False)], "PGD"),
        ([Own(THREAT)], "PGD and autoattack"),
        ([PGD(THREAT), FAB(THREAT)], None),
        ([Square(THREAT, queries=7)], None),
        ([APGD(THREAT, loss="t", targets=3)], None),
        ([AutoAttack(THREAT)], None),
        ([AutoAttack(THREAT, version="rand")], None),
    ],
)
def test_what_it_was_measured_with_alone_follows_from_the_attacks_and_not_from_their_names(
    results, evaluation, attacks, alone
):
    changed = copy.deepcopy(evaluation)
    outcome = changed["attacks"][0]
    changed["attacks"] = [{**outcome, "attack": json.loads(json.dumps(attack.to_dict()))} for attack in attacks]
    card = card_from(results, "a", changed)
    assert ("alone here" in card) == (alone is not None)
    assert alone is None or f"It was measured with {alone} alone here" in card
    assert ("| worst case |" in card) == (len(attacks) > 1)


@pytest.mark.parametrize("strong", [True, False])
def test_an_attack_from_outside_counts_as_strong_if_its_class_says_so(results, evaluation, strong, monkeypatch):
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    kind = register_attack(type("Outside", (Outside,), {"strong": strong}))
    changed = copy.deepcopy(evaluation)
    outcome = {**changed["attacks"][0], "attack": json.loads(json.dumps(kind(THREAT, level=7).to_dict()))}
    changed["attacks"] = [outcome]
    card = card_from(results, "a", changed)
    assert "| outside-7 |" in card and ("It was measured with PGD and outside-7 alone here" in card) != strong


def test_a_transferred_attack_is_no_robust_accuracy(results, evaluation):
    changed = copy.deepcopy(evaluation)
    changed["attacks"] = [{**evaluation["attacks"][0], "attack": AutoAttack(THREAT).to_dict(), "kind": "transfer"}]
    changed["worst_case"] = []
    card = card_from(results, "a", changed)
    assert "| autoattack |" not in card and "measured with PGD alone here" in card


def change_weights(folder):
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["results.json", "evaluation.json"])
def test_figures_of_other_weights_are_refused_and_the_card_stays(folder, evaluation, name):
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    write_card(folder)
    card = (folder / "README.md").read_text()
    (folder / ({"results.json", "evaluation.json"} - {name}).pop()).unlink()
    change_weights(folder)
    with pytest.raises(ValueError, match=rf"{name} has the figures of other weights.*remove {name}"):
        write_card(folder)
    assert (folder / "README.md").read_text() == card
    (folder / name).unlink()
    assert "**Not known.**" in write_card(folder).read_text()


def test_an_evaluation_on_another_base_is_refused(folder, results, evaluation):
    changed = copy.deepcopy(evaluation)
    changed["configuration"]["model"]["base"]["fingerprint"] = "0" * 16
    (folder / "evaluation.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="measured on another base model"):
        write_card(folder)
    with pytest.raises(ValueError, match="measured on another base model"):
        card_from(results, "a", changed)


def test_records_without_a_fingerprint_are_not_shown_and_the_card_says_so(folder, results):
    del results["adapter"]["fingerprint"]
    (folder / "results.json").write_text(json.dumps(results))
    for card in (write_card(folder).read_text(), card_from(results, "a")):
        assert "- results.json does not say which weights its figures are of" in card
        assert "**Not known.**" in card and "| capt |" not in card
        assert ModelCard(card).data.eval_results is None


def test_an_evaluation_alone_is_shown(folder, evaluation):
    (folder / "results.json").unlink()
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    card = write_card(folder).read_text()
    assert "Measured on 12 images of the test split of digits." in card
    assert "| this adapter | robust | L-inf 4/255 | pgd-5 |" in card
    assert len(ModelCard(card).data.eval_results) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": 7.0},
        {"accuracy": -0.1},
        {"accuracy": math.nan},
        {"accuracy": "0.5"},
        {"accuracy": None},
        {"accuracy": True},
        {"n": 0},
        {"n": -5},
        {"n": 2.5},
        {"interval_95": [0.0, 0.0]},
        {"interval_95": [0.6, 0.7]},
        {"interval_95": [-0.5, 1.0]},
        {"interval_95": [0.1, math.inf]},
        {"interval_95": [0.1]},
        {"correct": 21},
        {"n": 100_000, "correct": 50_000},
        {"interval_95": [0, 1]},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["clean", "robust"])
def test_a_share_that_cannot_be_one_is_refused(results, change, kind):
    results["evaluation"]["after"] = {"clean": Accuracy(10, 20).to_dict(), "robust": Accuracy(10, 20).to_dict()}
    accuracy = results["evaluation"]["after"][kind]
    card_from(results, "a")
    accuracy |= change
    with pytest.raises(ValueError, match=r"results\.json .*Measure again"):
        card_from(results, "a")


def test_other_files_are_refused_and_the_card_stays(folder, evaluation, tmp_path):
    with pytest.raises(ValueError, match="There is no adapter in"):
        write_card(tmp_path)
    card = (folder / "README.md").read_text()
    for damaged in ("{", "[]", "{}", '{"adapter": 1}', "null", "\udcff"):
        (folder / "results.json").write_text(damaged, errors="surrogateescape")
        with pytest.raises(ValueError, match=r"results\.json is (not|damaged)"):
            write_card(folder)
    (folder / "results.json").unlink()
    bare = copy.deepcopy(evaluation)
    bare["configuration"]["model"]["adapter"] = None
    (folder / "evaluation.json").write_text(json.dumps(bare))
    with pytest.raises(ValueError, match="not one of a CAPT adapter"):
        write_card(folder)
    assert (folder / "README.md").read_text() == card


HOSTILE = [
    "cat\n| capt | clean |  |  | 99.9 (99.0 to 100.0) | 1000 |",
    "---\nlicense: mit\n---",
    "<script>alert(1)</script>",
    "![x](http://x.y/z.png) [x](http://x.y)",
    "```\n# x",
    "a | b",
    "\u2028| a |",
    "<!--",
    "{{ 7 * 7 }}",
]
TEXTS = st.one_of(
    st.sampled_from(HOSTILE), st.text(min_size=1), st.lists(st.sampled_from(HOSTILE), max_size=3).map("".join)
)


def shape(card):
    """What a card consists of, whatever its words are: the kinds of its blocks and of what is in them."""
    body = card.split("\n---\n", 1)[1]
    found = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(body)
    inner = [
        child.type for token in found for child in token.children or [] if child.type not in ("text", "code_inline")
    ]
    return [token.type for token in found], inner


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(TEXTS, min_size=12, max_size=12))
def test_text_from_outside_adds_nothing_but_its_words_to_a_card(hostile_records, texts):
    results, evaluation = map(copy.deepcopy, hostile_records)
    usual = card_from(results, "someone/capt", evaluation)
    task, training = results["task"], results["configuration"]["training"]
    task |= {"name": texts[0], "source": texts[1], "template": texts[2]}
    config = results["adapter"]["config"]
    config |= {"class_names": texts[:5], "template": texts[2] + "{}", "base_model_name_or_path": texts[11]}
    results |= {"method": texts[3], "machine": texts[4], "versions": {texts[5]: texts[6]}, "seed": texts[6]}
    results["evaluation"]["split"] = texts[7]
    results["evaluation"]["attack"]["name"] = results["training"]["attack"]["name"] = texts[8]
    training |= {"weighting": texts[9], "optim": texts[9]}
    evaluation["configuration"]["task"] = {"name": texts[0], "source": texts[1], "split": texts[7]}
    evaluation["configuration"]["model"]["template"] = texts[2]
    evaluation["attacks"][0]["attack"]["name"] = texts[10]
    evaluation["signs"][0] |= {"name": texts[10], "sentence": texts[11]}
    card = card_from(results, texts[0], evaluation, details=CardDetails(tags=texts[:3], license=texts[4]))
    assert shape(card) == shape(usual)
    assert len(card.splitlines()) - len(card.split("\n---\n")[0].splitlines()) == (
        len(usual.splitlines()) - len(usual.split("\n---\n")[0].splitlines())
    )
    header = yaml.safe_load(card.split("---")[1])
    assert set(header) <= {
        "base_model",
        "base_model_relation",
        "library_name",
        "license",
        "pipeline_tag",
        "tags",
        "model-index",
    }
    assert not set(card.split("\n---\n")[0]) & set("<>`")
    card.encode()


@pytest.fixture(scope="module")
def hostile_records(adapter, measured):
    return json.loads((adapter / "results.json").read_text()), json.loads(measured)


def test_many_classes_are_cut_short(results):
    results["task"]["class_names"] = results["adapter"]["config"]["class_names"] = [f"thing {i}" for i in range(1000)]
    card = card_from(results, "a")
    assert "thing 29 and 970 more." in card and "thing 30" not in card and "1000 classes" in card


def test_no_number_of_an_accuracy_stands_in_the_template():
    table = TEMPLATE.read_text().split("## How accurate")[1].split("## What it was")[0]
    words = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", table).replace("[0, 1]", "").replace("95%", "")
    assert not re.search(r"\d", words)
