"""examples/benchmark.py as users run it: every method, the list, files of settings and variants, two processes, bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from capt_peft.benchmark import PROTOCOLS, Lines
from capt_peft.commands.benchmark import main, make_plan, parse_args
from capt_peft.methods import METHODS
from capt_peft.report.tables import QUICK_NOTE

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark.py"
SMALL = [
    "--protocols", "few-shot", "--tasks", "digits", "--shots", "1", "--seeds", "0", "--limit", "4", "--attacks", "pgd-1",
    "--settings", "max_steps=1,attack_steps=1",
]  # fmt: skip


def cells(*arguments):
    return make_plan(parse_args(list(arguments))).cells()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All methods, once."""
    output = tmp_path_factory.mktemp("run") / "lines.jsonl"
    main([*SMALL, "--output", str(output)])
    return output


# ---------------------------------------------------------------------------------------------------------------- runs


def test_every_method_runs(run):
    lines = Lines(run).read().values()
    assert [line["cell"]["method"] for line in lines] == list(METHODS)
    assert {line["status"] for line in lines} == {"finished"}


def test_tables_and_plots_lie_beside_the_lines(run):
    folder = run.with_suffix("")
    assert {"tables.md", "tables.tex"} <= {path.name for path in folder.iterdir()}
    text = (folder / "tables.md").read_text()
    assert all(name in text for name in METHODS)
    assert QUICK_NOTE in text  # 4 images


def test_a_second_call_runs_nothing_and_says_where_everything_is(run, capsys):
    before = run.read_bytes()
    main([*SMALL, "--output", str(run)])
    assert run.read_bytes() == before
    shown = capsys.readouterr().out
    assert f"\n{QUICK_NOTE}\n" in shown
    assert f"{len(METHODS)} of {len(METHODS)} cells are finished; their lines are in {run}." in shown
    assert str(run.with_suffix("") / "tables.md") in shown


def test_failed_cells_are_named_and_the_others_reported(run, tmp_path, capsys):
    output = tmp_path / "lines.jsonl"
    main([*SMALL, "--methods", "zero-shot,capt", "--shots", "1000", "--output", str(output)])
    shown = capsys.readouterr().out
    assert "failed: capt on digits: Class '0' has 79 images, but 1000 are asked" in shown
    assert "1 of 2 cells are finished" in shown
    assert [line["status"] for line in Lines(output).read().values()] == ["finished", "failed"]


def test_a_benchmark_of_which_every_cell_failed_ends_in_an_error(tmp_path, capsys):
    output = tmp_path / "lines.jsonl"
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, "--methods", "capt", "--shots", "1000", "--output", str(output)])
    assert ended.value.code == 1 and "0 of 1 cells are finished" in capsys.readouterr().out


def test_two_processes_run_each_cell_together(run, tmp_path):
    output = tmp_path / "lines.jsonl"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(SCRIPT), *SMALL,
            "--methods", "zero-shot,capt", "--output", str(output),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)},
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(text) for text in output.read_text().splitlines()]
    assert [(line["cell"]["method"], line["status"]) for line in lines] == [
        ("zero-shot", "finished"),
        ("capt", "finished"),
    ]
    assert lines[1]["training"]["processes"] == 2
    assert [lines[0]["results"][0][name]["n"] for name in ("clean", "worst_case")] == [4, 4]
    assert lines[0]["results"] == Lines(run).read()[lines[0]["key"]]["results"]
    assert done.stdout.count("2 of 2 cells are finished") == 1


# ----------------------------------------------------------------------------------------------------------- what runs


