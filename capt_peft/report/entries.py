"""What a leaderboard ranks: one entry for each method, base and defence, on boards of entries that may be compared."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from peft.utils import CONFIG_NAME

from ..attacks import ThreatModel
from ..benchmark.lines import Line, Result, read_lines
from ..benchmark.plan import TRANSFERS, shots_name
from ..evaluation import Verification
from ..results.accuracy import Accuracy, wilson_interval
from ..results.card import saved_config
from ..results.defence import TRANSFER_ONLY, gone
from ..results.evaluation import EVALUATION, ROBUST, Evaluation
from ..results.run import RESULTS, Records, RunResults
from ..tuner.fingerprint import adapter_fingerprint
from ..utils.embedded import embedded_name
from ..utils.files import read_json
from ..utils.markup import plain
from ..utils.text import differences, some

logger = logging.getLogger(__name__)

TRANSFER = "transfer"  # the way of an attack that does not know the defence
NO_IMAGES, UNCHECKED, VERIFIED = "no images", "not checked", "verified"
ONLY_TRANSFER = "attacked by transfer alone, which says nothing of a defence"
UNATTACKED = "not measured under an attack"
CONTRADICTED = "its images, weights and figures do not agree"
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


@dataclass(frozen=True)
class Board:
    """Entries that may be compared: of the same protocol, images and threat model, under the same attacks.

    Attributes:
        protocol: The protocol.
        data: The data sets, and which of their images and classes.
        threat: The threat model.
        attacks: Names of the attacks that every entry withstood or not.
        entries: The entries: those with a rank first, by robust accuracy, the best first.
    """

    protocol: str
    data: str
    threat: ThreatModel
    attacks: tuple[str, ...]
    entries: tuple[BoardEntry, ...] = field(repr=False)

    @property
    def ranks(self) -> list[int | None]:
        """The rank of each entry, the same for equal figures; None for those without."""
        values = [None if entry.unranked or entry.robust is None else entry.robust.value for entry in self.entries]
        return [None if v is None else 1 + sum(o is not None and o > v for o in values) for v in values]


@dataclass(frozen=True)
class Found:
    """What was found for a leaderboard.

    Attributes:
        boards: The boards.
        left_out: Places that are not shown, each with the reason.
    """

    boards: tuple[Board, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Source:
    """An evaluation to show.

    Attributes:
        path: Its JSON file; beside it may be an adapter and the record of its run.
        name: What it is called: a repository, or a folder.
        link: Where its card is.
        verification: What scoring its worst-case images again has shown; None where nobody has.
    """

    path: Path
    name: str
    link: str = ""
    verification: Verification | None = None

    def named(self, error: Exception) -> str:
        """Returns an error's message without folders of this machine."""
        return str(error).replace(str(self.path), self.name).replace(str(self.path.parent), self.name)

    @property
    def verified(self) -> str:
        """As for `BoardEntry`, of an evaluation with images."""
        found = self.verification
        if found is None:
            return UNCHECKED
        if found.problems:
            return f"not verified: {plain(found.problems[0], 200)}"
        return (
            VERIFIED if found.verified else f"{UNCHECKED}: {plain(some(found.unchecked, 1) or 'nothing is known', 200)}"
        )


