"""Randomness by example: what is drawn for an image depends on the seed, the epoch and the image, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

STREAMS = {"attack": 0, "augmentation": 1, "evaluation": 2}


def example_generator(seed: int, index: int, *, epoch: int = 0, stream: str = "attack") -> torch.Generator:
    """Returns a generator of its own for one example, so that no batch split, rank or worker changes what it draws.

    Args:
        seed: Seed of the run, 0 or more.
        index: Place of the example in its dataset.
        epoch: Epoch of the training.
        stream: What is drawn: "attack", "augmentation" or "evaluation"; the streams are independent of each other.
    """
    state = np.random.SeedSequence([seed, STREAMS[stream], epoch, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) & (2**63 - 1))


def example_generators(
    seed: int, indices: Sequence[int], *, epoch: int = 0, stream: str = "attack"
) -> list[torch.Generator]:
    """Returns one `example_generator` an index, in their order."""
    return [example_generator(seed, int(index), epoch=epoch, stream=stream) for index in indices]
