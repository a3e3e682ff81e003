"""What several processes must agree on: which images a step has, and whether it went wrong."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

COUNTED = "counted"  # key of a batch: how many of its images the loss is of


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
