"""Attacks on features: any loss of an image that rises where its features go wrong, as `PGD` climbs it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .threat import LogitsFn


def two_logits(loss: Callable[[Tensor], Tensor]) -> LogitsFn:
    """Returns logits (B, 2) whose log-odds against class 0 are a loss: `PGD` with cross-entropy and the label 0 climbs it.

    They know no right or wrong, so that an attack which stops at a wrong answer has no use for them.

    Args:
        loss: Images (B, 3, H, W) -> one value per image (B,), with gradient.
    """

    def logits_fn(images: Tensor) -> Tensor:
        values = loss(images)
        return torch.stack([-values, torch.zeros_like(values)], dim=1)

    return logits_fn


def squared_distance(features: Tensor, target: Tensor) -> Tensor:
    """Returns the squared Euclidean distance of each row, in float32: (B, D), (B, D) -> (B,).

    It is what FARE's attack climbs (Schlarmann et al. 2024, arXiv 2402.12336).
    """
    return (features.float() - target.float()).square().sum(-1)
