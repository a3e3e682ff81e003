"""The record of a run, and its table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn

from ..attacks.threat import ThreatModel
from ..tuner.fingerprint import SAFETENSORS_NAME, active_adapter, adapter_fingerprint
from ..utils.files import DamagedFileError, make_writable, read_json, write_json
from ..utils.markup import Markdown, escape, table_row
from ..utils.outputs import save_somewhere
from ..utils.versions import describe_machine, versions
from .card import adapter_config, model_card, write_card, write_cards_for
from .earlier import changes, set_aside
from .evaluation import Evaluation
from .records import EVALUATION, RESULTS, check_configuration, check_record, read_records, readable

if TYPE_CHECKING:
    from ..training import CaptTrainer

# the files of an adapter; the Trainer's checkpoints and its pickled arguments are not among them
UPLOADED = ["adapter_model.safetensors", "adapter_config.json", "README.md", RESULTS, EVALUATION]


def accuracies(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns what `CaptTrainer.evaluate` measured, as results hold it.

    Args:
        metrics: Its return value.
        prefix: Its `metric_key_prefix`.
    """
    return {
        kind: {
            "accuracy": metrics[f"{prefix}_{kind}_accuracy"],
            "interval_95": [metrics[f"{prefix}_{kind}_accuracy_{end}"] for end in ("low", "high")],
            "n": metrics[f"{prefix}_n"],
        }
        for kind in ("clean", "robust")
    }


def run_results(
    trainer: CaptTrainer,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    method: str,
    split: str,
    seconds: float,
    shots: int | str | None = None,
) -> dict[str, Any]:
    """Returns the record of a run, with its whole configuration: what `results.json` holds.

    Args:
        trainer: The trainer, after training.
        before: Its evaluation of the frozen model, with `metric_key_prefix="before"`.
        after: Its evaluation of the tuned model, with `metric_key_prefix="after"`.
        method: Name of the method.
        split: Name of the split that was evaluated.
        seconds: Wall time of the training.
        shots: Training images per class, or "all"; None: the record does not say.

    Raises:
        ValueError: The model was trained further since `after` was measured.
    """
    task, args, model = trainer.task, trainer.args, trainer.classifier.model
    _check_measured_last(trainer, after)
    return {
        "method": method,
        "seed": args.seed,
        "task": {
            "name": task.name,
            "source": task.source,
            "class_names": list(task.class_names),
            "template": task.template,
            "shots": shots,
            "training_images": len(task["train"]),
        },
        "evaluation": {
            "split": split,
            "attack": args.evaluation_attack.to_dict(),
            "before": accuracies(before, "before"),
            "after": accuracies(after, "after"),
        },
        "training": {
            "seconds": seconds,
            "attack": trainer.attack.to_dict(),
            "steps": trainer.state.global_step,
            "processes": args.world_size,
            "pixels": trainer.classifier.transform.to_dict(),
        },
        "adapter": {
            "parameters": count_parameters(model),
            "fingerprint": adapter_fingerprint(model),
            "config": model.peft_config[active_adapter(model)].to_dict(),
        },
        "configuration": {"training": args.to_sanitized_dict()},
        "versions": versions(),
        "machine": describe_machine(),
    }


def _check_measured_last(trainer: CaptTrainer, after: Mapping[str, Any]) -> None:
    key = "after_clean_accuracy"
    measured = [entry["step"] for entry in trainer.state.log_history if key in entry and entry[key] == after.get(key)]
    if measured and measured[-1] != trainer.state.global_step:
        raise ValueError(
            f"The accuracies were measured after step {measured[-1]}, but the model was trained to step "
            f"{trainer.state.global_step} since: they are of other weights. Evaluate it again."
        )


def save_run(model: Any, results: dict[str, Any], folder: str | Path, name: str) -> None:
    """Writes the active adapter, its results and its card into a folder, each whole or not at all.

    Args:
        model: A `PeftModel`.
        results: The record of the run, of the model's very weights; the size of the adapter is added.
        folder: Where to write.
        name: Folder or Hub id by which people load it, for the card.

    Raises:
        OSError: It could not be written there; the message says where it is instead.
        ValueError: The results are of other weights, or one of their accuracies cannot be one. Nothing is written.
    """
    folder = Path(folder)

    def write(temporary: Path) -> None:
        with readable(RESULTS):
            save_active_adapter(model, temporary)
            size = (temporary / SAFETENSORS_NAME).stat().st_size
            results["adapter"]["bytes"], results["name"] = size, name
            write_json(temporary / RESULTS, results)
            write_cards_for(temporary, folder, name)

    save_somewhere(folder, write)
    (folder / EVALUATION).unlink(missing_ok=True)  # it was of the adapter before


