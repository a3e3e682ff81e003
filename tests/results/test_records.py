"""What may stand in a card: records that can be true, of the same images as the results, put there without losing others."""

import copy
import json
import shutil

import pytest
from helpers import TINY_CLIP
from huggingface_hub import ModelCard
from records import THREAT, card_from, evaluation_record
from safetensors.torch import load_file, save_file

from capt_peft import PGD, Evaluation, ZeroShotClassifier, evaluate, load_task
from capt_peft.commands.evaluate import main as measure
from capt_peft.evaluation import Accuracy
from capt_peft.results.card import CardDetails, write_card
from capt_peft.results.defence import WithoutDefence
from capt_peft.results.hub import update_card


def change_weights(folder):
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("when", ["before", "after"])
def test_robust_accuracy_above_clean_or_of_other_images_is_refused(results, when):
    for robust in (Accuracy(11, 20), Accuracy(5, 10)):
        results["evaluation"][when] = {"clean": Accuracy(10, 20).to_dict(), "robust": robust.to_dict()}
        with pytest.raises(
            ValueError, match=r"results\.json has robust and clean accuracy of .* the first cannot be more"
        ):
            card_from(results, "a")


def test_a_worst_case_above_an_attack_and_an_attack_above_clean_are_refused(results, evaluation):
    for place in ("worst_case", "attacks"):
        changed = copy.deepcopy(evaluation)
        changed["clean"] = Accuracy(11 if place == "attacks" else 12, 12).to_dict()
        changed[place][0] |= Accuracy(12, 12).to_dict()
        with pytest.raises(ValueError, match=r"evaluation\.json has .* the first cannot be more"):
            card_from(results, "a", changed)


OTHER_IMAGES = {
    "another split": {"task": {"split": "train"}},
    "another data set": {"task": {"name": "shapes"}},
    "another source of the data": {"task": {"source": "elsewhere/digits"}},
    "another template": {"model": {"template": "a blurry picture of the number {}!"}},
    "other classes": {"model": {"class_names": ["zero", "one"]}},
    "other pixels": {"model": {"pixels": {"mean": [0, 0, 0]}}},
}


@pytest.mark.parametrize("what", OTHER_IMAGES)
def test_an_evaluation_of_other_images_or_texts_than_the_results_is_refused(results, evaluation, what):
    changed = copy.deepcopy(evaluation)
    for name, values in OTHER_IMAGES[what].items():
        changed["configuration"][name] |= values
    with pytest.raises(ValueError, match=rf"evaluation\.json was measured with {what} than results\.json"):
        card_from(results, "a", changed)


def test_a_source_that_the_results_do_not_name_is_not_compared(results, evaluation):
    results["task"]["source"] = ""  # of a task that was put together by hand
    assert "| pgd-5 |" in card_from(results, "a", evaluation)


def test_an_evaluation_that_names_no_data_set_stands_beside_no_results_and_in_no_index(results, evaluation):
    changed = copy.deepcopy(evaluation)
    del changed["configuration"]["task"]
    card = card_from(results, "a", changed)
    assert "does not say which data set and split" in card and "| pgd-5 |" not in card
    config = results["adapter"]["config"]
    card = card_from(None, "a", changed, config=config, details=CardDetails(dataset_name="food101"))
    assert "Measured on 12 images of a data set without a name." in card
    assert ModelCard(card).data.eval_results is None


def test_without_results_the_data_set_is_what_the_evaluation_names(results, evaluation):
    changed = copy.deepcopy(evaluation)
    changed["configuration"]["task"] |= {"name": "shapes", "source": "shapes", "split": "train"}
    changed["configuration"]["model"] |= {"class_names": ["round", "square"], "template": "a {} thing."}
    card = card_from(None, "a", changed, config=results["adapter"]["config"])
    assert "on 12 images of the train split of shapes, with 2 classes, with the template a {} thing.." in card
    assert {(r.dataset_name, r.dataset_split) for r in ModelCard(card).data.eval_results} == {("shapes", "train")}
    assert "# CAPT adapter for shapes" not in card


def test_figures_of_the_run_stay_beside_the_zero_shot_ones_of_the_same_images(results, evaluation):
    for when in ("before", "after"):
        for kind in ("clean", "robust"):
            results["evaluation"][when][kind] = Accuracy(1, 5).to_dict()  # fewer than the evaluation has
    rows = [line for line in card_from(results, "a", evaluation).splitlines() if line.startswith(("| zero", "| capt"))]
    assert [line.split("|")[-2].strip() for line in rows] == ["5"] * 4 + ["12"] * 4


def test_an_evaluation_with_an_impossible_share_is_refused(results, evaluation):
    for place in ("clean", "attacks", "worst_case"):
        changed = copy.deepcopy(evaluation)
        accuracy = changed[place] if place == "clean" else changed[place][0]
        accuracy["correct"] = accuracy["n"] + 1
        with pytest.raises(ValueError, match=r"evaluation\.json says .* they must agree"):
            card_from(results, "a", changed)


