"""The sentences under a table: what was measured, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .lines import BASE_TO_NEW, Cell, Section, shots_name
from .statistics import Common

LISTED = 12  # longer lists are cut, with the number of what is left out


def describe(section: Section, cells: Sequence[Cell], attack: str, harmonic: bool = False) -> str:
    """Returns what the figures of a table are of: attack, epsilon, images, model and seeds; and what H is."""
    results = [result for cell in cells for result in cell.results if attack in result.attacks]
    clean, robust = {result.clean.n for result in results}, {result.attacks[attack].n for result in results}
    n = _range(robust) if clean == robust else f"{_range(robust)} under the attack, {_range(clean)} clean"
    seeds = sorted({cell.seed for cell in cells if not cell.once and cell.has(attack)})
    each = "half of a task" if section.protocol == BASE_TO_NEW else "task"
    return "; ".join(
        [
            "Accuracy in percent",
            *(["mean ± sample standard deviation over seeds"] if len(seeds) > 1 else []),
            f"robust: under {attack}, {section.threat}",
            *(["H: harmonic mean of clean and robust, of every run before it is averaged"] if harmonic else []),
            f"{section.split} split, n = {n} images for each {each}",
            f"model {section.model}.",
        ]
    )


def unequal(cells: Sequence[Cell], attack: str) -> list[str]:
    """Returns which tasks were not measured on the same number of images in all rows."""
    found: dict[str, set[int]] = {}
    for cell in cells:
        for result in cell.results:
            if attack in result.attacks:
                name = result.task if result.classes == "all" else f"{result.task} ({result.classes} classes)"
                found.setdefault(name, set()).add(result.attacks[attack].n)
    tasks = [f"{name} (n = {_listed(sorted(sizes))})" for name, sizes in found.items() if len(sizes) > 1]
    return [f"Rows were not attacked on the same number of images of {_listed(tasks)}."] if tasks else []


def coverage(common: Mapping[str, Common]) -> list[str]:
    """Returns how much of the runs averages are over, where it is not all of them.

    Args:
        common: The tasks and seeds that all rows have, by where the averages stand, as in "4 shots"; those with the same to
            say share a sentence.
    """
    said: dict[str, list[str]] = {}
    for where, of in common.items():
        if of.left_out:
            said.setdefault(_covered(of), []).append(where)
    return [f"Averages{' at ' * any(where)}{', '.join(where)}{text}" for text, where in said.items()]


def _covered(common: Common) -> str:
    if not common.tasks:
        return ": none, as the rows have no runs in common."
    every = {*((t, s) for t in common.tasks for s in common.seeds), *common.left_out}
    tasks, seeds = ({place[i] for place in every} for i in (0, 1))
    text = (
        f" are over {len(common.tasks)} of {len(tasks)} tasks x {len(common.seeds)} of {len(seeds)} seeds, "
        f"those that all rows have"
    )
    missing = [task for task in dict.fromkeys(task for task, _ in common.left_out) if task not in common.tasks]
    return f"{text}; left out: {_listed(missing)}." if missing else f"{text}."


def seeds_left_out(common: Mapping[str, Common]) -> list[str]:
    """Returns on which tasks not all seeds count, from what the rows have in common on each task."""
    tasks = []
    for task, of in common.items():
        if of.left_out:
            every = {*of.seeds, *(seed for _, seed in of.left_out)}
            tasks.append(f"{task} ({len(of.seeds)} of {len(every)})")
    return [f"Only seeds that all rows of a task have count, which are not all on {_listed(tasks)}."] if tasks else []


def troubles(cells: Sequence[Cell], attack: str) -> list[str]:
    """Returns which cells failed and which trainings collapsed, of how many."""
    notes = []
    failed = [f"{cell} ({_short(error)})" for cell in cells if (error := cell.failure(attack)) is not None]
    counted = [cell for cell in cells if cell.has(attack)]
    if failed:
        notes.append(
            f"Failed, and so missing: {len(failed)} of {len(counted) + len(failed)} runs: {_listed(failed, '; ')}."
        )
    collapsed = [f"{cell} ({_short(cell.collapsed)})" for cell in counted if cell.collapsed]
    if collapsed:
        notes.append(
            f"Collapsed, and counted with their accuracies: {len(collapsed)} of {len(counted)} runs: {_listed(collapsed, '; ')}."
        )
    return notes


def at(shots: int | str) -> str:
    """Returns " at 4 shots", or nothing where nothing was trained."""
    return f" at {shots_name(shots)}" if shots != 0 else ""


def _short(text: str | None) -> str:
    line = (text or "").strip().split("\n")[0].rstrip(".")
    return line if len(line) <= 100 else f"{line[:97]}..."


def _range(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    return f"{ordered[0]:,}" if len(ordered) == 1 else f"{ordered[0]:,} to {ordered[-1]:,}"


def _listed(items: Sequence[object], separator: str = ", ") -> str:
    shown = separator.join(map(str, items[:LISTED]))
    return f"{shown} and {len(items) - LISTED} more" if len(items) > LISTED else shown
