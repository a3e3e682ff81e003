"""AutoAttack: four attacks of different kinds, one after the other, each on the images that the ones before left standing."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch

from .apgd import APGD
from .base import Attack, AttackResult, Batch, Part, SearchAttack, begin, check_settings
from .fab import FAB
from .registry import register_attack
from .square import Square
from .threat import LogitsFn, ThreatModel

VERSIONS = ("standard", "plus", "rand")


@register_attack
@dataclass(frozen=True)
class AutoAttack(Attack):
    """AutoAttack (Croce & Hein 2020, arXiv 2003.01690, section 6), the measure of RobustBench.

    "standard": APGD-CE, APGD-T (9 targets), FAB-T (9 targets), Square (5,000 queries). "plus": APGD-CE and APGD-DLR with 5
    restarts, FAB with 5, Square, APGD-T, FAB-T. "rand", for classifiers that are random: APGD-CE and APGD-DLR, with the gradient
    averaged over 20 passes. An image that one attack has broken is not given to the next. Within L1, "standard" has APGD-CE
    with 5 restarts and APGD-T with 5 targets, as the authors' code has.

    Square halves its squares as its paper says, over the queries it has. The published code of AutoAttack gives it the schedule
    of 10,000 queries and stops at 5,000: ours is the stronger attack there.

    It has no settings of its own, so that its figure means the same everywhere. Models with fewer than 10 classes get as many
    targets as there are, those with fewer than 4 (3 for APGD-DLR) the margin in place of DLR; `AttackResult.notes` says so.
    The published code fails there.

    Args:
        threat_model: the ball to stay in.
        version: "standard", "plus" or "rand".

    Raises:
        ValueError: an unknown version.
    """

    pattern = f"autoattack(?:-(?P<version>{'|'.join(VERSIONS)}))?"
    help: ClassVar[dict[str, str]] = {"autoattack": "the standard version; autoattack-plus, autoattack-rand"}
    strong: ClassVar[bool] = True
    threat_model: ThreatModel
    _: KW_ONLY
    version: str = "standard"

    def __post_init__(self) -> None:
        check_settings(self)
        if self.version not in VERSIONS:
            raise ValueError(f"unknown version {self.version!r}: it must be one of {', '.join(map(repr, VERSIONS))}")

    @property
    def name(self) -> str:
        """The version in short: "autoattack", "autoattack-plus" or "autoattack-rand"."""
        return "autoattack" if self.version == "standard" else f"autoattack-{self.version}"

    @property
    def parts(self) -> tuple[SearchAttack, ...]:
        """The attacks in their order."""
        threat = self.threat_model
        if self.version == "rand":
            return APGD(threat, loss="ce", eot=20), APGD(threat, loss="dlr", eot=20)
        if self.version == "plus":
            untargeted = APGD(threat, loss="ce", restarts=5), APGD(threat, loss="dlr", restarts=5)
            targeted = APGD(threat, loss="t"), FAB(threat)
            return *untargeted, FAB(threat, targets=0, restarts=5), Square(threat), *targeted
        many, few = (5, 5) if threat.norm == "l1" else (1, 9)
        return APGD(threat, loss="ce", restarts=many), APGD(threat, loss="t", targets=few), FAB(threat), Square(threat)

    @property
    def passes(self) -> float:
        return sum(part.passes for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        parts = [{k: v for k, v in part.to_dict().items() if k != "threat_model"} for part in self.parts]
        return {**super().to_dict(), "parts": parts}

    def perturb(self, logits_fn: LogitsFn, batch: Batch) -> AttackResult:
        batch, clean, standing = begin(logits_fn, batch)
        best, share = batch.images.clone(), torch.full_like(batch.images[:, 0, 0, 0], torch.nan)
        told: list[Part] = []
        notes: list[str] = []
        for part in self.parts:
            rows = standing.nonzero().squeeze(1)  # (A,)
            broken = torch.zeros_like(standing)
            if len(rows):
                left = batch.rows(rows)
                given = logits_fn, left.images, left.labels, left.generators
                found = part.run(*given, clean_logits=clean[rows], report=batch.report)
                best[rows] = found.images
                first = share[rows].isnan()
                share[rows[first]] = found.zero_gradient_share[first]
                broken[rows] = logits_fn(found.images).argmax(1) != left.labels
            told.append(Part(part.name, len(rows), broken))
            notes += part.notes(clean.shape[1])
            standing = standing & ~broken
        return AttackResult(best, share, tuple(told), tuple(notes))
