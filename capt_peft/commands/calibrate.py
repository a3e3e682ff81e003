"""Fits an adapter's temperature and its thresholds on validation images, and writes them into the adapter.

capt-peft calibrate outputs/demo                                    # rejects at most 5% of images of its classes
capt-peft calibrate outputs/demo --false_rejection_rate 0.01        # fewer; needs 99 images

`predict` then gives calibrated scores, and predict(image, reject=True) can answer "none of these".
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clip.calibration import digest_as_loaded, texts_digest
from ..clip.classifier import ZeroShotClassifier
from ..data import Task
from ..data.names import name_places
from ..evaluation.calibration import calibrate, logits_and_labels
from ..results.card import adapter_config
from ..results.hub import update_config
from ..results.reliability import BINS, Reliability
from ..tuner import Calibration, CaptConfig
from ..utils.files import make_writable
from ..utils.text import shown, some
from .card import adapter_folder
from .data import measured
from .ending import loading
from .export import say_what_stays
from .options import values_in
from .parser import Parser
from .tuned import TunedDataArguments, take_over


@dataclass
class Arguments(TunedDataArguments):
    """What is calibrated, and on what."""

    adapter: str = field(default="", metadata={"help": "Folder of a CAPT adapter."})
    split: str = field(
        default="validation", metadata={"help": "Split that it is fitted on; not the one it was tuned on."}
    )
    choose_on_test: bool = field(
        default=False, metadata={"help": "Allow --split test, whose figures then look better than they are."}
    )
    limit: int | None = field(default=None, metadata={"help": "Fit on this many images, drawn by seed 0."})
    false_rejection_rate: float = field(
        default=0.05, metadata={"help": 'Share of images of its classes that the answer "none of these" may hit.'}
    )
    false_positive_rate: float = field(
        default=0.05,
        metadata={"help": "For several labels per image: share of other classes' images that a class may get."},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Keep this temperature (1 is the model's own) instead of fitting one."}
    )
    batch_size: int = field(default=128, metadata={"help": "Images per forward pass."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use an accelerator."})


def parse_args(argv: list[str]) -> Arguments:
    """Reads the command line, and refuses what cannot work before anything is loaded."""
    (args,) = Parser(Arguments).into_dataclasses(argv)
    adapter_folder(args.adapter, of_capt=True)
    if args.split == "train":
        raise ValueError("split='train' has the images that it was tuned on, of which it is too sure. Give validation.")
    if args.split == "test" and not args.choose_on_test:
        raise ValueError(
            "A calibration that is fitted on test images makes their calibration error and rejected images look better than they "
            "are. Leave --split out, or give --choose_on_test if you know other test images."
        )
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    for name in ("false_rejection_rate", "false_positive_rate"):
        if not 0 < getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} must be above 0 and below 1.")
    if args.temperature is not None and not 0 < args.temperature < math.inf:
        raise ValueError(f"temperature={args.temperature} must be a finite number above 0.")
    take_over(args, args.adapter, {*values_in(argv), "split"})
    return args


def main(argv: list[str]) -> Calibration:
    """Fits, writes and shows."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_args(argv)
    folder = adapter_folder(args.adapter, of_capt=True)
    make_writable(folder, given="adapter")
    config, task = adapter_config(folder), args.load()
    names = names_as_loaded(config, task)
    data = measured(task, args.split, args.limit)
    with loading(args.adapter):
        classifier = ZeroShotClassifier.from_pretrained(str(folder), class_names=names, **args.texts)
    check_texts_as_loaded(config, classifier)
    device = "cpu" if args.use_cpu or not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
    logits, labels = logits_and_labels(classifier.to(device), data, args.batch_size)
    calibration = calibrate(
        classifier,
        logits,
        labels,
        task=task.name,
        split=args.split,
        false_rejection_rate=args.false_rejection_rate,
        false_positive_rate=args.false_positive_rate,
        temperature=args.temperature,
    )
    update_config(folder, calibration=calibration.to_dict())
    print(summary(calibration, logits, labels))
    print(f"\nSaved to {folder / 'adapter_config.json'}")
    say_what_stays(folder)
    return calibration


def names_as_loaded(config: CaptConfig, task: Task) -> list[str]:
    """Returns the classes that an adapter is loaded with; raises a ValueError where the task's are others."""
    own, names = config.class_names, task.class_names
    if not own:
        return list(names)
    if len(own) != len(names) or None in name_places(names, own):
        raise ValueError(
            f"{task.name} has the {len(names)} classes {some(names, 5, quote=True)}, and the adapter has the {len(own)} "
            f"classes {some(own, 5, quote=True)}: a calibration on these images would never hold for it. Give images of its "
            "classes."
        )
    return own


def check_texts_as_loaded(config: CaptConfig, classifier: ZeroShotClassifier) -> None:
    """Raises a ValueError where texts of the classes are not those that an adapter is loaded with."""
    if texts_digest(classifier) != digest_as_loaded(config.to_dict(), classifier.class_names):
        raise ValueError(
            f"The adapter is loaded with other texts of its classes than {shown(classifier.texts[0])} and so on: a calibration "
            "with these would never hold for it. Leave out --template and --class_texts."
        )


def summary(calibration: Calibration, logits: Tensor, labels: Tensor) -> str:
    """Returns what was fitted, and on what, for people."""
    n, wanted = calibration.images, calibration.false_rejection_rate
    before, after = (
        f"{F.cross_entropy(logits / t, labels).item():.3f} and {_error(logits / t, labels):.1%}"
        for t in (1.0, calibration.temperature)
    )
    spread = math.sqrt(wanted * (1 - wanted) / (n + 2))  # of a Beta(k, n + 1 - k) with k = wanted (n + 1)
    return "\n".join(
        [
            f"\nFitted on {n} images of the {calibration.split} split of {calibration.task}, "
            f"{len(calibration.class_names)} classes, strength {calibration.strength:g}:",
            f"  temperature {calibration.temperature:.4g}: negative log likelihood and calibration error ({BINS} bins) are "
            f"{after} on these images, and were {before}",
            f'  "none of these" where the largest logit is below {calibration.threshold:.4g}: at most {wanted:.2%} of images of '
            f"these classes on average; with {n} images a threshold's own rate varies by {spread:.2%} (standard deviation)",
            f"  several labels: a class where its logit is above {min(calibration.class_thresholds):.4g} to "
            f"{max(calibration.class_thresholds):.4g}, at most {calibration.false_positive_rate:.2%} of images of other classes",
        ]
    )


def _error(logits: Tensor, labels: Tensor) -> float:
    scores, predictions = logits.softmax(1).max(1)
    return Reliability.of(scores.tolist(), (predictions == labels).tolist()).ece
