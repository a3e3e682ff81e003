"""A plan as a whole: what is finished stays, what failed runs again, and a run that was killed ends as if it was not."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import TINY_CLIP
from PIL import Image

from capt_peft.benchmark import Lines, Plan, Suite, Target, get_suite, listing, run, run_cells
from capt_peft.benchmark.cost import duration, passes
from capt_peft.benchmark.inputs import Inputs
from capt_peft.commands.benchmark import main
from capt_peft.report import read_sections

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark.py"
KILLED = [
    "--methods", "zero-shot,capt,adv-vp", "--protocols", "few-shot", "--tasks", "digits", "--shots", "1", "--seeds", "0,1",
    "--limit", "6", "--attacks", "pgd-1", "--settings", "max_steps=1,attack_steps=1",
]  # fmt: skip


@pytest.fixture
def output(tmp_path):
    return tmp_path / "lines.jsonl"


def make_cells(model=TINY_CLIP, seeds=(0, 1, 2)):
    plan = Plan(get_suite("toy"), model, ["capt"], ["few-shot"], [1], seeds, ["digits"], limit=4, attacks=["pgd-1"])
    return plan.cells()


INPUTS = Inputs()


def figures_of(cell):
    """What a finished line of the cell has, with figures that were never measured."""
    count = {"correct": 1, "n": 4}
    row = {"clean": count, "attacks": dict.fromkeys(cell.attacks, count), "worst_case": count}
    results = [{"task": target.task, "classes": target.classes, **row} for target in cell.targets]
    return {"results": results, "training": {}, **INPUTS.digests(cell)}


def line(cell, status="finished", **changes):
    end = {"error": {"type": "ValueError", "message": "no"}} if status == "failed" else figures_of(cell)
    return {"key": cell.key, "status": status, "cell": cell.to_dict(), "seconds": 2.0, **end, **changes}


class Engine:
    """Takes the place of `run_cell`: it notes the cells that it was given and says how each of them ended."""

    def __init__(self, *failing):
        self.failing, self.given = failing, []

    def __call__(self, cell, adapters, root, tune):
        self.given.append(cell)
        return line(cell, "failed" if cell in self.failing else "finished", root=root)


def go(cells, output, engine, **changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_cell", engine)
        patch.setattr(run, "Inputs", lambda root: Inputs(root) if root else INPUTS)  # the digits are read once
        return run_cells(cells, output, progress=False, **changes)


# ------------------------------------------------------------------------------------------------- what runs again


def test_finished_cells_are_skipped_and_their_lines_stay(output):
    cells = make_cells()
    Lines(output).append(line(cells[1], n="before"))
    engine = Engine()
    lines = go(cells, output, engine)
    assert engine.given == [cells[0], cells[2]]
    assert list(lines) == [cell.key for cell in cells] and lines[cells[1].key]["n"] == "before"
    assert Lines(output).read() == {key: lines[key] for key in (cells[1].key, cells[0].key, cells[2].key)}


def test_failed_cells_run_again_until_they_finish(output):
    cells = make_cells()
    assert [one["status"] for one in go(cells, output, Engine(cells[1])).values()] == ["finished", "failed", "finished"]
    for engine, status in ((Engine(cells[1]), "failed"), (Engine(), "finished")):
        assert go(cells, output, engine)[cells[1].key]["status"] == status
        assert engine.given == [cells[1]]
    assert go(cells, output, engine := Engine())[cells[1].key]["status"] == "finished" and engine.given == []


def damaged(whole, *path, to=None):
    """The line without what stands at this path, or with something else there."""
    copy = json.loads(json.dumps(whole))
    place = copy
    for step in path[:-1]:
        place = place[step]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return copy


@pytest.mark.parametrize(
    "damage",
    [
        ("results",), ("results", 0), ("results", 0, "clean"), ("results", 0, "attacks", "pgd-1"), ("results", 0, "worst_case"),
        ("results", 0, "clean", "n"), ("training",), ("measured_data",), ("base_model_fingerprint",), ("base_configuration",),
        ("processor",),
    ],
    ids=str,
)  # fmt: skip
def test_a_finished_line_that_is_not_whole_runs_again(output, damage, caplog):
    (cell,) = make_cells(seeds=[0])
    Lines(output).append(damaged(line(cell), *damage))
    go([cell], output, engine := Engine())
    assert engine.given == [cell] and "1 finished lines are damaged" in caplog.text
    go([cell], output, engine := Engine())
    assert engine.given == []


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("measured_data", 0), "other images"), (("training_data",), "other images"), (("processor",), "other pixels"),
        (("base_model_fingerprint",), "other weights"), (("teacher_fingerprint",), "a teacher"), (("cell", "seed"), 9),
        (("base_configuration",), "another"), (("results", 0, "task"), "shapes"),
    ],
)  # fmt: skip
def test_a_line_of_other_images_weights_or_cells_is_not_reused(output, path, to):
    (cell,) = make_cells(seeds=[0])
    Lines(output).append(damaged(line(cell), *path, to=to))
    assert "changed" in listing([cell], output)
    go([cell], output, engine := Engine())
    assert engine.given == [cell]


@pytest.mark.parametrize(
    ("path", "to", "why"),
    [
        (("clean", "correct"), 5, "clean: 5 of 4 is not an accuracy"),
        (("clean", "correct"), 0, "pgd-1: 1 of 4 cannot be beside 0 of 4 of clean images"),
        (("attacks", "pgd-1", "n"), 3, "pgd-1: 1 of 3 cannot be beside 1 of 4 of clean images"),
        (("attacks", "pgd-1", "correct"), 0, "the worst case: 1 of 4 cannot be beside 0 of 4 under pgd-1"),
    ],
)
def test_figures_that_cannot_be_are_refused_with_the_number_of_their_line(output, path, to, why):
    cells = make_cells(seeds=[0, 1])
    Lines(output).append(line(cells[0]))
    Lines(output).append(damaged(line(cells[1]), "results", 0, *path, to=to))
    with pytest.raises(ValueError, match=rf"Line 2 of .* figures that cannot be \({why}\). Fix or remove it"):
        go(cells, output, Engine())
    with pytest.raises(ValueError, match=f"(?i)line 2.*{why}"):
        read_sections(output)


def test_a_changed_configuration_of_the_base_is_measured_again(tmp_path, output):
    """Without changed weights: an activation function acts, where the configuration came from does not."""
    shutil.copytree(TINY_CLIP, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    content = json.loads(path.read_text())
    (cell,) = make_cells(str(tmp_path / "base"), seeds=[0])
    before = Inputs().digests(cell)

    path.write_text(
        json.dumps(content | {"transformers_version": "4.0", "architectures": ["X"], "torch_dtype": "float16"})
    )
    assert Inputs().digests(cell) == before
    path.write_text(json.dumps(content | {"vision_config": content["vision_config"] | {"hidden_act": "relu"}}))
    after = Inputs().digests(cell)
    assert [name for name in after if after[name] != before[name]] == ["base_configuration"]


def test_a_finished_line_whose_images_cannot_be_read_is_neither_reused_nor_lost(output, tmp_path):
    cell = replace(make_cells(seeds=[0])[0], task="mine", targets=(Target("mine"),))
    Lines(output).append(
        before := {**line(make_cells(seeds=[0])[0]), "key": cell.key, "cell": cell.to_dict()}
        | {"results": [{**figures_of(make_cells(seeds=[0])[0])["results"][0], "task": "mine"}]}
    )
    with pytest.raises(ValueError, match=r"Whether the finished line of few-shot: capt on mine.* cannot be read"):
        go([cell], output, Engine(), root={"mine": str(tmp_path / "gone")})
    assert Lines(output).read() == {cell.key: before}


def test_images_swapped_at_the_same_path_or_under_another_root_are_measured_again(output, tmp_path):
    """Files of the same names, sizes and times: what is in them counts."""

    def write(folder, colours):
        for name, colour in colours.items():
            (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
            for i in range(10):
                path = tmp_path / folder / name / f"{i}.bmp"
                Image.new("RGB", (32, 32), (*colour, i)).save(path)
                os.utime(path, (0, 0))

    def run(folder="images"):
        plan = Plan(
            Suite("own", ("mine",), "mine", ()),
            TINY_CLIP,
            ["zero-shot"],
            ["few-shot"],
            [1],
            [0],
            attacks=["fgsm"],
            limit=4,
        )
        (one,) = run_cells(plan.cells(), output, root={"mine": str(tmp_path / folder)}, progress=False).values()
        return one

    write("images", {"red": (255, 0), "green": (0, 255)})
    first, again = run(), run()
    assert again == first and first["status"] == "finished"
    write("images", {"red": (0, 255), "green": (255, 0)})
    swapped = run()
    assert swapped["measured_data"] != first["measured_data"]
    write("elsewhere", {"red": (255, 0), "green": (0, 255)})
    back = run("elsewhere")
    assert back["measured_data"] == first["measured_data"] and back["results"] == first["results"]
    assert output.read_bytes().count(b"\n") == 3


def test_each_line_is_on_the_disk_before_the_next_cell_runs(output):
    cells, found = make_cells(), []

    def engine(cell, adapters, root, tune):
        found.append(list(Lines(output).read()))
        return line(cell)

    go(cells, output, engine)
    assert found == [[], [cells[0].key], [cells[0].key, cells[1].key]]


def test_lines_of_other_plans_are_left_alone_and_not_returned(output):
    first, *others = make_cells()
    Lines(output).append(line(first))
    assert list(go(others, output, Engine())) == [cell.key for cell in others]
    assert set(Lines(output).read()) == {cell.key for cell in make_cells()}


def test_one_cell_that_fails_does_not_stop_the_others(output):
    zero_shot = replace(make_cells()[0], method="zero-shot", settings={}, prompts={})
    cells = [zero_shot, replace(make_cells()[0], shots=1000), replace(zero_shot, seed=1)]
    lines = run_cells(cells, output, progress=False)
    assert [one["status"] for one in lines.values()] == ["finished", "failed", "finished"]
    assert "1000" in lines[cells[1].key]["error"]["message"]


def test_an_interrupt_ends_the_run_and_leaves_the_lines_that_there_are(output):
    cells = make_cells()

    def engine(cell, adapters, root, tune):
        if cell == cells[1]:
            raise KeyboardInterrupt
        return line(cell)

    with pytest.raises(KeyboardInterrupt):
        go(cells, output, engine)
    assert list(Lines(output).read()) == [cells[0].key]


def test_the_place_of_the_data_sets_reaches_the_cells(output):
    (one,) = go(make_cells(seeds=[0]), output, Engine(), root="/data").values()
    assert one["root"] == "/data"


# ---------------------------------------------------------------------------------------------------------- the list


def test_the_list_shows_states_durations_and_the_time_left(output):
    cells = make_cells(seeds=range(5))
    for cell in cells[:3]:
        Lines(output).append(line(cell, seconds=60.0))
    Lines(output).append(line(cells[3], "failed"))
    *rows, total = listing(cells, output).splitlines()
    assert [row.split()[0] for row in rows] == [cell.key for cell in cells]
    assert [row[14:22].strip() for row in rows] == ["finished", "finished", "finished", "failed", "to run"]
    assert all(
        "60 s" in row and row.endswith(f"few-shot: capt on digits, 1 shot, seed {i}") for i, row in enumerate(rows)
    )
    assert total == "5 cells, 3 finished; the others should take 2 min."
    assert listing(cells, output, workers=2).endswith("should take 60 s with 2 workers.")


def test_without_finished_cells_the_list_gives_no_times(output):
    *rows, total = listing(make_cells(), output).splitlines()
    assert total == "3 cells, 0 finished; the others take an unknown time, as none has run."
    assert all(" ?  few-shot" in row for row in rows)
    assert not output.parent.exists() or list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "1 s"), (40.4, "40 s"), (89, "89 s"), (100, "2 min"), (89 * 60, "89 min"), (12000, "3 h 20 min"), (7260, "2 h 01 min")],
)  # fmt: skip
def test_durations_are_written_as_people_say_them(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"settings": {"max_steps": 80, "attack_steps": 2}}, 2),
        ({"settings": {"num_train_epochs": 40.0, "attack_steps": 2}}, 1),
        ({"shots": 4}, 3.2),  # a step has 32 images, and one shot of ten classes has ten
        ({"settings": {"max_steps": 40, "attack_steps": 6}}, 2),
    ],
)
def test_the_cost_of_tuning_grows_with_its_images_and_attack_steps(changes, factor):
    cell = replace(make_cells()[0], settings={"max_steps": 40, "attack_steps": 2}, attacks=(), limit=1)
    assert passes(replace(cell, **changes)) - 1 == pytest.approx(factor * (passes(cell) - 1))


# ----------------------------------------------------------------------------------------------------- killed at any time


def figures(path):
    return {key: (one["status"], one["results"], one["cell"]) for key, one in Lines(path).read().items()}


def kept(output):
    return list(output.with_suffix(".adapters").glob("[!.]*/training.json"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The lines of a run that nobody killed."""
    output = tmp_path_factory.mktemp("whole") / "lines.jsonl"
    main([*KILLED, "--output", str(output)])
    assert len(figures(output)) == 5
    return output


