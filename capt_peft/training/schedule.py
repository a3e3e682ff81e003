"""The learning rate as CoOp's toolbox changes it: at the ends of epochs only."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

logger = logging.getLogger(__name__)

LR_SCHEDULES = ("step", "epoch")
WARMUP_RATE = 1e-5  # of the whole first epoch


def epoch_cosine(optimizer: Optimizer, steps_an_epoch: int, epochs: int) -> LambdaLR:
    """Returns the schedule of CoOp, MaPLe, FAP and APT: one epoch at 1e-5, then a cosine that changes once an epoch.

    Epoch e, counted from 0, has 1e-5 for e = 0 and `learning_rate * (1 + cos(pi * (e - 1) / epochs)) / 2` after it.

    Args:
        optimizer: The optimizer, with its learning rates.
        steps_an_epoch: Optimizer steps of an epoch.
        epochs: Epochs of the run.
    """
    if epochs <= 1:
        logger.warning(
            "lr_schedule='epoch' keeps the first epoch at a learning rate of %g, and this run has no second one: it learns next "
            "to nothing. Give it more epochs, or lr_schedule='step'.",
            WARMUP_RATE,
        )

    def share(rate: float) -> Callable[[int], float]:
        def at(step: int) -> float:
            epoch = step // steps_an_epoch
            if epoch < 1:
                return WARMUP_RATE / rate if rate else 0.0
            return (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2

        return at

    return LambdaLR(optimizer, [share(group["lr"]) for group in optimizer.param_groups])
