"""Gaussian noise: one noisy image, and randomised smoothing, a vote over several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..utils.fractions import format_fraction, parse_fraction
from .base import NUMBER, Defence, Undefended, check_count, number

_STD = rf"(?P<std>{NUMBER}(?:/255)?)"


@dataclass(frozen=True)
class _Noisy(Defence):
    random: ClassVar[bool] = True

    std: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "std", parse_fraction(self.std))
        if not 0 < self.std <= 1:
            raise ValueError(f"the standard deviation of the noise is {self.std:g}: it must be above 0 and at most 1")

    @property
    def _std(self) -> str:
        """Returns the standard deviation as a name holds it: nothing of it is rounded away."""
        text = format_fraction(self.std)
        return text if parse_fraction(text) == self.std else number(self.std)

    def noisy(self, pixels: Tensor) -> Tensor:
        """Returns images with Gaussian noise, which may leave [0, 1]."""
        return pixels + self.std * torch.randn_like(pixels)


@dataclass(frozen=True)
class GaussianNoise(_Noisy):
    """Classifies the image with Gaussian noise on it: the base classifier f(x + e) of randomised smoothing, run once.

    Cohen et al. 2019, arXiv 1902.02918, section 3; the noise is not clipped, as in their code (github.com/locuslab/smoothing at
    bdfa228, code/core.py, `_sample_noise`).

    Args:
        std: Standard deviation of the noise on pixels in [0, 1], above 0 and at most 1; a text such as "8/255" is read exactly.
    """

    pattern: ClassVar[str] = rf"noise-{_STD}"
    help: ClassVar[dict[str, str]] = {"noise-STD": "Gaussian noise on the pixels, as noise-8/255 or noise-0.1"}

    @property
    def name(self) -> str:
        """Such as "noise-8/255"."""
        return f"noise-{self._std}"

    def logits(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the logits of one noisy copy of each image."""
        return model(self.noisy(pixels))


@dataclass(frozen=True)
class Smoothing(_Noisy):
    """Randomised smoothing: the class that most of several noisy copies of the image get.

    Cohen et al. 2019, arXiv 1902.02918, equation 1 and `Predict` of section 3.2.2 (github.com/locuslab/smoothing at bdfa228,
    code/core.py, `predict`). Unlike `Predict`, it never abstains, and it gives no certificate. `unrolled` shows the attacker the
    mean probability in place of the vote, as Salman et al. 2019 attack (arXiv 1906.04584, section 2.2).

    Args:
        std: Standard deviation of the noise on pixels in [0, 1], above 0 and at most 1; a text such as "8/255" is read exactly.
        copies: Noisy copies that vote, at least 1.
    """

    pattern: ClassVar[str] = rf"smoothing-{_STD}x(?P<copies>\d+)"
    help: ClassVar[dict[str, str]] = {
        "smoothing-STDxCOPIES": "randomised smoothing: a vote over noisy copies, as smoothing-0.1x32"
    }

    copies: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("copies", self.copies)

    @property
    def name(self) -> str:
        """Such as "smoothing-0.1x32"."""
        return f"smoothing-{self._std}x{self.copies}"

    def logits(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns log((votes + p) / (copies + 1)), where p are the mean probabilities, which decide between equal votes."""
        probabilities = self._probabilities(model, pixels)
        votes = functional.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).sum(0)
        return _log((votes + probabilities.mean(0)) / (self.copies + 1))

    def unrolled(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the logarithm of the copies' mean probabilities."""
        return _log(self._probabilities(model, pixels).mean(0))

    def _probabilities(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns (copies, B, N)."""
        features = model.features_of(pixels, [self.noisy] * self.copies)
        return torch.stack([model.logits(each) for each in features]).softmax(-1)


def _log(shares: Tensor) -> Tensor:
    return shares.clamp_min(torch.finfo(shares.dtype).tiny).log()
