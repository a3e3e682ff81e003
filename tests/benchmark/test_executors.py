"""Every engine gives the lines that this process gives, and a cell or a worker that fails takes nothing else with it."""

import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
from helpers import TINY_CLIP

from capt_peft.benchmark import Lines, Plan, clusters, executors, get_executor, get_suite
from capt_peft.benchmark.clusters import share
from capt_peft.benchmark.executors import collect, few_at_a_time, run_alone, run_here, run_in_pool

SMALL = {"max_steps": 1, "attack_steps": 1}


@pytest.fixture(scope="module")
def cells():
    """Two cells of seconds and, between them, one that fails."""
    plan = Plan(
        get_suite("toy"), TINY_CLIP, ["zero-shot", "capt"], ["few-shot"], shots=[1], seeds=[0], tasks=["digits"],
        settings=SMALL, attacks=["pgd-1"], limit=4,
    )  # fmt: skip
    zero_shot, capt = plan.cells()
    return [zero_shot, replace(capt, shots=100_000), capt]


@pytest.fixture(scope="module")
def expected(cells, tmp_path_factory):
    return {
        cell.key: figures(line) for cell, line in run_here(cells, tmp_path_factory.mktemp("here") / "a.jsonl", None)
    }


@pytest.fixture
def output(tmp_path):
    return tmp_path / "lines.jsonl"


def figures(line):
    """What a line says about its cell, and not how long it took."""
    return json.loads(json.dumps({name: line.get(name) for name in ("key", "status", "cell", "results", "error")}))


def by_key(pairs):
    return {cell.key: figures(line) for cell, line in pairs}


def wait_for(what, seconds=60):
    start = time.monotonic()
    while not (found := what()):
        assert time.monotonic() - start < seconds, f"{what} did not come to pass"
        time.sleep(0.05)
    return found


def processes(name, parent=None):
    """Processes below this one whose command line has a name in it."""
    return [p for p in psutil.Process(parent).children(recursive=True) if name in " ".join(command_line(p))]


def command_line(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


# --------------------------------------------------------------------------------------------------------- one machine


def test_here_one_cell_fails_and_the_others_go_on(cells, expected):
    assert [expected[cell.key]["status"] for cell in cells] == ["finished", "failed", "finished"]
    assert "100000" in expected[cells[1].key]["error"]["message"]


def test_a_pool_gives_the_lines_that_this_process_gives_and_leaves_nothing_behind(cells, expected, output):
    assert by_key(get_executor("local", 2)(cells, output, None)) == expected
    assert list(output.with_suffix(".cells").iterdir()) == []
    assert multiprocessing.active_children() == []


def test_a_killed_worker_stops_the_run_and_says_what_to_do(cells, output):
    lines = run_in_pool([cells[0], cells[2]], output, None, workers=1)
    next(lines)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"A worker was killed.* Run the same again, with fewer `workers`"):
        next(lines)


def test_a_pool_that_nobody_reads_any_more_does_not_wait_for_its_cells(cells, output):
    long = replace(cells[2], limit=None, attacks=("pgd-100000",))
    lines = run_in_pool([cells[1], long], output, None, workers=1)
    next(lines)
    lines.close()
    assert multiprocessing.active_children() == []


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
    executors._begin(threads=1)
    sender.send(os.getpid())
    time.sleep(100)


def is_alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_no_more_cells_are_submitted_than_run():
    submitted, running = [], {}
    cells = few_at_a_time(range(5), 2, running, lambda cell: submitted.append(cell) or cell, min)
    assert next(cells) == (0, 0)
    assert submitted == [0, 1, 2] and list(running) == [1, 2]
    assert [cell for cell, _ in cells] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------ other machines


