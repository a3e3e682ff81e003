"""Benchmark lines as data frames: one for each group of runs that may be compared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..attacks.protocols import AUTOATTACK
from ..benchmark.lines import Line, read_lines
from ..benchmark.plan import PROTOCOLS, QUICK_LIMIT, TRANSFERS, Cell, Shots, shots_name
from ..results.accuracy import Accuracy
from ..utils.text import differences

BY_PROTOCOL = "the protocol "  # the share of images that none of a published protocol's attacks broke
WORST = "worst of "  # the share of images that none of several attacks broke
COLUMNS = [
    "name", "label", "method", "shots", "seed", "task", "classes", "clean", "robust", "autoattack", "single", "n_clean", "n",
    "limit", "collapsed", "failure", "defence",
]  # fmt: skip
Place = tuple[str, str, str, str, str, str, str]  # of a section: suite to source, and the published protocol
Figures = dict[tuple[str, str], dict[str, Accuracy]]  # by task and classes, and by attack; "" for clean images


@dataclass(frozen=True)
class Section:
    """The runs that may stand in one table, since only method, task, shots and seed differ.

    Attributes:
        suite, protocol, split, model: What they have in common, as in a `Cell`.
        threat: The threat model of the attacks, as in "L-inf 10/255".
        source: For cross-dataset and shift, the task that was trained on; otherwise "".
        attack: The attack that robust accuracy is of.
        runs: A row for each run and target, of `COLUMNS`: `label` is method and variant, `shots` 0 where nothing was trained,
            `clean` and `robust` are percent of `n_clean` and `n` images; `limit` is the most that it would have taken. A run
            without a figure has a row without a target; `failure` says why, if it failed. With a `defence`, `robust` is the worst
            case over every way to attack it. Where `robust` is the worst of several attacks, `single` has the figures
            of each by name. `autoattack` is beside the figure of a published protocol, in percent of the same images.
        evaluation_protocol: The published protocol that they are measured by; "" for none.
    """

    suite: str
    protocol: str
    split: str
    model: str
    threat: str
    source: str
    attack: str
    runs: pd.DataFrame = field(repr=False)
    evaluation_protocol: str = ""

    def __str__(self) -> str:
        return f"{self.title} ({self.split} split, {self.threat}, {self.model})"

    @property
    def title(self) -> str:
        """Suite and experiment, the task that was trained on where others are measured, and the published protocol."""
        named = f", by the protocol {self.evaluation_protocol}" if self.evaluation_protocol else ""
        return f"{self.suite}: {self.protocol}" + (f" from {self.source}" if self.source else "") + named

    @property
    def has_gap(self) -> bool:
        """Whether AutoAttack's figure is there beside that of the published protocol."""
        return bool(self.runs.autoattack.notna().any())

    @property
    def attacks(self) -> list[str]:
        """The attacks that robust accuracy is the worst of, if there are several."""
        return list(dict.fromkeys(name for single in self.runs.single.dropna() for name in single))

    @property
    def shots(self) -> list[Shots]:
        """The numbers of shots that were trained with, "all" last; [0] where nothing was trained."""
        return sorted({*self.runs.shots} - {0}, key=lambda shots: (isinstance(shots, str), shots)) or [0]

    @property
    def quick(self) -> bool:
        """Whether runs were measured on so few images, by their own limit, that their figures say nothing about methods."""
        return bool(self.runs.limit.le(QUICK_LIMIT).any())

    def at(self, shots: Shots) -> pd.DataFrame:
        """Returns the runs at a number of shots, with those that nothing was trained for."""
        return self.runs[self.runs.shots.isin([0, shots])]


