"""Accuracy under common corruptions of the images as the model sees them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data.corruptions import corrupt
from ..results.corrupted import CorruptedAccuracy
from .batch import BatchRecord, score_batch
from .images import Examples
from .resume import Jobs
from .subject import Subject


def corrupt_pixels(pixels: Tensor, corruption: str, seed: int) -> Tensor:
    """Returns pixels (B, 3, H, W) in [0, 1], rounded to 8 bits, with a corruption such as "fog-3"."""
    kind, _, severity = corruption.rpartition("-")
    rows = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy(force=True)
    changed = [np.asarray(corrupt(Image.fromarray(row), kind, int(severity), seed)) for row in rows]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).to(pixels) / 255


def measure_corrupted(
    subject: Subject,
    examples: Examples,
    corruptions: Sequence[str],
    seed: int,
    batch_size: int,
    jobs: Jobs,
    progress: bool,
) -> CorruptedAccuracy:
    """Measures what is left of every corruption; the processes share the batches."""
    state, n = PartialState(), len(examples)
    batches = [list(range(n))[start : start + batch_size] for start in range(0, n, batch_size)]
    pieces = [(name, f"corrupted-{name}-{i:06d}", batch) for name in corruptions for i, batch in enumerate(batches)]
    own = pieces[state.process_index :: state.num_processes]
    for name, piece, indices in tqdm(own, "corruptions", disable=not (progress and state.is_main_process)):
        if piece not in jobs.done:
            pixels, labels = examples.batch(indices, subject.device)
            corrupted = corrupt_pixels(pixels, name, seed)
            jobs.keep(piece, score_batch(subject, corrupted, labels, indices, seed).to_dict())
    done = jobs.of_all()
    right = {}
    for name in corruptions:
        whole = BatchRecord.joined(done[piece] for each, piece, _ in pieces if each == name)
        right[name] = [a == b for a, b in zip(whole.prediction, whole.label, strict=True)]
    return CorruptedAccuracy.of(right)
