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
from records import evaluation_record
from report.benchmark_lines import base_to_new, figures, line, suite, transfer, write

from capt_peft import ThreatModel
from capt_peft.report.entries import NO_IMAGES, ONLY_TRANSFER, UNCHECKED, VERIFIED, Score, Source, collect
from capt_peft.report.leaderboard import page, write_leaderboard
from capt_peft.results.accuracy import wilson_interval

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
    assert (board.protocol, board.data) == ("few-shot, 16 shots", "toy, mean of 2 data sets, up to 200 images each")
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


def evaluation(tmp_path, name="evaluation.json", **configuration):
    content = evaluation_record("a" * 16, "b" * 16)
    content["configuration"] |= configuration
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


def test_what_does_not_agree_has_no_rank_and_is_not_called_verified(tmp_path):
    path = evaluation(tmp_path, data={"n": 700})
    content = json.loads(path.read_text()) | {"images": {"sha256": "0" * 64, "bytes": 10}}
    path.write_text(json.dumps(content))
    told = "not verified: the labels are others"
    for verified, rank in ((VERIFIED, 1), (UNCHECKED, 1), (told, None)):
        (board,) = collect([], [Source(path, "a", verified=verified)]).boards
        assert (board.entries[0].verified, board.ranks) == (verified, [rank])
        cells = re.findall(r'<td data-value="([^"]*)"><span', page(collect([], [Source(path, "a", verified=verified)])))
        assert cells == [verified]


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
