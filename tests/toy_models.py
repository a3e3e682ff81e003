"""Small classifiers of 3 x 8 x 8 images that attacks are tested on."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from capt_peft.attacks import ThreatModel

CLASSES = 5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_model(scale: float = 4.0, classes: int = CLASSES) -> nn.Sequential:
    """A small MLP with curvature, whose predictions a few 1/255 can change."""
    sizes = (3 * 8 * 8, 32, classes)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    generator = seeded(0)
    for layer in layers:
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * scale / layer.in_features**0.5
        layer.bias.data = torch.randn(layer.bias.shape, generator=generator)
    return nn.Sequential(nn.Flatten(), layers[0], nn.Tanh(), layers[1]).eval()


def some_images(batch: int = 64) -> Tensor:
    return torch.rand(batch, 3, 8, 8, generator=seeded(1))


def epsilon_for(norm: str, levels: float) -> ThreatModel:
    """A ball of `levels` / 255 a pixel, or for L2 half, for L1 a fifth of the length that this makes over the image."""
    return ThreatModel(norm, levels / 255 * {"linf": 1, "l2": 192**0.5 / 2, "l1": 192 / 5}[norm])


def accuracy(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item()
