"""What stands between an attack and a model: neither can change the other's tensors, and the model comes back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..randomness import own_random_state
from ..utils.modules import buffers_kept, modules_in
from .noise import Generators
from .threat import LogitsFn


class Guarded:
    """A model whose caller may go on using both what it hands in and what it gets back.

    The model gets a copy of the images, within the graph, so that gradients still arrive at the caller's own; it may write to it
    by whatever way. The caller gets a copy of the logits, which a later call cannot overwrite. Logits that are not (B, N) finite
    floats are refused.

    Args:
        logits_fn: images (B, 3, H, W) -> logits (B, N).
    """

    def __init__(self, logits_fn: LogitsFn) -> None:
        self.logits_fn = logits_fn

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (B, N), with a history if the images' own and the model have one."""
        logits = check_logits(self.logits_fn(images.clone()), len(images))
        # a view taken under no_grad claims requires_grad and has no history
        return logits.clone() if logits.grad_fn is not None else logits.detach().clone()


def guarded(logits_fn: LogitsFn) -> LogitsFn:
    """Return the model with a guard around it, unless it has one."""
    return logits_fn if isinstance(logits_fn, Guarded) else Guarded(logits_fn)


def check_logits(logits: Tensor, batch: int) -> Tensor:
    """Refuse logits that are not (`batch`, N) finite floats with N >= 2; return them.

    Raises:
        TypeError: not a floating tensor.
        ValueError: wrong shape, or values that are not finite.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"the model returned {kind}: logits must be a floating tensor ({batch}, N)")
    if logits.ndim != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
        raise ValueError(
            f"the model returned shape {tuple(logits.shape)} for {batch} images: logits must be ({batch}, N) "
            "with N >= 2 classes"
        )
    if not logits.isfinite().all():
        raise ValueError("the model returned logits that are not finite: check its weights and its precision")
    return logits


@contextmanager
def undisturbed(logits_fn: LogitsFn, generator: Generators, device: torch.device) -> Iterator[LogitsFn]:
    """Give a model as an attack runs it: guarded, with random numbers of its own, and as it was afterwards.

    Afterwards the buffers of its modules and the global random state are as before. What a random model draws within depends on
    the attack's seed alone.

    Args:
        logits_fn: images (B, 3, H, W) -> logits (B, N).
        generator: the attack's source of random numbers.
        device: where the images are.
    """
    first = generator if isinstance(generator, torch.Generator) else generator[0]
    with buffers_kept(modules_in(logits_fn)), own_random_state(first.initial_seed(), device):
        yield guarded(logits_fn)
