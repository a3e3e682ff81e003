"""Accuracies and their intervals."""

import pytest

from capt_peft.results.accuracy import Accuracy, wilson_interval


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # published values of the Wilson interval (Newcombe 1998, Table I, method 3)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_is_symmetric_and_stays_in_the_unit_range():
    low, high = wilson_interval(7, 20)
    assert wilson_interval(13, 20) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(5, 5)[1] == 1.0
    for correct, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="not a share"):
            wilson_interval(correct, n)


@pytest.mark.parametrize(("correct", "n"), [(7, 5), (-1, 5), (0, 0)])
def test_what_is_no_share_is_no_accuracy(correct, n):
    with pytest.raises(ValueError, match="not a share"):
        Accuracy(correct, n)


@pytest.mark.parametrize(
    "change",
    [{"n": 100_000}, {"correct": 8}, {"accuracy": 0.7}, {"interval_95": [0, 1]}, {"n": True}, {"correct": 7.0}],
)
def test_numbers_that_are_not_of_one_share_are_refused(change):
    row = Accuracy(7, 20).to_dict()
    assert (
        Accuracy.from_dict(row)
        == Accuracy.from_dict({k: v for k, v in row.items() if k != "correct"})
        == Accuracy(7, 20)
    )
    with pytest.raises(ValueError, match="says "):
        Accuracy.from_dict(row | change)


def test_an_accuracy_reads_as_people_write_it():
    assert str(Accuracy(81, 263)) == "30.8% (25.5 to 36.6, n=263)"
