"""The record of a run, and which records are of the very weights of an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from torch import nn

from ..attacks import ThreatModel
from ..tuner.fingerprint import SAFETENSORS_NAME, adapter_fingerprint
from ..tuner.others import peft_name, settings_of
from ..tuner.switching import active_adapter
from ..utils.files import read_json
from ..utils.machine import describe_machine, versions
from ..utils.markup import Markdown, escape, plain, table_row
from .accuracy import Accuracy, known_fields, readable
from .evaluation import EVALUATION, Evaluation
from .strength import STRENGTH, StrengthFront

RESULTS = "results.json"
# the training arguments that a card shows
_SHOWN = ("optim", "learning_rate", "num_train_epochs", "per_device_train_batch_size")


# ------------------------------------------------------------------------------------------------------ the record of a run


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """What a run was tuned on; `shots` are training images per class or "all", None where the record does not say."""

    name: str
    source: str
    class_names: list[str]
    template: str | list[str] | None = None
    class_texts: Mapping[str, list[str]] | None = None
    shots: int | str | None = None
    training_images: int


@dataclass(frozen=True)
class Accuracies:
    """Clean and robust accuracy of the same images.

    Raises:
        FigureError: More images are robust than clean, or not as many were measured.
    """

    clean: Accuracy
    robust: Accuracy

    def __post_init__(self) -> None:
        self.robust.check_at_most(self.clean, "has robust and clean accuracy of")

    @classmethod
    def of(cls, measured: Evaluation | Mapping[str, Any], prefix: str) -> Accuracies:
        """Returns those of an evaluation, or of the metrics of `CaptTrainer.evaluate`, whose names have a prefix."""
        if isinstance(measured, Evaluation):
            return cls(measured.clean, measured.robust)
        n, shares = measured[f"{prefix}_n"], [measured[f"{prefix}_{kind}_accuracy"] for kind in ("clean", "robust")]
        return cls(*(Accuracy(round(share * n), n) for share in shares))


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """How accurate the frozen and the tuned model are, under which attack; `task` is named where it is not the run's."""

    task: str | None = None
    split: str
    attack: Mapping[str, Any]
    before: Accuracies
    after: Accuracies


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """How it was tuned: seconds, the settings of attack and objective, steps, processes, and how images became pixels."""

    seconds: float
    attack: Mapping[str, Any]
    objective: Mapping[str, Any] | None = None
    steps: int | None = None
    processes: int
    pixels: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """The adapter: its number of parameters, fingerprint, configuration and, once it is saved, bytes."""

    parameters: Mapping[str, int]
    fingerprint: str | None = None
    config: Mapping[str, Any] | None = None
    bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """The record of a run with its whole configuration: what `results.json` holds, by the same names.

    Attributes:
        method: Name of the method.
        seed: Seed of the run.
        task: What it was tuned on.
        evaluation: What was measured before and after.
        training: How it was tuned.
        adapter: The adapter; None where a whole model was tuned.
        parameters: Number of trainable and of all parameters, where there is no adapter.
        configuration: The arguments of the training and, where there was one, of the script.
        versions: Versions of the libraries.
        machine: What it ran on.
        name: Folder or Hub id by which people load the adapter, once it is saved.
    """

    method: str
    seed: int
    task: TaskRecord
    evaluation: EvaluationRecord
    training: TrainingRecord
    adapter: AdapterRecord | None = None
    parameters: Mapping[str, int] | None = None
    configuration: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: str
    name: str | None = None

    @classmethod
    def of(
        cls,
        trainer: Any,
        before: Evaluation | Mapping[str, Any],
        after: Evaluation | Mapping[str, Any],
        *,
        method: str,
        split: str,
        seconds: float,
        shots: int | str | None = None,
        script: Mapping[str, Any] | None = None,
        measured: str | None = None,
    ) -> RunResults:
        """Returns the record of a run.

        Args:
            trainer: The `CaptTrainer`, after training.
            before: Its evaluation of the frozen model, with `metric_key_prefix="before"`; or that of `capt_peft.evaluate`.
            after: The same of the tuned model, with `metric_key_prefix="after"`.
            method: Name of the method.
            split: Name of the split that was evaluated.
            seconds: Wall time of the training.
            shots: Training images per class, or "all"; None: the record does not say.
            script: The arguments of the script that runs it, in JSON types.
            measured: Name of the task that was evaluated, where it is not the trainer's.

        Raises:
            ValueError: The model was trained further since `after` was measured.
        """
        task, args, model = trainer.task, trainer.args, trainer.classifier.model
        if not isinstance(after, Evaluation):
            _check_measured_last(trainer, after)
        parameters, adapters = count_parameters(model), getattr(model, "peft_config", None)
        adapter = None
        if adapters:
            config = settings_of(adapters[active_adapter(model)])
            adapter = AdapterRecord(parameters=parameters, fingerprint=adapter_fingerprint(model), config=config)
        return cls(
            method=method,
            seed=args.seed,
            task=TaskRecord(
                name=task.name,
                source=task.source,
                class_names=list(task.class_names),
                template=task.template,
                class_texts=task.class_texts,
                shots=shots,
                training_images=len(task["train"]),
            ),
            evaluation=EvaluationRecord(
                task=measured,
                split=split,
                attack=args.evaluation_attack.to_dict(),
                before=Accuracies.of(before, "before"),
                after=Accuracies.of(after, "after"),
            ),
            training=TrainingRecord(
                seconds=seconds,
                attack=trainer.attack.to_dict(),
                objective=plain_settings(trainer.objective),
                steps=trainer.state.global_step,
                processes=args.world_size,
                pixels=trainer.classifier.transform.to_dict(),
            ),
            adapter=adapter,
            parameters=None if adapter else parameters,
            configuration={"training": args.to_sanitized_dict(), **({} if script is None else {"script": script})},
            versions=versions(),
            machine=describe_machine(),
        )

    @property
    def label(self) -> str:
        """The method and, of an adapter of another PEFT method than CAPT, that: "capt", "capt, LoRA"."""
        kind = "CAPT" if self.adapter is None else peft_name(self.adapter.config or {})
        return self.method if kind == "CAPT" else f"{self.method}, {kind}"

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The training arguments."""
        return self.configuration["training"]

    @property
    def objective(self) -> dict[str, Any]:
        """The settings of the objective; older records have those of the arguments, whether the objective used them or not."""
        used = self.training.objective
        settings = {name: self.arguments[name] for name in ("consistency", "weighting")} if used is None else dict(used)
        words = {"consistency": "consistency (λ)", "frozen_term": "frozen term"}
        return {words.get(name, name): value for name, value in settings.items()}

    @property
    def length(self) -> str:
        """How long it was tuned: the steps that were run, and the epochs that were planned where `max_steps` did not decide."""
        steps, most = self.training.steps, self.arguments.get("max_steps", -1)
        run = [] if steps is None else [f"{steps:,} step{'' if steps == 1 else 's'}"]
        if most <= 0:
            return ", ".join([*run, f"{self.arguments['num_train_epochs']:g} epochs planned"])
        return run[0] if run else f"{most:,} steps planned"

    @property
    def fingerprint(self) -> str | None:
        """The adapter's fingerprint; None where the record does not say."""
        return None if self.adapter is None else self.adapter.fingerprint

    @property
    def strength(self) -> float:
        """The adapter's strength at which accuracy was measured; older records are of strength 1."""
        config = None if self.adapter is None else self.adapter.config
        return float((config or {}).get("strength", 1.0))

    def at_strength(self, after: Evaluation, strength: float, fingerprint: str) -> RunResults:
        """Returns the record of the same run with its adapter at another strength.

        Args:
            after: Measured at that strength, under the run's attack and on the same images as before.
            strength: The strength.
            fingerprint: The adapter's fingerprint at that strength.

        Raises:
            ValueError: There is no adapter, or other images were measured.
        """
        if self.adapter is None or after.clean.n != self.evaluation.before.clean.n:
            raise ValueError(
                f"{after.clean.n} images were measured; {RESULTS} has the figures of {self.evaluation.before.clean.n}, of an "
                "adapter. Give the data that it was measured on."
            )
        config = {**(self.adapter.config or {}), "strength": strength}
        return replace(
            self,
            evaluation=replace(self.evaluation, after=Accuracies.of(after, "")),
            adapter=replace(self.adapter, fingerprint=fingerprint, config=config),
        )

    def table(self) -> str:
        """Returns a Markdown table of clean and robust accuracy before and after the tuning."""
        measured = self.evaluation
        attack = f"{measured.attack['name']}, {ThreatModel(**measured.attack['threat_model'])}"
        lines = [table_row(["", "clean, %", f"robust ({attack}), %"]), "|---|---|---|"]
        tuned = self.label.replace(self.method, self.method.upper(), 1)
        for name, both in (("zero-shot", measured.before), (tuned, measured.after)):
            lines.append(table_row([name, both.clean.percent, both.robust.percent]))
        n, split = measured.after.clean.n, escape(measured.split)
        return Markdown("\n".join([*lines, "", f"n = {n} images of the {split} split; in brackets the 95% interval."]))

    def to_dict(self) -> dict[str, Any]:
        """Returns everything that is known, in JSON types."""
        return _json(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RunResults:
        """Reads what `to_dict` returned.

        Raises:
            ValueError: A figure cannot be true. What has another shape raises a KeyError, TypeError or AttributeError.
        """
        measured, adapter = dict(content["evaluation"]), content.get("adapter")
        for when in ("before", "after"):
            pair = (Accuracy.from_dict(measured[when][kind]) for kind in ("clean", "robust"))
            measured[when] = Accuracies(*pair)
        parts = {
            "task": known_fields(TaskRecord, content["task"]),
            "evaluation": known_fields(EvaluationRecord, measured),
            "training": known_fields(TrainingRecord, content["training"]),
            "adapter": None if adapter is None else known_fields(AdapterRecord, adapter),
        }
        results = known_fields(cls, {**content, **parts})
        for attack in (results.evaluation.attack, results.training.attack):  # what follows raises where a card would
            _ = "" + attack["name"], ThreatModel(**attack["threat_model"])
        counts = (results.adapter.parameters if results.adapter else results.parameters) or {}
        size = None if results.adapter is None else results.adapter.bytes
        _ = f"{0 if size is None else size:d}"
        _ = f"{counts['trainable']:,} {results.training.seconds:.0f} {results.training.processes:d}"
        _ = (
            len(results.task.class_names),
            results.versions.items(),
            [results.arguments[name] for name in _SHOWN],
            results.objective,
            results.length,
        )
        return results

    @classmethod
    def load(cls, path: str | Path) -> RunResults:
        """Reads a `results.json`.

        Args:
            path: The file, or its folder.

        Raises:
            DamagedFileError: It holds something else, or a figure that cannot be true.
            FileNotFoundError: There is no such file.
        """
        path = Path(path, RESULTS) if Path(path).is_dir() else Path(path)
        with readable(path):
            return cls.from_dict(read_json(path))


def plain_settings(thing: Any) -> dict[str, Any]:
    """Returns the public attributes of an object that are words, numbers or None: what an objective was made with."""
    kinds = str | int | float | None
    return {k: v for k, v in getattr(thing, "__dict__", {}).items() if isinstance(v, kinds) and not k.startswith("_")}


def _json(value: Any) -> Any:
    if isinstance(value, Accuracy):
        return value.to_dict()
    if not is_dataclass(value):
        return value
    entries = ((field.name, getattr(value, field.name)) for field in fields(value))
    return {name: _json(entry) for name, entry in entries if entry is not None}


def _check_measured_last(trainer: Any, after: Mapping[str, Any]) -> None:
    key = "after_clean_accuracy"
    measured = [entry["step"] for entry in trainer.state.log_history if key in entry and entry[key] == after.get(key)]
    if measured and measured[-1] != trainer.state.global_step:
        raise ValueError(
            f"The accuracies were measured after step {measured[-1]}, but the model was trained to step "
            f"{trainer.state.global_step} since: they are of other weights. Evaluate it again."
        )


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Returns the number of trainable and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"trainable": sum(n for n, trains in sizes if trains), "all": sum(n for n, _ in sizes)}


