"""Writes an adapter's model card again, from the results and evaluations beside its weights.

capt-peft card outputs/demo
capt-peft card outputs/demo --license apache-2.0 --tags medical x-ray
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..results.card import CARD, CardDetails, is_adapter, is_capt, is_replaceable, write_card
from ..tuner.others import CLASSES
from .parser import Parser


@dataclass
class Arguments:
    """Which card is written, and what it says beside the figures."""

    adapter: str = field(default="", metadata={"help": "Folder of an adapter."})
    license: str | None = field(default=None, metadata={"help": "Licence of the adapter, as the Hub names it."})
    language: list[str] | None = field(default=None, metadata={"help": "Languages of the class texts."})
    tags: list[str] | None = field(default=None, metadata={"help": "Further tags."})
    finetuned_from: str | None = field(
        default=None, metadata={"help": "Hub id of the base, if it was loaded from a folder."}
    )
    dataset_tags: list[str] | None = field(default=None, metadata={"help": "Hub ids of the data that it was tuned on."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a card that a person wrote."})


def adapter_folder(adapter: str, *, of_capt: bool = False) -> Path:
    """Returns the folder of an adapter that is here, of CAPT or with its classes beside it, or says what is wrong."""
    folder = Path(adapter).expanduser()
    if not adapter:
        raise ValueError("Give the folder of a CAPT adapter, such as outputs/demo.")
    if of_capt and not is_capt(folder):
        raise ValueError(
            f"{adapter} is not the folder of a CAPT adapter, with its adapter_config.json and weights; no other has a strength "
            "or a calibration."
        )
    if not is_adapter(folder):
        raise ValueError(
            f"{adapter} is not the folder of a CAPT adapter, with its adapter_config.json and weights, nor of one of another "
            f"PEFT method with the {CLASSES} that capt-peft train writes."
        )
    return folder


def main(argv: list[str]) -> None:
    """Writes the card."""
    (args,) = Parser(Arguments).into_dataclasses(argv)
    folder = adapter_folder(args.adapter)
    if not (args.overwrite or is_replaceable(folder / CARD)):
        raise ValueError(f"{folder / CARD} was written by a person. Give --overwrite to replace it.")
    words = {name: value for name, value in vars(args).items() if name not in ("adapter", "overwrite") and value}
    print(f"The card: {write_card(folder, details=CardDetails(**words))}")