@pytest.mark.timeout(600)  # three starts, on a machine that may be busy
def test_a_run_that_is_killed_ends_as_one_that_is_not_and_runs_nothing_twice(whole, tmp_path):
    killed = tmp_path / "killed" / "lines.jsonl"

    def count():
        return killed.read_bytes().count(b"\n") if killed.exists() else 0

    # when the first adapter has been kept and is measured, and after the third line, when another one is tuned
    for moment in (lambda: kept(killed), lambda: count() >= 3):
        before = killed.read_bytes() if killed.exists() else b""
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *KILLED, "--output", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])},
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while process.poll() is None and not moment() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert killed.read_bytes().startswith(before)
    before = killed.read_bytes()
    assert 3 <= count() < 5
    main([*KILLED, "--output", str(killed)])
    assert killed.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert count() == 5  # no cell has two lines
    assert figures(killed) == figures(whole)
    assert len(kept(killed)) == len(kept(whole)) == 4
    tables = [(path.parent / "lines" / "tables.md").read_text() for path in (whole, killed)]
    assert tables[0] == tables[1]


# ------------------------------------------------------------------------------------- several calls, several workers


def hold(cell, output, started, last):
    """Claims a cell, as another call does, and ends with or without a line."""
    claim = run._claim(cell, output)
    started.set()
    time.sleep(2)
    if last:
        Lines(output).append(last)
        claim.release()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("ends", [True, False])
