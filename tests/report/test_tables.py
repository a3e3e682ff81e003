"""The tables: their figures, what is bold, what is said under them, and LaTeX that compiles."""

import re

import pandas as pd
import pytest
from report.benchmark_lines import base_to_new, figures, line, suite, transfer, write

from capt_peft.report import read_sections, section_tables, to_latex, to_markdown
from capt_peft.report.tables import QUICK_NOTE, Table, escape_latex, numbers


def tables(tmp_path, lines, attack=None):
    (section,) = read_sections(write(tmp_path / "lines.jsonl", lines), attack)
    return section_tables(section)


def cells(table):
    return {label: [entry.replace("**", "") for entry in row] for label, *row in table.entries.itertuples(name=None)}


def bold(table):
    return {(label, i) for label, *row in table.entries.itertuples(name=None) for i, e in enumerate(row) if "**" in e}


def names(table):
    return [name for _, name in table.entries]


def groups(table):
    return list(dict.fromkeys(group for group, _ in table.entries))


def notes(table):
    return " ".join(table.notes)


def test_few_shot_is_averaged_over_tasks_for_each_number_of_shots(tmp_path):
    lines = [
        line("zero-shot", "a", clean=60, robust=0),
        line("zero-shot", "b", clean=60, robust=0),
        *[
            line("capt", t, s, c, r, shots=4)
            for t, s, c, r in (("a", 0, 60, 30), ("b", 0, 60, 30), ("a", 1, 60, 30), ("b", 1, 80, 30))
        ],
        *[line("capt", t, s, 90, 45, shots="all") for t in "ab" for s in (0, 1)],
    ]
    table = tables(tmp_path, lines)[0]
    assert list(table.entries) == [(k, m) for k in ("4 shots", "all shots") for m in ("clean", "robust", "H")]
    zero_shot, capt = cells(table)["zero-shot"], cells(table)["capt"]
    assert zero_shot == ["60.0", "0.0", "0.0"] * 2  # the reference for every number of shots
    assert capt == ["65.0 ± 7.1", "30.0 ± 0.0", "40.9 ± 1.3", "90.0 ± 0.0", "45.0 ± 0.0", "60.0 ± 0.0"]
    for part in ("under pgd-20", "L-inf 10/255", "n = 200", "test split", "tiny-clip"):
        assert part in notes(table)


def test_the_best_of_a_column_is_bold_with_all_that_look_the_same():
    mean = pd.DataFrame({"clean": [70.04, 69.96, 69.9, float("nan")]})
    spread = pd.DataFrame({"clean": [0.25, float("nan"), float("nan"), float("nan")]})
    assert list(numbers(mean, spread).clean) == ["**70.0 ± 0.2**", "**70.0**", "69.9", "-"]
    assert list(numbers(mean[:1], spread[:1]).clean) == ["70.0 ± 0.2"]  # there is nothing to compare it with


def test_clean_and_robust_of_one_entry_are_bold_each_for_itself(tmp_path):
    table = tables(tmp_path, [line("capt", clean=70, robust=10), line("tecoa", clean=60, robust=20)])[-1]
    assert list(table.entries["", "shapes"]) == ["60.0 / **20.0**", "**70.0** / 10.0"]


def test_every_task_has_a_column_and_incomplete_seeds_are_said(tmp_path):
    lines = [line("capt", t, s, 80, 40) for t in "ab" for s in (0, 1)]
    lines += [line("tecoa", t, s, 70, 30) for t, s in (("a", 0), ("b", 0), ("b", 1))]
    table = tables(tmp_path, lines)[-1]
    assert names(table) == ["a", "b"]
    assert cells(table) == {
        "tecoa": ["70.0 / 30.0", "70.0 ± 0.0 / 30.0 ± 0.0"],
        "capt": ["80.0 / 40.0", "80.0 ± 0.0 / 40.0 ± 0.0"],
    }
    assert "not all on a (1 of 2)" in notes(table)


