"""In which precision a model computes, whatever it does inside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..attacks import LogitsFn

_HALVES = (torch.bfloat16, torch.float16)
_MOVING = {"aten::clone", "aten::copy_", "aten::_to_copy", "aten::detach", "aten::lift_fresh", "aten::alias"}
_FEW = 16  # numbers that may have few digits by chance


class WatchedPrecision(TorchDispatchMode):
    """Within it, the types of all numbers that PyTorch computes are noted: of autocast, of casts inside, of a backward too.

    Attributes:
        dtypes: The floating types of what was computed.
        computed: Whether anything was computed, and not only copied.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.computed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and notes the types of its results."""
        result = func(*args, **(kwargs or {}))
        self.dtypes |= {
            leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        }
        self.computed |= func._schema.name not in _MOVING and not func.is_view
        return result


def precision_of(logits_fn: LogitsFn, pixels: Tensor, *, backward: bool = False) -> str | None:
    """Returns the lowest precision in which a model computes its logits.

    Args:
        logits_fn: The model.
        pixels: (B, 3, H, W) in [0, 1].
        backward: Look at the gradient at the pixels too.

    Returns:
        "float32", "bfloat16", ..., or None if it computes out of sight, as in NumPy, and its logits tell nothing.
    """
    with WatchedPrecision() as watched, torch.set_grad_enabled(backward):
        images = pixels.clone().requires_grad_(backward)
        logits = logits_fn(images)
        computed = watched.computed
        if backward and logits.grad_fn is not None:
            torch.autograd.grad(logits.sum(), images, allow_unused=True)
    if any(torch.finfo(dtype).bits < 32 for dtype in watched.dtypes):
        return lowest(watched.dtypes)
    if computed:
        return "float32"
    values = logits.detach().float().unique()
    fractions = values[values != values.round()]
    if len(fractions) < _FEW:
        return None
    return next((name_of(half) for half in _HALVES if torch.equal(fractions, fractions.to(half).float())), None)


def lowest(dtypes: Iterable[torch.dtype]) -> str:
    """Returns the name of the type of the fewest bits, "float32" where none has fewer."""
    least = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float32)
    return "float32" if torch.finfo(least).bits >= 32 else name_of(least)


def name_of(dtype: torch.dtype) -> str:
    """Returns "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
