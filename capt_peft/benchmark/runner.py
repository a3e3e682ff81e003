"""Running a plan: what is finished is skipped, what fails is recorded, and what ends is written at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import AutoModel

from ..attacks import parse_attack
from ..training import CaptTrainingArguments
from ..tuner.clip import image_features, image_size
from ..tuner.loading import load_pretrained
from ..utils.files import make_writable
from ..utils.outputs import main_process_says
from .executors import Executor, collect, run_here
from .inputs import Inputs, Root, _load_task
from .lines import Lines, is_whole
from .plan import ZERO_SHOT, Cell

logger = logging.getLogger(__name__)

_CLASSES, _ALL_IMAGES, _TEST_IMAGES = 10, 64, 400  # guesses where the data set has not been read


def run_cells(
    cells: Sequence[Cell],
    output: str | Path,
    *,
    executor: Executor = run_here,
    root: Root = None,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Runs the cells that are not finished, and appends a line for each to a file as soon as it ends.

    Under `accelerate launch`, all processes run each cell together. Killed at any point, it loses the cells that were
    running; the next call goes on. Failed cells run again on the next call. Adapters are kept beside the file, in a folder
    of its name with ".adapters" at the end, and used again by cells that differ only in what is measured.

    Args:
        cells: What to run.
        output: The file of lines.
        executor: Where to run them.
        root: As of `run_cell`.
        progress: Show a progress bar, whose time left counts the images of each cell.

    Returns:
        The lines of these cells, by key; failed cells have a line too.
    """
    # Accelerate does not see by itself that torchrun's processes have no GPU, and each would run all cells alone
    state, lines = PartialState(cpu=not torch.accelerator.is_available()), Lines(output)
    if state.num_processes > 1 and executor is not run_here:
        raise ValueError("Several processes run each cell together: use either `accelerate launch` or an executor.")
    main_process_says(lambda: make_writable(Path(output).parent, Path(output).name))
    found = collect(lines)
    _load_task.cache_clear()  # a data set may have changed since an earlier call of this process
    todo = _agreed(_unfinished(cells, found, root) if state.is_main_process else [])
    with tqdm(
        total=sum(map(passes, todo)), desc="benchmark", unit="pass", unit_scale=True,
        disable=not (progress and state.is_main_process), smoothing=0,
    ) as bar:  # fmt: skip
        failed = 0
        for cell, line in executor(todo, Path(output), root):
            failed += line["status"] == "failed"
            if state.is_main_process:
                lines.append(line)
            bar.update(passes(cell))
            bar.set_postfix_str(f"{cell}{f'; {failed} failed' if failed else ''}")
    state.wait_for_everyone()
    found = lines.read()
    return {cell.key: found[cell.key] for cell in cells if cell.key in found}


def is_finished(lines: Mapping[str, Mapping[str, Any]], cell: Cell, inputs: Inputs) -> bool:
    """Returns whether the lines have the figures of a cell: whole, and of the same images and weights as there are now.

    Args:
        lines: The lines by key.
        cell: The cell.
        inputs: Reads the images and weights.

    Raises:
        ValueError: There are figures, but the images or weights that they should belong to cannot be read.
    """
    line = lines.get(cell.key, {})
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


def _unfinished(cells: Sequence[Cell], lines: Mapping[str, Mapping[str, Any]], root: Root) -> list[Cell]:
    """Returns the cells that have to run, and says how many finished ones have to run again."""
    inputs = Inputs(root)
    todo = [cell for cell in cells if not is_finished(lines, cell, inputs)]
    again = [cell for cell in todo if lines.get(cell.key, {}).get("status") == "finished"]
    if again:
        logger.warning(
            "%d finished lines are damaged, of other images or weights than there are now, or do not say of which; their "
            "cells run again, the first of them %s.",
            len(again),
            again[0],
        )
    return todo


