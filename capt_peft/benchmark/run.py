"""Running one cell: tune the adapter, or take it from where it was kept, and measure it on every target."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, AutoProcessor, PrinterCallback, set_seed

from ..attacks import ThreatModel, parse_attack
from ..classifier import ZeroShotClassifier
from ..data.halves import half
from ..data.loading import list_tasks, load_task
from ..data.task import Task
from ..evaluation import Evaluation, evaluate
from ..files import write_json, written_whole
from ..methods import METHODS
from ..runs import count_parameters
from ..training import CaptTrainer, CaptTrainingArguments
from ..tuner import CaptConfig
from ..tuner.fingerprint import base_fingerprint
from ..versions import describe_machine, versions
from .cells import ZERO_SHOT, Cell, Target

logger = logging.getLogger(__name__)

TRAINING = "training.json"
Root = str | Mapping[str, str] | None


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
    base, processor = _load_base(cell.model)
    fingerprint = base_fingerprint(base)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(adapters or temporary) / cell.training_key
        model, training = base, None
        if cell.method != ZERO_SHOT:
            model, training = _adapter(cell, base, processor, folder, root)
        results = [_measure(cell, model, processor, target, root) for target in cell.targets]
    return {"results": results, "training": training, "base_model_fingerprint": fingerprint}


def _load_base(name: str) -> tuple[nn.Module, Any]:
    # in float32, whatever precision it is stored in: pixel gradients vanish in less
    model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
    return model.to(PartialState().device), AutoProcessor.from_pretrained(name)


def _template(cell: Cell, task: Task) -> str:
    """Returns the text of a class: the same for all data sets where the settings say so, or else the data set's own."""
    return str(cell.prompts.get("template", task.template))


def _task(name: str, classes: str, root: Root) -> Task:
    """Returns a data set of the benchmark, or a half of its classes."""
    place = root.get(name) if isinstance(root, Mapping) else root
    in_catalog = name in list_tasks()
    return _load_task(name if in_catalog or place is None else place, place if in_catalog else None, classes)


@lru_cache(maxsize=32)
def _load_task(name: str, root: str | None, classes: str) -> Task:
    task = load_task(name, root=root)
    return task if classes == "all" else half(task, classes)


# ------------------------------------------------------------------------------------------------------------- tuning


def _adapter(cell: Cell, base: nn.Module, processor: Any, folder: Path, root: Root) -> tuple[PeftModel, dict[str, Any]]:
    """Returns the base with the cell's adapter on it, and the record of its training."""
    kept = (folder / TRAINING).exists()
    PartialState().wait_for_everyone()  # or a process could find what another has just written
    if kept:
        training: dict[str, Any] = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
        return PeftModel.from_pretrained(base, str(folder)), training
    model, training = _tune(cell, base, processor, root)
    if PartialState().is_main_process:
        with written_whole(folder) as temporary:
            model.save_pretrained(str(temporary))
            write_json(temporary / TRAINING, training)
    PartialState().wait_for_everyone()
    return model, training


def _tune(cell: Cell, base: nn.Module, processor: Any, root: Root) -> tuple[PeftModel, dict[str, Any]]:
    task = _task(cell.task, cell.train_classes, root)
    if cell.shots != "all":
        task = task.few_shot(int(cell.shots), cell.seed)
    task = replace(task, template=_template(cell, task))
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
    task = _task(target.task, target.classes, root)
    template = _template(cell, task)
    classifier = ZeroShotClassifier(model, processor, task.class_names, template)
    threat = ThreatModel(cell.norm, cell.epsilon)
    attacks = []
    for name in cell.attacks:
        step_size = cell.eval_step_size if name.startswith("pgd") else None
        attacks.append(parse_attack(name, threat, step_size=step_size))
    data = drawn(task[cell.split], cell.limit)
    evaluation = evaluate(classifier, data, attacks, seed=cell.seed, signs=False, progress=False)
    return {"task": target.task, "classes": target.classes, "template": template, **_counts(evaluation)}


def drawn(data: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """Returns `limit` images of a split, drawn by seed 0, the same for all methods; all of them for None."""
    return data if limit is None else data.shuffle(seed=0).select(range(min(limit, len(data))))


def _counts(evaluation: Evaluation) -> dict[str, Any]:
    def count(accuracy: Any) -> dict[str, int]:
        return {"correct": accuracy.correct, "n": accuracy.n}

    return {
        "clean": count(evaluation.clean),
        "attacks": {outcome.name: count(outcome.accuracy) for outcome in evaluation.attacks},
        "worst_case": count(evaluation.robust),
    }
