"""Numbers over tasks and seeds: scores, averages and their spread, and paired differences with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, stdev  # exact, where pandas' sums would turn 8.75 into 8.8
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..benchmark.plan import Shots
from ..results.accuracy import harmonic_mean
from .sections import Section

CLEAN, ROBUST, HARMONIC = MEASURES = ("clean", "robust", "H")
AUTOATTACK, GAP = "autoattack", "gap to AutoAttack"
OURS = "capt"
DRAWS = 10_000


class Common(NamedTuple):
    """Tasks and seeds, each of them on each of the tasks, that all rows have; `left_out` is what else some of them have."""

    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    left_out: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Rows:
    """The rows of a table: zero-shot first, then the baselines, then CAPT and its variants.

    Attributes:
        labels: Names of the rows, also of those that have no scores.
        once: Those that were run once and stand for every seed.
        ours: CAPT and its variants, which are no baselines.
        scores: Percent, by label, task and seed: clean, robust and H; for base-to-new also of base and new, whose harmonic mean
            clean and robust then are. Where AutoAttack's figures are beside those of a published protocol, also how many points
            the protocol's are above them.
    """

    labels: list[str]
    once: Collection[str]
    ours: Collection[str]
    scores: pd.DataFrame

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order of the rows."""
        return list(self.scores.index.unique("task"))

    def of_tasks(self, tasks: Collection[str]) -> Rows:
        """Returns the rows with some of the tasks only."""
        return replace(self, scores=self.scores[self.scores.index.isin(tasks, level="task")])

    @cached_property
    def common(self) -> Common:
        """The largest set of tasks x seeds that all rows with scores have; of equal ones, the one of more tasks.

        It is whole, every task with every seed, so that the average of each seed is over the same tasks.
        """
        counts = self.scores.groupby(["task", "seed"], sort=False).size()
        seeds_of: dict[str, set[int]] = {}
        for task, seed in counts.index[counts == self.scores.index.unique("label").size]:
            seeds_of.setdefault(task, set()).add(seed)
        # the seeds of the largest set are those that some of the tasks have in common
        candidates: set[frozenset[int]] = set()
        for seeds in map(frozenset, seeds_of.values()):
            candidates |= {seeds & other for other in candidates} | {seeds}
        ordered = sorted(candidates, key=sorted)
        sets = [(tuple(t for t, of in seeds_of.items() if seeds <= of), tuple(sorted(seeds))) for seeds in ordered]
        tasks, shared = max(sets, key=lambda of: (len(of[0]) * len(of[1]), len(of[0])), default=((), ()))
        return Common(tasks, shared, tuple((t, s) for t, s in counts.index if t not in tasks or s not in shared))

    @cached_property
    def averages(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The mean over seeds of the averages over tasks that all rows have, and its sample standard deviation.

        By label and measure. The spread is missing with one seed, and where one run stands for all of them.
        """
        places = self.scores.index
        counted = places.isin(self.common.tasks, level="task") & places.isin(self.common.seeds, level="seed")
        by_label = self.scores[counted].groupby(["label", "seed"]).agg(fmean).groupby("label")
        mean, spread = (by_label.agg(of).reindex(self.labels) for of in (fmean, _spread))
        spread.loc[list(self.once)] = np.nan
        return mean, spread


def rows_of(section: Section, shots: Shots | None = None) -> Rows:
    """Returns the rows of a section at one number of shots, with those that nothing was trained for; by default all of it."""
    runs = section.runs if shots is None else section.at(shots)
    first = runs.drop_duplicates("label")
    once, ours = set(first.label[first.shots == 0]), set(first.label[first.method == OURS])
    # stable: otherwise as they come
    labels = sorted(first.label, key=lambda label: (label not in once, label in ours, label in ours and label != OURS))
    seeds = sorted(set(runs.seed[runs.shots != 0])) or [0]
    measured = runs.dropna(subset="robust").sort_values("label", key=lambda of: of.map(labels.index), kind="stable")
    every = [seeds if s == 0 else [seed] for s, seed in zip(measured.shots, measured.seed, strict=True)]
    indexed = measured.assign(seed=every).explode("seed").set_index(["label", "task", "seed"])
    single = pd.DataFrame(indexed.single.tolist(), indexed.index, section.attacks)
    indexed = pd.concat([indexed, single], axis=1)
    kept = [CLEAN, *section.attacks, ROBUST, *([AUTOATTACK] if section.has_gap else [])]
    parts = {of: indexed.loc[indexed.classes == of, kept].astype(float) for of in ("all", "base", "new")}
    parts = {of: part[~part.index.duplicated(keep="last")] for of, part in parts.items()}
    scores = parts["all"]
    if section.protocol == "base-to-new":
        scores = parts["base"].add_prefix("base ").join(parts["new"].add_prefix("new "), how="inner")
        for measure in kept:
            scores[measure] = harmonic_mean(scores[f"base {measure}"], scores[f"new {measure}"])
    scores = scores.assign(**{HARMONIC: harmonic_mean(scores[CLEAN], scores[ROBUST])})
    for name in [name for name in scores if name.endswith(AUTOATTACK)]:
        half = name.removesuffix(AUTOATTACK)
        scores[half + GAP] = scores[half + ROBUST] - scores.pop(name)
    return Rows(labels, once, ours, scores)


def _spread(values: pd.Series) -> float:
    return stdev(values) if len(values) > 1 and values.notna().all() else np.nan  # not all rows have a gap


class Interval(NamedTuple):
    """A difference in points, and the ends of its 95% interval: None where there is one pair of runs only."""

    value: float
    ends: tuple[float, float] | None

    def __str__(self) -> str:
        return f"{self.value:+.1f}" + ("" if self.ends is None else " ({:.1f} to {:.1f})".format(*self.ends))


@dataclass(frozen=True)
class Difference:
    """How far CAPT is above a baseline in clean, robust and H, on the runs that both have; `pairs` says how many, in words."""

    baseline: str
    measures: Mapping[str, Interval]
    pairs: str

    def sentence(self) -> str:
        """Returns what the difference in H says, if the baseline is the best."""
        value, ends = self.measures[HARMONIC]
        points = f"{abs(value):.1f}"
        level = points == "0.0"
        where = "level with" if level else f"{points} points {'above' if value > 0 else 'below'}"
        start = f"{OURS} is {where} {self.baseline}, the best baseline"
        if ends is None:
            return f"{start} ({self.pairs}: too few for an interval)."
        # above, the interval is of the points that are named; otherwise it is said whose difference it is
        whose = "" if value > 0 and not level else " of the difference"
        text = f"{start} (95% interval{whose} {ends[0]:.1f} to {ends[1]:.1f}, {self.pairs})"
        within = "; the interval contains 0: the runs do not show a difference" if ends[0] <= 0 <= ends[1] else ""
        return f"{text}{within}."


def compare(rows: Rows) -> tuple[list[Difference], Difference | None]:
    """Returns CAPT's differences to the baselines, and the one to the best of them: of the highest mean H on common runs."""
    scores = _scores(rows)
    ours = scores.get(OURS, pd.DataFrame())
    baselines = [label for label in rows.labels if label in scores and label not in rows.ours]
    found = {label: of for label in baselines if (of := difference(ours, scores[label], label))}
    means = rows.averages[0].loc[list(found), HARMONIC].dropna()
    return list(found.values()), found[means.idxmax()] if len(means) else None


def compare_variants(rows: Rows) -> tuple[str, list[Difference]]:
    """Returns plain CAPT's row, or else the first of its variants, and how far each other of them is above it."""
    scores = {label: of for label, of in _scores(rows).items() if label in rows.ours}
    plain = OURS if OURS in scores else next((label for label in rows.labels if label in scores), "")
    others = [label for label in rows.labels if label in scores and label != plain]
    return plain, [of for label in others if (of := difference(scores[label], scores[plain], label))]


def _scores(rows: Rows) -> dict[str, pd.DataFrame]:
    return {str(label): of.droplevel("label") for label, of in rows.scores.groupby("label", sort=False)}


def difference(first: pd.DataFrame, second: pd.DataFrame, baseline: str) -> Difference | None:
    """Returns how far one row is above another, with 95% percentile bootstrap intervals.

    A draw takes tasks with replacement and, for each of them, seeds with replacement; a task counts as much as any other,
    however many seeds it has. None where the rows have no task and seed in common.
    """
    both = first.index[first.index.isin(second.index)]
    if both.empty:
        return None
    by_task = (first - second).loc[both, list(MEASURES)].groupby("task", sort=False)
    ends = _bootstrap([of.to_numpy().T for _, of in by_task])
    measures = {m: Interval(v, of) for (m, v), of in zip(by_task.agg(fmean).agg(fmean).items(), ends, strict=True)}
    seeds = [tuple(sorted(of.index.unique("seed"))) for _, of in by_task]
    tasks = f"{len(seeds)} task{'s' * (len(seeds) > 1)}"
    pairs = f"{sum(map(len, seeds))} pairs of runs on {tasks}"
    if len(set(seeds)) == 1:
        pairs = f"{tasks} x {len(seeds[0])} seed{'s' * (len(seeds[0]) > 1)}"
    return Difference(baseline, measures, pairs)


def _bootstrap(tasks: list[np.ndarray]) -> list[tuple[float, float] | None]:
    """Returns the interval of each measure, from its differences by task and seed; all measures are of the same draws."""
    counts = np.array([values.shape[1] for values in tasks])
    if counts.sum() < 2:
        return [None] * len(MEASURES)  # the interval of a single pair would be a point, and look certain
    padded = np.zeros((len(MEASURES), len(tasks), counts.max()))
    for i, values in enumerate(tasks):
        padded[:, i, : counts[i]] = values
    generator = np.random.default_rng(0)
    chosen = generator.integers(len(counts), size=(DRAWS, len(counts)))
    places = np.floor(generator.random((*chosen.shape, counts.max())) * counts[chosen][..., None]).astype(int)
    drawn = padded[:, chosen[..., None], places]
    real = np.arange(counts.max()) < counts[chosen][..., None]  # a task of fewer seeds has fewer draws
    means = ((drawn * real).sum(-1) / counts[chosen]).mean(-1)
    return [(float(low), float(high)) for low, high in np.percentile(means, [2.5, 97.5], axis=-1).T]
