"""A square patch: gradients and a grid say where it may lie, and PGD fills it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .base import AttackResult, Attempt, Batch, SearchAttack, check_settings, pixel_gradient, stage
from .losses import cross_entropy
from .pgd import PGD
from .registry import register_attack
from .square_patch import square_at, square_sums
from .threat import LogitsFn, ThreatModel, wide_dtype

_WHOLE = ThreatModel("linf", 1)  # within the square every pixel may become any
_STEP = 0.1
_SPREAD = (0.7548776662466927, 0.5698402909980532)  # multiples of these, modulo 1, cover a square evenly (Roberts' R2)


@register_attack
@dataclass(frozen=True)
class Patch(SearchAttack):
    """A square of any pixels at one of several places (adversarial patch; Brown et al. 2017, arXiv 1712.09665, per image).

    At each place the pixels of the square climb by PGD from random ones; an image is done once it is misclassified. Every other
    place is where the gradient at the image promises most, `sum_i max_{0 <= v <= 1} g_i (v - x_i)` over the square, but no
    nearer than half a side to one that was taken; the others are spread evenly over the image.

    Args:
        threat_model: a patch.
        steps: gradient steps at a place, at least 1.
        places: places that are tried, at least 1.

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting is out of range, or the threat model is not a patch.
    """

    pattern = r"patch(?:-(?P<steps>\d{1,9})(?:x(?P<places>\d{1,9}))?)?"
    help: ClassVar[dict[str, str]] = {
        "patch": "20 steps at each of 10 places; patch-50x30 has 50 at 30; for the norm patch"
    }
    norms: ClassVar[tuple[str, ...]] = ("patch",)
    threat_model: ThreatModel
    _: KW_ONLY
    steps: int = 20
    places: int = 10

    def __post_init__(self) -> None:
        check_settings(self, steps=1, places=1)

    @property
    def name(self) -> str:
        """The settings in short, those at their default left out: "patch", "patch-50", "patch-50x30"."""
        if self.places != 10:
            return f"patch-{self.steps}x{self.places}"
        return "patch" if self.steps == 20 else f"patch-{self.steps}"

    @property
    def passes(self) -> float:
        return 2.0 * self.places * (self.steps + 1)

    def attempts(self, num_classes: int) -> Iterator[tuple[str, Attempt]]:
        for place in range(self.places):
            yield stage("place", place + 1, self.places), partial(self._fill, place)

    def _fill(self, place: int, logits_fn: LogitsFn, batch: Batch, clean_logits: Tensor) -> AttackResult:
        """Fills the square at one place of each image."""
        images, side = batch.images, self.threat_model.side(batch.images)
        if place % 2:
            top, left = _spread(place // 2, side, images)
        else:
            top, left = self._promising(place // 2, side, logits_fn, batch)
        inside = square_at(top, left, side, images)  # (A, 1, H, W)

        def filled(pixels: Tensor) -> Tensor:
            return torch.where(inside, pixels, images)

        if (report := batch.report) is not None:  # under the name of the patch
            batch = replace(batch, report=lambda _, within, left: report(self.name, within, left))
        climb = PGD(_WHOLE, steps=self.steps, step_size=_STEP)
        found = climb.perturb(lambda pixels: logits_fn(filled(pixels)), batch)
        share = side**2 / (images.shape[2] * images.shape[3])
        zeros = (found.zero_gradient_share - (1 - share)) / share  # outside of the square all gradients are
        return AttackResult(filled(found.images), zeros.clamp(0, 1))

    def _promising(self, rank: int, side: int, logits_fn: LogitsFn, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the corners (A,) of the squares that come `rank`-th, from 0, by what the gradient promises."""
        images = batch.images
        _, _, gradient = pixel_gradient(logits_fn, images, lambda logits: cross_entropy(logits, batch.labels))
        gradient = gradient.to(wide_dtype(images.device))
        gain = torch.where(gradient > 0, gradient * (1 - images), -gradient * images).sum(1)  # (A, H, W)
        sums = square_sums(gain, side)
        rows, columns = (torch.arange(n, device=images.device) for n in sums.shape[1:])
        for _ in range(rank + 1):
            best = sums.flatten(1).argmax(1)
            top, left = best // sums.shape[2], best % sums.shape[2]
            beside, above = (rows - top[:, None]).abs() * 2 < side, (columns - left[:, None]).abs() * 2 < side
            sums = torch.where(beside[:, :, None] & above[:, None], -torch.inf, sums)
        return top, left


def _spread(number: int, side: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the corners (A,) of the `number`-th of squares that lie evenly over the image, the same for all images."""
    free = [n - side + 1 for n in images.shape[2:]]
    corner = [int((0.5 + number * step) % 1 * room) for step, room in zip(_SPREAD, free, strict=True)]
    top, left = (torch.full((len(images),), place, device=images.device) for place in corner)
    return top, left
