"""TTE: the mean of the logits of fixed views of the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from .base import Defence, Undefended, check_count

VIEWS = 10  # the image, four crops, and the mirror image of each


@dataclass(frozen=True)
class Ensemble(Defence):
    """Test-time transformation ensembling: the mean logits of views of the image that are the same for every image.

    Pérez et al. 2021, arXiv 2107.14110; the views and the mean are those of their code, github.com/juancprzs/TTE at 4948875,
    utils/utils.py, `AugWrapper`: the image, its mirror image, crops of the size of the image from the image padded with the mean
    colour by an eighth of its side (4 of 32 pixels), and their mirror images. Where a crop lies is drawn once, here from seed 0:
    the attacker knows it as well. Unlike there, every crop has a place of its own (there, all functions share the loop's
    variable, and are the last crop), which may be at the lower or right edge, and it is the crop that is mirrored.

    Args:
        views: Their number, at least 1: the image, its mirror image, and so on; 1 is the classifier alone.
    """

    pattern: ClassVar[str] = r"tte-(?P<views>\d+)"
    help: ClassVar[dict[str, str]] = {"tte-VIEWS": f"TTE: mean logits of mirrored and cropped views, as tte-{VIEWS}"}

    views: int = VIEWS

    def __post_init__(self) -> None:
        check_count("views", self.views)

    @property
    def name(self) -> str:
        """Such as "tte-10"."""
        return f"tte-{self.views}"

    def logits(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the mean of the views' logits. It is smooth, so that its own gradient is all that there is to know."""
        features = model.features_of(pixels, self._views(model))  # (V, B, D)
        return torch.stack([model.logits(each) for each in features]).mean(0)

    def _views(self, model: Undefended) -> list[Callable[[Tensor], Tensor]]:
        generator = torch.Generator().manual_seed(0)
        crops: list[Callable[[Tensor], Tensor]] = [_whole]
        while 2 * len(crops) < self.views:
            down, right = torch.rand(2, generator=generator).tolist()
            crops.append(partial(_crop, down=down, right=right, colour=model.classifier.mean))
        views = [view for crop in crops for view in (crop, partial(_mirrored, crop))]
        return views[: self.views]


def _whole(pixels: Tensor) -> Tensor:
    return pixels


def _mirrored(view: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    return view(pixels).flip(-1)


def _crop(pixels: Tensor, *, down: float, right: float, colour: Tensor) -> Tensor:
    """Returns the crop whose place is given as shares (below 1) of what there is, of images padded with a colour."""
    height, width = pixels.shape[-2:]
    edge = width // 8
    colour = colour.to(pixels)
    padded = functional.pad(pixels - colour, [edge] * 4) + colour
    top, left = (int(share * (2 * edge + 1)) for share in (down, right))
    return padded[..., top : top + height, left : left + width]
