"""What `precision.py` measures: the trainer's step in float32, bf16, fp16 and compiled, and its attack's gradients."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from measuring import seconds
from step_reference import Setting, invent_names, make_model, make_processor, make_task
from torch import Tensor
from transformers import PrinterCallback

from capt_peft import CaptTrainer, CaptTrainingArguments, load_task
from capt_peft.attacks import PGD, Attack, AttackResult
from capt_peft.attacks.base import pixel_gradient
from capt_peft.attacks.losses import LOSSES

MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"bf16": True},
    "bf16_full_precision_attack": {"bf16": True, "full_precision_attack": True},
    "fp16": {"fp16": True},
    "torch_compile": {"torch_compile": True},
}
EPSILON, SHOTS = "10/255", 16  # as examples/configs/digits.yaml


class Probe(Attack):
    """The training attack, which also tells its gradients at given points.

    Args:
        attack: The attack.
    """

    name = "probe"

    def __init__(self, attack: PGD) -> None:
        self.attack, self.threat_model = attack, attack.threat_model
        self.points: list[Tensor] | None = None  # (B, 3, H, W) each; an empty list is filled with those of this attack
        self.gradients: list[Tensor] = []

    def to_dict(self) -> dict[str, Any]:
        """Returns the attack's settings."""
        return self.attack.to_dict()

    def run(self, logits_fn: Any, images: Tensor, labels: Tensor, generator: Any = None, **kwargs: Any) -> AttackResult:
        """Runs the attack; if it was given points, takes the gradients there too."""
        points = self.points
        if points is None:
            return self.attack.run(logits_fn, images, labels, generator, **kwargs)
        record = not points

        def watched(pixels: Tensor) -> Tensor:
            if record:
                points.append(pixels.detach().clone())
            logits: Tensor = logits_fn(pixels)
            return logits

        result = self.attack.run(watched, images, labels, generator, **kwargs)
        second = kwargs["clean_logits"] if self.attack.loss == "kl" else labels
        self.gradients = [
            pixel_gradient(logits_fn, point, lambda z: LOSSES[self.attack.loss](z, second))[2] for point in points
        ]
        return result


class Mode:
    """The trainer's step in a mode.

    Args:
        name: One of `MODES`.
        setting: What to run it on.
    """

    def __init__(self, name: str, setting: Setting) -> None:
        processor = make_processor(setting.tiny)
        self.setting, self.model = setting, make_model(setting.tiny, processor.tokenizer).to(setting.device)
        if setting.tiny:
            task = load_task("digits").few_shot(SHOTS, 0)
        else:
            names = invent_names(processor.tokenizer, setting.classes)
            task = make_task(names, setting.batch, processor.image_processor.crop_size["height"])
        more = {"attack_steps": setting.steps, "attack_loss": setting.attack_loss}
        self.trainer = make_trainer(self.model, task, processor, name, setting, **more)
        self.precision = self.trainer.accelerator.state.mixed_precision
        self.trainer.attack = self.probe = Probe(self.trainer.args.train_attack)
        self.model.train()
        self.wrapped = self.trainer.accelerator.prepare_model(self.model)
        batch = next(iter(self.trainer.get_train_dataloader()))
        self.inputs = {key: value.to(setting.device) for key, value in batch.items()}

    def step(self) -> Tensor:
        """Runs forward and backward; leaves the prompts' gradients in `.grad`, times the scaler's scale, and returns the loss."""
        accelerator = self.trainer.accelerator
        accelerator.state._mixed_precision = (
            self.precision
        )  # the trainers of a process share it, and the last one made sets it
        self.model.zero_grad()
        loss = self.trainer.compute_loss(self.wrapped, self.inputs)
        accelerator.backward(loss)
        return loss.detach()

    def seconds(self) -> float:
        """Returns the wall time of a step."""
        return seconds(self.step, self.setting.device)[0]

    def values(self, points: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns a step's loss, the prompts' gradient as one vector, and the attack's gradients (K, B, 3, H, W) at points."""
        self.probe.points = points
        while True:
            loss = self.step()
            gradient = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
            scaler = self.trainer.accelerator.scaler
            if scaler is None or gradient.isfinite().all():
                break
            scaler.update(scaler.get_scale() / 2)  # as training does, which skips such a step
        self.probe.points = None
        return loss.double(), gradient.double(), torch.stack(self.probe.gradients)


def make_trainer(
    model: Any, task: Any, processor: Any, mode: str, setting: Setting, seed: int = 0, **arguments: Any
) -> CaptTrainer:
    """Returns the package's trainer in a mode; on a CPU, in fp16, with what Accelerate does on GPUs only."""
    by_hand = mode == "fp16" and setting.device == "cpu"
    args = CaptTrainingArguments(
        tempfile.gettempdir(), use_cpu=setting.device == "cpu", per_device_train_batch_size=setting.batch, epsilon=EPSILON,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=seed,
        **({} if by_hand else MODES[mode]), **arguments,
    )  # fmt: skip
    trainer = CaptTrainer(model, args, task=task, processor=processor)
    trainer.remove_callback(PrinterCallback)
    if by_hand:
        args.fp16 = trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    return trainer
