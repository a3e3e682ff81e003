"""Two processes train like one: gradients, uneven batches, a failure that one of them sees, sharded layers, DeepSpeed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from capt_peft import CaptTrainingArguments
from capt_peft.training.sharding import prepare_deepspeed, shard_if_asked

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SHARDED_CASES = ("capt_coupled_uneven", "capt_accumulated_uneven", "fap_coupled_accumulated")


def load_ranks():
    spec = importlib.util.spec_from_file_location("ranks", FOLDER / "ranks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RANKS = load_ranks()


def two_processes(folder, *tasks, port, **environment):
    """Runs `ranks.py` in two processes; one that waits forever for the other fails by the time limit."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    everything = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [*command, str(FOLDER / "ranks.py"), str(folder), *tasks], env=everything, capture_output=True, text=True,
        check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
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


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    return two_processes(tmp_path_factory.mktemp("fsdp2"), *SHARDED_CASES, port=29652, **FSDP2)


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


@pytest.mark.parametrize("case", SHARDED_CASES)
def test_sharded_frozen_layers_change_no_gradient(one, fsdp2, case):
    check_gradients(one, fsdp2, case)


def test_two_processes_end_at_the_adapter_of_one_sharded_or_not(one, ddp, fsdp2):
    for two in (ddp, fsdp2):
        check_adapter(one, two)
        assert list((two / "out").glob("checkpoint-*"))


def test_a_nan_on_one_rank_stops_all_with_its_images_named(ddp):
    messages = [(ddp / f"stopped-{rank}.txt").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert re.match(r"The loss is nan at step 1 \(images \d+, .* on rank 1 of 2", messages[0])


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeeds_zero_2_ends_at_the_adapter_of_one_process(one, tmp_path):
    settings = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    check_adapter(one, two_processes(tmp_path, "zero2", port=29653, **settings))


# ------------------------------------------------------------------------------------------------------ what is refused


def refusal(tmp_path, monkeypatch, environment, model=None, **arguments):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:
        args = CaptTrainingArguments(str(tmp_path), use_cpu=True, **arguments)
        shard_if_asked(model or RANKS.make_trainer(tmp_path).model, args)
    return str(caught.value)


@pytest.mark.parametrize(
    ("environment", "arguments", "words"),
    [
        ({**FSDP2, "FSDP_VERSION": "1"}, {}, "fsdp_version: 2"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params: true does not work"),
        ({**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading: true"),
        (FSDP2, {"torch_compile": True}, "torch_compile does not work with sharded layers"),
        (FSDP2, {"image_chunk_size": 2}, "image_chunk_size does not work with sharded layers"),
        ({}, {"fsdp": "full_shard"}, "examples/accelerate/fsdp2.yaml"),
    ],
)
def test_ways_of_sharding_that_cannot_work_are_refused(tmp_path, monkeypatch, clip, environment, arguments, words):
    assert words in refusal(tmp_path, monkeypatch, environment, model=clip.requires_grad_(False), **arguments)


def test_sharding_refuses_layers_that_are_tuned(tmp_path, monkeypatch, clip):
    assert "encoder layers of this model are tuned" in refusal(tmp_path, monkeypatch, FSDP2, model=clip)


def test_processes_that_would_train_apart_are_refused(clip):
    """torchrun on a CPU without use_cpu: Accelerate lets each process think that it is alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="2 processes were launched, but each would train for itself"):
            shard_if_asked(clip, SimpleNamespace(world_size=1))


@pytest.mark.parametrize(
    ("stage", "precision", "words"),
    [(3, "no", "ZeRO-3 shards all parameters"), (2, "bf16", "mixed_precision=bf16: DeepSpeed casts the model")],
)
def test_deepspeed_is_refused_where_it_cannot_work(clip, stage, precision, words):
    plugin = SimpleNamespace(zero_stage=stage)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision=precision)
    with pytest.raises(ValueError, match=words):
        prepare_deepspeed(clip, accelerator)


def test_deepspeed_on_a_cpu_is_refused_rather_than_left_out(clip, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="leave it out without a word"):
        prepare_deepspeed(clip, SimpleNamespace(state=SimpleNamespace()))
