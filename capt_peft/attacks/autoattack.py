"""AutoAttack: four attacks of different kinds, one after the other, each on the images that the ones before left standing."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .apgd import APGD
from .base import Attack, AttackResult, Part, Report, SearchAttack, prepare
from .checks import check_threat_model
from .fab import FAB
from .guard import undisturbed
from .noise import Seeds, resolve_generator, select_generators
from .square import Square
from .threat import LogitsFn, ThreatModel

VERSIONS = ("standard", "plus", "rand")


@dataclass(frozen=True)
class AutoAttack(Attack):
    """AutoAttack (Croce & Hein 2020, arXiv 2003.01690, section 6), the measure of RobustBench.

    "standard": APGD-CE, APGD-T (9 targets), FAB-T (9 targets), Square (5,000 queries). "plus": APGD-CE and APGD-DLR with 5
    restarts, FAB with 5, Square, APGD-T, FAB-T. "rand", for classifiers that are random: APGD-CE and APGD-DLR, with the gradient
    averaged over 20 passes. An image that one attack has broken is not given to the next.

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

    strong: ClassVar[bool] = True
    threat_model: ThreatModel
    _: KW_ONLY
    version: str = "standard"

    def __post_init__(self) -> None:
        """Check the settings."""
        check_threat_model(self)
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
            untargeted = [APGD(threat, loss="ce", restarts=5), APGD(threat, loss="dlr", restarts=5)]
            return (
                *untargeted,
                FAB(threat, targets=0, restarts=5),
                Square(threat),
                APGD(threat, loss="t"),
                FAB(threat),
            )
        return APGD(threat, loss="ce"), APGD(threat, loss="t"), FAB(threat), Square(threat)

    def to_dict(self) -> dict[str, Any]:
        """Return the name, the threat model, and every setting of every part."""
        parts = [{k: v for k, v in part.to_dict().items() if k != "threat_model"} for part in self.parts]
        return {
            "name": self.name,
            "threat_model": self.threat_model.to_dict(),
            "version": self.version,
            "parts": parts,
        }

    def run(
        self,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        generator: Seeds = None,
        *,
        clean_logits: Tensor | None = None,
        report: Report | None = None,
    ) -> AttackResult:
        """Attack a batch; arguments and errors as of the single attacks.

        Returns:
            The adversarial images; `parts` says how many images each attack was given and which it broke.
        """
        self.threat_model.check(images, labels)
        generator = resolve_generator(generator, len(images))
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            undisturbed(logits_fn, generator, images.device) as logits_fn,
        ):
            images, labels, clean = prepare(logits_fn, images, labels, clean_logits)
            result = AttackResult(images.clone(), images.new_full(labels.shape, torch.nan))
            standing = clean.argmax(1) == labels
            for part in self.parts:
                result, standing = self._run_part(
                    part, result, standing, logits_fn, images, labels, clean, generator, report
                )
            return result

    @staticmethod
    def _run_part(
        part: SearchAttack,
        result: AttackResult,
        standing: Tensor,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        clean: Tensor,
        generator: Any,
        report: Report | None,
    ) -> tuple[AttackResult, Tensor]:
        """Run one attack on the images that stand; return the result with it, and the images that stand after it."""
        rows = standing.nonzero().squeeze(1)  # (A,)
        broken = torch.zeros_like(standing)
        notes = result.notes + part.notes(clean.shape[1])
        if len(rows):
            found = part.run(
                logits_fn,
                images[rows],
                labels[rows],
                select_generators(generator, rows),
                clean_logits=clean[rows],
                report=report,
            )
            result.images[rows] = found.images
            first = result.zero_gradient_share[rows].isnan()
            result.zero_gradient_share[rows[first]] = found.zero_gradient_share[first]
            answers = logits_fn(found.images).argmax(1)
            broken[rows] = answers != labels[rows]
        parts = (*result.parts, Part(part.name, len(rows), broken))
        return replace(result, parts=parts, notes=notes), standing & ~broken
