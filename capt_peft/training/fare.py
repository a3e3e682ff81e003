"""Adversarial fine-tuning of an image tower, which makes a robust backbone: FARE and Sim-CLIP, without labels.

TeCoA and PMG-AFT are `CaptTrainer` with `AdversarialCrossEntropy` or `PmgAftObjective` on a model whose text tower is frozen; the
latter with a frozen copy as its teacher. They need nothing more.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import AttackResult
from ..attacks.features import squared_distance, two_logits
from ..clip.classifier import ZeroShotClassifier
from ..data import Task
from ..objectives import FeatureDistance, SiameseCosine
from ..tuner.clip import in_tower
from .arguments import CaptTrainingArguments, one_processor
from .chunks import Batch
from .frozen import embed
from .trainer import CaptTrainer


def train_image_tower_alone(model: nn.Module) -> nn.Module:
    """Freezes all of a CLIP but its image tower and the projection behind it, in place, and returns the model.

    Raises:
        ValueError: The model has no image tower of that name.
    """
    if not any(in_tower(name, "vision") for name, _ in model.named_parameters()):
        raise ValueError(
            f"{type(model).__name__} has no `vision_model`: an image tower is fine-tuned in a bare CLIPModel. Of an adapter, "
            "give the base model."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(in_tower(name, "vision"))
    return model


def frozen_copy(model: nn.Module, processor: Any, task: Task) -> ZeroShotClassifier:
    """Returns a classifier of the task's classes with a copy of a model that is about to be tuned, to be its teacher."""
    return ZeroShotClassifier(
        copy.deepcopy(model), processor, task.class_names, task.template, class_texts=task.class_texts
    )


class FareTrainer(CaptTrainer):
    """Fine-tunes an image tower so that adversarial images have the features of clean ones: FARE or Sim-CLIP, without labels.

    The attack of both climbs FARE's distance, from the features that the original has of the clean images. The original is a
    frozen copy of the model as it is given; it runs each image once, before training, while nothing is augmented. The task's
    labels and class texts are for the log alone.

    Args:
        model: A CLIP, bare; see `train_image_tower_alone`.
        args: As for `CaptTrainer`; `attack_loss` has no say and stays "ce".
        task: As for `CaptTrainer`.
        processor: The model's processor.
        processing_class: Another name of `processor`.
        objective: FARE's `FeatureDistance`, by default, or Sim-CLIP's `SiameseCosine`.
        kwargs: `attack`, `eval_dataset`, and arguments of `transformers.Trainer`, as for `CaptTrainer`.

    Raises:
        ValueError: Another `attack_loss`, or as for `CaptTrainer`.
    """

    teacher: ZeroShotClassifier

    def __init__(
        self,
        model: nn.Module,
        args: CaptTrainingArguments,
        *,
        task: Task,
        processor: Any = None,
        processing_class: Any = None,
        objective: FeatureDistance | SiameseCosine | None = None,
        **kwargs: Any,
    ) -> None:
        if args.attack_loss != "ce":
            raise ValueError(
                f"attack_loss={args.attack_loss!r}: this attack climbs the distance of the features. Leave it at 'ce'."
            )
        processor = one_processor(processor, processing_class)
        super().__init__(
            model,
            args,
            task=task,
            processor=processor,
            objective=objective or FeatureDistance(),
            teacher=frozen_copy(model, processor, task),
            **kwargs,
        )

    def _attack(self, batch: Batch, texts: Tensor, clean: Tensor) -> AttackResult:
        """Attacks the features: climbs their distance from those that the original has of the clean images."""
        target = self._frozen_outputs.features(batch.pixels, batch.indices)  # (B, D)

        def loss(images: Tensor) -> Tensor:
            with self._attack_precision():
                features = self._image_features(images)  # (B, D)
            return squared_distance(features, target)

        return self.attack.run(two_logits(loss), batch.pixels, torch.zeros_like(batch.labels), self._generators(batch))

    def _image_features(self, pixels: Tensor) -> Tensor:
        return embed(self.classifier, pixels)

    def _frozen(self, batch: Batch, adversarial: Tensor) -> dict[str, Tensor]:
        return {"frozen": self._frozen_outputs.features(batch.pixels, batch.indices)}
