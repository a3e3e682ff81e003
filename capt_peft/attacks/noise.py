"""Where an attack's random numbers come from: one generator for each image, so that a batch split changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..randomness import example_generators

Generators = torch.Generator | Sequence[torch.Generator]
Seeds = int | Generators | None


def resolve_generator(generator: Seeds, batch: int) -> Generators:
    """Turn what a caller gave as the source of an attack's noise into generators.

    Args:
        generator: a seed of 0 or more: row i then draws from a generator of its own, by the seed and i. None is seed 0. Or one
            generator for each image, which an evaluation makes from their places in the dataset
            (`capt_peft.randomness.example_generators`), or a single one for the batch.
        batch: number of images.

    Raises:
        TypeError: `generator` is none of these.
        ValueError: a negative seed, or a sequence that does not hold one generator for each image.
    """
    if generator is None:
        generator = 0
    if isinstance(generator, int) and not isinstance(generator, bool):
        if generator < 0:
            raise ValueError(f"generator={generator} is negative: a seed must be 0 or more")
        return example_generators(generator, range(batch))
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
    """Return the generators of the rows in `index` (K,) int64; a single generator serves any rows."""
    return generator if isinstance(generator, torch.Generator) else [generator[row] for row in index.tolist()]


def draw(sample: Callable[..., Tensor], shape: Sequence[int], generator: Generators) -> Tensor:
    """Draw float32 noise on the generator's device, row i from generator i where there is one for each row.

    Args:
        sample: `torch.rand`, `torch.randn` or another sampler with their arguments.
        shape: (B, ...).
        generator: what `resolve_generator` returned.
    """
    if isinstance(generator, torch.Generator):
        return sample(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)
    rows = [sample(tuple(shape[1:]), generator=g, device=g.device, dtype=torch.float32) for g in generator]
    return torch.stack(rows)
