"""One cell: what its line says, that it is what one computes by hand, which adapters are used again, and failures."""

import getpass
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from helpers import TINY_CLIP
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import CLIPModel, set_seed

from capt_peft import (
    PGD,
    CaptConfig,
    CaptTrainer,
    CaptTrainingArguments,
    ThreatModel,
    ZeroShotClassifier,
    evaluate,
    load_task,
    methods,
)
from capt_peft.benchmark import Plan, get_suite, run, run_cell
from capt_peft.benchmark.inputs import TUNED_WITH
from capt_peft.benchmark.lines import Result
from capt_peft.data import TEMPLATES
from capt_peft.objectives import CaptObjective
from capt_peft.training import callbacks
from capt_peft.tuner.fingerprint import adapter_fingerprint, base_fingerprint

MODEL = os.path.relpath(TINY_CLIP)
SMALL = {"max_steps": 2, "attack_steps": 1}
LIMIT = 8


def cell(method="capt", protocol="few-shot", tasks=("digits",), seed=1, shots=1, variant=None, **settings):
    plan = Plan(
        get_suite("toy"), MODEL, [method], [protocol], [shots], [seed], tasks, {"": variant or {}}, SMALL | settings,
        attacks=["pgd-1", "pgd-2"], limit=LIMIT, transfer_shots=1,
    )  # fmt: skip
    (made,) = plan.cells()
    return made


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def line(adapters):
    """The line of a few-shot cell."""
    return run_cell(cell(), adapters=adapters)


