"""Callbacks that watch a run, and stop it or warn; each can be removed: `trainer.remove_callback(StopOnCollapse)`."""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch.utils.data import DataLoader, default_collate
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir, rewrite_logs

from ..data.pixels import PixelDataset
from ..data.task import Task
from ..evaluation import Accuracy
from ..evaluation.pictures import image_grid
from ..tuner.switching import base_parameters
from ..utils.machine import moved
from ..utils.modules import eval_mode
from ..utils.text import shown, some
from .checkpoints import last_good

logger = logging.getLogger(__name__)

VANISHED = 0.001  # share of the pixel gradients that may be exactly zero
SKIPPED = 10  # steps in a row that fp16's loss scaling may skip while it looks for its scale
IMAGES = 128  # that the base model is tried on: enough to tell 20% from 10%
BATCH = 32


class TrainingStopped(RuntimeError):
    """Training went wrong beyond repair: a loss that is not finite, or a model that has become constant."""


class CheckGradients(TrainerCallback):
    """Stops a run before a gradient that is not finite reaches the adapter; all processes have the same gradients.

    In fp16 such steps are skipped while the loss scaling looks for its scale, 10 of them in a row at most.

    Args:
        trainer: The `CaptTrainer`, which knows the images of the step.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer: Any = weakref.proxy(trainer)  # a cycle would keep the trainer, and what it holds, alive
        self.skipped = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Looks at the gradients, summed up and clipped."""
        gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        if not gradients or torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            self.skipped = 0
            return
        self.skipped += 1
        if self.trainer.accelerator.scaler is not None and self.skipped <= SKIPPED:
            return
        raise TrainingStopped(
            f"A gradient is not finite at {where(self.trainer.step_images, state)}; the adapter is still that of the step "
            f"before. {advice(args, state)}"
        )


def where(images: Sequence[int], state: Any) -> str:
    """Returns the step that runs, and the places of images in the training set, in words."""
    return f"step {state.global_step} (images {some(images, 8)} of the training set)"


def advice(args: Any, state: Any) -> str:
    """Returns what to do about a number that is not finite."""
    less = ", or train in bf16 or float32 instead of fp16" if args.fp16 else ""
    return f"Lower the learning rate ({args.learning_rate}){less}. {last_good(args, state)}"


class StopOnCollapse(TrainerCallback):
    """Stops a run, where `args.stop_on_collapse` is set, whose model has become constant: FAP's trivial solution.

    Its consistency loss has fallen to a thousandth of its largest value in the log, while the clean loss is that of guessing;
    or, with an objective without one, the losses of clean and of adversarial images are both within 1% of that of guessing.

    Args:
        num_classes: Number of classes, N; guessing has a cross-entropy of log N.

    Attributes:
        found: A sentence that says what was seen, or None.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.found: str | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Looks at the means since the last log line."""
        self.found = (collapse(state.log_history, self.num_classes) if "loss" in (logs or {}) else None) or self.found
        if self.found and args.stop_on_collapse:
            weight = f" or `consistency` ({args.consistency})" if "consistency" in self.found else ""
            raise TrainingStopped(
                f"The model has become constant at step {state.global_step}: {self.found}. Lower the learning rate "
                f"({args.learning_rate}){weight}, or use another coupling. {last_good(args, state)}"
            )


def collapse(history: Sequence[Mapping[str, Any]], num_classes: int) -> str | None:
    """Returns a sentence if the last log line of a loss is that of a model that has become constant.

    A model whose first predictions are nearly uniform has a small consistency loss too, and losses near log N; only a fall to
    them is a collapse.
    """
    lines = [line for line in history if "consistency_tuned" in line or "adversarial_loss" in line]
    if not lines:
        return None
    watched = "consistency_tuned" if "consistency_tuned" in lines[-1] else "adversarial_loss"
    now, largest = lines[-1][watched], max(line[watched] for line in lines)
    clean, chance = lines[-1]["clean_loss"], math.log(num_classes)
    if watched == "consistency_tuned":
        constant, fell = now < 0.001 * largest and clean > 0.95 * chance, f"from {largest:.1e} to {now:.1e}"
    else:
        constant = max(abs(now - chance), abs(clean - chance)) < 0.01 * chance and largest > 1.05 * chance
        fell = f"from {largest:.2f} to {now:.2f}"
    what = "consistency loss" if watched == "consistency_tuned" else "loss of adversarial images"
    return (
        f"the {what} fell {fell}, while the clean loss is {clean:.2f}, and guessing gives {chance:.2f}"
        if constant
        else None
    )


