"""What was measured before and can be used again: whole evaluations, and the pieces of one that was killed."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from ..attacks import LogitsFn
from ..randomness import own_random_state
from ..results.earlier import RANDOM, TOLERANCE, changes, logit_distance, set_aside
from ..results.evaluation import SUFFIXES, Evaluation
from ..results.retrieval import Retrieval
from ..utils.files import DamagedFileError, make_writable, read_json, write_json
from ..utils.outputs import OutputLock, main_process_says
from .images import Examples, spread
from .subject import Subject

SAMPLED = 16  # images
KEPT = 32  # numbers per image

_Result = TypeVar("_Result", Evaluation, Retrieval)

logger = logging.getLogger(__name__)


def finished(output: Path, configuration: Mapping[str, Any], kind: type[_Result]) -> _Result | None:
    """Returns what an earlier call has finished with the same configuration; None if it must be measured (again).

    Results of another configuration are set aside.

    Raises:
        ValueError: The file holds something else than results of this kind.
    """
    if not main_process_says(lambda: _is_of(output, configuration, kind.__name__.lower())):
        return None
    try:
        found = kind.load(output)
    except ValueError as error:
        logger.warning("%s The evaluation is measured again.", error)
        return None
    logger.info("%s holds this evaluation already.", output)
    return found


def _is_of(output: Path, configuration: Mapping[str, Any], kind: str) -> bool:
    if not output.exists():
        return False
    try:
        content = read_json(output)
    except DamagedFileError as error:
        logger.warning("%s The evaluation is measured again.", error)
        return False
    if content.get("kind") != kind:
        raise ValueError(
            f"{output} holds something else than an evaluation of this kind. Give another output, or overwrite=True."
        )
    changed = changes(configuration, content.get("configuration") or {})
    if changed:
        set_aside(output, SUFFIXES, changed)
    return not changed


class Jobs:
    """The results of finished pieces of work, by name, in memory and, with a folder, on disk until all of them are done.

    Results of another configuration are set aside, or thrown away with `overwrite`.

    Raises:
        ValueError: Nothing can be written there, or another evaluation does.
    """

    def __init__(self, folder: Path | None, configuration: Mapping[str, Any], *, overwrite: bool) -> None:
        self.folder = folder
        self.done: dict[str, Any] = {}
        if folder is None:
            return
        state = PartialState()
        self._lock: OutputLock | None = None
        main_process_says(lambda: self._open(folder, configuration, overwrite))
        for path in sorted((folder / "jobs").glob("*.json")):
            try:
                content = read_json(path)
                if "result" not in content or content.get("hash") != _hash(content["result"]):
                    raise DamagedFileError(f"{path} is damaged (its content does not match its hash).")
                self.done[path.stem] = content["result"]
            except DamagedFileError as error:
                logger.warning("%s The piece of work is measured again.", error)
        if self.done and state.is_main_process:
            logger.info("Going on with %s: %d pieces of work are done.", folder, len(self.done))
        state.wait_for_everyone()  # all have read before anyone writes: they agree on what is left

    def _open(self, folder: Path, configuration: Mapping[str, Any], overwrite: bool) -> None:
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
            set_aside(folder, (".partial",), changed)
        if found is None or changed:
            for other in (path, jobs, folder / "images"):
                _remove(other)
            jobs.mkdir(parents=True)
            write_json(path, configuration)

    def keep(self, name: str, result: Any) -> None:
        """Keeps the result of a piece of work, in JSON types, whole or not at all."""
        self.done[name] = result
        if self.folder is not None:
            write_json(self.folder / "jobs" / f"{name}.json", {"result": result, "hash": _hash(result)})

    def of_all(self) -> dict[str, Any]:
        """Returns the results of all processes, by name; every process calls it."""
        return {name: result for done in gather_object([self.done]) for name, result in done.items()}

    def remove(self) -> None:
        """Removes the folder, once its results are elsewhere."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._lock is not None:
                self._lock.release()


def _hash(result: Any) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sample_logits(subject: Subject, examples: Examples, batch_size: int) -> tuple[dict[str, Any], int]:
    """Runs the model on a few images, always the same and in the same batches, to tell it from others of the same name.

    Returns:
        The number of classes is second. First, for the record, are the images' places and the logits on them: of what decides
        (`scored`), and of what attacks see where that is another function (`attacked`); see `compared_logits`.
    """
    places = spread(range(len(examples)), SAMPLED)
    size = min(batch_size, SAMPLED)
    chunks = [places[i : i + size] for i in range(0, len(places), size)]
    batches = [examples.batch(chunk, subject.device)[0] for chunk in chunks]  # each (b, 3, H, W)
    scored = logits_twice(subject.scored, batches, subject.device)
    record: dict[str, Any] = {"images": places, "scored": compared_logits(*scored)}
    if subject.attacked_is_other:
        record["attacked"] = compared_logits(*logits_twice(subject.attacked, batches, subject.device))
    return record, scored[0].shape[1]


def logits_twice(function: LogitsFn, batches: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Returns the logits (16, N) of two runs, with the same global random numbers in each."""
    runs = []
    for _ in range(2):
        with torch.no_grad(), own_random_state(0, device):
            runs.append(torch.cat([function(pixels).double().cpu() for pixels in batches]))
    return runs


def compared_logits(first: Tensor, second: Tensor) -> str | list[list[float]]:
    """Returns the logits (n, N) of two runs of a model, or "random" if they differ; more than 32 as 32 sums of them."""
    first, second = _projected(first), _projected(second)
    if logit_distance(first, second) > TOLERANCE / 2:
        return RANDOM
    return [[float(f"{value:.7g}") for value in row] for row in first.tolist()]


def _projected(logits: Tensor) -> Tensor:
    """Returns sums with random signs in place of many logits."""
    width = logits.shape[1]
    if width <= KEPT:
        return logits
    logits = logits.sign() * logits.abs().log1p()  # or a masked class, at -1e9, would drown all others
    signs = torch.randint(0, 2, (width, KEPT), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    return logits @ signs / width**0.5
