"""The model card of an adapter: one template, filled in from the adapter's own files and from nothing else."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file

from ..attacks import PGD, ThreatModel
from ..attacks.registry import known_attack
from ..clip.calibration import digest_as_loaded
from ..tuner import CaptConfig
from ..tuner.fingerprint import PROVENANCE, SAFETENSORS_NAME, adapter_fingerprint
from ..tuner.others import CLASSES, load_config, peft_name, settings_of
from ..utils.embedded import embedded_name
from ..utils.files import write_text
from ..utils.markup import Markdown, code, escape, plain, quoted
from ..utils.text import some
from .accuracy import Accuracy
from .evaluation import EVALUATION, Evaluation
from .run import RESULTS, Records
from .strength import StrengthFront

logger = logging.getLogger(__name__)

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md")
MARK = "<!-- Written by capt-peft, which writes it again with the adapter. To keep words of your own, delete this line. -->"
_BY_PEFT = re.compile(r"### Framework versions|- PEFT [\w.@+]+|This is the model card of a 🤗 transformers model .*")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_TAGS = ("capt", "adversarial-robustness", "clip", "peft")
_ALWAYS_SHOWN = ("r", "lora_alpha", "target_modules", "boft_block_size")  # settings of other methods
_SHOWN_CLASSES = 30
_TASK = "zero-shot-image-classification"


# ------------------------------------------------------------------------------------------------- what people add to cards

Names = Any  # a string, a sequence of strings, or None; a tuple once it is checked


@dataclass(frozen=True, kw_only=True)
class CardDetails:
    """What a person adds to a card: the arguments of transformers' `Trainer.create_model_card`, and TRL's `dataset_name`.

    Args:
        language: Languages of the class texts.
        license: The adapter's licence.
        tags: Further tags.
        model_name: The model's name in the metadata; by default that of the repository or folder.
        finetuned_from: Hub id of the base model, where the adapter's configuration names a local folder.
        tasks: Task names; they become tags.
        dataset_tags: Data that it was tuned on; Hub ids go into the metadata.
        dataset: The same.
        dataset_args: Which configuration of it.
        dataset_name: The same as `dataset`.

    Raises:
        TypeError: One of them is neither a string nor a list of strings.
    """

    language: Names = ()
    license: str | None = None
    tags: Names = ()
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: Names = ()
    dataset_tags: Names = ()
    dataset: Names = ()
    dataset_args: Names = ()
    dataset_name: Names = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default == ():
                names = () if value is None else (value,) if isinstance(value, str) else value
                if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) for name in names):
                    raise TypeError(f"{field.name}={plain(repr(value), 100)} must be a string or a list of strings.")
                object.__setattr__(self, field.name, tuple(names))
            elif value is not None and not isinstance(value, str):
                raise TypeError(f"{field.name}={plain(repr(value), 100)} must be a string.")

    @classmethod
    def of(cls, named: Mapping[str, Any], *positional: Any) -> CardDetails:
        """Returns them from arguments; raises a TypeError that names what a card has no place for."""
        known = [field.name for field in fields(cls)]
        arguments = {**dict(zip(known, positional, strict=False)), **named}
        for name in arguments:
            if name not in known:
                raise TypeError(f"{name} is unknown here: a card takes {', '.join(known)}.")
        return cls(**arguments)

    @property
    def datasets(self) -> tuple[str, ...]:
        """All data sets that were named."""
        return tuple(dict.fromkeys((*self.dataset_name, *self.dataset, *self.dataset_tags)))

    def over(self, kept: CardDetails) -> CardDetails:
        """Returns these, with what they leave open from others; tags add up."""
        values = {field.name: getattr(self, field.name) or getattr(kept, field.name) for field in fields(self)}
        return CardDetails(**{**values, "tags": (*self.tags, *kept.tags)})


def is_hub_id(name: str) -> bool:
    """Tells whether a name can be the id of a repository: it has the form, and is neither a folder here nor an embedded model."""
    known = embedded_name(name) is not None or Path(name).exists()
    return len(name) <= 96 and _HUB_ID.fullmatch(name) is not None and not known


def is_replaceable(path: Path) -> bool:
    """Tells whether a README.md says nothing that a person wrote: it is not there, ours, or a template that nobody filled in."""
    if not path.is_file():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    if MARK in text:
        return True
    template = {line.strip() for line in str(ModelCard.from_template(ModelCardData())).splitlines()}
    body = re.sub(r"\A\s*---\s*\n.*?\n---\s*(\n|\Z)", "", text, flags=re.DOTALL)
    lines = (line.strip() for line in body.splitlines())
    return all(not line or line in template or _BY_PEFT.fullmatch(line) for line in lines)


def without_local_paths(text: str) -> str:
    """Returns somebody's card without the folder of the base model that PEFT writes into its header; the Hub refuses it there."""
    try:
        card: Any = ModelCard(text)
        base, tags = card.data.base_model, card.data.tags or []
        local = [tag for tag in tags if tag.startswith("base_model:") and not is_hub_id(tag.split(":")[-1])]
        if not local and (not isinstance(base, str) or is_hub_id(base)):
            return text
        card.data.tags = [tag for tag in tags if tag not in local] or None
        card.data.base_model = base if isinstance(base, str) and is_hub_id(base) else None
        return str(card)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError):
        return text  # a header that cannot be read is the person's own: PEFT would not have written into it


