"""Frozen towers that do not fit: their layers sharded over the processes (FSDP2); DeepSpeed's ZeRO-2; what is refused."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, share_comm_ctx
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from .identity import WHOLE_FINGERPRINT, model_fingerprint

logger = logging.getLogger(__name__)

FSDP, RESHARD, DEEPSPEED = "ACCELERATE_USE_FSDP", "FSDP_RESHARD_AFTER_FORWARD", "ACCELERATE_USE_DEEPSPEED"
PLAIN = "Use plain data parallelism, examples/accelerate/ddp_gpus.yaml"


def shard_if_asked(model: nn.Module, args: TrainingArguments) -> None:
    """Shards the frozen encoder layers over the processes, if `accelerate launch` was given FSDP.

    A step calls the image tower alone, past the model's own `forward`, where FSDP gathers what is not in a layer. So each layer
    is sharded by itself, and gathers itself however it is called; the prompts and the little that is no layer (embeddings,
    projections) are on every process, and DDP averages the prompts' gradients as ever. All processes must then run the towers
    equally often: the frozen model runs in every step, and `ready_to_evaluate` is there for evaluations.

    Args:
        model: The model, with its adapter.
        args: The training arguments.

    Raises:
        ValueError: Processes that do not know of each other; FSDP 1, layers that are trained, torch.compile, or an option of
            FSDP's that cannot work here.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"{launched} processes were launched, but each would train for itself: there is no GPU, and use_cpu is off. Give "
            "--use_cpu, or launch one process."
        )
    if getattr(args, "fsdp", None):
        raise ValueError(
            "fsdp is an option of transformers' that shards the whole model, whose parts are called one by one here. Use "
            "`accelerate launch --config_file examples/accelerate/fsdp2.yaml`."
        )
    if not _flag(FSDP):
        return
    towers = encoder_layers(model)
    layers = [layer for tower in towers for layer in tower]
    _check_fsdp(layers, args)
    if args.world_size == 1:
        return
    setattr(model, WHOLE_FINGERPRINT, model_fingerprint(model))  # one process alone asks for it
    mesh = init_device_mesh(args.device.type, (args.world_size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=_flag(RESHARD, "true"))
    share_comm_ctx(layers)
    for tower in towers:
        for before, layer in zip([tower[0], *tower[:-1]], tower, strict=True):
            # named one by one: FSDP's own order of the layers is cleared by the attack's backward pass
            layer.set_modules_to_backward_prefetch([before])
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "full_tensor")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
    logger.info("FSDP2: %d frozen layers are sharded over %d processes.", len(layers), args.world_size)


def encoder_layers(model: nn.Module) -> list[list[Any]]:
    """Returns the encoder layers of each tower, without what an adapter puts around them."""
    lists = [module for name, module in model.named_modules() if name.endswith("encoder.layers")]
    return [[getattr(layer, "base_layer", layer) for layer in layers.children()] for layers in lists]


@contextmanager
def accelerate_shards_nothing() -> Iterator[None]:
    """Within it, an `Accelerator` is made as if FSDP had not been asked for: `shard_if_asked` has done it.

    Accelerate 1.15 cannot shard a CLIP: it calls `get_input_embeddings`, which a CLIPModel refuses, and then `fully_shard` on the
    scalar `logit_scale`. On CPUs it leaves FSDP out without a word.
    """
    before = os.environ.get(FSDP)
    if before is not None:
        os.environ[FSDP] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ[FSDP] = before


def prepare_deepspeed(model: nn.Module, accelerator: Accelerator) -> None:
    """Refuses what DeepSpeed cannot do here, and lets it take a CLIP.

    Args:
        model: The model.
        accelerator: Knows what was asked for.

    Raises:
        ValueError: ZeRO-3, mixed precision, or DeepSpeed without a GPU.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        if _flag(DEEPSPEED):
            raise ValueError(
                "DeepSpeed was asked for on a CPU, where Accelerate would leave it out without a word. Use torchrun instead."
            )
        return
    if plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed's ZeRO-3 shards all parameters and gathers them in the model's own forward, but a step calls the image "
            "tower alone. Use examples/accelerate/fsdp2.yaml, which shards the frozen layers, or zero_stage 2."
        )
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"mixed_precision={accelerator.mixed_precision}: DeepSpeed casts the model itself, and the attack's pixel gradients "
            f"vanish in less than float32. {PLAIN}."
        )
    for parameter in model.parameters():
        if parameter.ndim == 0:
            # DeepSpeed 0.19 broadcasts parameters as bytes, and a scalar (`logit_scale`) has no such view; this mark leaves it
            # out, and all processes have loaded the same
            parameter.ds_optim_param = True  # type: ignore[attr-defined]


def is_sharded(model: nn.Module) -> bool:
    """Returns whether `shard_if_asked` has sharded layers of the model."""
    return hasattr(model, WHOLE_FINGERPRINT)


@contextmanager
def ready_to_evaluate(trainer: Any) -> Iterator[None]:
    """Within it, a `CaptTrainer` can evaluate.

    How often an attack runs the model depends on the images, and processes that gather sharded layers at different times would
    wait for each other forever: the layers are whole meanwhile, on every process. And transformers refuses to evaluate under
    DeepSpeed before it has trained, although nothing of DeepSpeed is needed for it.
    """
    asked = trainer.is_deepspeed_enabled
    trainer.is_deepspeed_enabled = asked and getattr(trainer, "deepspeed", None) is not None
    layers = [module for module in trainer.classifier.model.modules() if isinstance(module, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.set_reshard_after_backward(False)
        layer.unshard()
    try:
        yield
    finally:
        trainer.is_deepspeed_enabled = asked
        for layer in layers:
            layer.set_reshard_after_forward(_flag(RESHARD, "true"))
            layer.set_reshard_after_backward(True)
            layer.reshard()


def _check_fsdp(layers: list[Any], args: TrainingArguments) -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "FSDP 1 does not work with capt_peft. Set fsdp_version: 2, as in examples/accelerate/fsdp2.yaml."
        )
    for name in ("FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"):
        if _flag(name):
            raise ValueError(
                f"{name.lower()}: true does not work with capt_peft, which shards the frozen layers itself. Set it to false, as "
                "in examples/accelerate/fsdp2.yaml."
            )
    if any(p.requires_grad for layer in layers for p in layer.parameters()):
        raise ValueError(f"FSDP shards frozen layers here, but the encoder layers of this model are tuned. {PLAIN}.")
    for name in ("torch_compile", "image_chunk_size"):
        if getattr(args, name, None):
            raise ValueError(f"{name} does not work with sharded layers. Leave it out, or: {PLAIN}.")


def _flag(name: str, default: str = "false") -> bool:
    return os.environ.get(name, default).lower() in ("true", "1")
