"""CaptTrainer: adversarial consistency tuning on transformers' Trainer. It writes the step, not the loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..attacks import Attack, AttackResult
from ..clip.activations import lean_activations
from ..clip.classifier import ZeroShotClassifier, normalize
from ..data.pixels import PixelDataset
from ..data.task import Task, labels_by_name
from ..data.transforms import PixelTransform
from ..objectives import CaptObjective, Objective, Views
from ..randomness import example_generators
from ..tuner.clip import image_features
from ..tuner.fingerprint import base_parameters
from .arguments import CaptTrainingArguments
from .batch import Batch, split_batch
from .chance import WarnAtChance
from .compilation import compiled_towers, fill_batch, leave_compiling_to_us
from .frozen import FrozenOutputs, without_dropout
from .guards import GuardedTrainer
from .memory import sum_of_losses
from .monitor import Monitor
from .processes import COUNTED, check_processes, without_repeats
from .schedule import epoch_cosine
from .settings import one_processor, refuse_arguments, refuse_attack_settings, refuse_trainer_arguments

logger = logging.getLogger(__name__)

MEASURED = (
    *(f"{name}{end}" for name in ("clean_accuracy", "robust_accuracy") for end in ("", "_low", "_high")),
    "n", "runtime", "samples_per_second", "steps_per_second",
)  # fmt: skip


class _SetEpoch(TrainerCallback):
    """Tells the dataset its epoch: the loader of a run resumed within an epoch does not."""

    def __init__(self, dataset: PixelDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))


class CaptTrainer(GuardedTrainer):
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
        processing_class: Another name of `processor`.
        objective: Maps a step's views to a loss; by default CAPT's, with the arguments' `consistency` and `weighting`.
        attack: The training attack: a `PGD`, or an object with its `run`; by default PGD with the arguments' settings.
        teacher: Another CLIP whose predictions on clean images guide the tuning: a classifier over the same class names, or the
            folder or Hub id of a model. By default the base model itself, with the adapter off.
        eval_dataset: What `evaluate` measures, as of its own `eval_dataset`; by default the task's `validation` split, or `test`
            if there is none.
        kwargs: Further arguments of `transformers.Trainer`: `callbacks`, `optimizers`, `optimizer_cls_and_kwargs`.

    Raises:
        TypeError: `args` of another kind.
        ValueError: A setting without effect, which is named; no training images; splits with classes that the task does not have;
            a teacher with other classes or another image size, or that moves with the model; no teacher for a base model that
            is tuned itself; FSDP or DeepSpeed; or processes that do not know of each other.
    """

    args: CaptTrainingArguments

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
        self._check_arguments(args, kwargs, attack)
        processor = one_processor(processor, processing_class)
        self.task = task
        # checks the texts before any long work
        self.classifier = ZeroShotClassifier(
            model, processor, task.class_names, task.template, text_chunk_size=args.text_chunk_size
        )
        self._text_parts = self.classifier.text_parts(cut=not args.torch_compile)
        self.objective: Objective = objective or CaptObjective(args.consistency, args.weighting)
        self.attack = attack or args.train_attack
        self.teacher = self._load_teacher(teacher)
        transform = PixelTransform(processor, augment=args.augment, squash=args.squash)
        self._check_frozen()
        labels = labels_by_name(task["train"], task.class_names, "The split 'train'")
        train = PixelDataset(task["train"], transform, args.seed, labels=labels)
        self.eval_dataset = None
        held_out = task.splits.get("validation", task.splits.get("test")) if eval_dataset is None else eval_dataset
        held_out = self._pixels(held_out, "eval_dataset" if eval_dataset is not None else "The held-out split")
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            compute_metrics=self._metrics,
            **kwargs,
        )
        if args.torch_compile:
            leave_compiling_to_us(self.accelerator)
        self._check_best_metric(from_test=eval_dataset is None and "validation" not in task.splits)
        self.add_callback(_SetEpoch(train))
        self.at_chance: str | None = None
        self.add_callback(WarnAtChance(self))
        # the loss is a sum over the step's images, whatever the batches they come in
        self.model_accepts_loss_kwargs = True
        self._frozen_outputs = FrozenOutputs()
        self._frozen_texts: Tensor | None = None
        self._monitor = Monitor(task.num_classes)
        if isinstance(model, PeftModel):
            config: Any = model.peft_config[model.active_adapter]
            config.class_names, config.template = list(task.class_names), task.template

    @staticmethod
    def _check_arguments(args: CaptTrainingArguments, others: dict[str, Any], attack: Attack | None) -> None:
        """Raises before any work if the arguments hold what cannot work or has no effect."""
        if not isinstance(args, CaptTrainingArguments):
            raise TypeError(
                f"args must be CaptTrainingArguments, not {type(args).__name__}: they hold the threat model too."
            )
        refuse_trainer_arguments(others)
        refuse_arguments(args)  # again: they may have been changed since they were made
        check_processes(args)
        if attack is not None:
            refuse_attack_settings(args)

    def _check_frozen(self) -> None:
        """Raises if the objective compares with a frozen model that would be tuned itself, or has no use for a teacher."""
        if not self.objective.needs_frozen and self.teacher is not None:
            raise ValueError("teacher= has no effect: the objective has no use for a frozen model. Leave it out.")
        if not self.objective.needs_frozen or self.teacher is not None:
            return
        moving = next((name for name, p in base_parameters(self.classifier.model) if p.requires_grad), None)
        if moving is not None and not isinstance(self.classifier.model, PeftModel):
            raise ValueError(
                "The model has no adapter, so that tuning it would change the frozen model that the objective compares with. Put "
                "one on it, get_peft_model(model, CaptConfig(...)), or give teacher= a model that stays."
            )
        if moving is not None:
            raise ValueError(
                f"The objective compares with the frozen base model, but the base is tuned itself ({moving}) and would take the "
                "frozen model along. Freeze it, or give teacher= a model that stays."
            )
        with self.classifier.frozen():
            pass  # it raises where switching the adapter off does not give the base model

    def _check_best_metric(self, from_test: bool) -> None:
        """Raises if no evaluation has the metric that chooses the best checkpoint; warns if the test images choose it."""
        args, splits = self.args, self.eval_dataset
        metric = args.metric_for_best_model
        if metric is None or args.eval_strategy == IntervalStrategy.NO:
            return
        prefixes = [f"eval_{name}" for name in splits] if isinstance(splits, dict) else ["eval"]
        known = [f"{prefix}_{name}" for prefix in prefixes for name in MEASURED]
        if metric not in known and f"eval_{metric}" not in known:
            choice = ", ".join(f"{prefix}_robust_accuracy" for prefix in prefixes[:4])
            raise ValueError(
                f"metric_for_best_model={metric[:80]!r} is not evaluated. Give {choice}, or another accuracy."
            )
        if from_test:
            logger.warning("The best checkpoint is chosen on the test images, whose accuracy it then overstates.")

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
        tuned = {p.data_ptr() for p in self.classifier.model.parameters() if p.requires_grad and p.numel()}
        if any(p.data_ptr() in tuned for p in teacher.parameters()):
            raise ValueError(
                "The teacher shares parameters with the model that is tuned (get_peft_model puts the adapter into the base that "
                "it is given), and would move along. Load it again, or leave teacher= out: the frozen model is then the base."
            )
        return teacher.eval().requires_grad_(False)

    def find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Returns the checkpoint that `train` would go on from, or None; raises as `train` would, before long work."""
        self._check_frozen()
        self._make_trainable()
        return super().find_checkpoint(resume_from_checkpoint)

    def _make_trainable(self) -> None:
        """Makes the active adapter trainable if nothing is, as PEFT loads adapters without `is_trainable=True`."""
        model: Any = self.classifier.model
        if any(p.requires_grad for p in model.parameters()):
            return
        if not isinstance(model, PeftModel):
            raise ValueError("No parameter of the model is trainable. Set requires_grad of those that shall be tuned.")
        logger.warning("The adapter %r was loaded for inference; it is made trainable now.", model.active_adapter)
        model.set_adapter(model.active_adapter)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Tunes the adapter; arguments and result as of `transformers.Trainer.train`."""
        if getattr(self.model, "_is_accelerate_prepared", False) and self.model_wrapped is self.model:
            # evaluate() has prepared the model without DDP, and Accelerate prepares nothing twice: the processes would train
            # apart, without a word (transformers 5.23)
            self.model._is_accelerate_prepared = False  # type: ignore[assignment]
            self.accelerator._models.clear()
        with self._compiled():
            return super().train(*args, **kwargs)

    def _compiled(self) -> AbstractContextManager[None]:
        if not self.args.torch_compile:
            return nullcontext()
        args = self.args
        return compiled_towers(
            self.classifier.base_model, backend=args.torch_compile_backend, mode=args.torch_compile_mode
        )

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

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        """Makes a loader; `dataloader_drop_last` drops training images only, and not those of a set smaller than a batch."""
        asked = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = is_training and self._drops_last(len(dataset))
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.args.dataloader_drop_last = asked

    # ----------------------------------------------------------------------------------------------------- the step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Fetches a step's batches and counts their images; of several processes, none trains on an image twice an epoch."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        whole = self._drops_last(len(self.task["train"]))  # no batch is filled up with images that an earlier one had
        if (
            self.accelerator.num_processes > 1
            and self.accelerator.gradient_state.end_of_dataloader
            and batches
            and not whole
        ):
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
        self.check_loss(loss, inputs["index"].tolist())
        if num_items_in_batch is not None:  # mean over the batch -> this batch's share of the mean over the step
            loss = loss * (sum(chunk.counted for chunk in chunks) * self.accelerator.num_processes / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

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
            frozen=self._frozen(batch.pixels, batch.indices) if self.objective.needs_frozen else None,
            progress=self.state.global_step / max(1, self.state.max_steps),
            clean_features=clean_features,
            adversarial_features=adversarial_features,
        )
        loss, parts = self.objective(views)
        self._monitor.record(views, parts, result.zero_gradient_share, batch.counted)
        return loss, views

    def _texts_and_clean_features(self, model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the normalised features of the texts (N, D) and of clean images (B, D).

        The only call of the wrapped model, so that DDP prepares its reduction; the other parts of the texts and the adversarial
        images add to its graph.
        """
        values = self._pixel_values(pixels)
        if self._text_parts is None:
            output = model(**self.classifier.text_inputs(), pixel_values=values)
            return output.text_embeds, output.image_embeds[: len(pixels)]
        first, *others = self._text_parts.parts
        with self.classifier.part_inputs(first) as inputs:
            output = model(**inputs, pixel_values=values)
        with self.accelerator.autocast():
            features = [output.text_embeds, *(self.classifier.encode_part(part) for part in others)]
        return self._text_parts.join(features), output.image_embeds[: len(pixels)]

    def _attack(self, batch: Batch, texts: Tensor, clean: Tensor) -> AttackResult:
        """Makes the adversarial images of a step, through the image tower alone; losses and signs are in full precision."""
        # int() of a sum such as 2 + 3/3; state.epoch counts finished steps, so it is the epoch of the step that runs
        generators = example_generators(self.args.seed, batch.indices, epoch=int(self.state.epoch or 0))

        def logits_fn(images: Tensor) -> Tensor:
            with self._attack_precision():
                features = self._image_features(images)
            return self.classifier.logits(features, texts)  # outside, or the product would be rounded to half precision

        return self.attack.run(logits_fn, batch.pixels, batch.labels, generators, clean_logits=clean)

    def _attack_precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.args.full_precision_attack else self.accelerator.autocast()

    def _image_features(self, pixels: Tensor) -> Tensor:
        features = image_features(self.classifier.model, self._pixel_values(pixels))
        return normalize(features[: len(pixels)].float())

    def _pixel_values(self, pixels: Tensor) -> Tensor:
        values = self.classifier.pixel_values(pixels)
        size = self.args.image_chunk_size or self.args.train_batch_size
        return fill_batch(values, size) if self.args.torch_compile else values

    @torch.no_grad()
    def _frozen(self, pixels: Tensor, indices: list[int]) -> Tensor:
        """Returns the frozen model's (B, N) logits on clean images, computed once an image while nothing is augmented."""
        if self.args.augment:
            return self._run_frozen(pixels)
        return self._frozen_outputs.get(indices, pixels, self._run_frozen)

    def _run_frozen(self, pixels: Tensor) -> Tensor:
        if self.teacher is not None:
            return self.teacher.to(pixels.device)(pixels)
        with self.classifier.frozen() as frozen, without_dropout(self.classifier.model):
            if self._frozen_texts is None:
                with self._eager():
                    self._frozen_texts = frozen.encode_texts()
            return frozen.logits(self._image_features(pixels), self._frozen_texts)