def read_sections(paths: str | Path | Sequence[str | Path], attack: str | None = None) -> list[Section]:
    """Reads benchmark lines in groups that may be compared, few-shot first.

    Lines of one cell with different keys (other attacks, another limit) are one run: an attack's figure is the one of most
    images, and so is the clean figure.

    Args:
        paths: A file of lines, or several in the order in which they were written.
        attack: The attack that robust accuracy is of; by default the one that most cells have, or the worst case of several,
            and of cells that were measured by a published protocol the protocol's.

    Raises:
        ValueError: A line is broken, there is none at all, no cell has the attack, one row was run with different settings, a
            figure is under another step size than its cell's, or cells of one section are of different images, base models or
            processors.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    lines = read_lines(*files)
    if not lines:
        raise ValueError(f"There is no benchmark line in {', '.join(map(str, files)) or 'no file'}.")
    for line in lines:
        line.check_step_size()
    _check_inputs(lines)
    runs: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        cell = line.cell
        runs.setdefault((_section(cell), cell.label, cell.task, cell.shots, cell.seed), []).append(line)
    figures = {place: _figures(of_run) for place, of_run in runs.items()}
    chosen = _choose_attack(figures.values(), attack)
    plain = [of for place, of in figures.items() if not place[0][-1] and any(len(f) > 1 for f in of.values())]
    if attack is None and plain:  # what most cells have that are not measured by a published protocol
        chosen = _choose_attack(plain, None)
    rows: dict[Place, list[dict[str, Any]]] = {}
    check_rows(line.cell for line in lines if not line.error)
    for place, of_run in runs.items():
        rows.setdefault(place[0], []).extend(_rows(of_run, figures[place], _attack_of(place[0], attack or "", chosen)))
    sections = [
        Section(*place[:-1], _attack_of(place, attack or "", chosen), pd.DataFrame(of, columns=COLUMNS), place[-1])
        for place, of in rows.items()
    ]
    return sorted(sections, key=lambda section: PROTOCOLS.index(section.protocol))


def _section(cell: Cell) -> Place:
    source = cell.task if cell.protocol in TRANSFERS else ""
    return cell.suite, cell.protocol, cell.split, cell.model, str(cell.threat), source, cell.evaluation_protocol or ""


def _attack_of(place: Place, asked: str, chosen: str) -> str:
    """Returns the attack that robust accuracy of a section is of: the one asked for, the protocol's, or what was chosen."""
    return asked or (BY_PROTOCOL + place[-1] if place[-1] else chosen)


def _name(cell: Cell) -> str:
    return f"{cell.label} on {cell.task}, {shots_name(cell.shots)}, seed {cell.seed}"


def _figures(lines: Iterable[Line]) -> Figures:
    """Returns the accuracies of a run: of several under one attack the one of most images, of equally many the last."""
    figures: Figures = {}
    for cell, result in ((line.cell, result) for line in lines for result in line.results):
        measured = {"": result.clean, **result.attacks}
        names = list(result.attacks)
        if cell.defence:  # no way to it stands for its robust accuracy, and the worst case stands beside that of others
            names = list(dict.fromkeys(attack.name for attack in cell.parsed_attacks()))
            measured = {"": result.clean}
        if result.by_protocol is not None:
            measured[f"{BY_PROTOCOL}{cell.evaluation_protocol}"] = result.by_protocol
        if result.worst_case is not None and (cell.defence or len(names) > 1):
            measured[WORST + ", ".join(names) if len(names) > 1 else names[0]] = result.worst_case
        target = figures.setdefault((result.task, result.classes), {})
        target |= {a: of for a, of in measured.items() if a not in target or of.n >= target[a].n}
    return figures


def _choose_attack(figures: Iterable[Figures], attack: str | None) -> str:
    counts = Counter(a for run in figures for a in dict.fromkeys(a for of in run.values() for a in of if a))
    if not counts:
        raise ValueError(
            "No cell was measured under an attack: all of them failed, or were measured on clean images only."
        )
    if attack is not None and attack not in counts:
        raise ValueError(f"No cell was measured under {attack!r}. The attacks are {', '.join(sorted(counts))}.")
    return attack or max(counts, key=lambda name: (counts[name], name.startswith(WORST)))


