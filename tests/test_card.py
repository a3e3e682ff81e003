"""Model cards: every figure comes from the files of the adapter, and the Hub's own tools read it."""

import copy
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from evaluate import main as measure
from helpers import TINY_CLIP
from huggingface_hub import ModelCard
from setuptools import build_meta
from train import main

from capt_peft import PGD, AutoAttack, ThreatModel, ZeroShotClassifier, evaluate, load_task
from capt_peft.card import TEMPLATE, model_card, write_card

THREAT = ThreatModel("linf", "4/255")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "adapter"
    quick = ["--shots", "1", "--max_steps", "1", "--eval_limit", "20", "--eval_attack", "pgd-2", "--attack_steps", "1"]
    main([*quick, "--use_cpu", "--save_strategy", "no", "--epsilon", "4/255", "--output_dir", str(folder)])
    return folder


@pytest.fixture
def results(adapter):
    return json.loads((adapter / "results.json").read_text())


@pytest.fixture(scope="module")
def evaluation(adapter):
    classifier = ZeroShotClassifier.from_pretrained(str(adapter))
    data = load_task("digits")["test"].select(range(12))
    details = {"task": {"name": "digits", "source": "digits", "split": "test", "limit": 12}}
    attacks = [PGD(THREAT, steps=2), PGD(THREAT, steps=5)]
    return evaluate(classifier, data, attacks, progress=False, details=details).to_dict()


def numbers(card):
    return {line for line in card.splitlines() if line.startswith("| ") and "(" in line and "%" not in line}


def test_the_template_at_the_top_is_the_one_that_is_used():
    assert TEMPLATE.resolve() == (ROOT / "model_card.md").resolve()
    assert TEMPLATE.read_text().startswith("{#-")


def test_the_card_of_a_run_holds_its_figures(adapter, results):
    card = (adapter / "README.md").read_text()
    after = results["evaluation"]["after"]
    for kind, cell in (("clean", "| capt | clean |  |  |"), ("robust", "| capt | robust | L-inf 4/255 | pgd-2 |")):
        low, high = after[kind]["interval_95"]
        assert f"{cell} {100 * after[kind]['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f}) | 20 |" in card
    for fact in (
        "import capt_peft",
        f'from_pretrained("{adapter}")',
        results["adapter"]["config"]["base_model_fingerprint"],
        "| seed | 42 |",
        f"torch {results['versions']['torch']}",
        "only within the threat model",
        "arXiv:2405.11154",
        "It was measured with PGD alone here",
    ):
        assert fact in card
    first = card.split("```python\n")[1].splitlines()[0]
    assert first.startswith("import capt_peft")
    assert "{{" not in card and "{%" not in card and "{#" not in card
    assert str(ROOT) not in card  # paths of this machine say nothing elsewhere


def test_the_hubs_own_tools_read_the_metadata(results):
    card = ModelCard(model_card(results, "someone/tiny-capt"))
    assert card.data.model_name == "tiny-capt" and card.data.library_name == "peft"
    assert card.data.base_model is None  # a local folder is no id of the Hub
    clean, robust = card.data.eval_results
    assert clean.metric_name == "clean accuracy" and robust.metric_name == "robust accuracy (pgd-2, L-inf 4/255)"
    assert clean.metric_value == pytest.approx(results["evaluation"]["after"]["clean"]["accuracy"], abs=1e-6)
    assert robust.metric_args["n"] == 20 and robust.dataset_name == "digits" and robust.dataset_split == "test"


def test_a_base_on_the_hub_is_linked(results):
    results["adapter"]["config"]["base_model_name_or_path"] = "openai/clip-vit-base-patch32"
    text = model_card(results, "someone/capt")
    assert ModelCard(text).data.base_model == "openai/clip-vit-base-patch32"
    assert "`openai/clip-vit-base-patch32`" in text


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("evaluation", "after", "robust", "accuracy"), 0.123, "| pgd-2 | 12.3 ("),
        (("evaluation", "before", "clean", "accuracy"), 0.456, "| zero-shot | clean |  |  | 45.6 ("),
        (("evaluation", "after", "clean", "n"), 77, "Measured on 77 images"),
        (("evaluation", "attack", "threat_model", "epsilon"), 8 / 255, "Threat model: **L-inf 8/255**"),
        (("seed",), 12, "| seed | 12 |"),
        (("training", "seconds"), 4321.0, "| time | 4321 s"),
        (("versions", "torch"), "9.9", "torch 9.9"),
        (("adapter", "parameters", "trainable"), 1234567, "1,234,567 parameters"),
        (("configuration", "training", "learning_rate"), 0.07, "learning rate 0.07"),
    ],
)
def test_a_number_changed_in_the_results_changes_in_the_card(adapter, results, tmp_path, path, value, expected):
    assert expected not in model_card(results, "a")
    changed = copy.deepcopy(results)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "results.json").write_text(json.dumps(changed))
    assert expected in write_card(tmp_path).read_text()


