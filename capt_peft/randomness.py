"""Random numbers image by image: what is drawn for one depends on the seed, the epoch and its place, and on nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .utils.text import shown

Generators = torch.Generator | Sequence[torch.Generator]
Seeds = int | Generators | None

MAX_SEED = 2**32 - 1  # the largest that numpy's global generator takes, and so transformers' set_seed
STREAMS = {"attack": 0, "augmentation": 1, "evaluation": 2}
_MODEL = 3  # what random models draw


def check_seed(seed: object, name: str = "seed") -> None:
    """Raises a ValueError unless a run's `seed`, which its caller knows by `name`, is a whole number from 0 to `MAX_SEED`."""
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"{name}={shown(seed, 40)} must be a whole number from 0 to {MAX_SEED}.")


def example_generator(
    seed: int, index: int, *, epoch: int = 0, stream: str = "attack", device: torch.device | str = "cpu"
) -> torch.Generator:
    """Returns a generator of its own for one example, so that no batch split, rank or worker changes what it draws.

    Args:
        seed: Seed of the run, 0 or more.
        index: Place of the example in its dataset.
        epoch: Epoch of the training.
        stream: What is drawn: "attack", "augmentation" or "evaluation"; the streams are independent of each other.
        device: Where it draws: that of the image. The same seed gives other numbers on another kind of device.
    """
    state = np.random.SeedSequence([seed, STREAMS[stream], epoch, index]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) & (2**63 - 1))


def example_generators(
    seed: int, indices: Sequence[int], *, epoch: int = 0, stream: str = "attack", device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """Returns one `example_generator` per index, in their order."""
    return [example_generator(seed, int(index), epoch=epoch, stream=stream, device=device) for index in indices]


def resolve_generator(generator: Seeds, batch: int, device: torch.device) -> Generators:
    """Returns the generators that a caller's source of random numbers stands for.

    Args:
        generator: a seed of 0 or more: row i then draws from a generator of its own, by the seed and i. None is seed 0. Or one
            generator for each image, which an evaluation makes from their places in the dataset
            (`example_generators`), or a single one for the batch.
        batch: number of images.
        device: where the images are; a seed's generators draw there, and those that are given where they were made.

    Raises:
        TypeError: `generator` is none of these.
        ValueError: a negative seed, or a sequence that does not hold one generator for each image.
    """
    if generator is None:
        generator = 0
    if isinstance(generator, int) and not isinstance(generator, bool):
        if generator < 0:
            raise ValueError(f"generator={generator} is negative: a seed must be 0 or more")
        return example_generators(generator, range(batch), device=device)
    if isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, Sequence) or not all(isinstance(each, torch.Generator) for each in generator):
        raise TypeError(
            "generator must be a seed, a torch.Generator, a sequence of them (one for each image) or None, got "
            f"{generator!r}"
        )
    if len(generator) != batch:
        raise ValueError(
            f"{len(generator)} generators were given for {batch} images: give one for each image, or a single one"
        )
    return generator


def select_generators(generator: Generators, index: Tensor) -> Generators:
    """Returns the generators of the rows in `index` (K,) int64; a single generator serves any rows."""
    return generator if isinstance(generator, torch.Generator) else [generator[row] for row in index.tolist()]


def draw(sample: Callable[..., Tensor], shape: Sequence[int], generator: Generators) -> Tensor:
    """Draws float32 noise on the generator's device, row i from generator i where there is one for each row.

    Args:
        sample: `torch.rand`, `torch.randn` or another sampler with their arguments.
        shape: (B, ...).
        generator: what `resolve_generator` returned.
    """
    if isinstance(generator, torch.Generator):
        return sample(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)
    rows = [sample(tuple(shape[1:]), generator=g, device=g.device, dtype=torch.float32) for g in generator]
    return torch.stack(rows)


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
