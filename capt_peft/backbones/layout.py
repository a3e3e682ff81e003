"""The names and shapes of OpenAI's CLIP, and what its tensors are called in transformers' CLIPModel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

WRAPPERS = ("module.", "model.", "_orig_mod.")
VISION, TEXT = "visual.", ""  # in front of a tower's names
Sizes = dict[str, int]  # the entries of a tower's configuration in transformers that its shapes tell
# how the names of other models begin, and what they are
FOREIGN = {
    "visual.layer1.": "a ResNet CLIP. CAPT needs the tokens of a vision transformer",
    "visual.attnpool.": "a ResNet CLIP. CAPT needs the tokens of a vision transformer",
    "visual.trunk.": "an open_clip model with timm's image tower (ConvNeXt, SigLIP), not transformers' CLIPModel",
    "visual.blocks.": "an EVA-CLIP, not transformers' CLIPModel",
    "visual.attn_pool.": "an open_clip model with attention pooling (CoCa). transformers' CLIPModel has none",
    "logit_bias": "a SigLIP. Convert a CLIP; SigLIPs are loaded from the Hub in transformers' form",
    "text_decoder.": "a CoCa. transformers' CLIPModel has no text decoder",
    "transformer.embeddings.": "an open_clip model with a text tower of transformers (RoBERTa), not CLIPModel",
    "vision_model.": "already in transformers' layout. Load it with from_pretrained",
    "text_model.": "already in transformers' layout. Load it with from_pretrained",
    "visual.prompt_pos_embedding": "a model with visual prompts, which CLIPModel has no place for",
}


class Target(NamedTuple):
    """Where a tensor of OpenAI's layout goes: the shape that it must have, what becomes of it, and the names of the parts."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    change: Callable[[Tensor], tuple[Tensor, ...]] = lambda tensor: (tensor,)


def openai_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors by OpenAI's names, without wrappers, or raises a ValueError that says what other model they are of."""
    names = {name: name for name in tensors}
    while prefix := next((w for w in WRAPPERS if all(n.startswith(w) for n in names)), None):
        names = {name.removeprefix(prefix): original for name, original in names.items()}
    if "conv1.weight" in names and "visual.conv1.weight" not in names:
        names = {VISION + name: original for name, original in names.items()}
    if any(name.startswith("text.") for name in names):  # open_clip's CustomTextCLIP
        moved = {name.removeprefix("text."): original for name, original in names.items()}
        if len(moved) != len(names):
            raise ValueError("The state dict holds two text towers, one under 'text.'. Keep one of them.")
        names = moved
    for start, what in FOREIGN.items():
        found = next((name for name in names if name.startswith(start)), None)
        if found:
            raise ValueError(f"{names[found]} says that this is {what}.")
    if not {"visual.conv1.weight", "token_embedding.weight"} & names.keys():
        raise ValueError(
            f"These are no weights of a CLIP with a vision transformer: neither visual.conv1.weight nor conv1.weight is among "
            f"{len(names)} tensors ({', '.join(sorted(names)[:3])}, ...). Known: OpenAI's CLIP, open_clip, TeCoA, RobustVLM."
        )
    return {name: tensors[original] for name, original in names.items()}


def infer_vision(tensors: Mapping[str, Tensor]) -> Sizes:
    """Reads the image tower's architecture off the shapes of the tensors (OpenAI's names)."""
    width, _, patch, _ = _shape(tensors, "visual.conv1.weight", 4)
    tokens, _ = _shape(tensors, "visual.positional_embedding", 2)
    side = round(max(tokens - 1, 0) ** 0.5)
    if tokens < 2 or side**2 != tokens - 1:
        raise ValueError(
            f"visual.positional_embedding has {tokens} rows, but a square of patches and a class token make n² + 1."
        )
    projection = _shape(tensors, "visual.proj", 2)[1]
    return {
        "patch_size": patch, "image_size": side * patch, "hidden_size": width, **_blocks(tensors, VISION),
        "projection_dim": projection,
    }  # fmt: skip


def infer_text(tensors: Mapping[str, Tensor]) -> Sizes:
    """Reads the text tower's architecture off the shapes of the tensors (OpenAI's names)."""
    vocabulary, width = _shape(tensors, "token_embedding.weight", 2)
    tokens, projection = (_shape(tensors, name, 2) for name in ("positional_embedding", "text_projection"))
    return {
        "vocab_size": vocabulary, "max_position_embeddings": tokens[0], "hidden_size": width, **_blocks(tensors, TEXT),
        "projection_dim": projection[1],
    }  # fmt: skip


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(
            f"The checkpoint lacks {name}. It is not a whole CLIP: download it again, or save the whole state dict."
        )
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{name} has the shape {shape}, but needs {dimensions} dimensions, none of them 0.")
    return shape


