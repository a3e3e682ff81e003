"""From a state dict in OpenAI's layout to a folder that `CLIPModel.from_pretrained` loads; exact, or an error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig

from ..tuner.clip import check_tokenizer
from ..tuner.fingerprint import tensors_fingerprint
from ..utils.files import entries, make_writable, write_json, written_whole
from ..utils.text import some
from .architecture import build, check_same_architecture, describe, make_config
from .base import Base, base_similarity, check_settings, load_transformers, warn_if_far
from .layout import Tower, infer_text, infer_vision, openai_names, take_constants, targets
from .processing import load_tokenizer, save_processor
from .reading import read_checkpoint
from .settings import Settings, check_activation, open_clip_settings

Weights = dict[str, Tensor]
DTYPES = ("float32", "float16", "bfloat16")
RECORD = "backbone.json"


@dataclass(frozen=True)
class BackboneInfo:
    """Where a converted backbone comes from; `backbone.json` in its folder.

    Attributes:
        checkpoint: Name of the file.
        sha256: Of the file.
        layout: "both towers" or "vision tower alone".
        container: Entry of the file that the weights were in.
        unused: Other entries of the file, which were not read.
        architecture: As in "ViT-B/32, 224 pixels".
        activation: "quick_gelu" or "gelu".
        base: Where the text tower comes from, if not from the file.
        base_similarity: Cosine between the matrices of the image tower and those of the base's: near 1 for a fine-tuned base.
        dtype: Precision of the written weights.
        fingerprint: Of the whole model, as adapters record that of their base.
    """

    checkpoint: str
    sha256: str
    layout: str
    container: str | None
    unused: tuple[str, ...]
    architecture: str
    activation: str
    base: str | None
    base_similarity: float | None
    dtype: str
    fingerprint: str


def convert_backbone(
    checkpoint: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    activation: str | None = None,
    head_width: int | None = None,
    processor: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> BackboneInfo:
    """Converts a published CLIP checkpoint to a folder that transformers and this package load.

    Args:
        checkpoint: File in OpenAI's layout: a whole CLIP (OpenAI, open_clip) or an image tower (TeCoA, APT, RobustVLM).
        output: The folder to write: model, processor and `backbone.json`; whole or not at all.
        base: The CLIP that an image tower was fine-tuned from, whose text tower it goes with: folder or Hub id, or such a file.
        activation: "quick_gelu" or "gelu"; no shape tells. By default the base's, or what open_clip's configuration beside the
            checkpoint says, or "quick_gelu", OpenAI's.
        head_width: Size of the image tower's attention heads; by default the base's, or 64 (80, 88, 104 in ViT-H, g, bigG).
        processor: Folder or Hub id to take the tokenizer from; by default the base.
        dtype: Precision of the written weights: float32, float16 or bfloat16.
        overwrite: Write into a folder that is not empty.

    Returns:
        What was converted.

    Raises:
        FileExistsError: The folder is not empty.
        FileNotFoundError: The checkpoint does not exist.
        ValueError: Nothing can be written into the folder; the file is not read safely, is no CLIP with a vision transformer, or
            has missing, extra, misshapen or non-finite tensors; a base is needed, not needed, or another model; a setting that
            does not exist.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    check_activation(activation)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
    if output.exists() and (not output.is_dir() or entries(output)) and not overwrite:
        raise FileExistsError(f"{output} is not empty. Name another folder, or pass overwrite=True.")
    make_writable(output)
    found = read_checkpoint(checkpoint)
    start, settings = resolve(checkpoint, base, activation, head_width)
    try:
        config, tensors = to_transformers(found.tensors, base=start, settings=settings)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error} Nothing was written.") from error
    similarity = base_similarity(tensors, start.tensors) if start else None
    if base and similarity is not None:
        warn_if_far(similarity, checkpoint, base)
    tokenizer = load_tokenizer(
        processor or (base if base and not Path(base).is_file() else None), processor is not None
    )
    if tokenizer is not None:
        check_tokenizer(tokenizer, config, str(processor or base))
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    info = BackboneInfo(
        checkpoint=checkpoint.name,
        sha256=_sha256(checkpoint),
        layout="vision tower alone" if start else "both towers",
        container=found.container,
        unused=found.unused,
        architecture=describe(config),
        activation=settings.activation,
        base=base,
        base_similarity=similarity,
        dtype=dtype,
        fingerprint=tensors_fingerprint(tensors.items()),
    )
    with written_whole(output) as folder:
        build(config, tensors).save_pretrained(folder, max_shard_size="1TB")
        save_processor(folder, tokenizer, config, settings)
        write_json(folder / RECORD, asdict(info))
    return info


