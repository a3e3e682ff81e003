"""capt-peft reproduce: what it needs, what it runs, killed and resumed, and bad input; on made-up data sets in CoOp's layout."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from coop_data import write_data_set
from helpers import TINY_CLIP
from transformers import AutoProcessor, CLIPConfig, CLIPModel

from capt_peft.attacks.protocols import known_protocols
from capt_peft.benchmark import Lines, get_suite, read_lines
from capt_peft.commands import reproduce
from capt_peft.commands.parser import Parser
from capt_peft.data import CATALOG
from capt_peft.methods import METHODS
from capt_peft.training import CaptTrainingArguments
from capt_peft.tuner import CaptConfig

SUITE = get_suite("paper")
CLASSES = 4


def make_small():
    """Makes a run of everything short, in this process: data sets of 4 classes are whole, and attacks have a step."""
    for name in (*SUITE.tasks, *SUITE.shifts):
        CATALOG[name] = replace(CATALOG[name], num_classes=CLASSES)
    for name, recipe in reproduce.recipes().items():
        known_protocols()[name] = replace(known_protocols()[name], attacks=("pgd-1",))
        parts = [part | ({"attacks": ["apgd-ce-1"]} if "attacks" in part else {}) for part in recipe.parts]
        reproduce.recipes()[name] = recipe._replace(parts=parts)


def cells(*arguments):
    (args,) = Parser(reproduce.Arguments).into_dataclasses(list(arguments))
    return reproduce.make_cells(args)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A random CLIP of a small shape, and all data sets of the paper suite as CoOp's users have them, with 4 classes each."""
    folder = tmp_path_factory.mktemp("reproduce")
    torch.manual_seed(0)
    CLIPModel(CLIPConfig.from_pretrained(TINY_CLIP)).save_pretrained(folder / "clip")
    AutoProcessor.from_pretrained(TINY_CLIP).save_pretrained(folder / "clip")
    for name in (*SUITE.tasks, *SUITE.shifts):
        write_data_set(CATALOG[name], folder / "data", range(CLASSES))
    return folder


