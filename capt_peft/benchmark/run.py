"""Running one cell: tune the adapter, or take it from where it was kept, and measure it on every target."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PrinterCallback, set_seed

from ..attacks import PGD, Attack, parse_attack
from ..clip.classifier import ZeroShotClassifier
from ..evaluation import Evaluation, evaluate
from ..methods import METHODS
from ..results.run import count_parameters
from ..training import CaptTrainer, CaptTrainingArguments
from ..tuner import CaptConfig
from ..tuner.fingerprint import adapter_fingerprint
from ..utils.files import write_json, written_whole
from ..utils.versions import describe_machine, versions
from .inputs import (
    TUNED_WITH,
    Inputs,
    Root,
    _load_task,
    drawn,
    load_base,
    model_digests,
    read_task,
    template_of,
    training_task,
)
from .plan import ZERO_SHOT, Cell, Target

logger = logging.getLogger(__name__)

__all__ = ["Root", "_load_task", "drawn", "run_cell"]

TRAINING = "training.json"
ADAPTER = "adapter_fingerprint"
TUNED_ON = "tuned_on"  # in an adapter's record: the digests of what it was tuned with


def run_cell(cell: Cell, *, adapters: str | Path | None = None, root: Root = None) -> dict[str, Any]:
    """Runs a cell, in all processes of `accelerate launch`.

    Args:
        cell: The cell.
        adapters: Folder where adapters are kept, by what they were tuned with; cells that differ only in what is measured
            share one. None: they are not kept.
        root: Where the data sets of the catalog lie (CoOp's `$DATA`), or the place of each data set by its name; None: the Hub.

    Returns:
        The line of the cell: `status` is "finished", with `results` and `training`, or "failed", with `error`. Only an
        interrupt is raised.
    """
    start = time.perf_counter()
    line = {"key": cell.key, "status": "finished", "cell": cell.to_dict()}
    try:
        line |= _run(cell, adapters, root)
    except Exception as error:
        logger.warning("%s failed: %s", cell, error, exc_info=logger.isEnabledFor(logging.DEBUG))
        line |= {"status": "failed", "error": {"type": type(error).__name__, "message": str(error)}}
    seconds = round(time.perf_counter() - start, 2)
    return line | {"seconds": seconds, "versions": versions(), "machine": describe_machine()}


def _run(cell: Cell, adapters: str | Path | None, root: Root) -> dict[str, Any]:
    base, processor = load_base(cell.model)
    digests = Inputs(root).digests(cell) | model_digests(base, processor)
    model, training, fingerprint = base, None, None
    if cell.method != ZERO_SHOT:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(adapters or temporary) / cell.training_key
            model, training = _adapter(cell, base, processor, folder, digests, root)
        fingerprint = training.pop(ADAPTER)
    results = [_measure(cell, model, processor, target, root) for target in cell.targets]
    return {"results": results, "training": training, **digests, ADAPTER: fingerprint}


# ------------------------------------------------------------------------------------------------------------- tuning


def _adapter(
    cell: Cell, base: nn.Module, processor: Any, folder: Path, digests: Mapping[str, Any], root: Root
) -> tuple[PeftModel, dict[str, Any]]:
    """Returns the base with the cell's adapter on it, and the record of its training with the adapter's fingerprint."""
    needed = {name: digests[name] for name in TUNED_WITH}
    training = _kept_training(folder, needed)
    PartialState().wait_for_everyone()  # or a process could find what another has just written
    if training is not None:
        return PeftModel.from_pretrained(base, str(folder)), training
    model, training = _tune(cell, base, processor, root)
    training[ADAPTER] = adapter_fingerprint(model)
    if PartialState().is_main_process:
        with written_whole(folder) as temporary:
            model.save_pretrained(str(temporary))
            write_json(temporary / TRAINING, training | {TUNED_ON: needed})
    PartialState().wait_for_everyone()
    return model, training


def _kept_training(folder: Path, needed: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the record of an adapter that was kept, if it is whole and was tuned on the same images and weights."""
    if not (folder / TRAINING).exists():
        return None
    try:
        training: dict[str, Any] = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
        tuned_on = training.pop(TUNED_ON, {})
        changed = [name for name in TUNED_WITH if tuned_on.get(name, "") != needed[name]]
        if not changed and adapter_fingerprint(folder) == training[ADAPTER]:
            return training
        why = f"it was tuned with another {', '.join(changed)}" if changed else "its weights are not those recorded"
    except Exception as error:  # however it is damaged: it is written again
        why = f"it is damaged ({type(error).__name__}: {str(error)[:200]})"
    logger.warning("The adapter kept in %s is not used, as %s. It is tuned again.", folder, why)
    return None


def _tune(cell: Cell, base: nn.Module, processor: Any, root: Root) -> tuple[PeftModel, dict[str, Any]]:
    task = training_task(cell, root)
    with tempfile.TemporaryDirectory() as output:
        args = _training_arguments(cell, output)
        set_seed(cell.seed)
        prompts = {**cell.prompts, "template": task.template, "class_names": list(task.class_names)}
        config = CaptConfig(**prompts)
        model = get_peft_model(base, config)
        make = METHODS[cell.method].objective
        assert make is not None  # zero-shot is not tuned
        trainer = CaptTrainer(
            model,
            args,
            task=task,
            processor=processor,
            objective=make(args),
            teacher=cell.settings.get("teacher"),
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
    training = {
        "seconds": round(time.perf_counter() - start, 2),
        "steps": trainer.state.global_step,
        "images": len(task["train"]),
        "processes": args.world_size,
        "collapsed": trainer.collapsed,
        "at_chance": trainer.at_chance,
        "parameters": count_parameters(model)["trainable"],
        "attack": trainer.attack.to_dict(),
        "arguments": non_default(args),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry][-1:],
    }
    return model, training


def _training_arguments(cell: Cell, output: str) -> CaptTrainingArguments:
    settings = {name: value for name, value in cell.settings.items() if name != "teacher"}
    own = {
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": PartialState().device.type == "cpu",
        # a constant model is a result, and leaving it out would favour the method that made it
        "stop_on_collapse": False,
    }
    return CaptTrainingArguments(
        output_dir=output, seed=cell.seed, epsilon=cell.epsilon, norm=cell.norm, **{**own, **settings}
    )


def non_default(args: CaptTrainingArguments) -> dict[str, Any]:
    """Returns the training arguments that differ from their defaults: with the versions, they determine all others."""
    given = args.to_sanitized_dict()
    plain = CaptTrainingArguments(output_dir=args.output_dir, use_cpu=args.use_cpu).to_sanitized_dict()
    hidden = {"output_dir", "logging_dir", "run_name"}
    names = [f.name for f in fields(args) if f.name not in hidden]
    return {name: given[name] for name in names if name in given and given[name] != plain.get(name)}


# ---------------------------------------------------------------------------------------------------------- measuring


def _measure(cell: Cell, model: nn.Module, processor: Any, target: Target, root: Root) -> dict[str, Any]:
    """Returns clean and robust accuracy on one target, white box through the prompts."""
    task = read_task(target.task, target.classes, root)
    template = template_of(cell, task)
    classifier = ZeroShotClassifier(model, processor, task.class_names, template)
    attacks = [_with_step_size(parse_attack(name, cell.threat), cell.eval_step_size) for name in cell.attacks]
    data = drawn(task[cell.split], cell.limit)
    evaluation = evaluate(classifier, data, attacks, seed=cell.seed, signs=False, progress=False)
    return {"task": target.task, "classes": target.classes, "template": template, **_counts(evaluation)}


def _with_step_size(attack: Attack, step_size: float | str | None) -> Attack:
    """Returns the attack with the step size that a cell sets for PGD; FGSM's one step is epsilon."""
    if step_size is None or not isinstance(attack, PGD) or not attack.random_start:
        return attack
    return replace(attack, step_size=step_size)


def _counts(evaluation: Evaluation) -> dict[str, Any]:
    def count(accuracy: Any) -> dict[str, int]:
        return {"correct": accuracy.correct, "n": accuracy.n}

    return {
        "clean": count(evaluation.clean),
        "attacks": {outcome.name: count(outcome.accuracy) for outcome in evaluation.attacks},
        "worst_case": count(evaluation.robust),
    }
