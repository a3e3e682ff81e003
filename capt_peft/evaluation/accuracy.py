"""A share of n images, and how sure one can be of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Accuracy:
    """A share of n images, with its 95% Wilson interval.

    Args:
        correct: How many of the images.
        n: How many images.
    """

    correct: int
    n: int

    @property
    def value(self) -> float:
        """The accuracy, in [0, 1]."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson score interval (Wilson 1927), in [0, 1]."""
        return wilson_interval(self.correct, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f}% ({100 * low:.1f} to {100 * high:.1f}, n={self.n})"

    def to_dict(self) -> dict[str, Any]:
        """Returns accuracy, number of images and interval, for results."""
        return {"accuracy": self.value, "correct": self.correct, "n": self.n, "interval_95": list(self.interval)}


def wilson_interval(correct: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Returns the Wilson score interval of a share.

    Args:
        correct: Number of successes, 0 to n.
        n: Number of trials, at least 1.
        z: Quantile of the normal distribution; the default gives 95%.

    Raises:
        ValueError: `correct` or `n` out of range.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} of {n} is no share: n must be at least 1 and the count between 0 and n.")
    p, square = correct / n, z * z / n
    centre = (p + square / 2) / (1 + square)
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n)) / (1 + square)
    # exact at the ends, where the formula leaves a rounding error
    return 0.0 if correct == 0 else centre - half, 1.0 if correct == n else centre + half