def test_base_to_new_has_both_halves_and_their_harmonic_means_averaged_and_for_every_task(tmp_path):
    lines = [
        base_to_new("capt", t, 0, *pairs) for t, pairs in (("a", ((60, 40), (30, 20))), ("b", ((80, 40), (80, 20))))
    ]
    lines += [base_to_new("tecoa", t, 0, (50, 20), (50, 20)) for t in "ab"]
    average, compared, first, second = tables(tmp_path, lines)
    assert groups(average) == ["base classes", "new classes", "both"]
    assert cells(average)["capt"] == ["70.0", "40.0", "55.0", "20.0", "60.0", "26.7"]
    assert cells(first)["capt"] == ["60.0", "40.0", "30.0", "20.0", "40.0", "26.7"]
    assert "16 shots, b" in second.title
    assert cells(compared)["tecoa"][1].startswith("+10.0")  # 40 and 80, less 50 and 50


@pytest.mark.parametrize("protocol", ["cross-dataset", "shift"])
def test_transfer_has_the_source_each_target_and_the_average_over_targets(tmp_path, protocol):
    lines = [
        transfer("capt", 0, {"imagenet": (90, 60), "pets": (70, 20), "cars": (50, 40)}, protocol),
        transfer("tecoa", 0, {"imagenet": (10, 10), "pets": (60, 20), "cars": (50, 40)}, protocol),
    ]
    table, compared = tables(tmp_path, lines)
    assert names(table) == ["imagenet (source)", "pets", "cars", "average of targets"]
    assert cells(table)["capt"] == ["90.0 / 60.0", "70.0 / 20.0", "50.0 / 40.0", "60.0 / 30.0"]
    assert cells(compared)["tecoa"][1] == "+5.0 (0.0 to 10.0)"  # of the targets alone
    assert cells(compared)["tecoa"][3] == "2 tasks x 1 seed"


def test_incomplete_rows_are_averaged_over_common_runs_and_it_is_said(tmp_path):
    lines = [line("capt", t, s, c, 40) for t, c in (("a", 80), ("b", 60), ("c", 50)) for s in (0, 1, 2)]
    lines += [line("tecoa", t, s, 70, 30) for t in "ab" for s in (0, 1, 2)]
    table = tables(tmp_path, lines)[0]
    assert cells(table)["capt"][0] == "70.0 ± 0.0"
    assert (
        "Averages at 16 shots are over 2 of 3 tasks x 3 of 3 seeds, those that all rows have; left out: c."
        in table.notes
    )


def test_rows_without_a_common_run_show_dashes(tmp_path):
    table = tables(tmp_path, [line("capt", "a"), line("tecoa", "b")])[0]
    assert cells(table) == {"tecoa": ["-"] * 3, "capt": ["-"] * 3}
    assert "| capt | - | - | - |" in table.markdown()
    assert "the rows have no runs in common" in notes(table)


def test_failed_runs_are_counted_and_named_under_the_table(tmp_path):
    lines = [line("capt", seed=s) for s in (0, 1)] + [
        line("tecoa"),
        line("tecoa", seed=1, error="loss is nan\nTraceback"),
    ]
    for table in (tables(tmp_path, lines)[0], tables(tmp_path, lines)[-1]):
        found = "Failed, and so missing: 1 of 4 runs: tecoa on shapes, 16 shots, seed 1 (ValueError: loss is nan)."
        assert found in table.notes


def test_a_method_that_failed_everywhere_keeps_its_row(tmp_path):
    table = tables(tmp_path, [line(), line("tecoa", error="out of memory")])[0]
    assert cells(table)["tecoa"] == ["-"] * 3
    assert cells(table)["capt"][0] == "80.0"


def test_collapsed_runs_count_and_are_named(tmp_path):
    lines = [line(seed=0, clean=80), line(seed=1, clean=2, robust=2, collapsed="all images get one class")]
    table = tables(tmp_path, lines)[0]
    assert cells(table)["capt"][0].startswith("41.0")
    assert "1 of 2 runs: capt on shapes, 16 shots, seed 1 (all images get one class)" in notes(table)


def test_rows_of_different_numbers_of_images_are_told(tmp_path):
    assert "shapes (n = 100, 200)" in notes(tables(tmp_path, [line(n=200), line("tecoa", n=100)])[0])
    assert "same number" not in notes(tables(tmp_path, [line(n=200), line("tecoa", n=200)])[0])


