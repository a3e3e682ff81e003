"""The class texts in parts: run one after the other, so that memory does not grow with the classes, and shared by processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

WHOLE = 256  # up to so many texts run at once, unless a size is given
SIZE = 64  # texts of a part, above that
SHARED_ABOVE = 1000  # from more classes on, each process runs its share of the texts only


@dataclass(frozen=True)
class TextPart:
    """Some of the class texts.

    Attributes:
        rows: (n,) their places among the N texts.
        inputs: `input_ids` and `attention_mask`, (n, l) with l the length of the longest of them.
    """

    rows: Tensor
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class TextParts:
    """The class texts of this process, in parts of equal size.

    Attributes:
        parts: The parts, shortest texts first.
        places: (N,) where each text's features stand in those of all parts, of all processes one after the other.
        processes: Number of processes that share the texts; 1 where each runs all of them.
    """

    parts: list[TextPart]
    places: Tensor
    processes: int = 1

    def join(self, features: Sequence[Tensor]) -> Tensor:
        """Returns the (N, D) features of all texts, in their order, from those of this process's parts."""
        joined = torch.cat(list(features))  # (n, D)
        if self.processes > 1:
            joined = gather(joined)
        return joined[self.places.to(joined.device)]


def split_texts(
    inputs: dict[str, Tensor], size: int | None, *, rank: int = 0, processes: int = 1, cut: bool = True
) -> TextParts | None:
    """Splits class texts into parts of equal size, each cut at the end of its longest text.

    The texts are sorted by length first, which saves what short ones would be padded with. To make the parts equal, some texts
    may appear twice; the second time counts for nothing.

    Args:
        inputs: `input_ids` and perhaps `attention_mask`, (N, L).
        size: Texts of a part; None: all at once up to 256, 64 above that.
        rank: Which process this is.
        processes: Number of processes that share the texts.
        cut: False leaves all parts at the length L, for code that is compiled for one shape.

    Returns:
        The parts of this process; None if one part holds all.
    """
    count = len(inputs["input_ids"])
    share = -(-count // processes)  # texts of a process, rounded up
    pieces = 1 if share <= (size or WHOLE) else -(-share // (size or SIZE))
    if processes == pieces == 1:
        return None
    size = -(-share // pieces)
    lengths = inputs["attention_mask"].sum(1) if "attention_mask" in inputs else torch.zeros(count)
    order = lengths.argsort(stable=True)
    order = torch.cat([order, order[-1:].expand(processes * pieces * size - count)])
    shares = order.view(-1, processes).T.reshape(processes, pieces, size)  # every process gets short and long ones
    places = torch.from_numpy(np.unique(shares.flatten().numpy(), return_index=True)[1])  # the first time each appears
    parts = []
    for rows in shares[rank]:
        longest = int(lengths[rows].max()) if cut else 0
        parts.append(TextPart(rows, {name: ids[rows, : longest or None] for name, ids in inputs.items()}))
    return TextParts(parts, places, processes)


class _Gather(torch.autograd.Function):
    """All processes' features one after the other; the gradient of one's own is summed over the processes."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        gathered = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, features.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(features: Tensor) -> Tensor:
    """Returns the features of all processes, (processes * n, D), from each one's (n, D); differentiable.

    The gradient that a process gets for its own features is the sum over all processes' losses, so that the mean over the
    processes that follows (DDP's) is right.
    """
    result: Tensor = _Gather.apply(features)
    return result