def _rows(lines: Sequence[Line], figures: Figures, attack: str) -> list[dict[str, Any]]:
    """Returns what a data frame says of a run."""
    cell = lines[0].cell
    collapsed = next((line.collapsed for line in lines if line.collapsed), None)
    run = {name: getattr(cell, name) for name in ("label", "method", "shots", "seed", "defence")}
    limits = [math.inf if line.cell.limit is None else line.cell.limit for line in lines if line.results]
    run |= {"name": _name(cell), "collapsed": collapsed, "limit": max(limits, default=math.inf)}
    measured = [
        {**run, "task": task, "classes": classes}
        | {"clean": 100 * of[""].value, "n_clean": of[""].n, "robust": 100 * of[attack].value, "n": of[attack].n}
        | _autoattack(of, attack)
        | {"single": _single(of, attack)}
        for (task, classes), of in figures.items()
        if attack in of
    ]
    failed = [line for line in lines if line.error]
    by_protocol = attack.startswith(BY_PROTOCOL)
    # a run without any figure counts as failed whatever its attacks were called
    counted = [line for line in failed if by_protocol or attack in line.cell.attacks] or ([] if figures else failed)
    return measured or [{**run, "failure": counted[-1].error if counted else None}]


def _autoattack(figures: Mapping[str, Accuracy], attack: str) -> dict[str, float]:
    """Returns AutoAttack's figure where it is of the same images as that of a published protocol: a limit draws by seed 0."""
    found = figures.get(AUTOATTACK)
    same = attack.startswith(BY_PROTOCOL) and found is not None and found.n == figures[attack].n
    return {"autoattack": 100 * found.value} if same and found is not None else {}


def _single(figures: Mapping[str, Accuracy], attack: str) -> dict[str, float]:
    """Returns the figure of each attack, in percent, where the worst of several was asked for and is of the same images."""
    names = attack.removeprefix(WORST).split(", ") if attack.startswith(WORST) else []
    same = [name for name in names if name in figures and figures[name].n == figures[attack].n]
    return {name: 100 * figures[name].value for name in same}


def check_rows(cells: Iterable[Cell]) -> None:
    """Raises a ValueError if cells of different settings would be averaged in a table."""
    first: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        one = first.setdefault((_section(cell), cell.label, cell.defence, cell.shots), cell)
        if differing := differing_settings(one, cell):
            both = _name(cell) if _name(one) == _name(cell) else f"{_name(cell)}, beside {_name(one)},"
            raise ValueError(
                f"{both} ({cell.suite}, {cell.protocol}, {cell.split}) was run with different settings, which are: "
                f"{', '.join(differing)}. Give one of them a variant, so that it has a row of its own."
            )


def differing_settings(one: Cell, other: Cell) -> list[str]:
    """Returns where the settings of two cells differ, as "weighting ('confidence' and 'entropy')"."""
    settings = ({**cell.settings, "prompts": cell.prompts} for cell in (one, other))
    found = differences(*settings, missing="not given")
    return [f"{'.'.join(map(str, path))} ({a!r} and {b!r})" for path, a, b in found]


def _check_inputs(lines: Iterable[Line]) -> None:
    """Raises a ValueError if lines of one section are of different images or models."""
    first: dict[tuple[Any, ...], tuple[Cell, str]] = {}
    for cell, inputs in ((line.cell, _inputs(line)) for line in lines):
        known = {key: first.setdefault((_section(cell), key), (cell, digest)) for key, digest in inputs.items()}
        mixed = {key[0]: one for key, (one, digest) in known.items() if digest != inputs[key]}
        if mixed:
            one = _name(next(iter(mixed.values())))
            both = one if one == _name(cell) else f"{one}, beside {_name(cell)},"
            raise ValueError(
                f"{both} ({cell.suite}, {cell.protocol}, {cell.split}) has lines with another {', '.join(sorted(mixed))} each, "
                "whose figures do not belong in one table. Keep them in files, and reports, of their own, or measure one again."
            )


def _inputs(line: Line) -> dict[tuple[Any, ...], str]:
    """Returns the digests of a line, each under what all lines of a section with the same one of it have in common."""
    cell = line.cell
    inputs: dict[tuple[Any, ...], str] = {}
    trained = ("training_images", cell.task, cell.shots, cell.seed)
    template = line.results[0].template if line.results else None
    places = {"training_images": trained, "training_data": (*trained, template), "teacher_fingerprint": (cell.label,)}
    for name, digest in line.digests.items():
        if name.startswith("measured"):
            for result, of in zip(line.results, digest, strict=False):
                texts = (result.template,) if name == "measured_data" else ()
                inputs[name, (result.task, result.classes, cell.limit, *texts)] = of
        else:
            inputs[name, places.get(name)] = digest
    return {key: digest for key, digest in inputs.items() if digest}
