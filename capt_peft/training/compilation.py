"""torch.compile for the towers: each as one graph, compiled in the first step and never again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn

from ..tuner.clip import tower_modules


def leave_compiling_to_us(accelerator: Accelerator) -> None:
    """Stops Accelerate from compiling the whole model: the attack and the adversarial pass do not go through its `forward`."""
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")


@contextmanager
def compiled_towers(clip: nn.Module, *, backend: str | None, mode: str | None) -> Iterator[None]:
    """Within it, the towers of a CLIP are compiled for the shapes that they are given, however they are called.

    Args:
        clip: The base model, with its adapters.
        backend: As of `torch.compile`; by default "inductor".
        mode: As of `torch.compile`.
    """
    towers: list[Any] = tower_modules(clip)
    for tower in towers:
        tower.forward = torch.compile(tower.forward, backend=backend or "inductor", mode=mode, dynamic=False)
    try:
        yield
    finally:
        for tower in towers:
            del tower.forward  # the class's own is behind it


def fill_batch(values: Tensor, size: int) -> Tensor:
    """Adds black images to a batch (b, 3, H, W) that has fewer than `size`, so that its shape is always the same."""
    missing = size - len(values)
    return F.pad(values, (0, 0, 0, 0, 0, 0, 0, missing)) if missing > 0 else values
