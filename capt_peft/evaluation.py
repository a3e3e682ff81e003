"""Clean and robust accuracy, with how sure one can be of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .attacks import Attack
from .classifier import ZeroShotClassifier
from .data.pixels import PixelDataset
from .randomness import example_generators


@dataclass(frozen=True)
class Accuracy:
    """A share of n images, with its 95% Wilson interval.

    Args:
        correct: How many of the images.
        n: How many images.
    """

    correct: int
    n: int

    @property
    def value(self) -> float:
        """The accuracy, in [0, 1]."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson score interval (Wilson 1927), in [0, 1]."""
        return wilson_interval(self.correct, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f}% ({100 * low:.1f} to {100 * high:.1f}, n={self.n})"

    def to_dict(self) -> dict[str, Any]:
        """Returns accuracy, number of images and interval, for results."""
        return {"accuracy": self.value, "correct": self.correct, "n": self.n, "interval_95": list(self.interval)}


@dataclass(frozen=True)
class Evaluation:
    """Clean and robust accuracy on the same images.

    An image counts as robust if the classifier is right on it and on its attacked twin, so that robust never exceeds clean.
    """

    clean: Accuracy
    robust: Accuracy
    attack: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns both accuracies and the attack, for results."""
        return {"clean": self.clean.to_dict(), "robust": self.robust.to_dict(), "attack": self.attack}


def wilson_interval(correct: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Returns the Wilson score interval of a share.

    Args:
        correct: Number of successes, 0 to n.
        n: Number of trials, at least 1.
        z: Quantile of the normal distribution; the default gives 95%.

    Raises:
        ValueError: `correct` or `n` out of range.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} of {n} is no share: n must be at least 1 and the count between 0 and n.")
    p, square = correct / n, z * z / n
    centre = (p + square / 2) / (1 + square)
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n)) / (1 + square)
    # exact at the ends, where the formula leaves a rounding error
    return 0.0 if correct == 0 else centre - half, 1.0 if correct == n else centre + half


def outcomes(
    classifier: ZeroShotClassifier, attack: Attack, pixels: Tensor, labels: Tensor, indices: list[int], seed: int
) -> tuple[Tensor, Tensor]:
    """Attacks a batch and returns what the classifier says.

    Args:
        classifier: In eval mode.
        attack: The attack; each image has random numbers of its own, by `seed` and place.
        pixels: (B, 3, H, W) in [0, 1].
        labels: (B,) class indices.
        indices: The B places of the images in their dataset.
        seed: Seed of the attack.

    Returns:
        The predicted classes (B,) of the clean and of the adversarial images.
    """
    adversarial = attack(classifier, pixels, labels, example_generators(seed, indices, stream="evaluation"))
    with torch.no_grad():
        return classifier(pixels).argmax(-1), classifier(adversarial).argmax(-1)


def evaluate(
    classifier: ZeroShotClassifier,
    dataset: datasets.Dataset,
    attack: Attack,
    *,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Measures clean and robust accuracy, white box through the prompts, in one process.

    Args:
        classifier: The classifier; evaluated in eval mode and given back in the mode it had.
        dataset: A split of a task: columns `image` and `label`.
        attack: The attack that robust accuracy is measured under.
        batch_size: Images a batch; it does not change the result.
        seed: Seed of the attack.
        progress: Show a progress bar.

    Raises:
        ValueError: An empty dataset.
    """
    if not len(dataset):
        raise ValueError("There are no images to evaluate on: the dataset is empty.")
    device = classifier.mean.device
    loader = DataLoader(PixelDataset(dataset, classifier.transform), batch_size=batch_size)
    was_training = classifier.training
    classifier.eval()
    clean = robust = 0
    try:
        for batch in tqdm(loader, desc=f"{attack.name}, {attack.threat_model}", disable=not progress):
            pixels, labels = batch["pixels"].to(device), batch["labels"].to(device)
            predicted, attacked = outcomes(classifier, attack, pixels, labels, batch["index"].tolist(), seed)
            clean += int((predicted == labels).sum())
            robust += int(((predicted == labels) & (attacked == labels)).sum())
    finally:
        classifier.train(was_training)
    return Evaluation(Accuracy(clean, len(dataset)), Accuracy(robust, len(dataset)), attack.to_dict() | {"seed": seed})
