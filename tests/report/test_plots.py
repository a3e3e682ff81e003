"""The pictures, and the report as a whole."""

from itertools import pairwise

import pytest
from report.benchmark_lines import METHODS, base_to_new, line, suite, transfer, write

from capt_peft.plotting import GREY
from capt_peft.report import read_sections, write_report
from capt_peft.report.plots import differences_figure, row_styles, scatter_figure, shots_figure
from capt_peft.report.statistics import rows_of

PICTURES = ["shots.png", "shots.svg", "scatter.png", "scatter.svg", "differences.png", "differences.svg"]


def read(tmp_path, lines):
    return read_sections(write(tmp_path / "lines.jsonl", lines))


def visible(figure):
    return [axis for axis in figure.axes if axis.get_visible()]


def test_shots_have_a_panel_for_every_task_and_one_for_the_average(tmp_path):
    (section,) = read(tmp_path, suite(["a", "b", "c", "d"], shots=(1, 4)))
    panels = visible(shots_figure(section))
    assert [axis.get_title() for axis in panels] == ["average of 4 tasks", "a", "b", "c", "d"]
    assert [tick.get_text() for tick in panels[-1].get_xticklabels()] == ["1", "4"]


def test_the_average_says_over_how_many_tasks_it_is(tmp_path):
    lines = [line(m, t) for m, tasks in (("capt", "abc"), ("tecoa", "ab")) for t in tasks]
    (section,) = read(tmp_path, lines)
    assert visible(shots_figure(section))[0].get_title() == "average of 2 tasks"


def test_clean_is_solid_robust_dashed_and_zero_shot_a_grey_line(tmp_path):
    lines = [line("zero-shot", clean=60, robust=5)]
    lines += [line(shots=k, seed=s, clean=c + s, robust=40) for k, c in ((1, 70), (16, 80)) for s in (0, 2)]
    (section,) = read(tmp_path, lines)
    (axis,) = visible(shots_figure(section))
    grey = [artist for artist in axis.lines if artist.get_color() == GREY]
    assert [(artist.get_linestyle(), set(artist.get_ydata())) for artist in grey] == [("-", {60.0}), ("--", {5.0})]
    clean, robust = axis.containers
    assert list(clean.lines[0].get_ydata()) == [71, 81]
    assert list(robust.lines[0].get_ydata()) == [40, 40]
    assert (clean.lines[0].get_linestyle(), robust.lines[0].get_linestyle()) == ("-", "--")
    assert [part.lines[0].get_fillstyle() for part in (clean, robust)] == [
        "full",
        "none",
    ]  # told apart without lines too
    bar = clean.lines[2][0].get_segments()[0]
    assert bar[1][1] - bar[0][1] == pytest.approx(2 * 2**0.5)  # the sample standard deviation of 70 and 72, each way


def test_capt_has_one_colour_wherever_it_is_and_no_two_rows_look_the_same(tmp_path):
    others = [line(f"m{i}") for i in range(9)]
    styles, few, alone = (
        row_styles(rows_of(read(tmp_path, [*lines, line()])[0])) for lines in (others, others[:2], [])
    )
    assert styles["capt"] == few["capt"] == alone["capt"]
    assert len(set(styles.values())) == 10


def test_the_scatter_is_at_sixteen_shots_or_else_the_largest(tmp_path):
    for shots, expected in (((1, 16, "all"), "16 shots"), ((1, 4), "4 shots")):
        (section,) = read(tmp_path, suite(["a", "b"], shots=shots))
        (axis,) = visible(scatter_figure(section))
        assert f"\n{expected};" in axis.get_title()
        assert len(axis.containers) == len(METHODS)


def test_every_row_lies_within_its_panel_however_many_there_are(tmp_path):
    lines = [line("capt", variant=f"rate {i}", shots=shots, clean=100) for i in range(16) for shots in (1, 4)]
    (axis,) = visible(shots_figure(read(tmp_path, lines)[0]))
    places = [x for container in axis.containers for x in container.lines[0].get_xdata()]
    (left, right), (_, top) = axis.get_xlim(), axis.get_ylim()
    assert len(set(places)) == 32 and left < min(places) and max(places) < right and top > 100


@pytest.mark.parametrize("rows", [5, 40])
def test_the_legend_of_the_scatter_lies_within_the_picture(tmp_path, rows):
    (section,) = read(tmp_path, [line("capt", variant=f"rate {i}", clean=50 + i / 2) for i in range(rows)])
    figure = scatter_figure(section)
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.y0 >= 0 and legend.y1 <= figure.bbox.height


def test_a_crowded_scatter_names_the_best_row_of_each_method_and_draws_all(tmp_path):
    rows = [line(of, variant=f"rate {i}", clean=50 + i / 2) for of in ("capt", "adv-vp") for i in range(15)]
    figure = scatter_figure(read(tmp_path, [*rows, line("zero-shot", clean=90)])[0])
    (axis,) = visible(figure)
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "zero-shot",
        "capt (rate 14)",
        "adv-vp (rate 14)",
    }
    marked = [artist for artist in axis.lines if artist.get_marker() in ("o", "s")]
    assert len(marked) == 30 and len({artist.get_color() for artist in marked}) == 2
    assert shots_figure(read(tmp_path, rows)[0]) is None


def test_lines_of_equal_harmonic_mean_are_where_they_should_be(tmp_path):
    (section,) = read(tmp_path, suite(["a", "b"], shots=(16,)))
    (axis,) = visible(scatter_figure(section))
    curves = [artist for artist in axis.lines if len(artist.get_xdata()) > 1]
    assert curves
    found = []
    for curve in curves:
        means = {round(2 * c * r / (c + r), 6) for c, r in zip(*curve.get_data(), strict=True)}
        assert len(means) == 1
        found.append(means.pop())
    assert all(b - a == 10 for a, b in pairwise(found))


