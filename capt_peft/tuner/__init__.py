"""CAPT as a PEFT method: deep text and vision prompts for CLIP. Importing this module registers it with PEFT."""

from .config import CaptConfig
from .layer import PromptLayer
from .model import CaptModel
from .registration import register
from .switching import adapters_in_use, adapters_off

__all__ = ["CaptConfig", "CaptModel", "PromptLayer", "adapters_in_use", "adapters_off"]

register(CaptConfig, CaptModel)
