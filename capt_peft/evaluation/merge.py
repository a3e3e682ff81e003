"""From the records of batches to the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ..attacks import Attack
from ..results.accuracy import Accuracy
from ..results.evaluation import EXAMPLE_SCHEMA, ROBUST, TRANSFER, AttackOutcome, Evaluation, has_union
from ..results.rejection import Rejection
from ..results.reliability import Reliability
from ..utils.machine import describe_machine
from .batch import Attacked, BatchRecord, Subject
from .signs import read_signs


def merge(
    clean: BatchRecord,
    attacked: Attacked,
    probed: Mapping[str, Any],
    subject: Subject,
    configuration: dict[str, Any],
    rejection: Rejection | None = None,
) -> Evaluation:
    """Returns the figures of an evaluation by the records of all images, without an attack and under each."""
    n = len(clean.index)
    worst_case, broken = {}, set[int]()
    for threat in dict.fromkeys(attack.threat_model for attack, _ in attacked if subject.white_box):
        wrong = set().union(*(record.wrong() for attack, record in attacked if attack.threat_model == threat))
        worst_case[threat] = Accuracy(n - len(wrong), n)
        broken |= wrong
    tables = [EXAMPLE_SCHEMA.empty_table(), *(_rows(attack, record) for attack, record in attacked)]
    return Evaluation(
        clean=Accuracy(clean.right(), n),
        attacks=tuple(_outcome(attack, record, subject) for attack, record in attacked),
        worst_case=worst_case,
        signs=read_signs(probed, subject, attacked),
        configuration=configuration,
        machine=describe_machine(),
        examples=pa.concat_tables(tables).combine_chunks(),
        reliability=_reliability(clean),
        rejection=rejection,
        union=Accuracy(n - len(broken), n) if has_union(worst_case) else None,
    )


def _outcome(attack: Attack, record: BatchRecord, subject: Subject) -> AttackOutcome:
    parts: dict[str, dict[str, Any]] = {}
    for part in record.parts:
        total = parts.setdefault(part["name"], {"name": part["name"], "attacked": 0, "broken": 0})
        total["attacked"] += part["attacked"]
        total["broken"] += part["broken"]
    return AttackOutcome(
        attack=attack.to_dict(),
        accuracy=Accuracy(record.right(), len(record.index)),
        kind=ROBUST if subject.white_box else TRANSFER,
        broken=sum(by is not None for by in record.broken_by),
        forwards=record.forwards,
        gradients=record.gradients,
        parts=tuple(parts.values()),
        notes=tuple(dict.fromkeys(record.notes)),
        zero_gradient_share=record.zero_gradient_share(),
        reliability=_reliability(record),
    )


def _reliability(record: BatchRecord) -> Reliability | None:
    """Returns how reliable the scores are; None where an unfinished evaluation of an earlier version left some out."""
    if len(record.confidence) != len(record.index):
        return None
    right = [a == b for a, b in zip(record.prediction, record.label, strict=True)]
    return Reliability.of(record.confidence, right)


def _rows(attack: Attack, record: BatchRecord) -> pa.Table:
    n = len(record.index)
    columns = {
        "index": record.index,
        "label": record.label,
        "clean_prediction": record.clean,
        "attack": [attack.name] * n,
        "threat_model": [str(attack.threat_model)] * n,
        "prediction": record.prediction,
        "broken": [by is not None for by in record.broken_by],
        "broken_by": record.broken_by,
        "perturbation": record.norm,
        "score": record.confidence if len(record.confidence) == n else [None] * n,
    }
    return pa.table(columns, schema=EXAMPLE_SCHEMA)