def collect(lines: Sequence[Path], sources: Iterable[Source], left_out: Iterable[tuple[str, str]] = ()) -> Found:
    """Returns the boards of benchmark lines and evaluations; what cannot be read or shown is listed with the reason.

    Args:
        lines: Files of lines.
        sources: Evaluations.
        left_out: Places that are known not to be shown.
    """
    boards: dict[tuple[Any, ...], list[BoardEntry]] = {}
    missing, shown = list(left_out), dict[Any, tuple[str, Line]]()  # of a cell the last line, as `read_lines` does
    for path in lines:
        name = path.name if path.is_absolute() else str(path)  # the page names no folders of this machine
        try:
            read = read_lines(path)
        except (OSError, ValueError) as error:
            missing.append((name, plain(str(error).replace(str(path), name))))
            continue
        for counted, why in (
            ([line for line in read if line.cell.split != "test"], "of the split on which settings are chosen"),
            ([line for line in read if line.error], "of runs that failed"),
        ):
            if counted:
                missing.append((name, f"{len(counted)} {'line is' if len(counted) == 1 else 'lines are'} {why}"))
        for line in read:
            if line.cell.split == "test":
                shown[line.cell.key, line.digests.get("base_model_fingerprint")] = name, line
    for key, entries in _of_lines(shown.values(), missing).items():
        boards.setdefault(key, []).extend(entries)
    for source in sources:
        try:
            for key, entry in _of_evaluation(source, missing):
                boards.setdefault(key, []).append(entry)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            missing.append((source.name, plain(source.named(error))))
    made = []
    for (protocol, data, norm, epsilon, attacks), of in boards.items():
        if of:
            made.append(Board(protocol, data, ThreatModel(norm, epsilon), attacks, tuple(sorted(of, key=_order))))
    return Found(tuple(made), tuple(dict.fromkeys(missing)))


def _order(entry: BoardEntry) -> tuple[Any, ...]:
    value = -1.0 if entry.robust is None else entry.robust.value
    return bool(entry.unranked), -value, entry.method, entry.base, entry.defence


# ------------------------------------------------------------------------------------------------------------------ lines


class _Row(NamedTuple):
    """What tells the rows of lines from each other."""

    method: str
    base: str
    defence: str
    weights: str  # the fingerprint of the base; "" in lines that have none


class _Measured(NamedTuple):
    """A result of a row, and where it stands."""

    place: str
    line: Line
    result: Result
    others: bool  # of other images than the first row's


def _of_lines(
    lines: Iterable[tuple[str, Line]], missing: list[tuple[str, str]]
) -> dict[tuple[Any, ...], list[BoardEntry]]:
    """Returns the entries of benchmark lines by their boards; what cannot be shown is added to what is missing."""
    runs: dict[tuple[Any, ...], dict[_Row, list[_Measured]]] = {}
    first: dict[tuple[Any, ...], str] = {}  # the digest of the images of a data set
    for place, line in lines:
        cell = line.cell
        row = _Row(
            f"{cell.method} ({cell.variant})" if cell.variant else cell.method, cell.model, cell.defence,
            str(line.digests.get("base_model_fingerprint", "")),
        )  # fmt: skip
        digests = line.digests.get("measured_images") or [None] * len(line.results)
        for result, digest in zip(line.results, digests, strict=False):
            if cell.protocol in TRANSFERS and result.task == cell.task:
                continue
            try:
                board = _board(line, result)
            except (ValueError, TypeError) as error:
                missing.append((place, plain(error)))
                continue
            images = cell.suite, result.task, result.classes, cell.limit
            others = bool(digest) and first.setdefault(images, digest) != digest
            runs.setdefault(board, {}).setdefault(row, []).append(_Measured(place, line, result, others))
    boards = [(key, rows) for key, of in runs.items() if key[2] != 0 for rows in _by_data(of)]
    alone: dict[tuple[Any, ...], dict[_Row, list[_Measured]]] = {}
    for key, of in runs.items():  # what was not tuned belongs beside every number of shots
        for row, measured in of.items() if key[2] == 0 else ():
            fitting = [rows for other, rows in boards if (*other[:2], 0, *other[3:]) == key]
            same = [rows for rows in fitting if _tasks(rows) == {each.result.task for each in measured}]
            for rows in same or fitting:
                tasks = _tasks(rows)
                if here := [each for each in measured if each.result.task in tasks]:
                    rows[row] = rows.get(row, []) + here
            if not fitting:
                alone.setdefault(key, {})[row] = measured
    boards += [(key, rows) for key, of in alone.items() for rows in _by_data(of)]
    found: dict[tuple[Any, ...], list[BoardEntry]] = {}
    for key, rows in boards:
        board, entries = _board_of_lines(key, rows, missing)
        found.setdefault(board, []).extend(entries)
    return found


