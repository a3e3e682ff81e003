"""CLIPure: the image's feature is turned towards the feature of a text that names no class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import NUMBER, Defence, Undefended, check_count, number


@dataclass(frozen=True)
class CLIPure(Defence):
    """Moves the image's feature u, of length 1, to where the cosine with a text of no class, t, is larger.

    In each step, u becomes u + size * g / |g|, scaled to length 1 again, where g is the gradient of cos(u, t). The texts are the
    classifier's templates without a class name ("a photo of a ."), and t is the mean of the base model's features for them.

    CLIPure-Cos of Zhang et al., ICLR 2025 (arXiv 2502.18176), with the steps and their size of its code
    (TMLResearchGroup-CAS/CLIPure at b4cc6d1, CLIP_eval/CLIPure_Cos.py, lines 113 to 123 and 159 to 191). There |g| is the length
    over a whole batch (line 185), so that an answer depends on the other images and on how many they are; here it is the image's
    own, as in a batch of one.

    A step turns u by atan(size) within the plane of u and t. At the published size of 30 these are 88 degrees: a feature that is
    nearer to t than that is turned past it, and turned back by the next step, so that ten steps bring it back to where it was, up
    to rounding. Where that holds the defence does nothing; it only shrinks gradients that take each push as a constant, by
    sqrt(1 + size^2) per step, 10^-15 in all, which half precision rounds to 0.

    Args:
        steps: At least 1.
        size: Length of a step, before u is scaled to length 1 again; above 0.
    """

    pattern: ClassVar[str] = rf"clipure(?:-(?P<steps>\d{{1,4}})x(?P<size>{NUMBER}))?"
    help: ClassVar[dict[str, str]] = {
        "clipure": "the feature is moved towards that of a text without a class (CLIPure-Cos, ICLR 2025): 10 steps of 30",
        "clipure-STEPSxSIZE": "the same with other steps: clipure-10x0.1",
    }
    ways = ("straight-through", "unrolled")

    steps: int = 10
    size: float = 30.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", float(self.size))
        check_count("steps", self.steps)
        if not 0 < self.size < float("inf"):
            raise ValueError(f"the size of a step is {self.size}: it must be above 0")

    @property
    def name(self) -> str:
        """Returns "clipure" as published, else such as "clipure-10x0.1"."""
        return "clipure" if self == CLIPure() else f"clipure-{self.steps}x{number(self.size)}"

    def logits(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the logits of the moved feature, with their exact gradient."""
        return model.logits(self.moved(model.features(pixels), model.blank))

    def straight_through(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the same logits; to gradients, the change of the feature is a constant."""
        features = model.features(pixels)
        with torch.no_grad():
            change = self.moved(features, model.blank) - features
        return model.logits(features + change)

    def moved(self, features: Tensor, blank: Tensor) -> Tensor:
        """Returns features (B, D) of length 1 after all steps towards `blank` (D,), of length 1."""
        tiny = torch.finfo(blank.dtype).tiny
        found = features.to(torch.promote_types(features.dtype, blank.dtype))
        for _ in range(self.steps):
            gradient = blank - (found * blank).sum(1, keepdim=True) * found  # of the cosine; 0 at `blank` itself
            found = found + self.size * gradient / gradient.norm(dim=1, keepdim=True).clamp_min(tiny)
            found = found / found.norm(dim=1, keepdim=True)
        return found
