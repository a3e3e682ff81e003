"""FAB: the fast adaptive boundary attack, which looks for the smallest perturbation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..randomness import Generators, draw
from .apgd import few_targets, target_classes
from .base import (
    Attack,
    AttackResult,
    Attempt,
    Batch,
    SearchAttack,
    check_settings,
    gradient_at,
    named_settings,
    size_name,
    size_pattern,
    stage,
    tries,
    zero_share,
)
from .registry import register_attack
from .threat import LogitsFn, ThreatModel, wide_dtype

_ALPHA_MAX, _ETA, _BETA = 0.1, 1.05, 0.9  # section 3.5 of the paper
_FINAL_SEARCH = 3  # halvings of the way from the image to the point found (section 3.4)


@register_attack
@dataclass(frozen=True)
class FAB(SearchAttack):
    """The fast adaptive boundary attack (Croce & Hein 2020, arXiv 1907.02044, algorithm 1 and section 3).

    Linearises the boundary to another class at x_k, projects both x_k and the image onto it within [0, 1], moves to a
    mixture of both, slightly beyond the boundary, and comes back towards the image each time the classifier is wrong. It
    minimises the perturbation; here an image is done as soon as one within epsilon is found.

    Args:
        threat_model: the ball to stay in.
        targets: FAB-T: look at the boundary to one class at a time, the `targets` classes that come next to the label (no more
            than there are). 0: FAB, which at each step takes the nearest of all boundaries, N - 1 backwards per step.
        steps: steps of an attempt, at least 1.
        restarts: attempts from different points (the first starts at the image itself), at least 1.

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting is out of range.
    """

    pattern = "fab(?P<targets>-t)?" + size_pattern("steps")
    help: ClassVar[dict[str, str]] = {"fab, fab-t": "100 steps; fab-t-50x5 as above"}
    strong: ClassVar[bool] = True
    threat_model: ThreatModel
    _: KW_ONLY
    targets: int = 9
    steps: int = 100
    restarts: int = 1

    def __post_init__(self) -> None:
        check_settings(self, targets=0, steps=1, restarts=1)

    @property
    def name(self) -> str:
        """The settings in short, those at their default left out: "fab-t", "fab", "fab-t-50x5"."""
        few = f"-{self.targets}targets" if self.targets not in (0, 9) else ""
        return ("fab-t" if self.targets else "fab") + size_name(self.steps, self.restarts, 100) + few

    @property
    def passes(self) -> float:
        return 30.0 * self.steps * self.restarts  # one target after the other, or all in each step

    @classmethod
    def from_name(cls, match: re.Match[str], threat_model: ThreatModel) -> Attack:
        return cls(threat_model, **named_settings(match) | {"targets": 9 if match["targets"] else 0})

    def notes(self, num_classes: int) -> tuple[str, ...]:
        return few_targets(self.name, num_classes, self.targets)

    def attempts(self, num_classes: int) -> Iterator[tuple[str, Attempt]]:
        ranks = range(1, min(self.targets, num_classes - 1) + 1) if self.targets else [0]
        for where, rank, restart in tries(ranks, self.restarts):
            yield where, partial(self._search, rank, restart)

    def _search(self, rank: int, restart: int, logits_fn: LogitsFn, batch: Batch, clean_logits: Tensor) -> AttackResult:
        """Runs algorithm 1; an image leaves once a wrong point within epsilon is known."""
        images, labels = batch.images, batch.labels
        threat = self.threat_model
        targets = target_classes(clean_logits, labels, rank) if rank else None
        x = images.clone() if restart == 0 else threat.project(self._start(images, batch.generators), images)
        best, best_norm = images.clone(), images.new_full((len(images),), torch.inf)
        share = images.new_full(labels.shape, torch.nan)
        rows = torch.arange(len(images), device=images.device)
        for step in range(self.steps):
            batch.tell(self.name, stage("step", step + 1, self.steps), len(rows))
            here, wanted = labels[rows], None if targets is None else targets[rows]
            gap, normal = self._boundary(logits_fn, x, here, wanted)  # (A,), (A, 3, H, W)
            if step == 0:
                share = zero_share(normal)
            x = self._move(x, images[rows], gap, normal)
            wrong = logits_fn(x).argmax(1) != here
            norm = threat.norm_of(x - images[rows])
            nearer = wrong & (norm < best_norm[rows])
            best[rows[nearer]], best_norm[rows[nearer]] = x[nearer], norm[nearer]
            x = torch.where(wrong[:, None, None, None], images[rows] + _BETA * (x - images[rows]), x)  # backward step
            standing = best_norm[rows] > threat.epsilon
            rows, x = rows[standing], x[standing]
            if len(rows) == 0:
                break
        best = self._final_search(logits_fn, images, labels, best, best_norm)
        # no point within epsilon: the nearest wrong one, brought back, is the best guess
        return AttackResult(threat.project(best, images), share)

    def _start(self, images: Tensor, generators: Generators) -> Tensor:
        """Returns random points at half of epsilon, as the authors' code restarts."""
        threat = self.threat_model
        sample = torch.rand if threat.norm == "linf" else torch.randn
        noise = draw(sample, images.shape, generators).to(images)  # for L1 too: any way through most of the values
        noise = 2 * noise - 1 if threat.norm == "linf" else noise
        return images + 0.5 * threat.epsilon * noise / threat.norm_of(noise).clamp_min(1e-12)[:, None, None, None]

    def _boundary(
        self, logits_fn: LogitsFn, x: Tensor, labels: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns `z_j - z_y` (A,) and its gradient at the pixels for the target class j, or for the nearest boundary (Eq. 7)."""
        with torch.enable_grad():
            pixels = x.detach().requires_grad_()
            logits = logits_fn(pixels)
            others = _other_classes(labels, logits.shape[1]) if targets is None else targets[:, None]  # (A, K)
            gaps = logits.gather(1, others) - logits.gather(1, labels[:, None])
            nearest, gap, normal = torch.full_like(gaps[:, 0], torch.inf), gaps[:, 0].detach(), torch.zeros_like(x)
            for k in range(others.shape[1]):
                gradient = gradient_at(pixels, gaps[:, k].sum(), retain_graph=k + 1 < others.shape[1])
                distance = gaps[:, k].detach().abs() / self._dual_norm(gradient).clamp_min(1e-12)  # (A,)
                nearer = distance < nearest
                nearest, gap = torch.where(nearer, distance, nearest), torch.where(nearer, gaps[:, k].detach(), gap)
                normal = torch.where(nearer[:, None, None, None], gradient, normal)
        return gap, normal

    def _dual_norm(self, normal: Tensor) -> Tensor:
        flat = normal.flatten(1)
        if self.threat_model.norm == "l1":
            return flat.abs().amax(1)
        return flat.abs().sum(1) if self.threat_model.norm == "linf" else flat.norm(dim=1)

    def _move(self, x: Tensor, images: Tensor, gap: Tensor, normal: Tensor) -> Tensor:
        """Takes the step of Eq. 9 and 10: a mixture of the projections of x and of the image, beyond the boundary."""
        norm = self.threat_model.norm
        level = gap.to(wide_dtype(x.device)) - _dot(normal, x)  # the linearised gap is normal . z + level
        delta = project_to_hyperplane(x, normal, -(level + _dot(normal, x)), norm)
        delta_image = project_to_hyperplane(images, normal, -(level + _dot(normal, images)), norm)
        length, length_image = self.threat_model.norm_of(delta), self.threat_model.norm_of(delta_image)
        alpha = (length / (length + length_image).clamp_min(1e-12)).clamp_max(_ALPHA_MAX)[:, None, None, None]
        return ((1 - alpha) * (x + _ETA * delta) + alpha * (images + _ETA * delta_image)).clamp(0, 1)

    def _final_search(
        self, logits_fn: LogitsFn, images: Tensor, labels: Tensor, best: Tensor, best_norm: Tensor
    ) -> Tensor:
        """Halves the way from the image to wrong points outside epsilon, where the boundary may lie nearer (section 3.4)."""
        outside = ((best_norm > self.threat_model.epsilon) & best_norm.isfinite()).nonzero().squeeze(1)
        if len(outside) == 0:
            return best
        right, wrong = images[outside], best[outside]
        for _ in range(_FINAL_SEARCH):
            middle = (right + wrong) / 2
            fooled = (logits_fn(middle).argmax(1) != labels[outside])[:, None, None, None]
            right, wrong = torch.where(fooled, right, middle), torch.where(fooled, middle, wrong)
        best = best.clone()
        best[outside] = wrong
        return best


def _other_classes(labels: Tensor, num_classes: int) -> Tensor:
    """Returns all classes but the label, (A,) -> (A, N - 1)."""
    classes = torch.arange(num_classes - 1, device=labels.device).expand(len(labels), -1)
    return classes + (classes >= labels[:, None])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    wide = wide_dtype(a.device)
    return (a.to(wide) * b.to(wide)).flatten(1).sum(1)  # (A,)


def project_to_hyperplane(x: Tensor, normal: Tensor, rise: Tensor, norm: str) -> Tensor:
    """Returns the shortest delta with `normal . delta = rise` that keeps x + delta in [0, 1] (section 3.1, Eq. 5).

    Every pixel moves the way that changes `normal . delta` towards `rise`, by a common length (L-inf) or one in proportion to
    |normal| (L2), as far as its room allows: `|delta_j| = min(t v_j, room_j)`. t follows from the sorted lengths at which
    pixels hit the range. For L1 the pixels with the largest |normal| use all their room, and the last one a part of it. Where
    the range allows no such delta, all its room is used.

    Args:
        x: (A, 3, H, W) in [0, 1].
        normal: (A, 3, H, W).
        rise: (A,) wanted change of `normal . x`.
        norm: "linf", "l2" or "l1".

    Returns:
        (A, 3, H, W).
    """
    wide = wide_dtype(x.device)
    w, start = normal.flatten(1).to(wide), x.flatten(1).to(wide)  # (A, P)
    way = w.sign() * rise.to(wide).sign()[:, None]
    weight = w.abs()
    room = torch.where(way > 0, 1 - start, start).clamp_min(0)
    room = torch.where(way == 0, 0, room)  # a pixel without weight stays
    tiny = torch.finfo(wide).tiny
    wanted = rise.to(wide).abs()[:, None]
    if norm == "l1":
        order = weight.argsort(dim=1, descending=True, stable=True)
        gain = (weight * room).gather(1, order)
        share = ((wanted - (gain.cumsum(1) - gain)) / gain.clamp_min(tiny)).clamp(0, 1)
        return (way * room * share.gather(1, order.argsort(1))).view_as(x).to(x)
    speed = torch.ones_like(weight) if norm == "linf" else weight
    hits, order = torch.where(speed > 0, room / speed.clamp_min(tiny), 0).sort(1)  # t at which a pixel stops
    gain, slope = (weight * room).gather(1, order), (weight * speed).gather(1, order)
    stopped = gain.cumsum(1) - gain  # what the pixels before the k-th add once they have stopped
    moving = slope.flip(1).cumsum(1).flip(1)  # rise per t of the k-th and all after it
    reach = stopped + hits * moving  # the rise at t = hits_k, which never falls with k
    k = (reach < wanted).sum(1, keepdim=True).clamp_max(reach.shape[1] - 1)
    t = (wanted - stopped.gather(1, k)) / moving.gather(1, k).clamp_min(tiny)
    t = torch.minimum(t.clamp_min(0), hits[:, -1:])
    return (way * torch.minimum(t * speed, room)).view_as(x).to(x)
