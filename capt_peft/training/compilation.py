"""torch.compile for the towers: each as one graph, compiled in the first step and never again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainingArguments

from ..tuner.clip import tower_modules


@contextmanager
def compiled_towers(clip: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Within it, the towers of a CLIP are compiled, where the arguments ask for it, for the shapes that they are given."""
    towers: list[Any] = tower_modules(clip) if args.torch_compile else []
    backend, mode = args.torch_compile_backend or "inductor", args.torch_compile_mode
    for tower in towers:
        tower.forward = torch.compile(tower.forward, backend=backend, mode=mode, dynamic=False)
    try:
        yield
    finally:
        for tower in towers:
            del tower.forward  # the class's own is behind it


def fill_batch(values: Tensor, size: int) -> Tensor:
    """Adds black images to a batch (b, 3, H, W) that has fewer than `size`, so that its shape is always the same."""
    missing = size - len(values)
    return F.pad(values, (0, 0, 0, 0, 0, 0, 0, missing)) if missing > 0 else values
