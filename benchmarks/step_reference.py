"""What `step.py` compares: one model with its images and texts, the published step on it, ours, and the least there can be.

The reference step is written here plainly, the way the published code does it (FAP's `attack/pgd.py`, APT's `trainers/apt.py`):
texts padded to 77 tokens; the text tower inside every step of the attack, and `loss.backward()` through all of it; with the
attack on the divergence, the clean images again in every step; clean and adversarial images in two passes, each with texts of
its own; the frozen model every time. Their code has no frozen model; CAPT's objective needs one, so a plain step runs it.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from capt_peft import CaptConfig, CaptTrainer, CaptTrainingArguments, Task
from capt_peft.clip.activations import lean_activations
from capt_peft.clip.texts import normalize
from capt_peft.data.task import task_features
from capt_peft.randomness import example_generators
from capt_peft.toy import TINY_CLIP
from capt_peft.training.frozen import FrozenOutputs
from capt_peft.tuner.clip import image_features, text_features
from capt_peft.tuner.config import DEFAULT_TEMPLATE

PROMPT_NOISE = 0.02  # untrained text prompts are the frozen model's own states, and would hide a mistake


@dataclass(frozen=True)
class Setting:
    """One line of the table.

    Args:
        batch: Images, B.
        classes: Classes, N.
        steps: Steps of the attack, K.
        attack_loss: "kl" (FAP's) or "ce" (APT's).
        tiny: Tiny CLIP instead of a ViT-B/32.
        device: "cpu" or "cuda".
        image_chunk_size: Images that our step computes at a time; None for the whole batch.
    """

    batch: int = 4
    classes: int = 100
    steps: int = 2
    attack_loss: str = "kl"
    tiny: bool = False
    device: str = "cpu"
    image_chunk_size: int | None = None

    def __str__(self) -> str:
        """Says what a line of the table is about."""
        chunks = f", {self.image_chunk_size} images at a time" if self.image_chunk_size else ""
        return f"batch {self.batch}, {self.classes} classes, K = {self.steps}{chunks}"


class Setup:
    """The model, images, texts and attack noise of a setting, all from fixed seeds: two processes make the same ones.

    Args:
        setting: What to make.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        processor = make_processor(setting.tiny)
        names = invent_names(processor.tokenizer, setting.classes)
        self.model = make_model(setting.tiny, processor.tokenizer).to(setting.device)
        task = make_task(names, setting.batch, processor.image_processor.crop_size["height"])
        self.trainer = make_trainer(self.model, setting, task, processor)
        self.model.train()
        batch = next(iter(self.trainer.get_train_dataloader()))
        self.inputs: dict[str, Tensor] = {name: value.to(setting.device) for name, value in batch.items()}
        padded = processor.tokenizer(task.texts, padding="max_length", max_length=77, return_tensors="pt")
        self.padded_ids: Tensor = padded["input_ids"].to(setting.device)  # (N, 77)
        generators = example_generators(self.trainer.args.seed, batch["index"].tolist(), epoch=0)
        self.start = self.trainer.attack.threat_model.random_start(self.inputs["pixels"], generators)

    @property
    def prompts(self) -> dict[str, Tensor]:
        """The parameters that are tuned, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def text_tokens(self) -> int:
        """Length of the longest text, which is the length that the trainer gives all of them."""
        return int(self.trainer.classifier.input_ids.shape[1])

    def forget_frozen(self) -> None:
        """Empties the trainer's store of the frozen model's outputs, as it is when a run starts."""
        trainer = self.trainer
        trainer._frozen_outputs = FrozenOutputs(
            trainer.classifier, trainer.teacher, trainer.train_dataset, trainer.args
        )


# ------------------------------------------------------------------------------------------------------------- its parts


def make_processor(tiny: bool) -> Any:
    """Returns tiny CLIP's processor; for a ViT-B/32 with images of 224 pixels."""
    processor = AutoProcessor.from_pretrained(TINY_CLIP)
    if not tiny:
        processor.image_processor.size = {"shortest_edge": 224}
        processor.image_processor.crop_size = {"height": 224, "width": 224}
    return processor


def make_model(tiny: bool, tokenizer: Any) -> PeftModel:
    """Returns a CLIP with a CAPT adapter of the default shape.

    The ViT-B/32 has the true shape of openai/clip-vit-base-patch32 and random weights; its start and end tokens are those of
    tiny CLIP's tokenizer, which is what there is without a download. Neither changes what a step costs.
    """
    torch.manual_seed(0)
    if tiny:
        base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    else:
        tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        text, vision = CLIPTextConfig(vocab_size=49408, **tokens), CLIPVisionConfig(image_size=224, patch_size=32)
        base = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    words = tokenizer(DEFAULT_TEMPLATE.split("{}")[0].rstrip())["input_ids"][:-1]
    model = get_peft_model(base, CaptConfig(template_token_ids=words))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(PROMPT_NOISE * torch.randn_like(parameter))
    return model


