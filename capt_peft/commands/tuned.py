"""What commands take over from an adapter's record: the data and the threat model that it was tuned with."""

from __future__ import annotations

import logging
import os
from collections.abc import Set
from dataclasses import fields
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError

from ..results.run import RESULTS, Records, RunResults
from ..tuner.fingerprint import SAFETENSORS_NAME, adapter_fingerprint
from ..utils.text import cut
from .data import DataArguments


def take_over(args: DataArguments, adapter: str, named: Set[str]) -> None:
    """Gives a command the data and the threat model that an adapter was tuned with, unless others are named.

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
    if not named & {field.name for field in fields(DataArguments)}:
        known |= {"dataset_name": record.task.source, "split": record.evaluation.split}
        known |= {name: value for name, value in script.items() if name in {f.name for f in fields(DataArguments)}}
    taken = {name: value for name, value in known.items() if name in own - named and getattr(args, name) != value}
    for name, value in taken.items():
        setattr(args, name, value)
    if taken:
        words = " ".join(f"--{name} {cut(value, 80)}" for name, value in taken.items())
        if PartialState().is_main_process:
            print(f"As {adapter} was tuned: {words}")


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
