"""Settings of transformers' Trainer that would have no effect here, or a wrong one: each is refused by name, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

ATTACK = ("attack_steps", "attack_step_size", "attack_loss", "attack_clip_each_step")
ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
NO_MODEL_OUTPUT = "an evaluation counts right predictions and hands on no other output of the model"
ROUNDS = "it would round the weights themselves, for good. An evaluation runs in the model's own precision"
NO_TOKENS = "batches hold images, and every batch takes the same class texts"

# of TrainingArguments: what must stay at its default, and why
REFUSED: dict[str, str] = {
    "auto_find_batch_size": "another batch size is another run. image_chunk_size bounds the memory and keeps the result",
    "average_tokens_across_devices": "the loss is the mean over the images of all processes",
    "batch_eval_metrics": "accuracies and their intervals are those of all images",
    "bf16_full_eval": ROUNDS,
    "enable_jit_checkpoint": "a run that SIGTERM ends would look finished. Write checkpoints (save_strategy) and start the run "
    "again with resume_from_checkpoint",
    "eval_do_concat_batches": "accuracies are those of all batches",
    "eval_use_gather_object": "predictions are tensors",
    "fp16_full_eval": ROUNDS,
    "hub_always_push": "nothing is uploaded before the end; call push_to_hub() then",
    "include_for_metrics": NO_MODEL_OUTPUT,
    "label_names": "labels are in the column `label` of the task",
    "label_smoothing_factor": "the objective decides the loss. Give objective= one that smooths",
    "length_column_name": NO_TOKENS,
    "liger_kernel_config": "Liger has no kernels for CLIP",
    "neftune_noise_alpha": "only the embeddings of language models would be changed",
    "optim_target_modules": "GaLore and APOLLO project the weights of whole layers",
    "prediction_loss_only": "accuracies are what is evaluated",
    "remove_unused_columns": "it would drop the pixels",
    "use_cache": "nothing is generated",
    "use_liger_kernel": "Liger has no kernels for CLIP",
}
# those of which some values do
ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hub_strategy": (("end",), "checkpoints are not uploaded"),
    "include_num_input_tokens_seen": (("no", False), NO_TOKENS),
    "train_sampling_strategy": (("random", "sequential"), NO_TOKENS),
}
# of the data loaders of several processes
REFUSED_ACCELERATOR: dict[str, Any] = {"split_batches": False, "dispatch_batches": None, "even_batches": True}

# arguments of Trainer.__init__ and of TRL's trainers
REFUSED_OF_TRAINER: dict[str, str] = {
    "compute_loss_func": "the loss is that of objective=, which maps a step's views to it",
    "compute_metrics": "clean and robust accuracy are what is evaluated. predict(split) returns the predicted classes for others",
    "data_collator": "the frozen model's outputs are kept for each image of the task as it is. Use augment=True, or another task",
    "formatting_func": NO_TOKENS,
    "model_init": "give the model itself",
    "peft_config": "give model=get_peft_model(model, peft_config)",
    "preprocess_logits_for_metrics": NO_MODEL_OUTPUT,
    "tokenizer": "give processor=, which holds the tokenizer",
    "train_dataset": "give task=, whose `train` split is tuned on and whose class names are the texts",
}


def refuse_arguments(args: Any) -> None:
    """Raises if a training argument is set that would have no effect, or a wrong one.

    Args:
        args: `CaptTrainingArguments`, which need not be set up yet.

    Raises:
        ValueError: There is one; it is named, with the reason.
    """
    known = {field.name: field for field in fields(args)}
    for name, reason in REFUSED.items():
        if name in known and getattr(args, name) != _default(known[name]):
            raise ValueError(f"{name}={_short(getattr(args, name))} is refused: {reason}. Leave it at its default.")
    for name, (values, reason) in ALLOWED.items():
        if name in known and getattr(args, name) not in values:
            allowed = " or ".join(map(repr, values))
            raise ValueError(f"{name}={_short(getattr(args, name))} is refused: {reason}. Allowed: {allowed}.")
    given = args.accelerator_config
    for name, default in REFUSED_ACCELERATOR.items():
        value = given.get(name, default) if isinstance(given, Mapping) else getattr(given, name, default)
        if value != default:
            raise ValueError(
                f"accelerator_config: {name}={_short(value)} is refused: every process must load its own share of a step's "
                f"images. Leave it at {default}."
            )
    adam = [name for name in ADAM if getattr(args, name) != _default(known[name])]
    if args.optim == "sgd" and adam:
        raise ValueError(
            f"{adam[0]}={getattr(args, adam[0])} has no effect on optim='sgd'. Give optim='adamw_torch' too."
        )


def refuse_trainer_arguments(given: Mapping[str, Any]) -> None:
    """Raises if an argument of transformers' or TRL's trainers is given that would have no effect here, or a wrong one.

    Args:
        given: Names and values; None is as good as not given.

    Raises:
        ValueError: There is one; it is named, with what to do instead.
    """
    for name, reason in REFUSED_OF_TRAINER.items():
        if given.get(name) is not None:
            raise ValueError(f"{name}= is refused: {reason}.")


def refuse_attack_settings(args: Any) -> None:
    """Raises if settings of the training attack are given beside an attack, which has its own.

    Args:
        args: `CaptTrainingArguments`.

    Raises:
        ValueError: There is one; it is named.
    """
    known = {field.name: field for field in fields(args)}
    for name in ATTACK:
        if getattr(args, name) != _default(known[name]):
            raise ValueError(
                f"{name}={getattr(args, name)!r} has no effect beside attack=, which has its own. Leave it out."
            )


def one_processor(processor: Any, processing_class: Any) -> Any:
    """Returns the processor that was given under one of its two names.

    Raises:
        ValueError: Both are given, or neither.
    """
    if (processor is None) == (processing_class is None):
        given = "Neither" if processor is None else "Both"
        raise ValueError(
            f"{given} of processor= and processing_class= is given. They are two names of one: give the model's processor, "
            "AutoProcessor.from_pretrained(...), as one of them."
        )
    return processing_class if processor is None else processor


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
