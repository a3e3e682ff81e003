"""All that is known of a CLIP's structure: its towers, the places for prompts, how it reads texts, its features and logits.

Nothing else in the package looks at the class, the model type or the parts of a model or a tokenizer, so that support for
another kind of CLIP is written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.activations import QuickGELUActivation

from ..utils.text import cut

TOWER_TYPES = ("", "_text_model", "_vision_model")
SIGLIP = tuple("siglip" + tower for tower in TOWER_TYPES)  # of SigLIP 2 too, but for NaFlex
NAFLEX = tuple("siglip2" + tower for tower in TOWER_TYPES)
SUPPORTED = tuple(model + tower for model in ("clip", "metaclip_2") for tower in TOWER_TYPES) + SIGLIP
OTHER_TOWER = {"text": "vision", "vision": "text"}
# how the names of a tower's weights begin, its projection's included
TOWER_NAMES = {"text": ("text_model.", "text_projection."), "vision": ("vision_model.", "visual_projection.")}
TEXT_INPUTS: tuple[str, ...] = ("input_ids", "attention_mask")
_FIRST_ENDS: Any = WeakIdKeyDictionary()  # tensor -> what it was read of, and `first_end`
HIGHEST = "highest"  # CLIP's legacy rule: a text ends at its highest token id
SIGLIP_END, CLIP_END = 1, 49407


def base_model(model: nn.Module) -> Any:
    """Returns the model of transformers, without PEFT's wrapper around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_supported(model: nn.Module) -> None:
    """Raises a ValueError, naming the model, unless CAPT knows its structure and it is on one device, with gradients."""
    config = getattr(model, "config", None)
    model_type = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    name = type(base_model(model)).__name__
    if model_type in NAFLEX:
        raise ValueError(
            f"CAPT does not support {name} (model type {model_type!r}): it is SigLIP 2's NaFlex variant, which takes patches of "
            "images of any shape, and everything here takes images of one size. Take a SigLIP 2 of fixed resolution, as "
            "google/siglip2-base-patch16-224 is (model type 'siglip')."
        )
    if model_type not in SUPPORTED or "Classification" in name:
        raise ValueError(
            f"CAPT does not support {name} (model type {model_type!r}). It supports the towers of CLIP (CLIPModel, "
            "CLIPTextModel, CLIPVisionModel and their WithProjection variants), MetaCLIP 2, SigLIP and SigLIP 2, without heads "
            "for classification."
        )
    _check_one_device(model)
    _check_gradients(model)


