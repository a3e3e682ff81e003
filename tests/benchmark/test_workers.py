"""Workers: what they run comes out as it does here, and a process that is killed takes nothing else with it."""

import multiprocessing
import os
import signal
import sys
import time

import psutil
import pytest

from capt_peft.benchmark import workers
from capt_peft.benchmark.workers import run_in_workers


def wait_for(what, seconds=60):
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < seconds, f"{what} did not come to pass"
        time.sleep(0.05)


def processes():
    """loky's processes below this one; its tracker of resources stays for the next ones."""
    return [
        p for p in psutil.Process().children(recursive=True) if is_alive(p) and "popen_loky" in " ".join(p.cmdline())
    ]


def is_alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("backend", ["loky", *(pytest.param(name, marks=pytest.mark.long) for name in ("ray", "dask"))])
def test_a_killed_process_loses_one_cell_and_the_others_end(backend, monkeypatch, tmp_path):
    pytest.importorskip({"dask": "distributed"}.get(backend, backend) if backend != "loky" else "joblib")
    for name in ("RAY_ADDRESS", "DASK_SCHEDULER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(number):  # within the test, so that workers need not import it
        import os

        if number == 1:
            os.kill(os.getpid(), 9)
        return number, os.getcwd()

    done = []
    ended = run_in_workers(run, lambda number: f"{number} died", [0, 1, 2, 3], backend, 2, done.append)
    assert ended == [(0, str(tmp_path)), "1 died", (2, str(tmp_path)), (3, str(tmp_path))]
    assert done[-1] == 4
    wait_for(lambda: not processes())


def test_an_interrupt_does_not_wait_for_what_runs():
    def run(seconds):
        import time

        time.sleep(seconds)

    def interrupt(count):
        if count == 1:
            os.kill(os.getpid(), signal.SIGINT)

    start, handler = time.monotonic(), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_in_workers(run, pytest.fail, [0, 3000], "loky", 2, interrupt)
            pytest.fail("It was not interrupted.")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - start < 200
    wait_for(lambda: not processes())


def test_a_worker_ends_when_the_process_that_started_it_is_killed():
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    parent = context.Process(target=start_a_worker, args=(sender,))
    parent.start()
    worker = psutil.Process(receiver.recv())
    assert is_alive(worker)
    parent.kill()
    parent.join()
    wait_for(lambda: not is_alive(worker))


def start_a_worker(sender):
    multiprocessing.get_context("fork").Process(target=wait_as_a_worker, args=(sender,)).start()
    time.sleep(100)


def wait_as_a_worker(sender):
    workers._begin(os.getppid())
    sender.send(os.getpid())
    time.sleep(100)


@pytest.mark.parametrize(("backend", "library"), [("ray", "ray"), ("dask", "distributed")])
def test_a_missing_library_is_named_before_anything_runs(backend, library, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask", os)  # either may be missing here
    monkeypatch.setitem(sys.modules, library, None)  # Python's own way to say that it is not there
    with pytest.raises(ImportError, match=rf"{library}, which is not installed: pip install capt-peft\[{backend}\]"):
        run_in_workers(pytest.fail, pytest.fail, [0], backend, 2, pytest.fail)
