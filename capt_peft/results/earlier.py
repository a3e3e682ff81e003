"""Earlier results in the place of new ones: how their configurations differ, and where the earlier are kept."""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.text import cut, differences, some

RANDOM = "random"  # stands for logits that differ from call to call
# of a class's largest logit: far above what threads and processors change, far below what settings change
TOLERANCE = 1e-4

logger = logging.getLogger(__name__)


def changes(new: Mapping[str, Any], old: Any) -> list[str]:
    """Returns sentences that say where the configurations of two evaluations differ; logits may differ by rounding.

    Args:
        new: The configuration of an evaluation to come, in JSON types.
        old: That of an earlier one, as it was read.
    """
    sentences = []
    for of_logits, found in groupby(differences(new, old), lambda each: each[0][:2] == ("model", "logits")):
        if of_logits:
            sentences += logit_changes(new["model"].get("logits"), old["model"].get("logits"))
        else:
            sentences += [_sentence(*each) for each in found]
    return sentences


def _sentence(path: Sequence[str | int], new: Any, old: Any) -> str:
    name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")
    if isinstance(new, list) and isinstance(old, list):
        return f"{name} has {len(new)} entries now and had {len(old)}"
    now, before = (cut(json.dumps(value, ensure_ascii=False), 60) for value in (new, old))
    return f"{name} is {now} now and was {before}"


def logit_changes(new: Any, old: Any) -> list[str]:
    """Returns sentences that say where the logits on sample images of two configurations differ by more than rounding."""
    if not (isinstance(new, Mapping) and isinstance(old, Mapping)) or new.get("images") != old.get("images"):
        return ["model.logits has no logits on the same sample images"]
    names = ("scored", "attacked")
    return [line for name in names if (line := _logit_change(new.get(name), old.get(name), f"model.logits.{name}"))]


def _logit_change(new: Any, old: Any, name: str) -> str | None:
    if not isinstance(new, list) or not isinstance(old, list):
        return None if new == old else f"{name} is {_kind(new)} now and was {_kind(old)}"
    try:
        a, b = torch.tensor(new, dtype=torch.float64), torch.tensor(old, dtype=torch.float64)
    except (TypeError, ValueError):
        return f"{name} holds no logits"
    if a.shape != b.shape or a.numel() == 0:
        return f"{name} is {tuple(a.shape)} now and was {tuple(b.shape)}"
    distance = logit_distance(a, b)
    if distance <= TOLERANCE:
        return None
    cause = "the model or its settings are not the same"
    if distance < 100 * TOLERANCE:
        cause += ", or it runs on another machine, device or number of threads"
    return f"{name}, on {len(a)} sample images, differ by up to {100 * distance:.2g}% ({cause})"


def _kind(value: Any) -> str:
    return "not there" if value is None else "random" if value == RANDOM else "not random"


def logit_distance(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference of two (n, N) logits, as a share of the largest number of the same column."""
    largest = torch.maximum(a.abs(), b.abs()).amax(0).clamp_min(1e-30)
    return float(((a - b).abs() / largest).max())


def set_aside(path: Path, suffixes: Sequence[str], changed: Sequence[str]) -> None:
    """Renames results of another configuration, which nobody asked to throw away, and says so in a warning.

    Args:
        path: One of their files or folders.
        suffixes: Endings of all of them; those that are not there are left out.
        changed: Sentences that say how the configurations differ.
    """
    found = [path.with_suffix(suffix) for suffix in suffixes if path.with_suffix(suffix).exists()]
    number = next(n for n in count(1) if not any(path.parent.glob(f"{glob.escape(path.stem)}.old{n}.*")))
    for old in found:
        old.rename(old.with_name(f"{path.stem}.old{number}{old.suffix}"))
    logger.warning(
        "%s held results of another configuration: %s. They are kept as %s; this evaluation is measured for itself.",
        path,
        some(changed, 5, separator="; "),
        path.with_name(f"{path.stem}.old{number}{path.suffix}"),
    )
