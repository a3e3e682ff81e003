"""The device that something is computed on: copies to it for which nobody waits."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device; a copy to a GPU does not wait until the GPU has done what it was given before.

    A copy to the CPU has to wait, and on MPS a copy that does not may read what has changed by then.
    """
    return tensor.to(device, non_blocking=device.type not in ("cpu", "mps"))
