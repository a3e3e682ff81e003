"""Benchmark lines: what is read, what is merged, and what is refused."""

import json
import logging

import pytest
from report.benchmark_lines import base_to_new, figures, line, transfer, write

from capt_peft.evaluation import Accuracy
from capt_peft.report.lines import choose_attack, read_lines, sections


def test_a_line_becomes_a_cell_with_its_figures(tmp_path):
    (cell,) = read_lines(write(tmp_path / "lines.jsonl", [line("capt", "shapes", 1, 85, 45)]))
    assert (cell.label, cell.task, cell.shots, cell.seed, cell.threat) == ("capt", "shapes", 16, 1, "L-inf 10/255")
    assert cell.results[0].clean == Accuracy(170, 200)
    assert cell.results[0].attacks == {"pgd-20": Accuracy(90, 200)}
    assert not cell.once


def test_a_variant_stands_beside_the_method_in_the_label(tmp_path):
    lines = [line(), line(variant="no consistency", settings={"consistency": 0})]
    cells = read_lines(write(tmp_path / "lines.jsonl", lines))
    assert [cell.label for cell in cells] == ["capt", "capt (no consistency)"]


def test_of_lines_with_one_key_the_later_one_counts(tmp_path):
    lines = [line(error="out of memory"), line(clean=90)]
    assert lines[0]["key"] == lines[1]["key"]
    (cell,) = read_lines(write(tmp_path / "lines.jsonl", lines))
    assert cell.results[0].clean.correct == 180
    assert cell.failure("pgd-20") is None
    (cell,) = read_lines(write(tmp_path / "turned.jsonl", lines[::-1]))
    assert cell.failure("pgd-20") == "ValueError: out of memory"


def test_a_failed_line_beside_a_finished_one_of_other_images_is_no_failure(tmp_path):
    (cell,) = read_lines(write(tmp_path / "lines.jsonl", [line(error="out of memory", limit=500), line()]))
    assert cell.failure("pgd-20") is None


def test_a_failed_attack_is_a_failure_of_that_attack_only(tmp_path):
    (cell,) = read_lines(write(tmp_path / "lines.jsonl", [line(), line(error="too slow", attack="autoattack")]))
    assert cell.failure("pgd-20") is None
    assert cell.failure("autoattack") == "ValueError: too slow"


def test_lines_of_other_attacks_in_other_files_add_to_the_cell_and_the_clean_figure_is_of_most_images(tmp_path):
    pgd = write(tmp_path / "pgd.jsonl", [line(clean=80, robust=40, n=200)])
    auto = write(tmp_path / "auto.jsonl", [line(clean=90, robust=30, n=50, attack="autoattack")])
    for paths in ([pgd, auto], [auto, pgd]):
        (cell,) = read_lines(paths)
        assert cell.results[0].clean == Accuracy(160, 200)
        assert cell.results[0].attacks == {"pgd-20": Accuracy(80, 200), "autoattack": Accuracy(15, 50)}


def test_the_figure_of_an_attack_on_fewer_images_does_not_hide_the_one_on_more(tmp_path):
    lines = [line(robust=40, n=200), line(robust=20, n=50)]
    (cell,) = read_lines(write(tmp_path / "lines.jsonl", lines))
    assert cell.results[0].attacks["pgd-20"] == Accuracy(80, 200)


def test_a_torn_last_line_is_left_out_with_a_warning(tmp_path, caplog):
    text = json.dumps(line(seed=1))
    path = write(tmp_path / "lines.jsonl", [line()], end=text[: len(text) // 2])
    with caplog.at_level(logging.WARNING, logger="capt_peft.report.lines"):
        assert len(read_lines(path)) == 1
    assert "lines.jsonl: the last line (2) is cut off" in caplog.text


def test_a_whole_last_line_needs_no_newline(tmp_path):
    path = write(tmp_path / "lines.jsonl", [line()], end=json.dumps(line(seed=1)))
    assert [cell.seed for cell in read_lines(path)] == [0, 1]


def test_a_last_line_torn_within_a_letter_is_left_out_too(tmp_path):
    path = write(tmp_path / "lines.jsonl", [line()])
    path.write_bytes(path.read_bytes() + '{"key": "é'.encode()[:-1])
    assert len(read_lines(path)) == 1


@pytest.mark.parametrize("broken", ['{"key": ', "[1]", '{"key": "a", "status": "finished"}', "12"])
def test_a_broken_line_elsewhere_is_refused_with_file_and_number(tmp_path, broken):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(line()) + "\n" + broken + "\n" + json.dumps(line(seed=1)) + "\n")
    with pytest.raises(ValueError, match=r"lines.jsonl, line 2: this is no"):
        read_lines(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "zero"}, "'zero'"),
        ({"shots": "many"}, "'many'"),
        ({"results": [{"task": "shapes", "classes": "all", "clean": {"correct": 3, "n": 2}, "attacks": {}}]}, "3 of 2"),
    ],
)
def test_a_line_that_says_what_cannot_be_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_lines(write(tmp_path / "lines.jsonl", [line(**changes)]))


