"""The CLIPModel that a converted checkpoint becomes: its configuration, and the model with its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from .layout import Tower
from .settings import Settings, count_heads


def make_config(vision: Tower, text: Tower, settings: Settings) -> CLIPConfig:
    """Returns the configuration of a CLIPModel with these towers; the two highest token ids are start and end."""
    common = {"hidden_act": settings.activation, "projection_dim": vision.projection}
    return CLIPConfig(
        projection_dim=vision.projection,
        vision_config={
            **common, "hidden_size": vision.width, "intermediate_size": vision.hidden, "num_hidden_layers": vision.layers,
            "num_attention_heads": settings.vision_heads(vision.width), "image_size": vision.image_size,
            "patch_size": vision.patch,
        },
        text_config={
            **common, "hidden_size": text.width, "intermediate_size": text.hidden, "num_hidden_layers": text.layers,
            "num_attention_heads": count_heads(text.width), "max_position_embeddings": text.tokens,
            "vocab_size": text.vocabulary, "bos_token_id": text.vocabulary - 2, "eos_token_id": text.vocabulary - 1,
        },
    )  # fmt: skip


def check_same_architecture(vision: Tower, config: CLIPConfig) -> None:
    """Raises a ValueError if an image tower has another architecture than the base's: its text tower is not the base's."""
    its: Any = config.vision_config
    pairs = {
        "patches of": (vision.patch, its.patch_size),
        "images of": (vision.image_size, its.image_size),
        "width": (vision.width, its.hidden_size),
        "blocks": (vision.layers, its.num_hidden_layers),
        "hidden layers of": (vision.hidden, its.intermediate_size),
        "features of": (vision.projection, config.projection_dim),
    }
    wrong = [f"{what} {mine}, not {theirs}" for what, (mine, theirs) in pairs.items() if mine != theirs]
    if wrong:
        raise ValueError(
            f"The image tower is not that of the base: {'; '.join(wrong)}. Name the CLIP that it was fine-tuned from as base."
        )


def describe(config: CLIPConfig) -> str:
    """Returns a name like "ViT-B/32, 224 pixels"."""
    vision: Any = config.vision_config
    size = {768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H", 1408: "ViT-g", 1664: "ViT-bigG"}.get(vision.hidden_size)
    return f"{size or f'ViT of width {vision.hidden_size}'}/{vision.patch_size}, {vision.image_size} pixels"


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
