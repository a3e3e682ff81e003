"""Fingerprints: of a base model without its adapters, of its configuration, and of an adapter in memory or on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PretrainedConfig

from .switching import active_adapter, base_parameters

SAFETENSORS_NAME = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
# fields of an adapter's configuration that say where it came from, how it began or how its logits are read, not what it computes
PROVENANCE = {
    "auto_mapping", "base_model_name_or_path", "calibration", "inference_mode", "init", "init_lora_weights", "init_std",
    "init_weights", "peft_version", "revision", "runtime_config", "task_type", "template_token_ids",
}  # fmt: skip
# settings that older adapters do not have, and the value that stands for what those compute
_LATER: dict[str, Any] = {"strength": 1.0, "class_texts": None}
# entries of a base model's configuration that say where it came from, how it began or how it is stored, not what it computes
_NOT_ACTING = {
    "_commit_hash", "_name_or_path", "architectures", "auto_map", "dtype", "id2label", "initializer_factor", "initializer_range",
    "label2id", "logit_scale_init_value", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def base_fingerprint(model: nn.Module) -> str | None:
    """Returns a hash of a base model's weights, with or without adapters in it: names, shapes and float32 values.

    A model in float16 and its float32 copy have the same fingerprint.

    Returns:
        16 hexadecimal digits of a SHA-256, or None if the weights are not there (meta device).
    """
    parameters = list(base_parameters(model))
    if any(parameter.device.type == "meta" for _, parameter in parameters):
        return None
    return tensors_fingerprint(parameters)


def configuration_digest(model: nn.Module) -> str | None:
    """Returns a hash of what a base model's configuration makes it compute, such as its activation function.

    Returns:
        16 hexadecimal digits of a SHA-256, or None for a model without a configuration of transformers.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return None
    return _hash(json.dumps(_acting(config.to_dict()), sort_keys=True, default=str))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _acting(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {key: _acting(value) for key, value in content.items() if key not in _NOT_ACTING}


def adapter_fingerprint(
    adapter: nn.Module | str | Path, adapter_name: str | None = None, *, strength: float | None = None
) -> str:
    """Returns a hash of what an adapter computes: its tensors, its base model's fingerprint, and the settings that act.

    It is the same for an adapter in memory, in its folder and loaded again, under whatever name.

    Args:
        adapter: A model with PEFT adapters (a `PeftModel`, or a model of transformers with an adapter loaded), or the folder of
            a saved adapter.
        adapter_name: Which adapter of a model; by default the active one.
        strength: Of a CAPT adapter, as if it had this strength; by default the one that it has.

    Raises:
        OSError: The folder has no weights.
        ValueError: The folder holds no adapter.
    """
    config: Any
    if isinstance(adapter, nn.Module):
        model: Any = adapter
        name = adapter_name or active_adapter(model)
        config, tensors = model.peft_config[name], get_peft_model_state_dict(model, adapter_name=name)
    else:
        config, tensors = PeftConfig.from_pretrained(str(adapter)), load_file(Path(adapter, SAFETENSORS_NAME))
    settings = {key: value for key, value in config.to_dict().items() if key not in PROVENANCE}
    if strength is not None and "strength" in settings:
        settings["strength"] = float(strength)
    settings = {key: value for key, value in settings.items() if key not in _LATER or value != _LATER[key]}
    text = json.dumps(
        settings, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )
    weights = tensors_fingerprint((key.removeprefix(PEFT_PREFIX), tensor) for key, tensor in tensors.items())
    return _hash(f"{weights}{text}")


def tensors_fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Returns a hash of named tensors, as `base_fingerprint` makes it; their order does not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = tensor.detach()
        if is_traceable_wrapper_subclass(values):  # torchao's quantised weights, whose values are not in one piece
            values = values.dequantize()
        values = values.to("cpu", torch.float32).contiguous()
        digest.update(values.numpy().data)
    return digest.hexdigest()[:16]
