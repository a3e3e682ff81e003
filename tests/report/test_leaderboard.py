"""The leaderboard: what is ranked beside what, what is shown of it, and that nothing from outside acts on the page."""

import base64
import hashlib
import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from records import THREAT, evaluation_record
from report.benchmark_lines import base_to_new, figures, line, suite, transfer, write

from capt_peft import ThreatModel
from capt_peft.attacks import get_protocol
from capt_peft.evaluation import Verification
from capt_peft.report.boards import CONTRADICTED, Source, collect, told_by
from capt_peft.report.entries import NO_IMAGES, ONLY_TRANSFER, UNCHECKED, VERIFIED, Score
from capt_peft.report.leaderboard import page, write_leaderboard
from capt_peft.report.sections import read_sections
from capt_peft.results.accuracy import Accuracy, wilson_interval

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def boards_of(tmp_path, lines):
    return collect([write(tmp_path / "lines.jsonl", lines)], []).boards


def the_board(tmp_path, lines):
    (board,) = boards_of(tmp_path, lines)
    return board


def defended(defence, clean, attacks, worst, undefended=(80, 40), **changes):
    """A line of a defended cell."""
    counts = {f"pgd-20 ({way})": figures(robust)["clean"] for way, robust in attacks.items()}
    result = {"task": "shapes", "classes": "all", **figures(clean), "attacks": counts}
    before = {name: figures(value)["clean"] for name, value in zip(("clean", "worst_case"), undefended, strict=True)}
    result |= {"worst_case": figures(worst)["clean"], "undefended": before}
    return line(results=[result], defence=defence, **changes)


# ------------------------------------------------------------------------------------------------------------- the figures


def test_a_row_is_the_mean_over_data_sets_and_then_over_seeds(tmp_path):
    robust = {"shapes": (40, 50, 45), "digits": (20, 22, 24)}
    lines = [line("capt", task, seed, 80, r) for task, of in robust.items() for seed, r in enumerate(of)]
    board = the_board(tmp_path, lines)
    (entry,) = board.entries
    assert (board.protocol, board.data) == (
        "few-shot, 16 shots",
        "toy, mean of 2 data sets (digits, shapes), up to 200 images each",
    )
    assert (board.threat, board.attacks) == (ThreatModel("linf", "10/255"), ("pgd-20",))
    means = [30, 36, 34.5]
    assert entry.robust.value == pytest.approx(sum(means) / 300)
    assert entry.robust.spread == pytest.approx(0.031225, abs=1e-6)  # the sample standard deviation of 30, 36 and 34.5
    assert entry.robust.n == 400 and entry.seeds == 3 and entry.clean.spread == 0
    assert entry.robust.interval == wilson_interval(entry.robust.value * 400, 400)


