"""CaptTrainer: adversarial consistency tuning on transformers' Trainer."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import TorchDynamoPlugin, gather_object
from huggingface_hub import CommitInfo
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_utils import (
    EvalPrediction,
    PredictionOutput,
)

from ..attacks import Attack, AttackResult
from ..clip.activations import lean_activations
from ..clip.classifier import ZeroShotClassifier
from ..clip.texts import normalize
from ..data.names import labels_by_name
from ..data.pixels import PixelDataset, PixelTransform
from ..data.task import Task, kind_of
from ..evaluation import Accuracy, outcomes
from ..objectives import CaptObjective, Objective, Views, needs_frozen_adversarial
from ..randomness import example_generators
from ..results.card import CardDetails, write_cards_for
from ..results.hub import prepare_repo, push_adapter, saved_copy, write_model_card
from ..tuner.clip import both_features, image_features
from ..tuner.others import check_tunable, keep_classes, save_classes
from ..utils.files import unwritable, written_whole
from ..utils.modules import eval_mode
from ..utils.outputs import save_somewhere
from ..utils.text import cut
from .arguments import CaptTrainingArguments, check_arguments, check_best_metric, one_processor
from .callbacks import StopOnCollapse, TrainingStopped, advice, default_callbacks, where
from .checkpoints import Checkpoints
from .chunks import COUNTED, Batch, compiled_towers, fill_batch, split_batch, sum_of_losses, without_repeats
from .frozen import FrozenOutputs, check_frozen, load_teacher
from .progress import show_progress

logger = logging.getLogger(__name__)

WARMUP_RATE = 1e-5  # of the whole first epoch, with lr_schedule="epoch"


class CaptTrainer(Trainer):
    r"""Tunes an adapter on adversarial images: CAPT's prompts, or LoRA or another method of PEFT.

    A step with K attack steps costs (2K + 4) runs of the image tower and 2 of the text tower: the texts are run once, forward
    and backward, and the attack reuses them; the frozen model runs each image once, before training, while nothing is augmented,
    and the adversarial ones of a step only for an objective that asks for them.
    The random numbers of an image depend on the seed, the epoch and its place in the dataset alone, so that the batch size,
    accumulation, workers and the number of processes change a run by rounding only; another kind of device draws others.

    Args:
        model: A `PeftModel` with an adapter of CAPT or another PEFT method, or any model with CLIP's `get_image_features` and
            trainable parameters.
        args: The arguments.
        task: What is classified: training images in `train`, evaluation images in `validation`, or in `test` if there is none.
        processor: The model's processor (`AutoProcessor.from_pretrained`).
        processing_class: Another name of `processor`.
        objective: Maps a step's views to a loss; by default CAPT's, with the arguments' `consistency`, `weighting` and
            `frozen_term`.
        attack: The training attack: a `PGD`, or an object with its `run`; by default PGD with the arguments' settings.
        teacher: Another CLIP whose predictions on clean images guide the tuning: a classifier over the same class names, or the
            folder or Hub id of a model. By default the base model itself, with the adapter off.
        eval_dataset: What `evaluate` measures, as its own `eval_dataset`; by default the task's `validation` split, or `test`
            if there is none.
        kwargs: Further arguments of `transformers.Trainer`: `callbacks`, `optimizers`, `optimizer_cls_and_kwargs`.

    Raises:
        TypeError: `args` or `task` of another kind.
        ValueError: A setting without effect, which is named; an adapter of strength 0; no training images; splits with classes
            that the task does not have; a teacher with other classes or another image size, or that moves with the model; no
            teacher for a base model that is tuned itself; FSDP or DeepSpeed; or processes that do not know of each other.
    """

    args: CaptTrainingArguments
    hub_model_id: Any  # the Trainer starts with None
    _found: str | None = None

    def __init__(
        self,
        model: nn.Module,
        args: CaptTrainingArguments,
        *,
        task: Task,
        processor: Any = None,
        processing_class: Any = None,
        objective: Objective | None = None,
        attack: Attack | None = None,
        teacher: ZeroShotClassifier | str | None = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(args, kwargs, attack)
        if not isinstance(task, Task):
            raise TypeError(f"task must be a Task, as load_task('digits') returns one, not {repr(task)[:80]}.")
        processor = one_processor(processor, processing_class)
        _check_strength(model)
        if isinstance(model, PeftModel):
            check_tunable(model)
        self.task = task
        # checks the texts before any long work
        self.classifier = ZeroShotClassifier(
            model,
            processor,
            task.class_names,
            task.template,
            class_texts=task.class_texts,
            text_chunk_size=args.text_chunk_size,
        )
        self._text_parts = self.classifier.text_parts(cut=not args.torch_compile)
        self.objective: Objective = objective or CaptObjective(args.consistency, args.weighting, args.frozen_term)
        self.attack = attack or args.train_attack
        self.teacher = load_teacher(teacher, self.classifier)
        transform = PixelTransform(processor, augment=args.augment, squash=args.squash)
        check_frozen(self.classifier, self.objective, self.teacher)
        labels = labels_by_name(task["train"], task.class_names, "The split 'train'")
        train = PixelDataset(task["train"], transform, args.seed, labels=labels)
        self.eval_dataset = None
        held_out = task.splits.get("validation", task.splits.get("test")) if eval_dataset is None else eval_dataset
        held_out = self._pixels(held_out, "eval_dataset" if eval_dataset is not None else "The held-out split")
        try:
            super().__init__(
                model=model,
                args=args,
                train_dataset=train,
                eval_dataset=held_out,
                compute_metrics=self._metrics,
                **kwargs,
            )
        except OSError as error:
            folder = str(args.output_dir)  # the Trainer creates it
            if error.filename is None or not folder.startswith(str(error.filename)):
                raise
            raise unwritable(folder, error, "output_dir") from error
        if args.torch_compile:
            # Accelerate would compile the whole model, but the attack and the adversarial pass do not go through its `forward`
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
        check_best_metric(args, held_out, from_test=eval_dataset is None and "validation" not in task.splits)
        self.at_chance: str | None = None  # what WarnAtChance found
        show_progress(self)
        for callback in default_callbacks(self):
            self.add_callback(callback)
        # the loss is a sum over the step's images, whatever the batches they come in
        self.model_accepts_loss_kwargs = True
        self._frozen_outputs = FrozenOutputs(self.classifier, self.teacher, train, args)
        self._checkpoints = Checkpoints(self)
        self.step_images: list[int] = []  # places of the step's images in the training set
        self._sums: dict[str, Tensor] = {}  # over the images since the last log line
        if isinstance(model, PeftModel):
            keep_classes(
                model,
                class_names=list(task.class_names),
                template=self.classifier.template,
                class_texts=self.classifier.class_texts,
            )

    def _make_trainable(self) -> None:
        """Makes the active adapter trainable if nothing is, as PEFT loads adapters without `is_trainable=True`."""
        model: Any = self.classifier.model
        if any(p.requires_grad for p in model.parameters()):
            return
        if not isinstance(model, PeftModel):
            raise ValueError("No parameter of the model is trainable. Set requires_grad of those that shall be tuned.")
        logger.warning("The adapter %r was loaded for inference; it is made trainable now.", model.active_adapter)
        model.set_adapter(model.active_adapter)

    # ------------------------------------------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Tunes the adapter; other arguments and the result are those of `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: True (or "true"): go on from the newest whole checkpoint in `args.output_dir`, or begin if
                there is none yet. A path: go on from that checkpoint or, if it is damaged, from the whole one before it.
            args: See `transformers.Trainer.train`.
            kwargs: See `transformers.Trainer.train`.

        Raises:
            ValueError: `args.output_dir` cannot be written into, or another run writes there; there are checkpoints, but none is
                whole; or the checkpoint is of another run: another model, adapter, task, attack, objective or seed.
        """
        if getattr(self.model, "_is_accelerate_prepared", False) and self.model_wrapped is self.model:
            # evaluate() has prepared the model without DDP, and Accelerate prepares nothing twice: the processes would train
            # apart, without a word (transformers 5.23)
            self.model._is_accelerate_prepared = False  # type: ignore[assignment]
            self.accelerator._models.clear()
        locked = self._checkpoints.lock is not None  # by a call of find_checkpoint
        try:
            if resume_from_checkpoint is None or resume_from_checkpoint != self._found:
                resume_from_checkpoint = self.find_checkpoint(resume_from_checkpoint)
            if self.objective.needs_frozen:
                self._frozen_outputs.compute()
            with compiled_towers(self.classifier.base_model, self.args):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if not locked:
                self.unlock()

    def unlock(self) -> None:
        """Lets other runs write into `args.output_dir`, from which `find_checkpoint` keeps them, once all results are there."""
        self._checkpoints.unlock()

    def find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Returns the checkpoint that `train` would go on from, or None; to be called before long work, whose end would be lost.

        No other run writes into `args.output_dir` until `unlock` is called, this trainer goes away, or its process ends.

        Args:
            resume_from_checkpoint: See `train`.

        Raises:
            ValueError: See `train`.
        """
        check_frozen(self.classifier, self.objective, self.teacher)
        self._make_trainable()
        self._found = self._checkpoints.find(resume_from_checkpoint)
        return self._found

    # -------------------------------------------------------------------------- what published trainers do otherwise

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Returns the parameters that `weight_decay` acts on: with `decay_biases` all of them."""
        if self.args.decay_biases:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Makes the schedule of the learning rate, by step or, with `lr_schedule="epoch"`, by epoch."""
        if self.args.lr_schedule == "step" or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        batch, images = self.args.train_batch_size * self.args.world_size, len(self.task["train"])
        batches = images // batch if self._drops_last(images) else math.ceil(images / batch)
        steps = math.ceil(batches / self.args.gradient_accumulation_steps)
        rates: Any = optimizer or self.optimizer
        self.lr_scheduler = epoch_cosine(rates, steps, math.ceil(num_training_steps / steps))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _drops_last(self, images: int) -> bool:
        return self.args.dataloader_drop_last and images >= self.args.train_batch_size * self.args.world_size

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Makes a loader; what drops images and keeps workers is for training, whose loader is used more than once.

        `dataloader_drop_last` drops no images of a set smaller than a batch.
        """
        training, own = kwargs.get("is_training", False), self.args
        asked = own.dataloader_drop_last, own.dataloader_persistent_workers
        own.dataloader_drop_last = training and self._drops_last(len(dataset))
        own.dataloader_persistent_workers = training and own.dataloader_persistent_workers
        try:
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            own.dataloader_drop_last, own.dataloader_persistent_workers = asked

    # ------------------------------------------------------------------------------------------------------ the step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Fetches a step's batches and counts their images; of several processes, none trains on an image twice in an epoch."""
        self.step_images = []
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        repeats = self.accelerator.num_processes > 1 and not self._drops_last(len(self.task["train"]))
        if repeats and batches and self.accelerator.gradient_state.end_of_dataloader:
            batches[-1] = without_repeats(batches[-1], self.accelerator, len(self.task["train"]))
            own = sum(batch.get(COUNTED, len(batch["labels"])) for batch in batches)
            count = self.accelerator.reduce(torch.tensor(own, device=device), "sum")
        return batches, count

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs a step, forward and backward, keeping less between the two than plain CLIP does."""
        with lean_activations(self.classifier.base_model):
            return super().training_step(*args, **kwargs)

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
            return_outputs: Return the views too, if the batch is computed in one chunk.
            num_items_in_batch: Number of images in the whole step, over accumulation and processes.
        """
        chunks = split_batch(inputs, self.args.image_chunk_size)
        outputs = {}
        texts, clean_features = self._texts_and_clean_features(model, chunks[0].pixels)  # (N, D), (b, D)
        if len(chunks) == 1:
            loss, outputs["views"] = self._loss(chunks[0], texts, clean_features)
        else:
            parameters = [p for p in self.classifier.model.parameters() if p.requires_grad]
            loss = sum_of_losses(partial(self._losses, chunks, clean_features), texts, parameters)
        self._check_loss(loss, [place for chunk in chunks for place in chunk.indices])
        if num_items_in_batch is not None:  # mean over the batch -> this batch's share of the mean over the step
            loss = loss * (sum(chunk.counted for chunk in chunks) * self.accelerator.num_processes / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _check_loss(self, loss: Tensor, images: list[int]) -> None:
        """Stops all processes if the loss of one is not finite: one that raised alone would leave the others waiting."""
        self.step_images += images
        failed = ~torch.isfinite(loss.detach())
        if not self.accelerator.reduce(failed.float(), "sum").item():
            return
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        place = where(images, self.state) + (f", on rank {rank} of {processes}" if processes > 1 else "")
        found = gather_object([f"{loss.item()} at {place}"] if failed else [])
        raise TrainingStopped(f"The loss is {', '.join(found)}. {advice(self.args, self.state)}")

    def _losses(self, chunks: list[Batch], clean_features: Tensor, texts: Tensor) -> Iterator[Tensor]:
        """Yields what each chunk adds to the batch's loss; `clean_features` (b, D) are those of the first."""
        images = sum(len(chunk.labels) for chunk in chunks)
        for number, chunk in enumerate(chunks):
            if number:
                with self.accelerator.autocast():
                    clean_features = self._image_features(chunk.pixels)
            yield self._loss(chunk, texts, clean_features)[0] * (len(chunk.labels) / images)

    def _loss(self, batch: Batch, texts: Tensor, clean_features: Tensor) -> tuple[Tensor, Views]:
        """Attacks images and returns the objective's loss on them and what it saw.

        Text features (N, D) and clean image features (b, D) come with their gradients.
        """
        clean = self.classifier.logits(clean_features, texts)  # (b, N)
        result = self._attack(batch, texts.detach(), clean.detach())
        with self.accelerator.autocast():
            adversarial_features = self._image_features(result.images)  # (b, D)
        views = Views(
            clean=clean,
            adversarial=self.classifier.logits(adversarial_features, texts),
            labels=batch.labels,
            progress=self.state.global_step / max(1, self.state.max_steps),
            clean_features=clean_features,
            adversarial_features=adversarial_features,
            **self._frozen(batch, result.images),
        )
        loss, parts = self.objective(views)
        self._record(views, parts, result.zero_gradient_share, batch.counted)
        return loss, views

    def _texts_and_clean_features(self, model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the normalised features of the texts (N, D) and of clean images (B, D).

        The only call of the wrapped model, so that DDP prepares its reduction; the other parts of the texts and the adversarial
        images add to its graph.
        """
        values = self._pixel_values(pixels)
        if self._text_parts is None:
            texts, images = both_features(model, self.classifier.text_inputs(), values)
            return texts, images[: len(pixels)]
        first, *others = self._text_parts.parts
        with self.classifier.part_inputs(first) as inputs:
            texts, images = both_features(model, inputs, values)
        with self.accelerator.autocast():
            features = [texts, *(self.classifier.encode_part(part) for part in others)]
        return self._text_parts.join(features), images[: len(pixels)]

    def _attack(self, batch: Batch, texts: Tensor, clean: Tensor) -> AttackResult:
        """Makes the adversarial images of a step, through the image tower alone; losses and signs are in full precision."""
        generators = self._generators(batch)

        def logits_fn(images: Tensor) -> Tensor:
            with self._attack_precision():
                features = self._image_features(images)
            return self.classifier.logits(features, texts)  # outside, or the product would be rounded to half precision

        return self.attack.run(logits_fn, batch.pixels, batch.labels, generators, clean_logits=clean)

    def _generators(self, batch: Batch) -> list[torch.Generator]:
        # int() of a sum such as 2 + 3/3; state.epoch counts finished steps, so it is the epoch of the step that runs
        epoch, device = int(self.state.epoch or 0), batch.pixels.device
        return example_generators(self.args.seed, batch.indices, epoch=epoch, device=device)

    def _attack_precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.args.full_precision_attack else self.accelerator.autocast()

    def _image_features(self, pixels: Tensor) -> Tensor:
        features = image_features(self.classifier.model, self._pixel_values(pixels))
        return normalize(features[: len(pixels)].float())

    def _pixel_values(self, pixels: Tensor) -> Tensor:
        values = self.classifier.pixel_values(pixels)
        size = self.args.image_chunk_size or self.args.train_batch_size
        return fill_batch(values, size) if self.args.torch_compile else values

    def _frozen(self, batch: Batch, adversarial: Tensor) -> dict[str, Tensor]:
        """Returns what the objective asks for of the frozen model, as fields of `Views`."""
        views, outputs = {}, self._frozen_outputs
        if self.objective.needs_frozen:
            features = outputs.features(batch.pixels, batch.indices)
            views = {"frozen_features": normalize(features), "frozen": outputs.logits(features)}
        if needs_frozen_adversarial(self.objective):
            views["frozen_adversarial"] = outputs.logits(outputs.run(adversarial))
        return views

    @torch.no_grad()
    def _record(self, views: Views, parts: dict[str, Tensor], zero_gradient_share: Tensor, images: int) -> None:
        """Adds a batch, which counts as `images` images, to the means of the next log line."""
        right = views.clean.argmax(-1) == views.labels
        robust = right & (views.adversarial.argmax(-1) == views.labels)
        means = parts | {
            "clean_accuracy": right.float().mean(),
            "robust_accuracy": robust.float().mean(),
            "zero_gradient_share": zero_gradient_share.nan_to_num().mean(),
        }
        sums = {name: mean.float() * images for name, mean in means.items()}
        for name, added in (sums | {"images": sums["clean_accuracy"].new_full((), images)}).items():
            self._sums[name] = self._sums[name] + added if name in self._sums else added

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Logs, with the loss, its parts, clean and robust accuracy under the training attack, and that attack's name."""
        if "loss" in logs:
            logs = logs | self._means() | {"attack": self.attack.name}
        super().log(logs, start_time)

    def _means(self) -> dict[str, float]:
        """Returns the means over all processes' images since the last call."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        totals = dict(zip(names, self.accelerator.reduce(sums, "sum").tolist(), strict=True))
        self._sums.clear()
        images = totals.pop("images")
        return {name: total / images for name, total in totals.items()}

    @property
    def collapsed(self) -> str | None:
        """What `StopOnCollapse` saw, where `stop_on_collapse` is off."""
        return next((c.found for c in self.callback_handler.callbacks if isinstance(c, StopOnCollapse)), None)

    # ---------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measures clean and robust accuracy under `args.eval_attack`, white box through the prompts.

        Args:
            eval_dataset: A split (columns `image` and `label`), whose labels are matched to the task's class names by name; the
                name of a split of the task; or a dict of splits, whose names then stand in the metrics (`eval_NAME_...`). By
                default that of `CaptTrainer`.
            args: See `transformers.Trainer.evaluate`.
            kwargs: See `transformers.Trainer.evaluate`.

        Returns:
            `eval_clean_accuracy`, `eval_robust_accuracy`, their 95% Wilson intervals (`_low`, `_high`), `eval_n`, `eval_attack`.

        Raises:
            ValueError: A split without images, or with classes that the task does not have.
        """
        return super().evaluate(self._pixels(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predicts the classes of clean images and of the same under `args.eval_attack`.

        Args:
            test_dataset: A split, or the name of a split of the task; see `evaluate`.
            args: See `transformers.Trainer.predict`.
            kwargs: See `transformers.Trainer.predict`.

        Returns:
            `predictions`, the (n,) predicted classes of the clean images and the (n,) of the adversarial ones; `label_ids`, the
            (n,) labels; and the `metrics` of `evaluate`, named `test_...`.

        Raises:
            ValueError: See `evaluate`.
        """
        return super().predict(self._pixels(test_dataset), *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Attacks an evaluation batch; returns the predicted classes of its clean and its adversarial images."""
        inputs = self._prepare_inputs(inputs)
        pixels, labels, indices = inputs["pixels"], inputs["labels"], inputs["index"].tolist()
        with eval_mode(self.classifier), self._eager():
            predicted = outcomes(self.classifier, self.args.evaluation_attack, pixels, labels, indices, self.args.seed)
        return None, predicted, labels

    def _metrics(self, prediction: EvalPrediction) -> dict[str, Any]:
        predictions: Any = prediction.predictions
        clean, adversarial = (classes == prediction.label_ids for classes in predictions)
        attack = self.args.evaluation_attack
        metrics: dict[str, Any] = {"n": len(clean), "attack": f"{attack.name}, {attack.threat_model}"}
        for name, right in (("clean_accuracy", clean), ("robust_accuracy", clean & adversarial)):
            accuracy = Accuracy(int(right.sum()), len(right))
            low, high = accuracy.interval
            metrics |= {name: accuracy.value, f"{name}_low": low, f"{name}_high": high}
            logger.info("%s on %d images: %s", name.replace("_", " "), len(right), accuracy)
        return metrics

    def _eager(self) -> AbstractContextManager[Any]:
        """Within it nothing is compiled: for what runs rarely or in many shapes."""
        return torch.compiler.set_stance("force_eager") if self.args.torch_compile else nullcontext()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Returns the loader of an evaluation, always of this very split."""
        split = self.eval_dataset if eval_dataset is None else eval_dataset
        return super().get_eval_dataloader(None if split is None else self._pixels(split))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Returns the loader of a prediction."""
        return super().get_test_dataloader(self._pixels(test_dataset))

    def _pixels(self, data: Any, what: str = "The split") -> Any:
        """Returns a split, or the one of this name, as pixels and labels that count the task's class names; of a dict, a dict.

        `what` says what it is in messages.
        """
        if data is None:
            return None
        if isinstance(data, dict):
            return {name: self._pixels(split, f"The split {name!r}") for name, split in data.items()}
        if isinstance(data, str):
            known = {**self.task.splits, **(self.eval_dataset if isinstance(self.eval_dataset, dict) else {})}
            if data not in known:
                raise ValueError(
                    f"There is no split {data[:80]!r}. Give one of {', '.join(map(repr, known))}, or a split itself."
                )
            data, what = known[data], f"The split {data!r}"
        split, transform = data, self.classifier.transform
        if isinstance(data, PixelDataset):
            split, transform = data.dataset, data.transform
        if not isinstance(split, datasets.Dataset) or not {"image", "label"} <= set(split.column_names):
            found = f"the columns {split.column_names}" if isinstance(split, datasets.Dataset) else kind_of(data)
            raise ValueError(
                f"{what} must be a datasets.Dataset with the columns `image` and `label`, not {cut(found, 400)}. "
                "capt_peft.load_task makes such splits."
            )
        if not len(split):
            raise ValueError(f"{what} has no images.")
        labels = labels_by_name(split, self.task.class_names, what)
        same = isinstance(data, PixelDataset) and data.labels == labels.tolist()
        return data if same else PixelDataset(split, transform, labels=labels)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoints.staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        write = partial(super()._save_checkpoint, model, trial)
        self._checkpoints.save(write, Path(self._get_output_dir(trial)))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self._checkpoints.best_before = self.state.best_metric, self.state.best_global_step
        return super()._determine_best_metric(metrics, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes the model, whole or not at all; where there is no space for it, somewhere else."""
        folder = output_dir or str(self.args.output_dir)
        if not self.args.should_save:
            super()._save(folder, state_dict)
        elif self._checkpoints.staging:
            with written_whole(folder) as temporary:
                self._write_model(temporary, state_dict, Path(folder))
        else:
            save_somewhere(folder, lambda temporary: self._write_model(temporary, state_dict, Path(folder)))

    def _write_model(self, folder: Path, state_dict: dict[str, Any] | None, home: Path) -> None:
        args, self.args = self.args, copy.copy(self.args)  # which the Trainer pickles, and others may read
        vars(self.args).update({name: None for name in vars(args) if name.endswith("_token")})
        try:
            super()._save(str(folder), state_dict)
            save_classes(self.classifier.model, folder)
            write_cards_for(folder, home)
        finally:
            self.args = args

    # ------------------------------------------------------------------------------------------------------- sharing

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository of `args.hub_model_id` before any long work; arguments as for `prepare_repo`."""
        if self.is_world_process_zero():
            private = private if private is not None else self.args.hub_private_repo
            self.hub_model_id = prepare_repo(self._repo_id(), token=token or self.args.hub_token, private=private)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Uploads the active adapter with its card, and with the results in `args.output_dir` if they are of these very weights.

        Checkpoints and the Trainer's pickled arguments stay at home.

        Args:
            commit_message: Title of the commit.
            blocking: False: return a future, as transformers does; an adapter is small, so that it is done by then.
            token: As for `push_adapter`; by default `args.hub_token`.
            revision: As for `push_adapter`; by default `args.hub_revision`.
            private: As for `push_adapter`; by default `args.hub_private_repo`.
            kwargs: What else the card says: fields of `CardDetails` (`dataset_name`, `tags`, `language`, `finetuned_from`, ...).

        Returns:
            The commit; None in all processes but the first.

        Raises:
            TypeError: A word for the card that it has no place for.
            ValueError: The model has no adapter, or as for `push_adapter`.
        """
        CardDetails.of(kwargs)  # or it raises
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        model = self.classifier.model
        commit = push_adapter(
            saved_copy(model, Path(str(self.args.output_dir))) or model,
            self._repo_id(),
            token=token if token is not None else self.args.hub_token,
            private=private if private is not None else self.args.hub_private_repo,
            revision=revision if revision is not None else self.args.hub_revision,
            commit_message=commit_message or "End of training",
            strict=False,
            **kwargs,
        )
        self.hub_model_id = commit.repo_url.repo_id
        future: Future[CommitInfo] = Future()
        future.set_result(commit)
        return commit if blocking else future

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the adapter's card to `args.output_dir`, with the results there if they are of the weights there.

        Args:
            args: As for `transformers.Trainer.create_model_card`.
            kwargs: Fields of `CardDetails`.

        Raises:
            TypeError: A word for the card that it has no place for.
            ValueError: A record in the folder is damaged or of other weights.
        """
        details = CardDetails.of(kwargs, *args)
        if self.is_world_process_zero():
            write_model_card(self.classifier.model, Path(str(self.args.output_dir)), self._repo_id(), details)

    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads nothing while it trains."""


def _check_strength(model: nn.Module) -> None:
    if isinstance(model, PeftModel) and getattr(model.peft_config[model.active_adapter], "strength", 1) == 0:
        raise ValueError(
            "The adapter has strength 0: its prompts do not act, and no gradient would reach them. Give it another one first: "
            "capt_peft.set_strength(model, 1)."
        )


def epoch_cosine(optimizer: Optimizer, steps: int, epochs: int) -> LambdaLR:
    """Returns the schedule of CoOp, MaPLe, FAP and APT: one epoch, of `steps` steps, at 1e-5, then a cosine by epoch.

    Epoch e, counted from 0, has `learning_rate * (1 + cos(pi * (e - 1) / epochs)) / 2` for e > 0.
    """
    if epochs <= 1:
        logger.warning(
            "lr_schedule='epoch' keeps the first epoch at a learning rate of %g, and this run has no second one: it learns next "
            "to nothing. Give it more epochs, or lr_schedule='step'.",
            WARMUP_RATE,
        )

    def share(rate: float) -> Callable[[int], float]:
        def at(step: int) -> float:  # a function, whose state no checkpoint holds
            epoch = step // steps
            if epoch < 1:
                return WARMUP_RATE / rate if rate else 0.0
            return (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2

        return at

    return LambdaLR(optimizer, [share(group["lr"]) for group in optimizer.param_groups])
