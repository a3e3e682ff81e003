"""Records of accuracies beside an adapter: read, checked, and tied to the weights that they are of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .attacks import ThreatModel
from .markup import plain

RESULTS, EVALUATION = "results.json", "evaluation.json"
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Row:
    """One line of the table of accuracies.

    Attributes:
        model: "zero-shot" or the method's name.
        kind: "clean" or "robust".
        accuracy: In [0, 1].
        interval: The 95% interval, in [0, 1].
        n: Number of images.
        threat_model: As people write it; None for clean accuracy.
        attack: The attack's name; None for clean accuracy.
    """

    model: str
    kind: str
    accuracy: float
    interval: tuple[float, float]
    n: int
    threat_model: str | None = None
    attack: str | None = None

    @property
    def percent(self) -> str:
        """The accuracy and its interval in percent."""
        low, high = self.interval
        return f"{100 * self.accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f})"


class RecordError(ValueError):
    """A record that is damaged, of other weights, or that cannot be true."""


@dataclass(frozen=True)
class Records:
    """The records of an adapter that are of its very weights.

    Attributes:
        results: What `results.json` holds; None if there is none, or it is not shown.
        evaluation: What `evaluation.json` holds; None as above.
        unshown: For each record that is there but not shown, a sentence that says why.
    """

    results: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    unshown: tuple[str, ...] = ()


def read_records(
    folder: str | Path,
    fingerprint: str | None,
    base: str | None = None,
    *,
    names: Sequence[str] = (RESULTS, EVALUATION),
    strict: bool = True,
) -> Records:
    """Reads the records in an adapter's folder that are of its weights.

    Args:
        folder: Folder of the adapter.
        fingerprint: The adapter's (`adapter_fingerprint`); None: unknown, so that no record is shown.
        base: The base model's fingerprint, as the adapter's configuration names it; None: not compared.
        names: Which records to read.
        strict: Raise for records of other weights; False: leave them out and say why, as for those that cannot be tied.

    Raises:
        ValueError: A record is damaged or of other weights, and `strict` is True.
    """
    found: dict[str, Mapping[str, Any]] = {}
    unshown = []
    for name in names:
        if not Path(folder, name).is_file():
            continue
        try:
            content = _read(Path(folder, name))
            reason = _why_not(content, name, fingerprint, base)
        except RecordError as error:
            if strict:
                raise RecordError(f"In {folder}: {error}") from error
            reason = str(error)
        if reason is None:
            found[name] = content
        else:
            unshown.append(reason)
    return Records(found.get(RESULTS), found.get(EVALUATION), tuple(unshown))


def tied_records(
    results: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
    fingerprint: str | None = None,
    base: str | None = None,
) -> Records:
    """Returns the records that are of one adapter's weights.

    Args:
        results: What `results.json` holds, or None.
        evaluation: What `evaluation.json` holds, or None.
        fingerprint: The adapter's; by default that of the results or, without any, of the evaluation.
        base: As for `read_records`.

    Raises:
        ValueError: A record is damaged or of other weights.
    """
    records = {name: record for name, record in ((RESULTS, results), (EVALUATION, evaluation)) if record is not None}
    known = fingerprint or next((own for name, r in records.items() if (own := _fingerprint_of(r, name))), None)
    reasons = {name: _why_not(record, name, known, base) for name, record in records.items()}
    shown = {name: record for name, record in records.items() if reasons[name] is None}
    return Records(shown.get(RESULTS), shown.get(EVALUATION), tuple(why for why in reasons.values() if why))


def _why_not(record: Mapping[str, Any], name: str, fingerprint: str | None, base: str | None) -> str | None:
    """Returns why a record cannot be tied to the weights, None if it is of them; raises if it is damaged or of others."""
    own = _fingerprint_of(record, name)
    with readable(name):
        check_record(record, name)
        measured = record["configuration"]["model"]["base"]["fingerprint"] if name == EVALUATION else None
    if own is None:
        return (
            f"{name} does not say which weights its figures are of: it has no fingerprint of the adapter, so they are not shown. "
            "Measure again."
        )
    if fingerprint is None:
        return f"{name} was there before these weights and was not compared with them, so its figures are not shown."
    if own != fingerprint:
        raise RecordError(
            f"{name} has the figures of other weights: their fingerprint is {plain(own, 40)}, that of this adapter is "
            f"{fingerprint}. Measure again, or remove {name}."
        )
    if base is not None and measured is not None and measured != base:
        raise RecordError(
            f"{name} was measured on another base model: its fingerprint is {plain(measured, 40)}, the adapter is for {base}. "
            f"Measure in float32 on the base that the adapter was tuned on, or remove {name}."
        )
    return None


def _fingerprint_of(record: Mapping[str, Any], name: str) -> str | None:
    with readable(name):
        if name == RESULTS:
            return record["adapter"].get("fingerprint")
        adapter = record["configuration"]["model"].get("adapter") if record.get("kind") == "evaluation" else None
        if not adapter:
            raise RecordError(
                "The evaluation is not one of a CAPT adapter: measure it with examples/evaluate.py --adapter."
            )
        if len(record["configuration"]["model"].get("adapters", [])) > 1:
            raise RecordError(
                f"{name} was measured with several adapters at once: its figures are of none of them alone."
            )
        return adapter.get("fingerprint")


def accuracy_rows(results: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None = None) -> list[Row]:
    """Returns the accuracies of results and evaluation, zero-shot first."""
    before: list[Row] = []
    after: list[Row] = []
    method = "this adapter"
    if results is not None:
        attack, method = results["evaluation"]["attack"], results["method"]
        before = _trainer_rows("zero-shot", results["evaluation"]["before"], attack)
        after = _trainer_rows(method, results["evaluation"]["after"], attack)
    if evaluation is None:
        return [*before, *after]
    rows = [_row(method, "clean", evaluation["clean"])]
    for outcome in evaluation["attacks"]:
        if outcome["kind"] == "robust":
            threat = str(ThreatModel(**outcome["attack"]["threat_model"]))
            rows.append(_row(method, "robust", outcome, threat, outcome["attack"]["name"]))
    for worst in evaluation["worst_case"]:
        threat = str(ThreatModel(**worst["threat_model"]))
        if sum(row.threat_model == threat for row in rows) > 1:
            rows.append(_row(method, "robust", worst, threat, "worst case"))
    # figures of more images are never hidden behind figures of fewer
    measured = {(row.kind, row.threat_model, row.attack): row.n for row in rows}
    kept = [row for row in after if measured.get((row.kind, row.threat_model, row.attack), 0) < row.n]
    return [*before, *kept, *rows]


def _trainer_rows(model: str, accuracies: Mapping[str, Any], attack: Mapping[str, Any]) -> list[Row]:
    threat = str(ThreatModel(**attack["threat_model"]))
    return [
        _row(model, "clean", accuracies["clean"]),
        _row(model, "robust", accuracies["robust"], threat, attack["name"]),
    ]


def _row(
    model: str, kind: str, accuracy: Mapping[str, Any], threat: str | None = None, attack: str | None = None
) -> Row:
    low, high = accuracy["interval_95"]
    return Row(model, kind, accuracy["accuracy"], (low, high), accuracy["n"], threat, attack)


def check_record(record: Mapping[str, Any], name: str = RESULTS) -> None:
    """Raises a ValueError unless every accuracy of a record can be one."""
    with readable(name):
        if name == RESULTS:
            measured = record["evaluation"]
            accuracies = [measured[when][kind] for when in ("before", "after") for kind in ("clean", "robust")]
        else:
            accuracies = [record["clean"], *record["attacks"], *record["worst_case"]]
        for accuracy in accuracies:
            _check_accuracy(accuracy, name)


def _check_accuracy(accuracy: Mapping[str, Any], name: str) -> None:
    value, n = accuracy["accuracy"], accuracy["n"]
    low, high = accuracy["interval_95"]
    numbers = all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in (value, low, high)
    )
    counted = isinstance(n, int) and not isinstance(n, bool) and n >= 1
    if not numbers or not counted or not 0 <= value <= 1:
        raise RecordError(
            f"{name} says accuracy {plain(value, 40)} of {plain(n, 40)} images with the interval {plain([low, high], 80)}; an "
            "accuracy is a share from 0 to 1, of at least one image. Measure again."
        )
    if not -_ROUNDING <= low <= value + _ROUNDING or not value - _ROUNDING <= high <= 1 + _ROUNDING:
        raise RecordError(
            f"{name} says accuracy {value} with the interval {low} to {high}, which must lie in 0 to 1 and hold the accuracy. "
            "Measure again."
        )
    correct = accuracy.get("correct", value * n)
    if not isinstance(correct, int | float) or abs(correct - value * n) > 1e-6 * n:
        raise RecordError(
            f"{name} says {plain(correct, 40)} correct of {n} images and accuracy {value}; they must agree. Measure again."
        )


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turns what a record of another shape raises into an error that names it."""
    try:
        yield
    except RecordError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        detail = f"{type(error).__name__}: {plain(error, 200)}"
        raise RecordError(
            f"{name} is not a record of this package, or is damaged ({detail}). Measure again."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecordError(
            f"{path.name} is not JSON, or damaged: {plain(error, 200)}. Measure again, or remove it."
        ) from error
    if not isinstance(content, dict):
        raise RecordError(f"{path.name} is not a record of this package but a {type(content).__name__}. Remove it.")
    return content
