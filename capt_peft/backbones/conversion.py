"""From a state dict in OpenAI's layout to a folder that `CLIPModel.from_pretrained` loads; exact, or an error."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from ..tuner.clip import check_tokenizer, image_size, in_tower
from ..tuner.fingerprint import tensors_fingerprint
from ..utils.embedded import model_path
from ..utils.files import entries, make_writable, write_json, written_whole
from ..utils.text import some
from .layout import Sizes, infer_text, infer_vision, openai_names, take_constants, targets
from .model import (
    ACTIVATIONS,
    Settings,
    build,
    check_same_architecture,
    describe,
    load_tokenizer,
    make_config,
    open_clip_settings,
    pixel_statistics,
    save_processor,
)
from .reading import read_checkpoint

logger = logging.getLogger(__name__)

Weights = dict[str, Tensor]
Model = tuple[CLIPConfig, Mapping[str, Tensor]]  # in transformers' form
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
        base: The CLIP that an image tower was fine-tuned from, whose text tower it goes with: folder or Hub id, or such a file;
            None (the default) for a whole CLIP.
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
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
    if output.exists() and (not output.is_dir() or entries(output)) and not overwrite:
        raise FileExistsError(f"{output} is not empty. Name another folder, or pass overwrite=True.")
    make_writable(output)
    found = read_checkpoint(checkpoint)
    start, settings = _resolve(checkpoint, base, activation, head_width)
    try:
        config, tensors = to_transformers(found.tensors, base=start, settings=settings)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error} Nothing was written.") from error
    similarity = _similarity(tensors, start[1]) if start else None
    if similarity is not None and similarity < 0.5:  # its images do not match the texts, and no shape tells
        logger.warning(
            "The image tower of %s is not near that of %s (cosine %.2f): it was fine-tuned from another CLIP, and its images "
            "will not match the texts. Name the CLIP that it comes from.",
            checkpoint.name,
            base,
            similarity,
        )
    source = processor or (base if base and not Path(base).is_file() else None)
    tokenizer = load_tokenizer(source, processor is not None)
    if tokenizer is not None:
        check_tokenizer(tokenizer, config, str(source))
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    info = BackboneInfo(
        checkpoint=checkpoint.name,
        sha256=sha256_of(checkpoint),
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
    _write(output, config, tensors, tokenizer, settings, info)
    return info


def copy_backbone(folder: str | Path, output: str | Path, *, processor: str, sha256: str) -> BackboneInfo:
    """Writes a CLIP that is in transformers' form already with another model's processor, as one folder, in float32.

    Args:
        folder: Where it is; without a processor.
        output: The folder to write, as `convert_backbone` writes it.
        processor: Folder or Hub id to take the tokenizer and the pixels' statistics from.
        sha256: What is recorded as the hash of its weights.

    Raises:
        ValueError: It is not a whole CLIPModel, or the tokenizer is not its own.
        OSError: The processor cannot be found or reached.
    """
    (config, weights), settings = _load_base(str(folder), None, None)
    tokenizer = load_tokenizer(processor, True)
    check_tokenizer(tokenizer, config, processor)
    mean, std = pixel_statistics(processor)
    tensors = {name: tensor.float() for name, tensor in weights.items()}
    info = BackboneInfo(
        checkpoint=Path(folder).name,
        sha256=sha256,
        layout="both towers",
        container=None,
        unused=(),
        architecture=describe(config),
        activation=settings.activation,
        base=None,
        base_similarity=None,
        dtype="float32",
        fingerprint=tensors_fingerprint(tensors.items()),
    )
    _write(Path(output), config, tensors, tokenizer, replace(settings, mean=mean, std=std), info)
    return info


def _write(
    output: Path, config: CLIPConfig, tensors: Weights, tokenizer: Any, settings: Settings, info: BackboneInfo
) -> None:
    with written_whole(output) as folder:
        build(config, tensors).save_pretrained(folder, max_shard_size="1TB")
        save_processor(folder, tokenizer, image_size(config), settings)
        write_json(folder / RECORD, asdict(info))


def _resolve(
    checkpoint: Path, base: str | None, activation: str | None, head_width: int | None
) -> tuple[Model | None, Settings]:
    """Returns the base, if there is one, and what no shape tells: from the arguments, the base or open_clip's configuration."""
    if base is not None and not Path(base).is_file():
        return _load_base(base, activation, head_width)
    told = open_clip_settings(Path(base) if base else checkpoint) or Settings()
    settings = replace(told, activation=activation or told.activation, head_width=head_width or told.head_width)
    if base is None:
        return None, settings
    try:
        return to_transformers(read_checkpoint(base).tensors, settings=settings), settings
    except ValueError as error:
        raise ValueError(f"The base {base}: {error}") from error


