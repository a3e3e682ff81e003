"""What an attack is to the rest of the package, what stands between it and a model, and the frame of those that search."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..randomness import Generators, Seeds, own_random_state, resolve_generator, select_generators
from ..utils.modules import buffers_kept, modules_in
from ..utils.patterns import named_settings
from .losses import margin
from .threat import BALLS, LogitsFn, ThreatModel, check_images, check_label_range, wide_dtype

# name of the running part, where it is ("target 3 of 9, step 40 of 100", or ""), images that it has left
Report = Callable[[str, str, int], None]


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


@dataclass(frozen=True)
class Batch:
    """What an attack is given to work on, beside the model.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        labels: (B,) int64.
        generators: Source of the random numbers (`capt_peft.randomness.draw`).
        clean_logits: The caller's logits of the images, checked by `clean_answers`.
        report: Called as `Attack.run` says.
    """

    images: Tensor
    labels: Tensor
    generators: Generators
    clean_logits: Tensor | None = None
    report: Report | None = None

    def rows(self, index: Tensor) -> Batch:
        """Returns the images in `index` (K,) int64, with their labels and generators."""
        chosen = self.images[index], self.labels[index], select_generators(self.generators, index)
        return Batch(*chosen, report=self.report)

    def at(self, stage: str) -> Batch:
        """Returns the batch for a part of the attack, such as "target 3 of 9", which its reports name before their own stage."""
        if (report := self.report) is None:
            return self
        return replace(self, report=lambda name, within, left: report(name, joined(stage, within), left))

    def tell(self, name: str, stage: str, left: int) -> None:
        """Reports that the attack `name` is at `stage` with `left` images, which it knows without waiting for a GPU."""
        if self.report is not None:
            self.report(name, stage, left)

    def clean_answers(self, logits_fn: LogitsFn) -> Tensor:
        """Returns the logits (B, N) of the images: a copy of those given, which are checked, or else the model's."""
        given = self.clean_logits
        return logits_fn(self.images) if given is None else check_logits(given, len(self.images)).detach().clone()


