"""Robust backbones: published CLIP checkpoints, in OpenAI's and open_clip's layouts, as folders that transformers loads."""

from .conversion import BackboneInfo, convert_backbone, to_transformers
from .model import Settings
from .reading import Checkpoint, read_checkpoint
from .registry import BACKBONES, Backbone
from .store import load_backbone

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneInfo",
    "Checkpoint",
    "Settings",
    "convert_backbone",
    "load_backbone",
    "read_checkpoint",
    "to_transformers",
]