def test_the_list_runs_and_writes_nothing(tmp_path, capsys):
    main([*SMALL, "--methods", "zero-shot,capt", "--output", str(tmp_path / "lines.jsonl"), "--list"])
    *rows, total = capsys.readouterr().out.splitlines()
    assert [row.split("  ")[-1].strip() for row in rows] == [
        "few-shot: zero-shot on digits, seed 0",
        "few-shot: capt on digits, 1 shot, seed 0",
    ]
    assert all("to run" in row for row in rows) and total.startswith("2 cells, 0 finished")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "searched"],
        ["--config", "parts"],
        ["--settings", "fap"],
        ["--settings", "apt", "--methods", "capt,apt"],
        [],
    ],
    ids=" ".join,
)
def test_what_the_package_and_its_pages_offer_passes_the_check_of_settings(tmp_path, capsys, arguments):
    main([*arguments, "--tasks", "digits", "--protocols", "few-shot", "--output", str(tmp_path / "a.jsonl"), "--list"])
    assert " 0 finished" in capsys.readouterr().out


def test_the_list_of_what_has_run_says_so(run, capsys):
    main([*SMALL, "--output", str(run), "--list"])
    assert f"{len(METHODS)} cells, {len(METHODS)} finished" in capsys.readouterr().out


def test_quick_is_every_method_and_protocol_on_little():
    quick = cells("--quick")
    assert {(cell.method, cell.protocol) for cell in quick} == {(m, p) for m in METHODS for p in PROTOCOLS}
    assert len(quick) == len(METHODS) * (2 + 2 + 1 + 1)
    assert {cell.seed for cell in quick} == {0} and {cell.limit for cell in quick} == {20}
    assert {cell.shots for cell in quick} == {0, 1}
    assert {cell.settings["max_steps"] for cell in quick if cell.method != "zero-shot"} == {4}


def test_by_default_the_toy_suite_runs_on_tiny_clip_by_its_name():
    few = cells("--methods", "capt")
    assert len(few) == 3 * (11 * 4 + 10 + 1 + 1)
    assert {cell.model for cell in few} == {"tiny_clip"}


# ----------------------------------------------------------------------------------------------------------- settings


def test_a_file_gives_arguments_and_variants_and_the_command_line_wins(tmp_path):
    variants = {"shallow": {"text_depth": 1}, "as it is": None}
    content = {
        "methods": "capt",
        "protocols": ["few-shot"],
        "tasks": "digits",
        "shots": [1, "all"],
        "seeds": 0,
        "limit": 9,
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**content, "variants": variants}, sort_keys=False))
    found = cells("--config", str(tmp_path / "a.yaml"), "--limit", "5")
    assert [(cell.label, cell.shots, cell.seed, cell.limit) for cell in found] == [
        ("capt (shallow)", 1, 0, 5), ("capt (shallow)", "all", 0, 5), ("capt (as it is)", 1, 0, 5),
        ("capt (as it is)", "all", 0, 5),
    ]  # fmt: skip
    assert [cell.prompts for cell in found] == [{"text_depth": 1}] * 2 + [{}] * 2


def test_settings_of_the_command_line_come_on_top_of_those_of_a_file(tmp_path):
    settings = {"epsilon": "8/255", "learning_rate": 0.01, "consistency": 3.0}
    path, few = tmp_path / "own.yaml", {"methods": "capt", "tasks": "digits", "protocols": "few-shot", "shots": 1}
    for written in (settings, ",".join(f"{name}={value}" for name, value in settings.items())):
        path.write_text(yaml.safe_dump({**few, "seeds": 0, "settings": written}))
        (cell,) = cells("--config", str(path), "--settings", "max_steps=1,learning_rate=0.5")
        found = {name: cell.settings[name] for name in ("learning_rate", "consistency", "max_steps")}
        assert (cell.epsilon, found) == ("8/255", {"learning_rate": 0.5, "consistency": 3.0, "max_steps": 1})


def test_an_attack_or_model_among_the_settings_of_the_command_line_wins_over_a_file_and_not_over_its_own_argument():
    few = ["--config", "searched", "--methods", "zero-shot", "--tasks", "digits", "--settings"]
    assert cells(*few, "eval_attack=pgd-5")[0].attacks == ("pgd-5",)
    assert cells(*few, "eval_attack=pgd-5", "--attacks", "pgd-7")[0].attacks == ("pgd-7",)


