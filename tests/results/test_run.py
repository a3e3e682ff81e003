"""The record of a run: written, read again, and refused by its name where it is damaged."""

import json
from pathlib import Path

import pytest
from records import SHARE, run_record

from capt_peft.results.run import RunResults
from capt_peft.utils.files import DamagedFileError

ROBUST_CLIP = Path(__file__).parents[2] / "examples" / "tiny_clip_robust"


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
    assert RunResults.load(ROBUST_CLIP).adapter is None  # of a whole model
    record = run_record("x")
    record["task"]["shots"] = None
    for both in (record["evaluation"]["before"], record["evaluation"]["after"]):
        for accuracy in both.values():
            del accuracy["correct"]
    assert RunResults.from_dict(record).evaluation.after.robust == SHARE


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
