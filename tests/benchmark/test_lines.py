"""The file of lines: what is read back, and what a torn line, a broken one, other writers and a full disk do to it."""

import json
import multiprocessing
import resource
from pathlib import Path

import pytest
from report.benchmark_lines import line as made
from report.benchmark_lines import write

from capt_peft.benchmark import Lines, read_lines
from capt_peft.results.accuracy import Accuracy

PUBLISHED = sorted((Path(__file__).parents[2] / "docs" / "results").glob("*/lines.jsonl"))

A, B = {"key": "a", "status": "finished", "n": 1}, {"key": "b", "status": "failed", "n": 2}


@pytest.fixture
def lines(tmp_path):
    return Lines(tmp_path / "folder" / "lines.jsonl")


def filled(lines, *content):
    for line in content:
        lines.append(line)
    return lines.path.read_bytes()


def test_what_is_appended_is_read_by_its_key_in_order(lines):
    assert lines.read() == {} and not lines.path.parent.exists()
    filled(lines, A, B)
    assert list(lines.read().items()) == [("a", A), ("b", B)]
    assert [json.loads(text) for text in lines.path.read_text().splitlines()] == [A, B]


def test_any_text_stays_in_one_line(lines):
    line = {"key": "ä", "message": 'two\nlines, "quotes", \u2028 and λ'}
    filled(lines, line, A)
    assert lines.path.read_bytes().count(b"\n") == 2
    assert lines.read() == {"ä": line, "a": A}


def test_the_later_line_of_a_key_wins(lines):
    filled(lines, A, B, {**A, "n": 3})
    assert lines.read() == {"a": {**A, "n": 3}, "b": B}


@pytest.mark.parametrize("cut", [1, 2, 5, 30])
def test_a_torn_last_line_is_ignored_and_removed_by_the_next_append(lines, caplog, cut):
    whole = filled(lines, A)
    torn = filled(lines, {**B, "name": "λ" * 10, "end": "of a long line"})
    lines.path.write_bytes(torn[:-1][:-cut])
    assert lines.read() == {"a": A}
    assert "was cut off" in caplog.text
    filled(lines, B)
    assert lines.path.read_bytes() == whole + json.dumps(B).encode() + b"\n"


def test_a_torn_first_line_is_removed_too(lines):
    filled(lines, A)
    lines.path.write_bytes(lines.path.read_bytes()[:7])
    assert lines.read() == {}
    filled(lines, B)
    assert lines.read() == {"b": B}


def test_a_torn_line_longer_than_a_block_is_removed_whole(lines):
    whole = filled(lines, A)
    lines.path.write_bytes(whole + b'{"key": "' + b"x" * 200_000)
    filled(lines, B)
    assert lines.path.read_bytes() == whole + json.dumps(B).encode() + b"\n"


def test_a_last_line_that_lacks_only_its_newline_counts_before_and_after_an_append(lines):
    whole = filled(lines, A, B)
    lines.path.write_bytes(whole[:-1])
    assert lines.read() == {"a": A, "b": B}
    filled(lines, {**A, "n": 3})
    assert lines.read() == {"a": {**A, "n": 3}, "b": B}
    assert lines.path.read_bytes() == whole + json.dumps({**A, "n": 3}).encode() + b"\n"


def test_empty_lines_are_passed_over(lines):
    content = filled(lines, A, B)
    lines.path.write_bytes(content.replace(b"\n", b"\n\n"))
    assert lines.read() == {"a": A, "b": B}


@pytest.mark.parametrize("broken", [b'{"key": "x"', b"[1, 2]", b'{"status": "finished"}', b"\xff\xfe"])
def test_a_broken_line_in_the_middle_is_refused_with_its_number(lines, broken):
    content = filled(lines, A, B).split(b"\n")
    lines.path.write_bytes(b"\n".join([content[0], broken, content[1], b""]))
    with pytest.raises(ValueError, match=r"Line 2 of .*lines\.jsonl is not a line of a benchmark .*Fix or remove it"):
        lines.read()


def append_many(path, name, start):
    start.wait(60)
    for i in range(40):
        Lines(path).append({"key": f"{name}{i}", "text": name * 3000})


def test_processes_that_append_at_the_same_time_lose_nothing(lines):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    writers = [context.Process(target=append_many, args=(lines.path, name, start)) for name in "xy"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(100)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert {key: line["text"] for key, line in lines.read().items()} == {
        f"{name}{i}": name * 3000 for name in "xy" for i in range(40)
    }


@pytest.mark.parametrize("room", [0, 100])
@pytest.mark.parametrize("length", [1000, 100_000])
def test_a_full_disk_leaves_the_file_as_it_was(lines, length, room):
    """The limit on the size of files stands for the disk: the kernel writes what still fits and then refuses, as there."""
    content = filled(lines, A, B)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) + room, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            lines.append({"key": "c", "text": "x" * length})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lines.path.read_bytes() == content
    filled(lines, {**A, "n": 3})
    assert lines.read() == {"a": {**A, "n": 3}, "b": B}


def test_a_folder_is_no_file_of_lines(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder; the lines go to a file, such as .*lines\.jsonl"):
        Lines(tmp_path)


# --------------------------------------------------------------------------------------------------------- typed lines


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_lines_are_read_and_known_by_their_keys(path):
    found = read_lines(path)
    assert len(found) == len(Lines(path).read()) > 0
    assert all(line.key == line.cell.key and line.error is None for line in found)


def test_a_typed_line_has_the_cell_and_its_counts_or_the_error(tmp_path):
    lines = [made(clean=85, robust=45) | {"training_data": "a"}, made(seed=1, error="out of memory")]
    finished, failed = read_lines(write(tmp_path / "a.jsonl", lines))
    assert (finished.cell.label, finished.cell.tuned, finished.error) == ("capt", True, None)
    assert str(finished.cell.threat) == "L-inf 10/255"
    assert finished.results[0].clean == Accuracy(170, 200)
    assert finished.results[0].attacks == {"pgd-20": Accuracy(90, 200)}
    assert finished.digests == {"training_data": "a"}
    assert (failed.cell.seed, failed.results, failed.error) == (1, (), "ValueError: out of memory")


def test_of_several_files_the_later_line_of_a_key_counts_and_stands_last(tmp_path):
    first = write(tmp_path / "a.jsonl", [made(error="no"), made(seed=1)])
    second = write(tmp_path / "b.jsonl", [made()], end=json.dumps(made(seed=2))[:-5])
    assert [(line.cell.seed, line.error) for line in read_lines(first, second)] == [(1, None), (0, None)]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"cell": {**made()["cell"], "protocol": "zero"}}, "the protocol is 'zero'"),
        ({"cell": {**made()["cell"], "shots": "many"}}, "the number of shots is 'many'"),
        ({"cell": made(seed=1)["cell"]}, "its key is '[0-9a-f]{12}', that of its cell '[0-9a-f]{12}'"),
        ({"results": [{"task": "shapes", "classes": "all", "clean": {"correct": 3, "n": 2}, "attacks": {}}]}, "3 of 2"),
        ({"results": [{"task": "shapes"}]}, "KeyError: 'clean'"),
    ],
)
def test_a_typed_line_that_says_what_cannot_be_is_refused(tmp_path, changes, why):
    path = write(tmp_path / "lines.jsonl", [made(), {**made(), **changes}])
    with pytest.raises(ValueError, match=rf"Line 2 of .*lines\.jsonl is not a line of a benchmark \(.*{why}"):
        read_lines(path)
