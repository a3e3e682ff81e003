"""What the frozen model says of the training images: computed once an image, and kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..utils.files import written_whole


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within it, layers that are random or keep statistics in training are in eval mode; the others stay as compiled."""
    changed = [module for module in model.modules() if module.training and _differs_in_training(module)]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


def _differs_in_training(module: nn.Module) -> bool:
    rate = getattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else getattr(module, "dropout", 0.0)
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or (isinstance(rate, float) and rate > 0.0)


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
