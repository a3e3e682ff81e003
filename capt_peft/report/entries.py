"""The rows of a leaderboard, what decides which of them stand on one board, and the rows of benchmark lines."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import NamedTuple

from ..attacks import ThreatModel
from ..benchmark.lines import Line, Result
from ..benchmark.plan import TRANSFERS, shots_name
from ..results.accuracy import Accuracy, wilson_interval
from ..results.defence import TRANSFER_ONLY, gone
from ..utils.markup import plain
from ..utils.text import some
from .sections import differing_settings

TRANSFER = "transfer"  # the way of an attack that does not know the defence
NO_IMAGES, UNCHECKED, VERIFIED = "no images", "not checked", "verified"
ONLY_TRANSFER = "attacked by transfer alone, which says nothing of a defence"
UNATTACKED = "not measured under an attack"
_MODEL = ("base_configuration", "processor", "teacher_fingerprint")  # digests of what else a row's runs have in common
_WAY = re.compile(r"(?P<attack>.*) \((?P<way>[\w-]+)\)")


@dataclass(frozen=True)
class Score:
    """An accuracy on a leaderboard.

    Args:
        value: The share of images, in [0, 1]; the mean over data sets and then over seeds, where there are several.
        n: Images that it is a share of, of all data sets together.
        spread: Sample standard deviation over seeds; None with one.
    """

    value: float
    n: int
    spread: float | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson interval of the share of n images. It knows the images, not the seeds."""
        return wilson_interval(self.value * self.n, self.n)

    @classmethod
    def of(cls, accuracy: Accuracy) -> Score:
        """Returns the score of one measurement."""
        return cls(accuracy.value, accuracy.n)

    @classmethod
    def over(cls, seeds: Sequence[Sequence[Accuracy]]) -> Score:
        """Returns the score of several seeds, each with the accuracies on the same data sets."""
        values = [mean(accuracy.value for accuracy in of_seed) for of_seed in seeds]
        n = sum(accuracy.n for accuracy in seeds[0])
        return cls(mean(values), n, stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class BoardEntry:
    """One row.

    Attributes:
        method: Method, and variant or shots where these tell it from others.
        base: The CLIP.
        defence: The defence at test time; "" for none.
        clean: Clean accuracy.
        robust: Worst case over all attacks; None where a defence was attacked by transfer alone.
        attacks: The attacks of the worst case, as they are called.
        transfer: Accuracy under the attack that does not know the defence; None without one.
        undefended: Worst case of the same images without the defence; None where it is not known.
        seeds: How many runs.
        signs: Raised signs of masked gradients, as words; None where none was looked for.
        verified: `VERIFIED`, `UNCHECKED`, `NO_IMAGES`, or one of "not checked: ..." and "not verified: ..." with the reason.
        link: Where its card is; "" for nowhere.
        place: The file that it was read from.
        unranked: Why it has no rank; "" if it has one.
        decisions: Decisions on each image, of a classifier that answers at random.
    """

    method: str
    base: str
    defence: str
    clean: Score
    robust: Score | None
    attacks: tuple[str, ...]
    transfer: Score | None = None
    undefended: Score | None = None
    seeds: int = 1
    signs: tuple[str, ...] | None = None
    verified: str = NO_IMAGES
    link: str = ""
    place: str = ""
    unranked: str = ""
    decisions: int = 1


class BoardKey(NamedTuple):
    """What all entries of a board have in common; the attributes are those of `Board`."""

    protocol: str
    data: str
    threat: ThreatModel
    attacks: tuple[str, ...]


Entries = dict[BoardKey, list[BoardEntry]]


def split_way(name: str) -> tuple[str, str]:
    """Returns the name of an attack and, of one on a defended classifier, its way; else ""."""
    found = _WAY.fullmatch(name)
    return (found["attack"], found["way"]) if found else (name, "")


# ------------------------------------------------------------------------------------------------------------------ lines


class _Row(NamedTuple):
    """What tells the rows of lines from each other."""

    method: str
    base: str
    defence: str
    weights: str  # the fingerprint of the base; "" in lines that have none

    @classmethod
    def of(cls, line: Line) -> _Row:
        cell = line.cell
        method = f"{cell.method} ({cell.variant})" if cell.variant else cell.method
        return cls(method, cell.model, cell.defence, str(line.digests.get("base_model_fingerprint", "")))


class _Group(NamedTuple):
    """What the results of a board's rows have in common, but for the data sets."""

    suite: str
    protocol: str
    shots: int | str  # 0 of what was not tuned
    classes: str
    threat: ThreatModel
    limit: int | None
    attacks: tuple[str, ...]
    published: str  # the published protocol
    origin: str  # the data set of the tuning, where it is none of those that are measured

    @classmethod
    def of(cls, line: Line, result: Result) -> _Group:
        """Returns the group of a result; a ValueError says why a line belongs on no board."""
        cell = line.cell
        line.check_step_size()
        if cell.evaluation_protocol and result.by_protocol is None:
            raise ValueError(f"{cell}: no figure of the protocol {cell.evaluation_protocol}, by which it says to be")
        # a defended model is attacked by more ways than were asked for, but by transfer with each attack that was
        named = [split_way(name) for name in result.attacks]
        attacks = tuple(sorted({name for name, way in named if not cell.defence or way == TRANSFER}))
        origin = cell.task if cell.protocol in TRANSFERS else ""
        of_images = result.classes, cell.threat, cell.limit, attacks
        return cls(cell.suite, cell.protocol, cell.shots, *of_images, cell.evaluation_protocol or "", origin)

    @property
    def name(self) -> str:
        """The protocol of the board: "few-shot, 16 shots, by fap"."""
        name = f"{self.protocol} from {self.origin}" if self.origin else self.protocol
        name += f", {shots_name(self.shots)}" if self.shots != 0 else ""
        return name + (f", by {self.published}" if self.published else "")

    def board(self, tasks: Sequence[str]) -> BoardKey:
        """Returns the board of rows on these data sets."""
        several = f"mean of {len(tasks)} data sets" + (f" ({', '.join(tasks)})" if 1 < len(tasks) < 5 else "")
        data = f"{self.suite}, {several if len(tasks) > 1 else ''.join(tasks)}"
        data += "" if self.classes == "all" else f", {self.classes} classes"
        data += "" if self.limit is None else f", up to {self.limit} images each"
        return BoardKey(self.name, data, self.threat, self.attacks)


class _Measured(NamedTuple):
    """A result of a row, and where it stands."""

    place: str
    line: Line
    result: Result
    others: bool  # of other images than the first row's


_Rows = dict[_Row, list[_Measured]]


def entries_of_lines(lines: Iterable[tuple[str, Line]], missing: list[tuple[str, str]]) -> Entries:
    """Returns the entries of benchmark lines by their boards.

    Args:
        lines: Each line, and the place that it was read from.
        missing: What cannot be shown is added to it: its place, and the reason.
    """
    groups = _grouped(lines, missing)
    boards = [(group, rows) for group, of in groups.items() if group.shots != 0 for rows in _by_data(of)]
    tuned = list(boards)
    for group, of in groups.items():  # what was not tuned belongs beside every number of shots
        alone: _Rows = {}
        for row, measured in of.items() if group.shots == 0 else ():
            fitting = [rows for other, rows in tuned if other._replace(shots=0) == group]
            same = [rows for rows in fitting if _tasks(rows) == {each.result.task for each in measured}]
            for rows in same or fitting:
                tasks = _tasks(rows)
                if here := [each for each in measured if each.result.task in tasks]:
                    rows[row] = rows.get(row, []) + here
            if not fitting:
                alone[row] = measured
        if alone:
            boards += [(group, rows) for rows in _by_data(alone)]
    found: Entries = {}
    for group, rows in boards:
        board, entries = _on_board(group, rows, missing)
        found.setdefault(board, []).extend(entries)
    return found


def _grouped(lines: Iterable[tuple[str, Line]], missing: list[tuple[str, str]]) -> dict[_Group, _Rows]:
    """Returns the results of lines by their group and row; a line that belongs on no board is added to what is missing."""
    found: dict[_Group, _Rows] = {}
    first: dict[tuple[str, str, str, int | None], str] = {}  # the digest of the images of a data set
    for place, line in lines:
        cell = line.cell
        digests = line.digests.get("measured_images") or [None] * len(line.results)
        for result, digest in zip(line.results, digests, strict=False):
            if cell.protocol in TRANSFERS and result.task == cell.task:
                continue
            try:
                group = _Group.of(line, result)
            except (ValueError, TypeError) as error:
                missing.append((place, plain(error)))
                continue
            images = cell.suite, result.task, result.classes, cell.limit
            others = bool(digest) and first.setdefault(images, digest) != digest
            found.setdefault(group, {}).setdefault(_Row.of(line), []).append(_Measured(place, line, result, others))
    return found


def _tasks(rows: _Rows) -> set[str]:
    return {each.result.task for measured in rows.values() for each in measured}


def _by_data(rows: _Rows) -> list[_Rows]:
    """Returns rows in groups for a board each: those of the most data sets, and several that share fewer."""
    covered: dict[frozenset[str], _Rows] = {}
    for row, measured in rows.items():
        covered.setdefault(frozenset(each.result.task for each in measured), {})[row] = measured
    most = max(covered, key=len)
    fewer = [tasks for tasks, of in covered.items() if tasks != most and len(of) > 1]
    rest = {row: measured for tasks, of in covered.items() if tasks not in fewer for row, measured in of.items()}
    return [rest, *(covered[tasks] for tasks in fewer)]


def _on_board(group: _Group, rows: _Rows, missing: list[tuple[str, str]]) -> tuple[BoardKey, list[BoardEntry]]:
    """Returns a board and the entries of its rows; a row whose lines contradict each other is added to what is missing."""
    runs = {}
    for row, measured in rows.items():
        try:
            runs[row] = _by_seed(measured)
        except ValueError as error:
            places = ", ".join(dict.fromkeys(each.place for each in measured))
            where = f"{row.method} on {row.base} ({group.name}, {group.threat})"
            missing.append((places, plain(f"{where}: {error}")))
    tasks = sorted({task for of in runs.values() for results in of.values() for task in results})
    weights = {base: {row.weights for row in rows if row.base == base} for base in {row.base for row in rows}}
    entries = []
    for row, of in runs.items():
        told = f"{row.base} ({row.weights or 'unknown weights'})" if len(weights[row.base]) > 1 else row.base
        entry = _of_runs(row._replace(base=told), of, tasks)
        others = any(each.others for each in rows[row])
        entries.append(replace(entry, unranked="measured on other images") if others else entry)
    return group.board(tasks), entries


def _by_seed(measured: Sequence[_Measured]) -> dict[int, dict[str, Result]]:
    """Returns the results of a row by seed and data set; a ValueError says which of its lines do not belong together."""
    found: dict[int, dict[str, Result]] = {}
    first = measured[0].line
    for _, line, result, _ in measured:
        # of the whole row, as its figure is the mean over seeds and data sets
        differing, known = differing_settings(first.cell, line.cell), first.digests
        differing += [n for n in _MODEL if n in known and n in line.digests and known[n] != line.digests[n]]
        if differing:
            raise ValueError(f"its lines differ in {some(differing)}; give one of them a variant, or a page of its own")
        seed = line.cell.seed
        if found.setdefault(seed, {}).setdefault(result.task, result) != result:
            raise ValueError(f"two of its lines have other figures each for {result.task}, seed {seed}")
    return found


def _of_runs(row: _Row, runs: Mapping[int, Mapping[str, Result]], tasks: Sequence[str]) -> BoardEntry:
    """Returns the entry of a method from its results by seed and data set."""
    method, base, defence, _ = row
    whole = [[results[task] for task in tasks] for results in runs.values() if len(results) == len(tasks)]
    unranked = "" if whole else "not measured on all of the data sets"
    seeds = whole or [list(results.values()) for results in list(runs.values())[:1]]
    results = [result for of_seed in seeds for result in of_seed]
    names = tuple(dict.fromkeys(name for result in results for name in result.attacks))
    adaptive = [name for name in names if not defence or split_way(name)[1] != TRANSFER]
    robust = _over(seeds, _worst) if adaptive else None
    transfer = _over(seeds, _transfer) if defence and adaptive else None
    undefended = _over(seeds, lambda result: result.undefended and result.undefended[1]) if defence else None
    if robust is None:
        unranked = ONLY_TRANSFER if defence else UNATTACKED
    clean = Score.over([[result.clean for result in of_seed] for of_seed in seeds])
    return BoardEntry(
        method, base, defence, clean, robust, tuple(adaptive), transfer, undefended,
        seeds=len(seeds), signs=_signs(robust, transfer, undefended), unranked=unranked, decisions=results[0].clean.decisions,
    )  # fmt: skip


def _over(seeds: Sequence[Sequence[Result]], figure: Callable[[Result], Accuracy | None]) -> Score | None:
    """Returns the score of one figure of results; None where one of them lacks it."""
    found = [[of for of in map(figure, of_seed) if of is not None] for of_seed in seeds]
    return Score.over(found) if [len(of) for of in found] == [len(of) for of in seeds] else None


def _worst(result: Result) -> Accuracy | None:
    if result.worst_case is not None:
        return result.worst_case
    return next(iter(result.attacks.values())) if len(result.attacks) == 1 else None


def _transfer(result: Result) -> Accuracy | None:
    found = [accuracy for name, accuracy in result.attacks.items() if split_way(name)[1] == TRANSFER]
    return min(found, key=lambda accuracy: accuracy.correct, default=None)


def _signs(robust: Score | None, transfer: Score | None, undefended: Score | None) -> tuple[str, ...] | None:
    """Returns whether a defence helps against the attack that does not know it, and against no other."""
    if robust is None or transfer is None or undefended is None:
        return None
    lost = gone(transfer.value, undefended.value, robust.value)
    return ("gains in transfer only",) if lost > TRANSFER_ONLY else ()