def _tasks(rows: Mapping[_Row, Sequence[_Measured]]) -> set[str]:
    return {each.result.task for measured in rows.values() for each in measured}


def _by_data(rows: Mapping[_Row, list[_Measured]]) -> list[dict[_Row, list[_Measured]]]:
    """Returns rows in groups for a board each: those of the most data sets, and several that share fewer."""
    covered: dict[frozenset[str], dict[_Row, list[_Measured]]] = {}
    for row, measured in rows.items():
        covered.setdefault(frozenset(each.result.task for each in measured), {})[row] = measured
    most = max(covered, key=len)
    fewer = [tasks for tasks, of in covered.items() if tasks != most and len(of) > 1]
    rest = {row: measured for tasks, of in covered.items() if tasks not in fewer for row, measured in of.items()}
    return [rest, *(covered[tasks] for tasks in fewer)]


def _board_of_lines(
    key: tuple[Any, ...], rows: Mapping[_Row, Sequence[_Measured]], missing: list[tuple[str, str]]
) -> tuple[tuple[Any, ...], list[BoardEntry]]:
    """Returns a board and the entries of its rows; a row whose lines contradict each other is added to what is missing."""
    suite, protocol, shots, classes, norm, epsilon, limit, attacks, published, origin = key
    name = f"{protocol} from {origin}" if origin else protocol
    name += f", {shots_name(shots)}" if shots != 0 else ""
    name += f", by {published}" if published else ""
    runs = {}
    for row, measured in rows.items():
        try:
            runs[row] = _by_seed(measured)
        except ValueError as error:
            places = ", ".join(dict.fromkeys(each.place for each in measured))
            missing.append(
                (places, plain(f"{row.method} on {row.base} ({name}, {ThreatModel(norm, epsilon)}): {error}"))
            )
    tasks = sorted({task for of in runs.values() for results in of.values() for task in results})
    several = f"mean of {len(tasks)} data sets" + (f" ({', '.join(tasks)})" if 1 < len(tasks) < 5 else "")
    data = f"{suite}, {several if len(tasks) > 1 else ''.join(tasks)}"
    data += "" if classes == "all" else f", {classes} classes"
    data += "" if limit is None else f", up to {limit} images each"
    weights = {base: {row.weights for row in rows if row.base == base} for base in {row.base for row in rows}}
    entries = []
    for row, of in runs.items():
        told = f"{row.base} ({row.weights or 'unknown weights'})" if len(weights[row.base]) > 1 else row.base
        entry = _of_runs((row.method, told, row.defence), of, tasks)
        others = any(each.others for each in rows[row])
        entries.append(replace(entry, unranked="measured on other images") if others else entry)
    return (name, data, norm, epsilon, attacks), entries


def _by_seed(measured: Sequence[_Measured]) -> dict[int, dict[str, Result]]:
    """Returns the results of a row by seed and data set; a ValueError says which of its lines do not belong together."""
    found: dict[int, dict[str, Result]] = {}
    for _, line, result, _ in measured:
        one, other = (
            {**each.cell.settings, "prompts": each.cell.prompts} for each in (measured[0].line, line)
        )  # of the whole row, as its figure is the mean over seeds and data sets
        differing = [
            f"{'.'.join(map(str, path))} ({a!r} and {b!r})"
            for path, a, b in differences(one, other, missing="not given")
        ]
        known = measured[0].line.digests
        differing += [n for n in _MODEL if n in known and n in line.digests and known[n] != line.digests[n]]
        if differing:
            raise ValueError(f"its lines differ in {some(differing)}; give one of them a variant, or a page of its own")
        seed = line.cell.seed
        if found.setdefault(seed, {}).setdefault(result.task, result) != result:
            raise ValueError(f"two of its lines have other figures each for {result.task}, seed {seed}")
    return found


