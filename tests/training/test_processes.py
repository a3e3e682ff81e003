"""Two processes train like one: gradients, uneven batches, a failure that one of them sees; what is refused."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from capt_peft import CaptTrainer, CaptTrainingArguments
from capt_peft.training.arguments import check_processes

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def load_ranks():
    spec = importlib.util.spec_from_file_location("ranks", FOLDER / "ranks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RANKS = load_ranks()


def two_processes(folder, *tasks, port):
    """Runs `ranks.py` in two processes; one that waits forever for the other fails by the time limit."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    everything = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [*command, str(FOLDER / "ranks.py"), str(folder), *tasks], env=everything, capture_output=True, text=True,
        check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-10000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    RANKS.run_cases(folder)
    RANKS.run_and_save(folder)
    return folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return two_processes(tmp_path_factory.mktemp("ddp"), *RANKS.CASES, "stopped", port=29651)


def check_gradients(one, two, case):
    """Equal over the ranks to the last bit, and to one process's up to the rounding of sums in another order."""
    expected, first, second = (
        load_file(f / f"{case}-{rank}.safetensors") for f, rank in ((one, 0), (two, 0), (two, 1))
    )
    assert expected.keys() == first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    steps = {name.split(".")[0] for name in expected}
    assert len(steps) > 1
    for step in steps:
        own = [torch.cat([g[n].flatten() for n in sorted(g) if n.startswith(f"{step}.")]) for g in (expected, first)]
        # float32 rounds at 1.2e-7, and each gradient is a sum over images that are now summed in another order
        assert (own[1] - own[0]).norm() <= 2e-6 * own[0].norm(), f"{case}, step {step}"


def check_adapter(one, two):
    expected, found = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (one, two))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", RANKS.CASES)
def test_two_processes_have_the_gradients_of_one_with_the_same_global_batch(one, ddp, case):
    check_gradients(one, ddp, case)


def test_two_processes_end_at_the_adapter_of_one(one, ddp):
    check_adapter(one, ddp)
    assert list((ddp / "out").glob("checkpoint-*"))


def test_the_frozen_models_features_have_the_same_bits_whatever_the_number_of_processes(one, ddp):
    expected, *found = (load_file(f / f"frozen-{rank}.safetensors") for f, rank in ((one, 0), (ddp, 0), (ddp, 1)))
    assert expected["features"].abs().sum(-1).min() > 0
    assert all(torch.equal(each["features"], expected["features"]) for each in found)


def test_a_nan_on_one_rank_stops_all_with_its_images_named(ddp):
    messages = [(ddp / f"stopped-{rank}.txt").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert re.match(r"The loss is nan at step 1 \(images \d+, .* on rank 1 of 2", messages[0])


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_arguments_that_would_shard_parameters_are_refused(tmp_path, name):
    with pytest.raises(
        ValueError, match=rf"^{name} is set, but CaptTrainer does not shard .*accelerate launch --multi_gpu"
    ):
        CaptTrainingArguments(str(tmp_path), use_cpu=True, **{name: "full_shard"})


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_a_launcher_that_would_shard_parameters_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match=f"^{name} is set"):
        CaptTrainingArguments(str(tmp_path), use_cpu=True)


@pytest.mark.parametrize("plugin", ["fsdp_plugin", "deepspeed_plugins"])
def test_an_accelerator_that_would_shard_parameters_is_refused_before_any_work(tmp_path, monkeypatch, plugin):
    args = CaptTrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setitem(AcceleratorState._shared_state, plugin, SimpleNamespace())
    with pytest.raises(ValueError, match=f"^Accelerate's {plugin} is set"):
        CaptTrainer(None, args, task=None, processor=None)


def test_processes_that_would_train_apart_are_refused(monkeypatch):
    """torchrun on a CPU without use_cpu: Accelerate lets each process think that it is alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but each would train for itself"):
        check_processes(SimpleNamespace(world_size=1))


def test_one_process_uses_one_gpu_rather_than_splitting_the_class_texts_over_all(caplog):
    args = SimpleNamespace(world_size=1, n_gpu=2, _n_gpu=2)
    check_processes(args)
    assert args._n_gpu == 1
    assert "One process uses one GPU, the first of 2" in caplog.text