class Attack(ABC):
    """What an attack is to the rest of the package: it is called for its images, and run for what it saw.

    An attack of your own is a frozen dataclass with `threat_model`, its settings, `name` and `perturb`. With `pattern` and
    `help` too, `register_attack` makes it one of those that `parse_attack` reads.

    Attributes:
        threat_model: The ball that the attack stays in.
        pattern: Regular expression of its names; its named groups are settings (`from_name`).
        help: Its names, or their shapes, each with what it means.
        uses_gradients: Whether it differentiates the model (white box), and does not only ask for answers.
        strong: Whether it is AutoAttack or one of its parts, whose figures say more than those of PGD.
        norms: The norms of the threat models that it is built for.
    """

    threat_model: ThreatModel
    pattern: ClassVar[str] = ""
    help: ClassVar[Mapping[str, str]] = {}
    uses_gradients: ClassVar[bool] = True
    strong: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = BALLS

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name for logs and results, the same for the same settings."""

    @property
    def parts(self) -> tuple[Attack, ...]:
        """The attacks that it is made of, in their order: itself, unless it is an ensemble."""
        return (self,)

    @property
    def passes(self) -> float:
        """About how many times an image goes through the model, forwards and backwards; for estimates of time.

        By default that of `steps` forwards and backwards, 100 if it has no `steps`, in each of its `restarts`.
        """
        return 2.0 * getattr(self, "steps", 100) * getattr(self, "restarts", 1)

    @classmethod
    def from_name(cls, match: re.Match[str], threat_model: ThreatModel) -> Attack:
        """Returns the attack of a name that `pattern` matches; by default, `named_settings` are its settings."""
        return cls(threat_model, **named_settings(match))  # type: ignore[call-arg]

    def to_dict(self) -> dict[str, Any]:
        """Returns the name, the threat model and every setting, in types that JSON has; by default those of a dataclass."""
        names = [field.name for field in fields(self) if field.name != "threat_model"]  # type: ignore[arg-type]
        settings = {name: getattr(self, name) for name in names}
        return {"name": self.name, "threat_model": self.threat_model.to_dict(), **settings}

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
        """Attacks a batch. The model, the arguments and the global random numbers stay as they are.

        Args:
            logits_fn: images (B, 3, H, W) in [0, 1] -> logits (B, N); differentiable, if the attack uses gradients.
            images: (B, 3, H, W) float32 or float64 in [0, 1].
            labels: (B,) int64 in [0, N): the true classes, or the targets of a targeted `PGD`.
            generator: source of the random numbers: a seed (numbers are then drawn where the images are), or one generator for
                each image (an image's attack then does not depend on the batch it comes in), or one for the batch.
            clean_logits: (B, N) logits of `images`, which save a forward where the attack needs them.
            report: called before each step with the name of the attack, or of the part that runs, where it is ("target 3 of 9,
                step 40 of 100"; "" where there is nothing to count), and how many images it has left.

        Returns:
            The adversarial images, of the dtype and on the device of `images`, and what the attack saw.

        Raises:
            TypeError: wrong type or dtype.
            ValueError: wrong shape or range, or a model without usable logits or gradients.
        """
        check_images(images, labels)
        generators = resolve_generator(generator, len(images), images.device)
        # Tensors made in inference mode carry no gradients: work outside it, on copies.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            undisturbed(logits_fn, generators, images.device) as logits_fn,
        ):
            given = images.detach().clone(), labels.to(images.device, copy=True), generators
            return self.perturb(logits_fn, Batch(*given, clean_logits, report))

    def perturb(self, logits_fn: LogitsFn, batch: Batch) -> AttackResult:
        """Attacks a batch for `run`, which has checked and copied its images and labels, and guards the model."""
        raise NotImplementedError(f"{type(self).__name__} has no method `perturb`")

    def __call__(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        generator: Seeds = None,
        *,
        clean_logits: Tensor | None = None,
    ) -> Tensor:
        """Returns the adversarial images (B, 3, H, W) of `run`, whose arguments it takes."""
        return self.run(logits_fn, images, labels, generator, clean_logits=clean_logits).images


Attempt = Callable[[LogitsFn, Batch, Tensor], AttackResult]


def stage(word: str, number: int, total: int) -> str:
    """Returns where an attack is, such as "target 3 of 9", for its report; "" where there is but one."""
    return f"{word} {number:,} of {total:,}" if total > 1 else ""


def joined(*stages: str) -> str:
    """Returns stages within each other, the outer first, as one."""
    return ", ".join(filter(None, stages))


def tries(ranks: Sequence[int], restarts: int) -> Iterator[tuple[str, int, int]]:
    """Yields every restart for every target class: its stage, the target's rank (0: there is none) and the restart, from 0."""
    for rank in ranks:
        for restart in range(restarts):
            where = joined(stage("target", rank, len(ranks)), stage("restart", restart + 1, restarts))
            yield where, rank, restart


class SearchAttack(Attack):
    """An attack that tries for each image until the classifier is wrong on it, and then leaves it.

    A subclass lists its attempts (restarts, target classes); each gets the images that the ones before left standing. An
    image that is misclassified already comes back as it is; one that no attempt breaks comes back as the point where the
    label's lead over the other classes was smallest. Images do not influence each other.
    """

    @abstractmethod
    def attempts(self, num_classes: int) -> Iterator[tuple[str, Attempt]]:
        """Yields the attempts in their order, as (stage, (logits_fn, `Batch`, clean logits (A, N)) -> `AttackResult`)."""

    def notes(self, num_classes: int) -> tuple[str, ...]:
        """Returns what is changed for a model with this number of classes."""
        return ()

    def perturb(self, logits_fn: LogitsFn, batch: Batch) -> AttackResult:
        """Runs the attempts."""
        batch, clean, standing = begin(logits_fn, batch)
        best, loss = batch.images.clone(), margin(clean, batch.labels)  # (B, 3, H, W), (B,)
        share = torch.full_like(best[:, 0, 0, 0], torch.nan)
        for where, attempt in self.attempts(clean.shape[1]) if self.threat_model.epsilon > 0 else ():
            rows = standing.nonzero().squeeze(1)  # (A,)
            if len(rows) == 0:
                break
            tried = batch.rows(rows).at(where)
            found = attempt(logits_fn, tried, clean[rows])
            logits = logits_fn(found.images)
            check_classes(clean, logits)
            wrong, gained = logits.argmax(1) != tried.labels, margin(logits, tried.labels).to(loss.dtype)
            better = wrong | (gained > loss[rows])
            best[rows[better]], loss[rows[better]] = found.images[better], gained[better]
            first = share[rows].isnan()
            share[rows[first]] = found.zero_gradient_share[first]
            standing[rows[wrong]] = False
        return AttackResult(best, share, notes=self.notes(clean.shape[1]))


# ------------------------------------------------------------------------------------------------------ names, settings


def size_pattern(count: str) -> str:
    """Returns the end of a pattern: "-50x5" are 50 of the setting `count`, and 5 restarts."""
    return rf"(?:-(?P<{count}>\d{{1,9}})(?:x(?P<restarts>\d{{1,9}}))?)?"


def size_name(count: int, restarts: int, default: int) -> str:
    """Returns the end of a name that `size_pattern` reads; nothing if both are at their default."""
    if restarts > 1:
        return f"-{count}x{restarts}"
    return "" if count == default else f"-{count}"


def check_settings(attack: Attack, **least: int) -> None:
    """Refuses a `threat_model` that the attack is not built for, and settings that are not whole numbers of this or more.

    Raises:
        TypeError: something else, or not an integer.
        ValueError: too small, or another norm.
    """
    if not isinstance(attack.threat_model, ThreatModel):
        raise TypeError(f"threat_model must be a ThreatModel, got {attack.threat_model!r}")
    if attack.threat_model.norm not in attack.norms:
        others = "the attack 'patch' (patch-20)" if attack.threat_model.norm == "patch" else "'pgd-20' or 'autoattack'"
        raise ValueError(
            f"{type(attack).__name__} is built for {', '.join(attack.norms)}, not for {attack.threat_model}: use {others}"
        )
    for name, smallest in least.items():
        value = getattr(attack, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} must be an integer, {smallest} or more")
        if value < smallest:
            raise ValueError(f"{name}={value} must be {smallest} or more")


# -------------------------------------------------------------------------------------------------- an attack's model


class Guarded:
    """A model whose caller may go on using both what it hands in and what it gets back.

    The model gets a copy of the images, within the graph, so that gradients still arrive at the caller's own; it may write to it
    by whatever way. The caller gets a copy of the logits, which a later call cannot overwrite. Logits that are not (B, N) finite
    floats are refused.

    Args:
        logits_fn: images (B, 3, H, W) -> logits (B, N).
    """

    def __init__(self, logits_fn: LogitsFn) -> None:
        self.logits_fn = logits_fn

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the logits (B, N), with a history if the images' own and the model have one."""
        logits = check_logits(self.logits_fn(images.clone()), len(images))
        # a view taken under no_grad claims requires_grad and has no history
        return logits.clone() if logits.grad_fn is not None else logits.detach().clone()


def guarded(logits_fn: LogitsFn) -> LogitsFn:
    """Returns the model with a guard around it, unless it has one."""
    return logits_fn if isinstance(logits_fn, Guarded) else Guarded(logits_fn)


@contextmanager
def undisturbed(logits_fn: LogitsFn, generators: Generators, device: torch.device) -> Iterator[LogitsFn]:
    """Gives a model as an attack runs it: guarded, with random numbers of its own, and as it was afterwards.

    Afterwards the buffers of its modules and the global random state are as before. What a random model draws within depends on
    the attack's seed alone.
    """
    first = generators if isinstance(generators, torch.Generator) else generators[0]
    with buffers_kept(modules_in(logits_fn)), own_random_state(first.initial_seed(), device):
        yield guarded(logits_fn)


def check_logits(logits: Tensor, batch: int) -> Tensor:
    """Refuses logits that are not (`batch`, N) finite floats with N >= 2; returns them.

    Raises:
        TypeError: not a floating tensor.
        ValueError: wrong shape, or values that are not finite.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"the model returned {kind}: logits must be a floating tensor ({batch}, N)")
    if logits.ndim != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
        raise ValueError(
            f"the model returned shape {tuple(logits.shape)} for {batch} images: logits must be ({batch}, N) "
            "with N >= 2 classes"
        )
    if not logits.isfinite().all():
        raise ValueError("the model returned logits that are not finite: check its weights and its precision")
    return logits


def begin(logits_fn: LogitsFn, batch: Batch) -> tuple[Batch, Tensor, Tensor]:
    """Returns the batch within [0, 1], its clean logits (B, N), and which images are right (B,); refuses other labels."""
    batch = replace(batch, images=batch.images.clamp(0, 1))
    clean = batch.clean_answers(logits_fn)
    check_label_range(batch.labels, clean.shape[1])
    return batch, clean, clean.argmax(1) == batch.labels


def check_classes(clean_logits: Tensor, logits: Tensor) -> None:
    """Refuses clean logits (B, N) of another number of classes than the model's."""
    if clean_logits.shape[1] != logits.shape[1]:
        raise ValueError(
            f"clean_logits have shape {tuple(clean_logits.shape)} but the model returns {logits.shape[1]} classes: give "
            "the logits of the same model on the same images"
        )


def pixel_gradient(
    logits_fn: LogitsFn, images: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one forward and one backward to the pixels; no parameter's `.grad` is touched.

    The loss is taken in float64 (float32 on MPS) whatever the model runs in. Each image's gradient at the logits is
    scaled to a largest entry of 1 before it enters the model: half-precision layers then do not round it to zero.

    Args:
        logits_fn: images (B, 3, H, W) -> logits (B, N).
        images: (B, 3, H, W) float.
        loss: logits (B, N) -> one value per image (B,).

    Returns:
        The logits (B, N) and losses (B,), detached, and a positive multiple of each loss's gradient (B, 3, H, W).

    Raises:
        TypeError: the model does not return floats.
        ValueError: the logits do not fit, do not depend on the pixels, or something is not finite.
    """
    with torch.enable_grad():
        pixels = images.detach().requires_grad_()
        logits = guarded(logits_fn)(pixels)
        leaf = logits.detach().to(wide_dtype(logits.device)).requires_grad_()
        losses = loss(leaf)
        (slope,) = torch.autograd.grad(losses.sum(), leaf)  # (B, N)
    slope = slope / slope.abs().amax(1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
    return logits.detach(), losses.detach(), gradient_at(pixels, logits, slope.to(logits.dtype))


def gradient_at(pixels: Tensor, output: Tensor, slope: Tensor | None = None, *, retain_graph: bool = False) -> Tensor:
    """Returns the gradient (B, 3, H, W) of `output`, weighted by `slope`, at the pixels.

    Raises:
        ValueError: there is none, or it is not finite.
    """
    gradient = None
    if output.grad_fn is not None:
        (gradient,) = torch.autograd.grad(output, pixels, slope, retain_graph=retain_graph, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "the model does not pass gradients to its pixels: remove torch.no_grad, detach or a trip through numpy "
            "from logits_fn, or use an attack that needs no gradients (square)"
        )
    if not gradient.isfinite().all():
        raise ValueError("the model's gradient at the pixels is not finite: check its weights and its precision")
    return gradient


def zero_share(gradient: Tensor) -> Tensor:
    """Returns the share (B,) of an image's pixel values whose gradient (B, 3, H, W) is exactly zero."""
    return (gradient == 0).to(gradient.dtype).mean(dim=(1, 2, 3))
