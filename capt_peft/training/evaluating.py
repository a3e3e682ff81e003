"""Evaluation within the Trainer: clean and robust accuracy, under an attack that is stronger than training's."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import datasets
import torch
from torch import nn
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from ..clip.classifier import ZeroShotClassifier
from ..data.pixels import PixelDataset
from ..data.task import Task, labels_by_name
from ..evaluation import outcomes, wilson_interval
from ..utils.modules import eval_mode
from .arguments import CaptTrainingArguments
from .checkpoints import CheckpointTrainer

logger = logging.getLogger(__name__)


class EvaluatingTrainer(CheckpointTrainer):
    """A Trainer whose evaluation attacks its images."""

    args: CaptTrainingArguments
    classifier: ZeroShotClassifier
    task: Task

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
            eval_dataset: A split (columns `image` and `label`), whose labels are matched to the task's class names by name; the
                name of a split of the task; or a dict of splits, whose names then stand in the metrics (`eval_NAME_...`). By
                default as of `CaptTrainer`.
            args: As of `transformers.Trainer.evaluate`.
            kwargs: As of `transformers.Trainer.evaluate`.

        Returns:
            `eval_clean_accuracy`, `eval_robust_accuracy`, each with its 95% Wilson interval (`_low`, `_high`), `eval_n` and
            `eval_attack`.

        Raises:
            ValueError: A split without images, or with classes that the task does not have.
        """
        return super().evaluate(self._pixels(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predicts the classes of clean images and of the same under `args.eval_attack`.

        Args:
            test_dataset: A split, or the name of a split of the task, as of `evaluate`.
            args: As of `transformers.Trainer.predict`.
            kwargs: As of `transformers.Trainer.predict`.

        Returns:
            `predictions`, the (n,) predicted classes of the clean images and the (n,) of the adversarial ones; `label_ids`, the
            (n,) labels; and `metrics` as of `evaluate`, named `test_...`.

        Raises:
            ValueError: As of `evaluate`.
        """
        return super().predict(self._pixels(test_dataset), *args, **kwargs)

    # ------------------------------------------------------------------------------------------------------- the images

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Returns the loader of an evaluation, always of this very split."""
        # the Trainer keeps persistent workers under one name for all splits, and would hand out those of another
        getattr(self, "_eval_dataloaders", {}).clear()
        split = self.eval_dataset if eval_dataset is None else eval_dataset
        return super().get_eval_dataloader(None if split is None else self._pixels(split))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Returns the loader of a prediction."""
        return super().get_test_dataloader(self._pixels(test_dataset))

    def _pixels(self, data: Any, what: str = "The split") -> Any:
        """Returns a split as pixels with labels that count the task's class names, and several splits as a dict of such.

        Args:
            data: A split, its name, or a dict of splits; None stays None.
            what: What it is, for messages.
        """
        if data is None:
            return None
        if isinstance(data, dict):
            return {name: self._pixels(split, f"The split {name!r}") for name, split in data.items()}
        if isinstance(data, str):
            given = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if data not in given and data not in self.task.splits:
                names = ", ".join(map(repr, {**given, **self.task.splits}))
                raise ValueError(f"There is no split {data[:80]!r}. Give one of {names}, or a split itself.")
            return self._pixels(given[data] if data in given else self.task[data], f"The split {data!r}")
        transform = data.transform if isinstance(data, PixelDataset) else self.classifier.transform
        split = data.dataset if isinstance(data, PixelDataset) else data
        if not isinstance(split, datasets.Dataset) or not {"image", "label"} <= set(split.column_names):
            found = f"the columns {split.column_names}" if isinstance(split, datasets.Dataset) else type(data).__name__
            raise ValueError(
                f"{what} must be a datasets.Dataset with the columns `image` and `label`, not {found[:200]}. capt_peft.load_task "
                "makes such splits."
            )
        if not len(split):
            raise ValueError(f"{what} has no images.")
        labels = labels_by_name(split, self.task.class_names, what)
        if labels.dtype.kind not in "iu":
            raise ValueError(
                f"{what} has labels of the type {labels.dtype}. Give whole numbers, one for each class name."
            )
        if isinstance(data, PixelDataset) and data.labels == labels.tolist():
            return data
        return PixelDataset(split, transform, labels=labels)
