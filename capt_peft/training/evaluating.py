"""Evaluation within the Trainer: clean and robust accuracy, under an attack that is stronger than training's."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import datasets
import torch
from torch import nn
from transformers.trainer_utils import EvalPrediction

from ..borrowing import eval_mode
from ..classifier import ZeroShotClassifier
from ..data.pixels import PixelDataset
from ..evaluation import outcomes, wilson_interval
from .arguments import CaptTrainingArguments
from .checkpoints import CheckpointTrainer

logger = logging.getLogger(__name__)


class EvaluatingTrainer(CheckpointTrainer):
    """A Trainer whose evaluation attacks its images."""

    args: CaptTrainingArguments
    classifier: ZeroShotClassifier

    def _eager(self) -> AbstractContextManager[Any]:
        """Within it nothing is compiled: for what runs rarely or in many shapes."""
        return torch.compiler.set_stance("force_eager") if self.args.torch_compile else nullcontext()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Attacks an evaluation batch; returns the predicted classes of its clean and its adversarial images."""
        inputs = self._prepare_inputs(inputs)
        pixels, labels, indices = inputs["pixels"], inputs["labels"], inputs["index"].tolist()
        with eval_mode(self.classifier), self._eager():
            predicted = outcomes(self.classifier, self.args.evaluation_attack, pixels, labels, indices, self.args.seed)
        return None, predicted, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the Trainer's loop, always keeping the predictions: accuracy is what is evaluated, not a loss."""
        if len(args) > 2:
            args = (*args[:2], False, *args[3:])
        else:
            kwargs["prediction_loss_only"] = False
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics: dict[str, Any] = output.metrics or {}
        if f"{prefix}_clean_accuracy" in metrics:
            attack = self.args.evaluation_attack
            metrics[f"{prefix}_attack"] = f"{attack.name}, {attack.threat_model}"
            logger.info(
                "%s: clean accuracy %.1f%%; robust accuracy %.1f%% under %s",
                prefix,
                100 * metrics[f"{prefix}_clean_accuracy"],
                100 * metrics[f"{prefix}_robust_accuracy"],
                metrics[f"{prefix}_attack"],
            )
        return output

    @staticmethod
    def _metrics(prediction: EvalPrediction) -> dict[str, float]:
        predictions: Any = prediction.predictions
        clean, adversarial = predictions
        right = clean == prediction.label_ids
        robust = right & (adversarial == prediction.label_ids)
        metrics: dict[str, float] = {"n": len(right)}
        for name, hits in (("clean_accuracy", right), ("robust_accuracy", robust)):
            low, high = wilson_interval(int(hits.sum()), len(hits))
            metrics |= {name: float(hits.mean()), f"{name}_low": low, f"{name}_high": high}
        return metrics

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measures clean and robust accuracy under `args.eval_attack`, white box through the prompts.

        Args:
            eval_dataset: A split of a task (columns `image` and `label`); by default the validation split.
            args: As of `transformers.Trainer.evaluate`.
            kwargs: As of `transformers.Trainer.evaluate`.

        Returns:
            `eval_clean_accuracy`, `eval_robust_accuracy`, each with its 95% Wilson interval (`_low`, `_high`), `eval_n` and
            `eval_attack`.
        """
        if isinstance(eval_dataset, datasets.Dataset):
            eval_dataset = PixelDataset(eval_dataset, self.classifier.transform)
        return super().evaluate(eval_dataset, *args, **kwargs)
