"""Work in pieces whose results are kept on disk, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..results.earlier import changes, set_aside
from ..utils.files import DamagedFileError, make_writable, read_json, write_json
from ..utils.outputs import OutputLock, main_process_says

logger = logging.getLogger(__name__)


class Jobs:
    """The results of finished pieces of work, by name, in memory and, with a folder, on disk.

    Args:
        folder: Where results are kept until all of the work is done; None keeps them in memory only.
        configuration: What the results depend on; JSON types.
        overwrite: Throw away results of another configuration instead of setting them aside.
        stale: Folders that are removed when the work begins, and not when it goes on.

    Raises:
        ValueError: Nothing can be written there, or another evaluation does.
    """

    def __init__(
        self,
        folder: Path | None,
        configuration: Mapping[str, Any],
        *,
        overwrite: bool = False,
        stale: Sequence[Path] = (),
    ) -> None:
        self.folder = folder
        self.done: dict[str, Any] = {}
        if folder is None:
            return
        state = PartialState()
        self._lock: OutputLock | None = None
        main_process_says(lambda: self._open(folder, configuration, overwrite, stale))
        for path in sorted((folder / "jobs").glob("*.json")):
            try:
                self.done[path.stem] = _unsealed(path)
            except DamagedFileError as error:
                logger.warning("%s The piece of work is measured again.", error)
        if self.done and state.is_main_process:
            logger.info("Going on with %s: %d pieces of work are done.", folder, len(self.done))
        state.wait_for_everyone()  # all have read before anyone writes: they agree on what is left

    def _open(self, folder: Path, configuration: Mapping[str, Any], overwrite: bool, stale: Sequence[Path]) -> None:
        make_writable(folder.parent)
        self._lock = OutputLock(folder.parent, folder.name)
        path, jobs = folder / "configuration.json", folder / "jobs"
        found = None
        try:
            found = read_json(path)
        except FileNotFoundError:
            if jobs.exists():
                logger.warning("%s is missing. All pieces of work in %s are measured again.", path, folder)
        except DamagedFileError as error:  # nobody knows what these are results of
            logger.warning("%s All pieces of work in %s are measured again.", error, folder)
        changed = [] if found is None else changes(configuration, found)
        if changed and not overwrite:
            set_aside(folder, (".partial", ".images"), changed)
        if found is None or changed:
            for other in (path, jobs, *stale):
                _remove(other)
            jobs.mkdir(parents=True)
            write_json(path, configuration)

    def keep(self, name: str, result: Any) -> None:
        """Keeps the result of a piece of work, whole or not at all."""
        self.done[name] = result
        if self.folder is not None:
            write_json(self.folder / "jobs" / f"{name}.json", {"result": result, "hash": _hash(result)})

    def remove(self) -> None:
        """Removes the folder, once its results are elsewhere."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._lock is not None:
                self._lock.release()


def _unsealed(path: Path) -> Any:
    content = read_json(path)
    if "result" not in content or content.get("hash") != _hash(content["result"]):
        raise DamagedFileError(f"{path} is damaged (its content does not match its hash).")
    return content["result"]


def _hash(result: Any) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
