"""What needs no download: tiny CLIP and its robust twin, procedural images, the tasks made of them, the handwritten digits."""

from ..utils.embedded import TINY_CLIP, TINY_CLIP_ROBUST

__all__ = ["TINY_CLIP", "TINY_CLIP_ROBUST"]
