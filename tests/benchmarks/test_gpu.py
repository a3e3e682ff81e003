"""benchmarks/gpu.py: its step is the trainer's, it needs no data sets, goes on where it was, and keeps to its time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
from helpers import compiles
from training_helpers import frozen_logits

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_parts  # noqa: E402
from precision_modes import Mode  # noqa: E402
from step_reference import Setting  # noqa: E402

MISSING = ("datasets", "dill", "joblib", "multiprocess", "pandas", "pyarrow", "pytest", "sklearn", "xxhash")
WITHOUT = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name.split(".")[0] in {MISSING} else find(name, *args)
"""


def prompts(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", ["float32", "bf16"])
def test_its_step_is_that_of_the_trainer(mode):
    measured = Mode(mode, Setting(batch=3, steps=2, attack_loss="ce", tiny=True))
    trainer, inputs = measured.trainer, measured.inputs
    measured.step()
    loss, expected = measured.step(), prompts(measured.model)
    indices = inputs["index"].tolist()
    step = gpu_parts.Step(
        measured.model, trainer.classifier.text_inputs(), inputs["pixels"], inputs["labels"], indices,
        frozen_logits(trainer, inputs["pixels"], indices), trainer.args.train_attack, mode == "bf16", trainer.args.seed,
    )  # fmt: skip
    torch.testing.assert_close(step.run(), loss)
    found = prompts(measured.model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    step.seed += 1
    assert not torch.equal(step.run(), loss)


@compiles
def test_a_compiled_step_has_the_graphs_of_a_compiled_run():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = gpu_parts.make_step(4, device="cpu", tiny=True)
    eager = step.run()
    step.compile("aot_eager")
    for _ in range(2):
        torch.testing.assert_close(step.run(), eager)
        step.floor()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # clean and adversarial, attack; texts
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_it_runs_where_nothing_but_torch_transformers_and_peft_is_installed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    paths = os.pathsep.join([str(tmp_path), str(BENCHMARKS.parent)])
    run = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--tiny", "--json", "r.json", "--only"]
    environment = os.environ | {"PYTHONPATH": paths}
    for only in ("step, 4 images, bf16", "pgd-20", "tests"):
        done = subprocess.run([*run, only], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    step, attack, tests = (record["parts"][name] for name in ("step, 4 images, bf16", "pgd-20", "tests"))
    assert 0 < step["share_of_floor"] < 1.5 and step["images_per_second"] == pytest.approx(4 / step["seconds"])
    assert step["peak_bytes_above_model"] >= 0 and step["precision"] == "bf16" and len(step["rounds"]) == 5
    assert attack["standing"] == attack["images"] == 8 and attack["passes_per_image"] == 40
    assert tests == {"not_run": "pytest and datasets not found here"}
    assert record["versions"]["torch"] == torch.__version__ and record["machine"].startswith("CPU")
    for words in ("| 4 images, bf16 |", "| pgd-20 |", "Not run: tests: pytest and datasets"):
        assert words in done.stdout


def test_a_failure_is_named_and_does_not_end_it():
    part = gpu.Part("step", 60, "measure_step", {"batch": 0})
    assert gpu.run_part(part, 60)["not_run"].startswith("it failed: TypeError")


def test_a_part_is_stopped_at_its_limit():
    found = gpu.within([sys.executable, "-c", "import time; time.sleep(60)"], 1, lambda done: {"seconds": 0})
    assert found == {"not_run": "it was stopped after 1 seconds"}


@pytest.fixture
def measured(monkeypatch):
    """The parts that are run, which take no time."""
    names = []

    def run_part(part, seconds):
        names.append(part.name)
        assert 0 < seconds <= part.limit
        return {"not_run": "it failed"} if part.name == "tests" else {"seconds": 1.0}

    monkeypatch.setattr(gpu, "run_part", run_part)
    return names


def test_it_goes_on_where_it_was(tmp_path, measured):
    run = ["--device", "cpu", "--tiny", "--json", str(tmp_path / "r.json")]
    gpu.main([*run, "--only", "step"])
    first = list(measured)
    assert first == [part.name for part in gpu.parts("cpu", tiny=True) if "step" in part.name]
    record = gpu.main(run)
    assert measured[len(first) :] == ["pgd-20", "tests", "autoattack"]
    measured.clear()
    assert gpu.main(run)["parts"].keys() == record["parts"].keys() and measured == ["tests"]  # what failed, again


def test_what_does_not_fit_into_the_time_is_listed(tmp_path, measured, capsys):
    record = gpu.main(["--device", "cpu", "--tiny", "--minutes", "0.1", "--json", str(tmp_path / "r.json")])
    assert measured == [] and {found["not_run"] for found in record["parts"].values()} == {
        "no time was left of 0.1 minutes"
    }
    assert "Not run: autoattack: no time was left" in capsys.readouterr().out


def test_a_gpu_has_all_modes_and_all_of_it_fits_into_its_time():
    parts = gpu.parts("cuda", tiny=False)
    steps = [part.settings for part in parts if part.measures == "measure_step"]
    assert {(step["batch"], step["precision"], step["compiled"]) for step in steps} == {
        (batch, precision, compiled) for batch in (32, 256)
        for precision, compiled in (("float32", False), ("tf32", False), ("bf16", False), ("float32", True))
    }  # fmt: skip
    assert max(part.limit for part in parts) < 60 * 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cuda"], "no CUDA GPU here; use --device cpu"),
        (["--only", "fp8"], "--only 'fp8' is in the name of no part"),
        (["--json", "other.json"], "other.json is of another machine, model or version"),
    ],
)
def test_bad_arguments_give_one_sentence(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text('{"model": "another"}')
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--device", "cpu", "--tiny", *arguments])
    assert words in str(stop.value) and "\n" not in str(stop.value)
