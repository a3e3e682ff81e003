"""Squares of pixels in an image: the one around a change, the one that keeps most of it, and a random one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def covering_side(delta: Tensor) -> Tensor:
    """Returns the side (B,), in pixels, of the smallest square around all pixels that differ from 0 in `delta` (B, 3, H, W)."""
    changed = (delta != 0).any(1)  # (B, H, W)
    return torch.maximum(_extent(changed.any(2)), _extent(changed.any(1))).to(delta.dtype)


def _extent(line: Tensor) -> Tensor:
    """Returns the length (B,) from the first to the last true place of each row of `line` (B, N)."""
    places = torch.arange(line.shape[1], device=line.device)
    last, first = torch.where(line, places, -1).amax(1), torch.where(line, places, line.shape[1]).amin(1)
    return (last - first + 1).clamp_min(0)


def square_sums(values: Tensor, side: int) -> Tensor:
    """Returns the sums (B, H - side + 1, W - side + 1) of `values` (B, H, W) over every square of a side."""
    return F.avg_pool2d(values[:, None], side, stride=1, divisor_override=1).squeeze(1)


def square_at(top: Tensor, left: Tensor, side: int, images: Tensor) -> Tensor:
    """Returns masks (B, 1, H, W) of the squares with these upper left corners, (B,) each."""
    rows = torch.arange(images.shape[2], device=images.device) - top[:, None]
    columns = torch.arange(images.shape[3], device=images.device) - left[:, None]
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    return inside[:, None]


def best_square(adversarial: Tensor, images: Tensor, side: int, wide: torch.dtype) -> Tensor:
    """Returns the mask (B, 1, H, W) of the square outside of which going back to `images` costs least.

    What is kept inside is cut to [0, 1], so that the nearest image with one changed square is kept.
    """
    if side == 0:
        return torch.zeros_like(images[:, :1], dtype=torch.bool)
    beyond = adversarial - adversarial.clamp(0, 1)
    sums = square_sums(((adversarial - images).to(wide) ** 2 - beyond.to(wide) ** 2).sum(1), side)
    place = sums.flatten(1).argmax(1)
    return square_at(place // sums.shape[2], place % sums.shape[2], side, images)


def random_corner(uniform: Tensor, side: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the upper left corners, (B,) each, of the squares where numbers in [0, 1) say, (B, 2); every place is as likely."""
    room = [n - side for n in images.shape[2:]]
    top, left = ((uniform[:, i] * (n + 1)).long().clamp_max(n).to(images.device) for i, n in enumerate(room))
    return top, left


def random_square(uniform: Tensor, side: int, images: Tensor) -> Tensor:
    """Returns the mask (B, 1, H, W) of the square at its `random_corner`."""
    return square_at(*random_corner(uniform, side, images), side, images)