def test_an_evaluation_stands_beside_the_runs_own_figures(results, evaluation):
    card = model_card(results, "someone/capt", evaluation)
    assert "| zero-shot | robust | L-inf 4/255 | pgd-2 |" in card
    own = [line for line in card.splitlines() if line.startswith("| capt |")]
    assert [line.split("|")[4].strip() for line in own] == ["", "pgd-2", "", "pgd-2", "pgd-5", "worst case"]
    assert [line.split("|")[-2].strip() for line in own] == ["20"] * 2 + ["12"] * 4
    assert "Measured on 20 images of the test split of digits, and on 12 images of the test split" in card
    assert "- not raised: zero_gradients. 0% of the pixel gradients are exactly zero." in card
    assert "- square_beats_white_box. Not checked: " in card
    names = [result.metric_name for result in ModelCard(card).data.eval_results]
    assert names[-1] == "robust accuracy (worst case, L-inf 4/255)"
    fewer = copy.deepcopy(results)
    for kind in ("clean", "robust"):
        fewer["evaluation"]["after"][kind]["n"] = 12  # no more than the evaluation has
    rows = [line for line in model_card(fewer, "someone/capt", evaluation).splitlines() if line.startswith("| capt |")]
    assert [line.split("|")[4].strip() for line in rows] == ["", "pgd-2", "pgd-5", "worst case"]
    raised = copy.deepcopy(evaluation)
    raised["signs"][0]["raised"] = True
    assert "- **raised**: one_step_beats_many." in model_card(results, "a", raised)


def test_autoattack_is_not_called_pgd_alone(results, evaluation):
    changed = copy.deepcopy(evaluation)
    changed["attacks"] = [changed["attacks"][0]]
    changed["attacks"][0]["attack"] = AutoAttack(THREAT).to_dict()
    changed["worst_case"] = []
    assert "measured with PGD alone" not in model_card(results, "a", changed)
    changed["attacks"][0]["kind"] = "transfer"
    assert "| autoattack |" not in model_card(results, "a", changed)


def test_other_files_are_refused_and_the_card_stays(adapter, evaluation, tmp_path):
    with pytest.raises(ValueError, match=r"has no results\.json"):
        write_card(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json is no JSON"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
    bare = copy.deepcopy(evaluation)
    bare["configuration"]["model"]["adapter"] = None
    (tmp_path / "results.json").write_text((adapter / "results.json").read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps(bare))
    with pytest.raises(ValueError, match="not one of a CAPT adapter"):
        write_card(tmp_path)


def test_evaluate_updates_the_card(adapter, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    quick = ["--limit", "6", "--attacks", "pgd-3", "--use_cpu", "--no_signs", "--output", str(tmp_path / "r.json")]
    measure(["--adapter", str(folder), *quick, "--update_card"])
    assert json.loads((folder / "evaluation.json").read_text()) == json.loads((tmp_path / "r.json").read_text())
    assert "| capt | robust | L-inf 4/255 | pgd-3 |" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="--update_card needs a local --adapter"):
        measure(["--base", TINY_CLIP, *quick, "--update_card"])


def test_many_classes_are_cut_short(results):
    results["task"]["class_names"] = [f"thing {i}" for i in range(1000)]
    card = model_card(results, "a")
    assert "thing 29, and 970 more." in card and "thing 30" not in card and "1000 classes" in card


def test_the_wheel_holds_the_template(tmp_path):
    """The template lies outside the package and is linked into it: what is built must hold its text."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "model_card.md"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(
        ROOT / "capt_peft", source / "capt_peft", symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    before = os.getcwd()
    os.chdir(source)
    try:
        name = build_meta.build_wheel(str(tmp_path))
    finally:
        os.chdir(before)
    with zipfile.ZipFile(tmp_path / name) as wheel:
        assert wheel.read("capt_peft/model_card.md").decode() == TEMPLATE.read_text()


def test_no_number_of_an_accuracy_stands_in_the_template():
    table = TEMPLATE.read_text().split("## How accurate")[1].split("## What it was")[0]
    words = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", table).replace("[0, 1]", "").replace("95%", "")
    assert not re.search(r"\d", words)
