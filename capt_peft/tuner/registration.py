"""Makes PEFT and transformers know the method CAPT.

PEFT has no entry point for methods from other packages: `peft.utils.register_peft_method` takes only members of
`peft.PeftType`. All of its dispatch goes through three dictionaries, so CAPT is written into them under a key that equals
and hashes like the string "CAPT" (which is what a configuration file holds) and has the `.value` that PEFT's and
transformers' code reads.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

if TYPE_CHECKING:
    from .config import CaptConfig
    from .model import CaptModel


class CaptPeftType(str, Enum):  # noqa: UP042  (PEFT's own PeftType is a (str, Enum); a StrEnum prints differently)
    """The PEFT type of CAPT. An enum hashes by name and equals by value, so the two must be the same word."""

    CAPT = "CAPT"


# A PeftType.CAPT inside PEFT, should there ever be one, wins.
CAPT: Any = getattr(PeftType, "CAPT", CaptPeftType.CAPT)


def register(config_cls: type[CaptConfig], model_cls: type[CaptModel]) -> None:
    """Registers CAPT's configuration and tuner with PEFT; calling it again changes nothing.

    Raises:
        KeyError: Another class is registered as CAPT already.
    """
    entries: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, config_cls),
        (PEFT_TYPE_TO_TUNER_MAPPING, model_cls),
        (PEFT_TYPE_TO_PREFIX_MAPPING, model_cls.prefix),
    ]
    for mapping, entry in entries:
        if mapping.get(CAPT, entry) != entry:
            raise KeyError(f"PEFT already has a method named CAPT: {mapping[CAPT]}. capt_peft cannot register {entry}.")
    for mapping, entry in entries:
        mapping[CAPT] = entry
