"""`--protocol`: what it sets, what it refuses, that results carry it, and the list of protocols."""

import json
import re
from pathlib import Path

import pytest
from helpers import TINY_CLIP

from capt_peft.attacks import Protocol, ThreatModel, get_protocol, known_protocols
from capt_peft.benchmark import run_cell
from capt_peft.benchmark.inputs import read_task, template_of
from capt_peft.benchmark.lines import is_whole
from capt_peft.commands import evaluate
from capt_peft.commands.benchmark import make_plan
from capt_peft.commands.benchmark import parse_args as of_benchmark
from capt_peft.commands.options import check_value
from capt_peft.commands.protocols import main
from capt_peft.commands.train import main as train
from capt_peft.evaluation import Evaluation

BASE = ["--base", TINY_CLIP, "--use_cpu"]


def settled(*argv):
    return evaluate.parse_args([*BASE, *argv])


@pytest.fixture
def few(monkeypatch):
    """Protocols measure 6 images, so that a test takes seconds."""
    monkeypatch.setattr(Protocol, "images_in", lambda self, task: 6)


def test_it_sets_what_the_user_does_not():
    args = settled("--protocol", "ttc")
    assert (args.attacks, args.norm, args.epsilon, args.split, args.limit) == ("pgd-10", "linf", "1/255", "test", None)
    assert args.template == "This is a photo of a {}."
    assert evaluate.parse_attacks(args) == get_protocol("ttc").attacks_at()
    args = settled("--protocol", "robustvlm", "--dataset_name", "imagenet")
    assert (args.attacks, args.epsilon, args.limit, args.template) == (
        "apgd-ce-100x5,apgd-t", "2/255", 5000, "clip-imagenet-80",
    )  # fmt: skip
    assert (settled("--protocol", "robustvlm").limit, settled("--protocol", "fap").template) == (1000, None)


def test_what_agrees_may_be_said_and_other_attacks_stand_beside_with_its_step_size():
    args = settled(
        "--protocol",
        "apt",
        "--attacks",
        "clean,cw-100,pgd-100,autoattack",
        "--epsilon",
        "1/255, 4/255",
        "--split",
        "test",
    )
    threats = [ThreatModel("linf", epsilon) for epsilon in ("1/255", "4/255")]
    assert [(a.name, a.threat_model) for a in evaluate.parse_attacks(args)] == [
        (name, threat) for threat in threats for name in ("cw-100", "pgd-100", "autoattack")
    ]
    fap = evaluate.parse_attacks(settled("--protocol", "fap", "--attacks", "pgd-100,cw-100", "--norm", "linf"))
    assert [attack.name for attack in fap] == ["pgd-100-step0.003922", "cw-100-step0.003922"]
    assert settled("--protocol", "ttc", "--template", "This is a photo of a {}.").template == "This is a photo of a {}."


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--epsilon", "4/255"],
            "--epsilon '4/255' contradicts --protocol ttc, which measures --epsilon 1/255: leave one",
        ),
        (["--epsilon", "1/255,2/255"], "--epsilon '2/255' contradicts"),
        (["--norm", "l2"], "--norm 'l2' contradicts --protocol ttc, which measures --norm linf"),
        (["--split", "validation"], "--split 'validation' contradicts"),
        (["--limit", "20"], "--limit 20 contradicts --protocol ttc, which measures all images"),
        (
            ["--attacks", "autoattack"],
            "--attacks autoattack leaves out pgd-10, .* give --attacks pgd-10,autoattack to have",
        ),
        (["--attacks", "clean"], "--attacks clean leaves out pgd-10"),
        (["--template", "a {}"], r"--template 'a \{\}' contradicts .*--template 'This is a photo of a \{\}\.'"),
        (["--attack_target", "frozen"], "--attack_target 'frozen' contradicts .* white-box"),
        (["--attack_template", "a {}"], "--attack_template .* contradicts"),
        (["--threats", "linf:1/255,l2:0.5"], "--protocol ttc says norm and radii: leave --threats out"),
        (["--retrieval"], "--retrieval True contradicts"),
        (["--protocol", "few-shot"], "Unknown protocol 'few-shot'"),
    ],
)
def test_what_contradicts_it_is_refused(argv, words):
    with pytest.raises(ValueError, match=words):
        settled("--protocol", "ttc", *argv)


