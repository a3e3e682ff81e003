"""What commands take over from an adapter's record: the data and the threat model that it was tuned with."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError

from ..results.run import RESULTS, Records, RunResults
from ..tuner.fingerprint import SAFETENSORS_NAME, adapter_fingerprint
from ..utils.text import counted, cut
from .data import DataArguments

# what stays the adapter's own, and is not taken over, where an option is named that it may not fit: texts of other classes, or
# texts of classes beside another template
UNFIT = {"class_names": ("template", "class_texts"), "template": ("class_texts",)}

SEVERAL: dict[str, Callable[[int], str]] = {
    "class_names": lambda n: counted(n, "class name"),
    "template": lambda n: counted(n, "template"),
    "class_texts": lambda n: f"texts of {counted(n, 'class', 'classes')}",
}


@dataclass
class TunedDataArguments(DataArguments):
    """Data: where the images and their class names come from."""

    dataset_name: str = field(
        default="digits",
        metadata={
            "help": "A task's name, a Hub id, or a folder or file of images; by default the data that the adapter was tuned on."
        },
    )


def take_over(args: DataArguments, adapter: str, named: Set[str]) -> None:
    """Gives a command the data and the threat model that an adapter was tuned with, unless others are named.

    `dataset_name` alone names other data. Every other option about the data changes that one thing about the adapter's own.

    Args:
        args: Options about the data and, where the command has them, `split`, `norm` and `epsilon`; they are set in place.
        adapter: Folder or Hub id of the adapter.
        named: Options that keep the value that they have.

    Raises:
        ValueError: The data is not named, and no record of the adapter says what it is.
    """
    own = {field.name for field in fields(args)}
    missing = "give --dataset_name, and --epsilon." if "epsilon" in own else "give --dataset_name."
    records = read_record(adapter)
    record, why = records.run, " ".join(f"{adapter}: {reason}" for reason in records.unshown)
    if record is None:
        bare = os.path.isfile(Path(adapter, "config.json"))  # a CLIP without an adapter is told later
        if "dataset_name" not in named and not bare:
            raise ValueError(
                f"{why} So nothing says what it was tuned on: {missing}"
                if why
                else f"{adapter} has no {RESULTS}, which would say what it was tuned on: {missing}"
            )
        if why:
            logging.warning("%s Nothing is taken over from it.", why)
        return
    training, script = (record.configuration.get(name) or {} for name in ("training", "script"))
    known = {name: training[name] for name in ("norm", "epsilon") if name in training}
    if "dataset_name" not in named:
        known |= {"dataset_name": record.task.source, "split": record.evaluation.split}
        known |= {name: value for name, value in script.items() if name in {f.name for f in fields(DataArguments)}}
        for name in named & UNFIT.keys():
            known = {other: value for other, value in known.items() if other not in UNFIT[name]}
    taken = {name: value for name, value in known.items() if name in own - named and getattr(args, name) != value}
    for name, value in taken.items():
        setattr(args, name, value)
    if taken and PartialState().is_main_process:
        print(f"As {adapter} was tuned: {in_words(taken)}")


def in_words(taken: Mapping[str, Any]) -> str:
    """Returns options as one would write them, and after them, of those that hold several values, how many there are."""
    several = {name: value for name, value in taken.items() if name in SEVERAL and isinstance(value, list | dict)}
    options = [f"--{name} {cut(shlex.quote(str(v)), 300)}" for name, v in taken.items() if name not in several]
    own = [f"its {SEVERAL[name](len(value))}" for name, value in several.items()]
    return ", ".join([*([" ".join(options)] if options else []), *own])


def read_record(adapter: str) -> Records:
    """Returns the record of the run that made an adapter, in a folder or on the Hub, or why it is not that of these weights."""
    folder = Path(adapter)
    if not folder.is_dir():
        try:
            folder = Path(hf_hub_download(adapter, RESULTS)).parent
            for name in (CONFIG_NAME, SAFETENSORS_NAME):
                hf_hub_download(adapter, name)
        except (OSError, HFValidationError):  # it has none, or there is no such adapter, which loading it will tell
            return Records()
    if not (folder / RESULTS).is_file():
        return Records()
    try:
        fingerprint = adapter_fingerprint(folder)
    except (OSError, ValueError, SafetensorError):  # not an adapter, or a damaged one, which loading it will tell
        return Records(run=RunResults.load(folder))
    return Records.read(folder, fingerprint, names=[RESULTS], strict=False)
