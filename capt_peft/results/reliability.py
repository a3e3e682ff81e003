"""Whether scores are probabilities: accuracy against the score of the predicted class, in bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .accuracy import FigureError

BINS = 15  # as in Guo et al. 2017
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Reliability:
    """The images of each of 15 bins of equal width by the score of their predicted class: ((i - 1) / 15, i / 15].

    Attributes:
        images: How many images are in each bin.
        right: How many of them are classified correctly.
        scores: The sum of their scores.

    Raises:
        FigureError: Figures that cannot be true.
    """

    images: tuple[int, ...]
    right: tuple[int, ...]
    scores: tuple[float, ...]

    def __post_init__(self) -> None:
        rows = zip(self.images, self.right, self.scores, strict=True)
        widths = enumerate(rows)
        if len(self.images) != BINS or not all(
            0 <= right <= n and n * i / BINS - _ROUNDING * (n + 1) <= score <= n * (i + 1) / BINS + _ROUNDING * (n + 1)
            for i, (n, right, score) in widths
        ):
            raise FigureError(
                f"has bins of scores that cannot be true; {BINS} with images, right ones and scores are needed."
            )

    @property
    def n(self) -> int:
        """How many images."""
        return sum(self.images)

    @property
    def ece(self) -> float:
        """The expected calibration error, in [0, 1]: the sum over bins of |right - sum of scores| / n.

        Naeini et al. 2015; Guo et al. 2017 (arXiv 1706.04599), Eq. 3.
        """
        return sum(abs(right - score) for right, score in zip(self.right, self.scores, strict=True)) / self.n

    def points(self) -> list[tuple[float, float, int]]:
        """Returns mean score, accuracy and number of images of each bin that has any: the reliability diagram."""
        rows = zip(self.images, self.right, self.scores, strict=True)
        return [(score / n, right / n, n) for n, right, score in rows if n]

    @classmethod
    def of(cls, scores: Sequence[float], right: Sequence[bool]) -> Reliability:
        """Counts n images by the scores of their predicted classes, and whether these are right."""
        values, hits = np.asarray(scores, float), np.asarray(right, bool)
        places = np.clip(np.ceil(values * BINS).astype(int) - 1, 0, BINS - 1)
        counts = [np.bincount(places, weights, BINS).tolist() for weights in (None, hits.astype(float), values)]
        return cls(tuple(counts[0]), tuple(int(count) for count in counts[1]), tuple(counts[2]))

    def to_dict(self) -> dict[str, Any]:
        """Returns the error and the bins, for results."""
        return {"ece": self.ece, "images": list(self.images), "right": list(self.right), "scores": list(self.scores)}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Reliability:
        """Reads what `to_dict` returned.

        Raises:
            FigureError: Figures that cannot be true, or an error that is not that of the bins.
        """
        found = cls(tuple(row["images"]), tuple(row["right"]), tuple(row["scores"]))
        if abs(found.ece - row["ece"]) > _ROUNDING:
            raise FigureError("has a calibration error that is not that of its bins.")
        return found