def test_rows_are_ranked_by_robust_accuracy_and_equal_ones_alike(tmp_path):
    rows = {"capt": 40, "adv-vp": 43, "fap": 40, "adv-tp": 12}
    board = the_board(tmp_path, [line(method, robust=robust) for method, robust in rows.items()])
    assert [(e.method, r) for e, r in zip(board.entries, board.ranks, strict=True)] == [
        ("adv-vp", 1), ("capt", 2), ("fap", 2), ("adv-tp", 4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": "4/255"}, {"norm": "l2"}, {"attack": "pgd-50"}, {"limit": 100}, {"suite": "own"}, {"shots": 4},
        {"protocol": "shift", "results": [{"task": "other", "classes": "all", **figures(80, 40)}]},
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_cannot_be_compared_are_on_boards_of_their_own(tmp_path, change):
    boards = boards_of(tmp_path, [line("capt"), line("fap"), line("adv-vp", **change)])
    assert sorted(sorted(entry.method for entry in board.entries) for board in boards) == [["adv-vp"], ["capt", "fap"]]


def test_rows_of_other_images_have_no_rank(tmp_path):
    lines = [
        {**line(method), "measured_images": [digest]}
        for method, digest in (("capt", "a"), ("fap", "b"), ("adv-vp", "a"))
    ]
    board = the_board(tmp_path, lines)
    assert {e.method: (e.unranked, r) for e, r in zip(board.entries, board.ranks, strict=True)} == {
        "capt": ("", 1), "adv-vp": ("", 1), "fap": ("measured on other images", None),
    }  # fmt: skip


def test_a_row_without_some_of_the_data_sets_has_no_rank(tmp_path):
    lines = [line("capt", "shapes"), line("capt", "digits"), line("fap", "shapes", robust=99, clean=99)]
    board = the_board(tmp_path, lines)
    assert board.ranks == [1, None] and board.entries[1].unranked == "not measured on all of the data sets"


def test_zero_shot_that_was_measured_on_more_data_sets_takes_no_rank_from_others(tmp_path):
    lines = [line("zero-shot", task, robust=r) for task, r in (("shapes", 10), ("digits", 70))] + [
        line("capt", robust=40)
    ]
    board = the_board(tmp_path, lines)
    assert [(e.method, e.robust.value, r) for e, r in zip(board.entries, board.ranks, strict=True)] == [
        ("capt", 0.4, 1), ("zero-shot", 0.1, 2),
    ]  # fmt: skip


def test_several_rows_of_the_same_few_data_sets_have_a_board_of_their_own(tmp_path):
    names = ("zero-shot", "capt")
    whole = [
        line(name, task, **({"shots": 1} if i else {}))
        for name in names
        for task in ("shapes", "digits")
        for i in (0, 1)
        if name != "zero-shot" or not i
    ]
    part = [
        line(
            name,
            "digits",
            defence="ttc",
            results=defended("ttc", 75, {"transfer": 70, "unrolled": 10}, 9, task="digits")["results"],
        )
        for name in names
    ]
    for one in part:
        one["results"][0]["task"] = "digits"
    part += [line(name, "digits", model="other") for name in names]
    boards = {(b.protocol, b.data.split(", ")[1]): b for b in boards_of(tmp_path, whole + part)}
    assert {place: sorted((e.method, e.defence) for e in board.entries) for place, board in boards.items()} == {
        ("few-shot, 1 shot", "mean of 2 data sets (digits"): [("capt", ""), ("zero-shot", "")],
        ("few-shot, 16 shots", "mean of 2 data sets (digits"): [("capt", ""), ("zero-shot", "")],
        ("few-shot, 16 shots", "digits"): [("capt", ""), ("capt", "ttc"), ("zero-shot", ""), ("zero-shot", "ttc")],
    }
    assert all(None not in board.ranks for board in boards.values())


def test_zero_shot_stands_beside_every_number_of_shots(tmp_path):
    boards = boards_of(tmp_path, suite(["shapes", "digits"], shots=(1, 16)))
    assert sorted(board.protocol for board in boards) == ["few-shot, 1 shot", "few-shot, 16 shots"]
    assert all("zero-shot" in {entry.method for entry in board.entries} for board in boards)


def test_base_and_new_classes_have_a_board_each_and_a_source_is_not_counted(tmp_path):
    halves = boards_of(tmp_path, [base_to_new("capt", "shapes", 0, (80, 40), (60, 20))])
    assert [(b.data.split(", ")[2], b.entries[0].robust.value) for b in halves] == [
        ("base classes", 0.4),
        ("new classes", 0.2),
    ]
    moved = the_board(tmp_path, [transfer("capt", 0, {"shapes": (90, 80), "digits": (60, 30)})])
    assert moved.entries[0].robust.value == pytest.approx(0.3)


def test_lines_on_validation_images_are_named_and_not_shown(tmp_path):
    found = collect([write(tmp_path / "l.jsonl", [line("capt"), line("fap", split="validation")])], [])
    assert [entry.method for entry in found.boards[0].entries] == ["capt"]
    assert found.left_out == (("l.jsonl", "1 line is of the split on which settings are chosen"),)


# ---------------------------------------------------------------------------------- what lines do not have in common


def test_a_smaller_step_is_another_board_and_a_figure_of_another_step_than_its_cells_is_none(tmp_path):
    small = line("fap", attack="pgd-20-step3.922e-07", robust=80, eval_step_size="0.0001/255", attacks=["pgd-20"])
    small["results"][0]["attacks"] = {"pgd-20-step3.922e-07": figures(80)["clean"]}
    forged = line("adv-vp", robust=80, eval_step_size="0.0001/255")
    path = write(tmp_path / "l.jsonl", [line("capt"), small, forged])
    found = collect([path], [])
    assert sorted((board.attacks, [entry.method for entry in board.entries]) for board in found.boards) == [
        (("pgd-20",), ["capt"]),
        (("pgd-20-step3.922e-07",), ["fap"]),
    ]
    ((place, why),) = found.left_out
    assert place == "l.jsonl" and "adv-vp" in why and "under pgd-20, but its step size is 0.0001/255" in why
    with pytest.raises(ValueError, match=r"adv-vp.* under pgd-20, but its step size is 0\.0001/255"):
        read_sections(path)


def with_weights(one, name):
    return {**one, "base_model_fingerprint": name}


def test_other_base_weights_of_the_same_name_are_rows_of_their_own(tmp_path):
    lines = [with_weights(line("capt", robust=40), "aaa"), with_weights(line("capt", seed=1, robust=0), "bbb")]
    more = write(tmp_path / "more.jsonl", [with_weights(line("capt", seed=1, robust=42), "aaa")])
    (board,) = collect([write(tmp_path / "lines.jsonl", lines), more], []).boards
    assert [(e.base, e.seeds, e.robust.value) for e in board.entries] == [
        ("tiny-clip (aaa)", 2, pytest.approx(0.41)),
        ("tiny-clip (bbb)", 1, 0),
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"settings": {"learning_rate": 99.0}, "seed": 1}, "its lines differ in learning_rate (0.3 and 99.0)"),
        ({"settings": {"learning_rate": 99.0}}, "its lines differ in learning_rate (0.3 and 99.0)"),
        ({"prompts": {"num_text_tokens": 9}, "task": "digits"}, "its lines differ in prompts.num_text_tokens"),
        ({"epsilon": "20/510", "robust": 1}, "two of its lines have other figures each for shapes, seed 0"),
    ],
    ids=["settings", "settings of a seed", "prompts", "the same written otherwise"],
)
def test_lines_that_contradict_each_other_are_left_out_with_the_reason(tmp_path, change, why):
    lines = [line("capt"), line("capt", **change), line("fap")]
    found = collect([write(tmp_path / "one.jsonl", lines[:1]), write(tmp_path / "two.jsonl", lines[1:])], [])
    (board,) = found.boards
    assert [entry.method for entry in board.entries] == ["fap"]
    ((place, told),) = found.left_out
    assert place == "one.jsonl, two.jsonl" and told.startswith("capt on tiny-clip (few-shot, 16 shots, L-inf ")
    assert why in told


