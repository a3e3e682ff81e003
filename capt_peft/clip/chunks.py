"""The class texts in parts: run one after the other, so that memory does not grow with the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WHOLE = 256  # up to so many texts run at once, unless a size is given
SIZE = 64  # texts of a part, above that


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
    """The class texts in parts of equal size.

    Attributes:
        parts: The parts, shortest texts first.
        places: (N,) where each text's features stand in those of all parts, one after the other.
    """

    parts: list[TextPart]
    places: Tensor

    def join(self, features: Sequence[Tensor]) -> Tensor:
        """Returns the (N, D) features of all texts, in their order, from those of the parts."""
        joined = torch.cat(list(features))  # (n, D)
        return joined[self.places.to(joined.device)]


def split_texts(inputs: dict[str, Tensor], size: int | None, *, cut: bool = True) -> TextParts | None:
    """Splits class texts into parts of equal size, each cut at the end of its longest text.

    The texts are sorted by length first, which saves what short ones would be padded with. To make the parts equal, some texts
    may appear twice; the second time counts for nothing.

    Args:
        inputs: `input_ids` and perhaps `attention_mask`, (N, L).
        size: Texts of a part; None: all at once up to 256, 64 above that.
        cut: False leaves all parts at the length L, for code that is compiled for one shape.

    Returns:
        The parts; None if one part holds all.
    """
    count = len(inputs["input_ids"])
    if count <= (size or WHOLE):
        return None
    pieces = -(-count // (size or SIZE))
    size = -(-count // pieces)
    lengths = inputs["attention_mask"].sum(1) if "attention_mask" in inputs else torch.zeros(count)
    order = lengths.argsort(stable=True)
    order = torch.cat([order, order[-1:].expand(pieces * size - count)])
    places = torch.from_numpy(np.unique(order.numpy(), return_index=True)[1])  # the first time each appears
    parts = []
    for rows in order.view(pieces, size):
        longest = int(lengths[rows].max()) if cut else 0
        parts.append(TextPart(rows, {name: ids[rows, : longest or None] for name, ids in inputs.items()}))
    return TextParts(parts, places)
