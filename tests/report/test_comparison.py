"""Paired differences: against hand-made cases, and the bootstrap against a plain one."""

import numpy as np
import pytest

from capt_peft.report.comparison import Difference, Interval, compare, difference, sentence
from capt_peft.report.statistics import Runs, harmonic_mean


def runs(label, scores, once=False):
    named = {place: {"clean": c, "robust": r, "H": harmonic_mean(c, r)} for place, (c, r) in scores.items()}
    return Runs(label, label.startswith("capt"), once, named)


def clean_runs(label, clean):
    return runs(label, {place: (c, 50) for place, c in clean.items()})


def test_a_constant_difference_has_an_interval_of_no_width():
    places = [(t, s) for t in "abc" for s in (0, 1)]
    found = difference(clean_runs("capt", dict.fromkeys(places, 62)), clean_runs("tecoa", dict.fromkeys(places, 60)))
    assert found.measures["clean"] == Interval(2, 2, 2)
    assert found.measures["robust"] == Interval(0, 0, 0)
    assert found.pairs == "3 tasks x 2 seeds"


def test_the_interval_of_one_task_is_that_of_its_resampled_seeds():
    # of 2 seeds with differences 0 and 1 a draw's mean is 0 or 1 in a quarter of the draws each, so that both ends are reached
    found = difference(
        clean_runs("capt", {("a", 0): 60, ("a", 1): 61}), clean_runs("tecoa", {("a", 0): 60, ("a", 1): 60})
    )
    assert found.measures["clean"] == Interval(0.5, 0, 1)


def test_the_bootstrap_resamples_tasks_and_then_seeds_within_them():
    generator = np.random.default_rng(1)
    tasks = {f"t{i}": generator.normal(i, 2, size=3).tolist() for i in range(6)}
    ours = clean_runs("capt", {(t, s): 50 + v for t, values in tasks.items() for s, v in enumerate(values)})
    base = clean_runs("tecoa", dict.fromkeys(ours.scores, 50))
    means = []
    for _ in range(4000):
        drawn = generator.choice(list(tasks), size=len(tasks))
        means.append(np.mean([np.mean(generator.choice(tasks[t], size=3)) for t in drawn]))
    found = difference(ours, base).measures["clean"]
    assert found.value == pytest.approx(np.mean(list(tasks.values())))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.15)
    # resampling all 18 runs as if they were independent would give a much narrower one
    every = np.concatenate(list(tasks.values()))
    flat = np.percentile([np.mean(generator.choice(every, size=18)) for _ in range(2000)], [2.5, 97.5])
    assert found.high - found.low > 1.3 * (flat[1] - flat[0])


def test_the_interval_is_the_same_every_time():
    ours = clean_runs("capt", {(t, s): 60 + i for i, (t, s) in enumerate((t, s) for t in "abc" for s in (0, 1))})
    base = clean_runs("tecoa", dict.fromkeys(ours.scores, 60))
    assert difference(ours, base) == difference(ours, base)
    assert difference(ours, base).measures != difference(ours, base, seed=1).measures


def test_only_common_runs_are_paired_and_every_task_counts_the_same():
    ours = clean_runs("capt", {("a", 0): 70, ("a", 1): 70, ("b", 0): 61, ("c", 0): 99})
    base = clean_runs("tecoa", {("a", 0): 60, ("a", 1): 60, ("b", 0): 60, ("b", 1): 0})
    found = difference(ours, base)
    assert found.measures["clean"].value == pytest.approx(5.5)  # of 10 and 1
    assert found.pairs == "3 pairs of runs on 2 tasks"
    assert (found.measures["clean"].low, found.measures["clean"].high) == (1, 10)


def test_one_pair_has_no_interval_and_no_pair_no_difference():
    found = difference(clean_runs("capt", {("a", 0): 62}), clean_runs("tecoa", {("a", 0): 60}))
    assert found.measures["clean"] == Interval(2, None, None)
    assert sentence(found).endswith("(1 task x 1 seed: too few for an interval).")
    assert difference(clean_runs("capt", {("a", 0): 62}), clean_runs("tecoa", {("a", 1): 60})) is None


def test_the_best_baseline_has_the_highest_mean_h_and_is_no_variant_of_capt():
    places = [("a", 0), ("b", 0)]
    rows = [
        runs("clean-only", dict.fromkeys(places, (99, 1)), once=True),
        runs("tecoa", dict.fromkeys(places, (60, 30))),
        runs("adv-vlp", dict.fromkeys(places, (60, 32))),
        runs("capt", dict.fromkeys(places, (60, 35))),
        runs("capt (slow)", dict.fromkeys(places, (90, 80))),
    ]
    found = compare(rows)
    assert found.best.second == "adv-vlp"
    assert [d.second for d in found.differences] == ["clean-only", "tecoa", "adv-vlp"]


def test_without_capt_or_without_a_baseline_there_is_no_comparison():
    capt, slow, tecoa = (clean_runs(label, {("a", 0): 60}) for label in ("capt", "capt (slow)", "tecoa"))
    assert compare([tecoa]) is None
    assert compare([capt, slow]) is None
    assert compare([clean_runs("capt", {}), tecoa]) is None


def test_rows_without_common_runs_are_still_compared_one_by_one():
    rows = [
        clean_runs("tecoa", {("a", 0): 60}),
        clean_runs("apt", {("b", 0): 60}),
        clean_runs("capt", {("a", 0): 62, ("b", 0): 62}),
    ]
    found = compare(rows)
    assert found.best is None
    assert [d.second for d in found.differences] == ["tecoa", "apt"]


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (
            Interval(1.8, 0.6, 3.1),
            "capt is 1.8 points above adv-vlp, the best baseline (95% interval 0.6 to 3.1, 11 tasks x 3 seeds).",
        ),
        (
            Interval(1.8, -0.6, 3.1),
            "capt is 1.8 points above adv-vlp, the best baseline (95% interval -0.6 to 3.1, 11 tasks x 3 seeds); "
            "the interval contains 0: the runs do not show a difference.",
        ),
        (
            Interval(-1.8, -3.1, -0.6),
            "capt is 1.8 points below adv-vlp, the best baseline "
            "(95% interval of the difference -3.1 to -0.6, 11 tasks x 3 seeds).",
        ),
        (
            Interval(0.01, -1, 1),
            "capt is level with adv-vlp, the best baseline (95% interval of the difference -1.0 to 1.0, 11 tasks x 3 seeds); "
            "the interval contains 0: the runs do not show a difference.",
        ),
    ],
)
def test_the_sentence_says_what_the_runs_show_and_no_more(interval, text):
    assert sentence(Difference("capt", "adv-vlp", {"H": interval}, "11 tasks x 3 seeds")) == text
