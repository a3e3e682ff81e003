"""The boards of a leaderboard, from benchmark lines and evaluations: on each, entries that may be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ..attacks import ThreatModel
from ..benchmark.lines import Line, read_lines
from ..benchmark.plan import shots_name
from ..evaluation import Verification
from ..results.card import saved_config
from ..results.evaluation import EVALUATION, ROBUST, Evaluation
from ..results.run import RESULTS, Records, RunResults
from ..tuner.fingerprint import adapter_fingerprint
from ..utils.embedded import embedded_name
from ..utils.files import read_json
from ..utils.markup import plain
from ..utils.text import counted, some
from .entries import (
    NO_IMAGES,
    ONLY_TRANSFER,
    TRANSFER,
    UNATTACKED,
    UNCHECKED,
    VERIFIED,
    BoardEntry,
    BoardKey,
    Entries,
    Score,
    entries_of_lines,
    split_way,
)

CONTRADICTED = "its images, weights and figures do not agree"


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
    missing = list(left_out)
    boards: Entries = entries_of_lines(_read(lines, missing), missing)
    for source in sources:
        try:
            for key, entry in list(_of_evaluation(source, missing)):  # all of them, or none
                boards.setdefault(key, []).append(entry)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            missing.append((source.name, plain(source.named(error))))
    made = (Board(*key, tuple(sorted(entries, key=_order))) for key, entries in boards.items() if entries)
    return Found(tuple(made), tuple(dict.fromkeys(missing)))


def _read(paths: Iterable[Path], missing: list[tuple[str, str]]) -> list[tuple[str, Line]]:
    """Returns the lines to show, of a cell and base model the last, with their files; others are added to what is missing."""
    shown: dict[Any, tuple[str, Line]] = {}
    for path in paths:
        name = path.name if path.is_absolute() else str(path)  # the page names no folders of this machine
        try:
            read = read_lines(path)
        except (OSError, ValueError) as error:
            missing.append((name, plain(str(error).replace(str(path), name))))
            continue
        for count, why in (
            (sum(line.cell.split != "test" for line in read), "of the split on which settings are chosen"),
            (sum(line.error is not None for line in read), "of runs that failed"),
        ):
            if count:
                missing.append((name, f"{counted(count, 'line is', 'lines are')} {why}"))
        for line in read:
            if line.cell.split == "test":
                shown[line.cell.key, line.digests.get("base_model_fingerprint")] = name, line
    return list(shown.values())


def _order(entry: BoardEntry) -> tuple[Any, ...]:
    value = -1.0 if entry.robust is None else entry.robust.value
    return bool(entry.unranked), -value, entry.method, entry.base, entry.defence


# ------------------------------------------------------------------------------------------------------------ evaluations


def _records(source: Source) -> tuple[Evaluation, RunResults | None]:
    """Returns an evaluation and, of an adapter's own, the record of the run; a ValueError if they are of other weights."""
    folder = source.path.parent
    if source.path.name != EVALUATION or not (folder / CONFIG_NAME).is_file():
        return Evaluation.load(source.path, with_examples=False), None
    base = saved_config(folder).base_model_fingerprint
    records = Records.read(folder, adapter_fingerprint(folder), base, names=(RESULTS, EVALUATION))
    if records.evaluation is None:
        raise ValueError("; ".join(records.unshown) or f"{EVALUATION} is not shown.")
    return records.evaluation, records.run


def _of_evaluation(source: Source, missing: list[tuple[str, str]]) -> Iterator[tuple[BoardKey, BoardEntry]]:
    """Yields the entries of an evaluation, one for each threat model, with their boards; or adds to what is missing."""
    evaluation, run = _records(source)
    configuration = evaluation.configuration
    task, data, model, defence = (dict(configuration.get(name) or {}) for name in ("task", "data", "model", "defence"))
    if task.get("split") not in (None, "test"):
        raise ValueError(f"it is of the {plain(task['split'], 40)} split, on which settings are chosen.")
    if not evaluation.worst_case:
        raise ValueError("it has no attack that knows the model.")
    base = (model.get("base") or {}).get("name") or model.get("callable") or "unknown"
    names = _method(run, model, source.name), _name(str(base)), str(defence.get("name") or "")
    images = f"{task.get('source') or 'unnamed data'}, {evaluation.clean.n} images ({data.get('fingerprint', '?')})"
    size = (model.get("pixels") or {}).get("size")
    for threat in evaluation.worst_case:
        protocol = evaluation.protocol
        if not defence and protocol is not None and evaluation.by_protocol(threat) is None:
            why = f"it says to be by the protocol {protocol.name}, but has no figure of its attacks at {threat}"
            missing.append((source.name, why))
            continue
        entry, attacks = _entry(names, source, evaluation, threat)
        # no length but L-inf means the same in images of another size
        sized = "" if threat.norm == "linf" or size is None else f", {plain(' x '.join(map(str, size)), 40)} pixels"
        yield BoardKey(str(configuration.get("protocol") or "as evaluated"), images + sized, threat, attacks), entry


def _entry(
    names: tuple[str, str, str], source: Source, evaluation: Evaluation, threat: ThreatModel
) -> tuple[BoardEntry, tuple[str, ...]]:
    """Returns the entry of an evaluation under a threat model, and the names of the attacks that were asked for."""
    defence = names[2]
    checked = source.verification or Verification()
    clean = evaluation.clean if checked.clean is None else checked.clean
    worst = checked.bounds.get(threat, evaluation.worst_case[threat])
    rows = [outcome for outcome in evaluation.attacks if outcome.threat_model == threat]
    adaptive = [o for o in rows if (o.way not in ("", TRANSFER) if defence else o.kind == ROBUST)]
    transfer = [o for o in rows if o.way == TRANSFER]
    # a defended model is attacked by more ways than were asked for, but by transfer with each attack that was
    asked = {split_way(outcome.name)[0] for outcome in (transfer if defence else adaptive)}
    before = None if evaluation.undefended is None else evaluation.undefended.worst_case.get(threat)
    raised = tuple(sign.name.replace("_", " ") for sign in evaluation.signs if sign.raised)
    unranked = "" if adaptive else ONLY_TRANSFER if defence else UNATTACKED
    if evaluation.images is not None and checked.problems:
        unranked = CONTRADICTED
    lowest = min((o.accuracy for o in transfer), key=lambda accuracy: accuracy.correct, default=None)
    entry = BoardEntry(
        *names,
        clean=Score.of(clean),
        robust=Score.of(worst) if adaptive else None,
        attacks=tuple(outcome.name for outcome in adaptive),
        transfer=Score.of(lowest) if adaptive and lowest is not None else None,
        undefended=None if before is None else Score.of(before),
        signs=raised if evaluation.signs else None,
        verified=source.verified if evaluation.images is not None else NO_IMAGES,
        link=source.link,
        place=source.name,
        unranked=unranked,
        decisions=clean.decisions,
    )
    return entry, tuple(sorted(asked))


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