def test_of_the_same_cell_the_last_line_counts_and_of_the_same_figures_any(tmp_path):
    lines = [line("capt", robust=10), line("capt", robust=40), line("capt", robust=40, epsilon="20/510")]
    found = collect([write(tmp_path / "one.jsonl", lines[:1]), write(tmp_path / "two.jsonl", lines[1:])], [])
    (board,) = found.boards
    assert [entry.robust.value for entry in board.entries] == [0.4] and found.left_out == ()


def test_another_source_of_a_transfer_is_another_board(tmp_path):
    lines = [
        transfer("capt", 0, {"shapes": (90, 80), "digits": (60, 30)}),
        transfer("capt", 0, {"words": (90, 80), "digits": (60, 10)}),
    ]
    boards = boards_of(tmp_path, lines)
    assert {board.protocol: board.entries[0].robust.value for board in boards} == {
        "cross-dataset from shapes, 16 shots": 0.3,
        "cross-dataset from words, 16 shots": 0.1,
    }


def test_lines_of_failed_runs_and_of_a_protocol_without_its_figure_are_named(tmp_path):
    lines = [line("capt"), line("fap", error="no"), line("adv-vp", evaluation_protocol="fap")]
    found = collect([write(tmp_path / "l.jsonl", lines)], [])
    assert [entry.method for board in found.boards for entry in board.entries] == ["capt"]
    failed, unnamed = found.left_out
    assert failed == ("l.jsonl", "1 line is of runs that failed") and "no figure of the protocol fap" in unnamed[1]


