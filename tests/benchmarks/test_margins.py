"""benchmarks/margins.py: its figures are those of the evaluation, and what it calls forgotten was known."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from capt_peft import ZeroShotClassifier, evaluate, parse_attack
from capt_peft.benchmark import Plan, get_suite
from capt_peft.benchmark.inputs import drawn, read_task

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kept
import margins
from kept_adapters import keep

N = 24


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """An adapter, one of strength 0, and what was found of them."""
    folder = tmp_path_factory.mktemp("margins")
    plan = Plan(
        get_suite("toy"), "tiny_clip", ["capt"], ["few-shot"], [16], [0], ["digits"], attacks=["pgd-1"], limit=N,
        split="validation", variants={"plain": {"learning_rate": 0.3}, "off": {"learning_rate": 0.1}},
    )  # fmt: skip
    for cell in reversed(plan.cells()):
        keep(folder / "lines.jsonl", cell, init_std=0.5, strength=float(cell.variant == "plain"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(margins, "ATTACK", "pgd-2")
        arguments = [
            "margins.py",
            str(folder / "lines.jsonl"),
            "--methods",
            "capt (plain),capt",
            "--output",
            str(folder / "margins.json"),
        ]
        patch.setattr(sys, "argv", arguments)
        margins.main()
        before = (folder / "margins.jsonl").read_bytes()
        margins.main()
        assert (folder / "margins.jsonl").read_bytes() == before  # nothing is left to do
    return folder, json.loads((folder / "margins.json").read_text())


def test_its_accuracies_are_those_of_the_evaluation(measured):
    folder, content = measured
    (plain,) = kept.read_kept(folder / "lines.jsonl", ["capt (plain)"])
    model, processor = plain.load()
    task = read_task("digits", "all", None)
    classifier = ZeroShotClassifier(model, processor, task.class_names, task.template)
    attack = parse_attack("pgd-2", plain.cell.threat)
    found = evaluate(classifier, drawn(task["validation"], N), attack, seed=0, signs=False, progress=False)
    figures = content["figures"]["capt (plain)"]["digits"]
    assert figures["clean"] == pytest.approx(100 * found.clean.value, abs=1e-3)
    assert figures["robust"] == pytest.approx(100 * found.robust.value, abs=1e-3)
    assert [*content["figures"]] == ["zero-shot", "capt (plain)", "capt (off)"]
    assert (folder / "margins.png").stat().st_size > 10_000


def test_forgotten_and_learned_are_the_difference_to_zero_shot(measured):
    figures = {name: of["all"] for name, of in measured[1]["figures"].items()}
    before, plain, off = (figures[name] for name in ("zero-shot", "capt (plain)", "capt (off)"))
    assert plain["forgotten"] > 0  # prompts so far from the words that something is lost
    assert plain["clean"] == pytest.approx(before["clean"] + plain["learned"] - plain["forgotten"], abs=0.01)
    assert plain["to_frozen"] < 0.99
    assert off == before  # an adapter of strength 0 is the base model
    assert off["to_frozen"] == off["texts_to_frozen"] == 1


def test_figures_by_hand():
    def row(prediction, clean):
        images = {"label": [0, 1, 2, 0, 1], "prediction": prediction, "clean": clean, "attacked": [1, -1, -1, -1, 1]}
        same = {"to_frozen": [1] * 5, "to_attacked": [1] * 5}
        return {"images": images | same, "texts_to_frozen": 1, "alike": 0, "information": 1, "attacked_loss": 1}

    zero_shot = row([0, 1, 2, 1, 0], [3, 1, 2, -1, -2])  # right on the first three, surest of the first
    found = margins.figures_of(row([1, 1, 0, 0, 1], [-1, 2, -3, 1, 4]), zero_shot)
    assert found["clean"] == 60 and found["robust"] == 20
    assert found["forgotten"] == 40 and found["forgotten_of_sure"] == 20 and found["learned"] == 40
    assert found["median_margin"] == 1


def test_information_is_0_of_one_prediction_for_all_images_and_1_of_certain_and_even_ones():
    assert float(margins.information(torch.tensor([[0.7, 0.2, 0.1]] * 4))) == pytest.approx(0, abs=1e-6)
    assert float(margins.information(torch.eye(3))) == pytest.approx(1)
    assert float(margins.information(torch.eye(4)[:2])) == pytest.approx(0.5)  # half of the classes are never named


def test_another_adapter_of_the_same_name_is_measured_again(measured):
    (one,) = kept.read_kept(measured[0] / "lines.jsonl", ["capt (plain)"])
    other = replace(one, line={**one.line, "adapter_fingerprint": "other"})
    assert margins.identity(one)["key"] != margins.identity(other)["key"]
