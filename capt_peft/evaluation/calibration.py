"""Calibration: a temperature and thresholds, fitted on images that the adapter was not tuned on."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from ..clip.calibration import base_weights, precision_of, texts_digest
from ..clip.classifier import ZeroShotClassifier
from ..tuner import Calibration, CaptConfig, adapters_in_use
from ..tuner.fingerprint import adapter_fingerprint
from ..utils.modules import eval_mode
from ..utils.text import some
from .images import Examples

LARGEST_TEMPERATURE = 100.0  # and 1 / 100 is the smallest
_HALVINGS = 60  # of the logarithm's range, down to float64's last bits

logger = logging.getLogger(__name__)


def logits_and_labels(
    classifier: ZeroShotClassifier, data: datasets.Dataset | tuple[Tensor, Tensor], batch_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Runs a classifier in eval mode on a split, or on pixels (n, 3, H, W) and labels (n,).

    Args:
        classifier: The classifier; labels are matched by the names of its classes.
        data: The images.
        batch_size: Images per forward pass.

    Returns:
        The logits (n, N) as float64, and the labels (n,) int64, both on the CPU.
    """
    examples, found = Examples(data, classifier), []
    with eval_mode(classifier), torch.no_grad():
        logits_fn = classifier.with_fixed_texts()
        for start in range(0, len(examples), batch_size):
            places = range(start, min(start + batch_size, len(examples)))
            found.append(logits_fn(examples.batch(places, classifier.device)[0]).double().cpu())
    examples.check_labels(found[0].shape[1])
    return torch.cat(found), examples.labels.cpu()