class StopOnOverfitting(TrainerCallback):
    """Warns of catastrophic over-fitting in the evaluations of a run, or stops it where `args.stop_on_overfitting` is set."""

    def __init__(self) -> None:
        self.training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes that a run goes on."""
        self.training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes that it has ended: later evaluations are of the user's own choice."""
        self.training = False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Compares the evaluation with those before it."""
        found = overfitting(state.log_history) if self.training and "eval_robust_accuracy" in (metrics or {}) else None
        if found is None:
            return
        attack = next(line["attack"] for line in reversed(state.log_history) if "attack" in line)
        words = (
            f"Catastrophic over-fitting at step {state.global_step}: {found}. The adapter learns the training attack ({attack}) "
            f"and not robustness: take more attack_steps ({args.attack_steps}), a lower learning rate ({args.learning_rate}), or "
            "keep the best checkpoint (load_best_model_at_end with metric_for_best_model='eval_robust_accuracy'). "
            f"{last_good(args, state)}"
        )
        if args.stop_on_overfitting:
            raise TrainingStopped(words)
        logger.warning(words)


def overfitting(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns a sentence if robust accuracy has fallen in evaluation while it rose in training (Wong et al. 2020, section 5.4).

    It has fallen if its 95% interval lies below that of the best evaluation before; it has risen if its mean over the log lines
    since the last evaluation, the history's last entry, is above that before the best one.
    """
    evaluations = [i for i, entry in enumerate(history) if "eval_robust_accuracy" in entry]
    if len(evaluations) < 2:
        return None
    starts = [0, *evaluations[:-1]]
    training = [
        [entry["robust_accuracy"] for entry in history[start:end] if "robust_accuracy" in entry]
        for start, end in zip(starts, evaluations, strict=True)
    ]
    best = max(range(len(evaluations) - 1), key=lambda i: history[evaluations[i]]["eval_robust_accuracy"])
    then, now = history[evaluations[best]], history[evaluations[-1]]
    if not training[best] or not training[-1] or now["eval_robust_accuracy_high"] >= then["eval_robust_accuracy_low"]:
        return None
    before, after = (sum(values) / len(values) for values in (training[best], training[-1]))
    if after <= before:
        return None
    return (
        f"robust accuracy under {now['eval_attack']} fell from {then['eval_robust_accuracy']:.1%} (step {then['step']}) to "
        f"{now['eval_robust_accuracy']:.1%}, while under the training attack it rose from {before:.1%} to {after:.1%}"
    )


