"""Above 1,000 classes each of two processes runs half of the texts, and both train like one that runs all of them.

torchrun --standalone --nproc_per_node 2 tests/training/test_shared_texts.py FOLDER   (what the tests start)
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import TINY_CLIP, shake
from PIL import Image
from safetensors.torch import load_file, save_file
from training_helpers import make_model, make_trainer
from transformers import AutoProcessor, TrainerCallback

from capt_peft import Task, get_method
from capt_peft.data.task import task_features
from capt_peft.text_parts import SHARED_ABOVE

TESTS = Path(__file__).parents[1]
GLOBAL_BATCH, IMAGES, STEPS = 8, 11, 2  # the second step has 3 images, all of them the first process's
# classes, method, prompts, arguments; 1,001 and 1,003 texts do not come out even, and some run twice
CASES = {
    "one context": (1001, "capt", {}, {}),
    "class-specific accumulated": (1003, "capt", {"class_specific": True}, {"gradient_accumulation_steps": 2}),
    "parts of 100": (1003, "capt", {}, {"text_chunk_size": 100, "activation_checkpointing": True}),
    "one part each": (1001, "capt", {"class_specific": True}, {"text_chunk_size": 600}),
    "coupled fap in chunks": (1002, "fap", {"coupling": "vision_to_text"}, {"image_chunk_size": 2}),
    "not shared": (1000, "capt", {}, {}),
}
SHARED = [name for name, case in CASES.items() if case[0] > SHARED_ABOVE]


class Gradients(TrainerCallback):
    """Keeps the gradients that each optimizer step is about to use."""

    def __init__(self):
        self.tensors = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.tensors[f"{state.global_step} {name}"] = parameter.grad.clone()


class Rows:
    """Counts the texts that the text tower runs with gradients, in forward passes and again in backward passes."""

    def __init__(self, text_model):
        self.forward = self.again = 0
        text_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        rows = len(kwargs["input_ids"])
        if torch._C._current_graph_task_id() >= 0:  # autograd is at work
            self.again += rows
        elif torch.is_grad_enabled():  # the frozen model is run without
            self.forward += rows


def few_images(classes):
    """Noisy images of a few of many classes, under short names that stand for nothing and differ in length."""
    names = [f"thing {number}" if number % 3 else f"old thing {number} here" for number in range(classes)]
    labels = [place * 97 % classes for place in range(IMAGES)]
    pixels = np.random.default_rng(0).integers(0, 255, (IMAGES, 32, 32, 3), dtype=np.uint8)
    rows = {"image": [Image.fromarray(image) for image in pixels], "label": labels}
    return Task("things", names, {"train": datasets.Dataset.from_dict(rows, features=task_features(names))})


def run(folder, name):
    """Runs a case; leaves each step's gradients, losses and gradient norms, and how many texts ran."""
    classes, method, prompts, arguments = CASES[name]
    task, recipe = few_images(classes), get_method(method)
    names = {"class_names": list(task.class_names)} if prompts.get("class_specific") else {}
    model = make_model(**prompts, **names)
    shake(model)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    size = GLOBAL_BATCH // processes // arguments.get("gradient_accumulation_steps", 1)
    trainer = make_trainer(
        folder, AutoProcessor.from_pretrained(TINY_CLIP), task=task, model=model, per_device_train_batch_size=size,
        num_train_epochs=1, attack_steps=1, learning_rate=1e-4, max_grad_norm=1e9, **recipe.attack, **arguments,
    )  # fmt: skip
    trainer.objective = recipe.objective(trainer.args)
    gradients, rows = Gradients(), Rows(trainer.classifier.base_model.text_model)
    trainer.add_callback(gradients)
    trainer.train()
    log = [[line["loss"], line["grad_norm"]] for line in trainer.state.log_history if "loss" in line]
    found = {"log": log, "forward": rows.forward, "again": rows.again}
    path = folder / f"{name}-{os.environ.get('RANK', '0')}"
    save_file(gradients.tensors, f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps(found))


def read(folder, name, rank=0):
    path = folder / f"{name}-{rank}"
    return load_file(f"{path}.safetensors"), json.loads(Path(f"{path}.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    for name in CASES:
        run(folder, name)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_processes_that_share_the_texts_have_the_gradients_of_one_that_runs_all(one, two, name):
    (expected, alone), (first, told), (second, _) = read(one, name), read(two, name), read(two, name, rank=1)
    assert expected.keys() == first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for step in range(STEPS):
        keys = [key for key in expected if key.startswith(f"{step} ")]
        own, whole = (torch.cat([tensors[key].flatten() for key in keys]) for tensors in (first, expected))
        # sums over 1,000 texts and 8 images, in another order
        assert (own - whole).norm() <= 1e-5 * whole.norm() and whole.norm() > 0.01, f"step {step}"
    assert np.shape(told["log"]) == (STEPS, 2)
    np.testing.assert_allclose(told["log"], alone["log"], rtol=1e-5)


@pytest.mark.parametrize("name", SHARED)
def test_each_process_runs_half_of_the_texts(one, two, name):
    classes, _, _, arguments = CASES[name]
    times = STEPS * arguments.get("gradient_accumulation_steps", 1)
    times -= "accumulated" in name  # the last step has one batch for each process, of 2 or 1 images
    alone = read(one, name)[1]
    for rank in (0, 1):
        told = read(two, name, rank)[1]
        assert classes / 2 <= told["forward"] / times <= 1.02 * classes / 2
        assert told["again"] <= 0.52 * alone["again"]


@pytest.mark.parametrize("rank", [0, 1])
def test_up_to_1000_classes_every_process_runs_all_texts(one, two, rank):
    told, alone = read(two, "not shared", rank)[1], read(one, "not shared")[1]
    assert SHARED_ABOVE == 1000 <= told["forward"] / STEPS < 1.02 * 1000
    assert (told["forward"], told["again"]) == (alone["forward"], alone["again"])


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    for case in CASES:
        run(Path(sys.argv[1]), case)
    torch.distributed.destroy_process_group()
