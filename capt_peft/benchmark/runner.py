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

from ..files import make_writable
from ..outputs import main_process_says
from .cells import Cell
from .cost import duration, passes, seconds_a_pass
from .executors import Executor, collect, run_here
from .lines import Lines
from .run import Root

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
    todo = _agreed([cell for cell in cells if not is_finished(found, cell)])
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


def is_finished(lines: Mapping[str, Mapping[str, Any]], cell: Cell) -> bool:
    """Returns whether the lines have the figures of a cell."""
    return bool(lines.get(cell.key, {}).get("status") == "finished")


def _agreed(cells: list[Cell]) -> list[Cell]:
    """Returns the main process's cells in every process."""
    if PartialState().num_processes == 1:
        return cells
    shared: list[Any] = [cells]
    broadcast_object_list(shared)
    agreed: list[Cell] = shared[0]
    return agreed


def listing(cells: Sequence[Cell], output: str | Path, model: str, workers: int = 1) -> str:
    """Returns what would run, a line a cell, and how long it should take.

    Args:
        cells: All cells.
        output: The file of lines.
        model: Folder or Hub id of the CLIP.
        workers: Cells at a time.
    """
    lines = Lines(output).read()
    pace = seconds_a_pass(cells, lines, model)
    rows, left = [], 0.0
    for cell in cells:
        status = str(lines.get(cell.key, {}).get("status", "to run"))
        seconds = pace * passes(cell)
        left += 0 if status == "finished" else seconds
        rows.append(f"{cell.key}  {status:8}  {duration(seconds):>7}  {cell}")
    finished = sum(is_finished(lines, cell) for cell in cells)
    total = f"{len(cells)} cells, {finished} finished; the others should take {duration(left / workers)}"
    return "\n".join([*rows, f"{total}{f' with {workers} workers' if workers > 1 else ''}."])
