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


def test_adapters_that_cannot_be_compared_are_refused(measured):
    folder, _ = measured
    one, other = kept.read_kept(folder / "lines.jsonl")
    for change in ({"model": "tiny_clip_robust"}, {"limit": N - 1}, {"epsilon": "8/255"}):
        with pytest.raises(ValueError, match="more than one model, threat model or limit"):
            margins.with_zero_shot([one, replace(other, cell=replace(other.cell, **change))])
    with pytest.raises(ValueError, match="adapters of different settings"):
        margins.with_zero_shot([one, replace(other, cell=replace(other.cell, variant=one.cell.variant))])
    assert len(margins.with_zero_shot([one, one, other])) == 3


@pytest.mark.parametrize("output", ["lines.json", "margins.jsonl"])
def test_it_does_not_write_over_the_lines_that_it_reads(measured, output, monkeypatch, capsys):
    folder, _ = measured
    lines = folder / "lines.jsonl"
    before = lines.read_bytes()
    arguments = ["margins.py", str(lines), "--methods", "capt", "--output", str(folder / output)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        margins.main()
    assert "must end in .json" in capsys.readouterr().err and lines.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--seeds", "a"], "such as 0,1,2"), (["--methods", "magic"], "no finished cells of magic")],
)
def test_bad_arguments_end_in_one_sentence(measured, monkeypatch, arguments, words):
    folder, _ = measured
    output = ["--output", str(folder / "other.json")]
    monkeypatch.setattr(
        sys, "argv", ["margins.py", str(folder / "lines.jsonl"), "--methods", "capt", *output, *arguments]
    )
    with pytest.raises(SystemExit, match=words):
        kept.or_one_sentence(margins.main)


def test_another_adapter_of_the_same_name_is_measured_again(measured):
    (one,) = kept.read_kept(measured[0] / "lines.jsonl", ["capt (plain)"])
    other = replace(one, line={**one.line, "adapter_fingerprint": "other"})
    assert margins.identity(one)["key"] != margins.identity(other)["key"]
