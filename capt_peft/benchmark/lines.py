"""The file of a benchmark: one JSON line a cell, written whole, in the order in which the cells ended."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..report.lines import contradiction
from .plan import ZERO_SHOT, Cell

logger = logging.getLogger(__name__)


class Lines:
    """A file of benchmark lines that several processes may append to.

    Args:
        path: The file; it need not exist yet.

    Raises:
        ValueError: A line other than the last that is not a JSON object, figures that cannot be, or a path that is a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder; the lines go to a file, such as {self.path / 'lines.jsonl'}.")

    def read(self) -> dict[str, dict[str, Any]]:
        """Returns the last line of each cell, by its key. A last line that was cut short is left out, with a warning."""
        if not self.path.exists():
            return {}
        lines = {}
        content = self.path.read_bytes().split(b"\n")
        for number, text in enumerate(content, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                lines[line["key"]] = line
            except (ValueError, KeyError, TypeError) as error:
                if number < len(content):
                    raise ValueError(
                        f"Line {number} of {self.path} is not a line of a benchmark ({str(error)[:200]}). Fix or remove it."
                    ) from error
                logger.warning("The last line of %s was cut short; its cell runs again.", self.path)
                continue
            if why := _contradiction(line):
                raise ValueError(f"Line {number} of {self.path} has figures that cannot be ({why}). Fix or remove it.")
        return lines

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes a line at the end and onto the disk, in one piece; what was cut short there before is removed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        with self.path.open("a+b", buffering=0) as file:  # a buffer would be written again after a failure
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            end = self._end_of_whole_lines(file)
            if _is_json(os.pread(file.fileno(), size - end, end)):  # read() counts a line that lacks only its newline
                end, text = size, b"\n" + text
            file.truncate(end)
            try:
                left = memoryview(text)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)  # a full disk must not leave half a line
                raise

    @staticmethod
    def _end_of_whole_lines(file: Any) -> int:
        """Returns the place behind the last newline."""
        end: int = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
        return 0


def _contradiction(line: Mapping[str, Any]) -> str | None:
    try:
        return next(filter(None, map(contradiction, line["results"])), None)
    except (KeyError, TypeError, AttributeError):
        return None  # not whole, so that its cell runs again


def is_whole(line: Mapping[str, Any], cell: Cell) -> bool:
    """Returns whether a line is finished and has every figure of its cell."""
    try:
        results = line["results"]
        targets = [(target.task, target.classes) for target in cell.targets]
        return (
            line["status"] == "finished"
            and line["cell"] == cell.to_dict()
            and [(result["task"], result["classes"]) for result in results] == targets
            and all(len(result["attacks"]) == len(set(cell.attacks)) for result in results)
            and all(
                isinstance(count["correct"], int) and 0 <= count["correct"] <= count["n"] and count["n"] > 0
                for result in results
                for count in (result["clean"], result["worst_case"], *result["attacks"].values())
            )
            and (cell.method == ZERO_SHOT or isinstance(line["training"], dict))
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