def test_of_several_attacks_each_has_a_column_in_a_table_of_its_own(tmp_path):
    result = {"task": "shapes", "classes": "all", **figures(80, 50, attack="apgd-ce")}
    result["attacks"]["apgd-t"] = {"correct": 84, "n": 200}
    result["worst_case"] = {"correct": 82, "n": 200}
    average, each, *_ = tables(tmp_path, [line(results=[result], attacks=["apgd-ce", "apgd-t"])])
    assert names(average) == ["clean", "robust", "H"] and cells(average)["capt"][:2] == ["80.0", "41.0"]
    assert names(each) == ["clean", "apgd-ce", "apgd-t"] and cells(each)["capt"] == ["80.0", "50.0", "42.0"]
    assert "under each attack" in each.title
    assert not any("under each attack" in table.title for table in tables(tmp_path, [line()]))


def test_the_attack_that_is_asked_for_is_the_one_in_the_table(tmp_path):
    lines = [line(robust=40), line(robust=30, attack="autoattack", n=50)]
    table = tables(tmp_path, lines, "autoattack")[0]
    assert cells(table)["capt"][:2] == ["80.0", "30.0"]
    assert "under autoattack" in notes(table)
    assert "n = 50 under the attack, 200 clean" in notes(table)


def test_a_section_without_the_attack_has_no_tables(tmp_path):
    lines = [line(), line(model="vit-b-32", attack="autoattack")]
    _, section = read_sections(write(tmp_path / "lines.jsonl", [lines[1], lines[0]]), "autoattack")
    assert section_tables(section) == []


def test_the_sentence_stands_under_the_differences(tmp_path):
    lines = [line(m, t, s, c, 40) for m, c in (("capt", 80), ("tecoa", 70)) for t in "ab" for s in (0, 1)]
    compared = tables(tmp_path, lines)[1]
    assert names(compared) == ["H", "clean", "robust", "pairs"]
    assert compared.notes[0].startswith("capt is 2.4 points above tecoa, the best baseline (95% interval 2.4 to 2.4")


def test_variants_are_rows_and_zero_shot_alone_is_a_table(tmp_path):
    assert list(cells(tables(tmp_path, [line(), line(variant="slow")])[0])) == ["capt", "capt (slow)"]
    assert cells(tables(tmp_path, [line("zero-shot")])[0]) == {"zero-shot": ["80.0", "40.0", "53.3"]}


def test_latex_escapes_what_means_something_to_it():
    assert escape_latex("50% of oxford_pets & {cars} #1 ^~\\ ±") == (
        r"50\% of oxford\_pets \& \{cars\} \#1 \textasciicircum{}\textasciitilde{}\textbackslash{} $\pm$"
    )
    assert escape_latex("-1.2 (-3.0 to -0.1), pgd-20, 10-20") == "$-$1.2 ($-$3.0 to $-$0.1), pgd-20, 10-20"


def test_markdown_escapes_bars():
    assert "| a\\|b | - |" in Table("t", pd.DataFrame({("", "x"): {"a|b": "-"}})).markdown()


@pytest.fixture
def everything(tmp_path):
    lines = suite(["oxford_pets", "100%"], shots=(1, "all"))
    lines += [line("capt", "100%", shots=1, variant="a_b & c", error="50% {of} it_failed")]
    for method in ("zero-shot", "tecoa", "capt"):
        lines += [base_to_new(method, t, 0, (80, 40), (70, 30)) for t in ("oxford_pets", "dtd")]
        lines.append(transfer(method, 0, {"imagenet": (80, 40), "x_y": (70, 30)}))
        lines.append(transfer(method, 0, {"imagenet": (80, 40), "x_y": (70, 30)}, "shift"))
    found = read_sections(write(tmp_path / "lines.jsonl", lines))
    return [(section, section_tables(section)) for section in found]


