"""What an attack is to the rest of the package, and the frame of the attacks that look for one wrong answer and stop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .guard import check_logits, undisturbed
from .noise import Generators, Seeds, resolve_generator, select_generators
from .threat import LogitsFn, ThreatModel, check_label_range

# name of the running part, images of the batch that it has left, images of the batch that still stand
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Part:
    """What one attack of an ensemble did to a batch.

    Attributes:
        name: The attack's name.
        attacked: How many images it was given: those that stood when its turn came.
        broken: (B,) bool, the images that it broke.
    """

    name: str
    attacked: int
    broken: Tensor


@dataclass(frozen=True)
class AttackResult:
    """What an attack made and saw.

    Attributes:
        images: (B, 3, H, W) adversarial images in [0, 1].
        zero_gradient_share: (B,) float, the share (0 to 1) of an image's pixel values whose gradient was exactly zero
            at the first step; NaN where no step was taken. Large values are a sign of masked gradients.
        parts: For an ensemble, what each of its attacks did, in their order.
        notes: What had to be changed for the model, as sentences: fewer targets, another loss.
    """

    images: Tensor
    zero_gradient_share: Tensor
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()


class Attack(ABC):
    """What an attack is to the rest of the package: it is called for its images, and run for what it saw.

    An attack of your own is a subclass with `name`, `to_dict` and `run`.

    Attributes:
        threat_model: The ball that the attack stays in.
        strong: Whether it is AutoAttack or one of its parts, whose figures say more than those of PGD.
    """

    threat_model: ThreatModel
    strong: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name for logs and results, the same for the same settings."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the name, the threat model and every setting, in types that JSON has."""

    @abstractmethod
    def run(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        generator: Seeds = None,
        *,
        clean_logits: Tensor | None = None,
        report: Report | None = None,
    ) -> AttackResult:
        """Return the adversarial images and what the attack saw; `SearchAttack.run` describes the arguments."""

    def __call__(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        generator: Seeds = None,
        *,
        clean_logits: Tensor | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Attack a batch; as `run`, which also says what the attack saw.

        Args:
            logits_fn: as for `run`.
            images: as for `run`.
            labels: as for `run`.
            generator: as for `run`.
            clean_logits: as for `run`.
            progress: show a bar with the images left and those robust so far.

        Returns:
            (B, 3, H, W) adversarial images in the ball and in [0, 1], of the dtype and on the device of `images`.
        """
        with progress_bar(len(images), progress) as report:
            return self.run(logits_fn, images, labels, generator, clean_logits=clean_logits, report=report).images


@dataclass(frozen=True)
class Found:
    """What one attempt found for A images: the best images (A, 3, H, W), and the first step's zero gradients (A,)."""

    images: Tensor
    zero_gradient_share: Tensor


Attempt = Callable[[LogitsFn, Tensor, Tensor, Tensor, Generators], Found]


class SearchAttack(Attack):
    """An attack that tries for each image until the classifier is wrong on it, and then leaves it.

    A subclass lists its attempts (restarts, target classes); each gets the images that the ones before left standing. An
    image that is misclassified already comes back as it is; one that no attempt breaks comes back as the point where the
    label's lead over the other classes was smallest. Images do not influence each other.
    """

    @abstractmethod
    def attempts(self, num_classes: int) -> Iterator[Attempt]:
        """Yield the attempts in their order: (logits_fn, images, labels, clean_logits, generators) -> `Found`."""

    def notes(self, num_classes: int) -> tuple[str, ...]:
        """Say what is changed for a model with this number of classes."""
        return ()

    def run(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        generator: Seeds = None,
        *,
        clean_logits: Tensor | None = None,
        report: Report | None = None,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            logits_fn: images (B, 3, H, W) in [0, 1] -> logits (B, N); differentiable, but for Square.
            images: (B, 3, H, W) float32 or float64 in [0, 1].
            labels: (B,) int64 in [0, N): the true classes.
            generator: source of the random numbers: a seed, or one generator for each image (an image's attack then does not
                depend on the batch it comes in), or one for the batch.
            clean_logits: (B, N) logits of `images`, which save a forward.
            report: called with (name, images left, images standing) before each attempt and at the end.

        Raises:
            TypeError: wrong type or dtype.
            ValueError: wrong shape or range, or a model without usable logits or gradients.
        """
        self.threat_model.check(images, labels)
        generator = resolve_generator(generator, len(images))
        # Tensors made in inference mode carry no gradients: work outside it, on copies.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            undisturbed(logits_fn, generator, images.device) as logits_fn,
        ):
            images, labels, clean = prepare(logits_fn, images, labels, clean_logits)
            best, lead = images.clone(), label_lead(clean, labels)  # (B, 3, H, W), (B,)
            zero_share = images.new_full(labels.shape, torch.nan)
            standing = clean.argmax(1) == labels
            for attempt in self.attempts(clean.shape[1]) if self.threat_model.epsilon > 0 else ():
                rows = standing.nonzero().squeeze(1)  # (A,)
                if len(rows) == 0:
                    break
                if report is not None:
                    report(self.name, len(rows), len(rows))
                generators = select_generators(generator, rows)
                found = attempt(logits_fn, images[rows], labels[rows], clean[rows], generators)
                logits = logits_fn(found.images)
                check_width(clean, logits)
                gap = label_lead(logits, labels[rows]).to(lead.dtype)
                wrong = logits.argmax(1) != labels[rows]
                better = wrong | (gap < lead[rows])
                best[rows[better]], lead[rows[better]] = found.images[better], gap[better]
                first = zero_share[rows].isnan()
                zero_share[rows[first]] = found.zero_gradient_share[first]
                standing[rows[wrong]] = False
            if report is not None:
                report(self.name, int(standing.sum()), int(standing.sum()))
            return AttackResult(best, zero_share, notes=self.notes(clean.shape[1]))


def prepare(
    logits_fn: LogitsFn, images: Tensor, labels: Tensor, clean_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return copies of images and labels to work on, and the checked clean logits (B, N)."""
    images, labels = images.detach().clamp(0, 1), labels.to(images.device, copy=True)
    clean = logits_fn(images) if clean_logits is None else check_logits(clean_logits, len(images)).detach().clone()
    check_label_range(labels, clean.shape[1])
    return images, labels, clean


@contextmanager
def progress_bar(images: int, show: bool) -> Iterator[Report | None]:
    """Give a `Report` that moves a bar of this many images as they are broken, or None."""
    if not show:
        yield None
        return
    with tqdm(total=images, unit="image") as bar:

        def report(name: str, left: int, standing: int) -> None:
            bar.n = images - standing
            bar.set_postfix_str(f"{name}: {left} images left, {standing} of {images} robust so far")

        yield report


def few_targets(name: str, num_classes: int, targets: int) -> tuple[str, ...]:
    """Say that a model with few classes gets fewer targets than asked for."""
    there_are = num_classes - 1
    if there_are >= targets:
        return ()
    return (f"{name}: {there_are} target{'s' * (there_are > 1)} instead of {targets} ({num_classes} classes)",)


def check_width(clean_logits: Tensor, logits: Tensor) -> None:
    """Refuse clean logits (B, N) of another number of classes than the model's."""
    if clean_logits.shape[1] != logits.shape[1]:
        raise ValueError(
            f"clean_logits have shape {tuple(clean_logits.shape)} but the model returns {logits.shape[1]} classes: give "
            "the logits of the same model on the same images"
        )


def label_lead(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `z_y - max_{j != y} z_j` (B,) of logits (B, N): 0 or less where another class has caught up."""
    index = labels[:, None]
    others = logits.scatter(1, index, -torch.inf).amax(1)
    return logits.gather(1, index).squeeze(1) - others