# ------------------------------------------------------------------------------------------------------------- defences


def test_a_defence_is_ranked_by_its_worst_case_and_its_gain_by_transfer_alone_is_a_sign(tmp_path):
    lines = [
        line("capt", robust=40),
        defended("ttc", 75, {"transfer": 70, "straight-through": 50, "unrolled": 10}, 9),
        defended("tte-16", 78, {"transfer": 60, "unrolled": 45}, 44),
    ]
    board = the_board(tmp_path, lines)
    assert [(e.defence, r) for e, r in zip(board.entries, board.ranks, strict=True)] == [
        ("tte-16", 1),
        ("", 2),
        ("ttc", 3),
    ]
    ttc = board.entries[2]
    assert (ttc.robust.value, ttc.transfer.value) == pytest.approx((0.09, 0.70))
    assert ttc.attacks == ("pgd-20 (straight-through)", "pgd-20 (unrolled)")
    assert board.entries[1].signs is None and board.entries[0].signs == ()


def test_a_defence_that_was_attacked_by_transfer_alone_has_no_figure_and_no_rank(tmp_path):
    board = the_board(tmp_path, [line("capt", robust=40), defended("ttc", 75, {"transfer": 71.5}, 71.5)])
    entry = board.entries[1]
    assert (entry.robust, entry.transfer, entry.unranked) == (None, None, ONLY_TRANSFER) and board.ranks == [1, None]
    text = page(collect([tmp_path / "lines.jsonl"], []))
    assert "71.5" not in text and ONLY_TRANSFER in text


# ---------------------------------------------------------------------------------------------------------- evaluations


def evaluation(tmp_path, name="evaluation.json", images=False, threat=THREAT, **configuration):
    content = evaluation_record("a" * 16, "b" * 16)
    content["configuration"] |= configuration
    content["attacks"][0]["attack"]["threat_model"] = content["worst_case"][0]["threat_model"] = threat.to_dict()
    if images:
        content["images"] = {"sha256": "0" * 64, "bytes": 10}
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return path


def test_evaluations_have_a_board_for_each_data_set_and_its_images(tmp_path):
    paths = [evaluation(tmp_path, f"{i}.json", data={"n": 700, "fingerprint": f}) for i, f in enumerate("xxy")]
    found = collect([], [Source(path, path.name) for path in paths])
    assert sorted(len(board.entries) for board in found.boards) == [1, 2] and found.left_out == ()
    board = next(board for board in found.boards if len(board.entries) == 2)
    assert board.data == "digits, 700 images (x)" and board.ranks == [1, 1]
    assert board.entries[0].verified == NO_IMAGES


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(tmp_path):
    good = evaluation(tmp_path)
    bad = tmp_path / "bad.json"
    bad.write_text('{"kind": "evaluation"')
    lies = json.loads(good.read_text())
    lies["clean"]["accuracy"] = 0.99
    (tmp_path / "lies.json").write_text(json.dumps(lies))
    tuned = evaluation(tmp_path, "tuned.json", task={"name": "digits", "split": "validation"})
    broken = write(tmp_path / "l.jsonl", [line("capt")], end='{"key"\n{}\n')
    names = [good, bad, tmp_path / "lies.json", tuned]
    found = collect([broken], [Source(path, path.name) for path in names])
    assert [len(board.entries) for board in found.boards] == [1]
    reasons = dict(found.left_out)
    assert "is damaged" in reasons["bad.json"] and "they must agree" in reasons["lies.json"]
    assert "validation split, on which settings are chosen" in reasons["tuned.json"]
    assert "is not a line of a benchmark" in reasons["l.jsonl"]


