"""What an answer "none of these" does: which images it rejects, clean and under attackers who want to be accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attacks import ThreatModel
from ..utils.markup import Markdown, table_row
from .accuracy import Accuracy, FigureError

_POINTS = 100  # of a curve
_HEAD = (
    "threat model",
    "attack",
    "right, %",
    "wrong, %",
    "rejected, %",
    "accepted of no class, %",
    "AUROC",
    "risk area",
)


@dataclass(frozen=True)
class RejectionOutcome:
    """What becomes of n images of the classes and m of none, without an attack or under one on class and score together.

    Under attack, an image of a class is changed to be accepted as another class, and one of no class to be accepted.

    Attributes:
        attack: The attack's settings; None: without one.
        right: Images of the classes that are accepted and classified correctly.
        wrong: Those that are accepted as another class.
        rejected: Those that are answered "none of these".
        accepted: Images of no class that are accepted.
        auroc: The probability that an image of a class, as it is, has a larger score than one of no class, which the attack may
            have changed; ties count half (Hendrycks & Gimpel 2017).
        aurc: The area under the curve of risk against coverage (Geifman & El-Yaniv 2017): the mean over coverages 1/n, 2/n,
            ..., 1 of the share of wrong answers among the images with the largest scores.
        curve: Points (coverage, risk) of it, up to 100.
    """

    attack: Mapping[str, Any] | None
    right: Accuracy
    wrong: Accuracy
    rejected: Accuracy
    accepted: Accuracy
    auroc: float
    aurc: float
    curve: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        shares = (self.right, self.wrong, self.rejected)
        if len({share.n for share in shares}) > 1 or sum(share.correct for share in shares) != self.right.n:
            raise FigureError("has right, wrong and rejected images that are not all images together.")
        if not all(0 <= value <= 1 for value in (self.auroc, self.aurc, *(v for point in self.curve for v in point))):
            raise FigureError("has an area or a point of a curve that is not between 0 and 1.")

    @property
    def risk(self) -> float | None:
        """The share of wrong answers among the accepted images of the classes; None where none is accepted."""
        answered = self.right.correct + self.wrong.correct
        return self.wrong.correct / answered if answered else None

    @classmethod
    def of(
        cls,
        attack: Mapping[str, Any] | None,
        threshold: float,
        inside: tuple[Sequence[float], Sequence[bool]],
        outside: Sequence[float],
        clean: Sequence[float],
    ) -> RejectionOutcome:
        """Counts.

        Args:
            attack: The attack's settings, or None.
            threshold: The score that is needed to be accepted.
            inside: The scores (n,) of the images of the classes, under the attack, and whether their answers are right (n,).
            outside: The scores (m,) of the images of no class, under the attack.
            clean: The scores (n,) of the images of the classes as they are.
        """
        scores, right = np.asarray(inside[0], float), np.asarray(inside[1], bool)
        accepted, n, m = scores >= threshold, len(scores), len(outside)
        risks = _risks(scores, right)
        places = np.unique(np.linspace(0, n - 1, min(n, _POINTS)).round().astype(int)).tolist()
        return cls(
            attack=attack,
            right=Accuracy(int((accepted & right).sum()), n),
            wrong=Accuracy(int((accepted & ~right).sum()), n),
            rejected=Accuracy(int((~accepted).sum()), n),
            accepted=Accuracy(int((np.asarray(outside, float) >= threshold).sum()), m),
            auroc=auroc(clean, outside),
            aurc=float(risks.mean()),
            curve=tuple(((place + 1) / n, float(risks[place])) for place in places),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, in JSON types."""
        shares = {name: getattr(self, name).to_dict() for name in ("right", "wrong", "rejected", "accepted")}
        attack = None if self.attack is None else dict(self.attack)
        curve = [list(point) for point in self.curve]
        return {"attack": attack, **shares, "auroc": self.auroc, "aurc": self.aurc, "curve": curve}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> RejectionOutcome:
        """Reads what `to_dict` returned; a FigureError for figures that cannot be true."""
        shares = {name: Accuracy.from_dict(row[name]) for name in ("right", "wrong", "rejected", "accepted")}
        curve = tuple((float(coverage), float(risk)) for coverage, risk in row["curve"])
        outcome = cls(attack=row["attack"], auroc=row["auroc"], aurc=row["aurc"], curve=curve, **shares)
        _ = outcome.cells()  # or it raises
        return outcome

    def cells(self) -> list[Any]:
        """Returns the row of a table."""
        under = ["", "clean"]
        if self.attack is not None:
            under = [str(ThreatModel(**self.attack["threat_model"])), str(self.attack["name"])]
        shares = [share.percent for share in (self.right, self.wrong, self.rejected, self.accepted)]
        return [*under, *shares, f"{self.auroc:.3f}", f"{self.aurc:.3f}"]


@dataclass(frozen=True)
class Rejection:
    """What the answer "none of these" does, clean and under each attack.

    Attributes:
        threshold: The largest logit that an image needs to be accepted.
        outcomes: Without an attack, then under each.
    """

    threshold: float
    outcomes: tuple[RejectionOutcome, ...]

    def table(self) -> str:
        """Returns a Markdown table: of images of the classes, right, wrong and rejected; of others, accepted; and areas."""
        lines = [table_row(_HEAD), table_row([Markdown("---")] * len(_HEAD))]
        return "\n".join([*lines, *(table_row(outcome.cells()) for outcome in self.outcomes)])

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, in JSON types."""
        return {"threshold": self.threshold, "outcomes": [outcome.to_dict() for outcome in self.outcomes]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Rejection:
        """Reads what `to_dict` returned; a FigureError for figures that cannot be true."""
        return cls(float(content["threshold"]), tuple(map(RejectionOutcome.from_dict, content["outcomes"])))


def _risks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns the risk (n,) at each coverage 1/n, ..., 1; images of one score share what is wrong among them."""
    order = np.argsort(-scores, kind="stable")
    _, place, counts = np.unique(-scores[order], return_inverse=True, return_counts=True)
    share = np.bincount(place, (~right[order]).astype(float)) / counts  # of each score
    return share[place].cumsum() / np.arange(1, len(scores) + 1)


def auroc(inside: Sequence[float], outside: Sequence[float]) -> float:
    """Returns the area under the ROC curve, by ranks (Mann-Whitney): P(inside > outside) + P(inside = outside) / 2."""
    first, others = np.asarray(inside, float), np.sort(np.asarray(outside, float))
    below, up_to = (np.searchsorted(others, first, side) for side in ("left", "right"))
    return float((below + up_to).sum() / (2 * len(first) * len(others)))
