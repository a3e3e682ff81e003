"""Robust backbones: published CLIP checkpoints, in OpenAI's and open_clip's layouts, as folders that transformers loads."""

from .base import Base
from .conversion import BackboneInfo, convert_backbone, to_transformers
from .reading import Checkpoint, read_checkpoint
from .settings import Settings

__all__ = ["BackboneInfo", "Base", "Checkpoint", "Settings", "convert_backbone", "read_checkpoint", "to_transformers"]