def test_nothing_to_show_is_refused_with_the_reasons(tmp_path):
    with pytest.raises(ValueError, match=r"There is nothing to show \(somewhere: why\)"):
        write_leaderboard(collect([], [], [("somewhere", "why")]), tmp_path / "site")
    assert not (tmp_path / "site").exists()


BOUND = Verification({THREAT: Accuracy(210, 700)}, Accuracy(300, 700))
CHECKS = {
    "verified": (BOUND, VERIFIED, 0.3, 1),
    "nobody tried": (None, UNCHECKED, 305 / 700, 1),
    "not loaded": (Verification(unchecked=("the defence is random.",)), f"{UNCHECKED}: the defence is random.", 305 / 700, 1),
    "other figures": (replace(BOUND, problems=("210 are right",)), "not verified: 210 are right", 0.3, None),
    "other images": (Verification(problems=("the hash",)), "not verified: the hash", 305 / 700, None),
}  # fmt: skip


@pytest.mark.parametrize(("found", "told", "robust", "rank"), CHECKS.values(), ids=CHECKS)
def test_a_row_says_what_its_images_show_and_the_record_only_where_they_show_nothing(
    tmp_path, found, told, robust, rank
):
    path = evaluation(tmp_path, images=True)
    of_all = collect([], [Source(path, "a", verification=found)])
    (board,) = of_all.boards
    (entry,) = board.entries
    assert (entry.verified, board.ranks, entry.unranked) == (told, [rank], "" if rank else CONTRADICTED)
    assert entry.robust.value == pytest.approx(robust)
    assert entry.clean.value == pytest.approx((300 if found and found.clean else 305) / 700)
    cells = re.findall(r'<td data-value="([^"]*)"><span( class="\w+")?>', page(of_all))
    kind = {VERIFIED: ' class="good"'}.get(told, "" if rank else ' class="bad"')
    assert cells == [(told, kind)]


def test_the_page_says_what_verifying_does_not_check(tmp_path):
    text = " ".join(page(collect([], [Source(evaluation(tmp_path), "a")])).split())
    told = "the names of attacks, the accuracy by transfer and without the defence, and the signs of masked gradients are what"
    assert told in text and "for the reason beside it" in text


def test_an_evaluation_that_names_a_protocol_without_its_attacks_is_left_out(tmp_path):
    path = evaluation(tmp_path, protocol="fap")
    found = collect([], [Source(path, "a")])
    assert found.boards == ()
    ((place, why),) = found.left_out
    assert place == "a" and "by the protocol fap, but has no figure of its attacks at L-inf 4/255" in why
    content = json.loads(path.read_text())
    (attack,) = get_protocol("fap").attacks_at()
    content["attacks"][0]["attack"] = attack.to_dict()
    content["worst_case"][0]["threat_model"] = attack.threat_model.to_dict()
    path.write_text(json.dumps(content))
    (board,) = collect([], [Source(path, "a")]).boards
    assert board.protocol == "fap" and board.ranks == [1]


@pytest.mark.parametrize(("norm", "boards"), [("linf", 1), ("l2", 2), ("l1", 2), ("patch", 2)])
def test_images_of_another_size_are_another_board_where_the_norm_depends_on_it(tmp_path, norm, boards):
    threat = ThreatModel(norm, "4/255" if norm == "linf" else 4 if norm != "patch" else "1/16")
    sources = []
    for side in (32, 224):
        path = evaluation(tmp_path, f"{side}.json", threat=threat)
        content = json.loads(path.read_text())
        content["configuration"]["model"]["pixels"] = {"size": [side, side]}
        path.write_text(json.dumps(content))
        sources.append(Source(path, path.name))
    found = collect([], sources)
    assert found.left_out == () and len(found.boards) == boards
    named = sorted(re.findall(r"\d+ x \d+ pixels", " ".join(board.data for board in found.boards)))
    assert named == ([] if norm == "linf" else ["224 x 224 pixels", "32 x 32 pixels"])


