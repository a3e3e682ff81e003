"""A classifier in double precision with one hidden layer, as a defence is given it: its gradients can be written down."""

from __future__ import annotations

import torch
from torch import Tensor

from capt_peft.defences import Undefended


class SmallUndefended(Undefended):
    """Features tanh(W x) of images x (3, 4, 4), and logits 5 u'T of features u scaled to length 1."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(6, 48, generator=generator, dtype=torch.float64) / 2
        self.texts = torch.nn.functional.normalize(torch.randn(4, 6, generator=generator, dtype=torch.float64))
        self.blank = torch.nn.functional.normalize(torch.randn(6, generator=generator, dtype=torch.float64), dim=0)
        self.forwards = self.gradients = 0

    def raw_features(self, pixels: Tensor) -> Tensor:
        self.forwards += len(pixels)
        return torch.tanh(pixels.flatten(1) @ self.weight.T)

    def logits(self, features: Tensor, texts: Tensor | None = None) -> Tensor:
        return 5 * features @ (self.texts if texts is None else texts).T


def small_images(count: int = 3) -> Tensor:
    """Images away from 0 and 1, where cutting to [0, 1] would hide a gradient."""
    return 0.2 + 0.6 * torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
