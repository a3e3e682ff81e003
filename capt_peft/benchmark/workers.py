"""Where the cells of a benchmark run: in processes of this machine, or on the machines of a Ray or Dask cluster.

joblib hands the cells out. Each worker runs its cells in a process of its own, so that one that is killed, as happens when memory
runs out, takes no other cell with it.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any

import datasets
import torch
import transformers
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import ProcessPoolExecutor

BACKENDS = ("loky", "ray", "dask")
Call = Callable[[Any], Any]

_worker = threading.local()  # each thread that runs cells has a process of its own
_processes: list[ProcessPoolExecutor] = []
_here = threading.Lock()  # the seeds are the process's


def run_in_workers(
    run: Call, died: Call, cells: Sequence[Any], backend: str, workers: int, done: Callable[[int], Any]
) -> list[Any]:
    """Runs cells in workers.

    Args:
        run: Runs a cell, in a process of its own.
        died: Called with a cell whose process was killed; what it returns stands for what `run` would have.
        cells: All cells.
        backend: One of `BACKENDS`.
        workers: Cells at a time; a Dask cluster runs one per thread of its workers.
        done: Called with the number of cells that have ended.

    Returns:
        What `run` returned, in the order of the cells.

    Raises:
        ImportError: The library of the backend is not installed.
    """
    # a cluster's machines have their own number of threads
    threads = max(1, (os.cpu_count() or 1) // workers) if backend == "loky" else None
    call = delayed(partial(_run_apart, partial(_run_there, run, os.getcwd(), threads), died))
    try:
        with _BACKENDS[backend](workers) as options, parallel_config(**options):
            return _Parallel(done)(map(call, cells))
    finally:  # after an interrupt, what runs is not waited for
        left = _processes[:]
        _processes.clear()
        for process in left:
            process.shutdown(kill_workers=True)


class _Parallel(Parallel):
    def __init__(self, done: Callable[[int], Any]) -> None:
        super().__init__(batch_size=1, pre_dispatch="all")
        self._done = done

    def print_progress(self) -> None:
        self._done(self.n_completed_tasks)


@contextmanager
def _loky(workers: int) -> Iterator[dict[str, Any]]:
    yield {"backend": "threading", "n_jobs": workers}  # whose threads have a process each


@contextmanager
def _ray(workers: int) -> Iterator[dict[str, Any]]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no telemetry
    ray = _load("ray", "ray")
    _load("ray.util.joblib", "ray").register_ray()
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        found = ray.cluster_resources()
        needs = {"num_cpus": 1, "num_gpus": int("GPU" in found)}
        fitting = int(min(found["CPU"], found.get("GPU", workers)))
        yield {"backend": "ray", "n_jobs": min(workers, fitting), "ray_remote_args": needs}
    finally:
        ray.shutdown()


@contextmanager
def _dask(workers: int) -> Iterator[dict[str, Any]]:
    dask, distributed = _load("dask", "dask"), _load("distributed", "dask")
    logging.getLogger("distributed").setLevel(logging.WARNING)
    address = dask.config.get("scheduler-address", None)
    with dask.config.set({"distributed.worker.daemon": False}):  # a daemon could not start the process of its cells
        cluster = address or distributed.LocalCluster(workers, threads_per_worker=1, dashboard_address=None)
    with distributed.Client(cluster):
        try:
            yield {"backend": "dask", "n_jobs": -1, "wait_for_workers_timeout": 3600}  # jobs may wait in a queue
        finally:
            if address is None:
                cluster.close()


_BACKENDS = dict(zip(BACKENDS, (_loky, _ray, _dask), strict=True))


def _load(library: str, extra: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(
            f"The backend {extra!r} needs the library {library}, which is not installed: pip install capt-peft[{extra}]"
        ) from error


# --------------------------------------------------------------------------------------------------------- in a worker


def _run_apart(run: Call, died: Call, cell: Any) -> Any:
    """Runs a cell in this thread's process, which is kept for its next cell."""
    if multiprocessing.current_process().daemon:  # it may not start another
        with _here:
            return run(cell)
    if getattr(_worker, "process", None) not in _processes:
        _worker.process = ProcessPoolExecutor(1, initializer=_begin, initargs=(os.getpid(),))
        _processes.append(_worker.process)
    try:
        return _worker.process.submit(run, cell).result()
    except BrokenProcessPool:
        if _worker.process not in _processes:  # it was this process that killed it
            raise
        _processes.remove(_worker.process)
        return died(cell)


def _begin(parent: int) -> None:
    """Lets a process end with the one that started it, however that ends, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run_there(run: Call, folder: str, threads: int | None, cell: Any) -> Any:
    if os.path.isdir(folder):  # names of models may be relative
        os.chdir(folder)
    if threads is not None:
        torch.set_num_threads(threads)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    return run(cell)
