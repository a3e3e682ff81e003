"""A small task, a small model and a trainer of them, for all tests that train."""

import math

import datasets
import numpy as np
import torch
from helpers import TINY_CLIP
from peft import get_peft_model
from PIL import Image
from transformers import CLIPModel

from capt_peft import CaptConfig, CaptTrainer, CaptTrainingArguments, Task
from capt_peft.data.task import task_features

NAMES = ("red circle", "green square", "seven")


def make_task(per_class=4, names=NAMES, splits=("train", "validation")):
    """Noisy patches of one colour a class: learnable, and no two images alike."""
    generator = np.random.default_rng(0)
    built = {}
    for split in splits:
        labels = list(range(len(names))) * per_class
        images = []
        for label in labels:
            image = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            image[..., label % 3] += 100
            images.append(image)
        features = task_features(names)
        built[split] = datasets.Dataset.from_dict(
            {"image": [Image.fromarray(i) for i in images], "label": labels}, features=features
        )
    return Task("patches", names, built)


def make_model(seed=0, **config):
    torch.manual_seed(seed)
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    return get_peft_model(base, CaptConfig(**{"text_depth": 2, "vision_depth": 2, **config}))


def make_trainer(tmp_path, processor, task=None, model=None, objective=None, attack=None, teacher=None, **args):
    settings = {
        "output_dir": str(tmp_path / "out"), "use_cpu": True, "num_train_epochs": 2, "per_device_train_batch_size": 4,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 0.05,
    }  # fmt: skip
    arguments = CaptTrainingArguments(**{**settings, **args})
    return CaptTrainer(
        model or make_model(), arguments, task=task or make_task(), processor=processor, objective=objective, attack=attack,
        teacher=teacher,
    )  # fmt: skip


def adapter_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def frozen_logits(trainer, pixels, places):
    """What the frozen model says of clean images."""
    outputs = trainer._frozen_outputs
    return outputs.logits(outputs.features(pixels, places))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Scripted:
    """An objective whose logged consistency follows a script, with the clean loss of guessing."""

    needs_frozen = False

    def __init__(self, *consistency):
        self.consistency = list(consistency)

    def __call__(self, views):
        value = self.consistency.pop(0) if len(self.consistency) > 1 else self.consistency[0]
        parts = {"clean_loss": views.clean.new_tensor(math.log(3)), "consistency_tuned": views.clean.new_tensor(value)}
        return 0.0 * views.clean.sum(), parts
