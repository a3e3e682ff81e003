"""Records of accuracies beside an adapter: read, checked, and tied to the weights that they are of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attacks import ThreatModel
from ..utils.markup import plain
from .accuracy import Accuracy
from .evaluation import Evaluation, examples_path

RESULTS, EVALUATION = "results.json", "evaluation.json"


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
            if name == EVALUATION and examples_path(Path(folder, name)).is_file():
                _check_examples(Path(folder, name))
            reason = _why_not(content, name, fingerprint, base, found.get(RESULTS))
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
    shown: dict[str, Mapping[str, Any]] = {}
    unshown = []
    for name, record in records.items():
        reason = _why_not(record, name, known, base, shown.get(RESULTS))
        if reason is None:
            shown[name] = record
        else:
            unshown.append(reason)
    return Records(shown.get(RESULTS), shown.get(EVALUATION), tuple(unshown))


def check_configuration(
    configuration: Mapping[str, Any], results: Mapping[str, Any] | None, fingerprint: str, base: str | None
) -> None:
    """Raises a ValueError unless the figures of an evaluation can stand in a card, before it is measured or after.

    Args:
        configuration: That of the evaluation; of it, `model` and `task`.
        results: What the `results.json` of the adapter holds, or None.
        fingerprint: The adapter's.
        base: As for `read_records`.
    """
    record = {"kind": "evaluation", "configuration": configuration}
    if reason := _why_untied(record, EVALUATION, fingerprint, base, results):
        raise RecordError(reason)


def _why_not(
    record: Mapping[str, Any],
    name: str,
    fingerprint: str | None,
    base: str | None,
    results: Mapping[str, Any] | None,
) -> str | None:
    """Returns why a record cannot be shown, None if it can; raises if it is damaged, of other weights or other images."""
    _fingerprint_of(record, name)
    check_record(record, name)
    return _why_untied(record, name, fingerprint, base, results)


def _why_untied(
    record: Mapping[str, Any],
    name: str,
    fingerprint: str | None,
    base: str | None,
    results: Mapping[str, Any] | None,
) -> str | None:
    own = _fingerprint_of(record, name)
    with readable(name):
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
    if name == EVALUATION and results is not None:
        with readable(name):
            return _why_other_images(record["configuration"], results)
    return None


def _why_other_images(configuration: Mapping[str, Any], results: Mapping[str, Any]) -> str | None:
    """Returns why an evaluation cannot be compared with results; raises if it is of other images, classes or texts."""
    model, tuned, task = configuration["model"], results["task"], configuration.get("task")
    pairs = {
        "other classes": (model.get("class_names"), tuned.get("class_names")),
        "another template": (model.get("template"), tuned.get("template")),
        "other pixels": (model.get("pixels"), results["training"].get("pixels")),
    }
    if task:
        pairs |= {
            "another data set": (task.get("name"), tuned["name"]),
            "another source of the data": (task.get("source"), task.get("source") and tuned.get("source")),
            "another split": (task.get("split"), results["evaluation"]["split"]),
        }
    for what, (own, other) in pairs.items():
        if other not in (None, "") and json.dumps(own, sort_keys=True) != json.dumps(other, sort_keys=True):
            raise RecordError(
                f"{EVALUATION} was measured with {what} than {RESULTS}: {plain(own, 80)}, not {plain(other, 80)}. A card "
                f"compares figures of the same kind alone: keep this evaluation under another name, without --update_card."
            )
    if not task:
        return (
            f"{EVALUATION} does not say which data set and split its figures are of, so they are not shown beside those of "
            f"{RESULTS}. Measure again with examples/evaluate.py, or with evaluate(..., details={{'task': ...}})."
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
    # figures of other images stay, beside the zero-shot ones of the same images
    measured = {(row.kind, row.threat_model, row.attack, row.n) for row in rows}
    kept = [row for row in after if (row.kind, row.threat_model, row.attack, row.n) not in measured]
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
    """Raises a ValueError unless the accuracies of a record can be those of the same images."""
    with readable(name):
        if name == RESULTS:
            for measured in (record["evaluation"]["before"], record["evaluation"]["after"]):
                clean, robust = (_accuracy(measured[kind], name) for kind in ("clean", "robust"))
                _check_at_most(robust, clean, f"{name} has robust and clean accuracy of")
            return
        clean = _accuracy(record["clean"], name)
        attacked = [(outcome, _accuracy(outcome, name)) for outcome in record["attacks"]]
        for outcome, accuracy in attacked:
            _check_at_most(accuracy, clean, f"{name} has {outcome['attack']['name']} and clean accuracy of")
        for row in record["worst_case"]:
            worst = _accuracy(row, name)
            _check_at_most(worst, clean, f"{name} has a worst case and clean accuracy of")
            for outcome, accuracy in attacked:
                if outcome["kind"] == "robust" and outcome["attack"]["threat_model"] == row["threat_model"]:
                    _check_at_most(worst, accuracy, f"{name} has a worst case and {outcome['attack']['name']} of")


def _accuracy(row: Mapping[str, Any], name: str) -> Accuracy:
    try:
        return Accuracy.from_dict(row)
    except ValueError as error:
        raise RecordError(f"{name} {plain(error, 300)} Measure again.") from error


def _check_at_most(less: Accuracy, more: Accuracy, what: str) -> None:
    """Raises a ValueError unless one accuracy is at most another one, of as many images."""
    if less.n != more.n or less.correct > more.correct:
        raise RecordError(
            f"{plain(what, 200)} {less.correct} of {less.n} and {more.correct} of {more.n} images; the first cannot be more, "
            "and both must be of the same images. Measure again."
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


def _check_examples(path: Path) -> None:
    try:
        Evaluation.load(path)
    except ValueError as error:
        raise RecordError(f"{plain(error, 400)} Measure again, or remove {path.name}.") from error


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
