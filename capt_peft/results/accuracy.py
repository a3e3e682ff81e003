"""A share of n images, and how sure one can be of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np

from ..attacks import ThreatModel
from ..utils.files import DamagedFileError
from ..utils.markup import plain
from ..utils.text import cut

_ROUNDING = 1e-6
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Accuracy:
    """A share of n images, with its 95% Wilson interval.

    Of a classifier that answers at random it is the mean probability of a right answer, by several decisions on each image. Its
    interval is that of n images all the same: it is never too narrow, as probabilities vary less than answers do.

    Args:
        correct: How many of the images or, with several decisions, how many of all decisions.
        n: How many images.
        decisions: Decisions on each image.

    Raises:
        ValueError: A number out of range.
    """

    correct: int
    n: int
    decisions: int = 1

    def __post_init__(self) -> None:
        if self.decisions < 1:
            raise ValueError(f"decisions={self.decisions} must be at least 1.")
        wilson_interval(self.correct / self.decisions, self.n)

    @property
    def value(self) -> float:
        """The accuracy, in [0, 1]."""
        return self.correct / (self.n * self.decisions)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson score interval (Wilson 1927), in [0, 1]."""
        return wilson_interval(self.correct / self.decisions, self.n)

    @property
    def percent(self) -> str:
        """The accuracy and its interval in percent, as every table shows it: "30.8 (25.5 to 36.6)"."""
        share, low, high = (f"{100 * value:.1f}" for value in (self.value, *self.interval))
        return f"{share} ({low} to {high})"

    def __str__(self) -> str:
        share, interval = self.percent.split(" ", 1)
        return f"{share}% {interval[:-1]}, n={self.n})"

    def to_dict(self) -> dict[str, Any]:
        """Returns accuracy, number of images and interval, for results."""
        several = {} if self.decisions == 1 else {"decisions": self.decisions}
        figures = {"accuracy": self.value, "correct": self.correct, "n": self.n, "interval_95": list(self.interval)}
        return figures | several

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Accuracy:
        """Reads what `to_dict` returned; without `correct` it is counted from the share.

        Raises:
            FigureError: The numbers are not those of one share.
            KeyError: Something else is missing.
        """
        value, n, interval, decisions = row["accuracy"], row["n"], row["interval_95"], row.get("decisions", 1)
        correct = row.get("correct", round(value * n))
        whole = all(type(count) is int for count in (n, correct, decisions))
        if whole and n > 0 and decisions > 0 and 0 <= correct <= n * decisions:
            accuracy = cls(correct, n, decisions)
            told, true = (value, *interval), (accuracy.value, *accuracy.interval)
            if len(told) == 3 and all(abs(a - b) <= _ROUNDING for a, b in zip(told, true, strict=True)):
                return accuracy
        raise FigureError(
            f"says {cut(correct, 40)} correct of {cut(n, 40)} images, accuracy {cut(value, 40)} and the 95% interval "
            f"{cut(interval, 80)}; they must agree."
        )

    def check_at_most(self, other: Accuracy, what: str) -> None:
        """Raises a FigureError that begins with `what` unless this is at most another accuracy, of as many images."""
        if (self.n, self.decisions) != (other.n, other.decisions) or self.correct > other.correct:
            raise FigureError(
                f"{plain(what, 200)} {self.correct} of {self.n} and {other.correct} of {other.n} images; the first cannot be "
                "more, and both must be of the same images."
            )


def rows_by_threat(accuracies: Mapping[ThreatModel, Accuracy]) -> list[dict[str, Any]]:
    """Returns accuracies of threat models in JSON types."""
    return [{"threat_model": threat.to_dict(), **accuracy.to_dict()} for threat, accuracy in accuracies.items()]


def by_threat(rows: Iterable[Mapping[str, Any]]) -> dict[ThreatModel, Accuracy]:
    """Reads what `rows_by_threat` returned; a FigureError if it cannot be true."""
    return {ThreatModel(**row["threat_model"]): Accuracy.from_dict(row) for row in rows}


class FigureError(ValueError):
    """A figure that cannot be true; the message begins with a verb, whose subject is the file that has the figure."""


@contextmanager
def readable(name: Any) -> Iterator[None]:
    """Turns what a record of another shape raises into a `DamagedFileError` that names it."""
    try:
        yield
    except DamagedFileError as error:
        raise DamagedFileError(f"{plain(error, 400)} Measure again, or remove it.") from error
    except FigureError as error:
        raise DamagedFileError(f"{name} {plain(error, 300)} Measure again.") from error
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        why = f"{type(error).__name__}: {plain(error, 200)}"
        raise DamagedFileError(
            f"{name} is not a record of this package, or is damaged ({why}). Measure again."
        ) from error


def wilson_interval(correct: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Returns the Wilson score interval of a share.

    Args:
        correct: Number of successes, 0 to n.
        n: Number of trials, at least 1.
        z: Quantile of the normal distribution; the default gives 95%.

    Raises:
        ValueError: `correct` or `n` out of range.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} of {n} is not a share: n must be at least 1 and the count between 0 and n.")
    p, square = correct / n, z * z / n
    centre = (p + square / 2) / (1 + square)
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n)) / (1 + square)
    # exact at the ends, where the formula leaves a rounding error
    return 0.0 if correct == 0 else centre - half, 1.0 if correct == n else centre + half


def harmonic_mean(first: Any, second: Any) -> Any:
    """Returns H, the harmonic mean of clean and robust accuracy, or of any numbers or Series of 0 or more; 0 where one is 0."""
    with np.errstate(divide="ignore"):
        return 2 / (np.divide(1, first) + np.divide(1, second))


def known_fields(kind: type[_Record], content: Mapping[str, Any]) -> _Record:
    """Makes a dataclass of what it has fields for; what a later version has beside them is left out."""
    return kind(**{f.name: content[f.name] for f in fields(kind) if f.name in content})  # type: ignore[arg-type]
