"""Clean and robust accuracy that people can believe: per example, resumable, with signs of masked gradients."""

from __future__ import annotations

from .accuracy import Accuracy, wilson_interval
from .loop import evaluate
from .outcomes import outcomes
from .record import AttackOutcome, Evaluation
from .signs import Sign

__all__ = [
    "Accuracy",
    "AttackOutcome",
    "Evaluation",
    "Sign",
    "evaluate",
    "outcomes",
    "wilson_interval",
]