def test_a_cell_of_another_call_is_waited_for_and_run_only_if_that_call_is_killed(output, ends):
    cells = make_cells()
    context = multiprocessing.get_context("fork")
    started, theirs = context.Event(), line(cells[1], n="theirs") if ends else None
    other = context.Process(target=hold, args=(cells[1], output, started, theirs))
    other.start()
    assert started.wait(60)
    lines = go(cells, output, engine := Engine())
    other.join(60)
    assert engine.given == [cells[0], cells[2]] + ([] if ends else [cells[1]])
    assert lines[cells[1].key].get("n") == ("theirs" if ends else None)
    assert output.read_bytes().count(b"\n") == 3
    leftovers = [path for path in output.parent.iterdir() if path.name.startswith(".capt-lock")]
    assert len(leftovers) <= 1  # of the killed one


@pytest.mark.timeout(600)
def test_two_copies_of_a_command_one_of_them_with_workers_share_its_cells(whole, tmp_path):
    shared = tmp_path / "shared.jsonl"
    copies = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *KILLED, "--output", str(shared), "--workers", workers],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])},
        )
        for workers in "12"
    ]  # fmt: skip
    shown = [copy.communicate(timeout=280)[0] for copy in copies]
    assert all("5 of 5 cells are finished" in text for text in shown), shown
    assert shared.read_bytes().count(b"\n") == 5  # none was run twice
    assert figures(shared) == figures(whole)


def test_workers_that_cannot_be_are_refused_before_anything_is_written(output):
    with pytest.raises(ValueError, match=r"Unknown backend 'slurm'. Allowed: loky, ray, dask"):
        run_cells(make_cells(), output, backend="slurm")
    with pytest.raises(ValueError, match="workers=0"):
        run_cells(make_cells(), output, workers=0)
    assert not output.exists()
