"""Auto-PGD: projected gradient descent that sets its own step size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import (
    AttackResult,
    Attempt,
    Batch,
    SearchAttack,
    check_settings,
    pixel_gradient,
    size_name,
    size_pattern,
    stage,
    tries,
    zero_share,
)
from .l1 import sparse_sign
from .losses import cross_entropy, dlr, margin, targeted_dlr, targeted_margin
from .registry import register_attack
from .threat import LogitsFn, ThreatModel, wide_dtype

Loss = Callable[..., Tensor]  # logits (B, N), labels (B,), perhaps targets (B,) -> losses (B,)
_MOMENTUM = 0.75  # alpha of Eq. 3
_RHO = 0.75  # the share of steps that must raise the loss, below which the step size is halved (condition 1)


@register_attack
@dataclass(frozen=True)
class APGD(SearchAttack):
    """Auto-PGD (Croce & Hein 2020, arXiv 2003.01690, section 3 and algorithm 1).

    Steps with momentum, `z = project(x_k + eta * direction(gradient))`, `x_{k+1} = project(x_k + 0.75 (z - x_k) + 0.25
    (x_k - x_{k-1}))`, from `eta = 2 epsilon`. At checkpoints that come ever closer, eta is halved and the search goes on
    from the best point if too few steps have raised the loss, or if neither eta nor the best loss has changed.

    Within L1 it is APGD of Croce & Hein 2021 (arXiv 2103.01208, section 4): steps without momentum that move few pixel values,
    fewer as the best point becomes sparse, and a search that begins within 3 epsilon (30% of the steps) and 2 epsilon (30%).

    Args:
        threat_model: the ball to stay in.
        loss: "ce" (cross-entropy); "dlr" (difference of logits ratio, section 4; the margin below 3 classes); "t" (targeted
            DLR, once for each of the `targets` classes that come next to the label; the margin to the target below 4).
        steps: gradient steps of an attempt, at least 1.
        restarts: attempts from different random points (for each target), at least 1.
        targets: the number of target classes for "t"; no more than the other classes there are.
        eot: gradients averaged at each step, for classifiers that are random (Athalye et al. 2018).

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting is out of range.
    """

    pattern = "apgd-(?P<loss>ce|dlr|t)" + size_pattern("steps")
    help: ClassVar[dict[str, str]] = {"apgd-ce, apgd-dlr, apgd-t": "100 steps; apgd-ce-50x5 has 50 and 5 restarts"}
    strong: ClassVar[bool] = True
    threat_model: ThreatModel
    _: KW_ONLY
    loss: str = "ce"
    steps: int = 100
    restarts: int = 1
    eot: int = 1
    targets: int = 9

    def __post_init__(self) -> None:
        check_settings(self, steps=1, restarts=1, targets=1, eot=1)
        if self.loss not in ("ce", "dlr", "t"):
            raise ValueError(f"unknown loss {self.loss!r}: it must be 'ce', 'dlr' or 't'")

    @property
    def name(self) -> str:
        """The settings in short, those at their default left out: "apgd-ce", "apgd-t", "apgd-dlr-50x5"."""
        few = f"-{self.targets}targets" if self.loss == "t" and self.targets != 9 else ""
        eot = f"-eot{self.eot}" if self.eot > 1 else ""
        return f"apgd-{self.loss}{size_name(self.steps, self.restarts, 100)}{few}{eot}"

    @property
    def passes(self) -> float:
        return 2.0 * self.steps * self.eot * self.restarts * (self.targets if self.loss == "t" else 1)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "targets" or self.loss == "t"}

    def notes(self, num_classes: int) -> tuple[str, ...]:
        found = []
        if self.loss == "dlr" and num_classes < 3:
            found.append(f"{self.name}: the margin instead of DLR, which needs 3 classes ({num_classes} here)")
        if self.loss == "t" and num_classes < 4:
            found.append(f"{self.name}: the margin instead of targeted DLR, which needs 4 classes ({num_classes} here)")
        return (*found, *(few_targets(self.name, num_classes, self.targets) if self.loss == "t" else ()))

    def attempts(self, num_classes: int) -> Iterator[tuple[str, Attempt]]:
        ranks = range(1, min(self.targets, num_classes - 1) + 1) if self.loss == "t" else [0]
        for where, rank, _ in tries(ranks, self.restarts):
            yield where, partial(self._ascend, rank)

    def _climbed(self, num_classes: int) -> Loss:
        """Returns the loss, of logits, labels and (for "t") targets."""
        if self.loss == "t":
            return targeted_dlr if num_classes > 3 else targeted_margin
        return cross_entropy if self.loss == "ce" else dlr if num_classes > 2 else margin

    def _ascend(self, rank: int, logits_fn: LogitsFn, batch: Batch, clean_logits: Tensor) -> AttackResult:
        """Runs algorithm 1 from one start, for "t" towards the target of this rank."""
        images, labels = batch.images, batch.labels
        arguments = (labels, target_classes(clean_logits, labels, rank)) if rank else (labels,)
        loss, done, results = self._climbed(clean_logits.shape[1]), 0, list[AttackResult]()
        for threat, steps in balls(self.threat_model, self.steps):
            x = threat.project(results[-1].images, images) if results else threat.random_start(images, batch.generators)
            state = (_SparseState if threat.norm == "l1" else _State)(threat, images, x, labels, arguments)
            results.append(self._climb(loss, state, logits_fn, batch, done, steps))
            done += steps
        return AttackResult(results[-1].images, results[0].zero_gradient_share)

    def _climb(
        self, loss: Loss, state: _State, logits_fn: LogitsFn, batch: Batch, done: int, steps: int
    ) -> AttackResult:
        """Takes this many steps after those `done`; an image leaves once it is misclassified within the threat model itself."""
        inside = state.threat == self.threat_model
        best, share = state.x.clone(), state.x.new_full(state.labels.shape, torch.nan)
        checkpoints = set(state.checkpoints(steps))
        for step in range(steps + 1):
            last = step == steps
            if not last:
                batch.tell(self.name, stage("step", done + step + 1, self.steps), len(state.rows))
            logits, losses, gradient = self._look(loss, state, logits_fn, last)
            if step == 0:
                share = zero_share(gradient)
            state.record(losses, gradient)
            wrong = (logits.argmax(1) != state.labels) & inside
            best[state.rows] = torch.where(wrong[:, None, None, None], state.x, state.best)
            state.keep(~wrong)
            if last or len(state.rows) == 0:
                break
            if step in checkpoints:
                state.adapt()
            state.step(first=step == 0)
        return AttackResult(best, share)

    def _look(self, loss: Loss, state: _State, logits_fn: LogitsFn, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits, losses and gradient at the current points; after the last step no gradient is needed."""

        def climbed(logits: Tensor) -> Tensor:
            return loss(logits, *state.arguments)

        if last:
            logits = logits_fn(state.x)
            return logits, climbed(logits.to(wide_dtype(logits.device))), torch.zeros_like(state.x)
        logits, losses, gradient = pixel_gradient(logits_fn, state.x, climbed)
        if self.eot > 1:
            gradient = _unit(gradient)
            for _ in range(self.eot - 1):
                more, again, another = pixel_gradient(logits_fn, state.x, climbed)
                logits, losses, gradient = logits + more, losses + again, gradient + _unit(another)
            logits, losses = logits / self.eot, losses / self.eot
        return logits, losses, gradient


