"""What no shape tells of a CLIP: its activation, its heads, its pixels; from open_clip's configuration, or by convention."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACTIVATIONS = ("quick_gelu", "gelu")
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}  # open_clip's ViT-H, g and bigG; every other CLIP has heads of 64
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONFIG_NAME = "open_clip_config.json"
# What CLIPModel does anyway; any other value, or any other name with a value, is another model
VISION_DEFAULTS = {"pool_type": "tok", "pos_embed_type": "learnable", "timm_model_pretrained": None}
TEXT_DEFAULTS = {"pool_type": "argmax"}
SHAPES = {"image_size", "layers", "width", "patch_size", "mlp_ratio", "head_width", "patch_dropout", "context_length"}
SHAPES |= {"vocab_size", "heads"}


@dataclass(frozen=True)
class Settings:
    """What is not in the weights.

    Attributes:
        activation: "quick_gelu" (OpenAI) or "gelu" (most of open_clip).
        head_width: Size of an attention head of the image tower; None for the convention.
        mean: Normalisation of pixels in [0, 1].
        std: Normalisation of pixels in [0, 1].
    """

    activation: str = "quick_gelu"
    head_width: int | None = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def vision_heads(self, width: int) -> int:
        """Returns the number of heads of an image tower."""
        return count_heads(width, self.head_width or HEAD_WIDTHS.get(width, 64))


def count_heads(width: int, head_width: int = 64) -> int:
    """Returns width / head_width; a ValueError if that is no whole number."""
    if width % head_width:
        raise ValueError(
            f"A width of {width} does not divide into attention heads of {head_width}. Give head_width=..."
        )
    return width // head_width


def check_activation(activation: str | None) -> None:
    """Raises a ValueError for an activation that CLIP does not have."""
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}.")


def open_clip_settings(checkpoint: Path) -> Settings | None:
    """Reads the `open_clip_config.json` that open_clip's repositories on the Hub keep beside the weights.

    Returns:
        What it says, or None if there is no such file.

    Raises:
        ValueError: It is not readable, or describes a model that CLIPModel cannot be.
    """
    path = checkpoint.parent / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, pixels = content["model_cfg"], content.get("preprocess_cfg", {})
        vision, text = model["vision_cfg"], model["text_cfg"]
        _refuse_others(vision, VISION_DEFAULTS, path)
        _refuse_others(text, TEXT_DEFAULTS, path)
        if "heads" in text and text["width"] != 64 * text["heads"]:
            raise ValueError(f"{path}: text heads of {text['width'] / text['heads']:g} are not CLIP's 64.")
        return Settings(
            activation="quick_gelu" if model.get("quick_gelu") else "gelu",
            head_width=vision.get("head_width"),
            mean=tuple(pixels.get("mean", MEAN)),
            std=tuple(pixels.get("std", STD)),
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} lies beside the checkpoint but is no configuration of open_clip ({type(error).__name__}: {error}). Remove "
            "or mend it."
        ) from error


def _refuse_others(tower: Mapping[str, Any], defaults: Mapping[str, Any], path: Path) -> None:
    for name, value in tower.items():
        if name not in SHAPES and value and value != defaults.get(name):
            raise ValueError(
                f"{path}: {name}={value!r} makes this another model than transformers' CLIPModel. It cannot be converted."
            )
