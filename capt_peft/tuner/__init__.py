"""CAPT as a PEFT method: deep text and vision prompts for CLIP. Importing this module registers it with PEFT."""

import warnings
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .calibration import Calibration
from .config import CAPT, CaptConfig
from .layer import PromptLayer
from .model import CaptModel, set_strength
from .switching import adapters_in_use, adapters_off

__all__ = ["Calibration", "CaptConfig", "CaptModel", "PromptLayer", "adapters_in_use", "adapters_off", "set_strength"]


def register(config_cls: type[CaptConfig], model_cls: type[CaptModel]) -> None:
    """Registers CAPT's configuration and tuner with PEFT; calling it again changes nothing.

    `peft.utils.register_peft_method` takes only members of `peft.PeftType`. All of PEFT's dispatch goes through three
    dictionaries, so CAPT is written into them under a key that equals and hashes like the string "CAPT", which is what a
    configuration file holds, and has the `.value` that PEFT's and transformers' code reads.

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


register(CaptConfig, CaptModel)

# PEFT asks every model for this name of transformers 4 when an adapter is put on it; there is nothing that a user could do
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
