"""A batch in parts, of which only one at a time keeps its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
    total, gradients = texts.new_zeros(()), [torch.zeros_like(tensor) for tensor in (leaf, *parameters)]
    for loss in losses(leaf):
        total += loss.detach()
        for known, new in zip(
            gradients, torch.autograd.grad(loss, (leaf, *parameters), allow_unused=True), strict=True
        ):
            if new is not None:
                known += new
    result: Tensor = _KnownGradients.apply(total, gradients, texts, *parameters)
    return result
