"""Files that are written whole or not at all, into folders that were tried before; and reading of files that have an end."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.resources.abc import Traversable
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml

from .text import short

PROBE_BYTES = 1 << 20  # what is written to try a folder: more than an adapter has
DAY = 24 * 60 * 60
_LEFTOVER = re.compile(r"\.capt-([0-9a-f]{8})-(\d+)-.+")
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


@contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """Gives an empty folder to write into, whose files move to `folder` once all of them are written.

    It lies within `folder`, so that a mount point, a link to another disk and a parent that is read-only do no harm. Files of
    `folder` with other names stay, and links stay links: what they lead to is replaced. If the block raises, `folder` stays as it
    was. The files get the permissions that new files have.
    """
    folder = _real(folder)
    with _temporary_in(folder) as temporary:
        mode = _mode_of_new_files(temporary)
        yield temporary
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            if stat.S_IMODE(path.stat().st_mode) != mode:
                path.chmod(mode)  # safetensors' own are for the owner alone
            sync(path)  # or after a power failure the name may be there without the content
            _put(path, folder / path.relative_to(temporary))


def sync(path: Path) -> None:
    """Waits until the disk holds a file or, where the system can say so, the names in a folder."""
    if os.name == "posix" or not path.is_dir():
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _temporary_in(folder: Path) -> Iterator[Path]:
    """Gives a hidden folder within `folder`, removed in the end, and `folder` too if it was not there and nothing is in it."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".capt-{_machine()}-{os.getpid()}-", dir=folder))
    try:
        _remove_leftovers(folder, now=temporary.stat().st_mtime)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # what is in use stays
            for path in created:
                path.rmdir()


def _put(path: Path, target: Path) -> None:
    """Moves a file to its place; of a link, to where it leads."""
    target = _real(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_place(target)
    try:
        os.replace(path, target)
    except OSError as error:
        if error.errno == errno.EXDEV:  # a link or a mount point leads to another disk
            with written_whole(target.parent) as temporary:
                shutil.copyfile(path, temporary / target.name)
        elif error.errno == errno.EBUSY:  # a file that is mounted cannot be replaced, only filled
            shutil.copyfile(path, target)
        else:
            raise


def _check_place(target: Path) -> None:
    """Raises an OSError unless a file may be put there: os.replace would put one in the place of a device, too."""
    with suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EEXIST, f"{_KINDS.get(stat.S_IFMT(mode), 'a device')} has that name", str(target))


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def _mode_of_new_files(folder: Path) -> int:
    path = folder / "mode"
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


def _remove_leftovers(folder: Path, now: float) -> None:
    """Removes what killed writers left behind: of processes that are gone, and of other machines if it is a day old."""
    with os.scandir(folder) as found:
        leftovers = [(entry, match) for entry in found if (match := _LEFTOVER.fullmatch(entry.name))]
    for entry, match in leftovers:
        with suppress(OSError):  # somebody else removes it
            if _is_gone(match[1], int(match[2])) or now - entry.stat().st_mtime > DAY:
                shutil.rmtree(entry.path)


def _is_gone(machine: str, process: int) -> bool:
    """Returns whether a process is known to have ended."""
    if machine == _machine() and sys.platform != "win32":  # there the signal 0 does not merely ask
        try:
            os.kill(process, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            return False
    return False


@cache
def _machine() -> str:
    """Returns a word for where a process id means one process: this machine, since it was started, in this container."""
    known = [socket.gethostname()]
    with suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        known.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]


def entries(folder: Path) -> list[Path]:
    """Returns what is in a folder, without what killed writers left there."""
    return sorted(path for path in folder.iterdir() if not _LEFTOVER.fullmatch(path.name))


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, whole or not at all. Names of files that are no UTF-8 are written with escapes, as JSON reads them."""
    path = Path(path)
    with written_whole(path.parent) as folder:
        (folder / path.name).write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def make_writable(folder: str | Path, *names: str, given: str = "output") -> None:
    """Tries, before long work, whether its results can be written into a folder, and leaves everything as it was.

    Args:
        folder: Where they will be written; it need not exist yet. 1 MiB is written there and removed again.
        names: Files that will be written; what stands there must be files.
        given: Name of the argument that says where to write, for the message.

    Raises:
        ValueError: Nothing can be written there, or something else than a file has such a name.
    """
    real = _real(folder)
    try:
        with _temporary_in(real) as temporary, (temporary / "probe").open("wb") as file:
            file.write(os.urandom(PROBE_BYTES))  # some disks take any number of zeros
            os.fsync(file.fileno())
        for name in names:
            _check_place(real / name)
    except OSError as error:
        raise unwritable(folder, error, given) from error
    for parent in {_real(real / name).parent for name in names} - {real}:  # where links lead
        make_writable(parent, given=given)


def unwritable(folder: str | Path, error: Exception, given: str = "output") -> ValueError:
    """Returns the error for a folder that cannot be written into."""
    reason = getattr(error, "strerror", None) or str(error)
    place = getattr(error, "filename", None)
    return ValueError(
        f"Nothing can be written into {given}={short(folder)!r} ({short(reason)}{f': {short(place)}' if place else ''}). Give "
        f"another {given}, or make this one writable. Nothing was done yet."
    )


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
    raise ValueError(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, not a file.")


class DamagedFileError(ValueError):
    """A file that holds something else than what was written to it; the message names it."""


def read_entries(path: Traversable) -> dict[str, dict[str, Any]]:
    """Returns the entries of a YAML file of the package by name, in the order of the file, with tuples in place of lists."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
        for name, entry in content.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file that holds an object.

    Raises:
        DamagedFileError: It holds something else.
        FileNotFoundError: There is no such file.
    """
    try:
        with open_regular(path) as file:
            content = json.loads(file.read().decode())
    except FileNotFoundError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged ({str(error)[:200]}).") from error
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} is damaged (not a JSON object).")
    return content
