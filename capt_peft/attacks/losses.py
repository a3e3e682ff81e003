"""What attacks climb: losses of the logits, one value per image.

Attacks use the direction of an image's gradient, never its length, and compare losses of one image with each other
only. Both leave room to choose a form of each loss that does not drown in rounding when the model is confident.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_TINY = 1e-12  # keeps ratios of equal logits finite


def _split_off(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    index = labels[:, None]
    return logits.gather(1, index).squeeze(1), logits.scatter(1, index, -torch.inf)  # (B,), (B, N) without the label


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy before it saturates: the log-odds against the label, `logsumexp_{j != y} z_j - z_y`.

    CE = log(1 + exp(log-odds)). It rises with the log-odds, so the two rank an image's variants alike, and their
    gradients differ by a positive factor: the probability of the other classes. For a confident model that factor
    rounds to zero and an attack on CE itself stands still (false robustness). The log-odds have no such factor.

    Args:
        logits: (B, N) float.
        labels: (B,) int64.

    Returns:
        (B,) log-odds.
    """
    label, others = _split_off(logits, labels)
    return others.logsumexp(1) - label


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the margin `max_{j != y} z_j - z_y` (B,), positive where misclassified (Carlini & Wagner 2017, f_6)."""
    label, others = _split_off(logits, labels)
    return others.amax(1) - label


def kl_divergence(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """Returns `KL(softmax(clean_logits) || softmax(logits))` (B,), as TRADES climbs it (Zhang et al. 2019, Eq. 5)."""
    log_p = clean_logits.to(logits.dtype).log_softmax(1)
    return F.kl_div(logits.log_softmax(1), log_p, reduction="none", log_target=True).sum(1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the difference of logits ratio (Croce & Hein 2020, Eq. 6), for 3 classes and more.

    `-(z_y - max_{j != y} z_j) / (z_(1) - z_(3))`, with z_(k) the k-th largest logit: no scale or shift of the logits
    changes it, so that no confidence makes it vanish.
    """
    top = logits.topk(3, dim=1).values  # (B, 3)
    return margin(logits, labels) / (top[:, 0] - top[:, 2]).clamp_min(_TINY)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Returns the targeted difference of logits ratio (Croce & Hein 2020, Eq. 7), for 4 classes and more.

    `-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)`; t are the `targets` (B,).
    """
    top = logits.topk(4, dim=1).values  # (B, 4)
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    return targeted_margin(logits, labels, targets) / scale.clamp_min(_TINY)


def targeted_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Returns `z_t - z_y` (B,)."""
    return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)


# The second argument is the labels (B,), or for "kl" the clean logits (B, N).
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "kl": kl_divergence,
    "margin": margin,
}
