"""The accelerate configurations of `examples/accelerate`: read by Accelerate itself and, where there is a way, run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))}
QUICK = [
    "--use_cpu", "--max_steps", "2", "--shots", "2", "--per_device_train_batch_size", "5", "--eval_limit", "8", "--eval_attack",
    "pgd-1", "--attack_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true", "--logging_steps", "1",
]  # fmt: skip


def test_there_is_a_configuration_for_every_way():
    assert list(CONFIGS) == ["ddp_cpu", "ddp_gpus"]


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(CONFIGS[name]))
    assert (config.num_processes, config.mixed_precision) == (2, "no")


def test_the_script_runs_in_two_processes_on_a_cpu(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS["ddp_cpu"])]
    command = [*launch, "--main_process_port", "0", str(ROOT / "examples" / "train.py"), *QUICK]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["training"]["processes"] == 2
    assert (tmp_path / "adapter_model.safetensors").is_file()
