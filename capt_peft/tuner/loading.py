"""Checks that PEFT does not make when it loads an adapter: damaged files, wrong tensors, another base model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from ..utils.embedded import model_path
from ..utils.text import cut, shown, some
from .fingerprint import PEFT_PREFIX, SAFETENSORS_NAME
from .switching import base_parameters

PICKLE_NAME = "adapter_model.bin"
MAX_HEADER = 1 << 20  # bytes; the 9 layers of a ViT-L take 5 thousand, a whole CLIP in modules_to_save 80 thousand
SLACK = 1 << 24  # numbers: 64 MB in float32
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "repo_type")
AGAIN = "Save the adapter again or download it again; nothing of it was loaded."


def check_adapter_files(
    name_or_path: str, subfolder: str | None, kwargs: Mapping[str, Any]
) -> tuple[str, dict[str, tuple[int, ...]] | None]:
    """Makes sure that an adapter's weights, in a folder or on the Hub, are a whole safetensors file, or raises a ValueError.

    Returns a name of the weights for messages, and the shapes of the file's tensors by name (None: there is no file yet).
    """
    folder = os.path.join(name_or_path, subfolder or "")
    if os.path.isdir(folder):
        path, pickle = os.path.join(folder, SAFETENSORS_NAME), os.path.join(folder, PICKLE_NAME)
        if not os.path.isfile(path):
            if os.path.isfile(pickle):
                raise _refuse_pickle(pickle)
            return path, None  # a configuration alone, without weights
    else:
        hub = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
        try:  # PEFT needs the file next, so that nothing is downloaded in vain
            path = hf_hub_download(name_or_path, SAFETENSORS_NAME, subfolder=subfolder, **hub)
        except LocalEntryNotFoundError:  # offline and not in the cache: PEFT says so when it loads
            return f"{name_or_path}/{SAFETENSORS_NAME}", None
        except EntryNotFoundError as error:
            raise _refuse_pickle(f"{name_or_path} (it has no {SAFETENSORS_NAME})") from error
    size = os.path.getsize(path)
    with open(path, "rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    if MAX_HEADER < header <= size:  # parsing it can take minutes; any other length is refused by safetensors itself
        raise ValueError(
            f"{path} is not an adapter: the list of its tensors has {header:,} bytes; up to {MAX_HEADER:,} are read. {AGAIN}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return path, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} ({size} bytes) is not a whole safetensors file: {cut(error)}. {AGAIN}") from error


def _refuse_pickle(path: str) -> ValueError:
    return ValueError(
        f"The adapter weights {path} are not in safetensors format. CAPT reads no pickles, which can run code; ask for "
        f"{SAFETENSORS_NAME}, or save the adapter again with `save_pretrained`."
    )


def load_pretrained(loader: Any, name_or_path: str, **kwargs: Any) -> Any:
    """Loads a model, processor or tokenizer of transformers, and never runs code that comes with it, nor asks whether to.

    Args:
        loader: A class with `from_pretrained`, such as `AutoModel` or `AutoProcessor`.
        name_or_path: Folder or Hub id, or the name of an embedded model (`tiny_clip`).
        kwargs: Its further arguments.

    Raises:
        ValueError: It needs code of its own, or its author's code would have to be replaced by transformers'.
        OSError: It cannot be found or reached.
    """
    refused = (
        f"{cut(name_or_path)} comes with code of its own for {getattr(loader, '__name__', loader)}, and capt_peft runs no code "
        "from a model's files. Take a CLIP that transformers has built in."
    )
    try:
        loaded = loader.from_pretrained(model_path(name_or_path), trust_remote_code=False, **kwargs)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(refused) from error
    if isinstance(loaded, nn.Module) and "AutoModel" in (getattr(loaded.config, "auto_map", None) or {}):
        raise ValueError(refused)
    return loaded


def check_adapter_tensors(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], source: str
) -> None:
    """Raises a ValueError unless tensors have the names and shapes of the `expected` ones, and are finite numbers."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        parts = [f"lacks {_tensors(missing)}"] * bool(missing) + [f"has unexpectedly {_tensors(extra)}"] * bool(extra)
        raise ValueError(
            f"{source} does not hold the adapter that its configuration describes: it {' and '.join(parts)}. {AGAIN}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{source}: {cut(name)} {_mismatch(tensor.shape, expected[name].shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {cut(name)} is {tensor.dtype}, not floating point. {AGAIN}")
        if not torch.isfinite(tensor.float()).all():  # 8-bit numbers and float64 as they will be computed with
            raise ValueError(f"{source}: {cut(name)} holds NaN or infinite values. {AGAIN}")


def check_size(config: Any, needed: int) -> None:
    """Raises a ValueError if a loaded `CaptConfig` describes far more numbers than its file holds, before memory is taken."""
    if getattr(config, "_weights_shapes", None) is None:
        return
    held = sum(map(math.prod, config._weights_shapes.values()))
    if needed > held + SLACK:  # smaller differences are named tensor by tensor once they are loaded
        raise ValueError(
            f"{config._weights_file} holds {held:,} numbers, but its configuration describes prompts of {needed:,}. Correct "
            f"num_text_tokens, num_vision_tokens or class_names of the configuration. {AGAIN}"
        )


def check_saved_modules(config: Any, model: nn.Module, sites: Iterable[str]) -> None:
    """Raises a ValueError for `modules_to_save` that are none, hold prompts (`sites`), or are not in the adapter's file."""
    names = [name for name, _ in base_parameters(model)] if config.modules_to_save else []
    shapes = getattr(config, "_weights_shapes", None)
    held = {name.replace(".base_layer.", ".") for name in shapes or ()}
    for entry in config.modules_to_save or []:
        given = f"modules_to_save={shown(config.modules_to_save)}: {shown(entry)}"
        if not any(f".{entry}." in f".{name}" for name in names):
            raise ValueError(
                f"{given} is not a module with parameters of the model. Name one, such as 'visual_projection'."
            )
        clash = next((site for site in sites if _is_saved(site, entry)), None)
        if clash is not None:
            raise ValueError(
                f"{given} also means {clash}, whose prompts are saved anyway. Name another module, such as 'visual_projection'."
            )
        needed = (name for name in names if _is_saved(name.rpartition(".")[0], entry))
        missing = sorted({name for name in needed if PEFT_PREFIX + name not in held})
        if shapes is not None and missing:
            raise ValueError(f"{given} is to be saved, but {config._weights_file} lacks {_tensors(missing)}. {AGAIN}")


def _is_saved(module: str, entry: str) -> bool:
    """Tells whether PEFT saves a module, or one around it: it takes every module whose name ends as the entry does."""
    return f"{entry}." in f"{module}."


def _mismatch(found: torch.Size, needed: torch.Size) -> str:
    if len(found) == 3 and len(needed) == 3 and found[1:] == needed[1:]:  # only class-specific prompts have three axes
        return (
            f"holds the prompts of {found[0]} classes, but the configuration has {needed[0]} class_names. Correct the "
            f"configuration: it must name the {found[0]} classes that the adapter was tuned on, in their order."
        )
    return (
        f"has the shape {tuple(found)}, but the configuration and the base model need {tuple(needed)}. Load it on the base "
        "model it was tuned on, or correct the configuration."
    )


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({some(cut(name, 80) for name in names)})"
