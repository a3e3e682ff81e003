"""Accuracy under common corruptions, by kind and severity; no adversary chose them, and it is not robust accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.corruptions import CORRUPTIONS, SEVERITIES, parse_corruptions
from ..utils.markup import Markdown, table_row
from ..utils.text import some
from .accuracy import Accuracy, FigureError

_ROUNDING = 1e-9


@dataclass(frozen=True)
class CorruptedAccuracy:
    """The accuracy on the same images under each corruption, and its mean.

    Attributes:
        accuracies: By corruption, such as "fog-3".
        error: The standard error of the mean, over images: an image's share of right answers under all corruptions counts once.

    Raises:
        FigureError: Figures that cannot be true.
    """

    accuracies: dict[str, Accuracy]
    error: float

    def __post_init__(self) -> None:
        counts = {accuracy.n for accuracy in self.accuracies.values()}
        # shares of n images, all within [0, 1], deviate by at most half of the range
        if len(counts) != 1 or not 0 <= self.error <= 0.5 / math.sqrt(min(counts)) + _ROUNDING:
            raise FigureError(
                "has accuracies under corruptions that are not of the same images, or an impossible error."
            )
        if parse_corruptions(",".join(self.accuracies)) != list(self.accuracies):  # "fog" would be five of them
            raise FigureError(f"has accuracies under corruptions without a severity: {some(self.accuracies)}.")

    @property
    def mean(self) -> float:
        """The mean accuracy over all corruptions that were measured, in [0, 1]."""
        return sum(accuracy.value for accuracy in self.accuracies.values()) / len(self.accuracies)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the mean, over images, in [0, 1]."""
        return max(self.mean - 1.96 * self.error, 0.0), min(self.mean + 1.96 * self.error, 1.0)

    @classmethod
    def of(cls, right: Mapping[str, Sequence[bool]]) -> CorruptedAccuracy:
        """Counts the images that are right under each corruption, in the same order everywhere."""
        accuracies = {name: Accuracy(int(sum(values)), len(values)) for name, values in right.items()}
        shares = np.mean([np.asarray(values, float) for values in right.values()], axis=0)  # (n,)
        return cls(accuracies, float(shares.std() / math.sqrt(len(shares))))

    def table(self) -> str:
        """Returns a Markdown table: a row for each kind, a column for each severity, and means."""
        severities = [s for s in SEVERITIES if any(name.endswith(f"-{s}") for name in self.accuracies)]
        lines = [table_row(["corruption", *(f"severity {s}" for s in severities), "mean"])]
        lines.append(table_row([Markdown("---"), *(Markdown("---:") for _ in [*severities, ""])]))
        for kind in CORRUPTIONS:
            found = {s: self.accuracies[f"{kind}-{s}"].value for s in severities if f"{kind}-{s}" in self.accuracies}
            if found:
                cells = [f"{100 * found[s]:.1f}" if s in found else "" for s in severities]
                lines.append(
                    table_row([kind.replace("_", " "), *cells, f"{100 * sum(found.values()) / len(found):.1f}"])
                )
        return "\n".join(lines)

    def text(self) -> str:
        """Returns the table, with the mean and its interval before it, as Markdown."""
        n, (low, high) = next(iter(self.accuracies.values())).n, self.interval
        every = len(self.accuracies) == len(CORRUPTIONS) * len(SEVERITIES)
        what = "all 15 kinds at 5 severities" if every else f"{len(self.accuracies)} of 75"
        return (
            f"Accuracy under common corruptions ({what}), which are not an adversary: {100 * self.mean:.1f}% on average (95% "
            f"interval, over the {n} images: {100 * low:.1f} to {100 * high:.1f}).\n\n{self.table()}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the mean, its error and interval, and the accuracies, for results."""
        rows = {name: accuracy.to_dict() for name, accuracy in self.accuracies.items()}
        return {"mean": self.mean, "error": self.error, "interval_95": list(self.interval), "accuracies": rows}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> CorruptedAccuracy:
        """Reads what `to_dict` returned.

        Raises:
            FigureError: Figures that cannot be true, or a mean that is not that of the accuracies.
        """
        found = cls({name: Accuracy.from_dict(each) for name, each in row["accuracies"].items()}, row["error"])
        told, true = (row["mean"], *row["interval_95"]), (found.mean, *found.interval)
        if len(told) != 3 or any(abs(a - b) > 1e-6 for a, b in zip(told, true, strict=True)):
            raise FigureError("has a mean accuracy under corruptions that is not that of its rows.")
        return found
