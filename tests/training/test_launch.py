"""The accelerate configurations of `examples/accelerate`: read by Accelerate itself and, where there is a way, run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))}
QUICK = [
    "--use_cpu", "--max_steps", "2", "--shots", "2", "--per_device_train_batch_size", "5", "--eval_limit", "8", "--eval_attack",
    "pgd-1", "--attack_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true", "--logging_steps", "1",
]  # fmt: skip


def launched_with(name):
    """The settings that Accelerate's launcher makes of a configuration."""
    return _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(CONFIGS[name]), "train.py"])
    )[0]


def test_there_is_a_configuration_for_every_way():
    assert list(CONFIGS) == ["ddp_cpu", "ddp_gpus", "deepspeed_zero2", "fsdp2"]


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(CONFIGS[name]))
    assert (config.num_processes, config.mixed_precision) == (2, "no")


def test_fsdp2_and_zero_2_reach_the_processes_as_such():
    environment = prepare_multi_gpu_env(launched_with("fsdp2"))
    assert (environment["ACCELERATE_USE_FSDP"], environment["FSDP_VERSION"]) == ("true", "2")
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == environment["FSDP_OFFLOAD_PARAMS"] == "false"
    arguments = launched_with("deepspeed_zero2")
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What examples/train.py wrote in two processes on a CPU, by configuration."""
    folders = {}
    for name in ("ddp_cpu", "fsdp2"):
        folders[name] = tmp_path_factory.mktemp(name) / "out"
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS[name])]
        command = [*launch, "--main_process_port", "0", str(ROOT / "examples" / "train.py"), *QUICK]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, "--output_dir", str(folders[name])], env=environment, capture_output=True, text=True, check=False,
            timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    return folders


def test_the_script_runs_in_two_processes_sharded_or_not_with_the_same_result(runs):
    results = {name: json.loads((folder / "results.json").read_text()) for name, folder in runs.items()}
    assert {result["training"]["processes"] for result in results.values()} == {2}
    assert results["ddp_cpu"]["evaluation"] == results["fsdp2"]["evaluation"]
    whole, sharded = (load_file(runs[name] / "adapter_model.safetensors") for name in ("ddp_cpu", "fsdp2"))
    assert all(tensor.equal(sharded[name]) for name, tensor in whole.items())
