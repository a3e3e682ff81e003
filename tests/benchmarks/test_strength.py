"""benchmarks/strength.py: its lines are a benchmark's, each at the strength that the right images chose."""

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from capt_peft import CaptConfig
from capt_peft.benchmark.inputs import load_base, read_task
from capt_peft.benchmark.lines import is_whole
from capt_peft.report import read_sections
from capt_peft.results.accuracy import harmonic_mean

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import strength


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(strength, "ATTACKS", ("pgd-1",))
    monkeypatch.setattr(strength, "STRENGTHS", (0, 0.5, 1))
    for name in ("MEASURED", "CHOOSING", "FEW"):
        monkeypatch.setattr(strength, name, 8)


def test_its_lines_are_those_of_a_benchmark(small, tmp_path, monkeypatch):
    zero_shot, *adapted = strength.cells(["shift"], [16], [0])
    base, _ = load_base("tiny_clip", "cpu")
    torch.manual_seed(0)
    get_peft_model(base, CaptConfig(template="a photo of a {}.", init="normal", init_std=0.1)).save_pretrained(
        tmp_path / adapted[0].training_key
    )
    output = tmp_path / "lines.jsonl"
    monkeypatch.setattr(
        sys, "argv", ["strength.py", str(tmp_path), "--output", str(output), "--protocols", "shift", "--seeds", "0"]
    )
    strength.main()
    before = output.read_bytes()
    strength.main()
    assert output.read_bytes() == before  # nothing is left to do

    lines = strength.Lines(output).read()
    assert all(is_whole(lines[cell.key], cell) for cell in (zero_shot, *adapted))
    whole, dial, target = (lines[cell.key] for cell in adapted)
    assert set(whole["strengths"].values()) == {1}
    assert len(set(dial["strengths"].values())) == 1
    assert set(dial["fronts"]) == {"shapes, all"}
    assert set(target["fronts"]) == set(target["strengths"])
    for line in (dial, target):
        for name, points in line["fronts"].items():
            h = [harmonic_mean(p["clean"]["correct"], p["robust"]["correct"]) for p in points]
            places = (
                line["strengths"]
                if line is target
                else dict.fromkeys(dial["strengths"], dial["strengths"]["shapes, all"])
            )
            assert points[h.index(max(h))]["strength"] == places[name]
    (section,) = read_sections(output)
    assert {*section.runs.label} == {"zero-shot", "capt", "capt (dial)", "capt (dial, target)"}


def test_images_that_choose_for_a_target_are_never_measured(small):
    cell = strength.cells(["shift"], [16], [0])[1]
    task = read_task("shapes_corrupted", "all", None)
    few = strength.few_images(task)
    measured = strength.drawn(task["test"], cell.limit)
    assert len(few) == len(measured) == 8
    pixels = {image.tobytes() for image in measured["image"]}
    assert not pixels & {image.tobytes() for image in few["image"]}
