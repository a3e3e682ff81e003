"""What the model that a run is held to says of images: the features of clean ones are computed once before training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import reduce
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..clip.classifier import ZeroShotClassifier
from ..clip.texts import normalize
from ..data.pixels import PixelDataset
from ..objectives import Objective, needs_frozen_adversarial
from ..tuner.clip import image_features
from ..tuner.switching import base_parameters
from ..utils.machine import moved
from ..utils.modules import eval_mode

BATCH = 64  # always the same batches, or the last bits of the features would depend on a step's
BAR_AFTER = 1.0  # seconds: what is done by then needs no bar


class FrozenOutputs:
    """The outputs of the frozen model on the training images: the base model, with the adapter off, or a teacher.

    Without augmentation each image is run once, before the first step, in the order and the batches that every run on these
    images has, a resumed one too; the (n, D) features stay in memory. With augmentation the images of each step are run.

    Args:
        classifier: The model that is tuned.
        teacher: Another model that takes the place of its base.
        images: The training images.
        args: The `CaptTrainingArguments`.
    """

    def __init__(
        self, classifier: ZeroShotClassifier, teacher: ZeroShotClassifier | None, images: PixelDataset, args: Any
    ) -> None:
        self._classifier, self._teacher, self._images, self._args = classifier, teacher, images, args
        self._features: Tensor | None = None
        self._texts: Tensor | None = None

    def features(self, pixels: Tensor, indices: list[int]) -> Tensor:
        """Returns projected image features, not normalised: (B, 3, H, W) pixels and their B places -> (B, D) float32."""
        if self._args.augment:
            return self.run(pixels)
        if self._features is None:
            self.compute()
        assert self._features is not None
        return moved(self._features[indices], pixels.device)

    def run(self, pixels: Tensor) -> Tensor:
        """Runs any images, adversarial ones too, and keeps nothing: (B, 3, H, W) pixels -> (B, D) float32, not normalised."""
        with self._frozen() as frozen:
            return embed(frozen, pixels).float()

    def logits(self, features: Tensor) -> Tensor:
        """Returns logits over the task's classes: (B, D) features, not normalised -> (B, N) float32."""
        classifier = self._teacher or self._classifier
        return classifier.logits(normalize(features), self._text_features())

    def compute(self) -> None:
        """Runs the frozen model on all images, unless they are augmented or it has run; processes share the batches."""
        if self._args.augment or self._features is not None:
            return
        rank, world, number = self._args.process_index, self._args.world_size, len(self._images)
        batches = [list(range(start, min(start + BATCH, number))) for start in range(0, number, BATCH)][rank::world]
        loader: Any = DataLoader(
            self._images,
            batch_sampler=batches,
            num_workers=self._args.dataloader_num_workers,
            generator=torch.Generator(),
        )  # fmt: skip  (a generator of its own: the run's is not touched)
        features = torch.zeros(number, self._text_features().shape[1])
        total, hidden = sum(map(len, batches)), self._args.disable_tqdm or rank > 0
        bar = tqdm(total=total, desc="Frozen model", unit="image", disable=hidden, delay=BAR_AFTER)
        with self._frozen() as frozen, bar:
            for batch in loader:
                features[batch["index"]] = embed(frozen, moved(batch["pixels"], self._args.device)).float().cpu()
                bar.update(len(batch["index"]))
        self._features = reduce(features.to(self._args.device), "sum").cpu() if world > 1 else features

    def _text_features(self) -> Tensor:
        if self._texts is None:
            with self._frozen() as frozen:
                self._texts = frozen.encode_texts()
        return self._texts

    @contextmanager
    def _frozen(self) -> Iterator[ZeroShotClassifier]:
        """Gives the frozen model in eval mode; it is not compiled, for it runs in batches of another shape."""
        eager = torch.compiler.set_stance("force_eager") if self._args.torch_compile else nullcontext()
        classifier = self._classifier if self._teacher is None else self._teacher.to(self._args.device)
        off = classifier.frozen() if self._teacher is None else nullcontext()
        with torch.no_grad(), eval_mode(classifier), eager, off:
            yield classifier


def embed(classifier: ZeroShotClassifier, pixels: Tensor) -> Tensor:
    """Returns the projected image features, not normalised: (B, 3, H, W) pixels in [0, 1] -> (B, D)."""
    return image_features(classifier.model, classifier.pixel_values(pixels))


def load_teacher(teacher: ZeroShotClassifier | str | None, classifier: ZeroShotClassifier) -> ZeroShotClassifier | None:
    """Returns the teacher of a classifier, loaded and frozen; a ValueError if it does not fit or would be tuned along."""
    if teacher is None:
        return None
    if isinstance(teacher, str):
        teacher = ZeroShotClassifier.from_pretrained(
            teacher,
            class_names=classifier.class_names,
            template=classifier.template,
            class_texts=classifier.class_texts or {},
        )
    if teacher.class_names != classifier.class_names:
        raise ValueError(
            "The teacher classifies other classes than the task; give it the task's class names, in order."
        )
    if teacher.transform.size != classifier.transform.size:
        raise ValueError(f"The teacher takes {teacher.transform.size} pixels, the model {classifier.transform.size}.")
    tuned = {p.data_ptr() for p in classifier.model.parameters() if p.requires_grad and p.numel()}
    if any(p.data_ptr() in tuned for p in teacher.parameters()):
        raise ValueError(
            "The teacher shares parameters with the model that is tuned (get_peft_model puts the adapter into the base that "
            "it is given), and would move along. Load it again, or leave teacher= out: the frozen model is then the base."
        )
    return teacher.eval().requires_grad_(False)


def check_frozen(classifier: ZeroShotClassifier, objective: Objective, teacher: ZeroShotClassifier | None) -> None:
    """Raises if the objective compares with a frozen model that would be tuned itself, or has no use for a teacher."""
    needed = objective.needs_frozen or needs_frozen_adversarial(objective)
    if not needed and teacher is not None:
        raise ValueError("teacher= has no effect: the objective has no use for a frozen model. Leave it out.")
    if not needed or teacher is not None:
        return
    moving = next((name for name, p in base_parameters(classifier.model) if p.requires_grad), None)
    if moving is not None and not isinstance(classifier.model, PeftModel):
        raise ValueError(
            "The model has no adapter, so that tuning it would change the frozen model that the objective compares with. Put "
            "one on it, get_peft_model(model, CaptConfig(...)), or give teacher= a model that stays."
        )
    if moving is not None:
        raise ValueError(
            f"The objective compares with the frozen base model, but the base is tuned itself ({moving}) and would take the "
            "frozen model along. Freeze it, or give teacher= a model that stays."
        )
    with classifier.frozen():
        pass  # it raises where switching the adapter off does not give the base model
