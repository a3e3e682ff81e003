"""benchmarks/processes.py runs, and reports only what was measured on the same work."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))  # it imports its neighbour, as when it is run as a script
    try:
        spec = importlib.util.spec_from_file_location("processes", BENCHMARKS / "processes.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def test_it_compares_one_process_with_two(benchmark, capsys):
    benchmark.main(["--tiny", "--json", "--steps", "2", "--repeats", "1", "--batch", "4"])
    found = json.loads(capsys.readouterr().out)
    speeds = found["images a second"]
    assert found["ratio"] == pytest.approx(speeds["2"] / speeds["1"]) and min(speeds.values()) > 0
    assert found["largest difference of a loss"] < 1e-4


def test_it_reports_nothing_of_runs_that_differ(benchmark, monkeypatch):
    losses = {1: [2.0, 1.0], 2: [2.0, 1.1]}
    monkeypatch.setattr(
        benchmark, "launch", lambda options, n: {"losses": losses[n], "seconds": [1.0], "device": "cpu"}
    )
    with pytest.raises(RuntimeError, match=r"differ by 1.0e-01"):
        benchmark.compare(benchmark.parse(["--repeats", "1"]))
