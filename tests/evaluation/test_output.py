"""Where an evaluation is written: tried and locked before anything is measured, and of any name."""

import multiprocessing
import os
from pathlib import Path

import pytest
from toy_models import make_model, some_images

from capt_peft import PGD, ThreatModel, evaluate
from capt_peft.benchmark import run_cells
from capt_peft.evaluation import Evaluation
from capt_peft.evaluation import loop as loop_module
from capt_peft.evaluation.curve import robustness_curves

THREAT = ThreatModel("linf", "4/255")


@pytest.fixture
def model():
    return make_model()


def measure(model, output, **settings):
    pixels = some_images(10)
    return evaluate(
        model, (pixels, model(pixels).argmax(1)), PGD(THREAT, steps=1), output=output, progress=False, **settings
    )


@pytest.mark.parametrize("name", ["x" * 242, "🦆" * 61, "caf\udce9", "v1.5", " a. ", "a\nb"], ids=ascii)
def test_an_evaluation_ends_in_a_file_of_any_name(model, tmp_path, name):
    path = tmp_path / name / f"{name}.json"
    first = measure(model, path)
    assert Evaluation.load(path) == first == measure(model, path)
    assert Evaluation.load(path).examples.num_rows == 10
    assert sorted(os.listdir(path.parent)) == [f"{name}.json", f"{name}.parquet"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["r.json", "r.parquet", "long", "/proc/self/r.json", "file/r.json"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    model, tmp_path, monkeypatch, name, overwrite
):
    monkeypatch.setattr(loop_module, "attack_batch", lambda *_: pytest.fail("it was measured"))
    output = Path("r.json") if name == "r.parquet" else Path(f"{'x' * 248}.json" if name == "long" else name)
    if name.startswith("r."):
        os.mkfifo(tmp_path / name)
    (tmp_path / "file").touch()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=r"Nothing can be written into output=|r\.json is a pipe"):
        measure(model, tmp_path / output, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == before


def test_of_two_evaluations_into_one_file_the_second_is_refused_while_the_first_runs(model, tmp_path, monkeypatch):
    context, attack_batch = multiprocessing.get_context("fork"), loop_module.attack_batch
    said = context.SimpleQueue()

    def second(name):
        try:
            said.put(measure(model, tmp_path / name).clean.n)
        except ValueError as error:
            said.put(str(error))

    def first(*args):
        monkeypatch.setattr(loop_module, "attack_batch", attack_batch)
        for name in ("r.json", "other.json"):
            process = context.Process(target=second, args=(name,))
            process.start()
            process.join()
        return attack_batch(*args)

    monkeypatch.setattr(loop_module, "attack_batch", first)
    result = measure(model, tmp_path / "r.json")
    assert "Another run is writing to" in said.get() and said.get() == 10
    assert Evaluation.load(tmp_path / "r.json") == result
    assert sorted(os.listdir(tmp_path)) == ["other.json", "other.parquet", "r.json", "r.parquet"]


def test_curves_that_cannot_be_drawn_are_refused_before_anything_is_measured(tmp_path):
    os.mkfifo(tmp_path / "curve.png")
    with pytest.raises(ValueError, match="a pipe has that name"):
        robustness_curves(None, None, THREAT, tmp_path / "curve")


@pytest.mark.parametrize("place", ["pipe", "file/lines.jsonl"])
def test_lines_of_a_benchmark_that_cannot_be_written_are_refused_before_a_cell_runs(tmp_path, place):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="Nothing can be written into output="):
        run_cells([], tmp_path / place)
