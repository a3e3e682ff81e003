"""Clean and robust accuracy that people can believe: per example, resumable, with signs of masked gradients."""

from __future__ import annotations

from ..results.accuracy import Accuracy, wilson_interval
from ..results.corrupted import CorruptedAccuracy
from ..results.evaluation import AttackOutcome, Evaluation, Sign
from ..results.rejection import Rejection, RejectionOutcome
from ..results.reliability import Reliability
from ..results.retrieval import Recall, Retrieval, RetrievalRow, retrieval_table
from .batch import outcomes
from .calibration import calibrate, logits_and_labels
from .loop import evaluate
from .retrieval import QueryAttack, evaluate_retrieval, parse_query_attack
from .verify import Verification, verify

__all__ = [
    "Accuracy",
    "AttackOutcome",
    "CorruptedAccuracy",
    "Evaluation",
    "QueryAttack",
    "Recall",
    "Rejection",
    "RejectionOutcome",
    "Reliability",
    "Retrieval",
    "RetrievalRow",
    "Sign",
    "Verification",
    "calibrate",
    "evaluate",
    "evaluate_retrieval",
    "logits_and_labels",
    "outcomes",
    "parse_query_attack",
    "retrieval_table",
    "verify",
    "wilson_interval",
]
