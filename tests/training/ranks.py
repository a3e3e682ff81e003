"""What each process of `test_processes.py` runs: short trainings whose gradients and messages are written down.

torchrun --nproc_per_node 2 tests/training/ranks.py FOLDER capt fap_uneven stopped
"""

import json
import os
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from peft import get_peft_model
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor, CLIPModel, TrainerCallback

from capt_peft import CaptConfig, CaptTrainer, CaptTrainingArguments, Task, TrainingStopped, get_method
from capt_peft.data.task import task_features
from capt_peft.toy import TINY_CLIP
from capt_peft.training import frozen

NAMES = ("red circle", "green square", "seven")
GLOBAL_BATCH = 8
# name: method, coupling, accumulation, training images (21 and 11 leave a last batch that the ranks share unevenly)
CASES = {
    "capt": ("capt", "none", 1, 16),
    "capt_coupled_uneven": ("capt", "text_to_vision", 1, 21),
    "capt_coupled_accumulated": ("capt", "text_to_vision", 2, 16),
    "capt_accumulated_uneven": ("capt", "none", 2, 21),
    "fap_coupled": ("fap", "text_to_vision", 1, 16),
    "fap_uneven": ("fap", "none", 1, 11),
    "fap_coupled_accumulated": ("fap", "text_to_vision", 2, 11),
}


PLAIN = {"learning_rate": 1e-4, "num_train_epochs": 5, "eval_attack": "pgd-2", "save_strategy": "epoch"}


class Gradients(TrainerCallback):
    """Keeps the gradients that each optimizer step is about to use."""

    def __init__(self):
        self.tensors = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.tensors[f"{state.global_step}.{name}"] = parameter.grad.detach().clone()


class NanOnOneRank:
    """An objective whose loss is NaN in the second step of the second process."""

    needs_frozen = False
    calls = 0

    def __call__(self, views):
        self.calls += 1
        bad = self.calls == 2 and os.environ.get("RANK") == "1"
        return views.clean.sum() * (float("nan") if bad else 1e-3), {}


def patches(count):
    """Noisy patches of one colour a class, no two images alike."""
    generator = np.random.default_rng(0)
    labels = [place % len(NAMES) for place in range(count)]
    images = generator.integers(0, 120, (count, 32, 32, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[..., label] += 100
    rows = {"image": [Image.fromarray(image) for image in images], "label": labels}
    return Task("patches", NAMES, {"train": datasets.Dataset.from_dict(rows, features=task_features(NAMES))})


def make_trainer(folder, method="capt", coupling="none", accumulation=1, images=16, objective=None, **settings):
    """A trainer whose step has GLOBAL_BATCH images, whatever the number of processes."""
    torch.manual_seed(0)
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    model = get_peft_model(base, CaptConfig(text_depth=2, vision_depth=2, coupling=coupling))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    attack = {name: value for name, value in get_method(method).defaults.items() if name.startswith("attack_")}
    defaults = {
        "use_cpu": True, "num_train_epochs": 1, "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True, "learning_rate": 0.0, "max_grad_norm": 0.0, "attack_steps": 2, "lr_scheduler_type": "constant",
        "per_device_train_batch_size": GLOBAL_BATCH // processes // accumulation,
        "gradient_accumulation_steps": accumulation, **attack,
    }  # fmt: skip
    args = CaptTrainingArguments(str(folder / "out"), **{**defaults, **settings})
    objective = objective or get_method(method).objective(args)
    processor = AutoProcessor.from_pretrained(TINY_CLIP)
    return CaptTrainer(model, args, task=patches(images), processor=processor, objective=objective)


def run_cases(folder, cases=CASES):
    """Runs the cases; writes `<case>-<rank>.safetensors`, the gradients of each step, and the losses beside them."""
    rank = os.environ.get("RANK", "0")
    for name in cases:
        trainer, gradients = make_trainer(folder, *CASES[name]), Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        save_file(gradients.tensors, folder / f"{name}-{rank}.safetensors")
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        (folder / f"{name}-{rank}.json").write_text(json.dumps(log))


def run_and_save(folder):
    """Trains an adapter in steps that change it, through a checkpoint; the first process saves it, alone.

    Every process saves the frozen model's features, which it has computed some batches of.
    """
    usual, frozen.BATCH = frozen.BATCH, 4
    trainer = make_trainer(folder, images=21, coupling="text_to_vision", **PLAIN)
    trainer.evaluate(trainer.train_dataset, metric_key_prefix="before")
    trainer.train()
    trainer.evaluate(trainer.train_dataset, metric_key_prefix="after")
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(folder / "adapter")
    rank = os.environ.get("RANK", "0")
    save_file({"features": trainer._frozen_outputs._features}, folder / f"frozen-{rank}.safetensors")
    frozen.BATCH = usual


def run_until_stopped(folder):
    """Runs into a NaN that one process alone sees; writes down what every process says of it."""
    trainer = make_trainer(folder, objective=NanOnOneRank())
    try:
        trainer.train()
        message = "it went on"
    except TrainingStopped as stopped:
        message = str(stopped)
    (folder / f"stopped-{os.environ['RANK']}.txt").write_text(message)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    output, *tasks = Path(sys.argv[1]), *sys.argv[2:]
    run_cases(output, [task for task in tasks if task in CASES])
    run_and_save(output)
    if "stopped" in tasks:
        run_until_stopped(output)
    PartialState().wait_for_everyone()  # a process that ends while its peer's connection is open can abort
    PartialState().destroy_process_group()