def test_a_row_says_how_many_decisions_its_figures_are_of(tmp_path):
    one = line("capt")
    for count in (one["results"][0]["clean"], one["results"][0]["attacks"]["pgd-20"]):
        count |= {"correct": count["correct"] * 8, "decisions": 8}
    found = collect([write(tmp_path / "l.jsonl", [one, line("fap")])], [])
    assert {entry.method: entry.decisions for entry in found.boards[0].entries} == {"capt": 8, "fap": 1}
    assert page(found).count("8 decisions each") == 1


def test_copies_of_an_evaluation_tell_the_same_and_other_figures_of_the_same_do_not(tmp_path):
    first, copy, other = (evaluation(tmp_path, f"{i}.json") for i in range(3))
    content = json.loads(other.read_text())
    content["worst_case"][0] |= Accuracy(304, 700).to_dict()
    other.write_text(json.dumps(content))
    assert told_by(first) == told_by(copy)
    assert told_by(first)[0] == told_by(other)[0] and told_by(first)[1] != told_by(other)[1]
    assert told_by(first)[0] != told_by(evaluation(tmp_path, "seed.json", seed=1))[0]
    content["worst_case"][0]["correct"] += 2  # cannot be true, and so contradicts nobody
    other.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must agree"):
        told_by(other)


def test_a_record_cannot_say_of_itself_that_it_is_verified(tmp_path):
    path = evaluation(tmp_path, verified=True)
    content = json.loads(path.read_text()) | {"verified": "verified"}
    path.write_text(json.dumps(content))
    (board,) = collect([], [Source(path, "a")]).boards
    assert board.entries[0].verified == NO_IMAGES


# ------------------------------------------------------------------------------------------------------------- the page

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> {{ 7*7 }} </style></svg>"


@pytest.fixture
def hostile(tmp_path):
    lines = [line(EVIL, robust=30, model=EVIL, suite=EVIL, variant=EVIL), line("capt", suite=EVIL, defence=EVIL)]
    path = evaluation(
        tmp_path, task={"name": EVIL, "source": EVIL, "split": "test"}, protocol=EVIL, data={"fingerprint": EVIL}
    )
    sources = [Source(path, EVIL, link="javascript:alert(1)"), replace(Source(tmp_path / "none.json", EVIL), link=EVIL)]
    return collect([write(tmp_path / "l.jsonl", lines)], sources, [(EVIL, EVIL)])


def test_text_from_outside_is_escaped_everywhere(hostile):
    text = page(hostile)
    assert (
        text.count("<script>") == 1
        and "<img" not in text
        and "javascript:" not in text
        and "{{" not in html.unescape(text.replace(html.escape("{{ 7*7 }}"), "")).replace("{{ 7*7 }}", "")
    )
    assert "&lt;script&gt;alert(1)" in text and text.count("</style>") == 1


def test_only_the_pages_own_script_and_style_may_run(hostile):
    text = page(hostile)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        content = re.search(rf"<{tag}>(.*)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    own = re.findall(
        r"<[a-z][^>]*>", text.split("</head>")[1].split("<script>")[0]
    )  # attributes have no < or > in them
    assert [tag for tag in own if re.search(r"\s(style|on\w+)=", re.sub(r'"[^"]*"', "", tag))] == []
    assert re.findall(r'(?:src|href)="([^"#]*)"', text) == []


def test_a_board_that_shows_what_a_defence_changes_comes_first(tmp_path):
    many = [line(method, shots=4) for method in ("capt", "fap", "adv-vp")]
    few = [line("capt"), defended("ttc", 75, {"transfer": 70, "unrolled": 10}, 9)]
    text = page(collect([write(tmp_path / "l.jsonl", many + few)], []))
    assert re.findall(r'data-protocol="([^"]*)"', text) == ["few-shot, 16 shots", "few-shot, 4 shots"]
    assert '<option value="few-shot, 16 shots" selected>' in text


