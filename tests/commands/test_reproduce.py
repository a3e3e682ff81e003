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
from capt_peft.benchmark import Lines, get_suite
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
        reproduce.recipes()[name] = replace(recipe, parts=parts)


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
    """All data sets, killed while the second cell or a later one runs, and started again; then few-shot and base-to-new of two."""
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
        reproduce.main(arguments(place, output=output, protocols="few-shot,base-to-new", tasks="dtd,eurosat"))
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
    assert output.read_bytes().count(b"\n") == len(lines) == 2 * (1 + 1 + 1 + 2 + 2)
    assert {line["status"] for line in lines} == {"finished"}
    steps = {line["training"]["steps"] for line in lines if line["training"]}
    measured = {result["task"] for line in lines for result in line["results"]}
    assert steps == {2} and measured == {*SUITE.tasks, *SUITE.shifts}
    # cross-dataset, shift and APGD are of one adapter
    assert len(list(output.with_suffix(".adapters").glob("*/training.json"))) == 1 + 2 + 2


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
    (line,) = [
        line["results"] for line in Lines(output).read().values()
        if (line["cell"]["method"], line["cell"]["protocol"], line["cell"]["evaluation_protocol"]) == ("fap", "cross-dataset", "fap")
    ]  # fmt: skip
    assert [result["task"] for result in line] == list(SUITE.tasks)
    clean, robust = (
        [100 * result[name]["correct"] / result[name]["n"] for result in line] for name in ("clean", "by_protocol")
    )
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
    assert "fap at 16 shots (2 of 11)" in text
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
