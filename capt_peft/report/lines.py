"""Reads the lines of benchmark runs: one cell of a benchmark a line, as JSON."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..attacks import ThreatModel
from ..evaluation import Accuracy

logger = logging.getLogger(__name__)

FEW_SHOT, BASE_TO_NEW, CROSS_DATASET, SHIFT = PROTOCOLS = ("few-shot", "base-to-new", "cross-dataset", "shift")
TRANSFERS = (CROSS_DATASET, SHIFT)  # trained on one task, measured on it and on others
WORST = "worst of "  # the share of images that none of several attacks broke
_OF_THE_BASE = ("base_model_fingerprint", "base_configuration", "processor")
Shots = int | str  # a number of images a class, or "all"


@dataclass(frozen=True)
class Result:
    """The accuracies of one cell on one task.

    Attributes:
        task: Name of the task that was measured.
        classes: "all", "base" or "new".
        clean: Accuracy without an attack.
        attacks: Accuracy under each attack, by its name; of several attacks also the worst case, by their names.
    """

    task: str
    classes: str
    clean: Accuracy
    attacks: Mapping[str, Accuracy]

    def merged(self, other: Result) -> Result:
        """Returns both results of the same model: every figure is the one of most images, of equal ones the other's."""
        attacks = {name: _larger(self.attacks.get(name), a) for name, a in other.attacks.items()}
        return replace(self, clean=_larger(self.clean, other.clean), attacks={**self.attacks, **attacks})


@dataclass(frozen=True)
class Cell:
    """One trained model, or a zero-shot one, with all that was measured on it.

    Attributes:
        suite: Name of the suite.
        protocol: "few-shot", "base-to-new", "cross-dataset" or "shift".
        method: Name of the method.
        variant: What was changed in the method; empty for the method itself.
        task: The task that it was trained on.
        shots: Images a class, or "all"; 0 where nothing was trained.
        seed: Seed of the run.
        split: The split that was measured.
        model: Name of the base model.
        threat: The threat model of the attacks, as in "L-inf 10/255".
        settings: All settings that the training depends on; None where every line of the cell failed.
        inputs: Digests of images and models, as far as the lines have them, by their names and what they are of: cells of one
            table have the same ones.
        results: What was measured; empty where every line of the cell failed.
        collapsed: How the training collapsed, if it did.
        failures: (attack, error) for every attack of a line that failed.
    """

    suite: str
    protocol: str
    method: str
    variant: str
    task: str
    shots: Shots
    seed: int
    split: str
    model: str
    threat: str
    settings: str | None = field(default=None, repr=False)
    inputs: Mapping[tuple[Any, ...], str] = field(default_factory=dict, repr=False, hash=False)
    results: tuple[Result, ...] = ()
    collapsed: str | None = None
    failures: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """The name of its row: the method, and the variant where there is one."""
        return f"{self.method} ({self.variant})" if self.variant else self.method

    @property
    def once(self) -> bool:
        """Whether nothing was trained, so that it stands for every number of shots and every seed."""
        return self.shots == 0

    @property
    def place(self) -> tuple[Any, ...]:
        """What no two cells have in common."""
        names = (self.suite, self.protocol, self.label, self.task, self.shots, self.seed, self.split)
        return (*names, self.model, self.threat)

    def has(self, attack: str) -> bool:
        """Whether it was measured under an attack."""
        return any(attack in result.attacks for result in self.results)

    def failure(self, attack: str) -> str | None:
        """Returns the error for which it has no figure under an attack; None if it has one, or was not to have one."""
        if self.has(attack) or not self.failures:
            return None
        # a cell without any figure counts as failed whatever its attacks were called
        return dict(self.failures).get(attack, None if self.results else self.failures[-1][1])

    def __str__(self) -> str:
        return f"{self.label} on {self.task}, {shots_name(self.shots)}, seed {self.seed}"

    def merged(self, other: Cell) -> Cell:
        """Returns the cell with another line of the same cell.

        Raises:
            ValueError: The lines are of different settings, images or weights.
        """
        _check_inputs([self, other])
        if None not in (self.settings, other.settings) and self.settings != other.settings:
            raise ValueError(
                f"{self} ({self.suite}, {self.protocol}, {self.split}) was run with different settings, which are: "
                f"{_differing(self.settings, other.settings)}. Give one of them a variant, so that it has a row of its own."
            )
        results = {(r.task, r.classes): r for r in self.results}
        for result in other.results:
            name = (result.task, result.classes)
            results[name] = results[name].merged(result) if name in results else result
        return replace(
            self,
            settings=other.settings if self.settings is None else self.settings,
            inputs={**self.inputs, **other.inputs},
            results=tuple(results.values()),
            collapsed=self.collapsed or other.collapsed,
            failures=(*self.failures, *other.failures),
        )