def test_the_published_page_is_made_from_the_published_lines(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = sorted(Path("docs/results").glob("*/lines.jsonl"))
    made = page(collect(lines, []))
    told = "run `make leaderboard`"
    assert Path("docs/leaderboard/index.html").read_text(encoding="utf-8") == made, told


def test_a_score_says_what_it_is_of():
    assert Score(0.5, 100).interval == wilson_interval(50, 100)


# ------------------------------------------------------------------------------------------------------------ a browser


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium from the system's packages: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def opened(chromium, path, width=1366, scheme="light"):
    view = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    view.strange = []
    view.on("request", lambda r: view.strange.append(r.url) if r.url != path.as_uri() else None)
    view.on("console", lambda message: view.strange.append(message.text))
    view.on("pageerror", lambda error: view.strange.append(str(error)))
    view.on("dialog", lambda dialog: view.strange.append(dialog.message))
    view.goto(path.as_uri())
    return view


@pytest.fixture
def site(tmp_path):
    lines = [
        line("capt", robust=40), line("adv-vp", robust=43, clean=70), line("fap", model="tiny-clip-robust", robust=50),
        line("capt", epsilon="4/255"), line("capt", shots=4), defended("ttc", 75, {"transfer": 70, "unrolled": 10}, 9),
    ]  # fmt: skip
    return write_leaderboard(collect([write(tmp_path / "l.jsonl", lines)], []), tmp_path / "site")


@pytest.mark.parametrize("width", [390, 1366])
def test_filters_and_sorting_work_with_the_keyboard_at_two_widths(chromium, site, width):
    view = opened(chromium, site, width)
    rows = "section.board:not([hidden]) tbody tr:not([hidden]) th"
    methods = lambda: [text.split("tiny")[0] for text in view.locator(rows).all_text_contents()]  # noqa: E731
    assert view.locator("section.board:not([hidden])").count() == 2  # of one protocol, two epsilons
    view.locator("select[name=epsilon]").select_option("10/255")
    assert methods() == ["fap", "adv-vp", "capt", "capt"] and view.text_content(".count") == "4 rows on 1 board."
    view.locator("select[name=base]").select_option("tiny-clip")
    assert methods() == ["adv-vp", "capt", "capt"]
    points = "section.board:not([hidden]) g.point"
    assert view.locator(points).count() == 4 and view.locator(f"{points}:not([hidden])").count() == 3
    button = view.get_by_role("button", name="Clean").locator("visible=true")
    button.focus()
    for order in (["80.0", "75.0", "70.0"], ["70.0", "75.0", "80.0"]):
        view.keyboard.press("Enter")
        cells = "section.board:not([hidden]) tbody tr:not([hidden]) td:nth-of-type(2)"
        assert [text[:4] for text in view.locator(cells).all_text_contents()] == order
    assert view.locator("section.board:not([hidden]) th[aria-sort=ascending]").text_content() == "Clean"
    assert view.evaluate("document.documentElement.scrollWidth") == width  # tables scroll within the page
    view.locator("select[name=norm]").select_option("")
    view.locator("select[name=protocol]").select_option("few-shot, 4 shots")
    view.locator("select[name=base]").select_option("tiny-clip-robust")
    assert view.text_content(".count") == "Nothing fits these filters." and view.strange == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(chromium, site, scheme):
    """At least 4.5 to 1 against the paper, as WCAG's level AA asks for."""
    view = opened(chromium, site, scheme=scheme)
    colours = view.evaluate(
        """() => [...document.querySelectorAll("body, small, th, td, label, select, a, caption, .bad, li, .note")].map(
        (each) => [getComputedStyle(each).color, getComputedStyle(document.body).backgroundColor])"""
    )

    def luminance(colour):
        values = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for pair in {tuple(pair) for pair in colours}:
        dark, light = sorted(map(luminance, pair))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair


def test_hostile_text_does_nothing_in_a_browser(chromium, hostile, tmp_path):
    view = opened(chromium, write_leaderboard(hostile, tmp_path / "site"))
    view.locator("select[name=protocol]").select_option("")
    assert view.strange == [] and view.locator("img").count() == 0
    assert "rows on" in view.text_content(".count")
