"""What a task holds, as a table and in a line: images by class and split, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.markup import Markdown, escape, table_row

MAX_CLASSES = 20


def markdown_table(class_names: Sequence[str], counts: Mapping[str, Sequence[int]], left_out: Sequence[str]) -> str:
    """Returns images by class and split as a Markdown table.

    Args:
        class_names: The N class names; above 20, the last ones are one row.
        counts: For each split, its N counts.
        left_out: Sentences that follow the table as a list, after the classes without images.
    """
    shown = len(class_names) if len(class_names) <= MAX_CLASSES else MAX_CLASSES - 1
    rows: list[list[Any]] = [
        [name, *(counts[split][i] for split in counts)] for i, name in enumerate(class_names[:shown])
    ]
    if shown < len(class_names):
        rows.append([f"{len(class_names) - shown:,} more", *(sum(counts[split][shown:]) for split in counts)])
    rows.append([f"all {len(class_names):,}", *(sum(counts[split]) for split in counts)])
    lines = [table_row(["class", *counts]), table_row([Markdown("---"), *(Markdown("---:") for _ in counts)])]
    lines += [table_row([row[0], *(f"{number:,}" for number in row[1:])]) for row in rows]
    notes = [*without_images(class_names, counts), *(f"left out: {note}" for note in left_out)]
    return "\n".join([*lines, *([""] if notes else []), *(f"- {escape(note)}" for note in notes)])


def without_images(class_names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> list[str]:
    """Returns for each split that lacks images of some classes a sentence that names these, at most 5."""
    notes = []
    for split, numbers in counts.items():
        names = [name for name, number in zip(class_names, numbers, strict=True) if not number]
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        if names:
            notes.append(f"no {split} images of {', '.join(map(repr, names[:5]))}{more}")
    return notes


def one_line(counts: Mapping[str, Sequence[int]]) -> str:
    """Returns the images of each split and class in a line, for the log."""
    classes = len(next(iter(counts.values()), ()))
    parts = [f"{sum(numbers):,} {split} ({_range(numbers)} per class)" for split, numbers in counts.items()]
    return f"{classes:,} classes; {', '.join(parts) or 'no'} images"


def _range(numbers: Sequence[int]) -> str:
    lowest, highest = min(numbers), max(numbers)
    return f"{lowest:,}" if lowest == highest else f"{lowest:,} to {highest:,}"
