"""The file of a benchmark: one JSON line per cell, written whole, in the order in which the cells ended."""

from __future__ import annotations

import json
import logging
import operator
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..defences import adaptive, parse_defence
from ..results.accuracy import Accuracy
from ..utils.outputs import OutputLock
from ..utils.text import some
from .plan import Cell, Target

logger = logging.getLogger(__name__)

DIGESTS = (
    "measured_images", "measured_data", "training_images", "training_data", "base_model_fingerprint", "base_configuration",
    "processor", "teacher_fingerprint",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What was measured on one target.

    Attributes:
        task: Name of the data set.
        classes: "all", "base" or "new".
        clean: Accuracy without an attack.
        attacks: Accuracy under each attack, by its name.
        worst_case: The share of images that no attack broke; None in lines of versions that did not count it.
        template: The text of a class, or several; None in such lines.
        by_protocol: The share of images that no attack of the published protocol broke; None without one.
        undefended: Clean and worst-case accuracy of the same images without the defence; None if the cell has none.
    """

    task: str
    classes: str
    clean: Accuracy
    attacks: Mapping[str, Accuracy]
    worst_case: Accuracy | None = None
    template: str | tuple[str, ...] | None = None
    by_protocol: Accuracy | None = None
    undefended: tuple[Accuracy, Accuracy] | None = None

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Result:
        """Reads one of the `results` of a line.

        Raises:
            KeyError, TypeError, AttributeError: A figure is missing.
            ValueError: Figures that cannot be, such as more correct images under an attack than without.
        """
        if why := _contradiction(row):
            raise ValueError(why)
        attacks = {name: _accuracy(count) for name, count in row["attacks"].items()}
        worst, named = (
            None if row.get(name) is None else _accuracy(row[name]) for name in ("worst_case", "by_protocol")
        )
        template = row.get("template")
        template = tuple(template) if isinstance(template, list) else template
        without = row.get("undefended")
        undefended = None if without is None else (_accuracy(without["clean"]), _accuracy(without["worst_case"]))
        return cls(row["task"], row["classes"], _accuracy(row["clean"]), attacks, worst, template, named, undefended)


@dataclass(frozen=True)
class Line:
    """What one run of a cell left.

    Attributes:
        key: The key of the cell.
        cell: The cell.
        results: One per target; empty if the run failed.
        error: Why it failed, as "ValueError: ..."; None if it finished.
        collapsed: How the tuned model collapsed; None if it did not.
        digests: What of `DIGESTS` the line has, which say of which images and models its figures are.
    """

    key: str
    cell: Cell
    results: tuple[Result, ...] = ()
    error: str | None = None
    collapsed: str | None = None
    digests: Mapping[str, Any] = field(default_factory=dict)

    def check_step_size(self) -> None:
        """Raises a ValueError where the cell has a step size of its own, and a figure is under an attack with another one."""
        if self.cell.eval_step_size is None:
            return
        asked = {attack.name for attack in self.cell.parsed_attacks()}
        measured = {name.rsplit(" (", 1)[0] for result in self.results for name in result.attacks}
        if measured - asked:
            raise ValueError(
                f"{self.cell} has figures under {some(sorted(measured - asked))}, but its step size is "
                f"{self.cell.eval_step_size}: {some(sorted(asked))}. Measure it again."
            )

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Line:
        """Reads the JSON object of a line.

        Raises:
            KeyError, TypeError, AttributeError: Something is missing.
            ValueError: It says what cannot be.
        """
        cell = Cell.from_dict(line["cell"])
        if line["key"] != cell.key:
            raise ValueError(f"its key is {line['key']!r}, that of its cell {cell.key!r}: one of them was edited")
        if line["status"] == "failed":
            return cls(line["key"], cell, error=f"{line['error']['type']}: {line['error']['message']}")
        if line["status"] != "finished":
            raise ValueError(f"the status is {line['status']!r}")
        results = tuple(map(Result.from_dict, line["results"]))
        digests = {name: line[name] for name in DIGESTS if line.get(name)}
        return cls(line["key"], cell, results, None, (line.get("training") or {}).get("collapsed"), digests)


def read_lines(*paths: str | Path) -> list[Line]:
    """Reads the lines of one or several files, given in the order in which they were written.

    Returns:
        The last line of each key, in the order of the files. A last line that was cut off is left out, with a warning.

    Raises:
        ValueError: A line is broken, or says what cannot be; the message has its number.
    """
    lines: dict[str, Line] = {}
    for path in map(Path, paths):
        for number, content in _objects(path):
            try:
                line = Line.from_dict(content)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise _broken(path, number, error) from error
            lines.pop(line.key, None)  # so that the later line also stands at the later place
            lines[line.key] = line
    return list(lines.values())


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the JSON objects of a file that have a key, and the numbers of their lines."""
    content = path.read_bytes().split(b"\n")
    for number, text in enumerate(content, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            line["key"]
        except (ValueError, KeyError, TypeError) as error:  # also where a letter of several bytes was cut
            if number < len(content):
                raise _broken(path, number, error) from error
            logger.warning("The last line (%d) of %s was cut off and is left out.", number, path)
            return
        yield number, line


def _broken(path: Path, number: int, error: Exception) -> ValueError:
    why = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
    return ValueError(f"Line {number} of {path} is not a line of a benchmark ({why[:200]}). Fix or remove it.")


class Lines:
    """A file of benchmark lines that several processes may append to.

    Args:
        path: The file; it need not exist yet.

    Raises:
        ValueError: A path that is a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder; the lines go to a file, such as {self.path / 'lines.jsonl'}.")

    def read(self) -> dict[str, dict[str, Any]]:
        """Returns the last line of each cell, by its key. A last line that was cut off is left out, with a warning.

        Raises:
            ValueError: A line other than the last that is not a JSON object, or figures that cannot be.
        """
        lines = {}
        for number, line in _objects(self.path) if self.path.exists() else ():
            lines[line["key"]] = line
            try:
                for row in line["results"]:
                    Result.from_dict(row)
            except (KeyError, TypeError, AttributeError):
                continue  # not whole, so that its cell runs again
            except ValueError as error:
                raise ValueError(
                    f"Line {number} of {self.path} has figures that cannot be ({error}). Fix or remove it."
                ) from error
        return lines

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes a line at the end and onto the disk, in one piece; what was cut off there before is removed."""
        text = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        lock = OutputLock(self.path.parent, f"{self.path.name}, to append", wait=True)
        try:
            with self.path.open("a+b", buffering=0) as file:  # a buffer would be written again after a failure
                file.seek(0)
                content = file.read()
                end = content.rfind(b"\n") + 1
                if _is_json(content[end:]):  # read() counts a line that lacks only its newline
                    end, text = len(content), b"\n" + text
                file.truncate(end)
                try:
                    left = memoryview(text)
                    while left:
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)  # a full disk must not leave half a line
                    raise
        finally:
            lock.release()


def is_whole(line: Mapping[str, Any], cell: Cell) -> bool:
    """Returns whether a line is finished and has every figure of its cell."""
    try:
        results = Line.from_dict(line).results
        return (
            line["status"] == "finished"
            and line["cell"] == cell.to_dict()
            and [Target(result.task, result.classes) for result in results] == list(cell.targets)
            and all(_has_all(result, cell) for result in results)
            and (cell.evaluation_protocol is None or all(r.by_protocol is not None for r in results))
            and (not cell.tuned or isinstance(line["training"], dict))
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _has_all(result: Result, cell: Cell) -> bool:
    """Returns whether a result has a figure for each attack of the cell and, with a defence, for each way to it."""
    if result.worst_case is None or bool(cell.defence) != (result.undefended is not None):
        return False
    expected = list(dict.fromkeys(cell.parsed_attacks()))
    if cell.defence:
        expected = adaptive(expected, parse_defence(cell.defence))
    return [attack.name for attack in expected] == list(result.attacks)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _contradiction(row: Mapping[str, Any]) -> str | None:
    """Returns why the figures of a result cannot be: an image counts under an attack only if it counts without."""
    clean, attacks, worst = row["clean"], dict(row["attacks"]), row.get("worst_case")
    if row.get("by_protocol") is not None:
        attacks["the protocol"] = row["by_protocol"]
    counts = {"clean": clean, **attacks} | ({} if worst is None else {"the worst case": worst})
    for name, count in counts.items():
        decisions = count.get("decisions", 1)
        if count["n"] < 1 or decisions < 1 or not 0 <= count["correct"] <= count["n"] * decisions:
            return f"{name}: {_of(count)} is not an accuracy"
        if (count["n"], decisions) != (clean["n"], clean.get("decisions", 1)) or count["correct"] > clean["correct"]:
            return f"{name}: {_of(count)} cannot be beside {_of(clean)} of clean images"
    if (without := row.get("undefended")) is not None:
        if why := _contradiction({"clean": without["clean"], "attacks": {"the worst case": without["worst_case"]}}):
            return f"without the defence, {why}"
        if without["clean"]["n"] != clean["n"]:
            return f"without the defence, {_of(without['clean'])} cannot be beside {_of(clean)} of clean images"
    for name, count in attacks.items():
        if worst is not None and worst["correct"] > count["correct"]:
            return f"the worst case: {_of(worst)} cannot be beside {_of(count)} under {name}"
    return None


def _of(count: Mapping[str, Any]) -> str:
    return f"{count['correct']} of {count['n']}"


def _accuracy(count: Mapping[str, Any]) -> Accuracy:
    correct, n = operator.index(count["correct"]), operator.index(count["n"])
    return Accuracy(correct, n, operator.index(count.get("decisions", 1)))