def test_latex_has_balanced_braces_and_as_many_columns_in_every_row(everything):
    latex = to_latex(everything)
    bare = re.sub(r"\\[{}%_&#$\\]", "", re.sub(r"(?m)^%.*$", "", latex).replace("\\\\\n", "\n"))
    assert bare.count("{") == bare.count("}") > 0
    assert bare.count("$") % 2 == 0
    assert not set("#%_^~±") & set(bare)
    bodies = re.findall(r"\\begin\{tabular\}\{l(c+)\}(.*?)\\end\{tabular\}", latex, re.DOTALL)
    assert len(bodies) == sum(len(tables) for _, tables in everything)
    for columns, body in bodies:
        rows = [row for row in body.split("\n") if row.endswith(r"\\")]
        assert len(rows) >= 2
        for row in rows:
            spans = [int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", row)]
            assert len(re.findall(r"(?<!\\)&", row)) + sum(spans) == len(columns)
    for environment in ("table*", "tabular", "adjustbox"):
        assert latex.count(f"\\begin{{{environment}}}") == latex.count(f"\\end{{{environment}}}")


def test_markdown_has_as_many_columns_in_every_row_and_one_heading_a_section(everything):
    markdown = to_markdown(everything)
    assert re.findall(r"(?m)^## (\S+: \S+)", markdown) == [
        "toy: few-shot",
        "toy: base-to-new",
        "toy: cross-dataset",
        "toy: shift",
    ]
    for block in re.findall(r"(?m)(?:^\|.*\n)+", markdown):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_same_figure_is_bold_in_markdown_and_latex(tmp_path):
    table = tables(tmp_path, [line("capt", clean=81), line("tecoa", clean=70)])[0]
    assert ("capt", 0) in bold(table)
    assert "| **81.0** |" in table.markdown()
    assert r"\textbf{81.0}" in table.latex()
    assert r"\textbf{70.0}" not in table.latex()


def test_a_result_without_any_attack_is_left_out(tmp_path):
    lines = [line(), line(seed=1, results=[{"task": "shapes", "classes": "all", **figures(10)}])]
    assert cells(tables(tmp_path, lines)[0])["capt"][0] == "80.0"


@pytest.mark.parametrize(
    ("limits", "said"),
    [([20], True), ([5], True), ([21], False), ([None], False), ([20, 100], False), ([20, None], False)],
)
def test_a_quick_run_is_said_at_the_top_to_mean_nothing(tmp_path, limits, said):
    """Whoever makes the report again: the limit stands in the lines. Figures of more images take the place of those of few."""
    lines = [line(method, limit=limit, n=limit or 200) for method in ("zero-shot", "capt") for limit in limits]
    (section,) = read_sections(write(tmp_path / "lines.jsonl", lines))
    parts = [(section, section_tables(section))]
    assert (to_markdown(parts).splitlines()[2] == f"**{QUICK_NOTE}**") == said
    assert (to_latex(parts).splitlines()[2] == f"\\noindent\\textbf{{{QUICK_NOTE}}}\\par") == said
    assert (QUICK_NOTE in to_markdown(parts)) == (QUICK_NOTE in to_latex(parts)) == said


@pytest.mark.parametrize(("plain", "first"), [("", "capt"), ("b", "capt (a)")])
def test_variants_are_compared_with_the_plain_row_or_else_with_the_first(tmp_path, plain, first):
    accuracies = {"a": (80, 40), plain: (70, 50), "c": (60, 30)}
    lines = [
        line("capt", task, variant=variant, clean=clean, robust=robust)
        for variant, (clean, robust) in accuracies.items()
        for task in ("x", "y")
    ]
    (section,) = read_sections(write(tmp_path / "lines.jsonl", lines))
    (found,) = [table for table in section_tables(section) if "minus" in table.title]
    assert found.title.endswith(f"at 16 shots, other rows of capt minus {first} (95% interval)")
    base = accuracies["" if first == "capt" else "a"]
    others = {f"capt ({name})" if name else "capt": of for name, of in accuracies.items() if of != base}
    assert [*found.entries.index] == [*others]
    for label, (clean, robust) in others.items():
        row = found.entries.loc[label]
        assert row["", "clean"].startswith(f"{clean - base[0]:+.1f} (")
        assert row["", "robust"].startswith(f"{robust - base[1]:+.1f} (")
