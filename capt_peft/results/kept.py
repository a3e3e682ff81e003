"""The worst-case images that an evaluation keeps: one safetensors file beside its figures, which hold the file's hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..attacks import ThreatModel
from ..utils.files import open_regular, written_whole
from .accuracy import FigureError

LABELS, PLACES = "labels", "index"  # beside the images, which go by the names of their threat models


@dataclass(frozen=True)
class KeptImages:
    """Which file has the worst-case images of an evaluation.

    Args:
        sha256: SHA-256 of the file, 64 hexadecimal digits.
        bytes: Its size.
    """

    sha256: str
    bytes: int

    @property
    def size(self) -> str:
        """The size in MB, for messages."""
        return f"{self.bytes / 1e6:,.1f} MB"

    def to_dict(self) -> dict[str, Any]:
        """Returns the record, for results."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> KeptImages:
        """Reads what `to_dict` returned.

        Raises:
            FigureError: It is not a hash, or not a size.
        """
        digest, size = content["sha256"], content["bytes"]
        if not (isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")):
            raise FigureError("has images whose hash is not a SHA-256.")
        if type(size) is not int or size < 1:
            raise FigureError("has images whose size is not a number of bytes.")
        return cls(digest, size)

    @classmethod
    def of(cls, path: Path) -> KeptImages:
        """Returns the hash and the size of a file that is there."""
        with open_regular(path) as file:
            return cls(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def images_path(path: Path) -> Path:
    """Returns where the worst-case images of an evaluation lie."""
    return path.with_suffix(".safetensors")


def write_images(path: Path, images: Mapping[ThreatModel, Tensor], labels: Tensor) -> KeptImages:
    """Writes the worst-case images of an evaluation, whole or not at all.

    Args:
        path: The file.
        images: For each threat model, float32 (n, 3, H, W) in [0, 1], in the order of the data.
        labels: (n,) int64 class indices.
    """
    tensors = {str(threat): of.contiguous() for threat, of in images.items()}
    with written_whole(path.parent) as folder:
        save_file({**tensors, LABELS: labels, PLACES: torch.arange(len(labels))}, folder / path.name)
    return KeptImages.of(path)


def read_images(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Reads what `write_images` wrote.

    Returns:
        Images (n, 3, H, W) by their threat models, as these are written, and labels (n,).

    Raises:
        ValueError: The file holds something else, or a value that a pixel cannot have.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({str(error)[:200]}).") from error
    labels, places = tensors.pop(LABELS, None), tensors.pop(PLACES, None)
    if labels is None or places is None or not tensors:
        raise ValueError(f"{path} does not hold the worst-case images of an evaluation.")
    n = len(labels) if labels.ndim == 1 else 0
    if n == 0 or labels.dtype != torch.int64 or not torch.equal(places, torch.arange(n)):
        raise ValueError(f"{path} does not have one label for each place of the data, in their order.")
    for name, images in tensors.items():
        if images.dtype != torch.float32 or images.ndim != 4 or images.shape[:2] != (n, 3) or images.numel() == 0:
            raise ValueError(f"{path} has {images.dtype} {tuple(images.shape)} for {name}, not float32 ({n}, 3, H, W).")
        if not bool(((images >= 0) & (images <= 1)).all()):  # NaN is neither
            raise ValueError(f"{path} has values for {name} that are not pixels in [0, 1].")
    return tensors, labels