def test_a_worst_case_under_no_attack_and_a_defence_measured_on_other_images_are_refused():
    record = evaluation_record("a" * 16, "b" * 16)
    assert Evaluation.from_dict(record).to_dict() == record
    other = {**record["worst_case"][0], "threat_model": {"norm": "l2", "epsilon": 0.5}}
    for rows in ([], [other], [*record["worst_case"], other]):
        with pytest.raises(ValueError, match="has worst cases under other threat models than those of its attacks"):
            Evaluation.from_dict({**record, "worst_case": rows})
    without = WithoutDefence(Accuracy(5, 8), {}, 1.0).to_dict()
    with pytest.raises(ValueError, match="without the defence, of other images"):
        Evaluation.from_dict({**record, "undefended": without})


def test_evaluate_updates_the_card(adapter, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    quick = ["--limit", "6", "--attacks", "pgd-3", "--use_cpu", "--no_signs", "--output", str(tmp_path / "r.json")]
    measure(["--adapter", str(folder), *quick, "--update_card"])
    assert json.loads((folder / "evaluation.json").read_text()) == json.loads((tmp_path / "r.json").read_text())
    assert "| capt | robust | L-inf 4/255 | pgd-3 |" in (folder / "README.md").read_text()
    change_weights(folder)
    with pytest.raises((ValueError, SystemExit), match=r"figures of other weights|2"):  # before the work
        measure(["--adapter", str(folder), *quick, "--overwrite", "--update_card"])
    with pytest.raises(ValueError, match="--update_card needs a local --adapter"):
        measure(["--base", TINY_CLIP, *quick, "--update_card"])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "bfloat16"], "measured on another base model"),
        (["--split", "train"], "another split than results.json: train, not test"),
        (["--template", "a blurry {}!"], "another template than"),
        (["--dataset_name", "shapes"], "other classes than"),
    ],
)
def test_an_update_that_cannot_be_is_refused_before_the_work(folder, monkeypatch, arguments, message):
    monkeypatch.setattr("capt_peft.commands.evaluate.evaluate", lambda *_, **__: pytest.fail("it was measured"))
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        measure(
            ["--adapter", str(folder), "--limit", "6", "--attacks", "clean", "--use_cpu", "--update_card", *arguments]
        )
    assert contents(folder) == before


def test_an_update_keeps_the_evaluation_that_was_there_and_a_refused_one_changes_nothing(folder, adapter):
    classifier = ZeroShotClassifier.from_pretrained(str(adapter))
    data, task = load_task("digits")["test"], {"name": "digits", "source": "digits", "split": "test"}

    def measured(n, attacks=(), **changes):
        details = {"task": {**task, **changes}}
        return evaluate(classifier, data.select(range(n)), attacks, progress=False, signs=False, details=details)

    first = measured(8, PGD(THREAT, steps=2))
    for _ in range(2):  # the same again takes its own place
        assert update_card(folder, first) == folder / "README.md"
    update_card(folder, measured(5))
    names = {name for name in contents(folder) if name.startswith("evaluation")}
    assert names == {f"evaluation{old}.{kind}" for old in ("", ".old1") for kind in ("json", "parquet")}
    assert Evaluation.load(folder / "evaluation.old1.json") == first
    before = contents(folder)
    with pytest.raises(ValueError, match="another split"):
        update_card(folder, measured(5, split="train"))
    assert contents(folder) == before
    (folder / "evaluation.json").unlink()
    (folder / "evaluation.json").mkdir()  # nothing can be written there
    with pytest.raises(ValueError, match="Nothing can be written into adapter="):
        measure(["--adapter", str(folder), "--attacks", "clean", "--use_cpu", "--update_card"])


def test_a_card_shows_no_figures_that_are_not_those_of_the_examples_beside_them(folder, evaluation, adapter):
    classifier = ZeroShotClassifier.from_pretrained(str(adapter))
    task = {"name": "digits", "source": "digits", "split": "test"}
    data = load_task("digits")["test"].select(range(8))
    update_card(
        folder, evaluate(classifier, data, PGD(THREAT, steps=2), progress=False, signs=False, details={"task": task})
    )
    content = json.loads((folder / "evaluation.json").read_text())
    content["clean"] = Accuracy(8, 8).to_dict() if content["clean"]["correct"] < 8 else Accuracy(7, 8).to_dict()
    content["attacks"][0] |= Accuracy(0, 8).to_dict()
    content["worst_case"][0] |= Accuracy(0, 8).to_dict()
    for figures in (content, content["attacks"][0]):
        del figures["reliability"]
    (folder / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="clean images are right, not"):
        write_card(folder)