class _State:
    """The points of the images that still stand, with what algorithm 1 remembers of each."""

    longest = 2.0  # the first steps, in epsilon

    def __init__(
        self, threat: ThreatModel, images: Tensor, x: Tensor, labels: Tensor, arguments: tuple[Tensor, ...]
    ) -> None:
        self.threat, self.images, self.x, self.labels, self.arguments = threat, images, x, labels, arguments
        self.eta = torch.full_like(images[:, :1, :1, :1], self.longest * threat.epsilon)
        self.rows = torch.arange(len(images), device=images.device)  # (A,) places in the batch
        self.previous, self.best = x.clone(), x.clone()
        self.gradient = self.best_gradient = torch.zeros_like(x)
        wide = wide_dtype(images.device)
        self.loss = self.best_loss = torch.full((len(x),), -torch.inf, dtype=wide, device=x.device)
        # since the last checkpoint: steps taken, steps that raised the loss, and the best loss and whether eta was halved then
        self.taken = 0
        self.rises = torch.zeros_like(self.loss)
        self.mark = self.loss.clone()
        self.halved = torch.ones_like(self.labels, dtype=torch.bool)

    def record(self, losses: Tensor, gradient: Tensor) -> None:
        """Takes note of loss (A,) and gradient at the current points."""
        self.rises = self.rises + (losses > self.loss)
        better = losses > self.best_loss
        wide = better[:, None, None, None]
        self.best, self.best_loss = torch.where(wide, self.x, self.best), torch.where(better, losses, self.best_loss)
        self.best_gradient = torch.where(wide, gradient, self.best_gradient)
        self.loss, self.gradient = losses, gradient

    def checkpoints(self, steps: int) -> list[int]:
        """Returns the steps after which `adapt` is called."""
        return checkpoint_steps(steps)

    def step(self, *, first: bool) -> None:
        """Moves to the next points (Eq. 3; the first step has no momentum)."""
        threat = self.threat
        z = threat.project(self.x + self.eta * threat.direction(self.gradient), self.images)
        if first:
            self.rises.zero_()  # the start has no step before it
        else:
            z = self.x + _MOMENTUM * (z - self.x) + (1 - _MOMENTUM) * (self.x - self.previous)
            z = threat.project(z, self.images)
        self.previous, self.x = self.x, z
        self.taken += 1

    def adapt(self) -> None:
        """At a checkpoint: halves eta and goes back to the best point where condition 1 or 2 holds (section 3)."""
        stalled = self.rises < _RHO * self.taken
        stuck = ~self.halved & (self.best_loss == self.mark)
        halve = stalled | stuck
        wide = halve[:, None, None, None]
        self.eta = torch.where(wide, self.eta / 2, self.eta)
        self.x = torch.where(wide, self.best, self.x)
        self.gradient = torch.where(wide, self.best_gradient, self.gradient)
        self.loss = torch.where(halve, self.best_loss, self.loss)
        self.mark, self.halved = self.best_loss, halve
        self.rises, self.taken = torch.zeros_like(self.rises), 0

    def keep(self, mask: Tensor) -> None:
        """Drops the images outside `mask` (A,) bool."""
        if not mask.all():
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(self, name, value[mask])
            self.arguments = tuple(value[mask] for value in self.arguments)


