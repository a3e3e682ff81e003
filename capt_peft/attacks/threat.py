"""The threat model: which images an adversary may turn an image into, and what every attack checks and draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..randomness import Generators, draw, resolve_generator
from ..utils.fractions import format_fraction, parse_fraction

NORMS = {"linf": "L-inf", "l2": "L2"}
PIXEL_TOLERANCE = 1e-6

# Four float32 roundings (norm, factor, product, difference) lie between a step and its length as a caller measures it:
# aiming this much inside the L2 ball keeps the result inside it whatever they add up to.
_L2_MARGIN = 1 - 2**-21

LogitsFn = Callable[[Tensor], Tensor]


def wide_dtype(device: torch.device) -> torch.dtype:
    """Returns the widest float of the device: sums over 150,000 pixels and softmax tails need more than float32 has."""
    return torch.float32 if device.type == "mps" else torch.float64


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)  # (B,) -> (B, 1, 1, 1)


@dataclass(frozen=True, init=False)
class ThreatModel:
    """The images within `epsilon` of an image, in a norm over its pixels, that are images themselves (in [0, 1]).

    The adversary moves pixels before normalisation. `str(threat_model)` reads "L-inf 4/255" or "L2 0.5".

    Args:
        norm: `"linf"` (the largest change of any pixel) or `"l2"` (the Euclidean length over the flattened image).
        epsilon: the radius, as a fraction of the [0, 1] range: 0 to 1 for L-inf, any length from 0 for L2. Texts such
            as `"4/255"` are read exactly.

    Raises:
        TypeError: `epsilon` is neither a number nor a text.
        ValueError: an unknown norm, or a radius outside its range.
    """

    norm: str
    epsilon: float

    def __init__(self, norm: str, epsilon: float | str) -> None:
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}: it must be 'linf' or 'l2'")
        radius = parse_fraction(epsilon)
        if norm == "linf" and radius > 1:
            raise ValueError(
                f"epsilon={epsilon!r} is more than the whole range of a pixel: an L-inf epsilon is a fraction of "
                f"[0, 1], such as '{f'{radius:g}' if radius <= 255 else 4}/255'"
            )
        object.__setattr__(self, "norm", norm)
        object.__setattr__(self, "epsilon", radius)

    def __str__(self) -> str:
        """Returns the norm and the radius, as in "L-inf 4/255"."""
        return f"{NORMS[self.norm]} {format_fraction(self.epsilon)}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings: `ThreatModel(**threat_model.to_dict())` is the same threat model."""
        return {"norm": self.norm, "epsilon": self.epsilon}

    def norm_of(self, delta: Tensor) -> Tensor:
        """Returns the length (B,) of each perturbation in `delta` (B, 3, H, W)."""
        if self.norm == "linf":
            return delta.abs().amax(dim=(1, 2, 3))
        wide = wide_dtype(delta.device)
        lengths: Tensor = torch.linalg.vector_norm(delta, dim=(1, 2, 3), dtype=wide)
        return lengths.to(delta.dtype)

    def direction(self, gradient: Tensor) -> Tensor:
        """Returns the step of length 1 along which a loss with this gradient rises fastest (no step where it is zero).

        Args:
            gradient: (B, 3, H, W) float.

        Returns:
            (B, 3, H, W): the sign for L-inf, the gradient over its Euclidean length for L2.
        """
        if self.norm == "linf":
            return gradient.sign()
        tiny = torch.finfo(gradient.dtype).tiny
        scaled = gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(tiny)
        return scaled / _per_image(
            self.norm_of(scaled).clamp_min(1)
        )  # its largest entry is 1, so its norm is at least 1

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Brings images back into the ball around `images` and into [0, 1].

        The result never leaves [0, 1], and leaves the ball by no more than 1e-6 (rounding).

        Args:
            adversarial: (B, 3, H, W) float.
            images: (B, 3, H, W) float in [0, 1], the centres.
        """
        return self.into_ball(adversarial, images).clamp(0, 1)  # the centre is in [0, 1]: no pixel gets farther from it

    def into_ball(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Brings points back into the ball around `images`, which may lie outside [0, 1]; arguments as for `project`."""
        if self.norm == "linf":
            return torch.minimum(torch.maximum(adversarial, images - self.epsilon), images + self.epsilon)
        radius = self.epsilon * _L2_MARGIN
        delta = adversarial - images
        norm = _per_image(self.norm_of(delta))  # (B, 1, 1, 1)
        delta = delta * (radius / norm)
        moved = images + delta
        # On a flat image all pixels may round away from the centre together, which adds up to 1e-5 at 224 x 224.
        overshot = (moved - images).abs() > delta.abs()
        moved = torch.where(overshot, torch.nextafter(moved, images), moved)
        return torch.where(norm <= radius, adversarial, moved)

    def random_start(self, images: Tensor, generator: Generators | None = None, *, clip: bool = True) -> Tensor:
        """Draws a point for each image, uniformly in the ball.

        Args:
            images: (B, 3, H, W) float in [0, 1].
            generator: one for all, or one for each image (then a row does not depend on the others), or None for a
                fresh one of seed 0. The noise is drawn on the generator's device in float32.
            clip: cut it to [0, 1].

        Returns:
            (B, 3, H, W) in the ball around `images` and, with `clip`, in [0, 1].
        """
        generator = resolve_generator(generator, len(images), images.device)
        if self.norm == "linf":
            offset = (2 * draw(torch.rand, images.shape, generator) - 1) * self.epsilon
        else:
            towards = self.direction(draw(torch.randn, images.shape, generator))  # (B, 3, H, W), uniform on the sphere
            share = draw(torch.rand, (len(images), 1, 1, 1), generator)
            offset = towards * share.pow(1 / images[0].numel()) * self.epsilon  # volume grows with radius ** dimensions
        return (self.project if clip else self.into_ball)(images + offset.to(images), images)