def test_differences_have_a_panel_a_comparison_and_are_pale_where_nothing_is_shown(tmp_path):
    def values(method, clean):
        return [line(method, t, s, clean, 40) for t in "ab" for s in (0, 1)]

    lines = values("capt", 80) + values("tecoa", 60) + values("apt", 80)
    lines += [base_to_new(m, "a", 0, (c, 40), (c, 40)) for m, c in (("capt", 80), ("tecoa", 60))]
    figure = differences_figure(read(tmp_path, lines))
    few_shot, both = visible(figure)
    assert few_shot.get_title() == "toy: few-shot\n16 shots"
    tecoa, apt = (bar for bars in few_shot.containers for bar in bars)
    assert tecoa.get_width() == pytest.approx(2 * 80 * 40 / 120 - 2 * 60 * 40 / 100)
    assert tecoa.get_alpha() > apt.get_alpha()  # apt is as good: its interval is 0 to 0
    ((only,),) = both.containers
    assert only.get_alpha() == apt.get_alpha()  # one pair of runs has no interval


def test_the_differences_of_transfer_are_on_the_targets_alone(tmp_path):
    lines = [
        transfer(m, 0, {"imagenet": (90, source), "pets": (60, 30)}) for m, source in (("capt", 90), ("tecoa", 10))
    ]
    (axis,) = visible(differences_figure(read(tmp_path, lines)))
    ((bar,),) = axis.containers
    assert bar.get_width() == 0


def test_nothing_to_compare_is_no_picture(tmp_path):
    assert differences_figure(read(tmp_path, [line("tecoa")])) is None


def test_a_report_is_tables_and_pictures_and_the_same_every_time(tmp_path):
    path = write(tmp_path / "lines.jsonl", suite(["a", "b"], shots=(1, 16)))
    paths = write_report(path, tmp_path / "one")
    assert [p.name for p in paths] == ["tables.md", "tables.tex", *PICTURES]
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(p.name for p in paths)
    again = write_report(path, tmp_path / "two")
    for first, second in zip(paths, again, strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in paths[3].read_bytes()


def test_pictures_of_several_suites_have_their_names(tmp_path):
    lines = [line(), line("tecoa"), line(suite="big set"), line("tecoa", suite="big set")]
    names = [p.name for p in write_report(write(tmp_path / "lines.jsonl", lines), tmp_path / "out")]
    assert {"shots-toy.png", "shots-big-set.png", "scatter-big-set.svg", "differences.png"} <= set(names)


def test_pictures_name_the_model_where_there_are_several(tmp_path):
    lines = [line(method, model=model) for model in ("clip-a", "clip-b") for method in ("capt", "tecoa")]
    sections = read(tmp_path, lines)
    for section in sections:
        assert section.model in visible(scatter_figure(section))[0].get_title()
    titles = [axis.get_title() for axis in visible(differences_figure(sections))]
    assert titles == ["toy: few-shot\nclip-a, 16 shots", "toy: few-shot\nclip-b, 16 shots"]


def test_a_long_name_of_a_model_fits_into_the_titles(tmp_path):
    models = ["/data/models/openai/clip-vit-base-patch32-with-a-very-long-name-indeed", "clip"]
    sections = read(tmp_path, [line(method, model=model) for model in models for method in ("capt", "tecoa")])
    assert {section.model for section in sections} == {*models}
    for figure in (*map(scatter_figure, sections), differences_figure(sections)):
        for axis in visible(figure):
            assert "/data" not in axis.get_title() and max(map(len, axis.get_title().splitlines())) < 80


def test_a_report_takes_the_pictures_of_an_earlier_one_away_and_nothing_else(tmp_path):
    few, folder = suite(["a", "b"]), tmp_path / "out"
    write_report(write(tmp_path / "lines.jsonl", few), folder)
    (folder / "scatter_of_mine.png").write_bytes(b"mine")
    many = [line("capt", variant=f"rate {i}") for i in range(20)]
    names = {path.name for path in write_report(write(tmp_path / "lines.jsonl", many), folder)}
    assert {path.name for path in folder.iterdir()} == {*names, "scatter_of_mine.png"} and "shots.png" not in names


def test_rows_without_a_common_run_are_drawn_without_an_average(tmp_path):
    path = write(tmp_path / "lines.jsonl", [line("capt", "a"), line("tecoa", "b")])
    names = [p.name for p in write_report(path, tmp_path / "out")]
    assert names == ["tables.md", "tables.tex", "shots.png", "shots.svg"]


def test_a_suite_that_failed_whole_has_a_table_that_says_so_and_no_picture(tmp_path):
    lines = [line(), line("tecoa"), line(suite="big", error="out of memory")]
    for protocol in ("base-to-new", "shift"):
        lines.append(line(suite="big", protocol=protocol, error="out of memory"))
    paths = write_report(write(tmp_path / "lines.jsonl", lines), tmp_path / "out")
    assert [p.name for p in paths[2:]] == PICTURES
    assert paths[0].read_text().count("1 of 1 runs: capt on shapes, 16 shots, seed 0 (ValueError: out of memory)") == 4
    assert "| capt | - | - | - |" in paths[0].read_text()


def test_a_refused_file_leaves_no_half_of_a_report(tmp_path):
    lines = [line(), line(settings={"learning_rate": 1})]
    with pytest.raises(ValueError, match="variant"):
        write_report(write(tmp_path / "lines.jsonl", lines), tmp_path / "out")
    with pytest.raises(ValueError, match="all of them failed"):
        write_report(write(tmp_path / "failed.jsonl", [line(error="nan")]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