def kept_details(path: Path, fingerprint: str | None) -> CardDetails:
    """Returns what a person added to a card, which shall stay when it is written again; the data only of the same weights."""
    if not path.is_file():
        return CardDetails()
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        data: Any = ModelCard(text).data
        same = MARK in text and fingerprint is not None and f"fingerprint `{fingerprint}`" in text
        ours = {*_TAGS, "transformers"}
        base = data.base_model if same and isinstance(data.base_model, str) and is_hub_id(data.base_model) else None
        return CardDetails(
            language=data.language,
            license=data.license,
            tags=[tag for tag in data.tags or [] if tag not in ours and not tag.startswith("base_model:")],
            dataset=data.datasets if same else (),
            finetuned_from=base,
        )
    except (yaml.YAMLError, ValueError, TypeError, AttributeError):
        return CardDetails()  # somebody's header that cannot be read keeps nothing


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
        ValueError: The folder has no whole adapter, of CAPT or saved by `CaptTrainer`, or a record in it is damaged or
            of other weights.
    """
    path = Path(folder, CARD)
    write_text(path, card_of(Path(folder), adapter, details=details)[0])
    return path


def write_cards_for(temporary: Path, home: Path, adapter: str | None = None) -> None:
    """Writes the cards of adapters in a temporary folder that will be moved to another one, where a person's card stays.

    The records are those of the run in the temporary folder, which must be of these weights, or what lies there already.
    """
    for weights in temporary.rglob(SAFETENSORS_NAME):
        folder, to = weights.parent, home / weights.parent.relative_to(temporary)
        if is_adapter(folder):
            (folder / CARD).unlink(missing_ok=True)
            _write_unless_kept(folder, to, adapter, strict=(folder / RESULTS).is_file())


def write_saved_card(folder: Path, config: CaptConfig, whole: bool, details: CardDetails | None = None) -> None:
    """Writes the card of an adapter that is being saved, unless there is one that somebody has written.

    `CaptConfig.save_pretrained` calls it, whoever saves. It never fails for a record: that of other weights is not shown.

    Args:
        folder: Where the adapter is saved.
        config: Its configuration.
        whole: Whether its weights are in the folder already; otherwise no record can be compared with them.
        details: What else the card says; by default what the card that is there says of these weights.
    """
    whole = whole and (folder / SAFETENSORS_NAME).is_file()
    _write_unless_kept(folder, folder, unsaved=None if whole else config, details=details)
    if whole:
        _put_right_above(folder.parent)


def is_capt(folder: Path) -> bool:
    """Tells whether a folder has a whole CAPT adapter."""
    try:
        return bool(adapter_config(folder))
    except (OSError, ValueError):
        return False


def is_adapter(folder: Path) -> bool:
    """Tells whether a folder has a whole adapter of CAPT, or one of another PEFT method whose classes are known."""
    return is_capt(folder) or ((folder / SAFETENSORS_NAME).is_file() and (folder / CLASSES).is_file())


def adapter_config(folder: Path) -> CaptConfig:
    """Returns the configuration of a saved adapter; raises a ValueError unless it is whole and one of CAPT."""
    _check_there(folder)
    return CaptConfig.from_pretrained(str(folder))  # refuses damaged files and other methods


def saved_config(folder: Path) -> Any:
    """Returns the same of an adapter of any PEFT method, of which it must be known what it classifies."""
    _check_there(folder)
    config = load_config(folder)
    if not hasattr(config, "class_names"):
        raise ValueError(
            f"{folder} holds a {peft_name(config.to_dict())} adapter without {CLASSES}, so that nothing says what it classifies. "
            "Save it with CaptTrainer.save_model."
        )
    return config


def _check_there(folder: Path) -> None:
    if not (folder / SAFETENSORS_NAME).is_file():
        raise ValueError(f"There is no adapter in {folder}: it has no {SAFETENSORS_NAME}. Save one: save_pretrained.")


def card_of(
    folder: Path,
    adapter: str | None = None,
    *,
    details: CardDetails | None = None,
    strict: bool = True,
    home: Path | None = None,
    unsaved: CaptConfig | None = None,
) -> tuple[str, Records]:
    """Returns the card of a saved adapter, and the records that are of its weights; as `write_card`.

    Args:
        folder: Folder of the adapter.
        adapter: Folder or Hub id by which people load it.
        details: What else the card says.
        strict: False: records of other weights are left out, and the card says why, instead of raising.
        home: Where the folder will be: there are the card that it takes the place of, and records if it has none.
        unsaved: The configuration of an adapter whose weights are not in the folder yet.
    """
    config = unsaved or saved_config(folder)
    fingerprint = None if unsaved else adapter_fingerprint(folder)
    home = home or folder
    measured = folder if (folder / RESULTS).is_file() else home
    settings = settings_of(config)
    records = Records.read(measured, fingerprint, settings.get("base_model_fingerprint"), strict=strict, weights=folder)
    details = (details or CardDetails()).over(kept_details(home / CARD, fingerprint))
    name = str(adapter or (records.run and records.run.name) or shown_path(home))
    records = replace(records, unshown=tuple(text.replace("ADAPTER", shown_path(name)) for text in records.unshown))
    if not isinstance(config, CaptConfig):
        settings["numbers"] = sum(tensor.numel() for tensor in load_file(folder / SAFETENSORS_NAME).values())
    return card_text(records, name, settings, fingerprint, details), records


def _write_unless_kept(folder: Path, home: Path, adapter: str | None = None, **how: Any) -> None:
    """Writes the card of an adapter that will be at home; the one that a person wrote there only loses the local paths."""
    if is_replaceable(home / CARD):
        card, records = card_of(folder, adapter, home=home, **{"strict": False, **how})
        for reason in records.unshown:
            logger.warning("%s: %s", home, reason)
        write_text(folder / CARD, card)
    elif home == folder:
        _tidy(home / CARD)


def _tidy(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8", errors="surrogateescape")
    tidied = without_local_paths(text)
    if tidied != text:
        write_text(readme, tidied)


def _put_right_above(above: Path) -> None:
    """Replaces the blank card that PEFT leaves above an adapter with a name of its own, or the one of ours that it changed."""
    readme = above / CARD
    if not readme.is_file():
        return
    if is_capt(above):
        _write_unless_kept(above, above)
    elif not is_replaceable(readme) or MARK in readme.read_text(encoding="utf-8", errors="replace"):
        _tidy(readme)
    elif not (above / "adapter_config.json").is_file():  # else of another method: PEFT's card is its card
        readme.unlink()


# -------------------------------------------------------------------------------------------------------------- the card


@dataclass(frozen=True)
class Row:
    """One line of the table of accuracies; a clean one has no threat model and no attack."""

    model: str
    accuracy: Accuracy
    threat_model: str | None = None
    attack: str | None = None


def accuracy_rows(records: Records) -> list[Row]:
    """Returns the accuracies of an adapter, zero-shot first; those of an evaluation replace the run's of as many images."""
    results, evaluation = records.results, records.evaluation
    method = "this adapter" if results is None else results.label
    before: list[Row] = []
    after: list[Row] = []
    if results is not None:
        attack = results.evaluation.attack
        under = str(ThreatModel(**attack["threat_model"])), str(attack["name"])
        for model, both, rows in (
            ("zero-shot", results.evaluation.before, before),
            (method, results.evaluation.after, after),
        ):
            rows += [Row(model, both.clean), Row(model, both.robust, *under)]
    if evaluation is None:
        return [*before, *after]
    rows = [Row(method, evaluation.clean)]
    rows += [Row(method, o.accuracy, str(o.threat_model), o.name) for o in evaluation.white_box()]
    for threat, worst in evaluation.worst_case.items():
        if len(evaluation.white_box(threat)) > 1:
            rows.append(Row(method, worst, str(threat), "worst case"))
    if evaluation.union is not None:
        rows.append(Row(method, evaluation.union, evaluation.threats, "union"))
    # figures of other images stay, beside the zero-shot ones of the same images
    again = {(row.threat_model, row.attack, row.accuracy.n) for row in rows}
    kept = [row for row in after if (row.threat_model, row.attack, row.accuracy.n) not in again]
    return [*before, *kept, *rows]


