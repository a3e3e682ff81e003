"""The names and shapes of OpenAI's CLIP, and what its tensors are called in transformers' CLIPModel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

WRAPPERS = ("module.", "model.", "_orig_mod.")
VISION, TEXT = "visual.", ""  # in front of a tower's names
SCALARS = ("input_resolution", "context_length", "vocab_size")  # OpenAI's archives count these among the weights
FOREIGN = (
    ("visual.layer1.", "a ResNet CLIP. CAPT needs the tokens of a vision transformer"),
    ("visual.attnpool.", "a ResNet CLIP. CAPT needs the tokens of a vision transformer"),
    (
        "visual.trunk.",
        "an open_clip model with timm's image tower (ConvNeXt, SigLIP). CLIPModel of transformers is another model",
    ),
    ("visual.blocks.", "an EVA-CLIP. transformers' CLIPModel is another model"),
    ("visual.attn_pool.", "an open_clip model with attention pooling (CoCa). transformers' CLIPModel has none"),
    ("logit_bias", "a SigLIP. Convert a CLIP; SigLIPs are loaded from the Hub in transformers' form"),
    ("text_decoder.", "a CoCa. transformers' CLIPModel has no text decoder"),
    (
        "transformer.embeddings.",
        "an open_clip model with a text tower of transformers (RoBERTa). CLIPModel is another model",
    ),
    ("vision_model.", "already in transformers' layout. Load it with from_pretrained"),
    ("text_model.", "already in transformers' layout. Load it with from_pretrained"),
    ("visual.prompt_pos_embedding", "a model with visual prompts, which CLIPModel has no place for"),
)


class Target(NamedTuple):
    """Where a tensor of OpenAI's layout goes."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    change: Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Tower:
    """The architecture of one tower.

    Attributes:
        kind: "vision" or "text".
        width: Size of a token.
        layers: Number of blocks.
        hidden: Size of a block's hidden layer.
        tokens: Number of positions, class token included.
        projection: Size of a feature.
        patch: Side of a patch in pixels (vision).
        vocabulary: Number of token ids (text).
    """

    kind: str
    width: int
    layers: int
    hidden: int
    tokens: int
    projection: int
    patch: int = 0
    vocabulary: int = 0

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return round((self.tokens - 1) ** 0.5) * self.patch


def openai_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors by the names of OpenAI's CLIP: without wrappers, the image tower under `visual.`, the text tower bare.

    Raises:
        ValueError: The tensors are those of another kind of model.
    """
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
    for start, what in FOREIGN:
        found = next((name for name in names if name.startswith(start)), None)
        if found:
            raise ValueError(f"{names[found]} says that this is {what}.")
    if not {"visual.conv1.weight", "token_embedding.weight"} & names.keys():
        raise ValueError(
            f"These are no weights of a CLIP with a vision transformer: neither visual.conv1.weight nor conv1.weight is among "
            f"{len(names)} tensors ({', '.join(sorted(names)[:3])}, ...). Known: OpenAI's CLIP, open_clip, TeCoA, RobustVLM."
        )
    return {name: tensors[original] for name, original in names.items()}


def infer_vision(tensors: Mapping[str, Tensor]) -> Tower:
    """Reads the image tower's architecture off the shapes of the tensors (OpenAI's names)."""
    width, _, patch, _ = _shape(tensors, "visual.conv1.weight", 4)
    tokens, _ = _shape(tensors, "visual.positional_embedding", 2)
    if tokens < 2 or round((tokens - 1) ** 0.5) ** 2 != tokens - 1:
        raise ValueError(
            f"visual.positional_embedding has {tokens} rows, but a square of patches and a class token make n² + 1."
        )
    _, projection = _shape(tensors, "visual.proj", 2)
    layers, hidden = _blocks(tensors, VISION)
    return Tower("vision", width, layers, hidden, tokens, projection, patch=patch)


def infer_text(tensors: Mapping[str, Tensor]) -> Tower:
    """Reads the text tower's architecture off the shapes of the tensors (OpenAI's names)."""
    vocabulary, width = _shape(tensors, "token_embedding.weight", 2)
    tokens, _ = _shape(tensors, "positional_embedding", 2)
    _, projection = _shape(tensors, "text_projection", 2)
    layers, hidden = _blocks(tensors, TEXT)
    return Tower("text", width, layers, hidden, tokens, projection, vocabulary=vocabulary)


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(
            f"The checkpoint lacks {name}. It is no whole CLIP: download it anew, or save the whole state dict."
        )
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{name} has the shape {shape}, but needs {dimensions} dimensions, none of them 0.")
    return shape


def _blocks(tensors: Mapping[str, Tensor], tower: str) -> tuple[int, int]:
    """Returns the number of blocks and the size of their hidden layer."""
    start = f"{tower}transformer.resblocks."
    layers = len({name[len(start) :].split(".")[0] for name in tensors if name.startswith(start)})
    return layers, _shape(tensors, f"{start}0.mlp.c_fc.weight", 2)[0]


def targets(tower: Tower) -> Iterator[tuple[str, Target]]:
    """Yields every tensor that a tower has in OpenAI's layout, with its shape and where it goes."""
    w, vision = tower.width, tower.kind == "vision"
    model = f"{tower.kind}_model."
    if vision:
        yield "visual.class_embedding", _same((w,), f"{model}embeddings.class_embedding")
        yield (
            "visual.conv1.weight",
            _same((w, 3, tower.patch, tower.patch), f"{model}embeddings.patch_embedding.weight"),
        )
        yield "visual.positional_embedding", _same((tower.tokens, w), f"{model}embeddings.position_embedding.weight")
        yield from _norm("visual.ln_pre", f"{model}pre_layrnorm", w)
        yield from _norm("visual.ln_post", f"{model}post_layernorm", w)
        yield "visual.proj", _transposed((w, tower.projection), "visual_projection.weight")
    else:
        yield "token_embedding.weight", _same((tower.vocabulary, w), f"{model}embeddings.token_embedding.weight")
        yield "positional_embedding", _same((tower.tokens, w), f"{model}embeddings.position_embedding.weight")
        yield from _norm("ln_final", f"{model}final_layer_norm", w)
        yield "text_projection", _transposed((w, tower.projection), "text_projection.weight")
        yield "logit_scale", Target((), ("logit_scale",), lambda tensor: (tensor.reshape(()),))
    for layer in range(tower.layers):
        source = f"{VISION if vision else TEXT}transformer.resblocks.{layer}"
        yield from _block(source, f"{model}encoder.layers.{layer}", tower)


