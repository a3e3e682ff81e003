"""What several processes must agree on: that they are one run, which images a step has, and whether it went wrong."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor

logger = logging.getLogger(__name__)

COUNTED = "counted"  # key of a batch: how many of its images the loss is of

SHARDING_ARGUMENTS = ("fsdp", "fsdp_config", "deepspeed", "parallelism_config")
SHARDING_ENVIRONMENT = (
    "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG",
)  # fmt: skip
SHARDING_PLUGINS = ("fsdp_plugin", "deepspeed_plugins", "megatron_lm_plugin", "torch_tp_plugin", "parallelism_config")


def refuse_sharding(args: Any) -> None:
    """Raises if parameters are to be sharded over processes: a step calls a CLIP's towers alone, past its own `forward`.

    Args:
        args: `TrainingArguments`, which need not be set up yet.

    Raises:
        ValueError: FSDP, DeepSpeed or another such plugin is set in the arguments, the environment or Accelerate's state.
    """
    state = AcceleratorState._shared_state
    found = [
        *(name for name in SHARDING_ARGUMENTS if getattr(args, name, None)),
        *(name for name in SHARDING_ENVIRONMENT if os.environ.get(name, "").lower() in ("true", "1", "yes", "on")),
        *(f"Accelerate's {name}" for name in SHARDING_PLUGINS if state.get(name)),
    ]
    if found:
        raise ValueError(
            f"{found[0]} is set, but CaptTrainer does not shard parameters (FSDP, DeepSpeed and the like): leave it out, and run "
            "several processes with plain data parallelism, examples/accelerate/ddp_gpus.yaml."
        )


def check_processes(args: Any) -> None:
    """Raises where the processes that were launched could not train as one run; leaves a single process one GPU.

    Args:
        args: `TrainingArguments`.

    Raises:
        ValueError: As of `refuse_sharding`, or processes that do not know of each other.
    """
    refuse_sharding(args)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"{launched} processes were launched, but each would train for itself: there is no GPU, and use_cpu is off. Give "
            "--use_cpu, or launch one process."
        )
    if args.n_gpu > 1:
        # the Trainer would split the class texts over the GPUs of one process (torch's DataParallel)
        logger.warning(
            "One process uses one GPU, the first of %d. Start a process for each: accelerate launch --config_file "
            "examples/accelerate/ddp_gpus.yaml --num_processes %d ...", args.n_gpu, args.n_gpu,
        )  # fmt: skip
        args._n_gpu = 1


def without_repeats(batch: dict[str, Any], accelerator: Accelerator, images: int) -> dict[str, Any]:
    """Returns this process's last batch of an epoch without the images that an earlier batch had.

    Accelerate fills the last batches up with the epoch's first images, so that all processes have equally many of equal size;
    to train on these twice would be another run than that of one process. A process whose batch has no other images keeps one
    of them, so that it takes part in the reduction of the gradients, and counts it as none.

    Args:
        batch: Tensors of B images each.
        accelerator: Knows the processes.
        images: Number of images in an epoch.
    """
    size = len(batch["labels"])
    remainder = images % (size * accelerator.num_processes) or size * accelerator.num_processes
    own = min(max(remainder - size * accelerator.process_index, 0), size)
    return {name: rows[: max(own, 1)] for name, rows in batch.items()} | {COUNTED: own}


def failures(failed: bool, words: str, accelerator: Accelerator, device: torch.device) -> list[str]:
    """Returns what the processes in which something failed say of it; every process gets the same.

    A process that raised alone would leave the others waiting for its gradients.

    Args:
        failed: Whether it failed here.
        words: What is to be said of it.
        accelerator: Knows the processes.
        device: Where the flag is reduced.
    """
    if accelerator.num_processes == 1:
        return [words] if failed else []
    total: Tensor = accelerator.reduce(torch.tensor(float(failed), device=device), "sum")
    if not total.item():
        return []
    own = [f"{words}, on rank {accelerator.process_index} of {accelerator.num_processes}"] if failed else []
    said: list[str] = gather_object(own)
    return said
