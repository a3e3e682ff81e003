"""What the frozen model says of the training images: computed once an image, and kept in memory or on disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..classifier import ZeroShotClassifier
from ..evaluation.subject import describe
from ..files import written_whole
from .arguments import CaptTrainingArguments
from .frozen_store import FrozenStore, content_key

logger = logging.getLogger(__name__)

MEMORY_BYTES = 1 << 30  # more than this goes to disk by itself
NAMES_ALONE = (
    "_name_or_path",
    "architectures",
    "transformers_version",
)  # in a configuration, without effect on outputs


class FrozenOutputs:
    """The frozen model's output for each image that it was run on, by the image's place in the dataset, in memory."""

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}

    def get(self, indices: Sequence[int], pixels: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the outputs of a batch, (B, N).

        Args:
            indices: The B places of its images.
            pixels: The images, (B, 3, H, W).
            compute: Maps the images that are not known yet, (b, 3, H, W), to their outputs, (b, N).
        """
        new = [row for row, index in enumerate(indices) if index not in self._known]
        if new:
            for row, output in zip(new, compute(pixels[new]), strict=True):
                self._known[indices[row]] = output
        return torch.stack([self._known[index] for index in indices])

    def save(self, path: Path) -> None:
        """Writes all that is known, whole or not at all.

        A run that goes on from a checkpoint meets its images in other batches, which changes the last bits of what is computed.
        """
        if not self._known:
            return
        tensors = {"index": torch.tensor(list(self._known)), "output": torch.stack(list(self._known.values())).cpu()}
        with written_whole(path.parent) as folder:
            save_file(tensors, folder / path.name)

    def load(self, path: Path, device: torch.device) -> None:
        """Reads what `save` wrote, if there is such a file; another number of processes leaves some without one."""
        if path.is_file():
            tensors = load_file(path)  # safetensors takes no "cpu:0", the device of a process among others
            self._known = dict(zip(tensors["index"].tolist(), tensors["output"].to(device), strict=True))


def frozen_outputs(
    args: CaptTrainingArguments,
    classifier: ZeroShotClassifier,
    teacher: ZeroShotClassifier | None,
    *,
    images: int,
    width: int,
    kind: str,
) -> FrozenOutputs | FrozenStore:
    """Returns where a run keeps the frozen model's outputs: `args.frozen_cache_dir`, or memory while 1 GiB is enough.

    Args:
        args: The run's arguments; with `augment` the images are new each time, and nothing is worth keeping on disk.
        classifier: What is tuned; with its adapter off it is the frozen model, unless there is a teacher.
        teacher: The frozen model, if it is another one.
        images: Number of training images.
        width: N, the numbers of an output.
        kind: Names what an output is, such as logits.

    Raises:
        NotADirectoryError: `args.frozen_cache_dir` is a file.
    """
    folder = Path(str(args.output_dir), "frozen_outputs") if images * width * 4 > MEMORY_BYTES else None
    if args.frozen_cache_dir:
        folder = Path(args.frozen_cache_dir).expanduser()
    if args.augment or folder is None:
        return FrozenOutputs()
    if teacher is None and (trained := _trained_base_parameter(classifier)):
        # such a model changes while it is tuned, so that its outputs are of no use to another run
        logger.warning("Frozen outputs stay in memory: the base model is tuned itself (%s).", trained)
        return FrozenOutputs()
    if teacher is None:
        with classifier.frozen() as frozen:
            about = what_decides(frozen, args, kind)
    else:
        about = what_decides(teacher, args, kind)
    if about["base"]["fingerprint"] is None:
        logger.warning("Frozen outputs stay in memory: the frozen model's weights are not there to be told by.")
        return FrozenOutputs()
    return FrozenStore(folder, {**about, "width": width}, images, width)


def what_decides(frozen: ZeroShotClassifier, args: CaptTrainingArguments, kind: str) -> dict[str, Any]:
    """Returns all that decides the frozen model's outputs besides the image: weights, texts, pixels and precision."""
    about = describe(frozen)
    del about["base"]["name"]  # the same weights may have several
    configuration = json.dumps(_without_names(frozen.base_model.config.to_dict()), sort_keys=True, default=str)
    about["base"]["configuration"] = content_key(configuration.encode()).hex()
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    return {
        "outputs": kind,
        **about,
        "tokens": content_key(frozen.input_ids.cpu().numpy()).hex(),  # tokenizers differ
        "autocast": autocast,
        "tf32": args.tf32,
        "device": args.device.type,
    }


def _without_names(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in NAMES_ALONE}
    return {key: _without_names(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _trained_base_parameter(classifier: ZeroShotClassifier) -> str | None:
    """Returns the name of a parameter that is tuned and that switching the adapter off does not take away, or None."""
    named = classifier.model.named_parameters()
    return next((name for name, p in named if p.requires_grad and ".capt_" not in name), None)
