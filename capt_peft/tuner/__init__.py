"""CAPT as a PEFT method: deep text and vision prompts for CLIP. Importing this module registers it with PEFT."""

from .config import CaptConfig
from .layer import PromptLayer
from .model import CaptModel, adapters_off
from .registration import register

__all__ = ["CaptConfig", "CaptModel", "PromptLayer", "adapters_off"]

register(CaptConfig, CaptModel)
