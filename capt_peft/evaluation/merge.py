"""From the records of batches to the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ..attacks import Attack, ThreatModel
from ..results.accuracy import Accuracy
from ..results.defence import WithoutDefence, worst_of_decisions
from ..results.evaluation import ROBUST, TRANSFER, AttackOutcome, Evaluation, has_union
from ..results.examples import EXAMPLE_SCHEMA
from ..results.rejection import Rejection
from ..results.reliability import Reliability
from ..utils.machine import describe_machine
from .batch import Attacked, BatchRecord
from .signs import read_signs, signs_of_defence
from .subject import Subject


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
    worst_case, union = {}, None
    for threat in dict.fromkeys(attack.threat_model for attack, _ in attacked if subject.white_box):
        within = [record for attack, record in attacked if attack.threat_model == threat]
        worst_case[threat] = _worst(within, n, subject.decisions)
    if has_union(worst_case):
        everything = _worst([record for _, record in attacked], n, subject.decisions)
        # of random answers, one threat model's adversary may by chance be the stronger
        union = min(everything, *worst_case.values(), key=lambda accuracy: accuracy.correct)
    undefended = _without_defence(clean, attacked, subject)
    signs = read_signs(probed, subject, attacked)
    if configuration["signs"] and undefended is not None:
        signs = signs_of_defence(attacked, undefended, worst_case)
    tables = [EXAMPLE_SCHEMA.empty_table(), *(_rows(attack, record) for attack, record in attacked)]
    return Evaluation(
        clean=Accuracy(clean.right(), n, subject.decisions),
        attacks=tuple(_outcome(attack, record, subject) for attack, record in attacked),
        worst_case=worst_case,
        signs=signs,
        configuration=configuration,
        machine=describe_machine(),
        examples=pa.concat_tables(tables).combine_chunks(),
        reliability=_reliability(clean),
        rejection=rejection,
        union=union,
        undefended=undefended,
    )


def _worst(records: Sequence[BatchRecord], n: int, decisions: int) -> Accuracy:
    """Returns the worst case over attacks of n images."""
    if decisions > 1:
        return worst_of_decisions([record.decided for record in records], n, decisions)
    return Accuracy(n - len(set[int]().union(*(record.wrong() for record in records))), n)


def _without_defence(clean: BatchRecord, attacked: Attacked, subject: Subject) -> WithoutDefence | None:
    """Returns the figures of the classifier without its defence; None if it has none."""
    if subject.undefended is None:
        return None
    n = len(clean.index)
    standing: dict[ThreatModel, Any] = {}
    for attack, record in attacked:
        if record.undefended:
            right = [answer == label for answer, label in zip(record.undefended, record.label, strict=True)]
            before = standing.get(attack.threat_model, [True] * n)
            standing[attack.threat_model] = [a and b for a, b in zip(before, right, strict=True)]
    answers = zip(clean.undefended, clean.label, strict=True)
    count = sum(answer == label for answer, label in answers)
    worst = {threat: Accuracy(sum(left), n) for threat, left in standing.items()}
    return WithoutDefence(Accuracy(count, n), worst, clean.forwards / (n * subject.decisions))


def _outcome(attack: Attack, record: BatchRecord, subject: Subject) -> AttackOutcome:
    parts: dict[str, dict[str, Any]] = {}
    for part in record.parts:
        total = parts.setdefault(part["name"], {"name": part["name"], "attacked": 0, "broken": 0})
        total["attacked"] += part["attacked"]
        total["broken"] += part["broken"]
    return AttackOutcome(
        attack=attack.to_dict(),
        accuracy=Accuracy(record.right(), len(record.index), subject.decisions),
        kind=ROBUST if subject.white_box and attack.to_dict().get("way") != "transfer" else TRANSFER,
        broken=sum(by is not None for by in record.broken_by),
        forwards=record.forwards,
        gradients=record.gradients,
        parts=tuple(parts.values()),
        notes=tuple(dict.fromkeys(record.notes)),
        zero_gradient_share=record.zero_gradient_share(),
        reliability=_reliability(record),
    )


def _reliability(record: BatchRecord) -> Reliability | None:
    """Returns how reliable the scores are; None where there are none: of random answers, and of earlier versions."""
    if len(record.confidence) != len(record.index):
        return None
    right = [a == b for a, b in zip(record.prediction, record.label, strict=True)]
    return Reliability.of(record.confidence, right)


def _rows(attack: Attack, record: BatchRecord) -> pa.Table:
    n = len(record.index)
    columns: dict[str, list[Any]] = {
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
        "decided": record.decided or [None] * n,
        "undefended": record.undefended or [None] * n,
    }
    return pa.table(columns, schema=EXAMPLE_SCHEMA)