def _blocks(tensors: Mapping[str, Tensor], tower: str) -> Sizes:
    start = f"{tower}transformer.resblocks."
    layers = {name[len(start) :].split(".")[0] for name in tensors if name.startswith(start)}
    hidden = _shape(tensors, f"{start}0.mlp.c_fc.weight", 2)[0]
    return {"num_hidden_layers": len(layers), "intermediate_size": hidden}


# OpenAI's modules of a block, transformers', and their weights' shapes in units of the width (w) and the hidden layer (h)
BLOCK = (
    ("attn.out_proj", "self_attn.out_proj", "ww"),
    ("ln_1", "layer_norm1", "w"),
    ("mlp.c_fc", "mlp.fc1", "hw"),
    ("mlp.c_proj", "mlp.fc2", "wh"),
    ("ln_2", "layer_norm2", "w"),
)


def targets(tower: Sizes) -> dict[str, Target]:
    """Returns every tensor that a tower has in OpenAI's layout, with its shape and where it goes."""
    w, patch, vocabulary = tower["hidden_size"], tower.get("patch_size", 0), tower.get("vocab_size", 0)
    features = (w, tower["projection_dim"])
    if patch:
        source, model, tokens = VISION, "vision_model.", (tower["image_size"] // patch) ** 2 + 1
        norms = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
        found = {
            "class_embedding": Target((w,), (f"{model}embeddings.class_embedding",)),
            "conv1.weight": Target((w, 3, patch, patch), (f"{model}embeddings.patch_embedding.weight",)),
            "proj": Target(features, ("visual_projection.weight",), lambda tensor: (tensor.t(),)),
        }
    else:
        source, model, tokens = TEXT, "text_model.", tower["max_position_embeddings"]
        norms = {"ln_final": "final_layer_norm"}
        found = {
            "token_embedding.weight": Target((vocabulary, w), (f"{model}embeddings.token_embedding.weight",)),
            "text_projection": Target(features, ("text_projection.weight",), lambda tensor: (tensor.t(),)),
            "logit_scale": Target((), ("logit_scale",), lambda tensor: (tensor.reshape(()),)),
        }
    found["positional_embedding"] = Target((tokens, w), (f"{model}embeddings.position_embedding.weight",))
    modules: list[tuple[str, str, tuple[int, ...]]] = [(old, new, (w,)) for old, new in norms.items()]
    for layer in range(tower["num_hidden_layers"]):
        old, new = f"transformer.resblocks.{layer}", f"{model}encoder.layers.{layer}"
        for kind, shape in (("weight", (3 * w, w)), ("bias", (3 * w,))):
            parts = tuple(f"{new}.self_attn.{part}_proj.{kind}" for part in "qkv")
            found[f"{old}.attn.in_proj_{kind}"] = Target(shape, parts, lambda tensor: tensor.chunk(3))
        sizes = {"w": w, "h": tower["intermediate_size"]}
        modules += [
            (f"{old}.{a}", f"{new.removeprefix(model)}.{b}", tuple(sizes[s] for s in units)) for a, b, units in BLOCK
        ]
    for old, new, size in modules:
        found[f"{old}.weight"] = Target(size, (f"{model}{new}.weight",))
        found[f"{old}.bias"] = Target(size[:1], (f"{model}{new}.bias",))
    return {source + name: target for name, target in found.items()}


def take_constants(tensors: dict[str, Tensor], vision: Sizes, text: Sizes | None) -> None:
    """Removes what is not a weight, after checking it: the causal mask, and the numbers in OpenAI's archives."""
    known: dict[str, int | None] = {
        "input_resolution": vision["image_size"],
        "context_length": None,
        "vocab_size": None,
    }
    if text:
        length = text["max_position_embeddings"]
        known |= {"context_length": length, "vocab_size": text["vocab_size"]}
        mask = tensors.pop("attn_mask", None)
        causal = torch.full((length, length), float("-inf")).triu(1)
        if mask is not None and not (mask.shape == causal.shape and torch.equal(mask.float(), causal)):
            raise ValueError(
                "attn_mask is not the causal mask of CLIP's text tower, the only one that transformers' CLIPModel has. This "
                "model cannot be converted."
            )
    for name, number in known.items():
        value = tensors.pop(name, None)
        if value is not None and (value.numel() != 1 or number not in (None, int(value))):
            raise ValueError(
                f"{name} is {value.tolist()}, but the weights' shapes say {number}. Download the file again."
            )