def calibrate(
    classifier: ZeroShotClassifier,
    logits: Tensor,
    labels: Tensor,
    *,
    task: str,
    split: str,
    false_rejection_rate: float = 0.05,
    false_positive_rate: float = 0.05,
    temperature: float | None = None,
) -> Calibration:
    """Fits the temperature of an adapter's scores, and the thresholds of its answers, on validation images.

    The thresholds are those of split conformal prediction (Vovk et al. 2005; Angelopoulos & Bates 2021, arXiv 2107.07511): of n
    images and a wanted rate a, the k-th smallest (or largest) number, k = floor(a (n + 1)). An image that is drawn as these were
    is on the wrong side with a probability of at most k / (n + 1), over the draw of all n + 1.

    Args:
        classifier: A classifier with one adapter acting. The calibration holds for its classes, texts, strength and
            precision, the adapter's weights and the base model's.
        logits: (n, N) of images of its classes that the adapter was not tuned on (`logits_and_labels`).
        labels: (n,) int64, their classes.
        task: Name of the task that they are of, for the record.
        split: Name of its split, for the record.
        false_rejection_rate: The share of images of the classes that the threshold for "none of these" may reject, in (0, 1).
        false_positive_rate: The share of images of other classes that the threshold of each class may let through, in (0, 1).
        temperature: Keep this one, more than 0, instead of fitting it.

    Returns:
        The calibration; `CaptConfig.calibration` takes its `to_dict()`.

    Raises:
        ValueError: No adapter acts, or several; weights that are not there (meta device); a rate that so few images cannot
            resolve; or images that leave the temperature open, such as when all of them are classified correctly.
    """
    in_use = adapters_in_use(classifier.model)
    config: Any = classifier.model.peft_config[in_use[0]] if len(in_use) == 1 else None
    if not isinstance(config, CaptConfig):
        raise ValueError(
            f"One CAPT adapter is calibrated, and {len(in_use)} adapters act here: {some(in_use) or 'none'}."
        )
    base = base_weights(classifier.model)
    if base is None:
        raise ValueError("Weights of the base model are on the meta device. Load all of it onto one device.")
    absent = [name for i, name in enumerate(classifier.class_names) if not (labels == i).any()]
    if absent:
        logger.warning("The calibration has seen no images of %s.", some(absent, 5, quote=True))
    return Calibration(
        temperature=fit_temperature(logits, labels) if temperature is None else float(temperature),
        threshold=rejection_threshold(logits, false_rejection_rate),
        false_rejection_rate=false_rejection_rate,
        class_thresholds=class_thresholds(logits, labels, false_positive_rate, classifier.class_names),
        false_positive_rate=false_positive_rate,
        images=len(labels),
        task=task,
        split=split,
        class_names=list(classifier.class_names),
        texts=texts_digest(classifier),
        strength=config.strength,
        fingerprint=adapter_fingerprint(classifier.model, in_use[0]),
        base=base,
        precision=precision_of(classifier.model),
    )


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Returns the temperature T that minimises the negative log likelihood of softmax(logits / T) (Guo et al. 2017).

    It is convex in 1 / T, so that its slope, mean(sum_j p_j z_j - z_y), has one zero, which is found by bisection in float64.

    Args:
        logits: (n, N).
        labels: (n,) int64.

    Raises:
        ValueError: All images are classified correctly, or the zero is not between 1/100 and 100.
    """
    logits = logits.double()
    label = logits.gather(1, labels[:, None]).squeeze(1)  # (n,)
    way_out = "Give more images, or set the temperature (1 is the model's own)."
    if bool((logits.argmax(1) == labels).all()):
        raise ValueError(
            f"All {len(labels)} images are classified correctly, so that no temperature is the best: the smaller, the better. "
            f"{way_out}"
        )

    def slope(inverse: float) -> float:
        return float(((logits * inverse).softmax(1).mul(logits).sum(1) - label).mean())

    low, high = 1 / LARGEST_TEMPERATURE, LARGEST_TEMPERATURE  # of 1 / T
    if not slope(low) < 0 < slope(high):
        raise ValueError(
            f"{len(labels)} images leave the temperature open: no value between 1/{LARGEST_TEMPERATURE:g} and "
            f"{LARGEST_TEMPERATURE:g} has the smallest negative log likelihood. {way_out}"
        )
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def rejection_threshold(logits: Tensor, rate: float) -> float:
    """Returns the k-th smallest of the largest logits, k = floor(rate (n + 1)): fewer than k of these n images are below it.

    Args:
        logits: (n, N) of images of the classes.
        rate: The wanted false-rejection rate, in (0, 1).

    Raises:
        ValueError: The rate is out of range, or less than 1 / (n + 1).
    """
    k = _rank(rate, len(logits), "false_rejection_rate", "images of the classes")
    return float(logits.amax(1).sort().values[k - 1])


def class_thresholds(logits: Tensor, labels: Tensor, rate: float, class_names: Sequence[str]) -> list[float]:
    """Returns for each of N classes the k-th largest of its logits over the m images of other classes, k = floor(rate (m + 1)).

    One class against the rest: a threshold does not depend on how frequent its class is, unlike one that is best by F1.

    Args:
        logits: (n, N).
        labels: (n,) int64.
        rate: The wanted false-positive rate, in (0, 1).
        class_names: The N names, for messages.

    Raises:
        ValueError: The rate is out of range, or less than 1 / (m + 1) for a class.
    """
    found = []
    for i, name in enumerate(class_names):
        others = logits[labels != i, i]  # (m,)
        k = _rank(rate, len(others), "false_positive_rate", f"images of other classes than {name!r}")
        found.append(float(others.sort(descending=True).values[k - 1]))
    return found


def _rank(rate: float, n: int, name: str, what: str) -> int:
    if not 0 < rate < 1:  # NaN fails too
        raise ValueError(f"{name}={rate} must be above 0 and below 1.")
    k = min(math.floor(rate * (n + 1) * (1 + 1e-12)), n)  # 0.05 times 20 is 1, whatever the rounding
    if k < 1:
        raise ValueError(
            f"{name}={rate:g} cannot be told with {n} {what}: their smallest rate is 1/{n + 1}, and this one needs "
            f"{math.ceil(1 / rate * (1 - 1e-12)) - 1}. Give more images, or a larger rate."
        )
    return k