def card_text(
    records: Records, adapter: str, config: Mapping[str, Any], fingerprint: str | None, details: CardDetails
) -> str:
    """Returns the card of an adapter with records of its weights, by the name that people load it with."""
    results, run, evaluation, rows = records.results, records.run, records.evaluation, accuracy_rows(records)
    task = next(iter(details.datasets), None) if run is None else run.task.name
    base = details.finetuned_from or config.get("base_model_name_or_path") or "unknown base"
    embedded = embedded_name(str(base))
    words = f" ({', '.join(details.dataset_args)})" if details.dataset_args else ""
    calibration = _calibration(config, fingerprint)
    other, kind = _of_another_calibration(evaluation, calibration), peft_name(config)
    values = {
        "mark": Markdown(MARK),
        "title": f"{kind} adapter for {shown_path(task or base)}",
        "kind": kind,
        "settings": "" if kind == "CAPT" else _settings(config),
        "adapter": shown_path(adapter),
        "results": results,
        "config": config,
        "fingerprint": fingerprint,
        "calibration": calibration,
        "strength": _strength(records.front, config.get("strength", 1.0)),
        "run": run,
        "base": Markdown(f"{code(embedded)} (embedded in capt-peft)") if embedded else code(shown_path(base, hub=True)),
        "datasets": [shown_path(name) + words for name in details.datasets],
        "rows": rows,
        "threat_models": list(dict.fromkeys(row.threat_model for row in rows if row.attack)),
        "alone": _weak_alone(records),
        "signs": () if evaluation is None else evaluation.signs,
        "protocol": Markdown("" if evaluation is None else evaluation.on_protocol()),
        "on_scores": [] if other or evaluation is None else [Markdown(text) for text in evaluation.on_scores()],
        "corruptions": None
        if evaluation is None or evaluation.corruptions is None
        else Markdown(evaluation.corruptions.text()),
        "evaluated": evaluation is not None,
        "images": None if evaluation is None else evaluation.images,
        "unshown": [*records.unshown, *other],
        "measured": _measured(records, config),
        "template": _in_words(config.get("template")),
        "own_texts": config.get("class_texts") or {},
        "classes": Markdown(some([escape(name, 100) for name in config.get("class_names") or []], _SHOWN_CLASSES)),
        "card_data": _yaml(card_data(records, rows, adapter, config, details)),
    }
    if run is not None:
        values["training_threat"] = str(ThreatModel(**run.training.attack["threat_model"]))
        values["source"] = shown_path(run.task.source or run.task.name)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=escape
    )
    environment.filters |= {"code": code, "quoted": quoted, "markdown": Markdown}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values)


