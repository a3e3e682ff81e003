"""Clean and robust accuracy that people can believe: per example, resumable, with signs of masked gradients."""

from __future__ import annotations

from ..results.accuracy import Accuracy, wilson_interval
from ..results.evaluation import AttackOutcome, Evaluation, Sign
from ..results.retrieval import Recall, Retrieval, RetrievalRow, retrieval_table
from .batch import outcomes
from .loop import evaluate
from .retrieval import QueryAttack, evaluate_retrieval, parse_query_attack

__all__ = [
    "Accuracy",
    "AttackOutcome",
    "Evaluation",
    "QueryAttack",
    "Recall",
    "Retrieval",
    "RetrievalRow",
    "Sign",
    "evaluate",
    "evaluate_retrieval",
    "outcomes",
    "parse_query_attack",
    "retrieval_table",
    "wilson_interval",
]
