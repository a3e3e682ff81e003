"""Randomness by example: what is drawn for an image depends on the seed, the epoch and the image, and on nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

STREAMS = {"attack": 0, "augmentation": 1, "evaluation": 2}
_MODEL = 3  # what random models draw


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


@contextmanager
def own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Within it, the global random numbers follow from a seed; afterwards they go on as if nothing had been drawn.

    Args:
        seed: A seed of 0 or more, of PyTorch, NumPy and Python alike.
        device: The device whose numbers are meant beside those of the CPU.
    """
    own = int(np.random.SeedSequence([seed, _MODEL]).generate_state(1)[0])
    states = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            random.seed(own)
            np.random.seed(own)
            torch.default_generator.manual_seed(own)
            for each in devices:
                torch.cuda.default_generators[
                    torch.cuda.current_device() if each.index is None else each.index
                ].manual_seed(own)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
