"""The examples of an evaluation, one row per image and attack: their file, and whether the figures are what they show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..attacks import ThreatModel
from ..utils.files import written_whole
from .accuracy import Accuracy
from .defence import worst_of_decisions
from .reliability import Reliability

if TYPE_CHECKING:
    from .evaluation import AttackOutcome, Evaluation

_CLEAN = b"clean_correct"  # in the metadata of the file
_INT, _TEXT = pa.int64(), pa.string()
EXAMPLE_SCHEMA = pa.schema({
    "index": _INT, "label": _INT, "clean_prediction": _INT, "attack": _TEXT, "threat_model": _TEXT, "prediction": _INT,
    "broken": pa.bool_(), "broken_by": _TEXT, "perturbation": pa.float32(), "score": pa.float64(), "decided": _INT,
    "undefended": _INT,
})  # fmt: skip

_Rows = Sequence[tuple["AttackOutcome", pa.Table]]  # each attack, and its examples


def examples_path(path: Path) -> Path:
    """Returns where the examples of an evaluation lie."""
    return path.with_suffix(".parquet")


def write_examples(path: Path, examples: pa.Table, clean: int) -> None:
    """Writes examples and the number of right clean images to a parquet file, whole or not at all."""
    # pyarrow takes UTF-8 paths alone
    with written_whole(path.parent) as folder, (folder / path.name).open("wb") as file:
        pq.write_table(examples.replace_schema_metadata({_CLEAN: str(clean)}), file)


def read_examples(path: Path) -> tuple[pa.Table, int | None]:
    """Returns examples, and how many clean images are right; None in files of earlier versions."""
    with path.open("rb") as file:
        clean = (pq.read_schema(file).metadata or {}).get(_CLEAN)
        return pq.read_table(file, schema=EXAMPLE_SCHEMA), None if clean is None else int(clean)


def wrong_under(examples: pa.Table, outcomes: Iterable[AttackOutcome]) -> set[int]:
    """Returns the places of the images that are wrong under one of several attacks."""
    return set[int]().union(*(_wrong(_rows_of(examples, outcome)) for outcome in outcomes))


def check_counts(evaluation: Evaluation, clean: int | None) -> None:
    """Raises a ValueError unless the figures are those of the examples; clean accuracy alone has no examples.

    Args:
        evaluation: The evaluation, with its examples.
        clean: How many clean images are right, as the file of the examples says; None: it does not, and they are counted. A
            model that answers at random is right on other images each time.
    """
    if clean not in (None, evaluation.clean.correct):
        raise ValueError(f"{clean} clean images are right, not {evaluation.clean.correct}")
    rows = [(outcome, _rows_of(evaluation.examples, outcome)) for outcome in evaluation.attacks]
    if sum(len(of_attack) for _, of_attack in rows) != len(evaluation.examples):
        raise ValueError("there are examples of other attacks")
    for outcome, of_attack in rows:
        _check_outcome(evaluation.clean, clean, outcome, of_attack)
    _check_undefended(evaluation, rows)
    _check_worst_case(evaluation, rows)


def _check_outcome(before: Accuracy, clean: int | None, outcome: AttackOutcome, of_attack: pa.Table) -> None:
    n = before.n
    right = pc.equal(of_attack["prediction"], of_attack["label"])
    right_before = _count(pc.equal(of_attack["clean_prediction"], of_attack["label"]))
    decided = of_attack["decided"].to_pylist()
    after = _count(right) if before.decisions == 1 else sum(bits.bit_count() for bits in decided)
    found = len(of_attack), right_before, after, _count(of_attack["broken"])
    told = before.correct if clean is None and before.decisions == 1 else right_before
    if found != (n, told, outcome.accuracy.correct, outcome.broken) or outcome.accuracy.n != n:
        raise ValueError(
            f"the {found[0]} examples of {outcome.name} are {found[1]} right before it, {found[2]} after it and "
            f"{found[3]} broken, not {before.correct}, {outcome.accuracy.correct} and {outcome.broken} of {n}"
        )
    scores = of_attack["score"]
    if scores.null_count == 0 and outcome.reliability != Reliability.of(scores.to_pylist(), right.to_pylist()):
        raise ValueError(f"the scores under {outcome.name} are not those of its bins")


def _check_undefended(evaluation: Evaluation, rows: _Rows) -> None:
    n = evaluation.clean.n
    standing: dict[ThreatModel, list[bool]] = {}
    for outcome, of_attack in rows:
        if outcome.way == "transfer":
            right = pc.equal(of_attack["undefended"], of_attack["label"]).to_pylist()
            before = standing.get(outcome.threat_model, [True] * n)
            standing[outcome.threat_model] = [a and b for a, b in zip(before, right, strict=True)]
    told = {} if evaluation.undefended is None else evaluation.undefended.worst_case
    if told != {threat: Accuracy(sum(left), n) for threat, left in standing.items()}:
        raise ValueError("what the examples say of the classifier without its defence is something else")


def _check_worst_case(evaluation: Evaluation, rows: _Rows) -> None:
    of_threats: dict[ThreatModel, list[pa.Table]] = {}
    for outcome, of_attack in rows:
        if outcome.counts:
            of_threats.setdefault(outcome.threat_model, []).append(of_attack)
    worst = {threat: _worst(tables, evaluation.clean) for threat, tables in of_threats.items()}
    if worst != evaluation.worst_case:
        raise ValueError(
            f"the worst cases of the examples are {', '.join(map(str, worst.values())) or 'none'}, not "
            f"{', '.join(map(str, evaluation.worst_case.values())) or 'none'}"
        )
    if evaluation.union is None:
        return
    everything = _worst([table for tables in of_threats.values() for table in tables], evaluation.clean)
    left = min(everything, *worst.values(), key=lambda accuracy: accuracy.correct)
    if evaluation.union != left:
        raise ValueError(f"the union of the threat models leaves {left} of the examples, not {evaluation.union}")


def _worst(tables: Iterable[pa.Table], clean: Accuracy) -> Accuracy:
    if clean.decisions > 1:
        return worst_of_decisions([table["decided"].to_pylist() for table in tables], clean.n, clean.decisions)
    return Accuracy(clean.n - len(set[int]().union(*map(_wrong, tables))), clean.n)


def _rows_of(examples: pa.Table, outcome: AttackOutcome) -> pa.Table:
    threat = pc.equal(examples["threat_model"], str(outcome.threat_model))
    return examples.filter(pc.and_(pc.equal(examples["attack"], outcome.name), threat))


def _wrong(of_attack: pa.Table) -> set[int]:
    wrong = pc.not_equal(of_attack["prediction"], of_attack["label"])
    return set(of_attack["index"].filter(wrong).to_pylist())


def _count(true: pa.ChunkedArray) -> int:
    return pc.sum(true).as_py() or 0
