"""Outputs of long work: locked while it runs, and kept somewhere else where its end cannot be written."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError

from .files import written_whole
from .text import short

logger = logging.getLogger(__name__)


class OutputLock:
    """Keeps other runs from writing to the same place until it is released, or goes away, or the process ends, however it ends.

    The lock is the system's and not the file's: the file of a killed run stops nobody, on this machine or another. Where the file
    system has no locks there is none. The same process may lock a place again.

    Args:
        folder: A folder that can be written into; it is created if needed.
        name: What in it is locked, if not all of it.
        wait: Wait until another process has released it, for what takes no time.

    Raises:
        ValueError: Another run has locked it; the message says which.
    """

    def __init__(self, folder: str | Path, name: str = "", *, wait: bool = False) -> None:
        path = Path(os.path.realpath(folder), f".capt-lock-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path, thread_local=False, is_singleton=True)
        try:
            self._lock.acquire(blocking=wait)
        except Timeout:
            owner = _owner(path) or "it has just begun"
            raise ValueError(
                f"Another run is writing to {short(Path(folder, name))}: {owner}. Wait until it has ended, or give another "
                "output. Nothing was done yet."
            ) from None
        except (OSError, NotImplementedError) as error:
            logger.debug("%s cannot be locked: %s", Path(folder, name), error)
            path.unlink(missing_ok=True)
        else:
            with suppress(OSError):  # Windows keeps all others from a locked file, this process's other handles too
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        self.release: Callable[[], Any] = weakref.finalize(self, _release, self._lock, path, os.getpid())


def _owner(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:200]
    except OSError:
        return "it cannot be told which"


def _release(lock: BaseFileLock, path: Path, process: int) -> None:
    if process != os.getpid() or not lock.is_locked:  # a forked child has the object, but not the lock
        return
    if lock.lock_counter == 1:
        with suppress(OSError):  # Windows keeps a file that is open
            path.unlink()
    lock.release()


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
