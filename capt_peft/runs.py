"""The record of a run, and its table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .attacks.threat import ThreatModel
from .card import EVALUATION, RESULTS, model_card
from .files import write_json, write_text
from .outputs import save_somewhere
from .versions import describe_machine, versions

if TYPE_CHECKING:
    from .training import CaptTrainer

# the files of an adapter; the Trainer's checkpoints and its pickled arguments are none of them
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
) -> dict[str, Any]:
    """Returns the record of a run, with its whole configuration: what `results.json` holds.

    Args:
        trainer: The trainer, after training.
        before: Its evaluation of the frozen model, with `metric_key_prefix="before"`.
        after: Its evaluation of the tuned model, with `metric_key_prefix="after"`.
        method: Name of the method.
        split: Name of the split that was evaluated.
        seconds: Wall time of the training.
    """
    task, args, model = trainer.task, trainer.args, trainer.classifier.model
    return {
        "method": method,
        "seed": args.seed,
        "task": {
            "name": task.name,
            "source": task.source,
            "class_names": list(task.class_names),
            "template": task.template,
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
            "config": model.peft_config[model.active_adapter].to_dict(),
        },
        "configuration": {"training": args.to_sanitized_dict()},
        "versions": versions(),
        "machine": describe_machine(),
    }


def save_run(model: Any, results: dict[str, Any], folder: str | Path, name: str) -> None:
    """Writes the adapter, its results and its card into a folder, each whole or not at all.

    Args:
        model: A `PeftModel`.
        results: The record of the run; the size of the adapter is added.
        folder: Where to write.
        name: Folder or Hub id by which people load it, for the card.

    Raises:
        OSError: It could not be written there; the message says where it is instead.
    """
    folder = Path(folder)

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        results["adapter"]["bytes"] = (temporary / "adapter_model.safetensors").stat().st_size
        results["name"] = name
        write_json(temporary / RESULTS, results)
        write_text(temporary / "README.md", model_card(results, name))

    save_somewhere(folder, write)
    (folder / EVALUATION).unlink(missing_ok=True)  # it was of the adapter before


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Returns the number of trainable and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"trainable": sum(n for n, trains in sizes if trains), "all": sum(n for n, _ in sizes)}


def results_table(results: Mapping[str, Any]) -> str:
    """Returns a Markdown table of clean and robust accuracy before and after the tuning.

    Args:
        results: What `results.json` holds.
    """
    attack = results["evaluation"]["attack"]["name"]
    threat = ThreatModel(**results["evaluation"]["attack"]["threat_model"])
    lines = [f"| | clean | robust ({attack}, {threat}) |", "|---|---|---|"]
    for name, key in (("zero-shot", "before"), (results["method"].upper(), "after")):
        cells = [_percent(results["evaluation"][key][kind]) for kind in ("clean", "robust")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    n = results["evaluation"]["after"]["clean"]["n"]
    return "\n".join(
        [*lines, "", f"n = {n} images of the {results['evaluation']['split']} split; in brackets the 95% interval."]
    )


def _percent(accuracy: Mapping[str, Any]) -> str:
    low, high = accuracy["interval_95"]
    return f"{100 * accuracy['accuracy']:.1f}% ({100 * low:.1f} to {100 * high:.1f})"
