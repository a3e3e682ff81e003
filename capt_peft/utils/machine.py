"""What results are computed on: the device and how it is used, and versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

PACKAGES = ("capt-peft", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy", "pillow")


def versions(*more: str) -> dict[str, str]:
    """Returns the versions that decide a result, of Python and packages, and those of more packages."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_machine() -> str:
    """Returns what the run was computed on, without naming the machine."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def use_tf32(enabled: bool) -> None:
    """Rounds float32 products and convolutions on CUDA GPUs to TF32, or not, from now on."""
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "tf32" if enabled else "ieee"
    else:  # before torch 2.9
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled


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