@dataclass(frozen=True)
class Section:
    """The cells that may stand in one table, since only method, task, shots and seed differ.

    Attributes:
        suite: Name of the suite.
        protocol: The protocol.
        split: The split that was measured.
        model: Name of the base model.
        threat: The threat model of the attacks.
        source: For cross-dataset and shift, the task that was trained on; otherwise None.
        cells: The cells.
    """

    suite: str
    protocol: str
    split: str
    model: str
    threat: str
    source: str | None
    cells: tuple[Cell, ...] = field(repr=False, default=())

    @property
    def shots(self) -> list[Shots]:
        """The numbers of shots that were trained with, "all" last; [0] where nothing was trained."""
        return sorted({cell.shots for cell in self.cells if not cell.once}, key=_shots_order) or [0]

    def at(self, shots: Shots) -> list[Cell]:
        """Returns the cells of a number of shots, with those that nothing was trained for."""
        return [cell for cell in self.cells if cell.once or cell.shots == shots]


def read_lines(paths: str | Path | Sequence[str | Path]) -> list[Cell]:
    """Reads the cells of one or several files of benchmark lines.

    Of lines with the same key the last one counts. Lines of one cell with different keys (other attacks, another limit) become
    one cell: an attack's figure is the one of most images, and so is the clean figure.

    Args:
        paths: A file, or several, in the order in which they were written.

    Returns:
        The cells, in the order of their first lines. A last line that was cut off is left out, with a warning in the log.

    Raises:
        ValueError: A line is broken, there is no line at all, or one cell was run with different settings.
    """
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    lines: dict[str, Cell] = {}
    for path in files:
        for key, cell in _read_file(path):
            lines.pop(key, None)  # so that the later line also stands at the later place
            lines[key] = cell
    if not lines:
        raise ValueError(f"There is no benchmark line in {', '.join(map(str, files)) or 'no file'}.")
    cells: dict[tuple[Any, ...], Cell] = {}
    for cell in lines.values():
        cells[cell.place] = cells[cell.place].merged(cell) if cell.place in cells else cell
    return list(cells.values())


def sections(cells: Sequence[Cell]) -> list[Section]:
    """Returns the cells in groups that may be compared, few-shot first.

    Raises:
        ValueError: Cells of one group are of different images, base models or processors.
    """
    groups: dict[Section, list[Cell]] = {}
    for cell in cells:
        source = cell.task if cell.protocol in TRANSFERS else None
        names = (cell.suite, cell.protocol, cell.split, cell.model, cell.threat)
        groups.setdefault(Section(*names, source), []).append(cell)
    for group in groups.values():
        _check_inputs(group)
    ordered = sorted(groups.items(), key=lambda item: PROTOCOLS.index(item[0].protocol))
    return [replace(section, cells=tuple(group)) for section, group in ordered]


def choose_attack(cells: Sequence[Cell], attack: str | None = None) -> str:
    """Returns the attack that robust accuracy is of.

    Args:
        cells: All cells.
        attack: The one that is asked for; by default the one that most cells have, or the worst case of several.

    Raises:
        ValueError: No cell has it.
    """
    counts = Counter(name for cell in cells for name in {name: 0 for result in cell.results for name in result.attacks})
    if not counts:
        raise ValueError(
            "No cell was measured under an attack: all of them failed, or were measured on clean images only."
        )
    if attack is not None and attack not in counts:
        raise ValueError(f"No cell was measured under {attack!r}. The attacks are {', '.join(sorted(counts))}.")
    return attack or max(counts, key=lambda name: (counts[name], name.startswith(WORST)))


def shots_name(shots: Shots) -> str:
    """Returns "1 shot", "4 shots" or "all shots"."""
    return f"{shots} shot{'' if shots == 1 else 's'}"


def _read_file(path: Path) -> Iterator[tuple[str, Cell]]:
    content = path.read_bytes()
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            parsed = json.loads(line)
        except ValueError as error:  # also where a letter of several bytes was cut off
            if number == len(lines):
                logger.warning("%s: the last line (%d) is cut off and left out.", path, number)
                return
            raise ValueError(f"{path}, line {number}: this is not JSON ({str(error)[:200]}).") from error
        try:
            yield parsed["key"], _cell(parsed)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: this is not a benchmark line ({repr(error)[:200]}).") from error


