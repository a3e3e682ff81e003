"""Attacks by name, as commands and results write them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from .apgd import APGD
from .autoattack import AutoAttack
from .base import Attack
from .fab import FAB
from .pgd import PGD
from .square import Square
from .threat import ThreatModel

KNOWN = {
    "fgsm": "one step, no random start",
    "pgd-STEPS": "pgd-20; pgd-100x5 has 5 restarts; -kl or -margin at the end is another loss than cross-entropy",
    "apgd-ce, apgd-dlr, apgd-t": "100 steps; apgd-ce-50x5 has 50 and 5 restarts",
    "fab, fab-t": "100 steps; fab-t-50x5 as above",
    "square": "5,000 queries; square-1000 has 1,000",
    "autoattack": "the standard version; autoattack-plus, autoattack-rand",
}
_SIZE = r"(?:-(\d{1,9})(?:x(\d{1,9}))?)?"


def _sized(steps: str | None, restarts: str | None, name: str = "steps") -> dict[str, int]:
    return {name: int(steps), "restarts": int(restarts or 1)} if steps else {}


def _pgd(match: re.Match[str], threat: ThreatModel, step_size: float | str | None) -> Attack:
    fgsm, steps, restarts, loss = match.groups()
    return PGD(
        threat,
        steps=1 if fgsm else int(steps),
        restarts=int(restarts or 1),
        loss=loss or "ce",
        random_start=not fgsm,
        step_size=step_size,
    )


_PATTERNS: list[tuple[str, Callable[[re.Match[str], ThreatModel], Attack]]] = [
    (rf"apgd-(ce|dlr|t){_SIZE}", lambda m, t: APGD(t, loss=m[1], **_sized(m[2], m[3]))),
    (rf"fab(-t)?{_SIZE}", lambda m, t: FAB(t, targets=9 if m[1] else 0, **_sized(m[2], m[3]))),
    (rf"square{_SIZE}", lambda m, t: Square(t, **_sized(m[1], m[2], "queries"))),
    (r"autoattack(?:-(standard|plus|rand))?", lambda m, t: AutoAttack(t, version=m[1] or "standard")),
]
_PGD = re.compile(r"(?:(fgsm)|pgd-(\d{1,9})(?:x(\d{1,9}))?)(?:-(kl|margin))?")


def parse_attack(name: str, threat_model: ThreatModel, *, step_size: float | str | None = None) -> Attack:
    """Build an attack from its name.

    Args:
        name: as in `KNOWN`: "fgsm", "pgd-20", "pgd-100x5", "apgd-ce", "apgd-t", "fab-t", "square", "autoattack", ...
        threat_model: the ball to stay in.
        step_size: as for `PGD`; the other attacks set their own.

    Raises:
        ValueError: any other name, or a step size for an attack that takes none.
    """
    text = name if isinstance(name, str) else ""
    if match := _PGD.fullmatch(text):
        return _pgd(match, threat_model, step_size)
    for pattern, build in _PATTERNS:
        if match := re.fullmatch(pattern, text):
            if step_size is not None:
                raise ValueError(f"attack {name!r} sets its own step size: step_size={step_size!r} is for pgd and fgsm")
            return build(match, threat_model)
    known = "; ".join(f"{shape} ({what})" for shape, what in KNOWN.items())
    raise ValueError(f"unknown attack {name!r}. Known: {known}")


def known_attack(settings: Mapping[str, Any]) -> Attack | None:
    """Return the attack of this package that has exactly these settings, or None: it is another attack, whatever its name.

    Args:
        settings: what `Attack.to_dict` returned, as results hold it.
    """
    kinds: tuple[Callable[..., Attack], ...] = (PGD, APGD, FAB, Square, AutoAttack)
    for kind in kinds:
        names = {field.name for field in fields(kind)} - {"threat_model"}  # type: ignore[arg-type]
        try:
            given = {name: settings[name] for name in names & settings.keys()}
            attack = kind(ThreatModel(**settings["threat_model"]), **given)
        except (KeyError, TypeError, ValueError):
            continue
        if attack.to_dict() == dict(settings):
            return attack
    return None
