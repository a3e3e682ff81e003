"""What a step computes at a time: no image twice in an epoch, a batch in chunks that share memory, towers that are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import TrainingArguments

from ..tuner.clip import tower_modules

COUNTED = "counted"  # key of a batch: how many of its images the loss is of


@dataclass(frozen=True)
class Batch:
    """Training images.

    Attributes:
        pixels: (b, 3, H, W) float in [0, 1].
        labels: (b,) class indices.
        indices: Their places in the training set.
        counted: How many of them the loss is of: all, or none.
    """

    pixels: Tensor
    labels: Tensor
    indices: list[int]
    counted: int


def split_batch(inputs: dict[str, Any], size: int | None) -> list[Batch]:
    """Returns a batch of the data loader as parts of `size` images; None: in one part."""
    pixels, labels, indices = inputs["pixels"], inputs["labels"], inputs["index"].tolist()
    size = size or len(labels)
    if len(labels) <= size:
        return [Batch(pixels, labels, indices, inputs.get(COUNTED, len(labels)))]
    starts = range(0, len(labels), size)
    parts = [(pixels[i : i + size], labels[i : i + size], indices[i : i + size]) for i in starts]
    return [Batch(*part, counted=len(part[1])) for part in parts]


def without_repeats(batch: dict[str, Any], accelerator: Accelerator, images: int) -> dict[str, Any]:
    """Returns this process's last batch of an epoch of `images` images without those that an earlier batch had.

    Accelerate fills the last batches up with the epoch's first images, so that all processes have equally many of equal size;
    to train on these twice would be another run than that of one process. A process whose batch has no other images keeps one
    of them, so that it takes part in the reduction of the gradients, and counts it as none.
    """
    size = len(batch["labels"])
    remainder = images % (size * accelerator.num_processes) or size * accelerator.num_processes
    own = min(max(remainder - size * accelerator.process_index, 0), size)
    return {name: rows[: max(own, 1)] for name, rows in batch.items()} | {COUNTED: own}


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients were taken before."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (None, None, *(gradient * known for known in ctx.saved_tensors))


def sum_of_losses(
    losses: Callable[[Tensor], Iterable[Tensor]], texts: Tensor, parameters: Sequence[nn.Parameter]
) -> Tensor:
    """Returns the sum of losses, of which only one at a time keeps its activations.

    The gradient of each is taken, and its graph freed, before the next one is computed; the texts' graph stays. Nothing is
    computed twice, and the result is that of a plain sum up to rounding.

    Args:
        losses: Yields the losses, given the text features.
        texts: (N, D) text features, with gradient.
        parameters: What is tuned.
    """
    leaf = texts.detach().requires_grad_()
    tensors = (leaf, *parameters)
    total, gradients = texts.new_zeros(()), [torch.zeros_like(tensor) for tensor in tensors]
    for loss in losses(leaf):
        total += loss.detach()
        for known, new in zip(gradients, torch.autograd.grad(loss, tensors, allow_unused=True), strict=True):
            if new is not None:
                known += new
    result: Tensor = _KnownGradients.apply(total, gradients, texts, *parameters)
    return result


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
