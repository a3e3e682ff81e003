"""CaptTrainer: adversarial consistency tuning on transformers' Trainer. It writes the step, not the loop."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalPrediction, get_last_checkpoint

from ..attacks import Attack
from ..classifier import ZeroShotClassifier, normalize, pooled
from ..data.pixels import PixelDataset
from ..data.task import Task
from ..data.transforms import PixelTransform
from ..evaluation import outcomes, wilson_interval
from ..hub import HubTrainer
from ..objectives import CaptObjective, Objective, Views
from ..randomness import example_generators
from .arguments import CaptTrainingArguments
from .frozen import FrozenOutputs
from .monitor import Monitor, TrainingStopped

logger = logging.getLogger(__name__)


class _SetEpoch(TrainerCallback):
    """Tells the dataset its epoch: the loader of a run resumed within an epoch does not."""

    def __init__(self, dataset: PixelDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))


class CaptTrainer(HubTrainer):
    r"""Tunes a CAPT adapter on adversarial images.

    A step with K attack steps costs (2K + 4) runs of the image tower and 2 of the text tower: the texts are run once, forward
    and backward, and the attack reuses them; the frozen model's logits are kept for each image while nothing is augmented.
    The random numbers of an image depend on the seed, the epoch and its place in the dataset alone, so that the batch size,
    accumulation, workers and the number of processes change a run by rounding only.

    Args:
        model: A `PeftModel` with a CAPT adapter, or any model with CLIP's `get_image_features` and trainable parameters.
        args: The arguments.
        task: What is classified: training images in `train`, evaluation images in `validation`, or in `test` if there is none.
        processor: The model's processor (`AutoProcessor.from_pretrained`).
        objective: Maps a step's views to a loss; by default CAPT's, with the arguments' `consistency` and `weighting`.
        attack: The training attack: a `PGD`, or an object with its `run`; by default PGD with the arguments' settings.
        teacher: Another CLIP whose predictions on clean images guide the tuning: a classifier over the same class names, or the
            folder or Hub id of a model. By default the base model itself, with the adapter off.
        kwargs: Further arguments of `transformers.Trainer` (`callbacks`, `optimizers`).

    Raises:
        ValueError: No training images, or a teacher with other classes or another image size.
    """

    args: CaptTrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: CaptTrainingArguments,
        *,
        task: Task,
        processor: Any,
        objective: Objective | None = None,
        attack: Attack | None = None,
        teacher: ZeroShotClassifier | str | None = None,
        **kwargs: Any,
    ) -> None:
        self.task = task
        # checks the texts before any long work
        self.classifier = ZeroShotClassifier(model, processor, task.class_names, task.template)
        self.objective: Objective = objective or CaptObjective(args.consistency, args.weighting)
        self.attack = attack or args.train_attack
        self.teacher = self._load_teacher(teacher)
        transform = PixelTransform(processor, augment=args.augment)
        train = PixelDataset(task["train"], transform, args.seed)
        held_out = task.splits.get("validation", task.splits.get("test"))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=None if held_out is None else PixelDataset(held_out, self.classifier.transform),
            compute_metrics=self._metrics,
            **kwargs,
        )
        self.add_callback(_SetEpoch(train))
        # the loss is a sum over the step's images, whatever the batches they come in
        self.model_accepts_loss_kwargs = True
        self._frozen_outputs = FrozenOutputs()
        self._frozen_texts: Tensor | None = None
        self._monitor = Monitor(task.num_classes)
        self.collapsed: str | None = None  # what was seen, where `stop_on_collapse` is off
        if isinstance(model, PeftModel):
            config: Any = model.peft_config[model.active_adapter]
            config.class_names, config.template = list(task.class_names), task.template

    def _load_teacher(self, teacher: ZeroShotClassifier | str | None) -> ZeroShotClassifier | None:
        if teacher is None:
            return None
        if isinstance(teacher, str):
            teacher = ZeroShotClassifier.from_pretrained(
                teacher, class_names=self.task.class_names, template=self.task.template
            )
        if teacher.class_names != self.task.class_names:
            raise ValueError(
                "The teacher classifies other classes than the task; give it the task's class names, in order."
            )
        if teacher.transform.size != self.classifier.transform.size:
            raise ValueError(
                f"The teacher takes {teacher.transform.size} pixels, the model {self.classifier.transform.size}."
            )
        return teacher.eval().requires_grad_(False)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Tunes the adapter; arguments and result as of `transformers.Trainer.train`."""
        if getattr(self.model, "_is_accelerate_prepared", False) and self.model_wrapped is self.model:
            # evaluate() has prepared the model without DDP, and Accelerate prepares nothing twice: the processes would train
            # apart, without a word (transformers 5.23)
            self.model._is_accelerate_prepared = False  # type: ignore[assignment]
            self.accelerator._models.clear()
        return super().train(*args, **kwargs)

    # ----------------------------------------------------------------------------------------------------- the step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Attacks the batch and returns the objective's loss on it.

        Args:
            model: The model as Accelerate wrapped it.
            inputs: `pixels` (B, 3, H, W) in [0, 1], `labels` (B,) and `index` (B,), the images' places in the training set.
            return_outputs: Return the views too.
            num_items_in_batch: Number of images in the whole step, over accumulation and processes.
        """
        pixels, labels = inputs["pixels"], inputs["labels"]
        indices = inputs["index"].tolist()
        classifier = self.classifier
        # the only call of the wrapped model, so that DDP prepares its reduction; the adversarial pass below adds to its graph
        output = model(**classifier.text_inputs(), pixel_values=classifier.pixel_values(pixels))
        texts, clean_features = output.text_embeds, output.image_embeds  # (N, D), (B, D)
        clean = classifier.logits(clean_features, texts)  # (B, N)

        result = self._attack(pixels, labels, indices, texts.detach(), clean.detach())
        with self.accelerator.autocast():
            adversarial_features = self._image_features(result.images)  # (B, D)
        views = Views(
            clean=clean,
            adversarial=classifier.logits(adversarial_features, texts),
            labels=labels,
            frozen=self._frozen(pixels, indices) if self.objective.needs_frozen else None,
            progress=self.state.global_step / max(1, self.state.max_steps),
            clean_features=clean_features,
            adversarial_features=adversarial_features,
        )
        loss, parts = self.objective(views)
        self._check_finite(loss, indices)
        self._monitor.record(views, parts, result.zero_gradient_share)
        if num_items_in_batch is not None:  # mean over the batch -> this batch's share of the mean over the step
            loss = loss * (len(labels) * self.accelerator.num_processes / num_items_in_batch)
        return (loss, {"views": views}) if return_outputs else loss

    def _attack(self, pixels: Tensor, labels: Tensor, indices: list[int], texts: Tensor, clean: Tensor) -> Any:
        """Makes the adversarial images of a step, through the image tower alone, in the model's own precision."""
        # int() of a sum such as 2 + 3/3; state.epoch counts finished steps, so it is the epoch of the step that runs
        generators = example_generators(self.args.seed, indices, epoch=int(self.state.epoch or 0))

        def logits_fn(images: Tensor) -> Tensor:
            return self.classifier.logits(self._image_features(images), texts)

        return self.attack.run(logits_fn, pixels, labels, generators, clean_logits=clean)

    def _image_features(self, pixels: Tensor) -> Tensor:
        values = self.classifier.pixel_values(pixels)
        return normalize(pooled(self.classifier.model.get_image_features(pixel_values=values)))

    @torch.no_grad()
    def _frozen(self, pixels: Tensor, indices: list[int]) -> Tensor:
        """Returns the frozen model's (B, N) logits on clean images, computed once an image while nothing is augmented."""
        if self.args.augment:
            return self._run_frozen(pixels)
        return self._frozen_outputs.get(indices, lambda rows: self._run_frozen(pixels[rows]))

    def _run_frozen(self, pixels: Tensor) -> Tensor:
        if self.teacher is not None:
            return self.teacher.to(pixels.device)(pixels)
        with self.classifier.frozen() as frozen:
            if self._frozen_texts is None:
                self._frozen_texts = frozen.encode_texts()
            return frozen.logits(frozen.image_features(pixels), self._frozen_texts)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._frozen_outputs.save(self._frozen_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self._frozen_outputs.load(self._frozen_file(checkpoint), self.args.device)

    def _frozen_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"frozen_outputs_{self.args.process_index}.safetensors"

    def _check_finite(self, loss: Tensor, indices: list[int]) -> None:
        if torch.isfinite(loss):
            return
        raise TrainingStopped(
            f"The loss is {loss.item()} at step {self.state.global_step} (images {indices[:8]} of the training set). Lower the "
            f"learning rate ({self.args.learning_rate}) or the precision's effect (bf16 instead of fp16). {self._last_good()}"
        )

    def _last_good(self) -> str:
        checkpoint = self.state.best_model_checkpoint or self._latest_checkpoint()
        return f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was written before."

    def _latest_checkpoint(self) -> str | None:
        try:
            return get_last_checkpoint(self.args.output_dir)
        except OSError:
            return None

    # ---------------------------------------------------------------------------------------------------- the log

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Logs, with the loss, its parts, clean and robust accuracy under the training attack, and that attack's name."""
        if "loss" in logs:
            means = self._monitor.means(lambda sums: self.accelerator.reduce(sums, "sum"))
            logs |= means | {"attack": self.attack.name}
            self.collapsed = self._monitor.collapse(means) or self.collapsed
            if self.collapsed and self.args.stop_on_collapse:
                raise TrainingStopped(
                    f"The model has become constant at step {self.state.global_step}: {self.collapsed}. Lower the learning rate "
                    f"({self.args.learning_rate}) or `consistency` ({self.args.consistency}), or use another coupling. "
                    f"{self._last_good()}"
                )
        super().log(logs, start_time)

    # -------------------------------------------------------------------------------------------------- evaluation

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Attacks an evaluation batch; returns the predicted classes of its clean and its adversarial images."""
        inputs = self._prepare_inputs(inputs)
        pixels, labels, indices = inputs["pixels"], inputs["labels"], inputs["index"].tolist()
        self.classifier.eval()
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
