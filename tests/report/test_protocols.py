"""Runs by published protocols in tables: never two of them, or one and none, in one; and the gap to AutoAttack."""

import pytest
from report.benchmark_lines import base_to_new, figures, line, transfer, write

from capt_peft.report import read_sections, section_tables, to_latex, to_markdown


def by(name, clean=80, robust=40, auto=None, *, own="pgd-100-step0.003922", n=200, **changes):
    """A line of a cell that was measured by a protocol, with AutoAttack beside it if a figure of it is given."""
    attacks = {own: round(robust * n / 100)} | ({} if auto is None else {"autoattack": round(auto * n / 100)})
    result = {"task": changes.get("task", "shapes"), "classes": "all", **figures(clean, None, n)}
    result["attacks"] = {attack: {"correct": right, "n": n} for attack, right in attacks.items()}
    result |= {
        "by_protocol": {"correct": round(robust * n / 100), "n": n},
        "worst_case": result["attacks"][[*attacks][-1]],
    }
    changes = {"epsilon": "1/255", "attack": own, **changes}
    return line(results=[result], n=n, evaluation_protocol=name, **changes)


def test_two_protocols_or_one_and_none_are_never_in_one_table(tmp_path):
    fap, ttc = by("fap", robust=40), by("ttc", robust=60, own="pgd-10-step0.003922")
    plain = [line("capt", robust=70, epsilon="1/255"), line("capt", "b", robust=70, epsilon="1/255")]
    sections = read_sections(write(tmp_path / "lines.jsonl", [fap, *plain, ttc]))
    assert [(s.evaluation_protocol, s.attack) for s in sections] == [
        ("fap", "the protocol fap"), ("", "pgd-20"), ("ttc", "the protocol ttc"),
    ]  # fmt: skip
    assert [list(s.runs.robust) for s in sections] == [[40], [70, 70], [60]]
    titles = [section_tables(section)[0].title for section in sections]
    assert titles == [
        "toy: few-shot, by the protocol fap, average over tasks", "toy: few-shot, average over tasks",
        "toy: few-shot, by the protocol ttc, average over tasks",
    ]  # fmt: skip
    for section, (name, attacks) in zip(sections, [("fap", "pgd-100"), ("", ""), ("ttc", "pgd-10")], strict=True):
        words = f"under the protocol {name} ({attacks}, step size 1/255), L-inf 1/255" if name else "under pgd-20"
        assert words in section_tables(section)[0].notes[0]


def test_only_cells_of_protocols_need_no_other_attack(tmp_path):
    (section,) = read_sections(write(tmp_path / "lines.jsonl", [by("fap"), by("fap", seed=1)]))
    assert section.attack == "the protocol fap" and not section.has_gap
    assert [name for _, name in section_tables(section)[0].entries] == ["clean", "robust", "H"]


def test_the_attack_that_is_asked_for_counts_in_every_section(tmp_path):
    lines = [by("fap", robust=40, auto=30), line("capt", "b", robust=70, epsilon="1/255")]
    fap, plain = read_sections(write(tmp_path / "lines.jsonl", lines), "autoattack")
    assert (fap.attack, list(fap.runs.robust), fap.has_gap) == ("autoattack", [30], False)
    assert plain.attack == "autoattack" and plain.runs.robust.isna().all()


def test_the_gap_to_autoattack_is_a_column_of_differences_and_never_bold(tmp_path):
    lines = [
        by("fap", 80, 40, 30, seed=0), by("fap", 80, 50, 34, seed=1),
        by("fap", 80, 60, method="adv-vp", seed=0), by("fap", 80, 60, method="adv-vp", seed=1),
    ]  # fmt: skip
    (section,) = read_sections(write(tmp_path / "lines.jsonl", lines))
    table, *_ = section_tables(section)
    assert [name for _, name in table.entries] == ["clean", "robust", "H", "gap to AutoAttack"]
    gaps = table.entries["16 shots", "gap to AutoAttack"]
    assert dict(gaps) == {"adv-vp": "-", "capt": "13.0 ± 4.2"}  # 10 and 16 points
    assert "gap to AutoAttack: points that robust accuracy is above that under AutoAttack" in table.notes[0]
    assert "gap to AutoAttack" in to_markdown([(section, [table])]) and "gap to AutoAttack" in to_latex(
        [(section, [table])]
    )


def test_figures_of_other_numbers_of_images_have_no_gap(tmp_path):
    few = by("fap", 80, 40, 30, n=50, limit=50)
    del few["results"][0]["by_protocol"]
    (section,) = read_sections(write(tmp_path / "lines.jsonl", [by("fap", 80, 40, n=200), few]))
    assert list(section.runs.robust) == [40] and not section.has_gap


def test_halves_and_targets_have_gaps_too(tmp_path):
    def named(made):
        for result in made["results"]:
            n, right = 200, result["attacks"]["pgd-20"]["correct"]
            result["by_protocol"] = {"correct": right, "n": n}
            result["attacks"]["autoattack"] = {"correct": right // 2, "n": n}
        return made

    halves = named(base_to_new("capt", "a", 0, (80, 60), (60, 40), evaluation_protocol="fap"))
    targets = named(transfer("capt", 0, {"a": (80, 40), "b": (60, 20), "c": (60, 30)}, evaluation_protocol="fap"))
    base, cross = read_sections(write(tmp_path / "lines.jsonl", [halves, targets]))
    entries = section_tables(base)[0].entries.loc["capt"]
    assert [entries[group, "gap to AutoAttack"] for group in ("base classes", "new classes", "both")] == [
        "30.0",
        "20.0",
        "24.0",
    ]
    assert section_tables(cross)[0].entries.loc["capt", ("", "average gap to AutoAttack")] == "12.5"


@pytest.mark.parametrize(("correct", "words"), [(170, "cannot be beside"), (10, "the worst case: ")])
def test_a_figure_of_the_protocol_that_cannot_be_is_refused(tmp_path, correct, words):
    broken = by("fap", 80, 40)
    broken["results"][0]["by_protocol"]["correct"] = correct
    with pytest.raises(ValueError, match=words):
        read_sections(write(tmp_path / "lines.jsonl", [broken, line()]))
