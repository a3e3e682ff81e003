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
from .l1 import count_of, sparse_sign, threshold
from .square_patch import best_square, covering_side, random_square

NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1", "patch": "patch"}
BALLS = ("linf", "l2", "l1")  # the norms that are norms: a patch bounds where pixels change, not how far
PIXEL_TOLERANCE = 1e-6

# Four float32 roundings (norm, factor, product, difference) lie between a step and its length as a caller measures it:
# aiming this much inside the L2 or L1 ball keeps the result inside it whatever they add up to.
_MARGIN = 1 - 2**-21
_L1_SHARE = 0.01  # of the pixel values, that an L1 step moves

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
        norm: `"linf"` (the largest change of any pixel value), `"l2"` (the Euclidean length over the flattened image), `"l1"`
            (the sum of all changes) or `"patch"` (one square of any pixels, anywhere in the image; no norm, but used as one).
        epsilon: the radius, as a fraction of the [0, 1] range: 0 to 1 for L-inf, any length from 0 for L2 and L1; for a patch
            its side, as a fraction of the image's shorter side (rounded down to whole pixels). Texts such as `"4/255"` are
            read exactly.

    Raises:
        TypeError: `epsilon` is neither a number nor a text.
        ValueError: an unknown norm, or a radius outside its range.
    """

    norm: str
    epsilon: float

    def __init__(self, norm: str, epsilon: float | str) -> None:
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}: it must be one of {', '.join(map(repr, NORMS))}")
        radius = parse_fraction(epsilon)
        if norm == "patch" and radius > 1:
            raise ValueError(
                f"epsilon={epsilon!r} is more than the whole image: a patch's epsilon is its side as a fraction of the image's, "
                "such as '1/8'"
            )
        if norm == "linf" and radius > 1:
            raise ValueError(
                f"epsilon={epsilon!r} is more than the whole range of a pixel: an L-inf epsilon is a fraction of "
                f"[0, 1], such as '{f'{radius:g}' if radius <= 255 else 4}/255'"
            )
        object.__setattr__(self, "norm", norm)
        object.__setattr__(self, "epsilon", radius)

    @classmethod
    def from_text(cls, text: str) -> ThreatModel:
        """Returns the threat model of a text such as "linf:4/255", "l2:0.5", "l1:12" or "patch:1/8"."""
        norm, colon, epsilon = text.strip().partition(":")
        if not colon:
            raise ValueError(f"{text!r} must be a norm and an epsilon, such as linf:4/255, l2:0.5, l1:12 or patch:1/8")
        return cls(norm, epsilon)

    def __str__(self) -> str:
        """Returns the norm and the radius, as in "L-inf 4/255"."""
        return f"{NORMS[self.norm]} {format_fraction(self.epsilon)}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings: `ThreatModel(**threat_model.to_dict())` is the same threat model."""
        return {"norm": self.norm, "epsilon": self.epsilon}

    def norm_of(self, delta: Tensor) -> Tensor:
        """Returns the length (B,) of each perturbation in `delta` (B, 3, H, W); of a patch, the side of the square around it."""
        if self.norm == "linf":
            return delta.abs().amax(dim=(1, 2, 3))
        if self.norm == "patch":
            return covering_side(delta) / min(delta.shape[2:])
        wide, order = wide_dtype(delta.device), 1 if self.norm == "l1" else 2
        lengths: Tensor = torch.linalg.vector_norm(delta, order, dim=(1, 2, 3), dtype=wide)
        return lengths.to(delta.dtype)

    def direction(self, gradient: Tensor, at: Tensor | None = None) -> Tensor:
        """Returns the step of length 1 along which a loss with this gradient rises fastest (no step where it is zero).

        The fastest L1 step would move one pixel value alone. It moves the 1% with the largest gradients, equally, as attacks
        within L1 do that are not to take a step per value (Tramer & Boneh 2019, arXiv 1904.13000).

        Args:
            gradient: (B, 3, H, W) float.
            at: (B, 3, H, W), where it was taken: an L1 step then leaves out what cannot move on within [0, 1].

        Returns:
            (B, 3, H, W): the sign for L-inf, the gradient over its Euclidean length for L2, a sparse sign for L1.

        Raises:
            ValueError: The threat model is a patch, which has no length of a step.
        """
        if self.norm == "linf":
            return gradient.sign()
        if self.norm == "patch":
            raise ValueError("a patch bounds no length of a step: use the attack 'patch'")
        if self.norm == "l1":
            return sparse_sign(gradient, count_of(gradient, _L1_SHARE), at)
        tiny = torch.finfo(gradient.dtype).tiny
        scaled = gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(tiny)
        return scaled / _per_image(
            self.norm_of(scaled).clamp_min(1)
        )  # its largest entry is 1, so its norm is at least 1

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Brings images back into the ball around `images` and into [0, 1].

        The result never leaves [0, 1], and leaves the ball by no more than 1e-6 (rounding). For L-inf, L1 and a patch it is the
        nearest such image; for L2 the nearest point of the ball, cut to [0, 1].

        Args:
            adversarial: (B, 3, H, W) float.
            images: (B, 3, H, W) float in [0, 1], the centres.
        """
        if self.norm == "l1":
            return self._into_l1(adversarial, images, torch.where(adversarial > images, 1 - images, images)).clamp(0, 1)
        return self.into_ball(adversarial, images).clamp(0, 1)  # the centre is in [0, 1]: no pixel gets farther from it

    def into_ball(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Brings points back into the ball around `images`, which may lie outside [0, 1]; arguments as for `project`."""
        if self.norm == "linf":
            return torch.minimum(torch.maximum(adversarial, images - self.epsilon), images + self.epsilon)
        if self.norm == "l1":
            return self._into_l1(adversarial, images, torch.full_like(images, torch.inf))
        if self.norm == "patch":
            return torch.where(
                best_square(adversarial, images, self.side(images), wide_dtype(images.device)), adversarial, images
            )
        radius = self.epsilon * _MARGIN
        delta = adversarial - images
        norm = _per_image(self.norm_of(delta))  # (B, 1, 1, 1)
        return torch.where(norm <= radius, adversarial, _moved(images, delta * (radius / norm)))

    def _into_l1(self, adversarial: Tensor, images: Tensor, room: Tensor) -> Tensor:
        """Returns the nearest points of the L1 ball that are no farther from `images` than `room` (B, 3, H, W) in any value."""
        radius = self.epsilon * _MARGIN
        delta = adversarial - images
        within = torch.minimum(delta.abs(), room) * delta.sign()
        shrunk = threshold(delta, room, radius, wide_dtype(delta.device))
        fits = _per_image(self.norm_of(within) <= radius)
        held = torch.where(delta.abs() <= room, adversarial, images + within)
        return torch.where(fits, held, _moved(images, shrunk))

    def side(self, images: Tensor) -> int:
        """Returns the side of a patch in pixels of `images` (B, 3, H, W).

        Raises:
            ValueError: It is not a patch, or less than a pixel.
        """
        if self.norm != "patch":
            raise ValueError(f"{self} is not a patch, and has no side")
        shorter = min(images.shape[2:])
        side = math.floor(self.epsilon * shorter + 1e-6)
        if side == 0 and self.epsilon > 0:
            raise ValueError(
                f"a patch of {self.epsilon:g} of {shorter} pixels is less than a pixel: give epsilon '1/{shorter}' or more"
            )
        return side

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
        elif self.norm == "patch":
            inside = random_square(draw(torch.rand, (len(images), 2), generator), self.side(images), images)
            return torch.where(inside, draw(torch.rand, images.shape, generator).to(images), images)
        else:
            towards = self._on_sphere(images.shape, generator)  # (B, 3, H, W), uniform
            share = draw(torch.rand, (len(images), 1, 1, 1), generator)
            offset = towards * share.pow(1 / images[0].numel()) * self.epsilon  # volume grows with radius ** dimensions
        return (self.project if clip else self.into_ball)(images + offset.to(images), images)

    def _on_sphere(self, shape: torch.Size, generator: Generators) -> Tensor:
        """Returns perturbations of length 1, each as likely."""
        if self.norm == "l2":
            return self.direction(draw(torch.randn, shape, generator))
        uniform = draw(torch.rand, (*shape, 2), generator)
        sizes = -torch.log1p(
            -uniform[..., 0]
        )  # of an exponential distribution: their shares are uniform on the simplex
        return torch.where(uniform[..., 1] < 0.5, -sizes, sizes) / _per_image(self.norm_of(sizes))


def _moved(images: Tensor, delta: Tensor) -> Tensor:
    """Returns `images + delta`, rounded so that no value gets farther away than `delta`."""
    moved = images + delta
    # On a flat image all pixels may round away from the centre together, which adds up to 1e-5 at 224 x 224.
    overshot = (moved - images).abs() > delta.abs()
    return torch.where(overshot, torch.nextafter(moved, images), moved)


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
