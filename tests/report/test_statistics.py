"""Averages and their spread, and paired differences: by hand-made examples, and the bootstrap against a plain one."""

import numpy as np
import pandas as pd
import pytest
from report.benchmark_lines import base_to_new, line, transfer, write

from capt_peft.report import read_sections
from capt_peft.report.statistics import Difference, Interval, Rows, compare, harmonic_mean, rows_of
from capt_peft.report.statistics import difference as paired_difference


def rows(once=(), **scores):
    """Rows of {(task, seed): (clean, robust)}, by their labels."""
    every = {(label, *place): pair for label, of in scores.items() for place, pair in of.items()}
    index = pd.MultiIndex.from_tuples(every, names=["label", "task", "seed"])
    frame = pd.DataFrame(list(every.values()), index, ["clean", "robust"], dtype=float)
    frame["H"] = harmonic_mean(frame.clean, frame.robust)
    return Rows(list(scores), once, [label for label in scores if label.startswith("capt")], frame)


def difference(ours, base):
    """The difference of two rows of clean accuracies by task and seed."""
    found = rows(
        capt={place: (c, 50) for place, c in ours.items()}, tecoa={place: (c, 50) for place, c in base.items()}
    )
    return paired_difference(found.scores.loc["capt"], found.scores.loc["tecoa"], "tecoa")


def read(tmp_path, *lines, attack="pgd-20"):
    (section,) = read_sections(write(tmp_path / "lines.jsonl", lines), attack)
    return rows_of(section)


def test_the_harmonic_mean_is_zero_where_one_number_is():
    assert list(harmonic_mean(pd.Series([60.0, 60, 0]), pd.Series([30.0, 0, 0]))) == [pytest.approx(40), 0, 0]


def test_scores_are_percent_and_their_harmonic_mean(tmp_path):
    scores = read(tmp_path, line(clean=60, robust=30)).scores
    assert scores.loc["capt", "shapes", 0].to_dict() == {"clean": 60, "robust": 30, "H": pytest.approx(40)}
    lines = line(clean=60, robust=30), line("tecoa", attack="autoattack")
    assert list(read(tmp_path, *lines, attack="autoattack").scores.index) == [("tecoa", "shapes", 0)]


def test_base_to_new_has_each_half_and_harmonic_means_of_both(tmp_path):
    scores = read(tmp_path, base_to_new("capt", "shapes", 0, (60, 40), (30, 20))).scores.loc["capt", "shapes", 0]
    assert [scores[name] for name in ("base clean", "base robust", "new clean", "new robust")] == [60, 40, 30, 20]
    assert scores["clean"] == pytest.approx(40)
    assert scores["robust"] == pytest.approx(80 / 3)
    assert scores["H"] == pytest.approx(4 / (1 / 60 + 1 / 40 + 1 / 30 + 1 / 20))


def test_half_a_base_to_new_cell_has_no_scores(tmp_path):
    whole = base_to_new("capt", "shapes", 0, (60, 40), (30, 20))
    whole["results"].pop()
    assert read(tmp_path, whole).scores.empty


def test_a_transfer_cell_has_scores_on_every_task(tmp_path):
    found = read(tmp_path, transfer("capt", 0, {"imagenet": (60, 30), "pets": (70, 20)}))
    assert found.scores.clean.to_dict() == {("capt", "imagenet", 0): 60, ("capt", "pets", 0): 70}


def test_tasks_are_averaged_first_and_the_spread_is_over_seeds():
    mean, spread = rows(capt={("a", 0): (50, 1), ("b", 0): (70, 1), ("a", 1): (60, 1), ("b", 1): (68, 1)}).averages
    assert mean.clean["capt"] == pytest.approx(62)  # of 60 and 64
    assert spread.clean["capt"] == pytest.approx(8**0.5)


def test_one_seed_has_no_spread():
    assert rows(capt={("a", 0): (50, 1), ("b", 0): (70, 1)}).averages[1].isna().all(axis=None)


