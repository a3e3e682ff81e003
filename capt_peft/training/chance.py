"""Says before hours are spent that the base model cannot tell a task's classes apart."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.task import Task
from ..evaluation import Accuracy
from ..tuner.fingerprint import base_parameters

logger = logging.getLogger(__name__)

IMAGES = 128  # that are looked at: enough to tell 20% from 10%
BATCH = 32


def at_chance(accuracy: Accuracy, num_classes: int) -> str | None:
    """Returns a sentence if an accuracy is hardly that of guessing: its 95% interval reaches 1 / N, and it is below 2 / N itself.

    The second keeps a handful of images, whose interval is wide, from raising an alarm.

    Args:
        accuracy: Zero-shot accuracy on clean images.
        num_classes: N.
    """
    if accuracy.interval[0] > 1 / num_classes or accuracy.value >= 2 / num_classes:
        return None
    return f"zero-shot accuracy is {accuracy}, not clearly above guessing among {num_classes} classes ({100 / num_classes:.3g}%)"


class WarnAtChance(TrainerCallback):
    """Warns where the base model only guesses on a task, and leaves its sentence in `trainer.at_chance`.

    Where the objective runs the frozen model anyway, it counts what that says of the first images, which costs nothing.
    Otherwise it measures the base model before the run begins, on training images at even distances and, where these are few, on
    held-out ones. A resumed run, or a model without an adapter, is not measured.

    Args:
        trainer: The `CaptTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer: Any = weakref.proxy(trainer)  # a cycle would keep the trainer, and what it holds, alive
        self._waits = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures and warns, unless the frozen model's outputs will come by themselves."""
        trainer = self.trainer
        self._waits = False
        if state.global_step or not isinstance(trainer.classifier.model, PeftModel):
            return
        if any(p.requires_grad for _, p in base_parameters(trainer.classifier.model)):
            return  # switching the adapter off does not give the base model
        self._waits = trainer.objective.needs_frozen and trainer.teacher is None and not args.augment  # type: ignore[attr-defined]
        if not self._waits:
            self._say(self._accuracy(), state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Warns once the frozen model has run on enough of this process's training images."""
        known = self.trainer._frozen_outputs._known if self._waits else {}
        labels = self.trainer.train_dataset.labels if self._waits else []
        if self._waits and len(known) >= max(1, min(IMAGES, len(labels) // args.world_size)):
            self._waits = False
            right = [int(output.argmax()) == labels[index] for index, output in list(known.items())[:IMAGES]]
            self._say(Accuracy(sum(right), len(right)), state)

    def _say(self, accuracy: Accuracy, state: TrainerState) -> None:
        trainer = self.trainer
        trainer.at_chance = at_chance(accuracy, trainer.task.num_classes)
        if trainer.at_chance and state.is_world_process_zero:
            logger.warning(
                "On %s, %s: the base model does not know these classes, or the names do not belong to the images. Prompts can "
                "only steer what it knows: check the class names, the template (%r) and the base model before you tune for long.",
                trainer.task.name,
                trainer.at_chance,
                trainer.task.template,
            )

    @torch.no_grad()
    def _accuracy(self) -> Accuracy:
        trainer = self.trainer
        classifier, device = trainer.classifier, trainer.args.device
        training, right = classifier.model.training, []
        classifier.eval()
        try:
            with classifier.frozen() as frozen, trainer._eager():
                for data in _looked_at(trainer.task):
                    images = trainer._pixels(data)
                    for start in range(0, len(images), BATCH):
                        batch = [images[i] for i in range(start, min(start + BATCH, len(images)))]
                        predicted = frozen(torch.stack([one["pixels"] for one in batch]).to(device)).argmax(-1).tolist()
                        right += [one["labels"] == label for one, label in zip(batch, predicted, strict=True)]
        finally:
            classifier.model.train(training)
        return Accuracy(sum(right), len(right))


def _looked_at(task: Task) -> Iterator[datasets.Dataset]:
    """Yields images at even distances: of the training set, and then of other splits until there are enough."""
    left = IMAGES
    for data in (task["train"], *(split for name, split in task.splits.items() if name != "train")):
        if left and len(data):
            chosen = data.select(range(0, len(data), math.ceil(len(data) / left)))
            left -= len(chosen)
            yield chosen
