"""Checkpoints that are whole or absent, of this run and no other, in a folder that no other run writes into meanwhile."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from ..data.pixels import digest_images
from ..results.hub import UPLOADED
from ..results.run import plain_settings
from ..tuner.fingerprint import configuration_digest, tensors_fingerprint
from ..tuner.switching import base_parameters
from ..utils.files import DamagedFileError, make_writable, read_json, sync
from ..utils.fractions import format_fraction
from ..utils.outputs import OutputLock, free_space, is_failed_write, main_process_says
from ..utils.text import cut, differences, some

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
STAGING = ".saving"  # a checkpoint is written in here, beside the whole ones
# of an adapter's configuration: where it came from, and what has an entry of its own
_NOT_SHAPE = {
    "auto_mapping", "base_model_fingerprint", "base_model_name_or_path", "class_names", "class_texts", "inference_mode",
    "peft_version", "revision", "task_type", "template",
}  # fmt: skip
# what a run may go on with another value of, but will then not end where it would have ended
_SCHEDULE = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim_args",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "tf32", "full_precision_attack",
    "torch_compile", "dataloader_drop_last", "text_chunk_size", "image_chunk_size", "activation_checkpointing",
)  # fmt: skip
_PUBLISHED = {"lr_schedule": "step", "decay_biases": False}  # told where they differ, as older checkpoints lack them


class Checkpoints:
    """Writes the checkpoints of a trainer, and finds the one to go on from.

    A checkpoint is written into a hidden folder, sealed with the hashes of its files and with what the run is, and becomes
    `checkpoint-N` by one rename. A save that fails for want of space leaves nothing, is logged as an error, and the run goes on.

    Args:
        trainer: The `CaptTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = weakref.proxy(trainer)  # a cycle would keep it, and the lock, alive
        self.lock: OutputLock | None = None  # of the folder, from `find` to `unlock`
        self._run: dict[str, Any] = {}
        self.staging: Path | None = None  # the Trainer's output folder during a save
        self.best_before: tuple[float | None, int | None] = (None, None)  # metric and step before the last evaluation

    def find(self, resume: str | bool | None) -> str | None:
        """Returns the checkpoint to go on from, or None, and locks the folder; see `CaptTrainer.train`."""
        found: str | None = main_process_says(lambda: self._find(resume))
        if self._saves and self._trainer.args.should_save:  # a process that saves for its machine (`save_on_each_node`)
            self._run = self._run or describe_run(self._trainer)
        return found

    def unlock(self) -> None:
        """Lets other runs write into the folder."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    @property
    def _saves(self) -> bool:
        return bool(self._trainer.args.save_strategy != SaveStrategy.NO)

    def _find(self, resume: str | bool | None) -> str | None:
        home = Path(str(self._trainer.args.output_dir))
        if str(home).encode(errors="replace").decode() != str(home):
            raise ValueError(
                f"output_dir={str(home)!r} is not UTF-8, and safetensors reads no files from such a folder. Give another "
                "output_dir."
            )
        make_writable(home, *UPLOADED, given="output_dir")
        self.lock = self.lock or OutputLock(home)
        _clear_staging(home)
        words: dict[str, Any] = {"true": True, "false": None, "none": None}  # all that the command line knows
        resume = words.get(str(resume).lower(), resume)
        if self._saves or resume:
            self._run = self._run or describe_run(self._trainer)
        if not resume:
            return None
        candidates = checkpoints_in(home) if resume is True else _named(Path(str(resume)))
        if not candidates:
            logger.warning("There is no checkpoint in %s yet: the run starts from the beginning.", home)
            return None
        folder, manifest = _newest_whole(candidates)
        if other := _changes(self._run, manifest["run"]):
            raise ValueError(
                f"{folder} is of another run. Go on with the settings that it was begun with, or start again: without "
                f"resume_from_checkpoint, and with another output_dir. What differs: {other}."
            )
        if changed := _changes(describe_schedule(self._trainer.args), manifest["schedule"]):
            logger.warning(
                "%s was written with other settings: %s. The run goes on, but not to where it would have ended without the "
                "change. The optimizer's state, with its learning rate, is that of the checkpoint.", folder, changed,
            )  # fmt: skip
        logger.info("Going on from %s.", folder)
        return str(folder)

    def save(self, write: Callable[[], None], home: Path) -> None:
        """Saves a checkpoint, whole or not at all, in all processes together.

        Args:
            write: Has the Trainer write its files.
            home: The folder of the checkpoints.
        """
        args, state = self._trainer.args, self._trainer.state
        checkpoint, best = home / f"checkpoint-{state.global_step}", state.best_model_checkpoint
        for step in (partial(self._write, write, home), partial(self._finish, checkpoint)):
            if failure := _in_every_process(step):
                state.best_model_checkpoint = best
                if state.best_global_step == state.global_step:  # the best is the best that there is
                    state.best_metric, state.best_global_step = self.best_before
                if args.should_save:
                    shutil.rmtree(home / STAGING, ignore_errors=True)
                    logger.error(
                        "%s could not be written: %s (%s there). Nothing of it is left, and the run goes on. %s",
                        checkpoint, failure, free_space(home), last_good(args),
                    )  # fmt: skip
                return
        if args.should_save:
            _rotate(checkpoint, args.save_total_limit, state.best_model_checkpoint)

    def _write(self, write: Callable[[], None], home: Path) -> None:
        state = self._trainer.state
        # without a best step the Trainer has no barrier, at which the others would wait for a process whose disk is full
        best, state.best_global_step = state.best_global_step, None
        self.staging = home / STAGING
        try:
            write()
        finally:
            self.staging, state.best_global_step = None, best

    def _finish(self, checkpoint: Path) -> None:
        args, state, home = self._trainer.args, self._trainer.state, checkpoint.parent
        best = home / f"checkpoint-{state.best_global_step}"
        if best == checkpoint or best.is_dir():
            state.best_model_checkpoint = str(best)
        if args.should_save:
            staged = home / STAGING / checkpoint.name
            state.save_to_json(str(staged / TRAINER_STATE_NAME))  # now with the best step
            _seal(staged, {"run": self._run, "schedule": describe_schedule(args)})
            _put_in_place(staged, home)
            shutil.rmtree(home / STAGING, ignore_errors=True)


def _in_every_process(function: Callable[[], None]) -> str | None:
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


# --------------------------------------------------------------------------------------------------- which run this is


def describe_run(trainer: Any) -> dict[str, Any]:
    """Returns what makes a run that begins this one and no other; of a model without adapter all weights count."""
    task, args, model, images = trainer.task, trainer.args, trainer.classifier.model, trainer.train_dataset
    weights, adapter = model.named_parameters(), None
    if isinstance(model, PeftModel):
        weights = [(name, p) for name, p in base_parameters(model) if not p.requires_grad]
        adapter = model.peft_config[model.active_adapter].to_dict()
    teacher = trainer.teacher and trainer.teacher.model
    return {
        "base model": tensors_fingerprint(weights),
        "base configuration": configuration_digest(model),
        "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapter": adapter and {name: value for name, value in adapter.items() if name not in _NOT_SHAPE},
        "class names": task.class_names,
        "template": task.template,
        **({"class texts": task.class_texts} if task.class_texts else {}),
        "training images": {"number": len(images), "content": digest_images(images.dataset)},
        "pixels": images.transform.to_dict(),
        "training attack": getattr(trainer.attack, "to_dict", partial(_settings, trainer.attack))(),
        "objective": _settings(trainer.objective),
        "teacher": teacher and _fingerprint(teacher),
        "seed": args.seed,
        "data_seed": args.data_seed,
        "optimizer": args.optim,
    }


def _fingerprint(model: nn.Module) -> str:
    return f"{tensors_fingerprint(model.named_parameters())}, configuration {configuration_digest(model)}"


def describe_schedule(args: Any) -> dict[str, Any]:
    """Returns what a run may go on with another value of, but will then not end where it would have ended."""
    return {
        "length": f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        "images a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        **{name: getattr(args, name, None) for name in _SCHEDULE},
        **{name: value for name, plain in _PUBLISHED.items() if (value := getattr(args, name)) != plain},
        "device": args.device.type,
        "torch": torch.__version__,
    }


def _settings(thing: Any) -> dict[str, Any]:
    """Returns the name of an object's class, or of a function, and its settings that are words or numbers."""
    return {"name": getattr(thing, "__qualname__", type(thing).__qualname__), **plain_settings(thing)}


def _changes(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """Returns the entries that differ, as "seed: 1 here, 0 in the checkpoint; optimizer: ..."."""
    found = []
    for path, *values in differences(json.loads(_json(here)), there, missing="nothing"):
        shown = [format_fraction(value) if isinstance(value, float) else cut(value, 120) for value in values]
        mine, theirs = shown if shown[0] != shown[1] else map(repr, values)
        found.append(f"{' '.join(map(str, path))}: {mine} here, {theirs} in the checkpoint")
    return some(found, 12, separator="; ")


# ------------------------------------------------------------------------------------------------------------- folders


def step_of(folder: Path) -> int:
    """Returns the step in the name of a checkpoint, as `checkpoint-300`, or -1 if it has another name."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns the folders that are named as checkpoints, whole or not, the highest step first; none if there is no folder."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if step_of(path) >= 0 and path.is_dir()), key=step_of, reverse=True)


def last_good(args: Any, state: Any = None) -> str:
    """Returns a sentence that names the best checkpoint of a run or, if it has none, the newest."""
    sealed = (path for path in checkpoints_in(Path(str(args.output_dir))) if (path / MANIFEST).is_file())
    checkpoint = (state and state.best_model_checkpoint) or next(sealed, None)
    return f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was written before."


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint whose every file is as it was written.

    Raises:
        DamagedFileError: A file is missing, cut short or changed, or there is no manifest.
    """
    try:
        content = read_json(folder / MANIFEST)
    except FileNotFoundError:
        raise DamagedFileError(f"it has no {MANIFEST}: it was not written to its end, or not by this version") from None
    if content.pop("sha256", None) != _digest(content):
        raise DamagedFileError(f"its {MANIFEST} is damaged")
    for name, written in content["files"].items():
        if not (folder / name).is_file():
            raise DamagedFileError(f"{name} is missing")
        if _describe(folder / name) != written:
            raise DamagedFileError(f"{name} has other bytes than were written")
    return content


def _seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes the manifest of a checkpoint, the last of its files, and waits until the disk holds all of them."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    content = {**facts, "files": {path.relative_to(folder).as_posix(): _describe(path) for path in paths}}
    manifest = folder / MANIFEST
    manifest.write_text(_json({**content, "sha256": _digest(content)}, indent=1), encoding="utf-8")
    for path in {*paths, *(path.parent for path in paths), manifest, folder}:
        sync(path)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(content: Any) -> str:
    return hashlib.sha256(_json(content, sort_keys=True).encode()).hexdigest()


def _json(content: Any, **settings: Any) -> str:
    return json.dumps(content, default=lambda x: sorted(x) if isinstance(x, set) else str(x), **settings)


def _named(folder: Path) -> list[Path]:
    """Returns a checkpoint and those before it in the same folder, the newest first."""
    inside = checkpoints_in(folder)
    if inside or not folder.is_dir():
        others = ", ".join(map(str, inside or checkpoints_in(folder.parent))) or "none"
        raise ValueError(f"{folder} is not a checkpoint. There are: {others}. Name one, or let `true` find the newest.")
    return [folder, *(path for path in checkpoints_in(folder.parent) if step_of(path) < step_of(folder))]


def _newest_whole(candidates: list[Path]) -> tuple[Path, dict[str, Any]]:
    """Returns the first whole checkpoint of a list, and its manifest; those that it passes over are named in a warning."""
    faults: list[str] = []
    for folder in candidates:
        try:
            manifest = read_manifest(folder)
            if OPTIMIZER_NAME not in manifest["files"]:
                raise DamagedFileError("it holds the weights alone (save_only_model)")
        except (DamagedFileError, OSError) as error:
            faults.append(f"{folder}: {str(error).rstrip('.')}")
            continue
        if faults:
            logger.warning("Not whole: %s. The run goes on from %s instead.", "; ".join(faults), folder)
        return folder, manifest
    raise ValueError(
        "There is no whole checkpoint to go on from. Name one of another folder, or start again: without "
        f"resume_from_checkpoint, and with another output_dir. What is wrong: {'; '.join(faults)}."
    )


def _put_in_place(staged: Path, home: Path) -> None:
    """Moves a sealed checkpoint out of the staging folder; one that stands under its name moves into it."""
    if (home / staged.name).exists():
        os.rename(home / staged.name, staged.parent / f"old-{staged.name}")
    os.rename(staged, home / staged.name)
    sync(home)


def _clear_staging(home: Path) -> None:
    """Removes what a save left that was killed, and finishes one that was killed between the renames of `_put_in_place`."""
    for staged in checkpoints_in(home / STAGING):
        try:
            read_manifest(staged)
        except (DamagedFileError, OSError):
            continue
        _put_in_place(staged, home)
    shutil.rmtree(home / STAGING, ignore_errors=True)


def _rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Removes checkpoints until `limit` are left, but never the newest and the best.

    Those of later steps than the newest go first, for they are damaged or of a run that was left behind, and then the oldest.
    Transformers goes by modification times or by steps alone, and may then remove the very checkpoint that was just written.
    """
    keep = {newest.resolve(), *([Path(best).resolve()] if best else [])}
    others = [path for path in reversed(checkpoints_in(newest.parent)) if path.resolve() not in keep]
    others.sort(key=lambda path: step_of(path) <= step_of(newest))
    staging = newest.parent / STAGING
    try:
        for path in others[: max(0, len(others) + len(keep) - limit)] if limit and limit > 0 else ():
            staging.mkdir(exist_ok=True)
            os.rename(path, staging / f"old-{path.name}")  # by one rename, so that half a checkpoint is never found
    except OSError as error:
        logger.warning("Checkpoints beyond save_total_limit could not be removed: %s", error)
    shutil.rmtree(staging, ignore_errors=True)
