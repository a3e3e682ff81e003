"""Adversarial images for any callable that maps images in [0, 1] to logits."""

from __future__ import annotations

from .apgd import APGD
from .base import Attack, AttackResult, Part, SearchAttack
from .ensemble import AutoAttack
from .fab import FAB
from .names import parse_attack
from .noise import Generators, Seeds
from .pgd import PGD
from .square import Square
from .threat import LogitsFn, ThreatModel, parse_fraction

__all__ = [
    "APGD",
    "FAB",
    "PGD",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "Generators",
    "LogitsFn",
    "Part",
    "SearchAttack",
    "Seeds",
    "Square",
    "ThreatModel",
    "parse_attack",
    "parse_fraction",
]