def arguments(place, protocol="fap", **changes):
    given = {
        "model_name_or_path": place / "clip",
        "root": place / "data",
        "methods": "zero-shot,fap",
        "shots": "16",
        "seeds": "0",
    }
    given |= {"settings": "max_steps=2"} | changes
    return ["--protocol", protocol, *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


# ------------------------------------------------------------------------------------------------------------- what runs


def start(words):
    """Starts it, small, in a process of its own."""
    folder = Path(__file__).parent
    paths = os.pathsep.join(map(str, (folder.parents[1], folder.parent, folder)))
    code = f"import test_reproduce as t; t.make_small(); t.reproduce.main({words!r})"
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **own}, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """All data sets, killed while a cell runs, and started again; then few-shot and base-to-new of one."""
    output = tmp_path_factory.mktemp("run") / "fap.jsonl"
    every = arguments(place, output=output, protocols="cross-dataset,shift")
    process, deadline = start(every), time.monotonic() + 240
    while not (output.exists() and output.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = output.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        reproduce.main(every)
        reproduce.main(arguments(place, output=output, protocols="few-shot,base-to-new", tasks="dtd"))
    yield output, begun


def small(patch):
    for known in (CATALOG, known_protocols(), reproduce.recipes()):
        for name, value in known.items():
            patch.setitem(known, name, value)  # what it was before
    make_small()


@pytest.mark.timeout(600)
def test_killed_and_started_again_it_goes_on_and_runs_nothing_twice(run):
    output, begun = run
    assert 1 <= begun.count(b"\n") < 6
    assert output.read_bytes().startswith(begun[: begun.rfind(b"\n") + 1])
    lines = list(Lines(output).read().values())
    assert output.read_bytes().count(b"\n") == len(lines) == 2 * (1 + 1 + 1 + 1 + 1)
    assert {line["status"] for line in lines} == {"finished"}
    steps = {line["training"]["steps"] for line in lines if line["training"]}
    measured = {result["task"] for line in lines for result in line["results"]}
    assert steps == {2} and measured == {*SUITE.tasks, *SUITE.shifts}
    # cross-dataset, shift and APGD are of one adapter
    assert len(list(output.with_suffix(".adapters").glob("*/training.json"))) == 1 + 1 + 1


def cell_of(text, table, row, at):
    """Returns what a table of published.md has in the row of a method at a column: published, here, difference."""
    lines = text.split(f"### {table}")[1].split("###")[0].splitlines()
    (found,) = [line for line in lines if line.startswith(f"| {row} | {at} |")]
    return [part.strip() for part in found.split("|")[3:6]]


def test_our_figures_stand_beside_the_published_ones(run):
    output, _ = run
    text = (output.with_suffix("") / "published.md").read_text()
    assert "CAPT's paper (arXiv 2405.11154) gives no figure that could be read" in text
    assert "Settings in place of the published ones: max_steps=2." in text
    found = {(line.cell.method, line.cell.protocol, line.cell.evaluation_protocol): line for line in read_lines(output)}
    results = found["fap", "cross-dataset", "fap"].results
    assert [result.task for result in results] == list(SUITE.tasks)
    clean = [100 * result.clean.value for result in results]
    robust = [100 * result.by_protocol.value for result in results]
    table = "Cross-dataset, ImageNet at 16 shots to 10 other data sets"
    here = f"{clean[0]:.1f} / {robust[0]:.1f}", f"{clean[0] - 52.53:+.1f} / {robust[0] - 22.90:+.1f}"
    assert cell_of(text, table, "FAP", "imagenet") == ["52.53 / 22.90", *here]
    means = sum(clean) / 11, sum(robust) / 11
    here = f"{means[0]:.1f} / {means[1]:.1f}", f"{means[0] - 47.76:+.1f} / {means[1] - 24.23:+.1f}"
    assert cell_of(text, table, "FAP", "average of 11, ImageNet among them") == ["47.76 / 24.23", *here]
    assert cell_of(text, table, "CBA-FAPT", "imagenet") == ["53.87 / 23.43", "-", "-"]
    assert "robust: under the protocol fap (pgd-1, step size 1/255), L-inf 1/255" in text


def test_what_was_not_measured_stays_empty(run):
    output, _ = run
    text = (output.with_suffix("") / "published.md").read_text()
    of_data_sets = "Few-shot, data sets of which 16 shots were read"
    assert cell_of(text, of_data_sets, "FAP", "dtd")[1] != "-" == cell_of(text, of_data_sets, "FAP", "ucf101")[1]
    average = "Few-shot, averaged over 11 data sets"
    assert cell_of(text, average, "FAP", "16 shots") == ["65.32 / 34.61", "-", "-"]
    assert cell_of(text, average, "AdvTP", "16 shots") == ["60.73 / 6.42", "-", "-"]
    assert "fap at 16 shots (1 of 11)" in text
    assert "Not comparable: † CoAPT" in text and "Robust: under PGD-100, step size 1/255" in text


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("protocol", ["fap", "apt"])
def test_every_method_can_be_tuned_with_its_settings(protocol, method, tmp_path):
    """Its prompts fit a ViT-B/32 and its training arguments are what CaptTrainingArguments takes."""
    for cell in {
        cell.training_key: cell for cell in cells("--protocol", protocol, "--methods", method, "--seeds", "0")
    }.values():
        if cell.tuned:
            CaptConfig(**{"class_names": ["a", "b"], **cell.prompts})
            CaptTrainingArguments(str(tmp_path), use_cpu=True, **cell.settings)


def test_what_is_run_is_what_is_published():
    """FAP: five numbers of shots, half the epochs on ImageNet. APT: a robust CLIP for each radius, its context for APT alone."""
    fap = [cell for cell in cells("--protocol", "fap") if cell.method == "fap"]
    assert {(cell.protocol, cell.shots, cell.settings["num_train_epochs"]) for cell in fap} == {
        *(("few-shot", shots, 10) for shots in (1, 2, 4, 8, 16)),
        *(("base-to-new", 16, 10), ("cross-dataset", 16, 5), ("shift", 16, 5)),
    }
    assert {cell.seed for cell in fap} == {0, 1, 2} and {cell.model for cell in fap} == {"openai/clip-vit-base-patch32"}
    told = {(cell.evaluation_protocol, cell.attacks, cell.eval_step_size, cell.epsilon, cell.limit) for cell in fap}
    assert told == {("fap", ("pgd-100",), "1/255", "1/255", None), (None, ("apgd-ce", "apgd-dlr"), None, "1/255", None)}
    apt = [cell for cell in cells("--protocol", "apt", "--seeds", "0") if cell.tuned]
    assert {(cell.epsilon, cell.model, cell.eval_step_size) for cell in apt} == {
        ("4/255", "tecoa4-vit-b32-apt", "1/255"), ("1/255", "tecoa-vit-b32", "1/1020"),
    }  # fmt: skip
    words = {cell.method: (cell.prompts["template"], cell.prompts.get("num_text_tokens")) for cell in apt}
    assert words.pop("adv-tp") == ("X " * 16 + "{}.", 16)
    assert words.pop("adv-vp")[0] == "a photo of a {}." and set(words.values()) == {("a photo of a {}.", 2)}
    assert {cell.shots for cell in apt if cell.protocol == "few-shot"} == {1, 4, 16, "all"}


def test_a_part_of_it_has_the_cells_of_the_whole():
    """So that several people, or several calls, add to one table."""
    whole = {cell.key for cell in cells("--protocol", "fap") if "apgd-ce" not in cell.attacks}
    part = [
        "--protocol",
        "fap",
        "--methods",
        "apt,zero-shot",
        "--seeds",
        "2",
        "--shots",
        "4",
        "--protocols",
        "few-shot",
    ]
    few = cells(*part, "--tasks", "dtd,eurosat")
    assert len(few) == 4 and {cell.key for cell in few} < whole
    assert {(cell.method, cell.seed) for cell in few} == {("zero-shot", 0), ("adv-tp", 2)}


def test_settings_win_over_the_published_ones_for_every_method():
    found = [cell for cell in cells("--protocol", "fap", "--settings", "num_train_epochs=1,bf16=true") if cell.tuned]
    assert {(cell.settings["num_train_epochs"], cell.settings["bf16"]) for cell in found} == {(1.0, True)}


# --------------------------------------------------------------------------------------------------------- what it needs


def test_the_list_says_what_is_there_what_it_costs_and_runs_nothing(place, tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    words = arguments(place, output=tmp_path / "lines.jsonl", methods="zero-shot,fap,capt", shots="1,16", seeds="0,1")
    reproduce.main([*words, "--list"])
    shown = capsys.readouterr().out
    assert f"| imagenet | yes | 144 | {place}/data/imagenet | ImageNet terms:" in shown
    assert "| 1/255 | few-shot | 16 shots | pgd-1 | 44 | 0 |" in shown and "register at https://image-net.org" in shown
    assert "hours, guessed from operations and one NVIDIA H200" in shown and "199 GB, and 2 of unknown size" in shown
    adapters = 2 * 2 * (11 * 2 + 11 + 1)
    assert f"The {adapters} adapters take up to {adapters // 2 * 0.016:.1f} GB beside the lines." in shown
    assert list(tmp_path.iterdir()) == []


def test_the_list_knows_what_is_finished_and_goes_by_its_pace(place, run, capsys, monkeypatch):
    small(monkeypatch)
    output, _ = run
    reproduce.main([*arguments(place, output=output, protocols="cross-dataset,shift"), "--list"])
    shown = capsys.readouterr().out
    assert "| 1/255 | shift | 16 shots | pgd-1 | 1 | 1 | 0.0 |" in shown
    assert "Left: about 0.0 hours, guessed from operations and the pace of the 6 finished cells" in shown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": "tecoa"}, "Unknown protocol tecoa. Allowed here: fap, apt."),
        ({"suite": "toy"}, "Unknown suite toy. Allowed here: paper."),
        ({"shots": "3"}, "Unknown shots 3. Allowed here: 1, 2, 4, 8, 16."),
        ({"protocols": "fap"}, "Unknown protocols fap. Allowed here: few-shot"),
        ({"methods": "magic"}, "Unknown method 'magic'"),
        ({"tasks": "cifar10"}, "Unknown tasks cifar10. Allowed: imagenet"),
        ({"seeds": "x"}, "seed='x'"),
        ({"epsilon": "2/255"}, "protocol fap is of epsilon 1/255, not 2/255"),
        ({"settings": "epsilon=2/255"}, "--settings epsilon would change what is published"),
        ({"settings": "learning_rat=1"}, "unknown settings learning_rat"),
        ({"protocol": "apt"}, "has one for each of 4/255, 1/255: give --epsilon too."),
        ({"root": "/nowhere"}, "There is no folder /nowhere (--root)."),
        ({"model_name_or_path": "./nowhere"}, "There is no folder ./nowhere (--model_name_or_path)."),
    ],
)
def test_bad_input_is_one_sentence_before_anything_runs(place, tmp_path, capsys, changes, words):
    with pytest.raises(ValueError) as caught:
        reproduce.main(arguments(place, **{"output": tmp_path / "lines.jsonl", **changes}))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_settings_given_twice_are_refused_and_not_lost(place, tmp_path):
    words = arguments(place, output=tmp_path / "lines.jsonl")
    with pytest.raises(ValueError, match="--settings is given twice: write all of them behind one"):
        reproduce.main([*words, "--settings=bf16=true"])
    assert list(tmp_path.iterdir()) == []


