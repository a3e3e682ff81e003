"""What differs between the versions of packages that capt_peft runs with. Each part says which version makes it superfluous."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from packaging.version import Version
from transformers.utils import hub

# ------------------------------------------------------------------------------------------------ torch 2.11

COMPILING_TORCH = "2.11"  # torch.compile of an older one stops, or breaks its graphs, inside of transformers' CLIP

# ------------------------------------------------------------------------------------------------ Datasets 5.2


def small_bytes(dataset: Any, column: str) -> Any:
    """Returns a Datasets `Dataset` whose column of bytes can be cast to images, which an older one does not with large ones."""
    import datasets  # not needed to load a model

    if Version(datasets.__version__) < Version("5.2") and dataset.features[column] == datasets.Value("large_binary"):
        return dataset.cast_column(column, datasets.Value("binary"))
    return dataset


# ------------------------------------------------------------------------------------------------ transformers 5.10

# `TrainingArguments.fsdp_config` of a run that shards nothing
FSDP_OFF = {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False}

# ------------------------------------------------------------------------------------------------ transformers 5.18


def resolve_revision(name_or_path: str, revision: str | None, subfolder: str | None, **where: Any) -> str | None:
    """Returns the commit that a revision points to now, or the revision itself where it cannot be known.

    Args:
        name_or_path: Folder or Hub id of an adapter or a model.
        revision: Branch, tag or commit; None: the default branch.
        subfolder: Folder of its configuration within the repository.
        where: `token`, `cache_dir`.
    """
    if hasattr(hub, "resolve_revision"):
        resolved: str | None = hub.resolve_revision(name_or_path, revision, **where)
        return resolved
    if not os.path.exists(name_or_path):
        for name in ("adapter_config.json", "config.json"):
            with suppress(OSError, ValueError):  # it is not there, or not to be reached: whatever loads it says so
                path = hf_hub_download(name_or_path, name, revision=revision, subfolder=subfolder, **where)
                return hub.extract_commit_hash(path, None) or revision
    return revision


# ------------------------------------------------------------------------------------------------ transformers 5.23

if "activation_checkpointing" in {f.name for f in fields(transformers.TrainingArguments)}:
    from transformers import TrainingArguments
else:

    @dataclass
    class TrainingArguments(transformers.TrainingArguments):  # type: ignore[no-redef]
        """transformers' TrainingArguments, whose gradient checkpointing has its later name too."""

        activation_checkpointing: bool | None = field(
            default=None,
            metadata={"help": "Compute activations again in the backward pass.", "nargs": "?", "const": True},
        )
        activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
            default=None, metadata={"help": "Arguments of `torch.utils.checkpoint.checkpoint`."}
        )

        def __post_init__(self) -> None:
            if self.activation_checkpointing is not None:
                self.gradient_checkpointing = self.activation_checkpointing
            self.gradient_checkpointing_kwargs = (
                self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs
            )
            super().__post_init__()
            self.activation_checkpointing = self.gradient_checkpointing
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs

        @property
        def device(self) -> torch.device:
            """The device of this process; "cpu" without the number that transformers < 5.18 cannot resume a run with."""
            device = super().device
            return torch.device("cpu") if device.type == "cpu" else device