def _load_base(name: str, activation: str | None, head_width: int | None) -> tuple[Model, Settings]:
    """Loads a base from a folder or the Hub; an image tower has the settings that it was tuned with, the base's."""
    name = model_path(name)
    loaded: Any = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if model.config.model_type != "clip" or wrong:
        raise ValueError(
            f"The base {name} ({model.config.model_type}) is not a whole CLIPModel of transformers; it lacks {len(wrong)} "
            f"tensors ({some(wrong)}). Name the CLIP that the image tower was fine-tuned from."
        )
    vision = model.config.vision_config
    its = {"activation": vision.hidden_act, "head_width": vision.hidden_size // vision.num_attention_heads}
    for what, asked in (("activation", activation), ("head_width", head_width)):
        if asked not in (None, its[what]):
            raise ValueError(
                f"{what}={asked!r}, but the base {name} has {its[what]}. Leave {what} out, or name another base."
            )
    return (model.config, model.state_dict()), Settings(vision.hidden_act, None, *pixel_statistics(name))


def _similarity(tensors: Weights, base: Mapping[str, Tensor]) -> float:
    """Returns the cosine between the matrices of two image towers; biases and norms are alike in all CLIPs and do not count."""
    dot = mine = theirs = 0.0
    for name, tensor in tensors.items():
        if in_tower(name, "vision") and tensor.ndim > 1:
            a, b = tensor.flatten().float(), base[name].flatten().float()
            dot, mine, theirs = dot + float(a @ b), mine + float(a @ a), theirs + float(b @ b)
    return round(dot / max((mine * theirs) ** 0.5, 1e-30), 4)


def to_transformers(
    state_dict: Mapping[str, Tensor],
    *,
    base: Model | None = None,
    settings: Settings | None = None,
) -> tuple[CLIPConfig, Weights]:
    """Turns a state dict in OpenAI's layout into transformers' configuration and state dict.

    Args:
        state_dict: Tensors by name: a whole CLIP, or an image tower; wrappers (`module.`, `model.`) are taken off.
        base: For an image tower: the CLIP whose text tower it goes with, as this function returns it.
        settings: What no shape tells; with a base, the base's configuration says it.

    Returns:
        The configuration, and every tensor of CLIPModel in float32.

    Raises:
        ValueError: A tensor is missing, extra, misshapen or not finite; or the state dict and the base do not belong together.
    """
    settings, tensors = settings or Settings(), openai_names(state_dict)
    vision, text = infer_vision(tensors), None
    alone = not any(
        name.startswith(("token_embedding.", "transformer.", "text_projection", "ln_final.")) for name in tensors
    )
    if alone and base is None:
        raise ValueError(
            "This is an image tower alone. Name the CLIP it was fine-tuned from as base (for example "
            "openai/clip-vit-base-patch32), whose text tower it goes with."
        )
    if not alone:
        if base is not None:
            raise ValueError(
                "This is a whole CLIP and needs no base. Leave base out (processor names where the tokenizer is from)."
            )
        text = infer_text(tensors)
        one, other = vision["projection_dim"], text["projection_dim"]
        if one != other:
            raise ValueError(
                f"visual.proj makes features of {one}, text_projection of {other}. The towers are of different models."
            )
    take_constants(tensors, vision, text)
    converted = _convert(tensors, {"vision": vision, "text": text} if text else {"vision": vision})
    if text:
        return make_config(vision, text, settings), converted
    assert base is not None
    config, weights = base
    check_same_architecture(vision, config)
    return deepcopy(config), {name: converted.get(name, tensor.float()) for name, tensor in weights.items()}


def _convert(tensors: Mapping[str, Tensor], towers: dict[str, Sizes]) -> Weights:
    """Renames, splits and transposes the tensors; every one is accounted for."""
    sizes = (f"{kind} tower of {t['num_hidden_layers']} blocks of {t['hidden_size']}" for kind, t in towers.items())
    shown = ", ".join(sizes)
    expected = {name: target for tower in towers.values() for name, target in targets(tower).items()}
    for what, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has unexpectedly", tensors.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"The checkpoint {what} {some(sorted(names))}, by the architecture that its shapes show ({shown}). Convert a "
                "whole CLIP or a whole image tower, of this architecture."
            )
    converted: Weights = {}
    for name, target in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != target.shape and not (target.shape == () and tensor.numel() == 1):
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, but {shown} needs {target.shape}.")
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{name} is {tensor.dtype} ({tensor.layout}), but needs dense floating-point values.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite values. Download the checkpoint again.")
        for new, part in zip(target.names, target.change(tensor.detach().float()), strict=True):
            converted[new] = part.clone(memory_format=torch.contiguous_format)
    return converted


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
