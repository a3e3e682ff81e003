"""Where cells run: in this process (all processes of `accelerate launch` together), or each in a worker of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
from accelerate import PartialState

from ..utils.files import write_json
from ..utils.versions import versions
from .lines import Lines
from .plan import Cell
from .run import Root, run_cell

Line = dict[str, Any]
Executor = Callable[[Sequence[Cell], Path, Root], Iterator[tuple[Cell, Line]]]
"""Runs cells and gives each with its line as it ends. Takes the cells, the file of lines and the root of the data sets."""

EXECUTORS = ("local", "ray", "slurm")
Handle = TypeVar("Handle")


def get_executor(
    name: str, workers: int, *, cluster: str = "slurm", parameters: dict[str, Any] | None = None
) -> Executor:
    """Returns where to run cells.

    Args:
        name: Of `EXECUTORS`: processes of this machine, a Ray cluster, or jobs of SLURM.
        workers: Cells at a time.
        cluster: For slurm: the cluster of submitit; "local" tries the jobs on this machine.
        parameters: For slurm: parameters of `submitit.AutoExecutor.update_parameters`, such as `gpus_per_node`.

    Raises:
        ValueError: An unknown name, or less than one worker.
        ImportError: The library that the executor needs is not installed.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1.")
    if name not in EXECUTORS:
        raise ValueError(f"Unknown executor {name!r}. Allowed: {', '.join(EXECUTORS)}.")
    if name == "local":
        return run_here if workers == 1 else partial(run_in_pool, workers=workers)
    from . import clusters  # it builds on this file

    if name == "ray":
        clusters.load("ray", "ray")
        return partial(clusters.run_in_ray, workers=workers)
    clusters.load("submitit", "slurm")
    return partial(clusters.run_in_slurm, workers=workers, cluster=cluster, parameters=parameters)


# --------------------------------------------------------------------------------------------------------- one machine


def run_here(cells: Sequence[Cell], output: Path, root: Root) -> Iterator[tuple[Cell, Line]]:
    """Runs cells one after the other in this process."""
    for cell in cells:
        yield cell, run_cell(cell, adapters=adapters_of(output), root=root)


def run_in_pool(cells: Sequence[Cell], output: Path, root: Root, *, workers: int) -> Iterator[tuple[Cell, Line]]:
    """Runs cells in processes of this machine, which share its cores. They end with this process, however it ends.

    Raises:
        RuntimeError: A worker was killed, as happens when memory runs out. The next call runs the cells that have not ended.
    """
    # forked processes would share the locks of torch's threads
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    running: dict[Future[Line], Cell] = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(threads,)) as pool:
        try:

            def submit(cell: Cell) -> Future[Line]:
                return pool.submit(run_alone, cell, output, root)

            for cell, future in few_at_a_time(cells, workers, running, submit, _first_to_end):
                yield cell, future.result()
                forget(cell, output)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "A worker was killed, perhaps because memory ran out. Run the same again, with fewer `workers`: it goes on "
                "with the cells that have not ended."
            ) from error
        except BaseException:  # an interrupt, or no more lines are wanted: what runs is not waited for
            for process in list(pool._processes.values()):
                process.terminate()
            raise


def _begin(threads: int) -> None:
    """Lets a worker end when its parent does, and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    parent.join()
    os._exit(1)


def _first_to_end(futures: Iterable[Future[Line]]) -> Future[Line]:
    return next(iter(wait(list(futures), return_when=FIRST_COMPLETED).done))


# ------------------------------------------------------------------------------------------------- what workers share


def few_at_a_time(
    cells: Sequence[Cell],
    workers: int,
    running: dict[Handle, Cell],
    submit: Callable[[Cell], Handle],
    first_to_end: Callable[[Iterable[Handle]], Handle],
) -> Iterator[tuple[Cell, Handle]]:
    """Submits cells so that `workers` of them run, and gives each with its handle as it ends.

    Args:
        cells: All cells.
        workers: Cells at a time.
        running: An empty dictionary; it then holds what runs.
        submit: Starts a cell and returns its handle.
        first_to_end: Waits until one of the handles ends and returns it.
    """
    left = iter(cells)
    running.update({submit(cell): cell for cell in islice(left, workers)})
    while running:
        ended = first_to_end(running)
        cell = running.pop(ended)
        running.update({submit(following): following for following in islice(left, 1)})
        yield cell, ended


def run_alone(cell: Cell, output: Path, root: Root, *, threads: int | None = None, folder: str | None = None) -> Line:
    """Runs a cell in a worker and keeps its line in a file, in case nobody waits for it any more.

    Args:
        cell: The cell.
        output: The file of lines.
        root: Where the data sets of the catalog lie; None: the Hub.
        threads: Threads of torch; None: as they are.
        folder: The working directory, as names of models may be relative; None: as it is.
    """
    if folder is not None and Path(folder).is_dir():
        os.chdir(folder)
    if threads is not None:
        torch.set_num_threads(threads)
    datasets.disable_progress_bars()
    line = run_cell(cell, adapters=adapters_of(output), root=root)
    write_json(_kept(cell.key, output), line)
    return line


def failed_line(cell: Cell, kind: str, message: str) -> Line:
    """Returns the line of a cell whose worker ended without one."""
    error = {"type": kind, "message": message}
    return {
        "key": cell.key, "status": "failed", "cell": cell.to_dict(), "error": error, "seconds": 0.0,
        "versions": versions(), "machine": "unknown",
    }  # fmt: skip


def collect(lines: Lines) -> dict[str, dict[str, Any]]:
    """Appends the lines that workers kept and that no call took, as happens when a call is killed; returns all lines.

    Args:
        lines: The file of lines. Where several processes run, only the main one writes.
    """
    found = lines.read()
    if not PartialState().is_main_process:
        return found
    for path in sorted(_kept("*", lines.path).parent.glob("*.json")):
        try:
            line = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:  # another call has just taken it
            continue
        if found.get(line["key"]) != line and (line["status"] == "finished" or line["key"] not in found):
            lines.append(line)
        path.unlink(missing_ok=True)
    return lines.read()


def forget(cell: Cell, output: Path) -> None:
    """Removes the line that a worker kept, once it stands in the file of lines."""
    _kept(cell.key, output).unlink(missing_ok=True)


def kept_line(cell: Cell, output: Path) -> Line | None:
    """Returns the line that a worker kept, if it did."""
    path = _kept(cell.key, output)
    line: Line | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return line


def adapters_of(output: Path) -> Path:
    """Returns the folder of adapters beside a file of lines."""
    return output.with_suffix(".adapters")


def _kept(key: str, output: Path) -> Path:
    return output.with_suffix(".cells") / f"{key}.json"
