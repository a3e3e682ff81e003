"""Adversarial images for any callable that maps images in [0, 1] to logits."""

from __future__ import annotations

from ..randomness import Generators, Seeds
from .base import Attack, AttackResult, Batch, Part, SearchAttack

from .pgd import CW, PGD  # isort: skip  (lists of attacks begin with it)
from .apgd import APGD
from .autoattack import AutoAttack
from .fab import FAB
from .patch import Patch
from .protocols import Protocol, get_protocol, known_protocols
from .registry import attack_names, parse_attack, register_attack
from .square import Square
from .threat import LogitsFn, ThreatModel, parse_fraction

__all__ = [
    "APGD",
    "CW",
    "FAB",
    "PGD",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "Batch",
    "Generators",
    "LogitsFn",
    "Part",
    "Patch",
    "Protocol",
    "SearchAttack",
    "Seeds",
    "Square",
    "ThreatModel",
    "attack_names",
    "get_protocol",
    "known_protocols",
    "parse_attack",
    "parse_fraction",
    "register_attack",
]