def check_images(images: Tensor, labels: Tensor) -> None:
    """Refuses what is not a batch of images in [0, 1] (within 1e-6) with its labels.

    Args:
        images: (B, 3, H, W) float32 or float64, finite, at least one.
        labels: (B,) int64, 0 or more.

    Raises:
        TypeError: wrong type.
        ValueError: wrong shape or range.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor (B, 3, H, W), got {type(images).__name__}")
    if images.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"images are {images.dtype}: attacks need float32 or float64 pixels in [0, 1], because half precision "
            "rounds away steps of a fraction of 1/255 (and 8-bit pixels must be divided by 255)"
        )
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}: a non-empty batch (B, 3, H, W) is needed")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels are {kind}: a torch.int64 tensor of class numbers is needed")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}: ({len(images)},) is needed, one for each image")
    ranges = [*images.detach().aminmax(), *labels.to(images.device).aminmax()]
    low, high, *of_labels = torch.stack([value.to(wide_dtype(value.device)) for value in ranges]).tolist()  # one wait
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("images hold values that are not finite (NaN or infinity): check how they were loaded")
    if low < -PIXEL_TOLERANCE or high > 1 + PIXEL_TOLERANCE:
        raise ValueError(
            f"images range from {low:.4g} to {high:.4g}: attacks work on pixels in [0, 1] before normalisation; "
            "scale them to [0, 1] and normalise inside the model"
        )
    _check_range(of_labels)


def check_label_range(labels: Tensor, num_classes: int) -> None:
    """Refuses labels (B,) outside [0, `num_classes`)."""
    _check_range(torch.stack(labels.aminmax()).tolist(), num_classes)


def _check_range(labels: Sequence[float], num_classes: int | None = None) -> None:
    low, high = map(int, labels)
    if low < 0 or (num_classes is not None and high >= num_classes):
        allowed = "0 or more" if num_classes is None else f"0 to {num_classes - 1}, for {num_classes} classes"
        raise ValueError(f"labels range from {low} to {high}: they must be {allowed}")
