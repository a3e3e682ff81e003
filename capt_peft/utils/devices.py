"""The device that something is computed on: copies to it for which nobody waits, and float32 that is rounded there."""

from __future__ import annotations

import torch
from torch import Tensor


def tf32_in_use(device: torch.device) -> bool:
    """Tells whether products of float32 matrices on a device are rounded to TF32, by `--tf32` or torch's own switches."""
    if device.type != "cuda":
        return False
    products = torch.backends.cuda.matmul
    return bool(products.fp32_precision == "tf32" if hasattr(products, "fp32_precision") else products.allow_tf32)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device; a copy to a GPU does not wait until the GPU has done what it was given before.

    A copy to the CPU has to wait, and on MPS a copy that does not may read what has changed by then.
    """
    return tensor.to(device, non_blocking=device.type not in ("cpu", "mps"))