# ------------------------------------------------------------------------------------------- records and the weights they are of


class RecordError(ValueError):
    """A record of other weights, or of other images than the results beside it."""


@dataclass(frozen=True)
class Records:
    """The records of an adapter that are of its very weights.

    Attributes:
        results: Its run; None if there is no record of it, or it is not shown.
        evaluation: Its evaluation; None as above.
        front: Its accuracy over strengths; None as above.
        run: The run that tuned it, also where accuracy was measured at another strength than the adapter has.
        unshown: For each record that is there but not shown, a sentence that says why.
    """

    results: RunResults | None = None
    evaluation: Evaluation | None = None
    unshown: tuple[str, ...] = ()
    front: StrengthFront | None = None
    run: RunResults | None = None

    @classmethod
    def read(
        cls,
        folder: str | Path,
        fingerprint: str | None,
        base: str | None = None,
        *,
        names: Sequence[str] = (RESULTS, EVALUATION, STRENGTH),
        strict: bool = True,
        weights: str | Path | None = None,
    ) -> Records:
        """Reads the records in an adapter's folder.

        Args:
            folder: Folder of the adapter.
            fingerprint: The adapter's (`adapter_fingerprint`); None: unknown, so that no record is shown.
            base: The base model's fingerprint, as the adapter's configuration names it; None: not compared.
            names: Which records to read.
            strict: Raise a ValueError for a record that is damaged or of other weights; False: leave it out and say why. Figures
                of another strength are left out in any case.
            weights: Where the adapter is, if not in the folder of its records.
        """
        found: dict[str, Any] = {}
        run, unshown = None, []

        def of(strength: float, own: str | None) -> str | None:
            """Returns the adapter's fingerprint at a strength; `own` is that of a record."""
            whole = Path(weights or folder, SAFETENSORS_NAME).is_file()
            if fingerprint in (None, own) or not whole:
                return fingerprint
            return adapter_fingerprint(weights or folder, strength=strength)

        for name in (name for name in names if Path(folder, name).is_file()):
            path = Path(folder, name)
            try:
                if name == RESULTS:
                    found[name] = RunResults.load(path)
                    at, own = found[name].strength, found[name].fingerprint
                    reason = _why_other_weights(name, own, of(at, own)) or _why_other_strength(
                        name, at, own, fingerprint, Path(weights or folder)
                    )
                    run = found[name] if own is not None and fingerprint is not None else None
                elif name == STRENGTH:
                    found[name] = StrengthFront.load(path)
                    own = found[name].fingerprint
                    reason = _why_other_weights(name, own, of(1, own))
                else:
                    found[name] = Evaluation.load(path, with_examples=False)
                    reason = why_unshown(found[name].configuration, fingerprint, base, found.get(RESULTS))
            except ValueError as error:
                reason = str(error).replace(str(path), name)
                if strict:
                    raise RecordError(f"In {folder}: {reason}") from error
            if reason is not None:
                found.pop(name, None)
                unshown.append(reason)
        return cls(found.get(RESULTS), found.get(EVALUATION), tuple(unshown), found.get(STRENGTH), run)