class WarnOnVanishedGradients(TrainerCallback):
    """Warns once if more than a thousandth of the pixel gradients are exactly zero: the training attack is then too weak."""

    def __init__(self) -> None:
        self.warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Looks at the share since the last log line."""
        share = (logs or {}).get("zero_gradient_share", 0.0)
        if share <= VANISHED or self.warned:
            return
        self.warned = True
        half = "fp16" if args.fp16 else "bf16" if args.bf16 else None
        logger.warning(
            "%.2f%% of the pixel gradients were exactly zero up to step %d, which makes the training attack too weak. %s",
            100 * share,
            state.global_step,
            f"They may have vanished in {half}: compare with full_precision_attack=True."
            if half and not args.full_precision_attack
            else "Something in the model masks them, and the robust accuracy may be less than it looks.",
        )


def at_chance(accuracy: Accuracy, num_classes: int) -> str | None:
    """Returns a sentence if an accuracy is hardly that of guessing: its 95% interval reaches 1 / N, and it is below 2 / N itself.

    The second keeps a handful of images, whose interval is wide, from raising an alarm.
    """
    if accuracy.interval[0] > 1 / num_classes or accuracy.value >= 2 / num_classes:
        return None
    return f"zero-shot accuracy is {accuracy}, not clearly above guessing among {num_classes} classes ({100 / num_classes:.3g}%)"


class WarnAtChance(TrainerCallback):
    """Warns where the base model only guesses on a task, and leaves its sentence in `trainer.at_chance`.

    It measures the base model before the run begins, on training images at even distances and, where these are few, on held-out
    ones. A resumed run, or a model without an adapter, is not measured.

    Args:
        trainer: The `CaptTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer: Any = weakref.proxy(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures and warns."""
        trainer = self.trainer
        if state.global_step or not isinstance(trainer.classifier.model, PeftModel):
            return
        if any(p.requires_grad for _, p in base_parameters(trainer.classifier.model)):
            return  # switching the adapter off does not give the base model
        accuracy, splits = self._measured()
        trainer.at_chance = at_chance(accuracy, trainer.task.num_classes)
        if trainer.at_chance and state.is_world_process_zero:
            logger.warning(
                "On %d images of the task %r, at even distances in its %s, %s: the base model does not know these classes, or "
                "the names do not belong to the images. Prompts can only steer what it knows: check the class names, the "
                "template (%s) and the base model before you tune for long.",
                accuracy.n,
                trainer.task.name,
                f"split{'s' if len(splits) > 1 else ''} {', '.join(splits)}",
                trainer.at_chance,
                shown(trainer.task.template),
            )

    @torch.no_grad()
    def _measured(self) -> tuple[Accuracy, list[str]]:
        """Returns the base model's accuracy, and the names of the splits whose images it is of."""
        trainer, right, splits = self.trainer, [], []
        with eval_mode(trainer.classifier), trainer.classifier.frozen() as frozen, trainer._eager():
            for split, data in _looked_at(trainer.task):
                splits.append(split)
                # a generator of its own: the run's is not touched
                for batch in DataLoader(trainer._pixels(data), BATCH, generator=torch.Generator()):
                    predicted = frozen(moved(batch["pixels"], trainer.args.device)).argmax(-1).cpu()
                    right += (predicted == batch["labels"]).tolist()
        return Accuracy(sum(right), len(right)), splits


def _looked_at(task: Task) -> Iterator[tuple[str, datasets.Dataset]]:
    """Yields images at even distances, by split: of the training set, and then of others until there are enough."""
    left = IMAGES
    for name in ("train", *(name for name in task.splits if name != "train")):
        data = task[name]
        if left and len(data):
            chosen = data.select(range(0, len(data), math.ceil(len(data) / left)))
            left -= len(chosen)
            yield name, chosen


class SetEpoch(TrainerCallback):
    """Tells the training images their epoch: the loader of a run resumed within an epoch does not."""

    def __init__(self, dataset: PixelDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the epoch that begins."""
        self.dataset.set_epoch(int(state.epoch or 0))


class LogPictures(TrainerCallback):
    """Shows images of every evaluation in TensorBoard, where `report_to` names it: clean, adversarial, and the noise.

    They are attacked as the evaluation attacks them, and nothing of the run changes. Without TensorBoard nothing is done.

    Args:
        trainer: The `CaptTrainer`.
        images: Number of images, at even distances in the split.
    """

    def __init__(self, trainer: Any, images: int = 8) -> None:
        self.trainer: Any = weakref.proxy(trainer)
        self.images = images
        for board in self._boards():
            # what is evaluated before the training would otherwise go to `runs` in the current folder
            board.logging_dir = board.logging_dir or os.path.join(trainer.args.output_dir, default_logdir())

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Attacks the images, and shows them beside the accuracies of the evaluation."""
        writers = [board.tb_writer for board in self._boards() if board.tb_writer is not None]
        prefixes = [
            name.removesuffix("_robust_accuracy") for name in metrics or {} if name.endswith("_robust_accuracy")
        ]
        if not writers or not prefixes or not state.is_world_process_zero:
            return
        data, classifier = eval_dataloader.dataset, self.trainer.classifier
        batch = default_collate([data[i] for i in range(0, len(data), math.ceil(len(data) / self.images))])
        pixels, labels = batch["pixels"].to(args.device), batch["labels"].to(args.device)
        with eval_mode(classifier), self.trainer._eager():
            grid = image_grid(classifier, pixels, labels, args.evaluation_attack, args.seed, batch["index"].tolist())
        (name,) = rewrite_logs({f"{prefixes[0]}_adversarial_examples": grid})  # as the accuracies are named there
        for writer in writers:
            writer.add_image(name, grid.cpu(), state.global_step)
            writer.flush()

    def _boards(self) -> list[TensorBoardCallback]:
        return [c for c in self.trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback)]


def default_callbacks(trainer: Any) -> list[TrainerCallback]:
    """Returns the callbacks of a `CaptTrainer`."""
    watching: list[TrainerCallback] = [
        CheckGradients(trainer),
        StopOnCollapse(trainer.task.num_classes),
        StopOnOverfitting(),
    ]
    watching += [WarnOnVanishedGradients(), WarnAtChance(trainer), LogPictures(trainer)]
    return [*watching, SetEpoch(trainer.train_dataset)]