def test_no_line_at_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no benchmark line"):
        read_lines(write(tmp_path / "lines.jsonl", []))


def test_different_settings_of_one_cell_are_refused_and_the_message_says_which(tmp_path):
    lines = [line(seed=2), line(seed=2, settings={"learning_rate": 0.1})]
    with pytest.raises(
        ValueError, match=r"capt on shapes, 16 shots, seed 2 .*learning_rate \(0.3 and 0.1\).*a variant"
    ):
        read_lines(write(tmp_path / "lines.jsonl", lines))


@pytest.mark.parametrize("name", ["training_data", "base_model_fingerprint", "teacher_fingerprint"])
def test_lines_of_other_images_or_weights_do_not_share_a_row(tmp_path, name):
    """Under two attacks they would be merged; lines from before these digests were written are read as they are."""
    lines = [line() | {name: "a"}, line(attack="square") | {name: "b"}]
    with pytest.raises(ValueError, match=f"lines with another {name} each"):
        read_lines(write(tmp_path / "lines.jsonl", lines))
    assert len(read_lines(write(tmp_path / "lines.jsonl", [line() | {name: "a"}, line(attack="square")]))) == 1


def report(tmp_path, *lines):
    return sections(read_lines(write(tmp_path / "lines.jsonl", lines)))


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


def test_different_settings_are_fine_where_a_variant_or_another_number_of_shots_tells_them_apart(tmp_path):
    other = {"learning_rate": 0.1}
    lines = [line(), line(settings=other, variant="slow"), line(settings=other, shots=4)]
    assert len(read_lines(write(tmp_path / "lines.jsonl", lines))) == 3


def test_cells_that_may_not_be_compared_are_in_different_sections(tmp_path):
    lines = [
        transfer("capt", 0, {"imagenet": (60, 30), "pets": (70, 20)}, protocol="shift"),
        transfer("capt", 0, {"cars": (60, 30), "pets": (70, 20)}, protocol="shift"),
        base_to_new("capt", "shapes", 0, (80, 40), (70, 30)),
        line(),
        line(task="digits"),
        line(epsilon="1/255"),
        line(model="vit-b-32"),
        line(split="validation"),
    ]
    found = sections(read_lines(write(tmp_path / "lines.jsonl", lines)))
    assert [(s.protocol, s.source, len(s.cells)) for s in found] == [
        ("few-shot", None, 2),
        *[("few-shot", None, 1)] * 3,
        ("base-to-new", None, 1),
        ("shift", "imagenet", 1),
        ("shift", "cars", 1),
    ]


def test_epsilon_is_the_same_however_it_is_written(tmp_path):
    cells = read_lines(write(tmp_path / "lines.jsonl", [line(), line(seed=1, epsilon=10 / 255)]))
    assert len(sections(cells)) == 1


def test_shots_are_in_order_and_all_comes_last(tmp_path):
    lines = [line(shots=shots) for shots in ("all", 16, 1)] + [line("zero-shot")]
    (section,) = sections(read_lines(write(tmp_path / "lines.jsonl", lines)))
    assert section.shots == [1, 16, "all"]
    assert {cell.method for cell in section.at(16)} == {"capt", "zero-shot"}


def test_the_attack_of_most_cells_is_chosen_unless_another_is_asked_for(tmp_path):
    both = {"task": "shapes", "classes": "all", **figures(80, 30, attack="autoattack")}
    both["attacks"] |= figures(80, 40)["attacks"]
    cells = read_lines(write(tmp_path / "lines.jsonl", [line(results=[both]), line(seed=1)]))
    assert choose_attack(cells) == "pgd-20"
    assert choose_attack(cells, "autoattack") == "autoattack"
    with pytest.raises(ValueError, match=r"'cw'. The attacks are autoattack, pgd-20"):
        choose_attack(cells, "cw")


def test_of_several_attacks_the_worst_case_is_what_is_reported_unless_another_is_asked_for(tmp_path):
    result = {"task": "shapes", "classes": "all", **figures(80, 50, attack="apgd-ce")}
    result["attacks"]["apgd-t"] = {"correct": 84, "n": 200}
    result["worst_case"] = {"correct": 82, "n": 200}
    cells = read_lines(write(tmp_path / "lines.jsonl", [line(results=[result], attacks=["apgd-ce", "apgd-t"])]))
    worst = choose_attack(cells)
    assert worst == "worst of apgd-ce, apgd-t"
    assert cells[0].results[0].attacks[worst] == Accuracy(82, 200)
    assert choose_attack(cells, "apgd-ce") == "apgd-ce"
