"""The search for settings keeps to the rules of docs/search.md, whatever the figures are."""

import json
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "search.py"
LINES = ROOT / "docs" / "results" / "search" / "lines.jsonl"
CONFIG = ROOT / "capt_peft" / "commands" / "configs" / "searched.yaml"


@pytest.fixture
def search(monkeypatch, tmp_path):
    """The script, with cells that are not run: their H is what `scores(cell)` says."""
    script = runpy.run_path(str(SCRIPT), run_name="search")
    script["asked"] = []

    def run_cells(cells, path, **kwargs):
        script["asked"] += cells
        return {cell.key: line(cell, script["scores"](cell)) for cell in cells}

    script["Search"].measure.__globals__["run_cells"] = run_cells
    return script


def line(cell, score):
    figure = {"correct": round(10 * score), "n": 1000}  # H of two equal accuracies is that accuracy
    return {
        "status": "finished",
        "cell": json.loads(json.dumps(cell.to_dict())),
        "results": [{"clean": figure, "worst_case": figure}],
    }


@pytest.mark.parametrize("method", ["fap", "adv-tp"])
def test_every_method_has_six_settings_and_its_two_best_if_close_are_measured_with_three_seeds(search, method):
    best = {"rate 0.1": 50, "rate 0.3": 60, "rate 1": 40, "160 steps": 61, "4 attack steps": 55, "other prompts": 62}
    later = {"160 steps": 64, "other prompts": 58}
    search["scores"] = lambda cell: later[cell.variant] if cell.seed else best[cell.variant]
    name, settings = search["Search"](Path("lines"), 1).choose(method)
    assert name == "160 steps" and settings == {"learning_rate": 0.3, "max_steps": 160}
    cells = {cell.key: cell for cell in search["asked"]}.values()
    assert {cell.variant for cell in cells if cell.seed == 0} == set(best)
    assert {(cell.variant, cell.seed) for cell in cells if cell.seed} == {(v, s) for v in later for s in (1, 2)}
    assert {cell.split for cell in cells} == {"validation"} and {cell.limit for cell in cells} == {100}
    assert {cell.task for cell in cells} == set(search["DEVELOPMENT"])
    assert {cell.attacks for cell in cells} == {("apgd-ce-20", "apgd-t-20")}
    (changed,) = {str({**cell.settings, **cell.prompts}) for cell in cells if cell.variant == "other prompts"}
    assert all(
        f"'{key}': {value}" in changed
        for key, value in {**search["other_prompts"](method), "learning_rate": 0.3}.items()
    )


@pytest.mark.parametrize("apart", [2.9, 3.0])
def test_settings_that_are_far_from_the_best_are_not_measured_again(search, apart):
    search["scores"] = lambda cell: 60 if cell.variant == "160 steps" else 60 - apart
    assert search["Search"](Path("lines"), 1).choose("fap")[0] == "160 steps"
    assert any(cell.seed for cell in search["asked"]) == (apart < 3)


@pytest.mark.parametrize(
    ("method", "gain"), [("capt", 1), ("adv-vp", 1), ("adv-vlp", 1), ("pmg-aft", 1), ("capt", -1), ("fap", 1)]
)
def test_more_vision_prompts_are_tried_with_the_winner_where_they_are_not_tied_to_text_prompts(search, method, gain):
    best = {"160 steps": 60, "16 vision prompts": 60 + gain}
    search["scores"] = lambda cell: best.get(cell.variant, 50)
    name, settings = search["Search"](Path("lines"), 1).choose(method)
    more = [cell for cell in search["asked"] if cell.variant == "16 vision prompts"]
    assert {cell.seed for cell in more} == (set() if method == "fap" else {0, 1, 2})
    taken = gain > 0 and method != "fap"
    assert name == ("16 vision prompts" if taken else "160 steps") and settings["max_steps"] == 160
    assert settings.get("num_vision_tokens") == (16 if taken else None)


def test_of_equal_settings_the_shorter_is_taken(search):
    search["scores"] = lambda cell: 50
    assert search["Search"](Path("lines"), 1).choose("capt")[1]["max_steps"] == 80


def test_the_packaged_settings_are_those_that_the_published_lines_choose(search, capsys):
    published = {line["key"]: line for line in map(json.loads, LINES.read_text().splitlines())}
    search["Search"].measure.__globals__["run_cells"] = lambda cells, path, **_: {
        cell.key: published[cell.key] for cell in cells
    }
    search["main"](["outputs/search.jsonl"])
    printed = yaml.safe_load(capsys.readouterr().out.rpartition("takes")[2].partition("\n")[2])
    packaged = yaml.safe_load(CONFIG.read_text())
    printed["method_settings"]["capt"]["weighting"] = "margin"  # the candidate that stayed
    assert {name: packaged[name] for name in printed} == printed
    assert packaged["attacks"] == ",".join(["pgd-20", *search["ATTACKS"]]) and packaged["shots"] == 16
    assert {cell["task"] for cell in (line["cell"] for line in published.values())} == set(search["DEVELOPMENT"])


def test_a_failed_cell_ends_the_search_instead_of_being_left_out(search):
    search["scores"] = lambda cell: 50
    run = search["Search"].measure.__globals__["run_cells"]

    def failing(cells, path, **kwargs):
        lines = run(cells, path)
        next(iter(lines.values())).update(status="failed", error={"message": "no memory"})
        return lines

    search["Search"].measure.__globals__["run_cells"] = failing
    with pytest.raises(RuntimeError, match="capt on digits failed: no memory"):
        search["Search"](Path("lines"), 1).choose("capt")
