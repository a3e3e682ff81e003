"""Adversarial images for any callable that maps images in [0, 1] to logits."""

from __future__ import annotations

from .pgd import PGD, AttackResult, parse_attack
from .threat import Attack, Generators, LogitsFn, ThreatModel, parse_fraction

__all__ = [
    "PGD",
    "Attack",
    "AttackResult",
    "Generators",
    "LogitsFn",
    "ThreatModel",
    "parse_attack",
    "parse_fraction",
]