def test_zero_shot_stands_for_every_seed_and_shows_no_spread(tmp_path):
    found = read(tmp_path, line("capt", seed=1), line("capt", seed=2), line("zero-shot", clean=60, robust=5))
    assert [place[:2] for place in found.scores.index] == [("zero-shot", "shapes")] * 2 + [("capt", "shapes")] * 2
    assert list(found.scores.index.get_level_values("seed")) == [1, 2, 1, 2]
    mean, spread = found.averages
    assert mean.clean["zero-shot"] == 60
    assert list(spread.clean.isna()) == [True, False]


def test_rows_are_zero_shot_then_baselines_then_capt_then_its_variants(tmp_path):
    lines = [
        line(variant="slow"),
        line(),
        line("tecoa"),
        line("zero-shot"),
        line("apt", variant="long"),
        line("adv-vlp", error="nan"),
    ]
    found = read(tmp_path, *lines)
    assert found.labels == ["zero-shot", "tecoa", "apt (long)", "adv-vlp", "capt", "capt (slow)"]
    assert (found.once, found.ours) == ({"zero-shot"}, {"capt", "capt (slow)"})
    assert found.averages[0].clean.isna()["adv-vlp"]  # failed, but it keeps its row


def full(tasks, seeds):
    return {(task, seed): (50, 10) for task in tasks for seed in seeds}


def without(places, *left_out):
    return {place: pair for place, pair in places.items() if place not in left_out}


def test_averages_are_over_the_tasks_and_seeds_that_all_rows_have():
    found = rows(capt=full("abcd", (0, 1, 2)), tecoa=without(full("abcd", (0, 1, 2)), ("b", 1))).common
    assert (found.tasks, found.seeds) == (("a", "c", "d"), (0, 1, 2))  # 9 runs; without seed 1 it would be 8


@pytest.mark.parametrize("hole", [0, 1])
def test_of_equal_sets_the_one_of_more_tasks_counts(hole):
    found = rows(capt=full("ab", (0, 1)), tecoa=without(full("ab", (0, 1)), ("b", hole))).common
    assert (found.tasks, found.seeds) == (("a", "b"), (1 - hole,))
    assert set(found.left_out) == {("a", hole), ("b", hole)}


def test_a_row_without_scores_takes_nothing_from_the_others():
    assert rows(capt=full("a", (0, 1)), tecoa={}).common == (("a",), (0, 1), ())


def test_rows_without_common_runs_have_no_average():
    found = rows(capt=full("a", (0,)), tecoa=full("b", (0,)))
    assert found.common.tasks == ()
    assert found.averages[0].isna().all(axis=None)


def test_a_constant_difference_has_an_interval_of_no_width():
    places = [(t, s) for t in "abc" for s in (0, 1)]
    found = difference(dict.fromkeys(places, 62), dict.fromkeys(places, 60))
    assert found.measures["clean"] == Interval(2, (2, 2))
    assert found.measures["robust"] == Interval(0, (0, 0))
    assert found.pairs == "3 tasks x 2 seeds"


def test_the_interval_of_one_task_is_that_of_its_resampled_seeds():
    # of 2 seeds with differences 0 and 1 a draw's mean is 0 or 1 in a quarter of the draws each, so that both ends are reached
    found = difference({("a", 0): 60, ("a", 1): 61}, {("a", 0): 60, ("a", 1): 60})
    assert found.measures["clean"] == Interval(0.5, (0, 1))


def test_the_bootstrap_resamples_tasks_and_then_seeds_within_them():
    generator = np.random.default_rng(1)
    tasks = {f"t{i}": generator.normal(i, 2, size=3).tolist() for i in range(6)}
    ours = {(t, s): 50 + v for t, values in tasks.items() for s, v in enumerate(values)}
    base = dict.fromkeys(ours, 50)
    means = []
    for _ in range(4000):
        drawn = generator.choice(list(tasks), size=len(tasks))
        means.append(np.mean([np.mean(generator.choice(tasks[t], size=3)) for t in drawn]))
    found = difference(ours, base).measures["clean"]
    assert found.value == pytest.approx(np.mean(list(tasks.values())))
    assert found.ends == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.15)
    # resampling all 18 runs as if they were independent would give a much narrower one
    every = np.concatenate(list(tasks.values()))
    flat = np.percentile([np.mean(generator.choice(every, size=18)) for _ in range(2000)], [2.5, 97.5])
    assert np.ptp(found.ends) > 1.3 * (flat[1] - flat[0])


