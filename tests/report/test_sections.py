"""Runs from benchmark lines: what is merged, what is refused, and what may stand in one table."""

import pytest
from report.benchmark_lines import base_to_new, figures, line, transfer, write

from capt_peft.report import read_sections


def report(tmp_path, *lines, attack=None):
    return read_sections(write(tmp_path / "lines.jsonl", lines), attack)


def run(tmp_path, *lines, attack="pgd-20"):
    """The only run of the lines, measured on one target at most."""
    (section,) = report(tmp_path, *lines, line(seed=9), attack=attack)
    (row,) = section.runs[section.runs.seed != 9].to_dict("records")
    return {name: None if value != value else value for name, value in row.items()}


def test_a_line_becomes_a_run_with_its_figures(tmp_path):
    (section,) = report(tmp_path, line("capt", "shapes", 1, 85, 45))
    (found,) = section.runs.to_dict("records")
    assert (section.threat, section.attack, section.model) == ("L-inf 10/255", "pgd-20", "tiny-clip")
    assert [found[name] for name in ("name", "label", "task", "shots", "seed")] == [
        "capt on shapes, 16 shots, seed 1", "capt", "shapes", 16, 1,
    ]  # fmt: skip
    assert [found[name] for name in ("clean", "robust", "n_clean", "n")] == [85, 45, 200, 200]


def test_a_variant_stands_beside_the_method_in_the_label(tmp_path):
    (section,) = report(tmp_path, line(), line(variant="no consistency", settings={"consistency": 0}))
    assert list(section.runs.label) == ["capt", "capt (no consistency)"]


def test_of_a_failed_and_a_finished_line_with_one_key_the_later_one_counts(tmp_path):
    failed, finished = line(error="out of memory"), line(clean=90)
    found = run(tmp_path, failed, finished)
    assert (found["clean"], found["failure"]) == (90, None)
    assert run(tmp_path, finished, failed)["failure"] == "ValueError: out of memory"


def test_a_failed_line_beside_a_finished_one_of_other_images_is_no_failure(tmp_path):
    assert run(tmp_path, line(error="out of memory", limit=500), line())["failure"] is None


def test_a_failed_attack_is_a_failure_of_that_attack_only(tmp_path):
    lines = [line(), line(error="too slow", attack="autoattack"), line(seed=9, attack="autoattack")]
    assert run(tmp_path, *lines)["failure"] is None
    assert run(tmp_path, *lines, attack="autoattack")["failure"] == "ValueError: too slow"


def test_lines_of_other_attacks_in_other_files_add_to_the_run_and_the_clean_figure_is_of_most_images(tmp_path):
    pgd = write(tmp_path / "pgd.jsonl", [line(clean=80, robust=40, n=200)])
    auto = write(tmp_path / "auto.jsonl", [line(clean=90, robust=30, n=50, attack="autoattack")])
    for paths in ([pgd, auto], [auto, pgd]):
        for attack, robust, n in (("pgd-20", 40, 200), ("autoattack", 30, 50)):
            (found,) = read_sections(paths, attack)[0].runs.to_dict("records")
            assert [found[name] for name in ("clean", "n_clean", "robust", "n")] == [80, 200, robust, n]


def test_the_figure_of_an_attack_on_fewer_images_does_not_hide_the_one_on_more(tmp_path):
    found = run(tmp_path, line(robust=40, n=200), line(robust=20, n=50))
    assert (found["robust"], found["n"]) == (40, 200)


def test_no_line_at_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no benchmark line"):
        report(tmp_path)


def test_different_settings_of_one_cell_are_refused_and_the_message_says_which(tmp_path):
    lines = [line(seed=2), line(seed=2, settings={"learning_rate": 0.1})]
    with pytest.raises(
        ValueError, match=r"capt on shapes, 16 shots, seed 2 .*learning_rate \(0.3 and 0.1\).*a variant"
    ):
        report(tmp_path, *lines)


@pytest.mark.parametrize("name", ["training_data", "base_model_fingerprint", "teacher_fingerprint"])
def test_lines_of_other_images_or_weights_do_not_share_a_row(tmp_path, name):
    """Under two attacks they would be merged; lines from before these digests were written are read as they are."""
    lines = [line() | {name: "a"}, line(attack="square") | {name: "b"}]
    with pytest.raises(ValueError, match=f"lines with another {name} each"):
        report(tmp_path, *lines)
    (section,) = report(tmp_path, line() | {name: "a"}, line(attack="square"))
    assert len(section.runs) == 1


@pytest.mark.parametrize(
    "name", ["measured_images", "measured_data", "base_model_fingerprint", "base_configuration", "processor"]
)
@pytest.mark.parametrize("other", [{"attack": "square"}, {"method": "adv-vlp"}, {"seed": 1}, {"shots": 4}], ids=str)
def test_what_was_measured_on_other_images_or_bases_does_not_share_a_table(tmp_path, name, other):
    a, b = (["a"], ["b"]) if name.startswith("measured") else ("a", "b")
    with pytest.raises(ValueError, match=rf"capt on shapes, 16 shots, seed 0.* lines with another {name} each.*again"):
        report(tmp_path, line() | {name: a}, line(**other) | {name: b})
    for same in ({name: a}, {}):  # the published lines have no digests
        assert report(tmp_path, line() | {name: a}, line(**other) | same)