class _SparseState(_State):
    """The same within L1: steps without momentum along the sign of the largest gradients, whose number follows the best point."""

    longest = 1.0

    def __init__(self, threat: ThreatModel, images: Tensor, x: Tensor, *arguments: Any) -> None:
        super().__init__(threat, images, x, *arguments)
        self.moved = _changed(x, images)  # (A,) values that the best point changes
        self.count = self._count()

    def _count(self) -> Tensor:
        return (self.moved / 1.5).long().clamp_min(1)

    def checkpoints(self, steps: int) -> list[int]:
        every = max(int(0.04 * steps), 1)
        return list(range(every, steps, every))

    def step(self, *, first: bool) -> None:
        z = self.x + self.eta * sparse_sign(self.gradient, self.count, self.x)
        self.previous, self.x = self.x, self.threat.project(z, self.images)

    def adapt(self) -> None:
        """Where the best point has become sparser, goes back to it with the longest steps; else shortens them by 1.5."""
        moved = _changed(self.best, self.images)
        sparser = moved < 0.95 * self.moved
        wide, longest = sparser[:, None, None, None], self.longest * self.threat.epsilon
        self.eta = torch.where(wide, longest, (self.eta / 1.5).clamp_min(longest / 10))
        self.x = torch.where(wide, self.best, self.x)
        self.gradient = torch.where(wide, self.best_gradient, self.gradient)
        self.moved = moved
        self.count = self._count()


def _changed(x: Tensor, images: Tensor) -> Tensor:
    """Returns how many pixel values of each image differ, (A,) float."""
    return (x != images).flatten(1).sum(1).float()


def balls(threat: ThreatModel, steps: int) -> list[tuple[ThreatModel, int]]:
    """Returns the threat models that a search goes through, each with its steps: for L1, larger ones first.

    3 epsilon, 2 epsilon and epsilon, with 30%, 30% and 40% of the steps (Croce & Hein 2021, section 4.2).
    """
    wider = math.ceil(round(0.3 * steps, 6)) if threat.norm == "l1" and steps > 2 else 0
    if wider == 0:
        return [(threat, steps)]
    larger = [(ThreatModel(threat.norm, factor * threat.epsilon), wider) for factor in (3, 2)]
    return [*larger, (threat, steps - 2 * wider)]


def checkpoint_steps(steps: int) -> list[int]:
    """Returns the steps w_j = ceil(p_j * steps) at which the step size may change (section 3, "step size selection").

    p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06).
    """
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(round(share * steps, 6)) for share in shares[1:] if share <= 1]


def target_classes(clean_logits: Tensor, labels: Tensor, rank: int) -> Tensor:
    """Returns each image's class (B,) that comes `rank`-th (1 is the best) among those other than its label."""
    others = clean_logits.scatter(1, labels[:, None], -torch.inf)
    return others.argsort(dim=1, descending=True, stable=True)[:, rank - 1]


def few_targets(name: str, num_classes: int, targets: int) -> tuple[str, ...]:
    """Says that a model with few classes gets fewer targets than asked for."""
    there_are = num_classes - 1
    if there_are >= targets:
        return ()
    return (f"{name}: {there_are} target{'s' * (there_are > 1)} instead of {targets} ({num_classes} classes)",)


def _unit(gradient: Tensor) -> Tensor:
    # pixel_gradient scales each pass by another factor: give the passes of a random model equal weight
    return gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
