"""The folder that a run writes into: tried and locked before the run, without secrets after it, of any name."""

import errno
import os
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from children import fork_server, train
from safetensors.torch import load_file
from training_helpers import adapter_of, make_trainer
from transformers import TrainerCallback

from capt_peft.evaluation import wilson_interval
from capt_peft.results.hub import save_run
from capt_peft.results.run import RunResults
from capt_peft.training.checkpoints import read_manifest

STEPS = {"save_strategy": "steps", "save_steps": 2}
FORKS = fork_server()


def run(*arguments, **settings):
    """Trains in a process of its own; returns its exit code."""
    process = FORKS.Process(target=train, args=arguments, kwargs=settings)
    process.start()
    process.join(120)
    return process.exitcode


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "results.json"])
def test_a_pipe_in_the_place_of_a_file_is_refused_when_training_begins(tmp_path, processor, name):
    trainer = make_trainer(tmp_path, processor)
    os.mkfifo(tmp_path / "out" / name)
    with pytest.raises(ValueError, match=f"a pipe has that name: .*{name}"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_of_two_runs_in_one_folder_the_second_is_refused_while_the_first_runs(tmp_path, processor):
    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                assert run(str(tmp_path), **STEPS) == 1

    trainer = make_trainer(tmp_path, processor, **STEPS)
    trainer.add_callback(Second())
    trainer.train()
    assert trainer.state.global_step == 6
    assert run(str(tmp_path), **STEPS) == 0
    assert names_in(tmp_path / "out") == ["checkpoint-4", "checkpoint-6"]  # two may stay


def test_a_folder_whose_checkpoint_was_found_is_kept_for_the_run(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, max_steps=1)
    trainer.find_checkpoint(None)
    assert run(str(tmp_path), save_strategy="no") == 1
    trainer.train()
    assert run(str(tmp_path), save_strategy="no") == 1  # its results are still to be written
    trainer.unlock()
    assert run(str(tmp_path), save_strategy="no") == 0


# -------------------------------------------------------------------------------------------- what is left in folders


def test_no_file_of_a_run_holds_a_token_and_all_have_the_permissions_of_new_files(tmp_path, processor, monkeypatch):
    secrets = {"hub_token": "hf_argumentsecret", "HF_TOKEN": "hf_environmentsecret", "WANDB_API_KEY": "wandbsecret"}
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secrets[name])
    trainer = make_trainer(tmp_path, processor, hub_token=secrets["hub_token"], eval_attack="pgd-1", **STEPS)
    trainer.train()
    trainer.save_model()
    low, high = wilson_interval(6, 12)
    values = {"": 0.5, "_low": low, "_high": high}
    measured = {f"before_{kind}_accuracy{end}": v for kind in ("clean", "robust") for end, v in values.items()}
    measured = {"before_n": 12, **measured}
    after = {name.replace("before", "after"): value for name, value in measured.items()}
    results = RunResults.of(trainer, measured, after, method="capt", split="test", seconds=1.0, shots="16")
    save_run(trainer.model, results, tmp_path / "out", "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"training_args.bin", "adapter_model.safetensors", "results.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        if zipfile.is_zipfile(path):
            content += b"".join(map(zipfile.ZipFile(path).read, zipfile.ZipFile(path).namelist()))
        assert not [name for name, secret in secrets.items() if secret.encode() in content], path
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert trainer.args.hub_token == secrets["hub_token"]


@pytest.mark.parametrize("name", ["x" * 255, "🦆" * 63, "a. "], ids=["long", "emoji", "dot"])
def test_a_run_ends_in_a_folder_of_any_name(tmp_path, processor, name):
    settings = {"output_dir": str(tmp_path / name), "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, processor, **settings)
    trainer.train()
    trainer.save_model()
    read_manifest(tmp_path / name / "checkpoint-1")
    saved = load_file(tmp_path / name / "adapter_model.safetensors")
    assert all(torch.equal(saved[key.replace(".default", "")], tensor) for key, tensor in adapter_of(trainer).items())
    make_trainer(tmp_path, processor, **settings).train(resume_from_checkpoint=True)


def test_a_name_from_which_no_adapter_can_be_loaded_is_refused_when_training_begins(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, output_dir=str(tmp_path / "caf\udce9"))
    with pytest.raises(ValueError, match=r"output_dir='.*caf\\udce9' is not UTF-8"):
        trainer.train()


def test_a_model_that_finds_no_space_at_the_end_is_kept_elsewhere_and_its_checkpoints_stay(tmp_path, processor):
    home = tmp_path / "out"
    trainer = make_trainer(tmp_path, processor, **STEPS)
    trainer.train()

    def full(folder, **kwargs):
        if str(home) in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        (Path(folder) / "adapter").write_text("")

    trainer.model.save_pretrained = full
    with pytest.raises(OSError, match=r"No space left on device.* What was to be saved is in ") as caught:
        trainer.save_model()
    rescue = Path(str(caught.value).split("is in ")[1].split(": move")[0])
    assert (rescue / "adapter").is_file()
    shutil.rmtree(rescue)
    assert names_in(home) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