def test_other_images_of_another_task_half_split_or_limit_are_as_they_should_be(tmp_path):
    both = base_to_new("capt", "shapes", 0, (80, 40), (70, 30)) | {"measured_data": ["a", "b"]}
    others = [line(task="digits"), line(split="validation"), line(n=50, attack="square")]
    found = report(tmp_path, both, line() | {"measured_data": ["c"]}, *(o | {"measured_data": ["d"]} for o in others))
    assert len(found) == 3


def test_methods_may_have_different_texts_of_the_same_images(tmp_path):
    """As zero-shot has in the published protocols."""

    def measured(images, data, template, **changes):
        result = {"task": "shapes", "classes": "all", "template": template, **figures(80, 40)}
        return line(results=[result], **changes) | {"measured_images": [images], "measured_data": [data]}

    zero_shot = measured("a", "text 1", "a drawing of a {}.", method="zero-shot")
    assert report(tmp_path, zero_shot, measured("a", "text 2", "a photo of a {}."))
    with pytest.raises(ValueError, match="lines with another measured_images each"):
        report(tmp_path, zero_shot, measured("b", "text 2", "a photo of a {}."))


def test_methods_trained_on_other_images_do_not_share_a_table(tmp_path):
    with pytest.raises(ValueError, match="lines with another training_data each"):
        report(tmp_path, line() | {"training_data": "a"}, line("adv-vlp") | {"training_data": "b"})
    assert report(tmp_path, line() | {"training_data": "a"}, line("adv-vlp", seed=1) | {"training_data": "b"})


@pytest.mark.parametrize("other", [{"seed": 1}, {"task": "digits"}], ids=str)
def test_runs_of_different_settings_are_not_averaged(tmp_path, other):
    with pytest.raises(ValueError, match=r"beside capt on shapes, 16 shots, seed 0,.*learning_rate \(0.3 and 0.1\)"):
        report(tmp_path, line(), line(settings={"learning_rate": 0.1}, **other))


def test_different_settings_are_fine_where_a_variant_or_another_number_of_shots_tells_them_apart(tmp_path):
    other = {"learning_rate": 0.1}
    (section,) = report(tmp_path, line(), line(settings=other, variant="slow"), line(settings=other, shots=4))
    assert len(section.runs) == 3


def test_cells_that_may_not_be_compared_are_in_different_sections(tmp_path):
    found = report(
        tmp_path,
        transfer("capt", 0, {"imagenet": (60, 30), "pets": (70, 20)}, protocol="shift"),
        transfer("capt", 0, {"cars": (60, 30), "pets": (70, 20)}, protocol="shift"),
        base_to_new("capt", "shapes", 0, (80, 40), (70, 30)),
        line(),
        line(task="digits"),
        line(epsilon="1/255"),
        line(model="vit-b-32"),
        line(split="validation"),
    )
    assert [(s.protocol, s.source, s.runs.name.nunique()) for s in found] == [
        ("few-shot", "", 2),
        *[("few-shot", "", 1)] * 3,
        ("base-to-new", "", 1),
        ("shift", "imagenet", 1),
        ("shift", "cars", 1),
    ]


def test_epsilon_is_the_same_however_it_is_written(tmp_path):
    assert len(report(tmp_path, line(), line(seed=1, epsilon=10 / 255))) == 1


def test_shots_are_in_order_and_all_comes_last(tmp_path):
    (section,) = report(tmp_path, *(line(shots=shots) for shots in ("all", 16, 1)), line("zero-shot"))
    assert section.shots == [1, 16, "all"]
    assert set(section.at(16).method) == {"capt", "zero-shot"}


def test_the_attack_of_most_cells_is_chosen_unless_another_is_asked_for(tmp_path):
    both = {"task": "shapes", "classes": "all", **figures(80, 30, attack="autoattack")}
    both["attacks"] |= figures(80, 40)["attacks"]
    lines = [line(results=[both]), line(seed=1)]
    assert report(tmp_path, *lines)[0].attack == "pgd-20"
    assert report(tmp_path, *lines, attack="autoattack")[0].attack == "autoattack"
    with pytest.raises(ValueError, match=r"'cw'. The attacks are autoattack, pgd-20"):
        report(tmp_path, *lines, attack="cw")


def test_of_several_attacks_the_worst_case_is_what_is_reported_unless_another_is_asked_for(tmp_path):
    result = {"task": "shapes", "classes": "all", **figures(80, 50, attack="apgd-ce")}
    result["attacks"]["apgd-t"] = {"correct": 84, "n": 200}
    result["worst_case"] = {"correct": 82, "n": 200}
    lines = [line(results=[result], attacks=["apgd-ce", "apgd-t"])]
    (section,) = report(tmp_path, *lines)
    assert section.attack == "worst of apgd-ce, apgd-t"
    assert list(section.runs.robust) == [41]
    assert report(tmp_path, *lines, attack="apgd-ce")[0].attack == "apgd-ce"
