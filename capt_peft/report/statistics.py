"""Numbers over tasks and seeds: the scores of runs, their averages and their spread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from .lines import BASE_TO_NEW, Cell

CLEAN, ROBUST, HARMONIC = MEASURES = ("clean", "robust", "H")
OURS = "capt"
Scores = Mapping[str, float]  # accuracies in percent by the name of the measure; there are always clean, robust and H


@dataclass(frozen=True)
class Runs:
    """The scores of one row of a table.

    Attributes:
        label: Name of the row.
        ours: Whether it is the method or one of its variants, and so no baseline.
        once: Whether it was run once and stands for every seed.
        scores: By task and seed.
    """

    label: str
    ours: bool
    once: bool
    scores: Mapping[tuple[str, int], Scores]

    def of_tasks(self, tasks: Iterable[str]) -> Runs:
        """Returns the runs on some of the tasks."""
        kept = set(tasks)
        return replace(self, scores={place: s for place, s in self.scores.items() if place[0] in kept})


@dataclass(frozen=True)
class Common:
    """The tasks and seeds that all rows have.

    Attributes:
        tasks: Tasks, in the order of the first row.
        seeds: Seeds; every row has each of them on each of the tasks.
        left_out: (task, seed) that some row has and another has not, or that had to go with those.
    """

    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    left_out: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Summary:
    """A mean over seeds.

    Attributes:
        mean: The mean, in percent.
        std: The sample standard deviation over seeds; None with one seed.
    """

    mean: float
    std: float | None


def harmonic_mean(*values: float) -> float:
    """Returns the harmonic mean of numbers of 0 or more; 0 where one of them is 0."""
    return len(values) / sum(1 / v for v in values) if all(v > 0 for v in values) else 0.0


def cell_scores(cell: Cell, attack: str) -> dict[str, Scores]:
    """Returns the scores of a cell by task, in percent.

    Args:
        cell: The cell.
        attack: The attack that robust accuracy is of.

    Returns:
        clean, robust and H by task, without the tasks that were not measured under the attack. For base-to-new also "base clean",
        "base robust", "new clean" and "new robust": clean is then the harmonic mean of base and new clean, and robust likewise.
    """
    measured = {
        (r.task, r.classes): (100 * r.clean.value, 100 * r.attacks[attack].value)
        for r in cell.results
        if attack in r.attacks
    }
    if cell.protocol != BASE_TO_NEW:
        return {task: _scores(*pair) for (task, classes), pair in measured.items() if classes == "all"}
    parts = [measured.get((cell.task, classes)) for classes in ("base", "new")]
    if parts[0] is None or parts[1] is None:
        return {}
    (base_clean, base_robust), (new_clean, new_robust) = parts[0], parts[1]
    named = {"base clean": base_clean, "base robust": base_robust, "new clean": new_clean, "new robust": new_robust}
    both = _scores(harmonic_mean(base_clean, new_clean), harmonic_mean(base_robust, new_robust))
    return {cell.task: {**named, **both}}


def collect(cells: Sequence[Cell], attack: str) -> list[Runs]:
    """Returns the rows of a table: zero-shot first, then the baselines, then CAPT and its variants.

    Args:
        cells: The cells of one section at one number of shots, with those that nothing was trained for.
        attack: The attack that robust accuracy is of.

    Returns:
        One row a label, also where all of its cells failed: such a row has no scores.
    """
    seeds = sorted({cell.seed for cell in cells if not cell.once}) or [0]
    found: dict[str, dict[tuple[str, int], Scores]] = {}
    first: dict[str, Cell] = {}
    for cell in cells:
        row = found.setdefault(cell.label, {})
        first.setdefault(cell.label, cell)
        for task, scores in cell_scores(cell, attack).items():
            for seed in seeds if cell.once else [cell.seed]:
                row[task, seed] = scores
    labels = sorted(found, key=lambda label: _rank(first[label]))  # stable: otherwise as they come
    return [Runs(label, first[label].method == OURS, first[label].once, found[label]) for label in labels]


def common_runs(rows: Sequence[Runs]) -> Common:
    """Returns the largest set of tasks x seeds that all rows with scores have.

    It is whole, every task with every seed, so that the average of each seed is over the same tasks. Of sets of equal size the
    one of more tasks counts.

    Args:
        rows: The rows; those without any scores are left aside.
    """
    filled = [row.scores for row in rows if row.scores]
    every = list(dict.fromkeys(place for scores in filled for place in scores))
    seeds_of: dict[str, set[int]] = {}
    for task, seed in every:
        if all((task, seed) in scores for scores in filled):
            seeds_of.setdefault(task, set()).add(seed)
    # the seeds of the largest set are those that some of the tasks have in common
    candidates: set[frozenset[int]] = set()
    for seeds in map(frozenset, seeds_of.values()):
        candidates |= {seeds & other for other in candidates} | {seeds}
    best: tuple[tuple[str, ...], frozenset[int]] = ((), frozenset())
    for candidate in sorted(candidates, key=sorted):
        tasks = tuple(task for task, seeds in seeds_of.items() if candidate and candidate <= seeds)
        if (len(tasks) * len(candidate), len(tasks)) > (len(best[0]) * len(best[1]), len(best[0])):
            best = (tasks, candidate)
    kept = {(task, seed) for task in best[0] for seed in best[1]}
    return Common(best[0], tuple(sorted(best[1])), tuple(place for place in every if place not in kept))


def summarise(row: Runs, measure: str, common: Common) -> Summary | None:
    """Returns the average over tasks of each seed, as mean and spread over seeds.

    Args:
        row: The row.
        measure: "clean", "robust", "H", or another that its scores have.
        common: The tasks and seeds that count.

    Returns:
        None where the row has no scores, or no tasks and seeds count. The spread is None with one seed, and where one run stands
        for all of them.
    """
    if not row.scores or not common.tasks:
        return None
    means = [fmean(row.scores[task, seed][measure] for task in common.tasks) for seed in common.seeds]
    return Summary(fmean(means), stdev(means) if len(means) > 1 and not row.once else None)


def _scores(clean: float, robust: float) -> Scores:
    return {CLEAN: clean, ROBUST: robust, HARMONIC: harmonic_mean(clean, robust)}


def _rank(cell: Cell) -> int:
    if cell.once:
        return 0
    return 1 if cell.method != OURS else 3 if cell.variant else 2
