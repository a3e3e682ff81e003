"""What a training run is: all that its result depends on, as checkpoints record it and as a resumed run is compared by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..attacks.threat import format_fraction
from ..data.pixels import digest_images
from ..tuner.fingerprint import configuration_digest, tensors_fingerprint
from ..tuner.switching import base_parameters

SHOWN_DIFFERENCES = 12
NOTHING = "nothing"
# of an adapter's configuration: where it came from, and what has an entry of its own
_NOT_SHAPE = {
    "auto_mapping", "base_model_fingerprint", "base_model_name_or_path", "class_names", "inference_mode", "peft_version",
    "revision", "task_type", "template",
}  # fmt: skip
_SCHEDULE = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "tf32", "full_precision_attack", "torch_compile",
    "dataloader_drop_last", "text_chunk_size", "image_chunk_size", "activation_checkpointing",
)  # fmt: skip
_PUBLISHED = {"lr_schedule": "step", "decay_biases": False}  # said where they differ, as older checkpoints lack them


def describe_run(trainer: Any) -> dict[str, Any]:
    """Returns what makes a run this one and no other, in types that JSON has.

    Args:
        trainer: A `CaptTrainer`, before it trains: of a model without adapter the starting weights count.
    """
    task, args, model = trainer.task, trainer.args, trainer.classifier.model
    config = model.peft_config[model.active_adapter].to_dict() if isinstance(model, PeftModel) else None
    train: Any = trainer.train_dataset
    return _plain({
        "base model": model_fingerprint(model),
        "base configuration": configuration_digest(model),
        "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapter": config and {name: value for name, value in config.items() if name not in _NOT_SHAPE},
        "class names": list(task.class_names),
        "template": task.template,
        "training images": {"number": len(train), "content": digest_images(train.dataset)},
        "pixels": train.transform.to_dict(),
        "training attack": trainer.attack.to_dict() if hasattr(trainer.attack, "to_dict") else _settings(trainer.attack),
        "objective": _settings(trainer.objective),
        "teacher": trainer.teacher and _teacher(trainer.teacher.model),
        "seed": args.seed,
        "data_seed": args.data_seed,
        "optimizer": args.optim,
    })  # fmt: skip


def describe_schedule(trainer: Any) -> dict[str, Any]:
    """Returns what a run may go on with another value of, but will then not end where it would have ended.

    Args:
        trainer: A `CaptTrainer`.
    """
    args = trainer.args
    return _plain({
        "length": f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        "images a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        **{name: getattr(args, name, None) for name in _SCHEDULE},
        **{name: value for name, plain in _PUBLISHED.items() if (value := getattr(args, name)) != plain},
        "device": args.device.type,
        "torch": torch.__version__,
    })  # fmt: skip


def model_fingerprint(model: nn.Module) -> str:
    """Returns a hash of the weights that a run starts from: of a model with an adapter, those that are not trained."""
    if isinstance(model, PeftModel):
        return tensors_fingerprint((n, p) for n, p in base_parameters(model) if not p.requires_grad)
    return tensors_fingerprint(model.named_parameters())


def _teacher(model: nn.Module) -> str:
    return f"{tensors_fingerprint(model.named_parameters())}, configuration {configuration_digest(model)}"


def _settings(thing: Any) -> dict[str, Any]:
    """Returns the name of an object's class, or of a function, and its settings that are words or numbers."""
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    settings = {k: v for k, v in getattr(thing, "__dict__", {}).items() if isinstance(v, str | int | float | None)}
    return {"name": name, **{k: v for k, v in settings.items() if not k.startswith("_")}}


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the same in types that JSON has: sets as sorted lists, other things as words."""
    text = json.dumps(content, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    plain: dict[str, Any] = json.loads(text)
    return plain


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Returns a line for each entry that differs, as "seed: 1 here, 0 in the checkpoint".

    Args:
        here: What `describe_run` or `describe_schedule` says of this run.
        there: What a checkpoint says of its own.
    """
    mine, theirs = dict(_entries(here)), dict(_entries(there))
    names = [name for name in {**mine, **theirs} if mine.get(name, NOTHING) != theirs.get(name, NOTHING)]
    lines = [f"{name}: {_both(mine.get(name, NOTHING), theirs.get(name, NOTHING))}" for name in names]
    more = len(lines) - SHOWN_DIFFERENCES
    return [*lines[:SHOWN_DIFFERENCES], f"and {more} more"] if more > 0 else lines


def _entries(content: Any, name: str = "") -> list[tuple[str, Any]]:
    """Returns the single values in nested mappings and lists, under names such as "class names 3"."""
    if isinstance(content, list):
        content = dict(enumerate(content))
    if not isinstance(content, Mapping):
        return [(name, content)]
    return [entry for key, value in content.items() for entry in _entries(value, f"{name} {key}".strip())]


def _both(mine: Any, theirs: Any) -> str:
    shown = [format_fraction(value) if isinstance(value, float) else str(value) for value in (mine, theirs)]
    if shown[0] == shown[1]:
        shown = [repr(mine), repr(theirs)]
    return f"{shown[0]} here, {shown[1]} in the checkpoint"
