"""What a defence at test time gains: the same images without it, and the worst case over answers that are drawn at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attacks import ThreatModel
from ..utils.markup import escape
from .accuracy import Accuracy, by_threat, rows_by_threat


@dataclass(frozen=True)
class WithoutDefence:
    """What the classifier does on the same images without its defence, and what the defence costs.

    Attributes:
        clean: Accuracy without an attack.
        worst_case: For each threat model, the share of images that no attack broke, of those that were made without the defence
            (the transferred ones of the defended classifier).
        forwards: Images that the image tower runs on to classify one with the defence.
    """

    clean: Accuracy
    worst_case: dict[ThreatModel, Accuracy]
    forwards: float

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, in JSON types."""
        worst = rows_by_threat(self.worst_case)
        return {"clean": self.clean.to_dict(), "worst_case": worst, "forwards": self.forwards}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> WithoutDefence:
        """Reads what `to_dict` returned; a FigureError if it cannot be true."""
        worst = by_threat(content["worst_case"])
        found = cls(Accuracy.from_dict(content["clean"]), worst, float(content["forwards"]))
        for accuracy in worst.values():
            accuracy.check_at_most(found.clean, "has, without the defence, a worst case and clean accuracy of")
        return found


# the share of the gain under transfer that is gone in the worst case, above which a defence "gains in transfer only"
TRANSFER_ONLY = 0.9


def gone(transfer: float, without: float, worst: float) -> float:
    """Returns the share of what a defence gains under transfer that is gone in the worst case; 0 where it gains nothing.

    Args:
        transfer: Accuracy with the defence on images made without it.
        without: Robust accuracy without the defence.
        worst: Robust accuracy with it, by every way to attack it. The share is more than 1 where it is below `without`.
    """
    return (transfer - worst) / (transfer - without) if transfer > without else 0.0


def worst_of_decisions(rows: Sequence[Sequence[int]], n: int, decisions: int) -> Accuracy:
    """Returns the worst case over attacks of a classifier that answers at random.

    The adversary takes, for each image, the attack that leaves the fewest right answers. It is chosen by one half of the
    decisions and counted by the other, and the other way round: to count what was chosen by would find images broken by chance.

    Args:
        rows: For each attack, for each image which decisions are right, as bits; the last of equal attacks is taken.
        n: Images.
        decisions: Decisions on each image, an even number.
    """
    bits = np.asarray(rows, dtype=np.int64).reshape(-1, n)[::-1]  # (A, n)
    half = decisions // 2
    right = (bits[..., None] >> np.arange(decisions)) & 1  # (A, n, R)
    first, second = right[..., :half].sum(-1), right[..., half:].sum(-1)  # (A, n)
    images = np.arange(n)
    crossed = second[first.argmin(0), images].sum() + first[second.argmin(0), images].sum()
    return Accuracy(int(min(crossed, right.sum((1, 2)).min())), n, decisions)


def defended_rows(evaluation: Any) -> list[str]:
    """Returns the lines of the Markdown table of an `Evaluation` of a defended classifier: every way, and what is without it."""
    without, name = evaluation.undefended, escape(evaluation.configuration["defence"]["name"])
    lines = [
        f"| accuracy | threat model | attack | with {name}, % (95% interval) | without it | forwards per image\\* |",
        "|---|---|---|---|---|---|",
        f"| clean | | | {evaluation.clean.percent} | {without.clean.percent} | {without.forwards:,.4g} |",
    ]
    for outcome in evaluation.attacks:
        kind = "on images made without the defence" if outcome.way == "transfer" else "robust"
        cost = outcome.forwards / outcome.accuracy.n
        attack = f"{outcome.threat_model} | {escape(outcome.name)}"
        lines.append(f"| {kind} | {attack} | {outcome.accuracy.percent} | | {cost:,.4g} |")
    for threat, worst in evaluation.worst_case.items():
        other = without.worst_case[threat].percent if threat in without.worst_case else ""
        lines.append(f"| **robust** | {threat} | worst case | **{worst.percent}** | {other} | |")
    return lines


def on_defence(evaluation: Any) -> str:
    """Returns sentences on what forwards are of, and on how random answers were counted; "" without a defence."""
    if evaluation.undefended is None:
        return ""
    said = "\\*of an answer, without an attack; of the attack, in the rows below."
    if evaluation.clean.decisions == 1:
        return said
    return (
        f"{said} The defence is random: every image was classified {evaluation.clean.decisions} times, and accuracy is the mean "
        "probability of a right answer."
    )
