"""benchmarks/strength.py: its lines are a benchmark's, each at the strength that the right images chose."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from capt_peft.benchmark import Lines, Plan, get_suite, read_lines
from capt_peft.benchmark.inputs import read_task
from capt_peft.benchmark.lines import is_whole
from capt_peft.report import read_sections
from capt_peft.results.accuracy import harmonic_mean

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kept
import strength
from kept_adapters import keep, line

OLD = Path(__file__).parents[2] / "docs" / "results" / "strength" / "lines.jsonl"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(strength, "STRENGTHS", (0, 0.5, 1))
    for name in ("CHOOSING", "FEW"):
        monkeypatch.setattr(strength, name, 8)


def cells(protocol="shift", **changes):
    methods, variants = ["zero-shot", "capt"], {"rate": {"learning_rate": 0.3}}
    plan = Plan(
        get_suite("toy"), "tiny_clip", methods, [protocol], [16], [0], variants=variants, attacks=["pgd-1"], limit=8, **changes
    )  # fmt: skip
    return plan.cells()


def run(monkeypatch, lines, output, *options):
    monkeypatch.setattr(sys, "argv", ["strength.py", str(lines), "--output", str(output), *options])
    strength.main()


def test_its_lines_are_those_of_a_benchmark(small, tmp_path, monkeypatch):
    zero_shot, adapted = cells()
    lines, output = tmp_path / "toy.jsonl", tmp_path / "lines.jsonl"
    for cell in (zero_shot, adapted):
        keep(lines, cell)
    run(monkeypatch, lines, output)
    before = output.read_bytes()
    run(monkeypatch, lines, output)
    assert output.read_bytes() == before  # nothing is left to do

    found = Lines(output).read()
    of = strength.cells(adapted)
    assert all(is_whole(found[cell.key], cell) for cell in (zero_shot, *of.values()))
    whole, dial, target = (found[of[how].key] for how in ("", "dial", "dial, target"))
    assert set(whole["strengths"].values()) == {1}
    assert len(set(dial["strengths"].values())) == 1
    assert set(dial["fronts"]) == {"shapes, all"}
    assert set(target["fronts"]) == set(target["strengths"])
    for each in (dial, target):
        for name, points in each["fronts"].items():
            h = [harmonic_mean(p["clean"]["correct"], p["robust"]["correct"]) for p in points]
            chosen = (
                each["strengths"] if each is target else dict.fromkeys(dial["fronts"], dial["strengths"]["shapes, all"])
            )
            assert points[h.index(max(h))]["strength"] == chosen[name]
    (section,) = read_sections(output)
    assert {*section.runs.label} == {"zero-shot", "capt (rate)", "capt (rate, dial)", "capt (rate, dial, target)"}


def test_what_the_benchmark_measured_on_test_images_is_taken_from_its_lines(tmp_path, monkeypatch):
    zero_shot, _ = cells("few-shot", tasks=["digits"])
    count = {"correct": 1, "n": 8}  # of another model: nobody would measure this
    result = {"task": "digits", "classes": "all", "clean": count, "attacks": {"pgd-1": count}, "worst_case": count}
    lines, output = tmp_path / "toy.jsonl", tmp_path / "lines.jsonl"
    Lines(lines).append(line(zero_shot, [result]))
    Lines(lines).append(line(replace(zero_shot, split="validation"), [result]))
    run(monkeypatch, lines, output)
    (taken,) = Lines(output).read().values()
    assert taken["results"] == [result] and taken["cell"] == zero_shot.to_dict()
    run(monkeypatch, lines, output, "--attacks", "pgd-2")  # not in the benchmark's lines
    (result,) = Lines(output).read()[replace(zero_shot, attacks=("pgd-2",)).key]["results"]
    assert list(result["attacks"]) == ["pgd-2"] and result["clean"]["correct"] > 1


def test_another_adapter_than_the_one_that_was_measured_is_refused(tmp_path):
    _, cell = cells("few-shot", tasks=["digits"])
    lines = tmp_path / "toy.jsonl"
    keep(lines, cell)
    (found,) = kept.read_kept(lines)
    keep(tmp_path / "other.jsonl", cell, init_std=0.2).rename(tmp_path / "other")
    found.load()
    with pytest.raises(ValueError, match="is not the adapter that was measured as few-shot: capt"):
        replace(found, folder=tmp_path / "other").load()
    with pytest.raises(ValueError, match="is gone"):
        replace(found, folder=tmp_path / "nowhere").load()


def test_an_adapter_that_was_tuned_again_is_measured_again(small, tmp_path, monkeypatch):
    (cell,) = (cell for cell in cells() if cell.tuned)
    lines, output = tmp_path / "toy.jsonl", tmp_path / "lines.jsonl"
    for std in (0.1, 0.9):
        keep(lines, cell, init_std=std)
        run(monkeypatch, lines, output)
        (found,) = kept.read_kept(lines)
        fingerprints = {line["adapter_fingerprint"] for line in Lines(output).read().values()}
        assert fingerprints == {found.line["adapter_fingerprint"]}


def test_the_file_of_the_benchmark_is_no_output(tmp_path, monkeypatch, capsys):
    lines = tmp_path / "toy.jsonl"
    keep(lines, cells()[0])
    before = lines.read_bytes()
    with pytest.raises(SystemExit):
        run(monkeypatch, lines, lines)
    assert "the benchmark's own file" in capsys.readouterr().err and lines.read_bytes() == before


def test_adapters_are_chosen_by_method_or_row_and_seed(tmp_path):
    lines, (zero_shot, cell) = tmp_path / "toy.jsonl", cells("few-shot", tasks=["digits"])
    for one in (zero_shot, cell, replace(cell, seed=1), replace(cell, variant=""), replace(cell, defence="identity")):
        Lines(lines).append(line(one))
    assert len(kept.read_kept(lines)) == 4  # without the defence
    assert [of.cell.label for of in kept.read_kept(lines, ["capt"], [1])] == ["capt (rate)"]
    assert [of.cell.seed for of in kept.read_kept(lines, ["capt (rate)"])] == [0, 1]
    assert [of.cell.label for of in kept.read_kept(lines, ["zero-shot"], [1])] == ["zero-shot"]
    with pytest.raises(ValueError, match=r"no finished cells of fap. It has capt, capt \(rate\), zero-shot"):
        kept.read_kept(lines, ["fap", "capt"])


def test_images_that_choose_for_a_target_are_never_measured(small):
    task = read_task("shapes_corrupted", "all", None)
    few, measured = strength.few_images(task, 8), strength.drawn(task["test"], 8)
    assert len(few) == len(measured) == 8
    pixels = {image.tobytes() for image in measured["image"]}
    assert not pixels & {image.tobytes() for image in few["image"]}
    with pytest.raises(ValueError, match="fewer than 8 test images that are not measured"):
        strength.few_images(task, None)


def test_the_cells_of_earlier_lines_are_those_of_today():
    earlier = {line.key: line.cell for line in read_lines(OLD)}
    wholes = [cell for cell in earlier.values() if cell.tuned and "dial" not in cell.variant]
    assert wholes
    for cell in wholes:
        found = strength.cells(replace(cell, attacks=("pgd-20",)), cell.attacks)
        assert {of.key for of in found.values()} <= {*earlier}
    assert {section.protocol for section in read_sections(OLD)} == {cell.protocol for cell in earlier.values()}
