"""Published tables with our figures beside them: averages over whole seeds, differences, and what stays empty."""

import re
from statistics import mean, stdev

import pytest
from report.benchmark_lines import figures, line, write

from capt_peft.attacks import ThreatModel, get_protocol, known_protocols
from capt_peft.benchmark import get_suite
from capt_peft.benchmark.plan import PROTOCOLS
from capt_peft.methods import METHODS
from capt_peft.report.published import known_tables, write_published

TASKS = get_suite("paper").tasks
TABLES = known_tables()


def measured(method, experiment, results, seed=0, protocol="fap", attacks=("pgd-100",), **changes):
    """A line of a cell of the paper suite; `results` are task, classes, clean and robust accuracy in percent, of 1,000 images."""
    rows = []
    for task, classes, clean, robust in results:
        row = {"task": task, "classes": classes, **figures(clean, robust, 1000, attacks[0])}
        row["attacks"] = {attack: dict(row["attacks"][attacks[0]]) for attack in attacks}
        row["worst_case"] = row["attacks"][attacks[-1]]
        rows.append(row | ({"by_protocol": row["worst_case"]} if protocol else {}))
    cell = {
        "suite": "paper",
        "protocol": experiment,
        "model": "clip",
        "epsilon": "1/255",
        "limit": None,
        "attacks": list(attacks),
    }
    cell |= {"evaluation_protocol": protocol} if protocol else {}
    return line(method, rows[0]["task"], seed, results=rows, **cell, **changes)


def entries(folder, title):
    """The rows of a table of published.md: by the name of the row and the column, published, here and difference."""
    (text,) = [part for part in (folder / "published.md").read_text().split("### ")[1:] if part.startswith(title)]
    rows = [[part.strip() for part in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("| ")][1:]
    return {(name, column): rest for name, column, *rest in rows}, text


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_published_table_has_a_source_and_a_figure_or_a_gap_for_each_column(table):
    assert re.search(r"20\d\d", table.source) and table.title and table.not_comparable
    assert table.experiment in PROTOCOLS and table.protocol in (None, *known_protocols())
    assert bool(table.attacks) == (table.protocol is None)
    for column in table.columns.values():
        assert column.keys() <= {"shots", "classes", "tasks", "epsilon"} and ThreatModel("linf", column["epsilon"])
        assert column.get("tasks", TASKS[0]) in TASKS and column.get("classes", "base") in ("base", "new")
        if table.protocol:
            assert column["epsilon"] in get_protocol(table.protocol).epsilon
    for name, row in table.rows.items():
        assert row[0] in (*METHODS, "-") and row[0] != "capt" and len(row) == 1 + len(table.columns)
        for place in range(len(table.columns)):
            clean, robust = table.figure(name, place)
            assert all(value is None or 0 <= value <= 100 for value in (clean, robust))
            assert clean is None or clean > robust


def test_no_figure_is_given_for_capt():
    assert not any(re.search(r"\bCAPT\b", name) for table in TABLES for name in table.rows)


def test_seeds_are_averaged_over_all_data_sets_and_one_that_lacks_some_does_not_count(tmp_path):
    lines = []
    for seed, shift in ((0, 0), (1, 3), (2, 50)):
        for place, task in enumerate(TASKS[: 10 if seed == 2 else 11]):
            lines.append(measured("fap", "few-shot", [(task, "all", 40 + place + shift, 10 + shift)], seed))
    write_published(write(tmp_path / "lines.jsonl", lines), tmp_path / "out")
    rows, text = entries(tmp_path / "out", "Few-shot, averaged")
    clean, robust = (45, 48), (10, 13)
    here = f"{mean(clean):.1f} ± {stdev(clean):.1f} / {mean(robust):.1f} ± {stdev(robust):.1f}"
    assert rows["FAP", "16 shots"] == ["65.32 / 34.61", here, f"{46.5 - 65.32:+.1f} / {11.5 - 34.61:+.1f}"]
    assert rows["FAP", "8 shots"] == ["62.17 / 29.51", "-", "-"] and rows["AdvVP", "16 shots"][1:] == ["-", "-"]
    assert "Robust: under PGD-100, step size 1/255." in text and "pgd-100, step size 1/255), L-inf 1/255" in text
    of_one, _ = entries(tmp_path / "out", "Few-shot, data sets")
    assert of_one["FAP", "imagenet"][0] == "52.53 / 22.90" and of_one["FAP", "imagenet"][1].startswith("57.7 ± ")
    assert "% needs" in (tmp_path / "out" / "published.tex").read_text()


def test_halves_of_the_classes_have_a_column_each_and_methods_without_a_published_row_stand_last(tmp_path):
    lines = [
        measured(method, "base-to-new", [(task, "base", 70, 30), (task, "new", 50, 20)], shots=0 if method == "zero-shot" else 16)
        for method in ("zero-shot", "fap", "capt") for task in TASKS
    ]  # fmt: skip
    write_published(write(tmp_path / "lines.jsonl", lines), tmp_path / "out")
    rows, _ = entries(tmp_path / "out", "Base to new")
    assert rows["FAP", "base classes"] == ["70.52 / 38.05", "70.0 / 30.0", f"-0.5 / {30 - 38.05:+.1f}"]
    assert rows["CLIP", "new classes"] == [
        "71.50 / 3.80",
        "50.0 / 20.0",
        "-21.5 / +16.2",
    ]
    assert rows["capt", "new classes"] == ["-", "50.0 / 20.0", "-"] and list(rows)[len(rows) // 2 - 1][0] == "capt"
    assert rows["CoAPT †", "new classes"] == ["65.35 / 54.13", "-", "-"]


def test_apgd_is_compared_with_the_worst_of_both_and_with_nothing_else(tmp_path):
    results = [(task, "all", 60, 15) for task in TASKS]
    lines = [measured("fap", "cross-dataset", results, protocol=None, attacks=("apgd-ce", "apgd-dlr"))]
    write_published(write(tmp_path / "lines.jsonl", lines), tmp_path / "out")
    rows, text = entries(tmp_path / "out", "Cross-dataset under APGD")
    assert rows["FAP", "1/255"] == ["- / 17.41", "60.0 / 15.0", "- / -2.4"] and rows["FAP", "2/255"] == [
        "- / 14.45",
        "-",
        "-",
    ]
    assert "worst of apgd-ce, apgd-dlr" in text and "two of AutoAttack's four attacks" in text
    lines = [measured("fap", "cross-dataset", results, protocol=None, attacks=("apgd-ce",))]
    write_published(write(tmp_path / "other.jsonl", lines), tmp_path / "other")
    assert "###" not in (tmp_path / "other" / "published.md").read_text()


def test_what_is_said_of_all_figures_stands_above(tmp_path):
    lines = [measured("fap", "few-shot", [("dtd", "all", 50, 20)])]
    write_published(write(tmp_path / "lines.jsonl", lines), tmp_path / "out", ["Settings in place: max_steps=2."])
    start = (tmp_path / "out" / "published.md").read_text().split("###")[0]
    assert "Settings in place: max_steps=2." in start and "gives no figure that could be read" in start