def resolve(
    checkpoint: Path, base: str | None, activation: str | None, head_width: int | None
) -> tuple[Base | None, Settings]:
    """Returns the base, if there is one, and what no shape tells: from the arguments, the base or open_clip's configuration."""
    told = open_clip_settings(Path(base) if base else checkpoint) if base is None or Path(base).is_file() else None
    settings = told or Settings()
    settings = replace(
        settings, activation=activation or settings.activation, head_width=head_width or settings.head_width
    )
    if base is None:
        return None, settings
    if not Path(base).is_file():
        start = load_transformers(base)
        return start, check_settings(start, activation, head_width, base)
    try:
        return Base(*to_transformers(read_checkpoint(base).tensors, settings=settings), settings), settings
    except ValueError as error:
        raise ValueError(f"The base {base}: {error}") from error


def to_transformers(
    state_dict: Mapping[str, Tensor],
    *,
    base: Base | None = None,
    settings: Settings | None = None,
) -> tuple[CLIPConfig, Weights]:
    """Turns a state dict in OpenAI's layout into transformers' configuration and state dict.

    Args:
        state_dict: Tensors by name: a whole CLIP, or an image tower; wrappers (`module.`, `model.`) are taken off.
        base: For an image tower: the CLIP whose text tower it goes with.
        settings: What no shape tells; with a base, the base's configuration says it.

    Returns:
        The configuration, and every tensor of CLIPModel in float32.

    Raises:
        ValueError: A tensor is missing, extra, misshapen or not finite; or the state dict and the base do not belong together.
    """
    settings = settings or Settings()
    tensors = openai_names(state_dict)
    towers = {"vision": infer_vision(tensors)}
    alone = not any(
        name.startswith(("token_embedding.", "transformer.", "text_projection", "ln_final.")) for name in tensors
    )
    if alone and base is None:
        raise ValueError(
            "This is an image tower alone. Name the CLIP it was fine-tuned from as base (for example "
            "openai/clip-vit-base-patch32), whose text tower it goes with."
        )
    if not alone and base is not None:
        raise ValueError(
            "This is a whole CLIP and needs no base. Leave base out (processor names where the tokenizer is from)."
        )
    if not alone:
        towers["text"] = infer_text(tensors)
        if towers["text"].projection != towers["vision"].projection:
            raise ValueError(
                f"visual.proj makes features of {towers['vision'].projection}, text_projection of {towers['text'].projection}. "
                "The towers are of different models."
            )
    take_constants(tensors, towers)
    converted = convert_towers(tensors, towers)
    if base is None:
        return make_config(towers["vision"], towers["text"], settings), converted
    check_same_architecture(towers["vision"], base.config)
    return deepcopy(base.config), {name: converted.get(name, tensor.float()) for name, tensor in base.tensors.items()}


def convert_towers(tensors: Mapping[str, Tensor], towers: Mapping[str, Tower]) -> Weights:
    """Renames, splits and transposes the tensors; every one is accounted for."""
    expected = {name: target for tower in towers.values() for name, target in targets(tower)}
    for what, names in (("lacks", expected.keys() - tensors.keys()), ("has", tensors.keys() - expected.keys())):
        if names:
            raise ValueError(
                f"The checkpoint {what} {some(sorted(names))}{'' if what == 'lacks' else ' too many'}, by the architecture that "
                f"its shapes show ({_towers(towers)}). Convert a whole CLIP or a whole image tower, of this architecture."
            )
    converted: Weights = {}
    for name, target in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != target.shape and not (target.shape == () and tensor.numel() == 1):
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, but {_towers(towers)} needs {target.shape}.")
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{name} is {tensor.dtype} ({tensor.layout}), but needs dense floating-point values.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite values. Download the checkpoint anew.")
        for new, part in zip(target.names, target.change(tensor.detach().float()), strict=True):
            converted[new] = part.clone(memory_format=torch.contiguous_format)
    return converted


def _towers(towers: Mapping[str, Tower]) -> str:
    return ", ".join(f"{t.kind} tower of {t.layers} blocks of {t.width}" for t in towers.values())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
