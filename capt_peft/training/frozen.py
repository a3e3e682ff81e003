"""What the frozen model says of the training images: computed once an image, and kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import written_whole


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
