"""What stops a run, or warns: losses and gradients that are not finite, collapse, over-fitting, masked gradients."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..attacks import Attack
from .evaluating import EvaluatingTrainer
from .monitor import Monitor, TrainingStopped
from .processes import failures

logger = logging.getLogger(__name__)

VANISHED = 0.001  # share of the pixel gradients that may be exactly zero
SKIPPED = 10  # steps in a row that fp16's loss scaling may skip while it looks for its scale


class _BeforeStep(TrainerCallback):
    def __init__(self, trainer: GuardedTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.check_gradients()


class GuardedTrainer(EvaluatingTrainer):
    """A Trainer that does not go on when a run has gone wrong."""

    attack: Attack
    collapsed: str | None  # what was seen, where `stop_on_collapse` is off
    _monitor: Monitor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.collapsed = None
        self._images: list[int] = []  # of the step that runs
        self._skipped = 0
        self._warned = False
        self.add_callback(_BeforeStep(self))

    def check_loss(self, loss: Tensor, images: list[int]) -> None:
        """Stops all processes if the loss of one is not finite.

        Args:
            loss: This process's.
            images: Places of its images in the training set.
        """
        self._images += images
        failed = not torch.isfinite(loss)
        words = f"{loss.item()} at {self._where(images)}" if failed else ""
        found = failures(failed, words, self.accelerator, loss.device)
        if found:
            raise TrainingStopped(f"The loss is {', '.join(found)}. {self._lower()} {self._last_good()}")

    def check_gradients(self) -> None:
        """Stops if a gradient is not finite before it reaches the adapter; all processes have the same gradients.

        In fp16 such steps are skipped while the loss scaling looks for its scale, a few of them in a row at most.
        """
        images, self._images = self._images, []
        gradients = [p.grad for p in self.classifier.model.parameters() if p.requires_grad and p.grad is not None]
        if not gradients or torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            self._skipped = 0
            return
        self._skipped += 1
        if self.accelerator.scaler is not None and self._skipped <= SKIPPED:
            return
        raise TrainingStopped(
            f"A gradient is not finite at {self._where(images)}; the adapter is still that of the step before. {self._lower()} "
            f"{self._last_good()}"
        )

    def _where(self, images: list[int]) -> str:
        more = ", ..." if len(images) > 8 else ""
        return f"step {self.state.global_step} (images {', '.join(map(str, images[:8]))}{more} of the training set)"

    def _lower(self) -> str:
        less = ", or train in bf16 or float32 instead of fp16" if self.args.fp16 else ""
        return f"Lower the learning rate ({self.args.learning_rate}){less}."

    # ---------------------------------------------------------------------------------------------------- the log

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Logs, with the loss, its parts, clean and robust accuracy under the training attack, and that attack's name."""
        if "loss" not in logs:
            super().log(logs, start_time)
            if self.is_in_train and "eval_robust_accuracy" in logs:
                self._check_overfitting()
            return
        means = self._monitor.means(lambda sums: self.accelerator.reduce(sums, "sum"))
        self._check_collapse(means)
        self._check_vanishing(means)
        super().log(logs | means | {"attack": self.attack.name}, start_time)

    def _check_collapse(self, means: dict[str, float]) -> None:
        self.collapsed = self._monitor.collapse(means) or self.collapsed
        if self.collapsed and self.args.stop_on_collapse:
            raise TrainingStopped(
                f"The model has become constant at step {self.state.global_step}: {self.collapsed}. Lower the learning rate "
                f"({self.args.learning_rate}) or `consistency` ({self.args.consistency}), or use another coupling. "
                f"{self._last_good()}"
            )

    def _check_vanishing(self, means: dict[str, float]) -> None:
        share = means.get("zero_gradient_share", 0.0)
        if share <= VANISHED or self._warned:
            return
        self._warned = True
        half = "fp16" if self.args.fp16 else "bf16" if self.args.bf16 else None
        advice = (
            f"They may have vanished in {half}: compare with full_precision_attack=True."
            if half and not self.args.full_precision_attack
            else "Something in the model masks them, and the robust accuracy may be less than it looks."
        )
        logger.warning(
            "%.2f%% of the pixel gradients were exactly zero up to step %d, which makes the training attack too weak. %s",
            100 * share,
            self.state.global_step,
            advice,
        )

    def _check_overfitting(self) -> None:
        found = overfitting(self.state.log_history)
        if found is None:
            return
        words = (
            f"Catastrophic over-fitting at step {self.state.global_step}: {found}. The adapter learns the training attack "
            f"({self.attack.name}) and not robustness: take more attack_steps ({self.args.attack_steps}), a lower learning rate "
            f"({self.args.learning_rate}), or keep the best checkpoint (load_best_model_at_end with "
            f"metric_for_best_model='eval_robust_accuracy'). {self._last_good()}"
        )
        if self.args.stop_on_overfitting:
            raise TrainingStopped(words)
        logger.warning(words)


def overfitting(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns a sentence if robust accuracy has fallen in evaluation while it rose in training (Wong et al. 2020, section 5.4).

    It has fallen if its 95% interval lies below that of the best evaluation before; it has risen if its mean over the log lines
    since the last evaluation is above that before the best one.

    Args:
        history: The Trainer's log, whose last entry is an evaluation.
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