def test_the_interval_is_the_same_every_time():
    ours = {(t, s): 60 + i for i, (t, s) in enumerate((t, s) for t in "abc" for s in (0, 1))}
    base = dict.fromkeys(ours, 60)
    assert difference(ours, base) == difference(ours, base)


def test_only_common_runs_are_paired_and_every_task_counts_the_same():
    ours = {("a", 0): 70, ("a", 1): 70, ("b", 0): 61, ("c", 0): 99}
    base = {("a", 0): 60, ("a", 1): 60, ("b", 0): 60, ("b", 1): 0}
    found = difference(ours, base)
    assert found.measures["clean"].value == pytest.approx(5.5)  # of 10 and 1
    assert found.pairs == "3 pairs of runs on 2 tasks"
    assert found.measures["clean"].ends == (1, 10)


def test_one_pair_has_no_interval_and_no_pair_no_difference():
    found = difference({("a", 0): 62}, {("a", 0): 60})
    assert found.measures["clean"] == Interval(2, None)
    assert found.sentence().endswith("(1 task x 1 seed: too few for an interval).")
    assert difference({("a", 0): 62}, {("a", 1): 60}) is None


def test_the_best_baseline_has_the_highest_mean_h_and_is_no_variant_of_capt():
    pairs = {"clean-only": (99, 1), "tecoa": (60, 30), "adv-vlp": (60, 32), "capt": (60, 35), "capt (slow)": (90, 80)}
    scores = {label: dict.fromkeys([("a", 0), ("b", 0)], pair) for label, pair in pairs.items()}
    found, best = compare(rows(once=["clean-only"], **scores))
    assert best.baseline == "adv-vlp"
    assert [of.baseline for of in found] == ["clean-only", "tecoa", "adv-vlp"]


def test_without_capt_or_without_a_baseline_there_is_no_comparison():
    of = full("a", (0,))
    for scores in ({"tecoa": of}, {"capt": of, "capt (slow)": of}, {"capt": {}, "tecoa": of}):
        assert compare(rows(**scores)) == ([], None)


def test_rows_without_common_runs_are_still_compared_one_by_one():
    found, best = compare(rows(tecoa=full("a", (0,)), apt=full("b", (0,)), capt=full("ab", (0,))))
    assert best is None
    assert [of.baseline for of in found] == ["tecoa", "apt"]


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (
            Interval(1.8, (0.6, 3.1)),
            "capt is 1.8 points above adv-vlp, the best baseline (95% interval 0.6 to 3.1, 11 tasks x 3 seeds).",
        ),
        (
            Interval(1.8, (-0.6, 3.1)),
            "capt is 1.8 points above adv-vlp, the best baseline (95% interval -0.6 to 3.1, 11 tasks x 3 seeds); "
            "the interval contains 0: the runs do not show a difference.",
        ),
        (
            Interval(-1.8, (-3.1, -0.6)),
            "capt is 1.8 points below adv-vlp, the best baseline "
            "(95% interval of the difference -3.1 to -0.6, 11 tasks x 3 seeds).",
        ),
        (
            Interval(0.01, (-1, 1)),
            "capt is level with adv-vlp, the best baseline (95% interval of the difference -1.0 to 1.0, 11 tasks x 3 seeds); "
            "the interval contains 0: the runs do not show a difference.",
        ),
    ],
)
def test_the_sentence_says_what_the_runs_show_and_no_more(interval, text):
    assert Difference("adv-vlp", {"H": interval}, "11 tasks x 3 seeds").sentence() == text
