"""Paired differences between rows, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from .statistics import HARMONIC, MEASURES, OURS, Runs, common_runs, summarise

DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """A difference in points.

    Attributes:
        value: The difference.
        low: Lower end of the 95% interval; None where there is one pair of runs only.
        high: Upper end.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """How far one row is above another, on the runs that both have.

    Attributes:
        first: Label of the one.
        second: Label of the other.
        measures: The difference in clean, robust and H.
        pairs: How many tasks and seeds, in words.
    """

    first: str
    second: str
    measures: Mapping[str, Interval]
    pairs: str


@dataclass(frozen=True)
class Comparison:
    """One row against every baseline.

    Attributes:
        differences: One a baseline that has runs in common with the row.
        best: The difference to the baseline of the highest mean H; None where the rows have no runs in common.
    """

    differences: tuple[Difference, ...]
    best: Difference | None


def difference(first: Runs, second: Runs, *, draws: int = DRAWS, seed: int = 0) -> Difference | None:
    """Returns how far one row is above another, with 95% percentile bootstrap intervals.

    The runs are paired by task and seed. A draw takes tasks with replacement and, for each of them, seeds with replacement; a
    task counts as much as any other, however many seeds it has.

    Args:
        first: The one.
        second: The other.
        draws: Number of draws.
        seed: Seed of the random numbers.

    Returns:
        None where they have no task and seed in common.
    """
    by_task: dict[str, list[int]] = {}
    for task, run in first.scores:
        if (task, run) in second.scores:
            by_task.setdefault(task, []).append(run)
    if not by_task:
        return None
    values = [
        [[first.scores[t, s][measure] - second.scores[t, s][measure] for s in runs] for t, runs in by_task.items()]
        for measure in MEASURES
    ]
    ends = _bootstrap(values, draws, seed)
    intervals = [Interval(fmean(map(fmean, of)), low, high) for of, (low, high) in zip(values, ends, strict=True)]
    return Difference(
        first.label, second.label, dict(zip(MEASURES, intervals, strict=True)), _pairs(list(by_task.values()))
    )


def compare(rows: Sequence[Runs]) -> Comparison | None:
    """Compares CAPT with every baseline; the best baseline is the one of the highest mean H.

    Args:
        rows: The rows of a table. CAPT's variants are no baselines.

    Returns:
        None where there is no CAPT among the rows, or no baseline to compare it with.
    """
    ours = next((row for row in rows if row.label == OURS and row.scores), None)
    if ours is None:
        return None
    baselines = [row for row in rows if not row.ours]
    found = {row.label: d for row in baselines if (d := difference(ours, row)) is not None}
    common = common_runs(rows)
    means = {row.label: s.mean for row in baselines if (s := summarise(row, HARMONIC, common)) is not None}
    best = found[max(means, key=lambda label: means[label])] if means else None
    return Comparison(tuple(found.values()), best) if found else None


def sentence(difference: Difference) -> str:
    """Returns what a difference in H to the best baseline says."""
    found = difference.measures[HARMONIC]
    points = f"{abs(found.value):.1f} points {'above' if found.value > 0 else 'below'}"
    where = "level with" if f"{abs(found.value):.1f}" == "0.0" else points
    start = f"{difference.first} is {where} {difference.second}, the best baseline"
    if found.low is None or found.high is None:
        return f"{start} ({difference.pairs}: too few for an interval)."
    # above, the interval is of the points that are named; otherwise it is said whose difference it is
    name = "95% interval" if where == points and found.value > 0 else "95% interval of the difference"
    text = f"{start} ({name} {found.low:.1f} to {found.high:.1f}, {difference.pairs})"
    if found.low <= 0 <= found.high:
        return f"{text}; the interval contains 0: the runs do not show a difference."
    return f"{text}."


def _pairs(seeds: Sequence[Sequence[int]]) -> str:
    tasks = f"{len(seeds)} task{'s' * (len(seeds) > 1)}"
    if len({tuple(sorted(s)) for s in seeds}) == 1:
        return f"{tasks} x {len(seeds[0])} seed{'s' * (len(seeds[0]) > 1)}"
    return f"{sum(map(len, seeds))} pairs of runs on {tasks}"


def _bootstrap(
    values: Sequence[Sequence[Sequence[float]]], draws: int, seed: int
) -> list[tuple[float, float]] | list[tuple[None, None]]:
    """Returns the interval of each measure, from its differences by task and seed; all measures are of the same draws."""
    counts = np.array([len(numbers) for numbers in values[0]])
    if counts.sum() < 2:
        return [(None, None) for _ in values]  # the interval of a single pair would be a point, and look certain
    padded = np.zeros((len(values), len(counts), counts.max()))
    for measure, tasks in zip(padded, values, strict=True):
        for row, numbers in zip(measure, tasks, strict=True):
            row[: len(numbers)] = numbers
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(counts), size=(draws, len(counts)))
    places = np.floor(generator.random((*chosen.shape, counts.max())) * counts[chosen][..., None]).astype(int)
    drawn = padded[:, chosen[..., None], places]
    real = np.arange(counts.max()) < counts[chosen][..., None]  # a task of fewer seeds has fewer draws
    means = ((drawn * real).sum(-1) / counts[chosen]).mean(-1)
    return [(float(low), float(high)) for low, high in np.percentile(means, [2.5, 97.5], axis=-1).T]
