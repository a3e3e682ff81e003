"""From the records of batches to the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..attacks import Attack, Square, ThreatModel
from ..results.accuracy import Accuracy
from ..results.evaluation import ROBUST, TRANSFER, AttackOutcome, Evaluation, Sign, examples_table
from .signs import read_signs
from .subject import Subject

Records = list[dict[str, Any]]


def merge(
    results: Mapping[str, Any], attacks: Sequence[Attack], subject: Subject, configuration: dict[str, Any], machine: str
) -> Evaluation:
    """Puts the results of all pieces together.

    Args:
        results: Results by the names of the pieces: "clean-000000", "00-000000" (attack 0), "signs".
        attacks: The attacks, in their order.
        subject: What was measured.
        configuration: All that the figures depend on.
        machine: What they were computed on.
    """
    clean = _records(results, "clean")
    n = sum(len(record["index"]) for record in clean)
    by_attack = _by_attack(attacks, results)
    outcomes = tuple(
        _outcome(attack, records, n, white_box=subject.white_box)
        for attack, records in zip(attacks, by_attack, strict=True)
    )
    robust = {i: by_attack[i] for i in range(len(attacks)) if subject.white_box}
    return Evaluation(
        clean=Accuracy(sum(_right(record) for record in clean), n),
        attacks=outcomes,
        worst_case={t: _worst(t, attacks, robust, n) for t in dict.fromkeys(attacks[i].threat_model for i in robust)},
        signs=_signs(results, attacks, by_attack, outcomes, subject, n),
        configuration=configuration,
        machine=machine,
        examples=examples_table(
            [
                (attack.to_dict(), record)
                for attack, records in zip(attacks, by_attack, strict=True)
                for record in records
            ]
        ),
    )


def _by_attack(attacks: Sequence[Attack], results: Mapping[str, Any]) -> list[Records]:
    return [_records(results, f"{i:02d}") for i in range(len(attacks))]


def _records(results: Mapping[str, Any], prefix: str) -> Records:
    return [results[name] for name in sorted(results) if name.startswith(f"{prefix}-")]


def _right(record: Mapping[str, Any]) -> int:
    return sum(a == b for a, b in zip(record["prediction"], record["label"], strict=True))


def _outcome(attack: Attack, records: Records, n: int, *, white_box: bool) -> AttackOutcome:
    shares = [share for record in records for share in record["zero_gradients"]]
    parts: dict[str, dict[str, Any]] = {}
    for part in (part for record in records for part in record["parts"]):
        total = parts.setdefault(part["name"], {"name": part["name"], "attacked": 0, "broken": 0})
        total["attacked"] += part["attacked"]
        total["broken"] += part["broken"]
    return AttackOutcome(
        attack=attack.to_dict(),
        accuracy=Accuracy(sum(_right(record) for record in records), n),
        kind=ROBUST if white_box else TRANSFER,
        broken=sum(by is not None for record in records for by in record["broken_by"]),
        forwards=sum(record["forwards"] for record in records),
        gradients=sum(record["gradients"] for record in records),
        parts=tuple(parts.values()),
        notes=tuple(dict.fromkeys(note for record in records for note in record["notes"])),
        zero_gradient_share=sum(shares) / len(shares) if shares else None,
    )


def _worst(threat: ThreatModel, attacks: Sequence[Attack], by_attack: Mapping[int, Records], n: int) -> Accuracy:
    """Counts the images that are right after every attack within a threat model."""
    wrong: set[int] = set()
    for i, records in by_attack.items():
        if attacks[i].threat_model == threat:
            wrong |= _wrong(records)
    return Accuracy(n - len(wrong), n)


def _wrong(records: Records) -> set[int]:
    return {
        index
        for record in records
        for index, answer, label in zip(record["index"], record["prediction"], record["label"], strict=True)
        if answer != label
    }


def _signs(
    results: Mapping[str, Any],
    attacks: Sequence[Attack],
    by_attack: Sequence[Records],
    outcomes: Sequence[AttackOutcome],
    subject: Subject,
    n: int,
) -> tuple[Sign, ...]:
    probed = results.get("signs")
    if not probed:  # not looked for, or nothing was classified correctly
        return ()
    shares = [outcome.zero_gradient_share for outcome in outcomes if outcome.zero_gradient_share is not None]
    return read_signs(
        probed,
        zero_share=max(shares) if shares else None,
        square_gain=_square_gain(attacks, by_attack, n),
        black_box=probed.get("black_box", []),
        precision=subject.precision,
        changed=sum(record["changed"] for records in by_attack for record in records),
    )


def _square_gain(attacks: Sequence[Attack], by_attack: Sequence[Records], n: int) -> float | None:
    """Returns the share of images that Square broke and no white-box attack did, at its largest over the threat models."""
    gains = []
    for threat in dict.fromkeys(attack.threat_model for attack in attacks):
        squared, others = False, False
        by_square: set[int] = set()
        by_others: set[int] = set()
        for attack, records in zip(attacks, by_attack, strict=True):
            if attack.threat_model != threat:
                continue
            squares = {part.name for part in attack.parts if isinstance(part, Square)}
            squared |= bool(squares)
            others |= any(part.uses_gradients for part in attack.parts)
            for record in records:
                for index, by in zip(record["index"], record["broken_by"], strict=True):
                    if by is not None:
                        (by_square if by in squares else by_others).add(index)
        if squared and others:
            gains.append(len(by_square - by_others) / n)
    return max(gains) if gains else None


def black_box_needed(attacks: Sequence[Attack], results: Mapping[str, Any]) -> bool:
    """Whether attacks with gradients were run, and Square beside none of them."""
    by_attack = _by_attack(attacks, results)
    white = any(record["gradients"] for records in by_attack for record in records)
    return white and _square_gain(attacks, by_attack, 1) is None


def standing(attacks: Sequence[Attack], results: Mapping[str, Any]) -> list[tuple[ThreatModel, list[int]]]:
    """Returns, for each norm, the largest ball within which images stood all attacks, and these images' places."""
    by_attack = _by_attack(attacks, results)
    balls = sorted({attack.threat_model for attack in attacks}, key=lambda t: (t.norm, -t.epsilon))
    found: dict[str, tuple[ThreatModel, list[int]]] = {}
    for threat in balls:
        records = [r for a, some in zip(attacks, by_attack, strict=True) if a.threat_model == threat for r in some]
        left = sorted({index for record in records for index in record["index"]} - _wrong(records))
        if left and threat.epsilon > 0:
            found.setdefault(threat.norm, (threat, left))
    return list(found.values())
