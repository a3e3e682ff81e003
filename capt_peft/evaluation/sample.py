"""What a model answers on a few images: by it, results of one model are told from those of another of the same name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attacks import LogitsFn
from ..randomness import own_random_state
from ..results.earlier import RANDOM, TOLERANCE, logit_distance
from .images import Examples
from .subject import Subject

SAMPLED = 16  # images
KEPT = 32  # numbers per image


def spread(values: Sequence[int], count: int) -> list[int]:
    """Returns `count` of the values, or all there are, at even distances."""
    places = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[place] for place in places.tolist()]


def sample_logits(subject: Subject, examples: Examples, batch_size: int) -> tuple[dict[str, Any], int]:
    """Runs the model on a few images, always the same and in the same batches.

    Args:
        subject: What is measured.
        examples: The images.
        batch_size: Images at a time, at most.

    Returns:
        For the record, the images' places and the logits on them: of what decides (`scored`), and of what attacks see where that
        is another function (`attacked`). In place of logits that differ from call to call stands "random"; more than 32 logits
        of an image are projected to 32 numbers. And the number of classes.
    """
    places = spread(range(len(examples)), SAMPLED)
    size = min(batch_size, SAMPLED)
    batches = [
        examples.batch(places[i : i + size], subject.device)[0] for i in range(0, len(places), size)
    ]  # each (b, 3, H, W)
    scored = _logits(subject.scored, batches, subject.device)
    record: dict[str, Any] = {"images": places, "scored": _numbers(scored)}
    if subject.attacked_is_other:
        record["attacked"] = _numbers(_logits(subject.attacked, batches, subject.device))
    return record, scored[0].shape[1]


def _logits(function: LogitsFn, batches: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Returns the logits (16, N) of two runs, with the same global random numbers in each."""
    runs = []
    for _ in range(2):
        with torch.no_grad(), own_random_state(0, device):
            runs.append(torch.cat([function(pixels).double().cpu() for pixels in batches]))
    return runs


def _numbers(runs: list[Tensor]) -> str | list[list[float]]:
    first, again = map(_projected, runs)
    if logit_distance(first, again) > TOLERANCE / 2:
        return RANDOM
    return [[float(f"{value:.7g}") for value in row] for row in first.tolist()]


def _projected(logits: Tensor) -> Tensor:
    """Returns at most 32 numbers per row in place of many logits: sums with random signs."""
    width = logits.shape[1]
    if width <= KEPT:
        return logits
    logits = logits.sign() * logits.abs().log1p()  # or a masked class, at -1e9, would drown all others
    signs = torch.randint(0, 2, (width, KEPT), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    return logits @ signs / width**0.5
