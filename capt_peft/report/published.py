"""Our figures beside published ones (`published.yaml`): the same experiment, attack and data sets, and how far apart they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import pandas as pd

from ..attacks import ThreatModel
from ..benchmark.suites import get_suite
from ..utils.files import read_entries, written_whole
from ..utils.text import some
from .sections import WORST, Section, read_sections
from .statistics import CLEAN, ROBUST, Rows, rows_of
from .tables import LISTED, MISSING, PREAMBLE, Table, about

SUITE = "paper"
NAMES = ("published.md", "published.tex")
NO_FIGURES = "CAPT's paper (arXiv 2405.11154) gives no figure that could be read, so none stands beside capt."
MEANING = (
    "Clean / robust accuracy in percent; measured here: the mean ± sample standard deviation over seeds. Difference: here minus "
    "published, in points."
)


class Figure(NamedTuple):
    """Clean and robust accuracy in percent; None is not given."""

    clean: float | None
    robust: float | None


@dataclass(frozen=True)
class Published:
    """A published table: the fields of `published.yaml`."""

    name: str
    title: str
    source: str
    protocol: str | None
    attack: str
    experiment: str
    columns: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, Sequence[str]]
    attacks: Sequence[str] = ()
    not_comparable: Sequence[str] = ()

    def figure(self, row: str, place: int) -> Figure:
        """Returns the published figure of a row in a column."""
        values = self.rows[row][1 + place].split("/")
        return Figure(*(None if value == MISSING else float(value) for value in values))

    def is_of(self, section: Section) -> bool:
        """Whether the runs of a section are those of this table, at one of its radii."""
        radii = [str(ThreatModel("linf", column["epsilon"])) for column in self.columns.values()]
        same = (section.suite, section.protocol, section.evaluation_protocol, section.split)
        by_attacks = not self.attacks or section.attack == WORST + ", ".join(self.attacks)
        return same == (SUITE, self.experiment, self.protocol or "", "test") and section.threat in radii and by_attacks


def known_tables() -> list[Published]:
    """Returns all published tables, as `published.yaml` has them."""
    entries = read_entries(files(__package__) / "published.yaml")
    return [Published(name=name, **entry) for name, entry in entries.items()]


def write_published(
    lines: str | Path | Sequence[str | Path], folder: str | Path, notes: Sequence[str] = ()
) -> list[Path]:
    """Writes published tables with our figures beside theirs, as Markdown and LaTeX; those of which nothing was run are left out.

    Args:
        lines: As for `read_sections`.
        folder: Where to write `NAMES`.
        notes: What else is to be said of all figures.

    Returns:
        The paths of the files.

    Raises:
        ValueError: See `read_sections`.
    """
    sections = read_sections(lines)
    tables = [table for published in known_tables() for table in _tables(published, sections)]
    said = [MEANING, NO_FIGURES, *notes]
    with written_whole(folder) as temporary:
        markdown = ["# Measured beside published", *said, *(table.markdown() for table in tables)]
        (temporary / NAMES[0]).write_text("\n\n".join(markdown).rstrip() + "\n", encoding="utf-8")
        (temporary / NAMES[1]).write_text("\n".join([PREAMBLE, *(table.latex() for table in tables)]), encoding="utf-8")
    return [Path(folder, name) for name in NAMES]


def _tables(published: Published, sections: Sequence[Section]) -> Iterator[Table]:
    """Yields a table for each base model, or pair of them, that something of a published table was run on."""
    found = [section for section in sections if published.is_of(section)]
    by_threat: dict[str, list[Section]] = {}
    for section in found:
        by_threat.setdefault(section.threat, []).append(section)
    for place in range(max(map(len, by_threat.values()), default=0)):
        chosen = {threat: of[place] for threat, of in by_threat.items() if place < len(of)}
        yield _table(published, chosen)


def _table(published: Published, sections: Mapping[str, Section]) -> Table:
    """Returns a published table with ours beside it; `sections` are ours by threat model."""
    rows, entries, incomplete = _row_names(published, sections), [], []
    for place, (column, of) in enumerate(published.columns.items()):
        section = sections.get(str(ThreatModel("linf", of["epsilon"])))
        scores = None if section is None else rows_of(section, of["shots"])
        for name, method in rows.items():
            theirs = published.figure(name, place) if name in published.rows else Figure(None, None)
            ours, missing = _measured(scores, method, of)
            if missing:
                incomplete.append(f"{method} at {column} ({missing})")
            entries.append((name, {("", "at"): column, ("", "published"): _theirs(theirs), **_ours(ours, theirs)}))
    frame = pd.DataFrame([values for _, values in entries], index=[name for name, _ in entries])
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    notes = [f"Published: {published.source}. Robust: under {published.attack}."]
    notes += [f"Here: {sentence}" for section in sections.values() for sentence in about(section, section.runs)]
    if incomplete:
        notes.append(f"Not averaged, as data sets are missing: {some(incomplete, LISTED)}.")
    notes += [f"Not comparable: {sentence}." for sentence in published.not_comparable]
    return Table(f"{published.title}: published and measured", frame, notes)


def _row_names(published: Published, sections: Mapping[str, Section]) -> dict[str, str]:
    """Returns the method here by the name of the row: the published rows, then what only we have; CAPT is last."""
    names = {name: method for name, (method, *_) in published.rows.items()}
    labels = list(dict.fromkeys(label for section in sections.values() for label in rows_of(section).labels))
    return {**names, **{label: label for label in labels if label not in names.values()}}


Measured = dict[str, tuple[float, float | None]]  # mean and spread of clean and of robust accuracy


def _measured(rows: Rows | None, label: str, column: Mapping[str, Any]) -> tuple[Measured, str]:
    """Returns what was measured of a column, averaged over its data sets for each seed, and how many of them are missing.

    A seed counts only with all data sets; what is incomplete for every seed is not averaged.
    """
    if rows is None or label not in rows.scores.index.get_level_values("label"):
        return {}, ""
    tasks = [column["tasks"]] if "tasks" in column else list(get_suite(SUITE).tasks)
    scores = rows.scores.xs(label, level="label")
    half = f"{column['classes']} " if "classes" in column else ""
    scores = scores[scores.index.isin(tasks, level="task")]
    by_seed = [of for _, of in scores.groupby("seed")]
    whole = [of for of in by_seed if len(of) == len(tasks)]
    if not whole:
        most = max(map(len, by_seed), default=0)
        return {}, f"{most} of {len(tasks)}" if most else ""
    found: Measured = {}
    for measure in (CLEAN, ROBUST):
        means = [fmean(of[half + measure]) for of in whole]
        spread = stdev(means) if len(means) > 1 and label not in rows.once else None
        found[measure] = fmean(means), spread
    return found, ""


def _theirs(figure: Figure) -> str:
    return MISSING if figure == (None, None) else " / ".join(MISSING if v is None else f"{v:.2f}" for v in figure)


def _ours(measured: Measured, theirs: Figure) -> dict[tuple[str, str], str]:
    if not measured:
        return {("", "here"): MISSING, ("", "difference"): MISSING}
    here = [f"{mean:.1f}" + ("" if spread is None else f" ± {spread:.1f}") for mean, spread in measured.values()]
    pairs = zip(measured.values(), theirs, strict=True)
    apart = [MISSING if published is None else f"{mean - published:+.1f}" for (mean, _), published in pairs]
    return {
        ("", "here"): " / ".join(here),
        ("", "difference"): MISSING if set(apart) == {MISSING} else " / ".join(apart),
    }