def _cell(line: Mapping[str, Any]) -> Cell:
    cell, status = line["cell"], line["status"]
    if status not in ("finished", "failed") or cell["protocol"] not in PROTOCOLS:
        raise ValueError(f"the status is {status!r} and the protocol {cell['protocol']!r}")
    if cell["shots"] != "all" and not isinstance(cell["shots"], int):
        raise ValueError(f"the number of shots is {cell['shots']!r}")
    names = ("suite", "protocol", "method", "task", "shots", "seed", "split", "model")
    threat = str(ThreatModel(cell["norm"], cell["epsilon"]))
    place = Cell(**{name: cell[name] for name in names}, variant=cell.get("variant") or "", threat=threat)
    if status == "failed":
        error = f"{line['error']['type']}: {line['error']['message']}"
        return replace(place, failures=tuple((attack, error) for attack in cell["attacks"] or [""]))
    settings = {"settings": cell.get("settings"), "prompts": cell.get("prompts")}
    return replace(
        place,
        settings=json.dumps(settings, sort_keys=True),
        inputs=_inputs(line, place),
        results=tuple(_result(result) for result in line["results"]),
        collapsed=(line.get("training") or {}).get("collapsed"),
    )


def _inputs(line: Mapping[str, Any], cell: Cell) -> dict[tuple[Any, ...], str]:
    """Returns the digests of a line, each under what all lines of a table with the same one of it have in common."""
    limit, results = line["cell"].get("limit"), line["results"]
    template = results[0].get("template") if results else None
    of = [(row["task"], row["classes"], limit) for row in results]
    texts = [(*key, row.get("template")) for key, row in zip(of, results, strict=True)]
    digests: dict[tuple[Any, ...], str | None] = {
        **{
            ("measured_images", *key): digest
            for key, digest in zip(of, line.get("measured_images") or (), strict=False)
        },
        **{
            ("measured_data", *key): digest for key, digest in zip(texts, line.get("measured_data") or (), strict=False)
        },
        ("training_images", cell.task, cell.shots, cell.seed): line.get("training_images"),
        ("training_data", cell.task, cell.shots, cell.seed, template): line.get("training_data"),
        ("teacher_fingerprint", cell.label): line.get("teacher_fingerprint"),
        **{(name,): line.get(name) for name in _OF_THE_BASE},
    }
    return {key: digest for key, digest in digests.items() if digest}


def _check_inputs(cells: Sequence[Cell]) -> None:
    """Raises a ValueError if the cells cannot stand in one table, as they are of different images or models."""
    first: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        mixed = {
            key: one for key in cell.inputs if (one := first.setdefault(key, cell)).inputs[key] != cell.inputs[key]
        }
        if mixed:
            names, one = sorted({str(key[0]) for key in mixed}), next(iter(mixed.values()))
            both = str(cell) if one.place == cell.place else f"{one}, beside {cell},"
            raise ValueError(
                f"{both} ({cell.suite}, {cell.protocol}, {cell.split}) has lines with another {', '.join(names)} each, whose "
                "figures do not belong in one table. Keep them in files, and reports, of their own, or measure one again."
            )


def _result(row: Mapping[str, Any]) -> Result:
    if why := contradiction(row):
        raise ValueError(why)
    attacks = {name: _accuracy(a) for name, a in row["attacks"].items()}
    if len(attacks) > 1 and "worst_case" in row:
        attacks[WORST + ", ".join(attacks)] = _accuracy(row["worst_case"])
    return Result(row["task"], row["classes"], _accuracy(row["clean"]), attacks)


def contradiction(row: Mapping[str, Any]) -> str | None:
    """Returns why the figures of a result cannot be, or None: an image counts under an attack only if it counts without.

    Args:
        row: One of the `results` of a line.

    Raises:
        KeyError, TypeError, AttributeError: A figure is missing.
    """
    clean, attacks, worst = row["clean"], row["attacks"], row.get("worst_case")
    counts = {"clean": clean, **attacks} | ({} if worst is None else {"the worst case": worst})
    for name, count in counts.items():
        if count["n"] < 1 or not 0 <= count["correct"] <= count["n"]:
            return f"{name}: {count['correct']} of {count['n']} is no accuracy"
        if count["n"] != clean["n"] or count["correct"] > clean["correct"]:
            return f"{name}: {_of(count)} cannot be beside {_of(clean)} of clean images"
    for name, count in attacks.items():
        if worst is not None and worst["correct"] > count["correct"]:
            return f"the worst case: {_of(worst)} cannot be beside {_of(count)} under {name}"
    return None


def _of(count: Mapping[str, Any]) -> str:
    return f"{count['correct']} of {count['n']}"


def _accuracy(row: Mapping[str, Any]) -> Accuracy:
    return Accuracy(row["correct"], row["n"])


def _larger(first: Accuracy | None, second: Accuracy) -> Accuracy:
    return first if first is not None and first.n > second.n else second


def _differing(first: str | None, second: str | None) -> str:
    one, two = (
        {**(s["settings"] or {}), "prompts": s["prompts"]} for s in map(json.loads, (first or "", second or ""))
    )
    names = sorted(name for name in {*one, *two} if one.get(name) != two.get(name))
    return ", ".join(f"{name} ({one.get(name)!r} and {two.get(name)!r})" for name in names)


def _shots_order(shots: Shots) -> tuple[bool, int]:
    return (True, 0) if isinstance(shots, str) else (False, shots)
