"""The model card of an adapter: one template, filled in from the adapter's own files and from nothing else."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..attacks import PGD, ThreatModel
from ..attacks.registry import known_attack
from ..tuner import CaptConfig
from ..tuner import config as tuner_config
from ..tuner.fingerprint import SAFETENSORS_NAME, adapter_fingerprint
from ..utils.files import write_text
from ..utils.markup import Markdown, code, escape, plain, quoted
from .card_details import MARK, CardDetails, is_hub_id, is_replaceable, kept_details, without_local_paths
from .records import EVALUATION, RESULTS, RecordError, Records, Row, accuracy_rows, read_records, readable, tied_records

__all__ = ["EVALUATION", "RESULTS", "CardDetails", "Row", "accuracy_rows", "card_data", "model_card", "write_card"]

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("model_card.md")
_SHOWN_CLASSES = 30
_TASK = "zero-shot-image-classification"


# --------------------------------------------------------------------------------------------------------- writing cards


def write_card(folder: str | Path, adapter: str | None = None, details: CardDetails | None = None) -> Path:
    """Writes the card of an adapter, over whatever README.md there is.

    Its figures are those of the `results.json` and `evaluation.json` in the folder; without any, the card says so.

    Args:
        folder: Folder of the adapter, with its weights.
        adapter: Folder or Hub id by which people load it; by default the name in the results, else the folder's.
        details: What else the card says; by default what the card that is there says of it.

    Returns:
        The path of the card, README.md.

    Raises:
        ValueError: There is no whole CAPT adapter in the folder, or a record in it is damaged or of other weights.
    """
    folder = Path(folder)
    write_text(folder / "README.md", card_of(folder, adapter, details=details)[0])
    return folder / "README.md"


def write_cards_for(temporary: Path, home: Path, adapter: str | None = None) -> None:
    """Writes the cards of adapters that lie in a temporary folder and will be moved to another, where a person's card stays.

    Args:
        temporary: Where the adapters are; what was measured with them, if they are not of the run that is there already.
        home: Where they will be.
        adapter: As for `write_card`.

    Raises:
        ValueError: A record in the temporary folder is damaged or of other weights.
    """
    for weights in temporary.rglob(SAFETENSORS_NAME):
        folder, to = weights.parent, home / weights.parent.relative_to(temporary)
        if not is_capt(folder):
            continue
        (folder / "README.md").unlink(missing_ok=True)
        if not is_replaceable(to / "README.md"):
            continue
        measured = (folder / RESULTS).is_file()
        card, records = card_of(folder, adapter, strict=measured, home=to, records_in=folder if measured else to)
        for reason in records.unshown:
            logger.warning("%s: %s", to, reason)
        write_text(folder / "README.md", card)


def is_capt(folder: Path) -> bool:
    """Tells whether a folder has a whole CAPT adapter."""
    try:
        return bool(adapter_config(folder))
    except (OSError, ValueError):
        return False


def card_of(
    folder: Path,
    adapter: str | None = None,
    *,
    details: CardDetails | None = None,
    strict: bool = True,
    home: Path | None = None,
    records_in: Path | None = None,
) -> tuple[str, Records]:
    """Returns the card of a saved adapter, and the records that are of its weights.

    Args:
        folder: As for `write_card`.
        adapter: As for `write_card`.
        details: As for `write_card`.
        strict: False: records of other weights are left out, and the card says why, instead of raising.
        home: Where the folder will be, and the card is that it takes the place of; by default the folder.
        records_in: Where the records are; by default the folder.

    Raises:
        ValueError: As for `write_card`.
    """
    config = adapter_config(folder)
    fingerprint = adapter_fingerprint(folder)
    records = read_records(records_in or folder, fingerprint, config.base_model_fingerprint, strict=strict)
    return _card(home or folder, config, fingerprint, records, adapter, details, strict)


def adapter_config(folder: Path) -> CaptConfig:
    """Returns the configuration of a saved adapter; raises a ValueError unless it is whole and one of CAPT."""
    if not (folder / SAFETENSORS_NAME).is_file():
        raise ValueError(f"There is no adapter in {folder}: it has no {SAFETENSORS_NAME}. Save one: save_pretrained.")
    return CaptConfig.from_pretrained(str(folder))  # refuses damaged files and other methods


def write_saved_card(folder: Path, config: CaptConfig, whole: bool) -> None:
    """Writes the card of an adapter that is being saved, unless there is one that somebody has written.

    `CaptConfig.save_pretrained` calls it, whoever saves. It never fails for a record: that of other weights is not shown.

    Args:
        folder: Where the adapter is saved.
        config: Its configuration.
        whole: Whether its weights are in the folder already; otherwise no record can be compared with them.
    """
    whole = whole and (folder / SAFETENSORS_NAME).is_file()
    if is_replaceable(folder / "README.md"):
        fingerprint = adapter_fingerprint(folder) if whole else None
        records = read_records(folder, fingerprint, config.base_model_fingerprint, strict=False)
        card, records = _card(folder, config, fingerprint, records)
        for reason in records.unshown:
            logger.warning("%s: %s", folder, reason)
        write_text(folder / "README.md", card)
    else:
        _tidy(folder / "README.md")
    if whole:
        _put_right_above(folder)


def _tidy(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8", errors="surrogateescape")
    tidied = without_local_paths(text)
    if tidied != text:
        write_text(readme, tidied)


def _put_right_above(folder: Path) -> None:
    """Replaces the blank card that PEFT leaves above an adapter with a name of its own, or the one of ours that it changed."""
    above = folder.parent / "README.md"
    if not above.is_file():
        return
    if not is_replaceable(above):
        _tidy(above)
        return
    if (above.parent / SAFETENSORS_NAME).is_file():
        try:
            text = card_of(above.parent, strict=False)[0]
        except (OSError, ValueError):  # of another method: PEFT's card is its card
            return
        write_text(above, text)
    elif (above.parent / "adapter_config.json").is_file():
        return
    elif MARK in above.read_text(encoding="utf-8", errors="replace"):
        _tidy(above)
    else:
        above.unlink()


def _card(
    folder: Path,
    config: CaptConfig,
    fingerprint: str | None,
    records: Records,
    adapter: str | None = None,
    details: CardDetails | None = None,
    strict: bool = False,
) -> tuple[str, Records]:
    details = (details or CardDetails()).over(kept_details(folder / "README.md", fingerprint))
    adapter = str(adapter or (records.results or {}).get("name") or shown_path(folder))
    try:
        return _filled_in(records, adapter, config.to_dict(), fingerprint, details), records
    except RecordError as error:
        if strict:
            raise
        records = Records(unshown=(*records.unshown, str(error)))
        return _filled_in(records, adapter, config.to_dict(), fingerprint, details), records


tuner_config.write_saved_card = write_saved_card


# -------------------------------------------------------------------------------------------------------------- the card


def model_card(
    results: Mapping[str, Any] | None,
    adapter: str,
    evaluation: Mapping[str, Any] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    fingerprint: str | None = None,
    details: CardDetails | None = None,
) -> str:
    """Returns the card of an adapter.

    Args:
        results: What `results.json` holds; None where no run was recorded.
        adapter: Folder or Hub id by which people load it.
        evaluation: What `evaluation.json` holds: figures of the same adapter under more attacks. They take the place of those in
            the results where they are of as many images or more.
        config: The adapter's configuration; by default that in the results.
        fingerprint: The adapter's (`adapter_fingerprint`); by default that in the results or the evaluation. Records without a
            fingerprint are not shown, and the card says so.
        details: What else the card says.

    Raises:
        ValueError: A record is damaged or of other weights, the evaluation is not one of a CAPT adapter, or neither `results` nor
            `config` is given.
    """
    if config is None and results is None:
        raise ValueError(
            "Give the results of a run, or the adapter's configuration: config=model.peft_config[...].to_dict()."
        )
    with readable(RESULTS):
        config = config or (results or {})["adapter"]["config"]
        records = tied_records(results, evaluation, fingerprint, config.get("base_model_fingerprint"))
    if fingerprint is None and (records.results or records.evaluation):
        shown = records.results or (records.evaluation or {})["configuration"]["model"]
        fingerprint = shown["adapter"]["fingerprint"]
    return _filled_in(records, adapter, config, fingerprint, details or CardDetails())


def _filled_in(
    records: Records, adapter: str, config: Mapping[str, Any], fingerprint: str | None, details: CardDetails
) -> str:
    results, evaluation = records.results, records.evaluation
    with readable("The record of the adapter"):
        rows = accuracy_rows(results, evaluation)
        task = next(iter(details.datasets), None) if results is None else results["task"]["name"]
        base = details.finetuned_from or config.get("base_model_name_or_path") or "unknown base"
        values = {
            "mark": Markdown(MARK),
            "title": f"CAPT adapter for {shown_path(task or base)}",
            "adapter": shown_path(adapter),
            "results": results,
            "config": config,
            "fingerprint": fingerprint,
            "base": shown_path(base, hub=True),
            "datasets": [shown_path(name) + details.dataset_words for name in details.datasets],
            "rows": rows,
            "threat_models": list(dict.fromkeys(row.threat_model for row in rows if row.kind == "robust")),
            "alone": _weak_alone(records),
            "signs": [] if evaluation is None else evaluation["signs"],
            "evaluated": evaluation is not None,
            "unshown": records.unshown,
            "measured": _measured(records, config),
            "shown_classes": _shown(config.get("class_names") or []),
            "card_data": _yaml(card_data(results, rows, adapter, evaluation, config=config, details=details)),
        }
        if results is not None:
            values["training"] = results["configuration"]["training"]
            values["training_threat"] = str(ThreatModel(**results["training"]["attack"]["threat_model"]))
            values["source"] = shown_path(results["task"]["source"] or results["task"]["name"])
        template = _environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
        try:
            return template.render(values)
        except jinja2.UndefinedError as error:
            raise KeyError(str(error)) from error


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=escape
    )
    environment.filters |= {"code": code, "quoted": quoted, "markdown": Markdown}
    return environment


def _weak_alone(records: Records) -> list[str]:
    """Returns what the robust accuracies were measured with, if it was neither AutoAttack nor a part of it."""
    attacks = [] if records.results is None else [records.results["evaluation"]["attack"]]
    if records.evaluation is not None:
        attacks += [outcome["attack"] for outcome in records.evaluation["attacks"] if outcome["kind"] == "robust"]
    known = [(known_attack(settings), settings["name"]) for settings in attacks]
    if any(attack is not None and attack.strong for attack, _ in known):
        return []
    return list(dict.fromkeys("PGD" if isinstance(attack, PGD) else name for attack, name in known))


def _measured(records: Records, config: Mapping[str, Any]) -> str:
    """Says which images the figures are of and, where no results say so, which classes and texts they were told apart by."""
    said = []
    if (results := records.results) is not None:
        n = results["evaluation"]["after"]["clean"]["n"]
        said.append(f"{n} images of the {results['evaluation']['split']} split of {results['task']['name']}")
    if records.evaluation is not None:
        n, task = records.evaluation["clean"]["n"], records.evaluation["configuration"].get("task") or {}
        where = (
            f" of the {task.get('split', '?')} split of {task.get('name', '?')}"
            if task
            else " of a data set without a name"
        )
        said.append(f"{n} images{where}{'' if results else _other_texts(records.evaluation, config)}")
    return ", and on ".join(dict.fromkeys(said))


def _other_texts(evaluation: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    model = evaluation["configuration"]["model"]
    names, template = model.get("class_names"), model.get("template")
    words = f", with {len(names)} classes" if names is not None and names != config.get("class_names") else ""
    return words + (f", with the template {template}" if template not in (None, config.get("template")) else "")


def shown_path(name: str | Path, *, hub: bool = False) -> str:
    """Returns a name as a card shows it: of a folder of this machine only the last part.

    Args:
        name: A Hub id, a name, or a path.
        hub: A relative path is shown only if it can be a Hub id, which a folder that exists is not.
    """
    text = str(name)
    if text.startswith(("http://", "https://")):
        return text
    local = Path(text).is_absolute() or PureWindowsPath(text).drive or text.startswith(("~", "..", "file:", "\\"))
    if local or (hub and not is_hub_id(text)):
        return Path(text).resolve().name if set(Path(text).name) <= {"."} else PureWindowsPath(text).name
    return text


def _shown(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN_CLASSES} more" if len(names) > _SHOWN_CLASSES else ""
    return Markdown(", ".join(escape(name, 100) for name in names[:_SHOWN_CLASSES]) + more)


def card_data(
    results: Mapping[str, Any] | None,
    rows: Sequence[Row],
    adapter: str,
    evaluation: Mapping[str, Any] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    details: CardDetails | None = None,
) -> ModelCardData:
    """Returns the metadata of a card, with clean and robust accuracy of the adapter as its model-index.

    Without a name of the data set that they were measured on, there is no model-index.

    Args:
        results: What `results.json` holds, or None.
        rows: What `accuracy_rows` returned.
        adapter: Folder or Hub id of the adapter.
        evaluation: What `evaluation.json` holds, or None.
        config: The adapter's configuration; by default that in the results.
        details: What else the card says.
    """
    details = details or CardDetails()
    config = config or (results or {})["adapter"]["config"]
    base = str(details.finetuned_from or config.get("base_model_name_or_path") or "")
    task: Mapping[str, Any] = {}
    if results is not None:
        task = {**results["task"], "split": results["evaluation"]["split"]}
    elif evaluation is not None:
        task = evaluation["configuration"].get("task") or {}
    dataset, split = str(task.get("name")), task.get("split")
    metrics = [
        EvalResult(
            task_type=_TASK,
            dataset_type=_metadata(shown_path(task.get("source") or dataset)),
            dataset_name=_metadata(shown_path(dataset)),
            dataset_split=None if split is None else _metadata(split),
            metric_type="accuracy",
            metric_name=_metadata(
                "clean accuracy" if row.kind == "clean" else f"robust accuracy ({row.attack}, {row.threat_model})"
            ),
            metric_value=round(row.accuracy, 6),
            metric_args={"n": row.n, "interval_95": [round(value, 6) for value in row.interval]},
        )
        for row in rows
        if row.model != "zero-shot" and task.get("name")
    ]
    tags = ["capt", "adversarial-robustness", "clip", "peft", *details.all_tags]
    return ModelCardData(
        base_model=base if is_hub_id(base) else None,  # the Hub refuses anything else
        base_model_relation="adapter",
        language=[_metadata(name) for name in details.language] or None,
        license=_metadata(details.license) if details.license else None,
        datasets=[name for name in details.datasets if is_hub_id(name)] or None,
        library_name="peft",
        pipeline_tag=_TASK,
        tags=list(dict.fromkeys(map(_metadata, tags))),
        # the Hub wants a name for a model-index, and takes neither without the other
        model_name=_metadata(details.model_name or PureWindowsPath(adapter).name) if metrics else None,
        eval_results=metrics or None,
    )


def _metadata(text: Any) -> str:
    """Returns a text for the front matter, which some readers render as Markdown: one line without HTML, code and its own end."""
    return re.sub(r"[<>`]|-{3,}", lambda match: {"<": "‹", ">": "›", "`": "'"}.get(match[0], "—"), plain(text, 200))


def _yaml(data: ModelCardData) -> Markdown:
    return Markdown(yaml.safe_dump(data.to_dict(), sort_keys=False, allow_unicode=True, width=100_000).strip())
