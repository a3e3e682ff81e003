"""Projected gradient descent, and FGSM as its one-step case."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Attack, AttackResult, Batch, check_classes, check_settings, pixel_gradient, stage, zero_share
from .losses import LOSSES
from .registry import register_attack
from .threat import LogitsFn, ThreatModel, check_label_range, parse_fraction, wide_dtype


@register_attack
@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient descent (Madry et al. 2018, arXiv 1706.06083, section 2.1).

    From a random point of the ball, `steps` times: `x <- project(x + step_size * direction(gradient of the loss at
    x))`. The direction is the sign for L-inf and the unit gradient for L2. The last point is returned. One step without
    random start is FGSM; one step with it is the fast attack of Wong et al. (2020, arXiv 2001.03994).

    The default `step_size` follows what this field runs: `epsilon / 4` from 10 steps on (the evaluation of APT); below
    that `2 * epsilon / steps`, enough to cross the ball (`2/3 epsilon` at 3 steps as APT trains, `epsilon` at 2 steps
    as FAP); at one step `1.25 * epsilon` from a random start (Wong et al.) and `epsilon` from the image itself.

    A call costs `steps` forwards and backwards, for "kl" one forward more unless `clean_logits` are given, and with several
    restarts one forward more for each.

    Args:
        threat_model: the ball to stay in.
        steps: gradient steps, at least 1: without one nothing is optimised, and noise would be called an attack.
        step_size: length of a step, a fraction of the [0, 1] range above 0 (texts such as "1/255" are read), or None.
        loss: "ce" (cross-entropy), "kl" (divergence from the prediction on the clean image), or "margin" (the best
            other logit less the label's).
        restarts: runs from different random points, at least 1. An image that is misclassified is kept and not attacked
            again; otherwise the run with the highest loss is kept.
        random_start: start at a random point of the ball, not at the image.
        targeted: labels are the classes to reach.
        clip_each_step: cut every point to [0, 1]. With False only what the model sees is cut, and the result; the
            perturbation continues from beyond [0, 1], as in APT's code (arXiv 2403.01849).

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting is out of range, or settings contradict each other.
    """

    pattern = r"(?:fgsm|pgd-(?P<steps>\d{1,9})(?:x(?P<restarts>\d{1,9}))?)(?:-(?P<loss>kl|margin))?"
    help: ClassVar[dict[str, str]] = {
        "fgsm": "one step, no random start",
        "pgd-STEPS": "pgd-20; pgd-100x5 has 5 restarts; -kl or -margin at the end is another loss than cross-entropy",
    }
    threat_model: ThreatModel
    _: KW_ONLY
    steps: int = 10
    step_size: float | str | None = None
    loss: str = "ce"
    restarts: int = 1
    random_start: bool = True
    targeted: bool = False
    clip_each_step: bool = True

    def __post_init__(self) -> None:
        check_settings(self, steps=1, restarts=1)
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}: it must be one of {', '.join(map(repr, LOSSES))}")
        if self.step_size is not None:
            step_size = parse_fraction(self.step_size)
            if step_size == 0:
                raise ValueError(f"step_size={self.step_size!r} must be more than 0, such as '1/255'")
            object.__setattr__(self, "step_size", step_size)
        if self.loss == "kl" and not self.random_start:
            raise ValueError(
                "loss='kl' needs random_start=True: at the clean image its gradient is exactly zero, so that no step "
                "would move"
            )
        if self.loss == "kl" and self.targeted:
            raise ValueError("loss='kl' takes no target class: use loss='ce' or 'margin' with targeted=True")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts={self.restarts} needs random_start=True: without it every restart is the same")

    @property
    def default_step_size(self) -> float:
        """The step size that `step_size=None` stands for."""
        epsilon = self.threat_model.epsilon
        if self.steps == 1:
            return 1.25 * epsilon if self.random_start else epsilon
        return epsilon / 4 if self.steps >= 10 else 2 * epsilon / self.steps

    @property
    def resolved_step_size(self) -> float:
        """The length of a step that the attack takes."""
        return self.default_step_size if self.step_size is None else float(self.step_size)

    @property
    def name(self) -> str:
        """The settings in short, those at their default left out: "pgd-20", "fgsm", "pgd-100x5-margin"."""
        fgsm = self.steps == 1 and not self.random_start
        parts = ["fgsm" if fgsm else f"pgd-{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")]
        if self.loss != "ce":
            parts.append(self.loss)
        if self.targeted:
            parts.append("targeted")
        if not self.random_start and not fgsm:
            parts.append("nostart")
        if not self.clip_each_step:
            parts.append("unclipped")
        if self.resolved_step_size != self.default_step_size:
            parts.append(f"step{self.resolved_step_size:.4g}")
        return "-".join(parts)

    @property
    def passes(self) -> float:
        return 2.0 * self.steps * self.restarts  # a forward and a backward each

    @classmethod
    def from_name(cls, match: re.Match[str], threat_model: ThreatModel) -> Attack:
        if match["steps"] is None:
            return cls(threat_model, steps=1, random_start=False, loss=match["loss"] or "ce")
        return super().from_name(match, threat_model)

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict() | {"step_size": self.resolved_step_size}
        return {k: v for k, v in settings.items() if k != "clip_each_step" or not v}

    def perturb(self, logits_fn: LogitsFn, batch: Batch) -> AttackResult:
        """Runs the steps from each start; only "kl" looks at the clean logits."""
        if self.threat_model.epsilon == 0:
            unmoved = self.threat_model.project(batch.images, batch.images)
            return AttackResult(unmoved, torch.full_like(unmoved[:, 0, 0, 0], torch.nan))
        reference = batch.labels
        if self.loss == "kl":
            reference = batch.clean_answers(logits_fn).to(batch.images.device)  # (B, N)
        result = self._ascend(logits_fn, batch.at(stage("restart", 1, self.restarts)), reference)
        if self.restarts == 1:
            return result
        best = result.images
        done, losses = self._score(logits_fn, best, batch.labels, reference)
        for restart in range(1, self.restarts):
            alive = (~done).nonzero().squeeze(1)  # (A,) rows
            if len(alive) == 0:
                break
            left = batch.rows(alive).at(stage("restart", restart + 1, self.restarts))
            found = self._ascend(logits_fn, left, reference[alive]).images  # (A, 3, H, W)
            won, gained = self._score(logits_fn, found, left.labels, reference[alive])
            better = won | (gained > losses[alive])
            kept = alive[better]
            best[kept], done[kept], losses[kept] = found[better], won[better], gained[better]
        return AttackResult(best, result.zero_gradient_share)

    def _checked_losses(self, logits: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        check_label_range(labels, logits.shape[1])
        if self.loss == "kl":
            check_classes(reference, logits)
        return self._losses(logits, reference)

    def _losses(self, logits: Tensor, reference: Tensor) -> Tensor:
        losses = LOSSES[self.loss](logits, reference)  # (B,)
        return -losses if self.targeted else losses

    def _ascend(self, logits_fn: LogitsFn, batch: Batch, reference: Tensor) -> AttackResult:
        """Runs the steps once, from one start; `reference` are the labels (B,), or the clean logits (B, N)."""
        threat, clip, images = self.threat_model, self.clip_each_step, batch.images
        keep = threat.project if clip else threat.into_ball
        x = threat.random_start(images, batch.generators, clip=clip) if self.random_start else keep(images, images)
        share = torch.full_like(images[:, 0, 0, 0], torch.nan)  # (B,)
        first = partial(self._checked_losses, labels=batch.labels, reference=reference)  # once: a GPU is waited for
        later = partial(self._losses, reference=reference)
        for step in range(self.steps):
            batch.tell(self.name, stage("step", step + 1, self.steps), len(images))
            loss = first if step == 0 else later
            _, _, gradient = pixel_gradient(logits_fn, x if clip else x.clamp(0, 1), loss)
            if step == 0:
                share = zero_share(gradient)
            x = keep(x + self.resolved_step_size * threat.direction(gradient, x), images)
        return AttackResult(x if clip else x.clamp(0, 1), share)

    def _score(self, logits_fn: LogitsFn, x: Tensor, labels: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Returns whether each image reached its goal (B,) bool, and its loss (B,)."""
        logits = logits_fn(x)
        losses = self._checked_losses(logits.to(wide_dtype(logits.device)), labels, reference)
        return (logits.argmax(1) == labels) == self.targeted, losses


@register_attack
@dataclass(frozen=True)
class CW(PGD):
    """What papers of this field call CW: PGD with Carlini & Wagner's margin loss (2017, f_6), by the name that their tables use.

    "cw-100" is "pgd-100-margin" bit for bit. In the code of TeCoA, which TTC shares, the loss is
    `-relu(z_y - max_{j != y} z_j + 50)`: the same, as long as no other logit is more than 50 above the label's. The original
    attack is another one: it looks for the smallest L2 change with Adam.

    Args:
        threat_model: As for `PGD`, and so are the other settings, but for the loss, which is "margin".

    Raises:
        TypeError, ValueError: As for `PGD`, and for another loss.
    """

    pattern = r"cw-(?P<steps>\d{1,9})(?:x(?P<restarts>\d{1,9}))?"
    help: ClassVar[dict[str, str]] = {"cw-STEPS": "cw-100, this field's name of pgd-100-margin"}
    _: KW_ONLY
    loss: str = "margin"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss != "margin":
            raise ValueError(f"loss={self.loss!r}: CW is PGD with the loss 'margin'; use PGD for another")
        if self.steps == 1 and not self.random_start:
            raise ValueError("steps=1 without a random start is FGSM: use PGD with loss='margin'")

    @property
    def name(self) -> str:
        """The name of the same PGD with "cw" for "pgd" and without "margin": "cw-100", "cw-100x5"."""
        return super().name.replace("pgd-", "cw-", 1).replace("-margin", "", 1)

    @classmethod
    def from_name(cls, match: re.Match[str], threat_model: ThreatModel) -> Attack:
        return super(PGD, cls).from_name(match, threat_model)


def with_step_size(attack: Attack, step_size: float | str | None) -> Attack:
    """Returns an attack with a step size that is meant for PGD; FGSM's one step is epsilon, and the others set their own."""
    if step_size is None or not isinstance(attack, PGD) or not attack.random_start:
        return attack
    return replace(attack, step_size=step_size)