@pytest.fixture(scope="module")
def transfer(adapters):
    """The line of a cross-dataset cell, and the class names and template of each classifier that was measured."""
    seen = []

    class Spy(ZeroShotClassifier):
        def __init__(self, model, processor, class_names, template, **texts):
            seen.append((tuple(class_names), template))
            super().__init__(model, processor, class_names, template, **texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ZeroShotClassifier", Spy)
        return run_cell(cell(protocol="cross-dataset", tasks=("digits", "sizes")), adapters=adapters), seen


def forbid_training(monkeypatch, error=AssertionError):
    def refuse(*args, **kwargs):
        raise error("An adapter is tuned.")

    monkeypatch.setattr(methods, "CaptTrainer", refuse)


def lasting(line):
    """A line without what the clock says."""
    training = {name: value for name, value in (line["training"] or {}).items() if name != "seconds"}
    return {name: value for name, value in line.items() if name != "seconds"} | {"training": training}


# --------------------------------------------------------------------------------------------------- a finished line


def test_a_finished_line_says_all_that_there_is_to_say(line):
    assert list(line) == [
        "key", "status", "cell", "results", "training", "measured_images", "measured_data", "training_images", "training_data",
        "base_model_fingerprint",
        "base_configuration", "processor", "teacher_fingerprint", "adapter_fingerprint", "seconds", "versions", "machine",
    ]  # fmt: skip
    assert (line["key"], line["status"], line["cell"]) == (cell().key, "finished", cell().to_dict())
    (result,) = line["results"]
    assert set(result) == {"task", "classes", "template", "clean", "attacks", "worst_case"}
    assert (result["task"], result["classes"], result["template"]) == ("digits", "all", "a photo of the digit {}.")
    assert list(result["attacks"]) == ["pgd-1", "pgd-2"]
    counts = [result["clean"], *result["attacks"].values(), result["worst_case"]]
    assert [count["n"] for count in counts] == [LIMIT] * 4
    assert counts[3]["correct"] <= min(counts[1]["correct"], counts[2]["correct"]) <= counts[0]["correct"]
    training = line["training"]
    assert (training["steps"], training["images"], training["processes"], training["collapsed"]) == (2, 10, 1, None)
    assert training["attack"]["name"] == "pgd-1" and training["parameters"] > 0
    assert training["arguments"]["max_steps"] == 2 and training["arguments"]["seed"] == 1
    assert 0 < training["seconds"] <= line["seconds"]
    assert line["versions"]["torch"] == torch.__version__ and line["machine"].startswith(("CPU", "NVIDIA"))


def test_a_line_is_json(line):
    assert json.loads(json.dumps(line)) == line


def test_a_line_names_neither_machine_nor_user_nor_a_place_on_the_disk(line):
    text = json.dumps(line)
    for word in (socket.gethostname(), str(Path.home()) + "/", str(Path.cwd()), "/tmp/", f"/{getpass.getuser()}/"):
        assert word not in text


def test_the_figures_and_prompts_are_those_that_one_computes_by_hand(line, adapters, processor, tmp_path):
    task = load_task("digits")
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    set_seed(1)
    model = get_peft_model(base, CaptConfig(template=task.template, class_names=list(task.class_names)))
    args = CaptTrainingArguments(
        str(tmp_path), seed=1, max_steps=2, attack_steps=1, learning_rate=0.3, epsilon="4/255", save_strategy="no",
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    objective = CaptObjective(1.5, "confidence")
    CaptTrainer(model, args, task=task.few_shot(1, 1), processor=processor, objective=objective).train()
    saved = load_file(adapters / cell().training_key / "adapter_model.safetensors")
    by_hand = get_peft_model_state_dict(model)
    assert set(saved) == set(by_hand) and all(torch.equal(saved[name], tensor) for name, tensor in by_hand.items())

    attacks = [PGD(ThreatModel("linf", "4/255"), steps=steps) for steps in (1, 2)]
    images = task["test"].shuffle(seed=0).select(range(LIMIT))
    classifier = ZeroShotClassifier(model, processor, task.class_names, task.template)
    result = evaluate(classifier, images, attacks, seed=1, progress=False)
    assert line["results"][0]["clean"]["correct"] == result.clean.correct
    assert [count["correct"] for count in line["results"][0]["attacks"].values()] == [
        outcome.accuracy.correct for outcome in result.attacks
    ]
    assert line["results"][0]["worst_case"]["correct"] == result.robust.correct


def test_the_same_cell_gives_the_same_line_again(line, adapters, tmp_path):
    assert lasting(run_cell(cell(), adapters=tmp_path)) == lasting(line)
    first, second = (folder / cell().training_key / "adapter_model.safetensors" for folder in (adapters, tmp_path))
    assert first.read_bytes() == second.read_bytes()


def test_zero_shot_tunes_nothing_and_keeps_nothing(tmp_path, monkeypatch):
    forbid_training(monkeypatch)
    line = run_cell(cell("zero-shot"), adapters=tmp_path)
    assert line["status"] == "finished" and line["training"] is None
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- what an adapter and a line belong to


def test_a_line_names_the_adapter_the_images_and_the_weights_that_it_is_of(line, adapters, transfer):
    folder = adapters / cell().training_key
    assert line["adapter_fingerprint"] == adapter_fingerprint(folder)
    assert line["base_model_fingerprint"] == base_fingerprint(CLIPModel.from_pretrained(TINY_CLIP))
    other = transfer[0]
    assert other["base_model_fingerprint"] == line["base_model_fingerprint"] and other["processor"] == line["processor"]
    assert len(set(other["measured_data"])) == 3 and other["measured_data"][1] == line["measured_data"][0]
    assert other["training_data"] not in (None, line["training_data"])
    assert line["training"]["at_chance"] is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder, record: (folder / "adapter_model.safetensors").write_bytes(b"x"),
        lambda folder, record: (folder / "adapter_model.safetensors").unlink(),
        lambda folder, record: (folder / "adapter_config.json").write_text("{"),
        lambda folder, record: record.pop("tuned_on"),
        lambda folder, record: record.pop("adapter_fingerprint"),
        lambda folder, record: record.update(adapter_fingerprint="of other weights"),
        *(lambda folder, record, name=name: record["tuned_on"].update({name: "another"}) for name in TUNED_WITH),
    ],
)  # fmt: skip
def test_a_kept_adapter_that_is_damaged_or_of_other_images_or_weights_is_tuned_again(
    line, adapters, tmp_path, damage, monkeypatch, caplog
):
    folder = tmp_path / cell().training_key
    shutil.copytree(adapters / folder.name, folder)
    record = json.loads((folder / run.TRAINING).read_text())
    damage(folder, record)
    (folder / run.TRAINING).write_text(json.dumps(record))
    forbid_training(monkeypatch)
    assert run_cell(cell(), adapters=tmp_path)["error"]["message"] == "An adapter is tuned."
    assert "It is tuned again" in caplog.text


