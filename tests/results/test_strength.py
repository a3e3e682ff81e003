"""A front over strengths: which point is chosen, and what is written and read back."""

import json

import pytest

from capt_peft.evaluation import Accuracy
from capt_peft.results.strength import StrengthFront, StrengthPoint
from capt_peft.utils.files import DamagedFileError

CONFIGURATION = {
    "attacks": [{"name": "pgd-20", "threat_model": {"norm": "linf", "epsilon": 10 / 255}}],
    "task": {"name": "digits", "split": "validation"},
    "model": {"adapter": {"fingerprint": "0123456789abcdef"}},
}


def front(*points, n=200, keep_clean=None):
    """A front of (strength, clean, robust) in images."""
    made = [StrengthPoint(s, Accuracy(clean, n), Accuracy(robust, n)) for s, clean, robust in points]
    return StrengthFront(tuple(made), CONFIGURATION, "a machine", keep_clean)


def test_the_best_h_is_chosen_and_is_never_below_the_base_model():
    assert front((0, 182, 3), (0.5, 190, 39), (1, 187, 82)).choose().strength == 1
    assert front((0, 180, 100), (0.5, 160, 120), (1, 100, 90)).choose().strength == 0.5
    assert front((0, 180, 60), (0.5, 100, 50), (1, 40, 40)).choose().strength == 0


def test_the_smallest_of_equal_strengths_is_chosen():
    assert front((0, 182, 0), (0.5, 100, 0), (1, 20, 0)).choose().strength == 0
    assert front((0, 100, 10), (0.5, 120, 60), (1, 60, 60)).choose().strength == 0.5
    # 2 * 120 * 60 / 180 = 2 * 200 * 50 / 250, whatever the last bits of a float say
    assert front((0, 10, 1), (0.5, 200, 50), (1, 120, 60)).choose().strength == 0.5
    assert front((0, 10, 1), (0.5, 120, 60), (1, 200, 50)).choose().strength == 0.5
    assert front((0, 100, 10), (0.5, 100, 60), (1, 100, 60)).choose(0.99).strength == 0.5


def test_keep_clean_takes_the_most_robust_point_that_keeps_a_share_of_the_base_models_clean_accuracy():
    found = front((0, 200, 2), (0.25, 199, 60), (0.5, 198, 40), (0.75, 197, 80), (1, 150, 120))
    assert found.choose(1).strength == 0
    assert found.choose(0.99).strength == 0.25  # not 0.5, which is larger and less robust
    assert found.choose(0.985).strength == 0.75
    assert found.choose(0.75).strength == 1
    assert front((0, 100, 0), (1, 29, 20)).choose(0.29).strength == 1  # 0.29 * 100 is 28.999... in floating point
    assert front((0, 100, 0), (1, 58, 20)).choose(0.58).strength == 1  # and 0.58 * 100 is 57.999...


@pytest.mark.parametrize("share", [0, -1, 1.01, float("nan"), float("inf")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"keep_clean=.* must be above 0 and at most 1"):
        front((0, 10, 1)).choose(share)
    with pytest.raises(ValueError, match="keep_clean"):
        front((0, 10, 1), keep_clean=share)


@pytest.mark.parametrize("strengths", [(), (0.5,), (0.5, 0), (0, 0.5, 0.5), (0, 1.5)])
def test_points_are_in_order_from_the_base_model_on(strengths):
    with pytest.raises(ValueError, match="increase from 0"):
        front(*[(s, 10, 5) for s in strengths])


def test_what_is_saved_is_read_back(tmp_path):
    made = front((0, 182, 3), (0.5, 190, 39), (1, 187, 82), keep_clean=0.99)
    made.save(tmp_path / "strength.json")
    assert StrengthFront.load(tmp_path) == StrengthFront.load(tmp_path / "strength.json") == made
    content = json.loads((tmp_path / "strength.json").read_text())
    assert content["chosen"] == 1.0
    assert content["points"][2]["H"] == pytest.approx(2 * 187 * 82 / (187 + 82) / 200)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(kind="evaluation"), "does not hold a front"),
        (lambda c: c["points"][1].update(H=0.9), "says H = 0.9"),
        (lambda c: c.update(chosen=0.5), "its rule chooses 1"),
        (lambda c: c["points"].pop(0), "increase from 0"),
        (lambda c: c["points"][1]["robust"].update(correct=191), "must agree"),
        (lambda c: c["points"][1].update(robust=c["points"][1]["clean"], clean=c["points"][1]["robust"]), "cannot be more"),
        (lambda c: c.pop("keep_clean"), "damaged"),
        (lambda c: c.update(keep_clean="0.99"), "damaged"),
        (lambda c: c["configuration"].pop("attacks"), "damaged"),
        (lambda c: c["configuration"].pop("model"), "damaged"),
    ],
)  # fmt: skip
def test_a_file_whose_figures_cannot_be_true_is_refused(change, words, tmp_path):
    path = tmp_path / "strength.json"
    front((0, 182, 3), (0.5, 190, 39), (1, 187, 82)).save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match=words):
        StrengthFront.load(path)


def test_the_table_has_every_point_and_marks_the_chosen_one():
    table = front((0, 182, 3), (0.5, 190, 39), (1, 187, 82)).table()
    lines = table.splitlines()
    assert lines[0] == "| strength | clean, % | robust (pgd-20, L-inf 10/255), % | H, % |"
    assert lines[3] == "| 0.5 | 95.0 (91.0 to 97.3) | 19.5 (14.6 to 25.5) | 32.4 |"
    assert lines[4].startswith("| **1** | **93.5 (")
    assert lines[6] == (
        "n = 200 images of the validation split of digits; in brackets the 95% interval. In bold: best harmonic mean H of clean "
        "and robust accuracy."
    )
    assert "keeps 99.5% of the base model's clean" in front((0, 182, 3), keep_clean=0.995).table()