def _block(source: str, target: str, tower: Tower) -> Iterator[tuple[str, Target]]:
    w, hidden = tower.width, tower.hidden
    for kind, shape in (("weight", (3 * w, w)), ("bias", (3 * w,))):
        parts = tuple(f"{target}.self_attn.{part}_proj.{kind}" for part in "qkv")
        yield f"{source}.attn.in_proj_{kind}", Target(shape, parts, lambda tensor: tensor.chunk(3))
    yield from _linear(f"{source}.attn.out_proj", f"{target}.self_attn.out_proj", w, w)
    yield from _norm(f"{source}.ln_1", f"{target}.layer_norm1", w)
    yield from _linear(f"{source}.mlp.c_fc", f"{target}.mlp.fc1", hidden, w)
    yield from _linear(f"{source}.mlp.c_proj", f"{target}.mlp.fc2", w, hidden)
    yield from _norm(f"{source}.ln_2", f"{target}.layer_norm2", w)


def _norm(source: str, target: str, width: int) -> Iterator[tuple[str, Target]]:
    for kind in ("weight", "bias"):
        yield f"{source}.{kind}", _same((width,), f"{target}.{kind}")


def _linear(source: str, target: str, outputs: int, inputs: int) -> Iterator[tuple[str, Target]]:
    yield f"{source}.weight", _same((outputs, inputs), f"{target}.weight")
    yield f"{source}.bias", _same((outputs,), f"{target}.bias")


def _same(shape: tuple[int, ...], name: str) -> Target:
    return Target(shape, (name,), lambda tensor: (tensor,))


def _transposed(shape: tuple[int, ...], name: str) -> Target:
    return Target(shape, (name,), lambda tensor: (tensor.t(),))


def take_constants(tensors: dict[str, Tensor], towers: Mapping[str, Tower]) -> None:
    """Takes out what is no weight, having checked it: the causal mask, and the numbers in OpenAI's archives.

    Raises:
        ValueError: A constant that is not what the model's shapes say: a text tower without causal mask, or another size.
    """
    text, vision = towers.get("text"), towers.get("vision")
    if text:
        mask = tensors.pop("attn_mask", None)
        causal = torch.full((text.tokens, text.tokens), float("-inf")).triu(1)
        if mask is not None and not (mask.shape == causal.shape and torch.equal(mask.float(), causal)):
            raise ValueError(
                "attn_mask is not the causal mask of CLIP's text tower, the only one that transformers' CLIPModel has. This "
                "model cannot be converted."
            )
    known = {
        "input_resolution": vision.image_size if vision else None,
        "context_length": text.tokens if text else None,
        "vocab_size": text.vocabulary if text else None,
    }
    for name in SCALARS:
        value = tensors.pop(name, None)
        if value is not None and (value.numel() != 1 or known[name] not in (None, int(value))):
            raise ValueError(
                f"{name} is {value.tolist()}, but the weights' shapes say {known[name]}. Download the file anew."
            )
