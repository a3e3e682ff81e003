"""The CLIP that an image tower was fine-tuned from, whose text tower it goes with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from ..tuner.clip import in_tower
from .processing import pixel_statistics
from .settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A whole CLIP in transformers' form.

    Attributes:
        config: Its configuration.
        tensors: Its state dict.
        settings: Its activation and pixels.
    """

    config: CLIPConfig
    tensors: Mapping[str, Tensor]
    settings: Settings


def load_transformers(name: str) -> Base:
    """Loads a base from a folder or the Hub.

    Raises:
        ValueError: It is no whole CLIPModel.
    """
    loaded: Any = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if model.config.model_type != "clip" or wrong:
        raise ValueError(
            f"The base {name} ({model.config.model_type}) is no whole CLIPModel of transformers; it lacks {len(wrong)} tensors "
            f"({', '.join(wrong[:3])}). Name the CLIP that the image tower was fine-tuned from."
        )
    mean, std = pixel_statistics(name)
    return Base(model.config, model.state_dict(), Settings(model.config.text_config.hidden_act, None, mean, std))


def check_settings(base: Base, activation: str | None, head_width: int | None, name: str) -> Settings:
    """Returns the base's settings; a ValueError if others were asked for: an image tower has those it was tuned with."""
    vision: Any = base.config.vision_config
    its = {"activation": vision.hidden_act, "head_width": vision.hidden_size // vision.num_attention_heads}
    for what, asked in (("activation", activation), ("head_width", head_width)):
        if asked not in (None, its[what]):
            raise ValueError(
                f"{what}={asked!r}, but the base {name} has {its[what]}. Leave {what} out, or name another base."
            )
    return replace(base.settings, activation=vision.hidden_act)


def base_similarity(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """Returns the cosine between the matrices of two image towers; biases and norms are alike in all CLIPs and do not count."""
    dot = mine = theirs = 0.0
    for name, tensor in tensors.items():
        if in_tower(name, "vision") and tensor.ndim > 1:
            a, b = tensor.flatten().float(), base[name].flatten().float()
            dot, mine, theirs = dot + float(a @ b), mine + float(a @ a), theirs + float(b @ b)
    return round(dot / max((mine * theirs) ** 0.5, 1e-30), 4)


def warn_if_far(similarity: float, checkpoint: Path, base: str) -> None:
    """Warns if an image tower was not fine-tuned from the base: its images do not match the texts, and no shape tells."""
    if similarity < 0.5:
        logger.warning(
            "The image tower of %s is not near that of %s (cosine %.2f): it was fine-tuned from another CLIP, and its images "
            "will not match the texts. Name the CLIP that it comes from.",
            checkpoint.name,
            base,
            similarity,
        )
