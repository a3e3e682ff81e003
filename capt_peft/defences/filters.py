"""Filters of the image: its low frequencies alone, and its smoothing by total variation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import NUMBER, Purifier, Undefended, number

ITERATIONS = 50  # of the minimisation of the total variation


@dataclass(frozen=True)
class LowPass(Purifier):
    """Keeps the low frequencies of the image: those within a circle around 0, with a share of the highest one as its radius.

    The ideal low-pass filter of the discrete Fourier transform, as in the detector of CSR (arXiv 2601.19210; Summu77/CSR at
    a5009cc, csr/defense/csr.py, lines 79 to 106), whose default radius is 40 of the 112 periods that 224 pixels have: a share of
    0.36. CSR's default mask is a Gaussian of that width; the ideal one, which it offers too, leaves nothing for an attacker above
    the radius. CSR only detects with it. What the filter brings out of [0, 1] is cut off.

    Args:
        share: Radius as a share of the highest frequency of each axis (half a period per pixel); above 0, at most 1.
    """

    pattern: ClassVar[str] = rf"lowpass(?:-(?P<share>{NUMBER}))?"
    help: ClassVar[dict[str, str]] = {
        "lowpass": "the image's low frequencies alone, up to 0.36 of the highest",
        "lowpass-SHARE": "the same up to another share of the highest frequency: lowpass-0.5",
    }

    share: float = 0.36

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", float(self.share))
        if not 0 < self.share <= 1:
            raise ValueError(f"the share of the frequencies is {self.share}: it must be above 0 and at most 1")

    @property
    def name(self) -> str:
        """Returns "lowpass" at the default, else such as "lowpass-0.5"."""
        return "lowpass" if self.share == LowPass.share else f"lowpass-{number(self.share)}"

    def purify(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the filtered pixels, with their exact gradient."""
        return low_pass(pixels, self.share).clamp(0, 1)


@dataclass(frozen=True)
class TotalVariation(Purifier):
    """Smooths each channel x into the z with the smallest sum((z - x)^2) / 2 + weight * TV(z).

    TV(z) sums, over the pixels, the length of the gradient (differences to the pixels below and to the right; none beyond the
    edges): the model of Rudin, Osher and Fatemi (Physica D 60, 1992), as a defence of Guo et al. (ICLR 2018, arXiv 1711.00117,
    section 3.2), whose code (facebookarchive/adversarial_image_defenses at 55bf56d, adversarial/lib/constants.py, lines 62 to 64)
    has the same weight. There half of the pixels, drawn at random, are left out of the first sum; here none are, so that the same
    image always gets the same answer. The minimum is approached by 50 iterations of the fast gradient projection of Beck and
    Teboulle (IEEE Transactions on Image Processing 18, 2009, section IV), which gradients go through: up to a weight of 0.1 they
    bring each pixel of noise within 0.001 of it, and leave more beyond.

    Args:
        weight: Of the total variation, above 0: the larger, the smoother.
    """

    pattern: ClassVar[str] = rf"tv(?:-(?P<weight>{NUMBER}))?"
    help: ClassVar[dict[str, str]] = {
        "tv": "smoothing by total variation (Guo et al., ICLR 2018) of weight 0.03",
        "tv-WEIGHT": "the same with another weight: tv-0.1",
    }

    weight: float = 0.03

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", float(self.weight))
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"the weight of the total variation is {self.weight}: it must be above 0")

    @property
    def name(self) -> str:
        """Returns "tv" at the default, else such as "tv-0.1"."""
        return "tv" if self.weight == TotalVariation.weight else f"tv-{number(self.weight)}"

    def purify(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the smoothed pixels, with the gradient through all iterations."""
        return smoothed(pixels, self.weight).clamp(0, 1)


def low_pass(pixels: Tensor, share: float) -> Tensor:
    """Returns the part of images (B, C, H, W) whose frequencies are within `share` (0 to 1) of the highest: a projection."""
    height, width = pixels.shape[-2:]
    rows = torch.fft.fftfreq(height, 0.5, device=pixels.device, dtype=pixels.dtype)  # in units of the highest
    columns = torch.fft.rfftfreq(width, 0.5, device=pixels.device, dtype=pixels.dtype)
    kept = rows[:, None].square() + columns.square() <= share**2
    return torch.fft.irfft2(torch.fft.rfft2(pixels) * kept, s=(height, width))


def smoothed(images: Tensor, weight: float, iterations: int = ITERATIONS) -> Tensor:
    """Returns the minimiser (B, C, H, W) of `TotalVariation`, each channel for itself, as near as the iterations bring it.

    They run on the dual problem: over vectors p of length 1 or less, one per pixel, of which z = x - weight * D'p.
    """
    p = ahead = torch.zeros_like(_gradient(images))  # (2, B, C, H, W)
    pace = 1.0
    for _ in range(iterations):
        moved = ahead + _gradient(images - weight * _divergence(ahead)) / (8 * weight)
        moved = moved / moved.square().sum(0).clamp_min(1).sqrt()
        faster = (1 + (1 + 4 * pace**2) ** 0.5) / 2
        p, ahead, pace = moved, moved + (pace - 1) / faster * (moved - p), faster
    return images - weight * _divergence(p)


def _gradient(images: Tensor) -> Tensor:
    """Returns D z: differences to the pixel below and to the one on the right (2, B, C, H, W), 0 at the last."""
    below = F.pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1))
    right = F.pad(images[..., 1:] - images[..., :-1], (0, 1))
    return torch.stack([below, right])


def _divergence(p: Tensor) -> Tensor:
    """Returns D'p, by the transpose of `_gradient`: (B, C, H, W) of (2, B, C, H, W)."""
    below, right = p[0, ..., :-1, :], p[1, ..., :-1]
    rows = F.pad(below, (0, 0, 1, 0)) - F.pad(below, (0, 0, 0, 1))
    return rows + F.pad(right, (1, 0)) - F.pad(right, (0, 1))
