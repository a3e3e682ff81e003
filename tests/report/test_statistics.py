"""Averages and their spread, by hand-made examples."""

import pytest
from report.benchmark_lines import base_to_new, line, transfer, write

from capt_peft.report.lines import read_lines
from capt_peft.report.statistics import Common, Runs, cell_scores, collect, common_runs, harmonic_mean, summarise


def runs(label, scores, once=False):
    """Rows from {(task, seed): (clean, robust)}."""
    named = {place: {"clean": c, "robust": r, "H": harmonic_mean(c, r)} for place, (c, r) in scores.items()}
    return Runs(label, label.startswith("capt"), once, named)


def read(tmp_path, *lines):
    return read_lines(write(tmp_path / "lines.jsonl", lines))


def test_the_harmonic_mean_is_zero_where_one_number_is():
    assert harmonic_mean(60, 30) == pytest.approx(40)
    assert harmonic_mean(60, 0) == 0
    assert harmonic_mean(0, 0) == 0


def test_scores_are_percent_and_their_harmonic_mean(tmp_path):
    (cell,) = read(tmp_path, line(clean=60, robust=30))
    assert cell_scores(cell, "pgd-20") == {"shapes": {"clean": 60, "robust": 30, "H": pytest.approx(40)}}
    assert cell_scores(cell, "autoattack") == {}


def test_base_to_new_has_each_half_and_harmonic_means_of_both(tmp_path):
    (cell,) = read(tmp_path, base_to_new("capt", "shapes", 0, (60, 40), (30, 20)))
    scores = cell_scores(cell, "pgd-20")["shapes"]
    assert (scores["base clean"], scores["base robust"], scores["new clean"], scores["new robust"]) == (60, 40, 30, 20)
    assert scores["clean"] == pytest.approx(40)
    assert scores["robust"] == pytest.approx(80 / 3)
    assert scores["H"] == pytest.approx(harmonic_mean(60, 40, 30, 20))


def test_half_a_base_to_new_cell_has_no_scores(tmp_path):
    whole = base_to_new("capt", "shapes", 0, (60, 40), (30, 20))
    whole["results"].pop()
    (cell,) = read(tmp_path, whole)
    assert cell_scores(cell, "pgd-20") == {}


def test_a_transfer_cell_has_scores_on_every_task(tmp_path):
    (cell,) = read(tmp_path, transfer("capt", 0, {"imagenet": (60, 30), "pets": (70, 20)}))
    assert {task: s["clean"] for task, s in cell_scores(cell, "pgd-20").items()} == {"imagenet": 60, "pets": 70}


def test_tasks_are_averaged_first_and_the_spread_is_over_seeds():
    row = runs("capt", {("a", 0): (50, 1), ("b", 0): (70, 1), ("a", 1): (60, 1), ("b", 1): (68, 1)})
    found = summarise(row, "clean", common_runs([row]))
    assert found.mean == pytest.approx(62)  # of 60 and 64
    assert found.std == pytest.approx(8**0.5)


def test_one_seed_has_no_spread():
    row = runs("capt", {("a", 0): (50, 1), ("b", 0): (70, 1)})
    assert summarise(row, "clean", common_runs([row])).std is None


def test_zero_shot_stands_for_every_seed_and_shows_no_spread(tmp_path):
    cells = read(tmp_path, line("capt", seed=1), line("capt", seed=2), line("zero-shot", clean=60, robust=5))
    zero_shot, capt = collect(cells, "pgd-20")
    assert set(zero_shot.scores) == set(capt.scores) == {("shapes", 1), ("shapes", 2)}
    found = summarise(zero_shot, "clean", common_runs([zero_shot, capt]))
    assert (found.mean, found.std) == (60, None)


def test_rows_are_zero_shot_then_baselines_then_capt_then_its_variants(tmp_path):
    lines = [
        line(variant="slow"),
        line(),
        line("tecoa"),
        line("zero-shot"),
        line("apt", variant="long"),
        line("adv-vlp", error="nan"),
    ]
    rows = collect(read(tmp_path, *lines), "pgd-20")
    assert [row.label for row in rows] == ["zero-shot", "tecoa", "apt (long)", "adv-vlp", "capt", "capt (slow)"]
    assert [row.ours for row in rows] == [False] * 4 + [True] * 2
    assert rows[3].scores == {}  # failed, but it keeps its row


def test_averages_are_over_the_tasks_and_seeds_that_all_rows_have():
    full = runs("capt", {(t, s): (50, 10) for t in "abcd" for s in (0, 1, 2)})
    holed = runs("tecoa", {place: (50, 10) for place in full.scores if place != ("b", 1)})
    common = common_runs([full, holed])
    assert (common.tasks, common.seeds) == (("a", "c", "d"), (0, 1, 2))  # 9 runs; without seed 1 it would be 8


@pytest.mark.parametrize("hole", [0, 1])
def test_of_equal_sets_the_one_of_more_tasks_counts(hole):
    full = runs("capt", {(t, s): (50, 10) for t in "ab" for s in (0, 1)})
    holed = runs("tecoa", {place: (50, 10) for place in full.scores if place != ("b", hole)})
    common = common_runs([full, holed])
    assert (common.tasks, common.seeds) == (("a", "b"), (1 - hole,))
    assert set(common.left_out) == {("a", hole), ("b", hole)}


def test_a_row_without_scores_takes_nothing_from_the_others():
    full = runs("capt", {("a", 0): (50, 10), ("a", 1): (50, 10)})
    assert common_runs([full, runs("tecoa", {})]) == Common(("a",), (0, 1), ())


def test_rows_without_common_runs_have_no_average():
    rows = [runs("capt", {("a", 0): (50, 10)}), runs("tecoa", {("b", 0): (50, 10)})]
    common = common_runs(rows)
    assert common.tasks == ()
    assert summarise(rows[0], "clean", common) is None