def _board(line: Line, result: Result) -> tuple[Any, ...]:
    """Returns what the rows of a board have in common; a ValueError says why a line belongs on none."""
    cell, threat = line.cell, line.cell.threat
    line.check_step_size()
    if cell.evaluation_protocol and result.by_protocol is None:
        raise ValueError(f"{cell}: no figure of the protocol {cell.evaluation_protocol}, by which it says to be")
    # a defended model is attacked by more ways than were asked for, but by transfer with each attack that was
    named = [_split(name) for name in result.attacks]
    attacks = tuple(sorted({name for name, way in named if not cell.defence or way == TRANSFER}))
    of_images = result.classes, threat.norm, threat.epsilon, cell.limit, attacks
    origin = cell.task if cell.protocol in TRANSFERS else ""
    return cell.suite, cell.protocol, cell.shots, *of_images, cell.evaluation_protocol or "", origin


def _split(name: str) -> tuple[str, str]:
    """Returns the name of an attack and, of one on a defended classifier, its way; else ""."""
    found = _WAY.fullmatch(name)
    return (found["attack"], found["way"]) if found else (name, "")


def _of_runs(row: tuple[str, str, str], runs: Mapping[int, Mapping[str, Result]], tasks: Sequence[str]) -> BoardEntry:
    """Returns the entry of a method from its results by seed and data set."""
    method, base, defence = row
    whole = [[results[task] for task in tasks] for results in runs.values() if len(results) == len(tasks)]
    unranked = "" if whole else "not measured on all of the data sets"
    seeds = whole or [list(results.values()) for results in list(runs.values())[:1]]
    results = [result for of_seed in seeds for result in of_seed]
    names = tuple(dict.fromkeys(name for result in results for name in result.attacks))
    adaptive = [name for name in names if not defence or _split(name)[1] != TRANSFER]
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
    found = [accuracy for name, accuracy in result.attacks.items() if _split(name)[1] == TRANSFER]
    return min(found, key=lambda accuracy: accuracy.correct, default=None)


def _signs(robust: Score | None, transfer: Score | None, undefended: Score | None) -> tuple[str, ...] | None:
    """Returns whether a defence helps against the attack that does not know it, and against no other."""
    if robust is None or transfer is None or undefended is None:
        return None
    lost = gone(transfer.value, undefended.value, robust.value)
    return ("gains in transfer only",) if lost > TRANSFER_ONLY else ()


# ------------------------------------------------------------------------------------------------------------ evaluations