def _agreed(cells: list[Cell]) -> list[Cell]:
    """Returns the main process's cells in every process."""
    if PartialState().num_processes == 1:
        return cells
    shared: list[Any] = [cells]
    broadcast_object_list(shared)
    agreed: list[Cell] = shared[0]
    return agreed


def listing(cells: Sequence[Cell], output: str | Path, model: str, workers: int = 1, *, root: Root = None) -> str:
    """Returns what would run, a line for each cell, and how long it should take.

    Cells whose line is damaged, of other images or weights, or of unknown ones are "changed", and would run again.

    Args:
        cells: All cells.
        output: The file of lines.
        model: Folder or Hub id of the CLIP.
        workers: Cells at a time.
        root: As for `run_cells`.
    """
    lines, inputs = Lines(output).read(), Inputs(root)
    pace = seconds_per_pass(cells, lines, model)
    rows, left, finished = [], 0.0, 0
    for cell in cells:
        status = str(lines.get(cell.key, {}).get("status", "to run"))
        if status == "finished" and not is_finished(lines, cell, inputs):
            status = "changed"
        finished += status == "finished"
        seconds = pace * passes(cell)
        left += 0 if status == "finished" else seconds
        rows.append(f"{cell.key}  {status:8}  {duration(seconds):>7}  {cell}")
    total = f"{len(cells)} cells, {finished} finished; the others should take {duration(left / workers)}"
    return "\n".join([*rows, f"{total}{f' with {workers} workers' if workers > 1 else ''}."])


# ------------------------------------------------------------------------------------------------- how long cells take


def passes(cell: Cell) -> float:
    """Returns about how many images go through the image tower, forward or backward, when the cell is run."""
    return _training_passes(cell) + _measuring_passes(cell)


def _training_passes(cell: Cell) -> float:
    if cell.method == ZERO_SHOT:
        return 0.0
    settings = cell.settings
    batch = _setting(settings, "per_device_train_batch_size")
    per_class = _ALL_IMAGES if cell.shots == "all" else int(cell.shots)
    images = per_class * _CLASSES
    steps = int(settings.get("max_steps", -1))
    seen = steps * min(batch, images) if steps > 0 else images * _setting(settings, "num_train_epochs")
    return seen * (2 * _setting(settings, "attack_steps") + 4)


def _setting(settings: Mapping[str, Any], name: str) -> float:
    return float(settings.get(name, getattr(CaptTrainingArguments, name)))


def _measuring_passes(cell: Cell) -> float:
    images = (cell.limit or _TEST_IMAGES) * len(cell.targets)
    return images * (1 + sum(parse_attack(name, cell.threat).passes for name in cell.attacks))


def seconds_per_pass(cells: Sequence[Cell], lines: Mapping[str, Mapping[str, Any]], model: str) -> float:
    """Returns the seconds of an image's pass: from cells that have ended, or else timed on the model for a moment.

    Args:
        cells: All cells.
        lines: The lines there are, by key.
        model: Folder or Hub id of the CLIP.
    """
    ended = [(cell, lines[cell.key]) for cell in cells if lines.get(cell.key, {}).get("status") == "finished"]
    if len(ended) >= 3:
        return sum(float(line["seconds"]) for _, line in ended) / sum(passes(cell) for cell, _ in ended)
    clip: Any = load_pretrained(AutoModel, model, dtype=torch.float32).eval()
    side = image_size(clip)
    pixels = torch.rand(32, 3, side, side, requires_grad=True)
    rounds: list[float] = []
    while len(rounds) < 3 or (sum(rounds) < 1 and len(rounds) < 20):
        start = time.perf_counter()
        torch.autograd.grad(image_features(clip, pixels).float().sum(), pixels)
        rounds.append(time.perf_counter() - start)
    return sorted(rounds)[len(rounds) // 2] / (2 * len(pixels))


def duration(seconds: float) -> str:
    """Returns a duration as people read it: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
