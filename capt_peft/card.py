"""The model card of an adapter: one template, filled in from the adapter's own files and from nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from .attacks import ThreatModel
from .files import write_text

TEMPLATE = Path(__file__).with_name("model_card.md")
RESULTS, EVALUATION = "results.json", "evaluation.json"
_SHOWN_CLASSES = 30
_STRONG = ("autoattack", "apgd", "worst case")


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


def write_card(folder: str | Path, adapter: str | None = None) -> Path:
    """Writes the card of an adapter from the results in its folder.

    Args:
        folder: Folder of the adapter, with `results.json` and, where it was measured again, `evaluation.json`.
        adapter: Folder or Hub id by which people load it; by default the name in the card that is there, else the folder.

    Returns:
        The path of the card, README.md.

    Raises:
        ValueError: The folder has no `results.json`, or the files are no results.
    """
    folder = Path(folder)
    if not (folder / RESULTS).is_file():
        raise ValueError(f"{folder} has no {RESULTS}, from which the card is made; examples/train.py writes it.")
    results = _read(folder / RESULTS)
    evaluation = _read(folder / EVALUATION) if (folder / EVALUATION).is_file() else None
    adapter = adapter or results.get("name") or str(folder)
    write_text(folder / "README.md", model_card(results, adapter, evaluation))
    return folder / "README.md"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no results.")
    return content


def model_card(results: Mapping[str, Any], adapter: str, evaluation: Mapping[str, Any] | None = None) -> str:
    """Returns the card of an adapter.

    Args:
        results: What `results.json` holds.
        adapter: Folder or Hub id by which people load it.
        evaluation: What `evaluation.json` holds: figures of the same adapter under more attacks. They take the place of those in
            the results where they are of as many images or more.

    Raises:
        ValueError: The evaluation is not one of a CAPT adapter.
    """
    rows = accuracy_rows(results, evaluation)
    robust = [row for row in rows if row.kind == "robust"]
    values = {
        "title": f"CAPT adapter for {results['task']['name']}",
        "adapter": adapter,
        "results": results,
        "config": results["adapter"]["config"],
        "base": _base_name(results),
        "training": results["configuration"]["training"],
        "training_threat": str(ThreatModel(**results["training"]["attack"]["threat_model"])),
        "rows": rows,
        "threat_models": list(dict.fromkeys(row.threat_model for row in robust)),
        "strong": any(str(row.attack).startswith(_STRONG) for row in robust),
        "signs": [] if evaluation is None else evaluation["signs"],
        "evaluated": evaluation is not None,
        "measured": _measured(results, evaluation),
        "shown_classes": _shown(results["task"]["class_names"]),
        "card_data": card_data(results, rows, adapter).to_yaml(),
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values)


def accuracy_rows(results: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> list[Row]:
    """Returns the accuracies of results and evaluation, zero-shot first."""
    attack = results["evaluation"]["attack"]
    before = _trainer_rows("zero-shot", results["evaluation"]["before"], attack)
    after = _trainer_rows(results["method"], results["evaluation"]["after"], attack)
    if evaluation is None:
        return [*before, *after]
    if evaluation.get("kind") != "evaluation" or not evaluation["configuration"]["model"].get("adapter"):
        raise ValueError("The evaluation is not one of a CAPT adapter: measure it with examples/evaluate.py --adapter.")
    rows = [_row(results["method"], "clean", evaluation["clean"])]
    for outcome in evaluation["attacks"]:
        if outcome["kind"] == "robust":
            threat = str(ThreatModel(**outcome["attack"]["threat_model"]))
            rows.append(_row(results["method"], "robust", outcome, threat, outcome["attack"]["name"]))
    for worst in evaluation["worst_case"]:
        threat = str(ThreatModel(**worst["threat_model"]))
        if sum(row.threat_model == threat for row in rows) > 1:
            rows.append(_row(results["method"], "robust", worst, threat, "worst case"))
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


def _measured(results: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    """Says which images the figures are of."""
    split = results["evaluation"]["split"]
    images = f"{results['evaluation']['after']['clean']['n']} images of the {split} split of {results['task']['name']}"
    if evaluation is None:
        return images
    task = evaluation["configuration"].get("task", {})
    n = evaluation["clean"]["n"]
    own = f"{n} images of the {task.get('split', '?')} split of {task.get('name', '?')}"
    return own if own == images else f"{images}, and on {own}"


def _base_name(results: Mapping[str, Any]) -> str:
    """Returns the Hub id of the base model, or the name of its folder: other machines have other paths."""
    name = str(results["adapter"]["config"]["base_model_name_or_path"])
    return name if _is_hub_id(name) else Path(name).name


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None and not Path(name).is_dir()


def _shown(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN_CLASSES} more" if len(names) > _SHOWN_CLASSES else ""
    return ", ".join(names[:_SHOWN_CLASSES]) + more


def card_data(results: Mapping[str, Any], rows: Sequence[Row], adapter: str) -> ModelCardData:
    """Returns the metadata of a card, with clean and robust accuracy of the adapter as its model-index.

    Args:
        results: What `results.json` holds.
        rows: What `accuracy_rows` returned.
        adapter: Folder or Hub id of the adapter.
    """
    task, base = results["task"], str(results["adapter"]["config"]["base_model_name_or_path"])
    metrics = [
        EvalResult(
            task_type="zero-shot-image-classification",
            dataset_type=str(task["source"] or task["name"]),
            dataset_name=task["name"],
            dataset_split=results["evaluation"]["split"],
            metric_type="accuracy",
            metric_name="clean accuracy"
            if row.kind == "clean"
            else f"robust accuracy ({row.attack}, {row.threat_model})",
            metric_value=round(row.accuracy, 6),
            metric_args={"n": row.n, "interval_95": [round(value, 6) for value in row.interval]},
        )
        for row in rows
        if row.model != "zero-shot"
    ]
    return ModelCardData(
        base_model=base if _is_hub_id(base) else None,  # the Hub refuses anything else
        library_name="peft",
        pipeline_tag="zero-shot-image-classification",
        tags=["capt", "adversarial-robustness", "clip", "peft"],
        model_name=Path(adapter).name,
        eval_results=metrics,
    )