def test_an_adapter_that_was_tuned_again_takes_the_place_of_the_damaged_one(line, adapters, tmp_path):
    folder = tmp_path / cell().training_key
    shutil.copytree(adapters / folder.name, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    assert lasting(run_cell(cell(), adapters=tmp_path)) == lasting(line)
    assert adapter_fingerprint(folder) == line["adapter_fingerprint"]


# ---------------------------------------------------------------------------------------------------------- protocols


def test_a_kept_adapter_is_measured_again_and_not_tuned_again(transfer, adapters, monkeypatch):
    forbid_training(monkeypatch)
    again = run_cell(cell(protocol="shift"), adapters=adapters)
    assert again["status"] == "finished" and again["training"] == transfer[0]["training"]
    assert [result["task"] for result in again["results"]] == ["shapes", *get_suite("toy").shifts]
    # the adapter that was loaded does as the one that was just tuned
    assert again["results"][0] == transfer[0]["results"][0]


def test_without_a_folder_of_adapters_none_is_kept(monkeypatch):
    forbid_training(monkeypatch)
    assert run_cell(cell())["error"]["message"] == "An adapter is tuned."


def test_an_adapter_whose_record_was_not_written_any_more_is_tuned_again(line, adapters, tmp_path, monkeypatch):
    folder = tmp_path / cell().training_key
    folder.mkdir()
    for path in (adapters / folder.name).iterdir():
        if path.name != run.TRAINING:
            (folder / path.name).write_bytes(path.read_bytes()[:20])
    forbid_training(monkeypatch)
    assert run_cell(cell(), adapters=tmp_path)["error"]["message"] == "An adapter is tuned."


def test_cross_dataset_measures_every_target_with_its_own_classes_and_text(transfer):
    line, seen = transfer
    tasks = [load_task(name) for name in ("shapes", "digits", "sizes")]
    assert [(result["task"], result["classes"]) for result in line["results"]] == [(task.name, "all") for task in tasks]
    assert seen == [(task.class_names, task.template) for task in tasks]
    assert [result["template"] for result in line["results"]] == [task.template for task in tasks]


def test_base_to_new_is_tuned_on_base_classes_alone_and_measured_on_both_halves(monkeypatch):
    tuned, measured = [], []

    class Trainer(CaptTrainer):
        def __init__(self, *args, task, **kwargs):
            tuned.append(task)
            super().__init__(*args, task=task, **kwargs)

    def spy(classifier, data, *args, **kwargs):
        measured.append((classifier.class_names, {classifier.class_names[label] for label in data["label"]}))
        return evaluate(classifier, data, *args, **kwargs)

    monkeypatch.setattr(methods, "CaptTrainer", Trainer)
    monkeypatch.setattr(run, "evaluate", spy)
    line = run_cell(cell(protocol="base-to-new"))
    names = load_task("digits").class_names
    (task,) = tuned
    assert task.class_names == names[:5] and sorted(task.labels("train")) == [0, 1, 2, 3, 4]
    assert line["training"]["images"] == 5
    assert [(result["task"], result["classes"]) for result in line["results"]] == [
        ("digits", "base"),
        ("digits", "new"),
    ]
    assert [classes for classes, _ in measured] == [names[:5], names[5:]]
    assert all(drawn <= set(classes) and len(drawn) > 1 for classes, drawn in measured)


def test_a_template_among_the_settings_is_the_text_of_tuned_methods_and_not_of_zero_shot(monkeypatch):
    trained = []

    class Trainer(CaptTrainer):
        def __init__(self, *args, task, **kwargs):
            trained.append(task.template)
            super().__init__(*args, task=task, **kwargs)

    monkeypatch.setattr(methods, "CaptTrainer", Trainer)
    text = {"template": "a nice drawing of a {}."}
    (result,) = run_cell(cell(**text))["results"]
    assert result["template"] == text["template"] and trained == [text["template"]]
    (result,) = run_cell(cell("zero-shot", **text))["results"]
    assert result["template"] == load_task("digits").template
    line = run_cell(cell(template="clip-eurosat"))
    assert trained[1:] == [TEMPLATES["clip-eurosat"]] and line["results"][0]["template"] == TEMPLATES["clip-eurosat"]
    read = Result.from_dict(line["results"][0])
    assert read.template == tuple(TEMPLATES["clip-eurosat"]) and hash(read.template)


# ----------------------------------------------------------------------------------------------------------- failures


def test_a_collapsed_run_is_measured_and_marked(monkeypatch):
    monkeypatch.setattr(callbacks, "collapse", lambda history, num_classes: "it has become constant")
    line = run_cell(cell(logging_steps=1))
    assert line["status"] == "finished" and line["results"][0]["clean"]["n"] == LIMIT
    assert line["training"]["collapsed"] == "it has become constant"
    assert line["training"]["steps"] == 2 and line["training"]["log"][-1]["step"] == 2


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"shots": 1000}, "ValueError", "Class '0' has 79 images, but 1000 are asked"),
        (
            {"method": "fap", "tasks": ("counts",), "variant": {"num_text_tokens": 4, "num_vision_tokens": 4}},
            "ValueError",
            "The template 'a photo of {}.' has 3 tokens before the class name, but the 4 text prompts",
        ),
        ({"weighting": "much"}, "ValueError", "much"),
        ({"teacher": "no/such/folder"}, "OSError", "no/such/folder"),
        ({"variant": {"learning_rate": 1e38}}, "ValueError", "logits that are not finite"),
    ],
)
def test_what_fails_is_a_line_with_the_error(changes, kind, words, tmp_path):
    failing = cell(**changes)
    line = run_cell(failing, adapters=tmp_path)
    assert list(line) == ["key", "status", "cell", "error", "seconds", "versions", "machine"]
    assert (line["key"], line["status"], line["cell"]) == (failing.key, "failed", failing.to_dict())
    assert line["error"]["type"] == kind and words in line["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_is_a_failed_line():
    (missing,) = Plan(get_suite("toy"), "./nowhere", ["capt"], ["few-shot"], [1], [0], ["digits"]).cells()
    line = run_cell(missing)
    assert line["status"] == "failed" and "nowhere" in line["error"]["message"]


def test_an_interrupt_is_not_a_failure_of_the_cell(monkeypatch):
    forbid_training(monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell())
