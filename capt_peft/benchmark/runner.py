"""Running a plan: what is finished is skipped, what fails is recorded, and what ends is written at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from ..utils.files import make_writable
from ..utils.outputs import main_process_says
from .cost import duration, passes, seconds_a_pass
from .executors import Executor, collect, run_here
from .inputs import Inputs, Root, _load_task
from .lines import Lines, is_whole
from .plan import Cell

logger = logging.getLogger(__name__)


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
    pace = seconds_a_pass(cells, lines, model)
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
