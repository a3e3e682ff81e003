"""Adversarial images for any callable that maps images in [0, 1] to logits."""

from __future__ import annotations

from .apgd import APGD
from .autoattack import AutoAttack
from .base import Attack, AttackResult, Part, SearchAttack
from .fab import FAB
from .noise import Generators, Seeds
from .pgd import PGD
from .registry import parse_attack
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
