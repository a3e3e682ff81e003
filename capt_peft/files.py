"""Files that are written whole or not at all, under a temporary name first, and files that end when they are read."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """Gives an empty folder to write into, whose files move to `folder` once all of them are written.

    Files of `folder` with other names stay; if the block raises, `folder` stays as it was.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        folder.mkdir(exist_ok=True)
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    path = Path(path)
    with written_whole(path.parent) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a file to read its bytes, and nothing that may have no end: a pipe, a device, a socket.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is something else than a file, or cannot be opened.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise ValueError(f"{path} cannot be read ({error}).") from error
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
    raise ValueError(f"{path} is {kind}, not a file.")
