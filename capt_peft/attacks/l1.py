"""The L1 ball within [0, 1]: the nearest point of both, and steps that move few pixel values."""

from __future__ import annotations

import torch
from torch import Tensor


def threshold(delta: Tensor, room: Tensor, radius: float, wide: torch.dtype) -> Tensor:
    """Returns the perturbations nearest to `delta` whose L1 length is `radius`, and no value of which exceeds its room.

    All values shrink by a common length and are cut to their room, `z_i = sign(delta_i) clamp(|delta_i| - t, 0, room_i)`, with
    t such that the lengths add up to the radius (Croce & Hein 2021, arXiv 2103.01208, proposition 2.1). As t falls, the length
    grows linearly between the places where a value begins to move and where it hits its room, which are sorted.

    Args:
        delta: (B, 3, H, W).
        room: (B, 3, H, W), 0 or more, perhaps infinite: how far each value may move the way that `delta` has it.
        radius: 0 or more, and no more than the length that `delta` has within its room.
        wide: The type of the sums.

    Returns:
        (B, 3, H, W), of the type of `delta`.
    """
    size = delta.abs().to(wide).flatten(1)  # (B, P)
    rooms = room.to(wide).flatten(1)
    places, order = torch.cat([size, (size - rooms).clamp_min(0)], 1).sort(1, descending=True)  # values of t
    moving = torch.where(order < size.shape[1], 1.0, -1.0).to(wide).cumsum(1)  # values that move below each place
    steps = places[:, :-1] - places[:, 1:]
    length = torch.cat([torch.zeros_like(size[:, :1]), (moving[:, :-1] * steps).cumsum(1)], 1)  # at each place
    k = ((length < radius).sum(1, keepdim=True) - 1).clamp_min(0)
    t = places.gather(1, k) - (radius - length.gather(1, k)) / moving.gather(1, k).clamp_min(1)
    shrunk = torch.minimum((size - t.clamp_min(0)).clamp_min(0), rooms)
    return delta.sign() * shrunk.view_as(delta).to(delta)


def count_of(gradient: Tensor, share: float) -> Tensor:
    """Returns how many pixel values are a share of each image, (B,) int64, at least one."""
    count = max(round(share * gradient[0].numel()), 1)
    return torch.full((len(gradient),), count, dtype=torch.int64, device=gradient.device)


def sparse_sign(gradient: Tensor, count: Tensor, at: Tensor | None = None) -> Tensor:
    """Returns the signs of each image's `count` largest gradients over their number, and 0 elsewhere: an L1 step of length 1.

    Args:
        gradient: (B, 3, H, W).
        count: (B,) int64, at least 1.
        at: (B, 3, H, W), where it was taken: values that lie at the end of [0, 1] towards which they would move are left out.
    """
    sign = gradient.sign()
    if at is not None:
        sign = torch.where(torch.where(sign > 0, at < 1, at > 0), sign, 0)
    size = (gradient.abs() * sign.abs()).flatten(1)
    rank = size.argsort(dim=1, descending=True, stable=True).argsort(1)  # the largest is 0
    chosen = torch.where(rank < count[:, None], sign.flatten(1), 0)
    return (chosen / chosen.abs().sum(1, keepdim=True).clamp_min(1)).view_as(gradient)
