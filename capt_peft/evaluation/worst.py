"""The worst-case image of every example: of each attack's images, kept in pieces while it is measured, the one that counts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..attacks import ThreatModel
from ..results.kept import KeptImages, write_images
from ..utils.files import written_whole
from .batch import Attacked, BatchRecord


def keep_piece(path: Path, images: Tensor) -> None:
    """Writes the adversarial images (B, 3, H, W) of a batch, whole or not at all."""
    with written_whole(path.parent) as folder:
        save_file({"images": images.float().cpu().contiguous()}, folder / path.name)


def keep_worst(path: Path, pieces: Path, attacked: Attacked, batch_size: int) -> KeptImages:
    """Writes the worst-case images of all examples to a file.

    Args:
        path: The file.
        pieces: Folder of the pieces, whose names are those of the pieces of work, by attack and batch: "00-000000".
        attacked: Each attack, and what became of all images under it.
        batch_size: Images per piece.
    """
    labels = torch.tensor(attacked[0][1].label)
    images = {}
    for threat in dict.fromkeys(attack.threat_model for attack, _ in attacked):
        images[threat] = _images_of(threat, pieces, attacked, batch_size)
    return write_images(path, images, labels)


def _images_of(threat: ThreatModel, pieces: Path, attacked: Attacked, batch_size: int) -> Tensor:
    of_threat = [(i, record) for i, (attack, record) in enumerate(attacked) if attack.threat_model == threat]
    n = len(of_threat[0][1].label)
    taken = torch.tensor([_worst([record for _, record in of_threat], row) for row in range(n)])
    images: Tensor | None = None
    for number, (attack, _) in enumerate(of_threat):
        for batch, rows in enumerate(torch.arange(n).split(batch_size)):
            wanted = taken[rows] == number
            if wanted.any():
                found = load_file(pieces / f"{attack:02d}-{batch:06d}.safetensors")["images"]
                images = found.new_empty((n, *found.shape[1:])) if images is None else images
                images[rows[wanted]] = found[wanted]
    assert images is not None
    return images


def _worst(records: list[BatchRecord], row: int) -> int:
    """Returns the number of the attack whose image of an example counts.

    It is the first that the classifier is wrong on, else the last that is not the clean image itself, else the last.
    """
    wrong = (i for i, record in enumerate(records) if record.prediction[row] != record.label[row])
    moved = (i for i, record in reversed(list(enumerate(records))) if record.norm[row] > 0)
    return next(wrong, next(moved, len(records) - 1))
