"""What a training run is watched for: the means between two log lines, losses that are not finite, and collapse."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..objectives import Views


class TrainingStopped(RuntimeError):
    """Training went wrong beyond repair: a loss that is not finite, or a model that has become constant."""


class Monitor:
    """Gathers what the steps between two log lines saw.

    Args:
        num_classes: Number of classes, N; guessing has a cross-entropy of log N.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        self._largest_consistency = 0.0

    def remember(self, history: Iterable[Mapping[str, Any]]) -> None:
        """Takes up what the run had logged before it was killed.

        Args:
            history: Its log lines.
        """
        seen = [line["consistency_tuned"] for line in history if "consistency_tuned" in line]
        self._largest_consistency = max(seen, default=0.0)

    @torch.no_grad()
    def record(
        self, views: Views, parts: dict[str, Tensor], zero_gradient_share: Tensor, images: int | None = None
    ) -> None:
        """Adds a batch.

        Args:
            views: What the step saw.
            parts: The parts of its loss, means over the batch.
            zero_gradient_share: (B,) share of each image's pixels whose gradient was exactly zero; NaN where none was taken.
            images: How many images the batch counts as; by default B.
        """
        count = len(views.labels) if images is None else images
        right = views.clean.argmax(-1) == views.labels
        robust = right & (views.adversarial.argmax(-1) == views.labels)
        means = parts | {
            "clean_accuracy": right.float().mean(),
            "robust_accuracy": robust.float().mean(),
            "zero_gradient_share": zero_gradient_share.nan_to_num().mean(),
        }
        for name, mean in means.items():
            self._sums[name] = self._sums[name].to(mean.device) + mean.float() * count
        self._sums["images"] = self._sums["images"].to(right.device) + count

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Returns the means over the images since the last call.

        Args:
            reduce: Sums a tensor over all processes.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = dict(zip(names, reduce(torch.stack([self._sums[name] for name in names])).tolist(), strict=True))
        self._sums.clear()
        images = totals.pop("images")
        return {name: total / images for name, total in totals.items()}

    def collapse(self, means: dict[str, float]) -> str | None:
        """Returns a sentence if the model has fallen into FAP's trivial solution: to be constant is to be consistent.

        A model whose first predictions are nearly uniform has a small consistency loss too; only its fall is a collapse.
        """
        if "consistency_tuned" not in means:
            return None
        consistency, chance = means["consistency_tuned"], math.log(self.num_classes)
        self._largest_consistency = max(self._largest_consistency, consistency)
        if consistency >= 0.001 * self._largest_consistency or means["clean_loss"] <= 0.95 * chance:
            return None
        return (
            f"the consistency loss fell from {self._largest_consistency:.1e} to {consistency:.1e}, while the clean loss is "
            f"{means['clean_loss']:.2f}, and guessing gives {chance:.2f}"
        )
