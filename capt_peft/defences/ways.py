"""How a defended classifier is attacked: the ways that an adversary may know the defence, and an attack that goes one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from ..attacks import Attack, AttackResult, Batch, LogitsFn, Square, ThreatModel
from .base import Defence

WAYS = {
    "transfer": "images made for the classifier without the defence, as defences are usually measured: the attacker does not "
    "know of it",
    "straight-through": "gradients as if what the defence does were constant (BPDA; Athalye et al. 2018, arXiv 1802.00420)",
    "unrolled": "gradients through all that the defence computes",
    "expectation": "gradients through all that it computes, averaged over its random draws (EOT; Athalye et al. 2018)",
    "black-box": "answers of the defended classifier alone, without gradients",
}
QUERIES = 200  # of Square, where no black-box attack was asked for


@dataclass(frozen=True)
class Through(Attack):
    """An attack that goes one way to a defended classifier.

    Args:
        attack: The attack.
        way: One of `WAYS`, which says what the attack sees.
        samples: Draws of the defence that a gradient is averaged over, for "expectation".
    """

    attack: Attack
    way: str
    _: KW_ONLY
    samples: int = 1

    @property
    def threat_model(self) -> ThreatModel:  # type: ignore[override]
        """That of the attack."""
        return self.attack.threat_model

    @property
    def uses_gradients(self) -> bool:  # type: ignore[override]
        """Whether the attack does."""
        return self.attack.uses_gradients

    @property
    def strong(self) -> bool:  # type: ignore[override]
        """Whether the attack is, and knows the defence."""
        return self.attack.strong and self.way != "transfer"

    @property
    def name(self) -> str:
        """The attack's name, and the way: "pgd-20 (unrolled)"."""
        return f"{self.attack.name} ({self.way})"

    @property
    def parts(self) -> tuple[Attack, ...]:
        """Those of the attack."""
        return self.attack.parts

    @property
    def passes(self) -> float:
        """Those of the attack, for each draw."""
        return self.attack.passes * self.samples

    def to_dict(self) -> dict[str, Any]:
        """Returns the name, the threat model, the way, the number of draws and the attack's settings."""
        threat = self.threat_model.to_dict()
        given = {"attack": self.attack.to_dict(), "way": self.way, "samples": self.samples}
        return {"name": self.name, "threat_model": threat, **given}

    def perturb(self, logits_fn: LogitsFn, batch: Batch) -> AttackResult:
        """Runs the attack on what the way shows of the classifier."""
        return self.attack.perturb(logits_fn, batch)


def adaptive(attacks: Sequence[Attack], defence: Defence) -> list[Attack]:
    """Returns the attacks, each by every way that it can go to a classifier with this defence.

    An attack with gradients goes by transfer, by the defence's own ways (`Defence.ways`) and, for a random defence, by
    expectation; one without, by transfer and as a black box. Threat models without a black-box attack get `Square` with 200
    queries; a patch does not, as Square is built for balls.
    """
    ways = ["transfer", *defence.ways, *(["expectation"] if defence.random else [])]
    found: list[Through] = []
    for attack in attacks:
        for way in ways if attack.uses_gradients else ("transfer", "black-box"):
            found.append(Through(attack, way, samples=defence.samples if way == "expectation" else 1))
    for threat in dict.fromkeys(attack.threat_model for attack in attacks):
        if threat.norm in Square.norms and not any(a.way == "black-box" and a.threat_model == threat for a in found):
            found.append(Through(Square(threat, queries=QUERIES), "black-box"))
    return list(found)