def _settings(config: Mapping[str, Any]) -> str:
    """Returns the settings of an adapter of another method: its size, and what is not as PEFT has it."""
    plain_config = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]().to_dict()
    shown = {
        name: config[name]
        for name, usual in plain_config.items()
        if name in config and name not in PROVENANCE and (name in _ALWAYS_SHOWN or config[name] != usual)
    }
    words = [f"{k} {', '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in shown.items()]
    return "; ".join(words)


def _strength(front: StrengthFront | None, strength: float) -> str | None:
    """Says which strength the adapter has and how it was chosen; None where it has all of it and nothing was chosen."""
    if front is None:
        return None if strength == 1 else f"{strength:g}, set by hand"
    chosen = f"{front.rule}, of the strengths {', '.join(f'{point.strength:g}' for point in front.points)}"
    on = f"on {front.images} under {front.attack}"
    if strength == front.chosen.strength:
        return f"{strength:g}, chosen {on}: {chosen}"
    return f"{strength:g}, set by hand; {on}, strength {front.chosen.strength:g} has the {chosen}"


def _calibration(config: Mapping[str, Any], fingerprint: str | None) -> Mapping[str, Any] | None:
    """Returns an adapter's calibration, if it holds for the adapter as it is loaded: its classes and texts, in float32."""
    found = config.get("calibration")
    if found is None:
        return None
    names = list(config.get("class_names") or found["class_names"])
    as_loaded = {
        "fingerprint": fingerprint,
        "class_names": names,
        "texts": digest_as_loaded(config, names),
        "base": config.get("base_model_fingerprint") or found["base"],
        "precision": "float32",
    }
    return found if as_loaded.items() <= found.items() else None


def _of_another_calibration(evaluation: Evaluation | None, calibration: Mapping[str, Any] | None) -> list[str]:
    """Returns why what an evaluation says of the scores is not shown; nothing where it is of this calibration."""
    if evaluation is None or not evaluation.on_scores():
        return []
    measured = [evaluation.configuration.get("temperature", 1)]
    acting = [1 if calibration is None else calibration["temperature"]]
    if evaluation.rejection is not None:
        measured.append(evaluation.rejection.threshold)
        acting.append(None if calibration is None else calibration["threshold"])
    if measured == acting:
        return []
    return [
        f"{EVALUATION} has the calibration error at another temperature or threshold than the adapter has now, so it is not "
        "shown. Measure again: capt-peft evaluate --update_card."
    ]


def _in_words(template: str | Sequence[str] | None) -> str | None:
    """Returns a template as it is, and the first few of several in quotes."""
    if isinstance(template, str | None):
        return template
    quoted = [f'"{text}"' for text in template]
    return f"the mean of {len(template)}: {some(quoted)}"


def _weak_alone(records: Records) -> list[str]:
    """Returns what the robust accuracies were measured with, if none of the attacks is a strong one."""
    attacks = [] if records.results is None else [records.results.evaluation.attack]
    if records.evaluation is not None:
        attacks += [outcome.attack for outcome in records.evaluation.white_box()]
    known = [(known_attack(settings), settings["name"]) for settings in attacks]
    if any(attack is not None and attack.strong for attack, _ in known):
        return []
    return list(dict.fromkeys("PGD" if isinstance(attack, PGD) else name for attack, name in known))


def _measured(records: Records, config: Mapping[str, Any]) -> str:
    """Says which images the figures are of and, where no results say so, which classes and texts they were told apart by."""
    results, evaluation, said = records.results, records.evaluation, []
    if results is not None:
        n, split = results.evaluation.after.clean.n, results.evaluation.split
        said.append(f"{n} images of the {split} split of {results.task.name}")
    if evaluation is not None:
        task, model = evaluation.configuration.get("task") or {}, evaluation.configuration["model"]
        where = (
            f"the {task.get('split', '?')} split of {task.get('name', '?')}" if task else "a data set without a name"
        )
        names, template = model.get("class_names"), model.get("template")
        if results is None and names is not None and names != config.get("class_names"):
            where += f", with {len(names)} classes"
        if results is None and template not in (None, config.get("template")):
            where += f", with the template {_in_words(template)}"
        if results is None and (model.get("class_texts") or {}) != (config.get("class_texts") or {}):
            where += ", with other class texts"
        said.append(f"{evaluation.clean.n} images of {where}")
    return ", and on ".join(dict.fromkeys(said))


def shown_path(name: str | Path, *, hub: bool = False) -> str:
    """Returns a name as a card shows it: of a folder of this machine only the last part; `hub`: of all but Hub ids."""
    text = str(name)
    if text.startswith(("http://", "https://")):
        return text
    local = Path(text).is_absolute() or PureWindowsPath(text).drive or text.startswith(("~", "..", "file:", "\\"))
    if local or (hub and not is_hub_id(text)):
        return Path(text).resolve().name if set(Path(text).name) <= {"."} else PureWindowsPath(text).name
    return text


def card_data(
    records: Records, rows: Sequence[Row], adapter: str, config: Mapping[str, Any], details: CardDetails
) -> ModelCardData:
    """Returns the metadata of a card: its model-index has the accuracies, if the data set that they are of has a name."""
    base = str(details.finetuned_from or config.get("base_model_name_or_path") or "")
    dataset, source, split = None, None, None
    if records.results is not None:
        task, split = records.results.task, records.results.evaluation.split
        dataset, source = task.name, task.source
    elif records.evaluation is not None:
        measured = records.evaluation.configuration.get("task") or {}
        dataset, source, split = (measured.get(key) for key in ("name", "source", "split"))
    # the Hub shows figures without their n, so that of one name only the figure of most images may be there
    shown: dict[str, Row] = {}
    for row in rows:
        name = f"robust accuracy ({row.attack}, {row.threat_model})" if row.attack else "clean accuracy"
        if row.model != "zero-shot" and (name not in shown or _weight(row) > _weight(shown[name])):
            shown[name] = row
    several = len({row.accuracy.n for row in shown.values()}) > 1
    metrics = [
        EvalResult(
            task_type=_TASK,
            dataset_type=_metadata(shown_path(source or dataset)),
            dataset_name=_metadata(shown_path(dataset)),
            dataset_split=None if split is None else _metadata(split),
            metric_type="accuracy",
            metric_name=_metadata(f"{name}, n = {row.accuracy.n}" if several else name),
            metric_value=round(row.accuracy.value, 6),
            metric_args={"n": row.accuracy.n, "interval_95": [round(value, 6) for value in row.accuracy.interval]},
        )
        for name, row in shown.items()
        if dataset
    ]
    kind = peft_name(config).lower()
    tags = [kind, *_TAGS[1:], *details.tags, *details.tasks]
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


def _weight(row: Row) -> tuple[int, float]:
    """Returns what decides between figures of one name: more images, and of as many the lower one."""
    return row.accuracy.n, -row.accuracy.value


def _metadata(text: Any) -> str:
    """Returns a text for the front matter, which some readers render as Markdown: one line without HTML, code and its own end."""
    return re.sub(r"[<>`]|-{3,}", lambda match: {"<": "‹", ">": "›", "`": "'"}.get(match[0], "—"), plain(text, 200))


def _yaml(data: ModelCardData) -> Markdown:
    return Markdown(yaml.safe_dump(data.to_dict(), sort_keys=False, allow_unicode=True, width=100_000).strip())
