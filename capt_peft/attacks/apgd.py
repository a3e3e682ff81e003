"""Auto-PGD: projected gradient descent that sets its own step size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Attempt, Found, SearchAttack, few_targets
from .checks import check_counts, check_threat_model
from .losses import cross_entropy, dlr, margin, pixel_gradient, targeted_dlr, targeted_margin
from .noise import Generators
from .threat import LogitsFn, ThreatModel, wide_dtype

Loss = Callable[[Tensor], Tensor]  # logits (B, N) -> losses (B,)
_MOMENTUM = 0.75  # alpha of Eq. 3
_RHO = 0.75  # the share of steps that must raise the loss, below which the step size is halved (condition 1)


@dataclass(frozen=True)
class APGD(SearchAttack):
    """Auto-PGD (Croce & Hein 2020, arXiv 2003.01690, section 3 and algorithm 1).

    Steps with momentum, `z = project(x_k + eta * direction(gradient))`, `x_{k+1} = project(x_k + 0.75 (z - x_k) + 0.25
    (x_k - x_{k-1}))`, from `eta = 2 epsilon`. At checkpoints that come ever closer, eta is halved and the search goes on
    from the best point if too few steps have raised the loss, or if neither eta nor the best loss has changed.

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

    strong: ClassVar[bool] = True
    threat_model: ThreatModel
    _: KW_ONLY
    loss: str = "ce"
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    eot: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        check_threat_model(self)
        if self.loss not in ("ce", "dlr", "t"):
            raise ValueError(f"unknown loss {self.loss!r}: it must be 'ce', 'dlr' or 't'")
        check_counts(self, "steps", "restarts", "targets", "eot")

    @property
    def name(self) -> str:
        """The settings in short, those at their default left out: "apgd-ce", "apgd-t", "apgd-dlr-50x5"."""
        sized = "" if (self.steps, self.restarts) == (100, 1) else f"-{self.steps}"
        sized += f"x{self.restarts}" if self.restarts > 1 else ""
        few = f"-{self.targets}targets" if self.loss == "t" and self.targets != 9 else ""
        return f"apgd-{self.loss}{sized}{few}" + (f"-eot{self.eot}" if self.eot > 1 else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the name, the threat model and every setting."""
        settings = {"loss": self.loss, "steps": self.steps, "restarts": self.restarts, "eot": self.eot}
        if self.loss == "t":
            settings["targets"] = self.targets
        return {"name": self.name, "threat_model": self.threat_model.to_dict(), **settings}

    def notes(self, num_classes: int) -> tuple[str, ...]:
        """Say which loss and how many targets a model with few classes gets."""
        found = []
        if self.loss == "dlr" and num_classes < 3:
            found.append(f"{self.name}: the margin instead of DLR, which needs 3 classes ({num_classes} here)")
        if self.loss == "t" and num_classes < 4:
            found.append(f"{self.name}: the margin instead of targeted DLR, which needs 4 classes ({num_classes} here)")
        return (*found, *(few_targets(self.name, num_classes, self.targets) if self.loss == "t" else ()))

    def attempts(self, num_classes: int) -> Iterator[Attempt]:
        """Yield the restarts, for "t" of one target after the other."""
        if self.loss == "t":
            for rank in range(1, min(self.targets, num_classes - 1) + 1):
                for _ in range(self.restarts):
                    yield partial(self._towards, rank)
        else:
            untargeted = {"ce": cross_entropy, "dlr": dlr if num_classes > 2 else margin}[self.loss]
            for _ in range(self.restarts):
                yield partial(self._away, untargeted)

    def _away(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        clean_logits: Tensor,
        generators: Generators,
    ) -> Found:
        return self._ascend(loss, (labels,), logits_fn, images, labels, generators)

    def _towards(
        self,
        rank: int,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        clean_logits: Tensor,
        generators: Generators,
    ) -> Found:
        loss = targeted_dlr if clean_logits.shape[1] > 3 else targeted_margin
        targets = target_classes(clean_logits, labels, rank)
        return self._ascend(loss, (labels, targets), logits_fn, images, labels, generators)

    def _ascend(
        self,
        loss: Callable[..., Tensor],
        arguments: tuple[Tensor, ...],
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        generators: Generators,
    ) -> Found:
        """Run algorithm 1 from one start; an image leaves once it is misclassified."""
        threat, batch = self.threat_model, len(images)
        start = threat.random_start(images, generators)
        state = _State(images, start, labels, arguments, torch.full_like(images[:, :1, :1, :1], 2 * threat.epsilon))
        best, zero_share = start.clone(), images.new_full((batch,), torch.nan)
        checkpoints = set(checkpoint_steps(self.steps))
        for step in range(self.steps + 1):
            last = step == self.steps
            logits, losses, gradient = self._look(loss, state, logits_fn, last)
            if step == 0:
                zero_share = (gradient == 0).to(images.dtype).mean(dim=(1, 2, 3))
            state.record(losses, gradient)
            wrong = logits.argmax(1) != state.labels
            best[state.rows] = torch.where(wrong[:, None, None, None], state.x, state.best)
            state = state.keep(~wrong)
            if last or len(state.rows) == 0:
                break
            if step in checkpoints:
                state.adapt()
            state.step(threat, first=step == 0)
        return Found(best, zero_share)

    def _look(
        self, loss: Callable[..., Tensor], state: _State, logits_fn: LogitsFn, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, losses and gradient at the current points; after the last step no gradient is needed."""
        climbed: Loss = lambda logits: loss(logits, *state.arguments)  # noqa: E731
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

    def __init__(self, images: Tensor, x: Tensor, labels: Tensor, arguments: tuple[Tensor, ...], eta: Tensor) -> None:
        self.images, self.x, self.labels, self.arguments, self.eta = (
            images,
            x,
            labels,
            arguments,
            eta,
        )  # eta (A, 1, 1, 1)
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
        """Take note of loss (A,) and gradient at the current points."""
        self.rises = self.rises + (losses > self.loss)
        better = losses > self.best_loss
        wide = better[:, None, None, None]
        self.best, self.best_loss = torch.where(wide, self.x, self.best), torch.where(better, losses, self.best_loss)
        self.best_gradient = torch.where(wide, gradient, self.best_gradient)
        self.loss, self.gradient = losses, gradient

    def step(self, threat: ThreatModel, *, first: bool) -> None:
        """Move to the next points (Eq. 3; the first step has no momentum)."""
        z = threat.project(self.x + self.eta * threat.direction(self.gradient), self.images)
        if first:
            moved = z
            self.rises.zero_()  # the start has no step before it
        else:
            moved = threat.project(
                self.x + _MOMENTUM * (z - self.x) + (1 - _MOMENTUM) * (self.x - self.previous), self.images
            )
        self.previous, self.x = self.x, moved
        self.taken += 1

    def adapt(self) -> None:
        """At a checkpoint: halve eta and go back to the best point where condition 1 or 2 holds (section 3)."""
        stalled = self.rises < _RHO * self.taken
        stuck = ~self.halved & (self.best_loss == self.mark)
        halve = stalled | stuck
        wide = halve[:, None, None, None]
        self.eta = torch.where(wide, self.eta / 2, self.eta)
        self.x, self.gradient = (
            torch.where(wide, self.best, self.x),
            torch.where(wide, self.best_gradient, self.gradient),
        )
        self.loss = torch.where(halve, self.best_loss, self.loss)
        self.mark, self.halved = self.best_loss, halve
        self.rises, self.taken = torch.zeros_like(self.rises), 0

    def keep(self, mask: Tensor) -> _State:
        """Drop the images outside `mask` (A,) bool; return itself."""
        if not mask.all():
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(self, name, value[mask])
            self.arguments = tuple(value[mask] for value in self.arguments)
        return self


def checkpoint_steps(steps: int) -> list[int]:
    """Return the steps w_j = ceil(p_j * steps) at which the step size may change (section 3, "step size selection").

    p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06).
    """
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(round(share * steps, 6)) for share in shares[1:] if share <= 1]


def target_classes(clean_logits: Tensor, labels: Tensor, rank: int) -> Tensor:
    """Return each image's class (B,) that comes `rank`-th (1 is the best) among those other than its label."""
    others = clean_logits.scatter(1, labels[:, None], -torch.inf)
    return others.argsort(dim=1, descending=True, stable=True)[:, rank - 1]


def _unit(gradient: Tensor) -> Tensor:
    # pixel_gradient scales each pass by another factor: give the passes of a random model equal weight
    return gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