def _of_evaluation(source: Source, missing: list[tuple[str, str]]) -> list[tuple[tuple[Any, ...], BoardEntry]]:
    """Returns the entries of an evaluation, one for each threat model, with their boards; or adds to what is missing."""
    folder = source.path.parent
    if source.path.name == EVALUATION and (folder / CONFIG_NAME).is_file():
        base = saved_config(folder).base_model_fingerprint
        records = Records.read(folder, adapter_fingerprint(folder), base, names=(RESULTS, EVALUATION))  # or it raises
        evaluation, run = records.evaluation, records.run
        if evaluation is None:
            raise ValueError("; ".join(records.unshown) or f"{EVALUATION} is not shown.")
    else:
        evaluation, run = Evaluation.load(source.path, with_examples=False), None
    configuration = evaluation.configuration
    task = dict(configuration.get("task") or {})
    data, model = dict(configuration.get("data") or {}), dict(configuration.get("model") or {})
    if task.get("split") not in (None, "test"):
        raise ValueError(f"it is of the {plain(task['split'], 40)} split, on which settings are chosen.")
    if not evaluation.worst_case:
        raise ValueError("it has no attack that knows the model.")
    defence = str((configuration.get("defence") or {}).get("name") or "")
    of_data = f"{task.get('source') or 'unnamed data'}, {evaluation.clean.n} images ({data.get('fingerprint', '?')})"
    protocol = str(configuration.get("protocol") or "as evaluated")
    verified = source.verified if evaluation.images is not None else NO_IMAGES
    checked = source.verification or Verification()
    clean = evaluation.clean if checked.clean is None else checked.clean
    base = (model.get("base") or {}).get("name") or model.get("callable") or "unknown"
    found = []
    for threat, told in evaluation.worst_case.items():
        if not defence and evaluation.protocol is not None and evaluation.by_protocol(threat) is None:
            why = f"it says to be by the protocol {evaluation.protocol.name}, but has no figure of its attacks at {threat}"
            missing.append((source.name, why))
            continue
        worst = checked.bounds.get(threat, told)
        rows = [outcome for outcome in evaluation.attacks if outcome.threat_model == threat]
        adaptive = [o for o in rows if (o.way not in ("", TRANSFER) if defence else o.kind == ROBUST)]
        transfer = [o for o in rows if o.way == TRANSFER]
        # a defended model is attacked by more ways than were asked for, but by transfer with each attack that was
        asked = {_split(outcome.name)[0] for outcome in (transfer if defence else adaptive)}
        before = None if evaluation.undefended is None else evaluation.undefended.worst_case.get(threat)
        raised = tuple(sign.name.replace("_", " ") for sign in evaluation.signs if sign.raised)
        signs = raised if evaluation.signs else None
        shown = bool(adaptive)
        unranked = "" if shown else ONLY_TRANSFER if defence else UNATTACKED
        if evaluation.images is not None and checked.problems:
            unranked = CONTRADICTED
        entry = BoardEntry(
            _method(run, model, source.name), _name(str(base)), defence, Score.of(clean),
            Score.of(worst) if shown else None, tuple(o.name for o in adaptive),
            Score.of(min((o.accuracy for o in transfer), key=lambda a: a.correct)) if shown and transfer else None,
            None if before is None else Score.of(before), signs=signs, verified=verified, link=source.link, place=source.name,
            unranked=unranked, decisions=clean.decisions,
        )  # fmt: skip
        # no length but L-inf means the same in images of another size
        size = (model.get("pixels") or {}).get("size") if threat.norm != "linf" else None
        images = of_data if size is None else f"{of_data}, {plain(' x '.join(map(str, size)), 40)} pixels"
        found.append(((protocol, images, threat.norm, threat.epsilon, tuple(sorted(asked))), entry))
    return found


def _method(run: RunResults | None, model: Mapping[str, Any], name: str) -> str:
    if run is not None:
        return f"{run.method}, {shots_name(run.task.shots)}" if run.task.shots else run.method
    return Path(name).name if model.get("adapter") else "zero-shot"


def _name(base: str) -> str:
    """Returns the name of a base: of an embedded model its own, of a folder the last part."""
    return embedded_name(base) or (Path(base).name if base.startswith((".", "/", "~")) else base)


def is_evaluation(path: Path) -> bool:
    """Tells whether a JSON file holds an evaluation; a damaged one may."""
    try:
        return read_json(path).get("kind") == "evaluation"
    except (OSError, ValueError):
        return path.name == EVALUATION


def told_by(path: Path) -> tuple[str, str]:
    """Returns two texts on an evaluation's file: what was measured and how, and the figures. Copies have both in common.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, ArithmeticError: The file is damaged, or its figures cannot be true.
    """
    content = Evaluation.from_dict(read_json(path)).to_dict()
    how = [content["configuration"], [row["attack"] for row in content["attacks"]]]
    names = ("clean", "attacks", "worst_case", "union", "undefended", "signs", "images")
    return json.dumps(how, sort_keys=True), json.dumps([content.get(name) for name in names], sort_keys=True)
