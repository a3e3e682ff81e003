"""Clean and robust accuracy that people can believe: per example, resumable, with signs of masked gradients."""

from __future__ import annotations

from ..results.accuracy import Accuracy, wilson_interval
from ..results.evaluation import AttackOutcome, Evaluation, Sign
from .batch import outcomes
from .loop import evaluate

__all__ = [
    "Accuracy",
    "AttackOutcome",
    "Evaluation",
    "Sign",
    "evaluate",
    "outcomes",
    "wilson_interval",
]
