"""TTC: the image is moved, within a small ball, to where its feature is far from what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import NUMBER, Purifier, Undefended, check_count, gradient_of, number

STEP = 1 / 255  # of the counter-attack
BETA = 2.0  # how much more a later step of the counter-attack weighs than the one before: a factor of exp(2)
SHARPNESS = 2.0  # of the tanh that stands for a sign in `smooth`, per mean absolute gradient of the image
WIDTH = 0.02  # of the sigmoid that stands for the gate in `smooth`, in units of the drift


@dataclass(frozen=True)
class TTC(Purifier):
    """Test-time counterattack: an image whose feature hardly moves under noise is pushed away from where it is.

    Noise within the budget is drawn for each image, and its drift measured: how far it moves the image's feature, over the
    feature's length. If the drift is below the threshold (a sign of an adversarial image, the paper holds), steps along the sign
    of the gradient move the feature farther still, and the mean of the noise and of all steps, weighted by softmax(2 i) for step
    i, is added to the image. If it is not, the noise alone is added.

    Xing et al., CVPR 2025 (arXiv 2503.03613); the settings and every detail are those of its code
    (Sxing2/CLIP-Test-time-Counterattacks at 793fbff, code/test_time_counterattack.py, lines 53 to 57 and 68 to 158). It is the
    code that keeps the noise where the gate is closed, draws it from the global random numbers for each batch, and takes features
    before they are scaled to length 1. For adversarially tuned models the code measures the drift with the original CLIP; here
    it is the drift of the classifier's own features.

    Attacks that unroll it see tanh(2 g / mean |g|) in place of the sign of a gradient g, and a sigmoid of width 0.02 in place of
    the gate.

    Args:
        budget: How far a pixel may be moved, in 1/255; 1 to 255.
        steps: Steps of 1/255 of the counter-attack, at least 1.
        threshold: Drift below which the counter-attack runs; 0 or more.
    """

    pattern: ClassVar[str] = rf"ttc(?:-(?P<budget>\d{{1,3}})x(?P<steps>\d{{1,3}})(?:-(?P<threshold>{NUMBER}))?)?"
    help: ClassVar[dict[str, str]] = {
        "ttc": "a counter-attack on the image's feature (TTC, CVPR 2025); as published: within 4/255, 2 steps, threshold 0.2",
        "ttc-BUDGETxSTEPS-THRESHOLD": "the same with another budget in 1/255, number of steps, threshold: ttc-8x5-0.4",
    }
    random = True

    budget: int = 4
    steps: int = 2
    threshold: float = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", float(self.threshold))
        check_count("budget", self.budget, most=255)
        check_count("steps", self.steps)
        if not 0 <= self.threshold < float("inf"):
            raise ValueError(f"the threshold of the drift is {self.threshold}: it must be 0 or more")

    @property
    def name(self) -> str:
        """Returns "ttc" as published, else "ttc-8x5" or "ttc-8x5-0.4"."""
        size = f"-{self.budget}x{self.steps}"
        if self.threshold != TTC.threshold:
            return f"ttc{size}-{number(self.threshold)}"
        return "ttc" if (self.budget, self.steps) == (TTC.budget, TTC.steps) else f"ttc{size}"

    def purify(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the pixels after the counter-attack, which is a constant to gradients."""
        with torch.no_grad():
            change = self._change(model, pixels.detach(), torch.sign, lambda lead: (lead > 0).to(lead))
        return pixels + change

    def smooth(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the pixels after a counter-attack whose signs and gate are smooth."""
        return pixels + self._change(model, pixels, _soft_sign, lambda lead: torch.sigmoid(lead / WIDTH))

    def _change(
        self, model: Undefended, pixels: Tensor, sign: Callable[[Tensor], Tensor], gate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        radius = self.budget / 255
        low, high = (-pixels).clamp_min(-radius), (1 - pixels).clamp_max(radius)  # of a change, (B, 3, H, W)
        changes = [((2 * torch.rand_like(pixels) - 1) * radius).clamp(low, high)]
        own, moved = _wide(model.raw_features(pixels)), []

        def distance(points: Tensor) -> Tensor:
            moved.append((_wide(model.raw_features(points)) - own).square().sum(1))
            return moved[-1]

        for _ in range(self.steps):
            gradient = gradient_of(distance, pixels + changes[-1])
            changes.append((changes[-1] + STEP * sign(gradient)).clamp(low, high))
        tiny = torch.finfo(own.dtype).tiny
        drift = moved[0].clamp_min(tiny).sqrt() / own.norm(dim=1)  # the first step begins at the noise
        open_ = gate(self.threshold - drift).to(pixels).view(-1, 1, 1, 1)
        weights = (BETA * torch.arange(len(changes), device=pixels.device, dtype=pixels.dtype)).softmax(0)
        mean = torch.stack([weight * change for weight, change in zip(weights, changes, strict=True)]).sum(0)
        return changes[0] + open_ * (mean - changes[0])


def _soft_sign(gradient: Tensor) -> Tensor:
    size = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    return torch.tanh(SHARPNESS * gradient / size)


def _wide(features: Tensor) -> Tensor:
    """Returns features of half precision in float32, in which differences of near ones are not lost."""
    return features.to(torch.promote_types(features.dtype, torch.float32))