def _check_one_device(model: Any) -> None:
    places = sorted({str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(places) > 1 or "disk" in places:
        raise ValueError(
            f"The model is spread over several places (device_map: {cut(', '.join(places), 80)}), and CAPT takes a CLIP on one "
            "device: load it with device_map='cuda:0' or 'cpu', or without device_map."
        )


def _check_gradients(model: Any) -> None:
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    four_bits = (
        settings.get("load_in_4bit") if isinstance(settings, Mapping) else getattr(settings, "load_in_4bit", None)
    )
    if four_bits and next(model.parameters()).device.type == "cpu":
        # bitsandbytes packs its weights at the first pass without gradients, for a kernel that has none
        raise ValueError(
            "The model is quantised to 4 bits by bitsandbytes, which on a CPU gives no gradients, so that it can be neither "
            "tuned nor attacked. Load it with load_in_8bit=True, without quantization_config, or on a GPU."
        )


def _is_siglip(config: Any) -> bool:
    return config.model_type in SIGLIP


# ------------------------------------------------------------------------------------------------ towers and their places


@dataclass(frozen=True)
class Tower:
    """One transformer of a CLIP.

    Attributes:
        name: Of its module.
        dim: Its width.
        modules: Names of the modules through which prompts enter, as in `Site`.
        start: Position of the first text prompt: 1 after a start token, 0 without one (SigLIP).
        causal: Whether states of a text do not depend on the tokens behind them; SigLIP's do.
    """

    name: str
    dim: int
    modules: tuple[str, ...]
    start: int
    causal: bool


@dataclass(frozen=True)
class Site:
    """A module through which prompts enter one tower.

    Attributes:
        tower: "text" or "vision".
        index: 0 for the embeddings, whose *output* gets the prompts: the token embeddings, before positions are added (text),
            or the whole embeddings, before the pre-layernorm (vision). i > 0 for encoder layer i, whose *input* gets them.
        dim: Width of the tower.
        start: Position of the first text prompt.
        partner: Name of the module with the same index in the other tower, if there is one.
        partner_dim: Width of the other tower, 0 without one.
    """

    tower: str
    index: int
    dim: int
    start: int
    partner: str | None
    partner_dim: int


def find_towers(model: nn.Module) -> dict[str, Tower]:
    """Finds the text and the vision tower, at most one of each: `embeddings` next to an `encoder` with a list of `layers`."""
    kinds = {"text": "token_embedding", "vision": "patch_embedding"}
    towers: dict[str, Tower] = {}
    for name, module in model.named_modules():
        parts = dict(module.named_children())  # its own: PEFT's wrappers hand out those of what they wrap
        embeddings, layers = parts.get("embeddings"), getattr(parts.get("encoder"), "layers", None)
        if not isinstance(layers, nn.ModuleList) or ".base_layer" in name:
            continue
        kind = next((kind for kind, embedding in kinds.items() if hasattr(embeddings, embedding)), None)
        if kind is None:
            continue
        if kind in towers:
            raise ValueError(
                f"{type(model).__name__} has two {kind} towers, {towers[kind].name!r} and {name!r}; CAPT needs one."
            )
        path = f"{name}." if name else ""
        first = f"{path}embeddings.token_embedding" if kind == "text" else f"{path}embeddings"
        deeper = [f"{path}encoder.layers.{i}" for i in range(1, len(layers))]
        config: Any = module.config
        siglip = _is_siglip(config)
        towers[kind] = Tower(name, config.hidden_size, (first, *deeper), start=0 if siglip else 1, causal=not siglip)
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


def prompt_places(start: int, count: int) -> slice:
    """Returns the positions of the tokens that text prompts replace, from the first one's (`Site.start`) and their number."""
    return slice(start, start + count)


def in_tower(name: str, tower: str) -> bool:
    """Tells whether a weight of that name is one of a tower ("text" or "vision") or of the projection behind it."""
    return name.startswith(TOWER_NAMES[tower])


def name_in_tower(name: str, kind: str, tower: Tower) -> str:
    """Returns the name that a weight of a whole model has in a model of one tower, which may be that tower itself."""
    own = TOWER_NAMES[kind][0]  # "text_model."
    return name if f"{tower.name}.".endswith(own) else name.removeprefix(own)


def tower_modules(model: nn.Module) -> list[nn.Module]:
    """Returns the transformers of a CLIP as modules."""
    return [model.get_submodule(tower.name) for tower in find_towers(model).values()]


def encoder(tower: Any) -> Any:
    """Returns the module of a tower that runs its layers, one after the other, from `inputs_embeds` (B, L, dim)."""
    return tower.encoder


def pooling(tower: Any) -> Any:
    """Returns the module that pools all tokens (B, L, dim) of a vision tower, SigLIP's; None for CLIP, which reads one."""
    return getattr(tower, "head", None)


def quick_gelus(model: nn.Module) -> list[Any]:
    """Returns the activations of a model that compute OpenAI's x · sigmoid(1.702 x)."""
    return [module for module in model.modules() if isinstance(module, QuickGELUActivation)]


def image_size(model: Any) -> int:
    """Returns the side of the images that a CLIP (or its configuration) takes, in pixels."""
    config = getattr(model, "config", model)
    return int(getattr(config, "vision_config", config).image_size)


# -------------------------------------------------------------------------------------------------------------- texts


def _text_config(model: Any) -> Any:
    config = getattr(model, "config", model)
    return getattr(config, "text_config", config)


def max_text_length(model: Any) -> int:
    """Returns the number of tokens that the texts of a model (or of its configuration) may have."""
    return int(_text_config(model).max_position_embeddings)


def vocabulary_size(model: Any) -> int:
    """Returns the number of tokens that a model (or its configuration) knows."""
    return int(_text_config(model).vocab_size)


def end_token(model: Any) -> int | str:
    """Returns how a model (or its configuration) finds the end of a text: a token id, or `HIGHEST`."""
    config = _text_config(model)
    if _is_siglip(config):
        # published SigLIPs name no end token, for which transformers puts CLIP's; the tokenizers of both families end with 1
        return SIGLIP_END if config.eos_token_id in (None, CLIP_END) else int(config.eos_token_id)
    # CLIP reads an eos_token_id of 2, which old configurations have by mistake, as "the highest id"
    legacy = config.eos_token_id == 2 and config.model_type.startswith("clip")
    return HIGHEST if legacy else int(config.eos_token_id)


def is_end(input_ids: Tensor, end: int | str) -> Tensor:
    """Tells which tokens (..., L) are ends of texts, by `end_token`'s rule; the first of them is where a text is read."""
    last: Any = input_ids.max(-1, keepdim=True).values if end == HIGHEST else end
    return torch.eq(input_ids, last)


def first_end(input_ids: Tensor, end: int | str) -> int:
    """Returns the lowest position of an end among texts (..., L), by `end_token`'s rule; L if there is none.

    It is remembered while the texts' tensor is not written to: every step runs the same texts, and to read them waits for a GPU.
    """
    base = input_ids if input_ids._base is None else input_ids._base  # transformers makes a view of what it is given
    layout = input_ids.shape, input_ids.stride(), input_ids.storage_offset()
    state = None if input_ids.is_inference() else (input_ids._version, end, *layout)
    known = _FIRST_ENDS.get(base)
    if known is None or state is None or known[0] != state:
        ends = is_end(input_ids, end).reshape(-1, input_ids.shape[-1]).any(0).tolist()
        known = _FIRST_ENDS[base] = state, [*ends, True].index(True)
    return known[1]


class _LowerCase:
    """A tokenizer that is given texts in lower case; in all else the tokenizer that it was made of."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str | Sequence[str], **options: Any) -> Any:
        return self._tokenizer(text.lower() if isinstance(text, str) else [each.lower() for each in text], **options)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name == "_tokenizer":  # a copy has none yet
            raise AttributeError(name)
        return getattr(self._tokenizer, name)


def reader(model: Any, tokenizer: Any) -> Any:
    """Returns a tokenizer as a model (or its configuration) was trained with it.

    SigLIP and SigLIP 2 read texts in lower case, and the tokenizer that most SigLIP 2 name, Gemma's, leaves capitals as they are.
    """
    return _LowerCase(tokenizer) if _is_siglip(_text_config(model)) else tokenizer


def tokenize(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Tokenizes N texts as a model reads them: `input_ids` and perhaps `attention_mask`, (N, L), padded on the right.

    CLIP sees nothing behind a text's end, so that it is given no more than the longest text needs. SigLIP was trained on texts
    padded to its full length, without a mask, and reads their last token, whatever it is; what it is padded with, its tokenizer
    knows (the end token for SigLIP, a token of its own for SigLIP 2).
    """
    names = TEXT_INPUTS
    options: dict[str, Any] = {"padding": True}
    if _is_siglip(_text_config(model)):
        names, options = TEXT_INPUTS[:1], {"padding": "max_length", "max_length": max_text_length(model)}
    inputs = reader(model, tokenizer)(list(texts), return_tensors="pt", padding_side="right", **options)
    return {name: inputs[name] for name in names if name in inputs}


def whole_text(model: Any, ids: Sequence[int]) -> Tensor:
    """Returns a text (1, L) of the given tokens as a SigLIP reads it without its tokenizer: with its end, and padded."""
    config, end = _text_config(model), end_token(model)
    pad = end if config.pad_token_id is None else config.pad_token_id
    text = [*ids, end, *[pad] * max_text_length(model)]
    return torch.tensor([text[: max_text_length(model)]])


def check_tokenizer(tokenizer: Any, model: Any, source: str) -> None:
    """Raises a ValueError if the tokenizer of `source` has ids or an end token that a model (or its configuration) does not."""
    end, known = end_token(model), vocabulary_size(model)
    end = known - 1 if end == HIGHEST else end
    if len(tokenizer) > known or tokenizer.eos_token_id != end:
        raise ValueError(
            f"The tokenizer of {source} does not belong to the model: it has {len(tokenizer)} tokens and ends texts with "
            f"{tokenizer.eos_token_id}, the model has {known} and {end}. Name another processor."
        )


def special_tokens(tokenizer: Any) -> set[int]:
    """Returns the ids of a tokenizer's tokens that mark the start or the end of a text."""
    return {tokenizer.bos_token_id, tokenizer.cls_token_id, *_end_tokens(tokenizer)} - {None}


def _end_tokens(tokenizer: Any) -> set[Any]:
    return {tokenizer.eos_token_id, tokenizer.sep_token_id}


def template_tokens(tokenizer: Any, template: str) -> list[int]:
    """Returns the token ids of a template up to the class name, start token first."""
    ids = list(tokenizer(template.split("{}")[0].rstrip())["input_ids"])
    while ids and ids[-1] in _end_tokens(tokenizer):
        ids.pop()
    return ids


# ------------------------------------------------------------------------------------------------- features and logits


def image_features(model: Any, pixel_values: Tensor) -> Tensor:
    """Returns the projected features of images, not normalised: (B, 3, H, W) pixels as the model takes them -> (B, D)."""
    return _pooled(model.get_image_features(pixel_values=pixel_values))


def text_features(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the projected features of N texts, not normalised: (N, D)."""
    return _pooled(model.get_text_features(**inputs))


def both_features(model: Any, inputs: Mapping[str, Tensor], pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the normalised features of texts (N, D) and images (B, D), by one call of a model or of a wrapper around it."""
    output = model(**inputs, pixel_values=pixel_values)
    return output.text_embeds, output.image_embeds


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output  # their type differs by transformers' version


def log_scale(model: nn.Module) -> Tensor:
    """Returns the logarithm of the temperature's inverse, in float32."""
    scale: Tensor = base_model(model).logit_scale
    return scale.float()


def logits(model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """Returns a model's (B, N) float32 logits of normalised features of images (B, D) and texts (N, D)."""
    product = texts.float() @ images.float().t() * log_scale(model).exp()  # CLIPModel's own order of operations
    bias = getattr(base_model(model), "logit_bias", None)  # SigLIP has one
    return (product if bias is None else product + bias.float()).t()


def check_sigmoid(model: nn.Module) -> None:
    """Raises a ValueError unless a model was trained with a sigmoid of its logits, as SigLIP was."""
    if not hasattr(base_model(model), "logit_bias"):
        raise ValueError(
            f"sigmoid=True needs a model that was trained with one, a SigLIP; {type(base_model(model)).__name__} has no bias, so "
            "that the sigmoid of its logits says nothing. Leave it out."
        )