def test_the_result_carries_the_name_and_has_a_file_of_its_own(few, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv in (["--protocol", "ttc"], ["--attacks", "pgd-10", "--epsilon", "1/255", "--limit", "6"]):
        evaluate.main([*BASE, "--signs", "false", *argv])
    found = sorted((tmp_path / "outputs").rglob("*.json"))
    contents = [json.loads(path.read_text())["configuration"] for path in found]
    assert sorted(content.get("protocol", "") for content in contents) == ["", "ttc"]
    named = Evaluation.load(next(p for p, content in zip(found, contents, strict=True) if "protocol" in content))
    assert named.clean.n == 6 and named.configuration["model"]["template"] == "This is a photo of a {}."
    assert capsys.readouterr().out.count("Measured by the protocol ttc (") == 1


def test_an_adapter_keeps_its_own_text_and_the_protocols_radius_counts(few, tmp_path):
    folder = str(tmp_path / "adapter")
    quick = ["--shots", "1", "--max_steps", "1", "--eval_limit", "5", "--eval_attack", "pgd-1", "--attack_steps", "1"]
    train([*quick, "--use_cpu", "--save_strategy", "no", "--epsilon", "4/255", "--output_dir", folder])
    update = ["--adapter", folder, "--use_cpu", "--signs", "false", "--protocol", "ttc", "--update_card"]
    evaluation = evaluate.main(update)
    assert evaluation.configuration["model"]["template"] == "a photo of the digit {}."
    assert [str(outcome.threat_model) for outcome in evaluation.attacks] == ["L-inf 1/255"]
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "Measured by the protocol ttc (Test-time Counterattacks" in card


# ------------------------------------------------------------------------------------------------------- benchmark


def test_a_cell_is_measured_by_it_and_its_line_carries_it(few):
    argv = ["--methods", "zero-shot", "--protocols", "few-shot", "--tasks", "digits", "--protocol", "ttc"]
    (cell,) = make_plan(of_benchmark(argv)).cells()
    assert (cell.epsilon, cell.evaluation_protocol) == ("1/255", "ttc")
    line = run_cell(cell)
    assert line["status"] == "finished" and line["cell"]["evaluation_protocol"] == "ttc" and is_whole(line, cell)
    (result,) = line["results"]
    assert result["by_protocol"] == result["attacks"]["pgd-10-step0.003922"] == result["worst_case"]
    assert (result["clean"]["n"], result["template"]) == (6, "This is a photo of a {}.")
    del result["by_protocol"]
    assert not is_whole(line, cell)


def test_a_tuned_methods_text_is_its_own():
    argv = [
        "--methods",
        "capt,zero-shot",
        "--protocols",
        "few-shot",
        "--shots",
        "1",
        "--seeds",
        "0",
        "--tasks",
        "digits",
    ]
    cells = make_plan(of_benchmark([*argv, "--protocol", "apt"])).cells()
    task = read_task("digits", "all", None)
    assert [template_of(cell, task) for cell in cells] == ["a photo of the digit {}.", "a photo of a {}"]


def test_quick_and_a_published_protocol_do_not_go_together():
    with pytest.raises(ValueError, match="--protocol has no effect beside quick"):
        of_benchmark(["--quick", "--protocol", "fap"])


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("protocol", "few-shot", "few-shot is an experiment of the paper: --protocols few-shot."),
        ("protocols", "fap", "fap is a published evaluation protocol: --protocol fap."),
    ],
)
def test_a_word_of_the_other_option_is_told_before_anything_is_imported(option, value, words):
    with pytest.raises(ValueError, match=words):
        check_value(option, value)


# ------------------------------------------------------------------------------------------------------------ list


def test_the_list_is_a_table_of_all_and_one_is_shown_with_its_sources(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in lines] == ["| protocol", "|" + "---|" * 9, *(f"| {n}" for n in (
        "fap", "apt", "tecoa", "robustvlm", "ttc", "rtpt"))]  # fmt: skip
    assert "| pgd-100 | epsilon/4 | ce | linf 4/255, 1/255 | all | a photo of a {} |" in lines[3]
    main(["--name", "ttc"])
    shown = capsys.readouterr().out
    for words in (
        "- step_size: TTC.sh",
        "commit 793fbff",
        "Not read: whether",
        "Here: the images of its tables are made on the model",
    ):
        assert words in shown
    with pytest.raises(ValueError, match="Unknown protocol 'x'"):
        main(["--name", "x"])


def test_the_table_of_the_docs_has_what_the_data_say():
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    for name, protocol in known_protocols().items():
        (row,) = re.findall(rf"(?m)^\| `{name}` \|.*$", page)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[2] == ", ".join(f"`{attack}`" for attack in protocol.attacks)
        assert (cells[3], cells[4]) == (protocol.step_size or "its own", ", ".join(protocol.epsilon))
        assert protocol.paper.rpartition(" ")[2] in cells[1] and (protocol.images is None) == (cells[5] == "all")
        assert protocol.template in (None, cells[6])
