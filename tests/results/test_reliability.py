"""Reliability and rejection: what they count, against definitions written another way; and figures that cannot be true."""

import json
from dataclasses import replace

import numpy as np
import pytest

from capt_peft import PGD, ThreatModel
from capt_peft.results.accuracy import Accuracy, FigureError
from capt_peft.results.rejection import Rejection, RejectionOutcome, auroc
from capt_peft.results.reliability import BINS, Reliability

ATTACK = PGD(ThreatModel("linf", "4/255"), steps=2).to_dict()


def some_scores(n=200, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.1, 1, n).round(2)  # ties, and edges of bins
    return scores, rng.uniform(size=n) < scores


def test_the_calibration_error_is_the_published_sum():
    scores, right = some_scores()
    error = 0.0
    for low, high in zip(np.arange(BINS) / BINS, np.arange(1, BINS + 1) / BINS, strict=True):
        inside = (scores > low) & (scores <= high)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - scores[inside].mean())
    found = Reliability.of(scores.tolist(), right.tolist())
    assert found.ece == pytest.approx(error) and found.n == 200 and sum(found.right) == right.sum()


@pytest.mark.parametrize(("score", "error"), [(0.75, 0.0), (1.0, 0.25), (0.25, 0.5), (0.0, 0.75)])
def test_scores_that_are_all_alike_have_the_difference_as_their_error(score, error):
    assert Reliability.of([score] * 4, [True, True, True, False]).ece == pytest.approx(error)


def test_reliability_reads_what_it_wrote_and_refuses_what_cannot_be_true():
    found = Reliability.of(*map(np.ndarray.tolist, some_scores()))
    row = json.loads(json.dumps(found.to_dict()))
    assert Reliability.from_dict(row) == found
    for change in ({"ece": 0.9}, {"right": [300] * BINS}, {"images": [1] * 3}, {"scores": [5.0] * BINS}):
        with pytest.raises((FigureError, ValueError)):
            Reliability.from_dict({**row, **change})


def test_the_auroc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(0.5, 1, 30).round(1), rng.normal(0, 1, 20).round(1)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside]
    assert auroc(inside.tolist(), outside.tolist()) == pytest.approx(np.mean(pairs))
    assert auroc([2, 3], [1]) == 1 and auroc([1], [2, 3]) == 0 and auroc([1, 1], [1]) == 0.5


def outcome(scores, right, outside=(0.0, 2.0), threshold=1.0, clean=None):
    return RejectionOutcome.of(ATTACK, threshold, (scores, right), outside, scores if clean is None else clean)


def test_risk_and_coverage_are_those_of_images_taken_from_the_largest_score_down():
    found = outcome([4.0, 3.0, 2.0, 0.5], [True, False, True, False])
    assert found.curve == ((0.25, 0.0), (0.5, 0.5), (0.75, pytest.approx(1 / 3)), (1.0, 0.5))
    assert found.aurc == pytest.approx((0 + 0.5 + 1 / 3 + 0.5) / 4)
    assert (found.right, found.wrong, found.rejected) == (Accuracy(2, 4), Accuracy(1, 4), Accuracy(1, 4))
    assert found.accepted == Accuracy(1, 2) and found.risk == pytest.approx(1 / 3)


def test_images_of_one_score_count_alike_in_whatever_order_they_come():
    one, other = outcome([1.0] * 4, [True, True, False, False]), outcome([1.0] * 4, [False, False, True, True])
    assert one == other and one.curve == tuple((i / 4, 0.5) for i in range(1, 5))
    assert outcome([0.0] * 4, [True] * 4).risk is None


def test_the_threshold_itself_is_accepted():
    assert outcome([1.0, 0.999], [True, True], [1.0]).rejected == Accuracy(1, 2)


def test_rejection_reads_what_it_wrote_and_refuses_what_cannot_be_true():
    found = Rejection(
        1.0, (replace(outcome([2.0, 0.0], [True, False]), attack=None), outcome([2.0, 0.0], [True, False]))
    )
    content = json.loads(json.dumps(found.to_dict()))
    assert Rejection.from_dict(content) == found
    assert found.table().splitlines()[-1].startswith("| L-inf 4/255 | pgd-2 | 50.0 (")
    for change in ({"auroc": 1.5}, {"aurc": -0.1}, {"curve": [[0.5, 2.0]]}, {"right": Accuracy(2, 2).to_dict()}):
        changed = {**content, "outcomes": [{**content["outcomes"][1], **change}]}
        with pytest.raises(FigureError):
            Rejection.from_dict(changed)