def test_data_sets_and_weights_that_are_missing_are_named_before_anything_runs(place, tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    words = [
        "--protocol",
        "apt",
        "--epsilon",
        "4/255",
        "--root",
        str(tmp_path),
        "--output",
        str(tmp_path / "lines.jsonl"),
    ]
    write_data_set(CATALOG["dtd"], tmp_path, range(CLASSES))
    (tmp_path / "dtd" / "images" / "0_0.png").unlink()
    write_data_set(CATALOG["eurosat"], tmp_path, range(CLASSES - 1))
    with pytest.raises(ValueError) as caught:
        reproduce.main([*words, "--protocols", "few-shot", "--tasks", "dtd,eurosat,ucf101"])
    told = str(caught.value)
    assert told.startswith(
        "Not all is there that is needed: tecoa4-vit-b32-apt is not on the Hub: get its file from https://github.com"
    )
    assert "`capt-peft backbones tecoa4-vit-b32-apt --checkpoint FILE`" in told and "\n" not in told
    assert (
        "dtd is not whole: 1 of the 72 images that" in told
        and "eurosat is not whole: " in told
        and "and 1 more" in told
    )
    shown = capsys.readouterr().out
    assert (
        "has images of 3 of its 4 classes" in shown
        and f"- ucf101 is missing: {tmp_path} has no folder ucf101." in shown
    )
    assert "| dtd | not whole |" in shown and "| ucf101 | no |" in shown and not (tmp_path / "lines.jsonl").exists()
