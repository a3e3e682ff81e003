"""The record of a run: written, read again, and refused by its name where it is damaged."""

import json

import pytest
from records import SHARE, card_from, evaluation_record, run_record

from capt_peft.evaluation import Evaluation
from capt_peft.results.run import RunResults
from capt_peft.toy import TINY_CLIP_ROBUST
from capt_peft.utils.files import DamagedFileError


def test_a_record_is_read_as_it_was_written(adapter, results):
    read = RunResults.load(adapter)
    assert read == RunResults.load(adapter / "results.json") == RunResults.from_dict(results)
    assert read.to_dict() == results
    assert (
        read.evaluation.after.clean.n == 20
        and read.task.shots == "1"
        and read.configuration["script"]["eval_limit"] == 20
    )


def test_the_table_has_the_accuracies_before_and_after():
    lines = RunResults.from_dict(run_record("x")).table().splitlines()
    assert lines[0] == "|  | clean, % | robust (pgd-2, L-inf 4/255), % |"
    assert lines[2].startswith(f"| zero-shot | {SHARE.percent} | ") and lines[3].startswith(
        f"| CAPT | {SHARE.percent} | "
    )
    assert lines[-1] == "n = 700 images of the test split; in brackets the 95% interval."


def test_records_of_earlier_versions_are_read():
    assert RunResults.load(TINY_CLIP_ROBUST).adapter is None  # of a whole model
    record = run_record("x")
    record["task"]["shots"] = None
    for both in (record["evaluation"]["before"], record["evaluation"]["after"]):
        for accuracy in both.values():
            del accuracy["correct"]
    assert RunResults.from_dict(record).evaluation.after.robust == SHARE


def test_records_of_later_versions_are_read_as_far_as_they_are_known():
    record = run_record("x")
    for part in (record, record["task"], record["training"], record["adapter"], record["evaluation"]):
        part["of a later version"] = 1
    assert RunResults.from_dict(record) == RunResults.from_dict(run_record("x"))


def test_a_card_shows_the_settings_that_the_objective_has_and_no_others(results):
    record = json.loads(json.dumps(results))
    assert "| method | capt, consistency (λ) 1.5, weighting confidence, frozen term predictions |" in card_from(record)
    del record["training"]["objective"]  # an earlier version's
    assert "| method | capt, consistency (λ) 1.5, weighting confidence |" in card_from(record)
    for objective, words in (
        ({"consistency": 1.5}, "fap, consistency (λ) 1.5"),
        ({}, "fap"),
        ({"margin": 2}, "fap, margin 2"),
    ):
        record["method"], record["training"]["objective"] = "fap", objective
        assert f"| method | {words} |" in card_from(record)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("adapter", "bytes"), "zz"),
        (("adapter", "bytes"), []),
        (("evaluation", "attack", "name"), {}),
    ],
)
def test_a_value_that_no_card_could_show_is_damage(place, value, tmp_path):
    record = run_record("x")
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "results.json").write_text(json.dumps(record))
    with pytest.raises(DamagedFileError, match=r"results\.json is not a record of this package, or is damaged"):
        RunResults.load(tmp_path)


def test_a_file_that_is_no_evaluation_is_none_on_its_own_either(tmp_path):
    record = evaluation_record("x", "base")
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    assert Evaluation.load(tmp_path, with_examples=False).clean == SHARE
    (tmp_path / "evaluation.json").write_text(json.dumps({**record, "kind": "curve"}))
    with pytest.raises(ValueError, match="does not hold an evaluation"):
        Evaluation.load(tmp_path, with_examples=False)


@pytest.mark.parametrize(
    "place", [("task", "name"), ("evaluation", "attack", "name"), ("training", "attack"), ("versions",), ("seed",)]
)
def test_a_file_without_what_a_card_needs_is_damaged(tmp_path, place):
    record = run_record("x")
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    (tmp_path / "results.json").write_text(json.dumps(record))
    with pytest.raises(DamagedFileError, match=r"results\.json is not a record of this package, or is damaged"):
        RunResults.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        RunResults.load(tmp_path / "other.json")
