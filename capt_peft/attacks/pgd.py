"""Projected gradient descent, and FGSM as its one-step case."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import Attack, AttackResult, Report
from .checks import check_counts, check_threat_model
from .guard import check_logits, undisturbed
from .losses import LOSSES, pixel_gradient
from .noise import Generators, Seeds, resolve_generator, select_generators
from .threat import LogitsFn, ThreatModel, check_label_range, parse_fraction, wide_dtype


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient descent (Madry et al. 2018, arXiv 1706.06083, section 2.1).

    From a random point of the ball, `steps` times: `x <- project(x + step_size * direction(gradient of the loss at
    x))`. The direction is the sign for L-inf and the unit gradient for L2. The last point is returned. One step without
    random start is FGSM; one step with it is the fast attack of Wong et al. (2020, arXiv 2001.03994).

    The default `step_size` follows what this field runs: `epsilon / 4` from 10 steps on (the evaluation of APT); below
    that `2 * epsilon / steps`, enough to cross the ball (`2/3 epsilon` at 3 steps as APT trains, `epsilon` at 2 steps
    as FAP); at one step `1.25 * epsilon` from a random start (Wong et al.) and `epsilon` from the image itself.

    A call changes no parameter, no `.grad`, no mode, no buffer of the model's modules and no global random state. It
    costs `steps` forwards and backwards, for "kl" one forward more unless `clean_logits` are given, and with several
    restarts one forward more for each.

    Args:
        threat_model: the ball to stay in.
        steps: gradient steps, at least 0 (0 returns the start).
        step_size: length of a step, a fraction of the [0, 1] range above 0 (texts such as "1/255" are read), or None.
        loss: "ce" (cross-entropy), "kl" (divergence from the prediction on the clean image), or "margin" (the best
            other logit less the label's).
        restarts: runs from different random points, at least 1. An image that is misclassified is kept and not attacked
            again; otherwise the run with the highest loss is kept.
        random_start: start at a random point of the ball, not at the image.
        targeted: labels are the classes to reach.
        clip_each_step: cut every point to [0, 1]. With False only what the model sees is cut, and the result; the
            perturbation goes on from beyond [0, 1], as in APT's code (arXiv 2403.01849).

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting is out of range, or settings contradict each other.
    """

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
        """Check the settings and read the step size."""
        check_threat_model(self)
        check_counts(self, "steps", least=0)
        check_counts(self, "restarts")
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}: it must be one of {', '.join(map(repr, LOSSES))}")
        if self.step_size is not None:
            step_size = parse_fraction(self.step_size)
            if step_size == 0:
                raise ValueError(f"step_size={self.step_size!r} must be more than 0, such as '1/255'")
            object.__setattr__(self, "step_size", step_size)
        self._check_combination()

    def _check_combination(self) -> None:
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
        if self.steps <= 1:
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

    def to_dict(self) -> dict[str, Any]:
        """Return the name, the threat model and every setting, with the step size as taken."""
        return {
            "name": self.name,
            "threat_model": self.threat_model.to_dict(),
            "steps": self.steps,
            "step_size": self.resolved_step_size,
            "loss": self.loss,
            "restarts": self.restarts,
            "random_start": self.random_start,
            "targeted": self.targeted,
            **({} if self.clip_each_step else {"clip_each_step": False}),
        }

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
            logits_fn: images (B, 3, H, W) in [0, 1] -> logits (B, N), differentiable.
            images: (B, 3, H, W) float32 or float64 in [0, 1].
            labels: (B,) int64 in [0, N): the true classes, or the targets if `targeted`.
            generator: source of the random starts: a seed, or one generator for each image (an image's start then does not
                depend on the batch it comes in), or one for the batch.
            clean_logits: (B, N) logits of `images`, which save "kl" a forward. Other losses ignore them.
            report: called with (name, images left, images standing) before each restart.

        Returns:
            The adversarial images, and the share of zero gradients.

        Raises:
            TypeError: wrong type or dtype.
            ValueError: wrong shape or range, or a model without usable logits or gradients.
        """
        threat = self.threat_model
        threat.check(images, labels)
        generator = resolve_generator(generator, len(images))
        # Tensors made in inference mode carry no gradients: work outside it, on a copy of the labels.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            undisturbed(logits_fn, generator, images.device) as logits_fn,
        ):
            images, labels = images.detach(), labels.to(images.device, copy=True)
            if threat.epsilon == 0:
                return AttackResult(threat.project(images, images), images.new_full(labels.shape, torch.nan))
            reference = labels
            if self.loss == "kl":
                clean = logits_fn(images) if clean_logits is None else check_logits(clean_logits, len(images)).clone()
                reference = clean.to(images.device)  # (B, N)
            result = self._ascend(logits_fn, images, labels, reference, generator)
            if self.restarts == 1:
                return result
            best = self._restart(logits_fn, result.images, images, labels, reference, generator, report)
            return AttackResult(best, result.zero_gradient_share)

    def _losses(self, logits: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        check_label_range(labels, logits.shape[1])
        if self.loss == "kl" and reference.shape != logits.shape:
            raise ValueError(
                f"clean_logits have shape {tuple(reference.shape)} but the model returns {tuple(logits.shape)}: give "
                "the logits of the same model on the same images"
            )
        losses = LOSSES[self.loss](logits, reference)  # (B,)
        return -losses if self.targeted else losses

    def _ascend(
        self, logits_fn: LogitsFn, images: Tensor, labels: Tensor, reference: Tensor, generator: Generators
    ) -> AttackResult:
        """Run the steps once, from one start."""
        threat, clip = self.threat_model, self.clip_each_step
        keep = threat.project if clip else threat.into_ball
        adversarial = threat.random_start(images, generator, clip=clip) if self.random_start else keep(images, images)
        zero_share = images.new_full(labels.shape, torch.nan)  # (B,)
        loss = partial(self._losses, labels=labels, reference=reference)
        for step in range(self.steps):
            _, _, gradient = pixel_gradient(logits_fn, adversarial if clip else adversarial.clamp(0, 1), loss)
            if step == 0:
                zero_share = (gradient == 0).to(images.dtype).mean(dim=(1, 2, 3))
            adversarial = keep(adversarial + self.resolved_step_size * threat.direction(gradient), images)
        return AttackResult(adversarial if clip else adversarial.clamp(0, 1), zero_share)

    def _score(
        self, logits_fn: LogitsFn, adversarial: Tensor, labels: Tensor, reference: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return whether each image reached its goal (B,) bool, and its loss (B,)."""
        logits = logits_fn(adversarial)
        losses = self._losses(logits.to(wide_dtype(logits.device)), labels, reference)
        return (logits.argmax(1) == labels) == self.targeted, losses

    def _restart(
        self,
        logits_fn: LogitsFn,
        best: Tensor,
        images: Tensor,
        labels: Tensor,
        reference: Tensor,
        generator: Generators,
        report: Report | None,
    ) -> Tensor:
        """Run the remaining restarts on the images that `best` (B, 3, H, W) leaves standing; return the best of all."""
        done, losses = self._score(logits_fn, best, labels, reference)
        for _ in range(1, self.restarts):
            alive = (~done).nonzero().squeeze(1)  # (A,) rows
            if len(alive) == 0:
                break
            if report is not None:
                report(self.name, len(alive), len(alive))
            rows = images[alive], labels[alive], reference[alive]
            found = self._ascend(logits_fn, *rows, select_generators(generator, alive)).images  # (A, 3, H, W)
            won, gained = self._score(logits_fn, found, *rows[1:])
            better = won | (gained > losses[alive])
            kept = alive[better]
            best[kept], done[kept], losses[kept] = found[better], won[better], gained[better]
        return best
