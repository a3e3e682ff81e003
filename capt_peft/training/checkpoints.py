"""CheckpointTrainer: checkpoints that are whole or not there, and runs that go on from them to the same end."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..results.card import write_cards_for
from ..results.hub import HubTrainer
from ..results.run import UPLOADED
from ..utils.files import make_writable, unwritable, written_whole
from ..utils.outputs import OutputLock, free_space, is_failed_write, main_process_says, save_somewhere
from .checkpoint_folders import (
    MANIFEST,
    STAGING,
    checkpoints_in,
    clear_staging,
    make_ready,
    named_and_before,
    newest_whole,
    put_in_place,
    rotate,
    seal,
)
from .frozen import FrozenOutputs
from .identity import describe_run, describe_schedule, differences
from .monitor import Monitor

logger = logging.getLogger(__name__)


class CheckpointTrainer(HubTrainer):
    """A Trainer that loses nothing when it is killed; `CaptTrainer` is one.

    A checkpoint is written into a hidden folder, sealed with the hashes of its files and with what the run is, and becomes
    `checkpoint-N` by one rename. A save that fails for want of space leaves nothing, is logged as an error, and the run goes on.
    """

    _frozen_outputs: FrozenOutputs
    _monitor: Monitor
    _staging: Path | None = None
    _lock: OutputLock | None = None
    _run: dict[str, Any] | None = None
    _found: str | None = None
    _best_before: tuple[float | None, int | None] = (None, None)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except OSError as error:
            folder = str(kwargs["args"].output_dir)  # the Trainer creates it
            if error.filename is None or not folder.startswith(str(error.filename)):
                raise
            raise unwritable(folder, error, "output_dir") from error

    # ------------------------------------------------------------------------------------------------------- resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; other arguments and the result as of `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: True (or "true"): go on from the newest whole checkpoint in `args.output_dir`, or begin if
                there is none yet. A path: go on from that checkpoint or, if it is damaged, from the whole one before it.
            args: As of the Trainer.
            kwargs: As of the Trainer.

        Raises:
            ValueError: `args.output_dir` cannot be written into, or another run writes there; there are checkpoints, but none is
                whole; or the checkpoint is of another run: another model, adapter, task, attack, objective or seed.
        """
        locked = self._lock is not None  # by a call of find_checkpoint
        try:
            if resume_from_checkpoint is None or resume_from_checkpoint != self._found:
                resume_from_checkpoint = self.find_checkpoint(resume_from_checkpoint)
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if not locked:
                self.unlock()

    def unlock(self) -> None:
        """Lets other runs write into `args.output_dir`, from which `find_checkpoint` keeps them, once all results are there."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Returns the checkpoint that `train` would go on from, or None; to be called before long work, whose end would be lost.

        No other run writes into `args.output_dir` until `unlock` is called, this trainer goes away, or its process ends.

        Args:
            resume_from_checkpoint: As of `train`.

        Raises:
            ValueError: As of `train`.
        """
        self._found = main_process_says(lambda: self._begin(resume_from_checkpoint))
        if self._saves and self.args.should_save:  # a process that saves for its machine (`save_on_each_node`)
            self._run = self._run or describe_run(self)
        return self._found

    def _begin(self, resume: str | bool | None) -> str | None:
        """Returns the checkpoint to go on from, once all is as it must be."""
        if str(resume).lower() in ("true", "false", "none"):  # the command line knows words only
            resume = str(resume).lower() == "true"
        home = Path(str(self.args.output_dir))
        _check_name(home)
        make_writable(home, *UPLOADED, given="output_dir")
        self._lock = self._lock or OutputLock(home)
        make_ready(home)
        if self._saves or resume:
            self._run = self._run or describe_run(self)
        if not resume:
            return None
        candidates = checkpoints_in(home) if resume is True else named_and_before(Path(str(resume)))
        if not candidates:
            logger.warning("There is no checkpoint in %s yet: the run starts from the beginning.", home)
            return None
        folder, manifest = newest_whole(candidates)
        self._check_same_run(folder, manifest)
        logger.info("Going on from %s.", folder)
        return str(folder)

    @property
    def _saves(self) -> bool:
        return self.args.save_strategy != SaveStrategy.NO

    def _check_same_run(self, folder: Path, manifest: dict[str, Any]) -> None:
        other = "\n  ".join(differences(self._run or {}, manifest["run"]))
        if other:
            raise ValueError(
                f"{folder} is of another run:\n  {other}\nGo on with the settings that it was begun with, or begin anew: without "
                "resume_from_checkpoint, and with another output_dir."
            )
        changed = "\n  ".join(differences(describe_schedule(self), manifest["schedule"]))
        if changed:
            logger.warning(
                "%s was written with other settings:\n  %s\nThe run goes on, but not to where it would have ended without the "
                "change. The optimizer's state, with its learning rate, is that of the checkpoint.",
                folder,
                changed,
            )

    # --------------------------------------------------------------------------------------------------------- saving

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        home = Path(self._get_output_dir(trial))
        checkpoint = home / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged = home / STAGING / checkpoint.name
        best_before = self.state.best_model_checkpoint
        for step in (lambda: self._clear(home), lambda: self._write(model, trial), lambda: self._finish(staged, home)):
            failure = self._in_every_process(step)
            if failure is not None:
                self.state.best_model_checkpoint = best_before
                self._give_up(checkpoint, failure)
                return
        if self.args.should_save:
            try:
                rotate(checkpoint, self.args.save_total_limit, self.state.best_model_checkpoint)
            except OSError as error:
                logger.warning("Checkpoints beyond save_total_limit could not be removed: %s", error)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes the model, whole or not at all; where there is no space for it, somewhere else."""
        folder = output_dir or str(self.args.output_dir)
        if not self.args.should_save:
            super()._save(folder, state_dict)
        elif self._staging:
            with written_whole(folder) as temporary:
                self._write_model(temporary, state_dict, Path(folder))
        else:
            save_somewhere(folder, lambda temporary: self._write_model(temporary, state_dict, Path(folder)))

    def _write_model(self, folder: Path, state_dict: dict[str, Any] | None, home: Path) -> None:
        args, self.args = self.args, _without_tokens(self.args)
        try:
            super()._save(str(folder), state_dict)
            write_cards_for(folder, home)
        finally:
            self.args = args

    def _clear(self, home: Path) -> None:
        if self.args.should_save:
            clear_staging(home)
            (home / STAGING).mkdir(parents=True, exist_ok=True)

    def _write(self, model: nn.Module, trial: Any) -> None:
        """Has the Trainer write its files, as if the staging folder were its output folder."""
        self._staging = Path(self._get_output_dir(trial)) / STAGING
        # without a best step the Trainer has no barrier, at which the others would wait for a process whose disk is full
        best, self.state.best_global_step = self.state.best_global_step, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging, self.state.best_global_step = None, best

    def _finish(self, staged: Path, home: Path) -> None:
        best = self.state.best_global_step
        path = home / f"{PREFIX_CHECKPOINT_DIR}-{best}"
        if best is not None and (best == self.state.global_step or path.is_dir()):
            self.state.best_model_checkpoint = str(path)
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))  # now with the best step
            facts = {"step": self.state.global_step, "resumable": not self.args.save_only_model}
            seal(staged, {**facts, "run": self._run, "schedule": describe_schedule(self)})
            put_in_place(staged, home)
            clear_staging(home)

    def _give_up(self, checkpoint: Path, failure: str) -> None:
        """Leaves nothing of a checkpoint that could not be written, and says so."""
        if self.state.best_global_step == self.state.global_step:  # the best is the best that there is
            self.state.best_metric, self.state.best_global_step = self._best_before
        if not self.args.should_save:
            return
        shutil.rmtree(checkpoint.parent / STAGING, ignore_errors=True)
        latest = self._latest_checkpoint()
        logger.error(
            "%s could not be written: %s (%s there). Nothing of it is left, and the run goes on%s. %s",
            checkpoint,
            failure,
            free_space(checkpoint.parent),
            "" if self.state.global_step >= self.state.max_steps else "; the next save tries again",
            f"The last good checkpoint is {latest}." if latest else "No checkpoint was written before.",
        )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        before = self.state.best_metric, self.state.best_global_step
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            self._best_before = before
        return is_best

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._frozen_outputs.save(self._frozen_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self._frozen_outputs.load(self._frozen_file(checkpoint), self.args.device)
            self._monitor.remember(self.state.log_history)

    def _frozen_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"frozen_outputs_{self.args.process_index}.safetensors"

    def _last_good(self) -> str:
        checkpoint = self.state.best_model_checkpoint or self._latest_checkpoint()
        return f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was written before."

    def _latest_checkpoint(self) -> str | None:
        sealed = (path for path in checkpoints_in(Path(str(self.args.output_dir))) if (path / MANIFEST).is_file())
        return next(map(str, sealed), None)

    # ------------------------------------------------------------------------------------------------------ processes

    def _in_every_process(self, function: Callable[[], None]) -> str | None:
        """Calls a function in all processes and waits for all; returns what kept one of them from writing, if anything did."""
        caught = None
        try:
            function()
        except Exception as error:
            caught = error
        told = gather_object([] if caught is None else [(str(caught).split("\n")[0], is_failed_write(caught))])
        if caught is not None and not is_failed_write(caught):
            raise caught
        for message, for_want_of_space in told:
            if not for_want_of_space:
                raise RuntimeError(f"Another process failed to save: {message}")
        return told[0][0] if told else None


def _check_name(home: Path) -> None:
    try:
        str(home).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"output_dir={str(home)!r} is not UTF-8, and safetensors reads no files from such a folder. Give another output_dir."
        ) from error


def _without_tokens(args: TrainingArguments) -> TrainingArguments:
    """Returns the same arguments for the Trainer's pickle, which others may read."""
    args = copy.copy(args)
    for name in vars(args):
        if name.endswith("_token"):
            setattr(args, name, None)
    return args
