"""What checkpoints need of the run that writes them: a folder, the newest that is whole, and saves in which processes agree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainingArguments

from ..results.hub import UPLOADED
from ..utils.files import make_writable
from ..utils.outputs import is_failed_write
from .checkpoint_folders import MANIFEST, checkpoints_in


def last_sealed(home: Path) -> str | None:
    """Returns the checkpoint of the highest step in a run's folder that was written to its end, or None."""
    return next((str(path) for path in checkpoints_in(home) if (path / MANIFEST).is_file()), None)


def last_good(args: TrainingArguments, state: Any) -> str:
    """Returns a sentence that names the best checkpoint of a run or, if it has none, the newest."""
    checkpoint = state.best_model_checkpoint or last_sealed(Path(str(args.output_dir)))
    return f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was written before."


def in_every_process(function: Callable[[], None]) -> str | None:
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


def check_folder(home: Path) -> None:
    """Raises a ValueError if a run could not write its files into a folder."""
    try:
        str(home).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"output_dir={str(home)!r} is not UTF-8, and safetensors reads no files from such a folder. Give another output_dir."
        ) from error
    make_writable(home, *UPLOADED, given="output_dir")


def without_tokens(args: Any) -> Any:
    """Returns the same arguments for the Trainer's pickle, which others may read."""
    args = copy.copy(args)
    for name in vars(args):
        if name.endswith("_token"):
            setattr(args, name, None)
    return args
