"""Outputs of long work: locked while it runs, and kept somewhere else where its end cannot be written."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from traceback import extract_tb
from typing import Any, BinaryIO

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from .files import written_whole
from .text import short

logger = logging.getLogger(__name__)

_held: dict[tuple[int, Path], tuple[BinaryIO, int]] = {}  # what this process has locked, and how often


class OutputLock:
    """Keeps other runs from writing to the same place until it is released, or goes away, or the process ends, however it ends.

    The lock is the system's and not the file's: the file of a killed run stops nobody, on this machine or another. Where the file
    system has no locks there is none. The same process may lock a place again.

    Args:
        folder: A folder that can be written into; it is created if needed.
        name: What in it is locked, if not all of it.

    Raises:
        ValueError: Another run has locked it; the message says which.
    """

    def __init__(self, folder: str | Path, name: str = "") -> None:
        self.path = Path(os.path.realpath(folder), f".capt-lock-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        key = os.getpid(), self.path
        if key in _held:
            file, times = _held[key]
            _held[key] = file, times + 1
        else:
            locked = _locked(self.path, Path(folder, name))
            if locked is not None:
                _held[key] = locked, 1
        self.release: Callable[[], Any] = weakref.finalize(self, _release, key)


def _locked(path: Path, place: Path) -> BinaryIO | None:
    if sys.platform == "win32":
        return None
    import fcntl

    while True:
        file = path.open("a+b", buffering=0)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, children do not inherit and keep it
            if _is_at(path, file):  # else the run that had it has just removed it
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                return file
            file.close()
        except OSError as error:
            file.seek(0)
            owner = file.read(200).decode(errors="replace")
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"Another run is writing to {short(place)}: {owner or 'it has just begun'}. Wait until it has ended, or give "
                    "another output. Nothing was done yet."
                ) from error
            logger.debug("%s cannot be locked: %s", place, error)
            path.unlink(missing_ok=True)
            return None


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _release(key: tuple[int, Path]) -> None:
    if key[0] != os.getpid() or key not in _held:  # a forked child has the list, but not the locks
        return
    file, times = _held.pop(key)
    if times > 1:
        _held[key] = file, times - 1
        return
    key[1].unlink(missing_ok=True)
    file.close()


def main_process_says(function: Callable[[], Any]) -> Any:
    """Calls a function in the main process; all processes return its result, or raise if it raises."""
    value, caught = None, None
    if PartialState().is_main_process:
        try:
            value = function()
        except Exception as error:
            caught = error
    value, message = broadcast_object_list([value, caught and str(caught)])
    if message is not None:
        raise caught or ValueError(message)
    return value


def save_somewhere(folder: str | Path, write: Callable[[Path], Any]) -> None:
    """Has finished work written into a folder, whole or not at all, or, where that fails, into the system's temporary folder.

    Args:
        folder: Where it belongs.
        write: Writes all files into the folder that it is given; it may be called again.

    Raises:
        OSError: It could not be written into `folder`; the message says where it is instead.
    """
    try:
        with written_whole(folder) as temporary:
            write(temporary)
    except Exception as error:
        if not is_failed_write(error):
            raise
        rescue = _written_elsewhere(write)
        raise OSError(
            f"Nothing could be written into {short(folder)}: {short(error)} ({free_space(folder)} there). "
            + (f"What was to be saved is in {rescue}: move it soon." if rescue else "Neither into a temporary folder.")
        ) from error


def _written_elsewhere(write: Callable[[Path], Any]) -> Path | None:
    for place in (None, "/dev/shm"):  # the system's temporary folder; memory
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="capt-peft-", dir=place))
            write(folder)
            return folder
        except Exception as error:
            if not is_failed_write(error):
                raise
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
    return None


def is_failed_write(error: BaseException) -> bool:
    """Tells a full disk from a bug: safetensors raises its own error, and the writer behind torch.save RuntimeErrors."""
    if isinstance(error, RuntimeError) and error.__traceback__ is not None:
        return extract_tb(error.__traceback__)[-1].filename == torch.serialization.__file__
    return isinstance(error, OSError | SafetensorError)


def free_space(folder: str | Path) -> str:
    """Returns how much space is left, in words."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
    except OSError as error:
        return f"the free space cannot be told: {error.strerror}"