def check_update(folder: str | Path, configuration: Mapping[str, Any] | None = None) -> None:
    """Refuses, before long work, an evaluation that `update_card` would refuse after it.

    Args:
        folder: Folder of the adapter.
        configuration: Of the evaluation to come: its `task`, and its `model` (`capt_peft.evaluation.subject.describe`). None: not
            compared.

    Raises:
        ValueError: There is no whole CAPT adapter, its results are damaged or of other weights, nothing can be written there, or
            the evaluation is of other weights, on another base, or of other images, classes or texts than the results.
    """
    folder = Path(folder)
    config, fingerprint = adapter_config(folder), adapter_fingerprint(folder)
    results = read_records(folder, fingerprint, names=(RESULTS,)).results
    make_writable(folder, EVALUATION, Path(EVALUATION).with_suffix(".parquet").name, "README.md", given="adapter")
    if configuration is not None:
        check_configuration(configuration, results, fingerprint, config.base_model_fingerprint)


def update_card(folder: str | Path, evaluation: Evaluation) -> Path:
    """Puts an evaluation into an adapter's folder and its card.

    An `evaluation.json` of another configuration that is there is kept under the name `evaluation.old1.json` (`.old2`, ...).

    Args:
        folder: Folder of the adapter.
        evaluation: Measured with the very weights there, and of the same images, classes and texts as the results there.

    Returns:
        The path of the card, README.md.

    Raises:
        ValueError: As for `check_update`. Nothing is written.
    """
    folder = Path(folder)
    path, config, fingerprint = folder / EVALUATION, adapter_config(folder), adapter_fingerprint(folder)
    check_update(folder, evaluation.configuration)
    results = read_records(folder, fingerprint, names=(RESULTS,)).results
    model_card(
        results, folder.name, evaluation.to_dict(), config=config.to_dict(), fingerprint=fingerprint
    )  # or refuses
    if path.exists():
        try:
            changed = changes(evaluation.configuration, read_json(path).get("configuration"))
        except DamagedFileError as error:
            changed = [str(error)]
        if changed:
            set_aside(path, (".json", ".parquet"), changed)
    evaluation.save(path)
    return write_card(folder)


def save_active_adapter(model: Any, folder: Path) -> None:
    """Writes the active adapter of a model into a folder, without a folder of its own where it has a name.

    Args:
        model: A `PeftModel`, or a model of transformers with an adapter.
        folder: An empty folder.
    """
    name = active_adapter(model)
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
    model.save_pretrained(str(folder), selected_adapters=[name])
    if name != "default":  # PEFT's layout
        for path in Path(folder, name).iterdir():
            path.replace(folder / path.name)
        Path(folder, name).rmdir()


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Returns the number of trainable and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"trainable": sum(n for n, trains in sizes if trains), "all": sum(n for n, _ in sizes)}


def results_table(results: Mapping[str, Any]) -> str:
    """Returns a Markdown table of clean and robust accuracy before and after the tuning.

    Args:
        results: What `results.json` holds.

    Raises:
        ValueError: An accuracy cannot be one.
    """
    check_record(results)
    attack = results["evaluation"]["attack"]["name"]
    threat = ThreatModel(**results["evaluation"]["attack"]["threat_model"])
    lines = [table_row(["", "clean", f"robust ({attack}, {threat})"]), "|---|---|---|"]
    for name, key in (("zero-shot", "before"), (results["method"].upper(), "after")):
        cells = [_percent(results["evaluation"][key][kind]) for kind in ("clean", "robust")]
        lines.append(table_row([name, *cells]))
    n, split = results["evaluation"]["after"]["clean"]["n"], escape(results["evaluation"]["split"])
    return Markdown("\n".join([*lines, "", f"n = {n} images of the {split} split; in brackets the 95% interval."]))


def _percent(accuracy: Mapping[str, Any]) -> str:
    low, high = accuracy["interval_95"]
    return f"{100 * accuracy['accuracy']:.1f}% ({100 * low:.1f} to {100 * high:.1f})"