def test_a_quick_run_does_not_write_into_the_file_of_the_whole_one():
    assert str(parse_args(["--config", "searched", "--quick"]).output) == "outputs/benchmark/searched-quick.jsonl"
    assert str(parse_args(["--quick"]).output) == "outputs/benchmark/toy-quick.jsonl"
    assert str(parse_args(["--quick", "--output", "a.jsonl"]).output) == "a.jsonl"


def test_a_folder_of_its_name_does_not_hide_a_configuration_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "searched").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cells("--config", "searched", "--methods", "capt")


def test_settings_that_cannot_stand_beside_those_in_the_file_are_refused_before_anything_runs(run, tmp_path):
    output = tmp_path / "lines.jsonl"
    output.write_bytes(run.read_bytes())
    with pytest.raises(ValueError, match=r"run with different settings, which are: .*Give one of them a variant"):
        main([*SMALL, "--methods", "capt", "--settings", "consistency=0.5", "--seeds", "7", "--output", str(output)])
    assert output.read_bytes() == run.read_bytes()


def test_settings_of_the_command_line_win_over_those_of_one_method_in_a_file_and_so_does_quick():
    few = ["--config", "searched", "--methods", "capt", "--tasks", "digits", "--seeds", "0"]
    (cell,) = cells(*few, "--settings", "max_steps=7,num_vision_tokens=4")
    assert (cell.settings["max_steps"], cell.settings["learning_rate"], cell.prompts) == (
        7,
        0.3,
        {"num_vision_tokens": 4},
    )
    quick = ["--config", "searched", "--methods", "capt", "--quick"]
    assert {cell.settings["max_steps"] for cell in cells(*quick)} == {4}
    assert {cell.settings["max_steps"] for cell in cells(*quick, "--settings", "max_steps=7")} == {7}
    # what a variant varies stays
    assert {cell.settings.get("consistency") for cell in cells("--config", "parts", "--settings", "consistency=3")} >= {
        0.5,
        3,
    }


def test_settings_given_twice_come_on_top_of_each_other():
    few = ["--methods", "capt", "--tasks", "digits", "--protocols", "few-shot", "--shots", "1", "--seeds", "0"]
    (cell,) = cells(*few, "--settings", "fap", "--settings", "learning_rate=0.5", "--settings=max_steps=9")
    (fap,) = cells(*few, "--settings", "fap")
    assert cell.settings == {**fap.settings, "learning_rate": 0.5, "max_steps": 9} and cell.prompts == fap.prompts


def test_settings_on_the_command_line_are_read_as_yaml():
    settings = "attack_steps=5,consistency=1e-1,augment=true,weighting=entropy,text_depth=1,epsilon=2/255"
    (cell,) = cells(*SMALL, "--methods", "capt", "--settings", settings, "--variant", "mine")
    assert cell.label == "capt (mine)" and cell.epsilon == "2/255" and cell.prompts == {"text_depth": 1}
    own = {"attack_steps": 5, "consistency": 0.1, "augment": True, "weighting": "entropy"}
    assert {name: cell.settings[name] for name in own} == own


