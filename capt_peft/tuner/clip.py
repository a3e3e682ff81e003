"""The places of a CLIP where prompts enter, found by the structure of the model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

logger = logging.getLogger(__name__)

SUPPORTED = (
    "clip",
    "clip_text_model",
    "clip_vision_model",
    "metaclip_2",
    "metaclip_2_text_model",
    "metaclip_2_vision_model",
)
EXPERIMENTAL = ("siglip", "siglip_text_model", "siglip_vision_model")
OTHER_TOWER = {"text": "vision", "vision": "text"}


@dataclass(frozen=True)
class Site:
    """A module through which prompts enter one tower.

    Args:
        tower: "text" or "vision".
        index: 0 for the embeddings, whose *output* gets the prompts: the token embeddings, before positions are added (text),
            or the whole embeddings, before the pre-layernorm (vision). i > 0 for encoder layer i, whose *input* gets them.
        dim: Width of the tower.
        start: Position of the first text prompt: 1 after a start token, 0 without one (SigLIP).
        partner: Name of the module with the same index in the other tower, if there is one.
        partner_dim: Width of the other tower, 0 without one.
    """

    tower: str
    index: int
    dim: int
    start: int
    partner: str | None
    partner_dim: int


@dataclass(frozen=True)
class Tower:
    """One transformer of a CLIP: its module's name, width, and the modules through which prompts enter."""

    name: str
    dim: int
    modules: tuple[str, ...]
    start: int


def check_supported(model: nn.Module, *, quiet: bool = False) -> None:
    """Raises a ValueError, naming the model, unless CAPT knows its structure; warns, unless `quiet`, where it is experimental."""
    config = getattr(model, "config", None)
    model_type = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name = type(base).__name__
    if model_type not in SUPPORTED + EXPERIMENTAL or "Classification" in name:
        raise ValueError(
            f"CAPT does not support {name} (model type {model_type!r}). It supports the towers of CLIP (CLIPModel, "
            "CLIPTextModel, CLIPVisionModel and their WithProjection variants) and MetaCLIP 2, without heads for "
            "classification; SigLIP is experimental."
        )
    if model_type in EXPERIMENTAL and not quiet:
        logger.warning(
            "CAPT on %s is experimental: its text has no start token and sees all of its tokens, and its image features "
            "pool over the prompts too.",
            name,
        )


def text_config(model: nn.Module) -> Any:
    """Returns the configuration of the text tower."""
    config: Any = model.config
    return getattr(config, "text_config", config)


def is_siglip(model: nn.Module) -> bool:
    """Tells whether a model reads its texts as SigLIP does: padded to their full length, at the last token."""
    return bool(text_config(model).model_type.startswith("siglip"))


def end_token(model: nn.Module) -> int | str | None:
    """Returns how the text tower finds the end of a text: a token id, "highest" (CLIP's legacy rule), or None (SigLIP)."""
    if is_siglip(model):
        return None
    config = text_config(model)
    # CLIP reads an eos_token_id of 2, which old configurations have by mistake, as "the highest id"
    legacy = config.eos_token_id == 2 and config.model_type.startswith("clip")
    return "highest" if legacy else int(config.eos_token_id)


def find_towers(model: nn.Module) -> dict[str, Tower]:
    """Finds the text and the vision tower: `embeddings` next to an `encoder` with a list of `layers`."""
    towers: dict[str, Tower] = {}
    for name, module in model.named_modules():
        embeddings: Any = getattr(module, "embeddings", None)
        layers = getattr(getattr(module, "encoder", None), "layers", None)
        if not isinstance(layers, nn.ModuleList) or ".base_layer" in name:
            continue
        tower = (
            "text"
            if hasattr(embeddings, "token_embedding")
            else "vision"
            if hasattr(embeddings, "patch_embedding")
            else None
        )
        if tower is None:
            continue
        if tower in towers:
            raise ValueError(
                f"{type(model).__name__} has two {tower} towers, {towers[tower].name!r} and {name!r}; CAPT needs one."
            )
        path = f"{name}." if name else ""
        first = f"{path}embeddings.token_embedding" if tower == "text" else f"{path}embeddings"
        deeper = [f"{path}encoder.layers.{i}" for i in range(1, len(layers))]
        config: Any = module.config
        start = 0 if config.model_type in EXPERIMENTAL else 1
        towers[tower] = Tower(name, config.hidden_size, (first, *deeper), start)
    if not towers:
        raise ValueError(
            f"{type(model).__name__} has neither CLIP's text tower nor its vision tower; CAPT needs one of them."
        )
    return towers


def find_sites(towers: dict[str, Tower]) -> dict[str, Site]:
    """Returns the places for prompts by module name, in both towers and at every depth."""
    sites = {}
    for kind, tower in towers.items():
        other = towers.get(OTHER_TOWER[kind])
        for index, name in enumerate(tower.modules):
            partner = other.modules[index] if other and index < len(other.modules) else None
            sites[name] = Site(kind, index, tower.dim, tower.start, partner, other.dim if other else 0)
    return sites
