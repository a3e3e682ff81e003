"""Engines that run cells on other machines: Ray, and SLURM through submitit."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..utils.files import write_json
from .executors import Line, failed_line, few_at_a_time, forget, kept_line, run_alone
from .plan import Cell
from .run import Root

MINUTES = 240  # of a job of SLURM, unless told otherwise
ARRAY = 1000  # SLURM takes arrays of less than 1,001 jobs, unless told otherwise
_POLL_SECONDS = 2.0
_JOBS = "jobs.json"


def load(library: str, extra: str) -> Any:
    """Imports a library that only one executor needs.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(
            f"The executor {extra!r} needs the library {library}, which is not installed: pip install capt-peft[{extra}]"
        ) from error


# ---------------------------------------------------------------------------------------------------------------- Ray


def run_in_ray(cells: Sequence[Cell], output: Path, root: Root, *, workers: int) -> Iterator[tuple[Cell, Line]]:
    """Runs each cell as a task of Ray: of the cluster of `RAY_ADDRESS`, or else on this machine.

    A cell takes one GPU where the cluster has some, and a share of a node's cores. A task that died is a failed line.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no telemetry
    ray = load("ray", "ray")
    start = not ray.is_initialized()
    if start:
        address = os.environ.get("RAY_ADDRESS", "local")
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    running: dict[Any, Cell] = {}
    try:
        cpus, gpus = share([node["Resources"] for node in ray.nodes() if node["Alive"]], workers)
        # what a worker's death interrupts runs on the next call, as it might kill a worker again
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(run_alone)
        submit = partial(task.remote, output=output.absolute(), root=root, threads=cpus, folder=os.getcwd())

        def first_to_end(tasks: Iterable[Any]) -> Any:
            return ray.wait(list(tasks), num_returns=1)[0][0]

        for cell, ended in few_at_a_time(cells, workers, running, submit, first_to_end):
            try:
                line = ray.get(ended)
            except ray.exceptions.RayError as error:
                line = kept_line(cell, output) or failed_line(cell, type(error).__name__, _died("task", str(error)))
            yield cell, line
            forget(cell, output)
    finally:
        for unfinished in running:
            ray.cancel(unfinished, force=True)
        if start:
            ray.shutdown()


def share(nodes: Sequence[Mapping[str, float]], workers: int) -> tuple[int, int]:
    """Returns the cores and GPUs of one cell: the most cores with which so many cells fit onto the nodes.

    Args:
        nodes: The resources of each node, as Ray names them: "CPU" and "GPU".
        workers: Cells at a time.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("GPU", 0) or not gpus]
    wanted = min(workers, gpus or workers)
    fitting = (count for count in range(max(cores, default=1), 0, -1) if sum(n // count for n in cores) >= wanted)
    return next(fitting, 1), min(gpus, 1)


def _died(what: str, why: str) -> str:
    return f"The {what} of this cell died, and the next call runs it again. {' '.join(why.split())}"


# -------------------------------------------------------------------------------------------------------------- SLURM


def run_in_slurm(
    cells: Sequence[Cell],
    output: Path,
    root: Root,
    *,
    workers: int,
    cluster: str = "slurm",
    parameters: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Cell, Line]]:
    """Runs each cell as a job of an array, whose logs lie beside the output, in a folder of its name with ".jobs".

    Jobs go on if this process is killed: the next call finds their lines and waits for those that still run. An interrupt
    cancels them. A job that died, as it ran out of time or memory, is a failed line. SLURM's own variables choose the
    partition, the GPUs and the time of a job: `SBATCH_PARTITION`, `SBATCH_GPUS_PER_NODE`, `SBATCH_TIMELIMIT`.
    """
    submitit = load("submitit", "slurm")
    output = output.absolute()
    executor = submitit.AutoExecutor(folder=output.with_suffix(".jobs"), cluster=cluster)
    defaults = {"name": "capt-peft", "timeout_min": MINUTES, "stderr_to_stdout": True}
    executor.update_parameters(**{**defaults, "slurm_array_parallelism": workers, **(parameters or {})})
    work = partial(run_alone, output=output, root=root)
    for start in range(0, len(cells), ARRAY):
        part = cells[start : start + ARRAY]
        waiting = _still_running(submitit, part, executor.folder) if cluster == "slurm" else {}
        known = {cell.key for cell in waiting.values()}
        new = [cell for cell in part if cell.key not in known]
        if new:
            waiting |= dict(zip(executor.map_array(work, new), new, strict=True))
        write_json(executor.folder / _JOBS, {cell.key: job.job_id for job, cell in waiting.items()})
        yield from _as_they_end(waiting, output)


def _as_they_end(waiting: dict[Any, Cell], output: Path) -> Iterator[tuple[Cell, Line]]:
    """Gives each cell with its line as its job ends; cancels the others if no more are wanted."""
    try:
        while waiting:
            ended = _ended(waiting)
            for job in ended:
                cell = waiting.pop(job)
                yield cell, _line_of(job, cell, output)
                forget(cell, output)
            if not ended:
                time.sleep(_POLL_SECONDS)
    finally:
        for job in waiting:
            job.cancel(check=False)


def _ended(jobs: Iterable[Any]) -> list[Any]:
    """Returns the jobs that have ended."""
    # a preempted job may be queued again; then the next call finds its line
    ended = {job: job.done() or job.state.startswith("PREEMPTED") for job in jobs}
    if any(not done and job.state == "UNKNOWN" for job, done in ended.items()):  # as where SLURM keeps no accounts
        queue = _queue()
        ended = {job: done or (queue is not None and job.job_id not in queue) for job, done in ended.items()}
    return [job for job, done in ended.items() if done]


def _queue() -> set[str] | None:
    """Returns the ids of this user's jobs that wait or run; None where SLURM does not tell."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    try:
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    except (OSError, subprocess.CalledProcessError):
        return None


def _line_of(job: Any, cell: Cell, output: Path) -> Line:
    line = kept_line(cell, output)
    # another call with this output may have taken what was kept; `exception` would wait for ever unless the job is done
    if line is None and job.done() and job.exception() is None:
        line = job.result()
    if line is not None:
        return line
    job.get_info(mode="force")  # or its state is of some minutes ago
    why = f"Its state is {job.state}; its log is {job.paths.stdout}"
    return failed_line(cell, "JobDied", _died(f"job {job.job_id}", why))


def _still_running(submitit: Any, cells: Sequence[Cell], folder: Path) -> dict[Any, Cell]:
    """Returns the jobs of a call that was killed, for those of the cells that they still run."""
    path = folder / _JOBS
    ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    queue = _queue() or set()
    return {
        submitit.SlurmJob(folder=folder, job_id=ids[cell.key]): cell for cell in cells if ids.get(cell.key) in queue
    }
