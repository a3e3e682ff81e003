"""The attacks that have a name: collected from their classes, read by name, and found again from the settings in results."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..utils.patterns import Kind, add_kind, from_name, shapes_of
from .base import Attack
from .threat import NORMS, ThreatModel

_KINDS: dict[str, type[Attack]] = {}  # by their patterns


def register_attack(kind: Kind) -> Kind:
    """Adds an attack to those that `parse_attack` and the commands know by name; a decorator of its class.

    Args:
        kind: A subclass of `Attack` with a `pattern` and a `help`.

    Returns:
        The class itself.

    Raises:
        TypeError: Not such a class.
        ValueError: Another attack has the same pattern.
    """
    return add_kind(kind, Attack, _KINDS)


def attack_names() -> dict[str, str]:
    """Returns the names of all attacks, or their shapes such as "pgd-STEPS", each with what it means."""
    return shapes_of(_KINDS.values())


def fitting(names: Sequence[str], threats: Sequence[ThreatModel]) -> list[tuple[str, ThreatModel]]:
    """Returns under which threat models attacks can be run: those whose norm they are built for.

    Args:
        names: Names of attacks.
        threats: Threat models.

    Returns:
        Names and threat models, in the order of these. A name that fits none comes last with the first of them, and
        an unknown one with all, for `parse_attack` to refuse.
    """
    kinds = {name: next((k for pattern, k in _KINDS.items() if re.fullmatch(pattern, name)), None) for name in names}
    norms = {name: NORMS if kind is None else kind.norms for name, kind in kinds.items()}
    pairs = [(name, threat) for threat in threats for name in names if threat.norm in norms[name]]
    return pairs + [(name, threat) for name in names if name not in dict(pairs) for threat in threats[:1]]


def parse_attack(name: str, threat_model: ThreatModel, *, step_size: float | str | None = None) -> Attack:
    """Returns the attack of a name.

    Args:
        name: as in `attack_names`: "fgsm", "pgd-20", "pgd-100x5", "apgd-ce", "apgd-t", "fab-t", "square", "autoattack", ...
        threat_model: the ball to stay in.
        step_size: as for `PGD`; the other attacks set their own.

    Raises:
        ValueError: any other name, a setting out of range (0 steps), or a step size for an attack that takes none.
    """
    attack: Any = from_name("attack", name, _KINDS.values(), threat_model)
    if step_size is None:
        return attack
    if not hasattr(attack, "step_size"):
        raise ValueError(f"attack {name!r} sets its own step size: leave step_size={step_size!r} out")
    return replace(attack, step_size=step_size)


def known_attack(settings: Mapping[str, Any]) -> Attack | None:
    """Returns the registered attack that has exactly these settings, or None: it is another attack, whatever its name.

    Args:
        settings: what `Attack.to_dict` returned, as results hold it.
    """
    for kind in _KINDS.values():
        names = inspect.signature(kind).parameters.keys() - {"threat_model"}
        try:
            given = {name: settings[name] for name in names & settings.keys()}
            attack = kind(threat_model=ThreatModel(**settings["threat_model"]), **given)  # type: ignore[call-arg]
        except (KeyError, TypeError, ValueError):
            continue
        if attack.to_dict() == dict(settings):
            return attack
    return None
