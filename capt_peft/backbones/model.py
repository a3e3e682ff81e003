"""The CLIPModel that a converted checkpoint becomes: settings that no shape tells, configuration, weights, processor."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..tuner.loading import load_pretrained
from .layout import Sizes

logger = logging.getLogger(__name__)

ACTIVATIONS = ("quick_gelu", "gelu")
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}  # open_clip's ViT-H, g and bigG; every other CLIP has heads of 64
SIZES = {768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H", 1408: "ViT-g", 1664: "ViT-bigG"}
SIZE_WORDS = {
    "patch_size": "patches of", "image_size": "images of", "hidden_size": "width", "num_hidden_layers": "blocks",
    "intermediate_size": "hidden layers of", "projection_dim": "features of",
}  # fmt: skip
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONFIG_NAME = "open_clip_config.json"
# What CLIPModel does anyway; any other value, or any other name with a value, is another model
VISION_DEFAULTS = {"pool_type": "tok", "pos_embed_type": "learnable", "timm_model_pretrained": None}
TEXT_DEFAULTS = {"pool_type": "argmax"}
SHAPES = {
    "image_size", "layers", "width", "patch_size", "mlp_ratio", "head_width", "patch_dropout", "context_length", "vocab_size",
    "heads",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What is not in the weights.

    Attributes:
        activation: "quick_gelu" (OpenAI; the default) or "gelu" (most of open_clip).
        head_width: Size of an attention head of the image tower; None for the convention.
        mean: Normalisation of pixels in [0, 1]; by default OpenAI's, as `std`.
        std: Normalisation of pixels in [0, 1].
    """

    activation: str = "quick_gelu"
    head_width: int | None = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def open_clip_settings(checkpoint: Path) -> Settings | None:
    """Reads the `open_clip_config.json` that open_clip's repositories keep beside the weights; None if there is none."""
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
            f"{path} lies beside the checkpoint but is not a configuration of open_clip ({type(error).__name__}: {error}). "
            "Remove or fix it."
        ) from error


def _refuse_others(tower: Mapping[str, Any], defaults: Mapping[str, Any], path: Path) -> None:
    for name, value in tower.items():
        if name not in SHAPES and value and value != defaults.get(name):
            raise ValueError(
                f"{path}: {name}={value!r} makes this another model than transformers' CLIPModel. It cannot be converted."
            )


# ------------------------------------------------------------------------------------------- configuration and weights


def make_config(vision: Sizes, text: Sizes, settings: Settings) -> CLIPConfig:
    """Returns the configuration of a CLIPModel with these towers; the two highest token ids are start and end."""
    width, common = (
        settings.head_width or HEAD_WIDTHS.get(vision["hidden_size"], 64),
        {"hidden_act": settings.activation},
    )
    ends = {"bos_token_id": text["vocab_size"] - 2, "eos_token_id": text["vocab_size"] - 1}
    return CLIPConfig(
        projection_dim=vision["projection_dim"],
        vision_config={**vision, **common, "num_attention_heads": _heads(vision, width)},
        text_config={**text, **common, **ends, "num_attention_heads": _heads(text, 64)},
    )


def _heads(tower: Sizes, width: int) -> int:
    if tower["hidden_size"] % width:
        raise ValueError(
            f"A width of {tower['hidden_size']} does not divide into attention heads of {width}. Give head_width=..."
        )
    return tower["hidden_size"] // width


def check_same_architecture(vision: Sizes, config: CLIPConfig) -> None:
    """Raises a ValueError if an image tower has another architecture than the base's: its text tower is not the base's."""
    its: Any = config.vision_config
    theirs = its.to_dict() | {"projection_dim": config.projection_dim}
    wrong = [f"{SIZE_WORDS[key]} {size}, not {theirs[key]}" for key, size in vision.items() if size != theirs[key]]
    if wrong:
        raise ValueError(
            f"The image tower is not that of the base: {'; '.join(wrong)}. Name the CLIP that it was fine-tuned from as base."
        )


def describe(config: CLIPConfig) -> str:
    """Returns a name like "ViT-B/32, 224 pixels"."""
    vision: Any = config.vision_config
    size = SIZES.get(vision.hidden_size, f"ViT of width {vision.hidden_size}")
    return f"{size}/{vision.patch_size}, {vision.image_size} pixels"


def build(config: CLIPConfig, tensors: dict[str, Tensor]) -> CLIPModel:
    """Returns the CLIPModel with these weights, having checked once more that it has a place for each and one for each place."""
    with torch.device("meta"):
        model = CLIPModel(config)
    model.load_state_dict(tensors, strict=True, assign=True)
    parts: list[Any] = list(model.modules())
    for module in parts:
        if hasattr(module, "position_ids"):  # no weight: still without values, which torch would not notice
            module.position_ids = torch.arange(module.position_ids.shape[-1]).expand(1, -1)
    return model


# ----------------------------------------------------------------------------------------------------------- processor


def pixel_statistics(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of a base's image processor; CLIP's if it has none."""
    try:
        processor = CLIPImageProcessorPil.from_pretrained(source)
    except OSError:
        return MEAN, STD
    return tuple(processor.image_mean), tuple(processor.image_std)


def load_tokenizer(source: str | None, required: bool) -> Any:
    """Loads a tokenizer from a folder or the Hub; None if there is none and none is required."""
    try:
        return load_pretrained(AutoTokenizer, source) if source else None
    except (OSError, ValueError, KeyError) as error:
        if required:
            raise ValueError(
                f"processor={source!r} has no tokenizer that can be loaded: {error} Name a folder or Hub id with CLIP's "
                "(openai/clip-vit-base-patch32)."
            ) from error
        return None


def save_processor(folder: Path, tokenizer: Any, size: int, settings: Settings) -> None:
    """Writes the processor for images of `size` pixels; without a tokenizer, the image processor alone, with a warning."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size},
        image_mean=list(settings.mean), image_std=list(settings.std),
    )  # fmt: skip
    if tokenizer is None:
        image_processor.save_pretrained(folder)
        logger.warning(
            "The converted backbone has no tokenizer. Give processor=openai/clip-vit-base-patch32 (every CLIP of "
            "OpenAI has the same)."
        )
        return
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
