"""Models by name: an adapter with its base model and processor, or a bare CLIP."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from peft import PeftModel
from torch import nn
from transformers import AutoModel, AutoProcessor

from ..tuner import CaptConfig
from ..tuner.loading import load_pretrained
from ..tuner.others import load_adapter, load_config
from ..utils.embedded import model_path, recorded_path
from ..utils.text import cut
from ..utils.versions import resolve_revision

_WHERE = {"revision", "token", "cache_dir", "subfolder", "local_files_only"}


def load_model(
    name_or_path: str, *, dtype: torch.dtype = torch.float32, base: str | None = None, **kwargs: Any
) -> tuple[nn.Module, Any]:
    """Loads an adapter, of CAPT or another PEFT method, on its base model, or a bare CLIP, and the processor.

    Args:
        name_or_path: Folder or Hub id, or the name of an embedded model (`tiny_clip`).
        dtype: Precision of the base model, whatever it is stored in. In half precision, gradients of the pixels vanish and
            attacks look weaker than they are.
        base: Folder or Hub id of the base model, instead of the one that the adapter names.
        kwargs: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`; and further arguments for loading the base
            model: `device_map` (one device), `quantization_config`, `attn_implementation`, ...

    Returns:
        The model (`PeftModel` for an adapter) in eval mode, and its processor.

    Raises:
        ValueError: The adapter is damaged, changes the base's weights, or does not say what its base model is; or the base model
            needs code of its own, which is never run.
        OSError: There is no such model, or neither the Hub nor the cache gives it.
        TypeError: An argument that transformers does not know.
    """
    name_or_path = model_path(name_or_path)
    loading = {"dtype": dtype, **{k: kwargs.pop(k) for k in set(kwargs) - _WHERE}}
    where = {k: v for k, v in kwargs.items() if k in ("token", "cache_dir")}
    # one commit for all files, whatever is pushed meanwhile
    kwargs["revision"] = resolve_revision(name_or_path, kwargs.get("revision"), kwargs.get("subfolder"), **where)
    try:
        config = load_config(name_or_path, **kwargs)
    except ValueError as error:
        if "Can't find" not in str(error):
            raise
        _check_bare(name_or_path, error.__cause__, kwargs)
        model = load_pretrained(AutoModel, name_or_path, **loading, **kwargs).eval()
        return model, load_pretrained(AutoProcessor, name_or_path, **kwargs)
    recorded = recorded_path(config.base_model_name_or_path or "")
    name, revision = (recorded, config.revision) if base is None else (base, None)
    if not name:
        raise ValueError(f"The adapter {name_or_path} does not name its base model. Name it: base='folder or Hub id'.")
    model = load_pretrained(AutoModel, name, revision=revision, **loading, **where)
    processor = load_pretrained(AutoProcessor, name, revision=revision, **where)
    if isinstance(config, CaptConfig):
        return PeftModel.from_pretrained(model, name_or_path, **kwargs).eval(), processor
    return load_adapter(model, name_or_path, config, **kwargs).eval(), processor


def _check_bare(name_or_path: str, reason: BaseException | None, kwargs: Mapping[str, Any]) -> None:
    """Raises unless an adapter's configuration was not found because there is none, rather than that the Hub failed."""
    bare = os.path.isdir(name_or_path) or isinstance(reason, RemoteEntryNotFoundError | HFValidationError)
    if not bare and isinstance(reason, LocalEntryNotFoundError):  # the Hub cannot be asked, but the cache may know
        file = "/".join(filter(None, (kwargs.get("subfolder"), "config.json")))
        where = {"cache_dir": kwargs.get("cache_dir"), "revision": kwargs.get("revision")}
        bare = isinstance(try_to_load_from_cache(name_or_path, file, **where), str)
    if not bare:
        cause = reason.__cause__ if isinstance(reason, LocalEntryNotFoundError) else reason
        raise OSError(f"{name_or_path} can be read neither from the Hub nor from the cache: {cut(cause)}") from reason