def test_the_file_of_a_published_protocol_gives_settings_attack_and_model_and_not_the_name_of_its_run():
    file = str(SCRIPT.parent / "configs" / "fap.yaml")
    arguments = [
        "--suite",
        "paper",
        "--settings",
        file,
        "--methods",
        "capt,fap",
        "--protocols",
        "base-to-new",
        "--seeds",
        "0",
    ]
    capt, fap = cells(*arguments, "--tasks", "dtd")
    assert capt.model == "openai/clip-vit-base-patch32"
    assert (capt.epsilon, capt.attacks, capt.eval_step_size) == ("1/255", ("pgd-100",), "1/255")
    assert capt.settings["attack_steps"] == 2 and capt.settings["learning_rate"] == 0.0035
    assert capt.prompts["num_text_tokens"] == 2 and "coupling" not in capt.prompts
    assert fap.prompts["coupling"] == "vision_to_text" and fap.settings["attack_loss"] == "kl"
    for cell in (capt, fap):
        assert not {"output_dir", "method", "shots", "eval_attack", "seed"} & {*cell.settings, *cell.prompts}


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "big"], "Unknown suite 'big'. Allowed: toy, paper"),
        (["--suite", "paper"], "--suite paper needs --model_name_or_path"),
        (["--methods", "capt,magic"], "Unknown method 'magic'. Allowed: zero-shot, capt"),
        (["--protocols", "one-shot"], "Unknown protocols one-shot. Allowed: few-shot"),
        (["--tasks", "digits,dtd"], "Unknown tasks dtd. Allowed: digits, shapes"),
        (["--shots", "0"], "shots=0 must be a whole number of at least 1"),
        (["--shots", "few"], "shots='few'"),
        (["--transfer_shots", "0"], "shots=0"),
        (["--seeds", "x"], "seed='x'"),
        (["--seeds", ""], "no seeds"),
        (["--limit", "-3"], "limit=-3"),
        (["--attacks", "pdg-20"], "unknown attack 'pdg-20'"),
        (["--split", "holdout"], "Unknown splits holdout"),
        (["--settings", "learning_rat=3"], "unknown settings learning_rat"),
        (["--settings", "learning_rate=high"], "'high'"),
        (["--settings", "max_steps=3,max_steps=4"], "gives max_steps twice"),
        (["--settings", "squash=true,augment=true"], "squash and augment are two ways"),
        (["--settings", "frozen_term=label"], "capt: frozen_term='label' is unknown. Allowed: predictions"),
        (["--settings", "weighting=none", "--list"], "capt: weighting='none' is unknown. Allowed: confidence"),
        (["--backend", "slurm"], "Unknown backend 'slurm'"),
        (["--workers", "0"], "workers=0"),
        (["--root", "/"], "--root has no effect with --suite toy"),
        (["--quick"], "--attacks has no effect beside quick"),
        (["--suite", "own", "--tasks", "a=./nowhere"], "There is no folder or file ./nowhere"),
    ],
)
def test_bad_input_is_one_clear_sentence_and_nothing_is_written(tmp_path, capsys, arguments, words):
    with pytest.raises((ValueError, SystemExit)) as caught:
        main([*SMALL, "--output", str(tmp_path / "out" / "lines.jsonl"), *arguments])
    message = capsys.readouterr().err.strip() or str(caught.value)
    assert words in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "content", "words"),
    [
        ("--config", "sots: 1\nmethod: capt\n", "unknown arguments sots, method. Did you mean shots?"),
        ("--config", "- 1\n- 2\n", "must hold `name: value` lines, not [1, 2]."),
        ("--config", "a: [1\n", "cannot be read as YAML"),
        ("--config", "shots: &a [1]\nseeds: *a\n", "aliases (*a) are not read"),
        ("--config", "shots: 1\nshots: 2\n", "it gives 'shots' twice"),
        ("--config", "limit: many\n", "--limit: invalid int value: 'many'"),
        ("--config", "methods: {capt: 1}\n", "methods={'capt': 1} does not suit"),
        ("--config", "variants: {a: {learning_rat: 1}}\n", "variants: a: unknown settings learning_rat."),
        (
            "--config",
            "variants: {a: {learning_rate: high}}\n",
            "variants: a: argument --learning_rate:",
        ),
        (
            "--config",
            "method_settings: {capt: {attack_steps: 1.5}}\n",
            "method_settings: capt: argument --attack_steps:",
        ),
        ("--config", None, "cannot be opened"),
        ("--settings", "epsilon: [1]\n", "epsilon=[1] does not suit"),
        ("--settings", "- 1\n", "must hold `name: value` lines, not [1]."),
        ("--settings", None, "cannot be opened"),
    ],
)
def test_a_bad_file_is_refused_by_its_name(tmp_path, capsys, argument, content, words):
    file = tmp_path / "bad.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises((ValueError, SystemExit)) as caught:
        main(["--output", str(tmp_path / "out" / "lines.jsonl"), argument, str(file)])
    message = capsys.readouterr().err or str(caught.value)
    assert words in message and (str(file) in message or "variants" in message or "method_settings" in message)
    assert not (tmp_path / "out").exists()


def test_a_folder_as_output_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder; the lines go to a file"):
        main([*SMALL, "--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