def why_unshown(
    configuration: Mapping[str, Any], fingerprint: str | None, base: str | None, results: RunResults | None
) -> str | None:
    """Returns why the figures of an evaluation are not shown with an adapter, or None if they are.

    Raises a ValueError if they are not of this adapter, on this base, and of the images, classes and texts of the results.
    """
    with readable(EVALUATION):
        model, task = dict(configuration.get("model") or {}), dict(configuration.get("task") or {})
        adapter, names = dict(model.get("adapter") or {}), list(model.get("class_names") or [])
        measured_on = model["base"]["fingerprint"] if adapter else None
    if not adapter:
        raise RecordError("The evaluation is not one of a CAPT adapter: measure it with capt-peft evaluate --adapter.")
    if len(model.get("adapters", [])) > 1:
        raise RecordError(
            f"{EVALUATION} was measured with several adapters at once: its figures are of none of them alone."
        )
    if reason := _why_other_weights(EVALUATION, adapter.get("fingerprint"), fingerprint):
        return reason
    if base is not None and measured_on not in (None, base):
        raise RecordError(
            f"{EVALUATION} was measured on another base model: its fingerprint is {plain(measured_on, 40)}, the adapter is for "
            f"{base}. Measure in float32 on the base that the adapter was tuned on, or remove {EVALUATION}."
        )
    if results is None:
        return None
    if not task:
        return (
            f"{EVALUATION} does not say which data set and split its figures are of, so they are not shown beside those of "
            f"{RESULTS}. Measure again with capt-peft evaluate, or with evaluate(..., details={{'task': ...}})."
        )
    pairs: dict[str, tuple[Any, Any]] = {
        "other classes": (names, results.task.class_names),
        "another template": (model.get("template"), results.task.template),
        "other class texts": (model.get("class_texts") or {}, results.task.class_texts or {}),
        "other pixels": (model.get("pixels"), results.training.pixels),
        "another data set": (task.get("name"), results.task.name),
        "another source of the data": (task.get("source"), task.get("source") and results.task.source),
        "another split": (task.get("split"), results.evaluation.split),
    }
    for what, (own, other) in pairs.items():
        if other not in (None, "") and json.dumps(own, sort_keys=True) != json.dumps(other, sort_keys=True):
            raise RecordError(
                f"{EVALUATION} was measured with {what} than {RESULTS}: {plain(own, 80)}, not {plain(other, 80)}. A card "
                "compares figures of the same kind alone: keep this evaluation under another name, without --update_card."
            )
    return None


def _why_other_strength(
    name: str, strength: float, own: str | None, fingerprint: str | None, adapter: Path
) -> str | None:
    if own == fingerprint:
        return None
    stored = read_json(adapter / CONFIG_NAME).get("strength", 1.0)
    return (
        f"{name} has the figures of strength {strength:g}, and the adapter is stored with strength {stored!r}, so they are not "
        f"shown. Measure again: capt-peft strength ADAPTER --set {stored!r}."
    )


def _why_other_weights(name: str, own: str | None, fingerprint: str | None) -> str | None:
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
    return None