def test_ray_runs_cells_and_a_killed_task_is_a_failed_line(cells, expected, output, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    order = [cells[0], cells[2], cells[1]]
    lines = get_executor("ray", 1)(order, output, None)
    got = by_key([next(lines)])
    wait_for(lambda: processes("ray::run_alone"))[0].kill()  # the second cell
    got |= by_key(lines)
    killed = got.pop(cells[2].key)
    assert got == {cell.key: expected[cell.key] for cell in cells[:2]}
    assert killed["error"]["type"] == "WorkerCrashedError"
    assert "the next call runs it again" in killed["error"]["message"]
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0" and not ray.is_initialized()


def test_the_cells_of_ray_share_the_cores_of_each_node():
    assert share([{"CPU": 2}], 2) == (1, 0)
    assert share([{"CPU": 8}, {"CPU": 8}], 3) == (4, 0)
    assert share([{"CPU": 2}], 5) == (1, 0)
    assert share([{"CPU": 64}, {"CPU": 8, "GPU": 2}], 4) == (4, 1)


def test_slurm_runs_cells_and_a_killed_job_is_a_failed_line(cells, expected, output, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 1)
    lines = get_executor("slurm", 2, cluster="local")(cells, output, None)
    jobs = output.with_suffix(".jobs")
    with ThreadPoolExecutor(1) as thread:
        killing = thread.submit(kill_job, jobs / "jobs.json", cells[2])
        got = by_key(lines)
    killed = got.pop(cells[2].key)
    assert got == {cell.key: expected[cell.key] for cell in cells[:2]}
    assert killed["error"]["type"] == "JobDied"
    assert (
        f"the next call runs it again. Its state is FINISHED; its log is {jobs}/{killing.result()}_0_log.out"
        in (killed["error"]["message"])
    )


def test_a_job_that_left_the_queue_of_a_slurm_without_accounting_has_died(cells, output, monkeypatch):
    class Job:  # of a SLURM whose `sacct` knows nothing: submitit would wait for it for ever
        job_id, state, paths = "4_3", "UNKNOWN", SimpleNamespace(stdout="4_3_0_log.out")

        def done(self):
            return False

        def get_info(self, mode):
            return {}

    monkeypatch.setattr(clusters, "_queue", lambda: {"4_2"})
    [(cell, line)] = clusters._as_they_end({Job(): cells[0]}, output)
    assert cell == cells[0] and line["error"]["type"] == "JobDied"
    assert line["error"]["message"].endswith("Its state is UNKNOWN; its log is 4_3_0_log.out")


def kill_job(path, cell):
    """Kills a cell's job of submitit's local cluster, whose id is that of the process above it, and returns the id."""
    wait_for(path.exists)
    job = json.loads(path.read_text())[cell.key]
    wait_for(lambda: processes("submitit.core._submit", int(job)))[0].kill()
    return job


# -------------------------------------------------------------------------------------- lines of a call that was killed


def test_a_line_that_nobody_took_is_found_by_the_next_call(cells, expected, output):
    run_alone(cells[0], output, None)
    found = collect(Lines(output))
    assert figures(found[cells[0].key]) == expected[cells[0].key]
    assert Lines(output).read() == found
    assert list(output.with_suffix(".cells").iterdir()) == []


def test_a_failure_that_comes_late_does_not_hide_a_finished_line(cells, output):
    line = run_alone(cells[1], output, None)
    Lines(output).append({**line, "status": "finished"})
    assert collect(Lines(output))[cells[1].key]["status"] == "finished"


# ---------------------------------------------------------------------------------------------------------------- names


def test_an_unknown_executor_is_an_error_that_lists_the_others():
    with pytest.raises(ValueError, match=r"'dask'. Allowed: local, ray, slurm"):
        get_executor("dask", 1)
    with pytest.raises(ValueError, match="workers=0"):
        get_executor("ray", 0)


@pytest.mark.parametrize(("name", "library"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_library_is_named_before_anything_runs(name, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)  # Python's own way to say that it is not there
    with pytest.raises(ImportError, match=rf"{library}, which is not installed: pip install capt-peft\[{name}\]"):
        get_executor(name, 2)
