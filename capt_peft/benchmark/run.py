"""Running cells: each tunes an adapter, or takes the one that was kept, and is measured on every target.

Of a plan, what is finished is skipped, what fails is recorded, and what ends is written at once.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, set_seed

from ..attacks import ThreatModel
from ..clip.classifier import ZeroShotClassifier
from ..defences import Defended, parse_defence
from ..evaluation import evaluate
from ..methods import make_trainer
from ..results.accuracy import Accuracy
from ..results.defence import WithoutDefence
from ..results.run import count_parameters
from ..training import CaptTrainer, CaptTrainingArguments
from ..tuner.fingerprint import adapter_fingerprint
from ..utils.files import make_writable, write_json, written_whole
from ..utils.machine import describe_machine, versions
from ..utils.outputs import OutputLock, main_process_says
from .cost import duration, passes
from .inputs import TUNED_WITH, Inputs, Root, _load_task, drawn, load_base, read_task, template_of, training_task
from .lines import Lines, is_whole
from .plan import Cell, Target
from .workers import BACKENDS, run_in_workers

logger = logging.getLogger(__name__)

TRAINING = "training.json"
ADAPTER = "adapter_fingerprint"
Tune = Callable[[Cell, nn.Module, Any, Root], tuple[PeftModel, dict[str, Any]]]  # as `tune_adapter`
TUNED_ON = "tuned_on"  # in an adapter's record: the digests of what it was tuned with
TAKEN = "taken"  # by another process
_POLL_SECONDS = 1.0


def tune_adapter(
    cell: Cell,
    base: nn.Module,
    processor: Any,
    root: Root = None,
    *,
    change: Callable[[CaptTrainer], object] | None = None,
) -> tuple[PeftModel, dict[str, Any]]:
    """Tunes the adapter of a cell, in all processes of `accelerate launch`.

    Args:
        cell: The cell, of a method that tunes something.
        base: The CLIP, on which the adapter is put.
        processor: Its processor.
        root: See `run_cell`.
        change: Called with the trainer before it trains, to give it another objective, attack or callback; None: nothing.

    Returns:
        The tuned model, and the `training` of the cell's line.
    """
    task = training_task(cell, root)
    with tempfile.TemporaryDirectory() as output:
        args = training_arguments(cell, output)
        set_seed(cell.seed)
        trainer = make_trainer(
            cell.method, base, args, task=task, processor=processor, prompts=cell.prompts, teacher=cell.settings.get("teacher")
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if change is not None:
            change(trainer)
        start = time.perf_counter()
        trainer.train()
    model: Any = trainer.model
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


def run_cell(
    cell: Cell, *, adapters: str | Path | None = None, root: Root = None, tune: Tune = tune_adapter
) -> dict[str, Any]:
    """Runs a cell, in all processes of `accelerate launch`.

    Args:
        cell: The cell.
        adapters: Folder where adapters are kept, by what they were tuned with; cells that differ only in what is measured
            share one. None: they are not kept.
        root: Where the data sets of the catalog lie (CoOp's `$DATA`), or the place of each data set by its name; None: the Hub.
        tune: Tunes the adapter, unless one is kept, in place of `tune_adapter`. What the result depends on must be in the cell.

    Returns:
        The line of the cell: `status` is "finished", with `results` and `training`, or "failed", with `error`. Only an
        interrupt is raised.
    """
    start = time.perf_counter()
    line = {"key": cell.key, "status": "finished", "cell": cell.to_dict()}
    try:
        line |= _run(cell, adapters, root, tune)
    except Exception as error:
        logger.warning("%s failed: %s", cell, error, exc_info=logger.isEnabledFor(logging.DEBUG))
        line |= {"status": "failed", "error": {"type": type(error).__name__, "message": str(error)}}
    seconds = round(time.perf_counter() - start, 2)
    return line | {"seconds": seconds, "versions": versions(), "machine": describe_machine()}


def _run(cell: Cell, adapters: str | Path | None, root: Root, tune: Tune) -> dict[str, Any]:
    base, processor = load_base(cell.model)
    digests = Inputs(root).digests(cell, (base, processor))
    model, training, fingerprint = base, None, None
    if cell.tuned:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(adapters or temporary) / cell.training_key
            model, training = _adapter(base, folder, digests, lambda: tune(cell, base, processor, root))
        fingerprint = training.pop(ADAPTER)
    results = [measure(cell, model, processor, target, root) for target in cell.targets]
    return {"results": results, "training": training, **digests, ADAPTER: fingerprint}


# ------------------------------------------------------------------------------------------------------------- tuning


def _adapter(
    base: nn.Module, folder: Path, digests: Mapping[str, Any], tune: Callable[[], tuple[PeftModel, dict[str, Any]]]
) -> tuple[PeftModel, dict[str, Any]]:
    """Returns the base with an adapter on it, kept or tuned now, and the record of its training with its fingerprint."""
    needed = {name: digests[name] for name in TUNED_WITH}
    training = _kept_training(folder, needed)
    PartialState().wait_for_everyone()  # or a process could find what another has just written
    if training is not None:
        return PeftModel.from_pretrained(base, str(folder)), training
    model, training = tune()
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


def training_arguments(cell: Cell, output: str) -> CaptTrainingArguments:
    """Returns what the adapter of a cell is tuned with, in a folder; a ValueError says what is wrong with the cell's settings."""
    settings = {name: value for name, value in cell.settings.items() if name != "teacher"}
    own = {"save_strategy": "no", "disable_tqdm": True, "use_cpu": PartialState().device.type == "cpu"}
    own["stop_on_collapse"] = False  # a constant model is a result, and leaving it out would favour its method
    return CaptTrainingArguments(output, seed=cell.seed, epsilon=cell.epsilon, norm=cell.norm, **{**own, **settings})


def non_default(args: CaptTrainingArguments) -> dict[str, Any]:
    """Returns the training arguments that differ from their defaults: with the versions, they determine all others."""
    given = args.to_sanitized_dict()
    plain = CaptTrainingArguments(output_dir=args.output_dir, use_cpu=args.use_cpu).to_sanitized_dict()
    hidden = {"output_dir", "logging_dir", "run_name"}
    names = [f.name for f in fields(args) if f.name not in hidden]
    return {name: given[name] for name in names if name in given and given[name] != plain.get(name)}


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(cell: Cell, model: nn.Module, processor: Any, target: Target, root: Root = None) -> dict[str, Any]:
    """Returns one of the `results` of a cell's line: clean and robust accuracy, white box through the prompts.

    Args:
        cell: The cell, which says of which images and under which attacks.
        model: The CLIP, with the cell's adapter if it tunes one.
        processor: Its processor.
        target: What it is measured on.
        root: See `run_cell`.
    """
    task = read_task(target.task, target.classes, root)
    template = template_of(cell, task)
    classifier = ZeroShotClassifier(model, processor, task.class_names, template, class_texts=task.class_texts)
    data, named = drawn(task[cell.split], cell.images_in(target.task)), cell.evaluation_protocol
    measured = Defended(classifier, parse_defence(cell.defence)) if cell.defence else classifier
    evaluation = evaluate(
        measured, data, cell.parsed_attacks(), seed=cell.seed, signs=False, protocol=named, progress=False
    )
    figure, without = evaluation.by_protocol(cell.threat), evaluation.undefended
    return {
        "task": target.task,
        "classes": target.classes,
        "template": template,
        "clean": _count(evaluation.clean),
        "attacks": {outcome.name: _count(outcome.accuracy) for outcome in evaluation.attacks},
        "worst_case": _count(evaluation.robust),
        **({} if figure is None else {"by_protocol": _count(figure)}),
        **({} if without is None else {"undefended": _without(without, cell.threat)}),
    }


def _without(without: WithoutDefence, threat: ThreatModel) -> dict[str, Any]:
    return {
        "clean": _count(without.clean),
        "worst_case": _count(without.worst_case[threat]),
        "forwards": without.forwards,
    }


def _count(accuracy: Accuracy) -> dict[str, int]:
    several = {} if accuracy.decisions == 1 else {"decisions": accuracy.decisions}
    return {"correct": accuracy.correct, "n": accuracy.n, **several}


# ------------------------------------------------------------------------------------------------------------ one plan


def run_cells(
    cells: Sequence[Cell],
    output: str | Path,
    *,
    backend: str = "loky",
    workers: int = 1,
    root: Root = None,
    tune: Tune = tune_adapter,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Runs the cells that are not finished, and appends a line for each to a file as soon as it ends.

    Under `accelerate launch`, all processes run each cell together. Calls with the same output share the cells: each is run by
    one of them, and all wait for the last. Killed at any point, a call loses the cells that were running, and a worker that is
    killed loses one; failed and lost cells run again on the next call. Adapters are kept beside the file, in a folder of its
    name with ".adapters" at the end, and used again by cells that differ only in what is measured.

    Args:
        cells: What to run.
        output: The file of lines.
        backend: "loky" (this machine), "ray" or "dask" (the cluster that is named by `RAY_ADDRESS` or
            `DASK_SCHEDULER_ADDRESS`, or else this machine). All machines need `output` on a shared disk.
        workers: Cells at a time; 1 with loky: in this process.
        root: See `run_cell`.
        tune: See `run_cell`.
        progress: Show a progress bar.

    Returns:
        The lines of these cells, by key; failed cells have a line too.

    Raises:
        ValueError: An unknown backend, less than one worker, an output that cannot be written, or damaged lines.
        ImportError: The library of the backend is not installed.
    """
    # Accelerate does not see by itself that torchrun's processes have no GPU, and each would run all cells alone
    state, lines = PartialState(cpu=not torch.accelerator.is_available()), Lines(output)
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}. Allowed: {', '.join(BACKENDS)}.")
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1.")
    here = backend == "loky" and workers == 1
    if state.num_processes > 1 and not here:
        raise ValueError("Several processes run each cell together: use either `accelerate launch` or workers.")
    main_process_says(lambda: make_writable(lines.path.parent, lines.path.name))
    _load_task.cache_clear()  # a data set may have changed since an earlier call of this process
    todo = main_process_says(lambda: _unfinished(cells, lines.read(), root))
    run = partial(_run_claimed, output=lines.path.absolute(), root=root, tune=tune)
    while todo:
        with tqdm(
            total=len(todo), desc="benchmark", unit="cell", disable=not (progress and state.is_main_process)
        ) as bar:
            if here:
                ended = []
                for one in todo:
                    bar.set_postfix_str(str(one[0]))
                    ended.append(run(one))
                    bar.update()
            else:
                died = partial(_died, output=lines.path.absolute())
                ended = run_in_workers(run, died, todo, backend, workers, lambda count: bar.update(count - bar.n))
        todo = [one for one, status in zip(todo, ended, strict=True) if status == TAKEN]
        while todo and main_process_says(partial(_all_taken, todo, lines.path)):
            time.sleep(_POLL_SECONDS)
    state.wait_for_everyone()
    found = lines.read()
    return {cell.key: found[cell.key] for cell in cells if cell.key in found}


def _run_claimed(one: tuple[Cell, Any], output: Path, root: Root, tune: Tune) -> str:
    """Runs a cell and appends its line, unless another process does, or has since the line that is given with it was read.

    Returns the status of the line, or `TAKEN`.
    """
    (cell, before), lines, claims = one, Lines(output), []

    def ended() -> str | None:
        claims.append(_claim(cell, output))
        if claims[0] is None:
            return TAKEN
        line = lines.read().get(cell.key)
        return None if line is None or line == before else str(line["status"])

    try:
        status: str | None = main_process_says(ended)
        if status is None:
            line = run_cell(cell, adapters=output.with_suffix(".adapters"), root=root, tune=tune)
            if PartialState().is_main_process:
                lines.append(line)
            status = str(line["status"])
        return status
    finally:
        for claim in filter(None, claims):
            claim.release()


def _claim(cell: Cell, output: Path) -> OutputLock | None:
    try:
        return OutputLock(output.parent, f"{output.name}, {cell.key}")
    except ValueError:
        return None


def _all_taken(todo: Sequence[tuple[Cell, Any]], output: Path) -> bool:
    return all(_claim(cell, output) is None for cell, _ in todo)


def _died(one: tuple[Cell, Any], output: Path) -> str:
    """Appends the line of a cell whose process was killed."""
    cell = one[0]
    why = "Its process was killed, perhaps because memory ran out. The next call runs it again."
    error = {"status": "failed", "cell": cell.to_dict(), "error": {"type": "WorkerDied", "message": why}}
    Lines(output).append({"key": cell.key, **error, "seconds": 0.0, "versions": versions(), "machine": "unknown"})
    return "failed"


def _states(cells: Sequence[Cell], lines: Mapping[str, Mapping[str, Any]], root: Root) -> list[str]:
    """Returns "finished", "failed" or "to run" for each cell, or "changed" for a finished line that does not hold any more."""
    inputs, states = Inputs(root), []
    for cell in cells:
        line = lines.get(cell.key, {})
        state = str(line.get("status", "to run"))
        states.append("changed" if state == "finished" and not _holds(line, cell, inputs) else state)
    return states


def _holds(line: Mapping[str, Any], cell: Cell, inputs: Inputs) -> bool:
    """Returns whether a line has all figures of a cell, of the same images and weights as there are now."""
    if not is_whole(line, cell) or "measured_data" not in line:
        return False
    try:
        now = inputs.digests(cell)
    except Exception as error:
        raise ValueError(
            f"Whether the finished line of {cell} still holds cannot be told, as its images or weights cannot be read: "
            f"{str(error)[:500]} Make them readable, leave the cell out, or write to another output."
        ) from error
    return all(line.get(name) == value for name, value in now.items())


def _unfinished(cells: Sequence[Cell], lines: Mapping[str, Any], root: Root) -> list[tuple[Cell, Any]]:
    """Returns the cells that have to run, each with its line so far."""
    states = _states(cells, lines, root)
    again = [cell for cell, state in zip(cells, states, strict=True) if state == "changed"]
    if again:
        logger.warning(
            "%d finished lines are damaged, of other images or weights than there are now, or do not say of which; their "
            "cells run again, the first of them %s.", len(again), again[0],
        )  # fmt: skip
    return [(cell, lines.get(cell.key)) for cell, state in zip(cells, states, strict=True) if state != "finished"]


def listing(cells: Sequence[Cell], output: str | Path, workers: int = 1, *, root: Root = None) -> str:
    """Returns what would run, a line for each cell, and how long it should take at the pace of those that have run.

    Cells whose line is damaged, of other images or weights, or of unknown ones are "changed", and would run again.

    Args:
        cells: All cells.
        output: The file of lines.
        workers: Cells at a time.
        root: See `run_cell`.
    """
    lines = Lines(output).read()
    states = _states(cells, lines, root)
    ended = [cell for cell, state in zip(cells, states, strict=True) if state in ("finished", "changed")]
    pace = sum(lines[cell.key]["seconds"] for cell in ended) / max(1, sum(map(passes, ended)))
    seconds = [pace * passes(cell) for cell in cells]
    rows = [
        f"{cell.key}  {state:8}  {duration(length) if ended else '?':>7}  {cell}"
        for cell, state, length in zip(cells, states, seconds, strict=True)
    ]
    left = sum(length for length, state in zip(seconds, states, strict=True) if state != "finished") / workers
    time_left = f"should take {duration(left)}" if ended else "take an unknown time, as none has run"
    total = f"{len(cells)} cells, {states.count('finished')} finished; the others {time_left}"
    return "\n".join([*rows, f"{total}{f' with {workers} workers' if workers > 1 else ''}."])