def invent_names(tokenizer: Any, classes: int) -> tuple[str, ...]:
    """Returns class names of one to three words, a token each: texts of 8 to 10 tokens, like those of real data sets."""
    words = sorted(token[:-4] for token in tokenizer.get_vocab() if token.endswith("</w>") and token[:-4].isalpha())
    words = [word for word in words if len(word) > 2]
    draw, names = random.Random(0), dict[str, None]()
    while len(names) < classes:
        names[" ".join(draw.choices(words, k=draw.randint(1, 3)))] = None
    return tuple(names)


def make_task(names: tuple[str, ...], batch: int, size: int) -> Task:
    """Returns a task with one batch of training images: noise, of the size that the model takes."""
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(batch)]
    rows = {"image": images, "label": draw.integers(0, len(names), batch).tolist()}
    return Task("noise", names, {"train": datasets.Dataset.from_dict(rows, features=task_features(names))})


def make_trainer(model: PeftModel, setting: Setting, task: Task, processor: Any) -> CaptTrainer:
    """Returns the package's trainer, as users make it."""
    arguments = CaptTrainingArguments(
        tempfile.gettempdir(),  # nothing is written
        use_cpu=setting.device == "cpu",
        per_device_train_batch_size=setting.batch,
        attack_steps=setting.steps,
        attack_loss=setting.attack_loss,
        image_chunk_size=setting.image_chunk_size,
        disable_tqdm=True,
    )
    return CaptTrainer(model, arguments, task=task, processor=processor)


# ------------------------------------------------------------------------------------------------------------- the steps


def reference_step(setup: Setup) -> Tensor:
    """Runs the published step; leaves the prompts' gradients in `.grad` and returns the loss."""
    pixels, labels = setup.inputs["pixels"], setup.inputs["labels"]
    adversarial = reference_attack(setup)
    setup.model.zero_grad()  # the attack has left gradients there
    clean, attacked = reference_logits(setup, pixels), reference_logits(setup, adversarial)  # (B, N) each
    with torch.no_grad(), setup.model.disable_adapter():
        frozen = reference_logits(setup, pixels)
    trust, doubt = (z.detach().softmax(1).gather(1, labels[:, None])[:, 0] for z in (frozen, clean))
    alpha = trust / (trust + doubt)  # (B,)
    log_p = attacked.log_softmax(1)
    tuned = F.kl_div(log_p, clean.softmax(1), reduction="none").sum(1)
    guided = F.kl_div(log_p, frozen.softmax(1), reduction="none").sum(1)
    consistency = setup.trainer.args.consistency * ((1 - alpha) * tuned + alpha * guided).mean()
    loss = F.cross_entropy(clean, labels) + consistency
    loss.backward()
    return loss.detach()


def reference_attack(setup: Setup) -> Tensor:
    """Returns the adversarial images (B, 3, H, W): PGD with the whole model in every step."""
    pixels, labels, attack = setup.inputs["pixels"], setup.inputs["labels"], setup.trainer.args.train_attack
    epsilon, adversarial = attack.threat_model.epsilon, setup.start
    for _ in range(attack.steps):
        adversarial = adversarial.detach().requires_grad_()
        output = reference_logits(setup, adversarial)
        if attack.loss == "kl":
            clean = reference_logits(setup, pixels)
            loss = F.kl_div(output.log_softmax(1), clean.softmax(1), reduction="batchmean")
        else:
            loss = F.cross_entropy(output, labels)
        loss.backward()
        assert adversarial.grad is not None
        moved = adversarial.detach() + attack.resolved_step_size * adversarial.grad.sign()
        adversarial = (pixels + (moved - pixels).clamp(-epsilon, epsilon)).clamp(0, 1)
    return adversarial.detach()


def reference_logits(setup: Setup, pixels: Tensor) -> Tensor:
    """Runs both towers: (B, 3, H, W) in [0, 1] -> (B, N)."""
    model, classifier = setup.model, setup.trainer.classifier
    texts = normalize(text_features(model, {"input_ids": setup.padded_ids}))
    images = normalize(image_features(model, (pixels - classifier.mean) / classifier.std))
    clip: Any = model.get_base_model()
    return clip.logit_scale.exp() * images @ texts.T


def our_step(setup: Setup) -> Tensor:
    """Runs the trainer's step; leaves the prompts' gradients in `.grad` and returns the loss."""
    setup.model.zero_grad()
    with lean_activations(setup.model):  # as `CaptTrainer.training_step` does
        loss = setup.trainer.compute_loss(setup.model, setup.inputs)
        loss.backward()
    return loss.detach()


def our_first_step(setup: Setup) -> Tensor:
    """The same at the start of a run, when nothing is known of the frozen model."""
    setup.forget_frozen()
    return our_step(setup)


@torch.no_grad()
def floor_images(setup: Setup) -> None:
    """Runs the image tower 2K + 4 times."""
    for _ in range(2 * setup.setting.steps + 4):
        setup.trainer.classifier.image_features(setup.inputs["pixels"])


@torch.no_grad()
def floor_texts(setup: Setup) -> None:
    """Runs the text tower twice."""
    for _ in range(2):
        setup.trainer.classifier.encode_texts()
