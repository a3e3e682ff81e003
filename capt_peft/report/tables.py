"""The tables of a benchmark, as Markdown and as LaTeX, and the sentences under them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from ..attacks import known_protocols
from ..benchmark.plan import QUICK_LIMIT, Shots, shots_name
from ..utils.markup import Markdown, escape, table_row
from ..utils.text import some
from .sections import BY_PROTOCOL, Section
from .statistics import CLEAN, GAP, HARMONIC, OURS, ROBUST, Difference, Rows, compare, compare_variants, rows_of

PREAMBLE = "% needs \\usepackage{booktabs,adjustbox}"
BOOTSTRAP = (
    "Intervals: 95% percentile bootstrap of 10,000 draws over tasks and, within a task, seeds. "
    "They know the tasks and seeds that were run, and are too narrow where those are few."
)
QUICK_NOTE = (
    f"A quick run: figures of at most {QUICK_LIMIT} images of a data set show that everything works, and say nothing about which "
    "method is better."
)
LISTED = 12  # longer lists are cut, with the number of what is left out
MISSING = "-"
_BOLD = re.compile(r"\*\*(.*?)\*\*")
_WORDS = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
_LATEX = str.maketrans(_WORDS | {letter: f"\\{letter}" for letter in "&%$#_{}"})


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: What it shows.
        entries: Numbers as Markdown, by the name of the row; columns are pairs of a group, "" for none, and a name.
        notes: Sentences under the table.
    """

    title: str
    entries: pd.DataFrame
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """Returns the table as Markdown."""
        header = ["", *(f"{group}, {name}" if group else name for group, name in self.entries)]
        lines = [f"### {escape(self.title)}", "", table_row(header), "|" + "---|" * len(header)]
        lines += [table_row([label, *map(Markdown, row)]) for label, *row in self.entries.itertuples(name=None)]
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])

    def latex(self) -> str:
        """Returns the table as LaTeX with booktabs; `PREAMBLE` says which packages it needs."""
        shown = self.entries.map(lambda entry: _BOLD.sub(r"\\textbf{\1}", escape_latex(entry)))
        shown = shown.rename(index=escape_latex, columns=escape_latex).rename_axis(None)
        groups, width = {group for group, _ in shown}, shown.shape[1]
        if groups <= {""}:
            shown.columns = [name for _, name in shown]
        tabular = shown.style.to_latex(hrules=True, column_format="l" + "c" * width, multicol_align="c")
        if not groups <= {""}:  # rules under the groups, which are equally wide
            ends = [(i + 2, i + 1 + width // len(groups)) for i in range(0, width, width // len(groups))]
            rules = "".join(f"\\cmidrule(lr){{{first}-{last}}}" for first, last in ends)
            tabular = tabular.replace("\\\\\n", f"\\\\\n{rules}\n", 1)
        lines = [r"\begin{table*}[t]", r"\centering", f"\\caption{{{escape_latex(self.title)}}}"]
        lines += [r"\begin{adjustbox}{max width=\textwidth}", tabular + r"\end{adjustbox}"]
        if self.notes:
            lines += [r"\par\smallskip", f"{{\\footnotesize {escape_latex(' '.join(self.notes))}\\par}}"]
        return "\n".join([*lines, r"\end{table*}", ""])


def section_tables(section: Section) -> list[Table]:
    """Returns averages with the differences under them, then every task by itself; nothing where no cell has the attack."""
    if section.runs.robust.isna().all() and section.runs.failure.isna().all():
        return []
    if section.protocol == "few-shot":
        return _few_shot_tables(section)
    tables = _base_to_new_tables if section.protocol == "base-to-new" else _transfer_tables
    return [table for shots in section.shots for table in tables(section, shots)]


def to_markdown(parts: Sequence[tuple[Section, Sequence[Table]]]) -> str:
    """Returns the tables of several sections as one Markdown document."""
    texts = [f"## {section}\n\n" + "\n".join(table.markdown() for table in tables) for section, tables in parts]
    return "\n".join(["# Results\n", *(f"**{note}**\n" for note in _warnings(parts)), *texts]).rstrip() + "\n"


def to_latex(parts: Sequence[tuple[Section, Sequence[Table]]]) -> str:
    """Returns the tables of several sections as LaTeX, to be read by `input`."""
    texts = [f"% {escape_latex(str(section))}\n\n" + "\n".join(t.latex() for t in tables) for section, tables in parts]
    notes = [f"\\noindent\\textbf{{{escape_latex(note)}}}\\par\n" for note in _warnings(parts)]
    return "\n".join([PREAMBLE + "\n", *notes, *texts]).rstrip() + "\n"


def _warnings(parts: Sequence[tuple[Section, Sequence[Table]]]) -> list[str]:
    return [QUICK_NOTE] if any(section.quick for section, _ in parts) else []


def escape_latex(text: str) -> str:
    """Returns a text with everything escaped that means something to LaTeX."""
    # the minus of a number is longer than a hyphen
    return re.sub(r"(?<!\S)(\(?)-(?=\d)", r"\1$-$", text.translate(_LATEX))


def numbers(mean: pd.DataFrame, spread: pd.DataFrame) -> pd.DataFrame:
    """Returns mean ± spread as Markdown.

    In each column all that look the same as the best one are bold, and none is where there is nothing to compare, nor of gaps.
    """
    shown = mean.map("{:.1f}".format)
    best = shown.astype(float)
    bold = best.eq(best.max()) & (mean.count() > 1) & [not name.endswith(GAP) for name in mean]
    text = shown + spread.map(" ± {:.1f}".format).where(spread.notna(), "")
    return text.mask(bold, "**" + text + "**").where(mean.notna(), MISSING)


def _few_shot_tables(section: Section) -> list[Table]:
    """Returns the averages over tasks against shots, the differences at each number of shots, and every task."""
    rows = {shots: rows_of(section, shots) for shots in section.shots}
    named = {shots_name(shots): of for shots, of in rows.items()}
    labels = rows_of(section).labels
    shown = {name: numbers(*of.averages).reindex(labels, fill_value=MISSING) for name, of in named.items()}
    notes = [*about(section, section.runs, harmonic=True), *_coverage(named)]
    singles = {name: of[[CLEAN, *section.attacks]] for name, of in shown.items()}
    shown = {name: of.drop(columns=section.attacks) for name, of in shown.items()}
    tables = [Table(f"{section.title}, average over tasks", pd.concat(shown, axis=1), notes)]
    if section.attacks:
        tables.append(
            Table(f"{section.title}, under each attack, average over tasks", pd.concat(singles, axis=1), notes)
        )
    tables += [table for shots, of in rows.items() for table in _differences(section, of, shots)]
    for shots, of in rows.items():
        columns, partial = _task_columns(of, {task: task for task in of.tasks})
        title = f"{section.title}, every task{_at(shots)} (clean / robust)"
        notes = [*about(section, section.at(shots)), *partial]
        tables.append(Table(title, pd.DataFrame(columns, index=of.labels), notes))
    return tables


def _base_to_new_tables(section: Section, shots: Shots) -> list[Table]:
    """Returns the averages over tasks, the differences, and a table for every task."""
    rows = rows_of(section, shots)
    groups = {"base classes": "base ", "new classes": "new ", "both": ""}
    measures = (CLEAN, ROBUST, *([GAP] if section.has_gap else []))

    def table(name: str, of: Rows, notes: Sequence[str]) -> Table:
        shown = numbers(*of.averages)
        entries = {(group, m): shown[f"{half}{m}"] for group, half in groups.items() for m in measures}
        title = f"{section.title}{_at(shots)}, {name}"
        return Table(title, pd.DataFrame(entries), [*notes, *_coverage({"": of})])

    meaning = "Both: the harmonic mean of base and new classes, of every run before it is averaged."
    average = table("average over tasks", rows, [*about(section, section.at(shots)), meaning])
    each = [table(task, rows.of_tasks([task]), []) for task in rows.tasks]
    return [average, *_differences(section, rows, shots), *(each if len(each) > 1 else [])]


def _transfer_tables(section: Section, shots: Shots) -> list[Table]:
    """Returns source, targets and the average over targets, and the differences on the targets."""
    rows = rows_of(section, shots)
    targets = rows.of_tasks([task for task in rows.tasks if task != section.source])
    tasks = {f"{task} (source)": task for task in rows.tasks if task == section.source}
    columns, partial = _task_columns(rows, tasks | {task: task for task in targets.tasks})
    columns["", "average of targets"] = _clean_and_robust(targets)
    if section.has_gap:
        columns["", f"average {GAP}"] = numbers(*targets.averages)[GAP]
    notes = [*about(section, section.at(shots)), *partial, *_coverage({"": targets})]
    table = Table(f"{section.title}{_at(shots)} (clean / robust)", pd.DataFrame(columns), notes)
    return [table, *_differences(section, targets, shots)]


def _task_columns(rows: Rows, tasks: Mapping[str, str]) -> tuple[dict[tuple[str, str], pd.Series], list[str]]:
    """Returns clean and robust accuracy of each row on each task, and a note on seeds that not all rows have."""
    columns, partial = {}, []
    for name, task in tasks.items():
        of = rows.of_tasks([task])
        columns["", name] = _clean_and_robust(of)
        if of.common.left_out:
            partial.append(f"{task} ({len(of.common.seeds)} of {len(of.scores.index.unique('seed'))})")
    said = f"Only seeds that all rows of a task have count, which are not all on {some(partial, LISTED)}."
    return columns, [said] if partial else []


def _clean_and_robust(rows: Rows) -> pd.Series:
    shown = numbers(*rows.averages)
    return (shown[CLEAN] + " / " + shown[ROBUST]).where(shown[CLEAN] != MISSING, MISSING)


def _differences(section: Section, rows: Rows, shots: Shots) -> list[Table]:
    (found, best), (plain, variants) = compare(rows), compare_variants(rows)
    notes = [BOOTSTRAP]
    if section.protocol == "base-to-new":
        notes.insert(0, "Clean and robust are harmonic means of base and new classes, H that of both.")
    tables = []
    for of, what, sentences in (
        (found, f"{OURS} minus each baseline", [best.sentence()] if best else []),
        (variants, f"other rows of {OURS} minus {plain}", []),
    ):
        if of:
            title = f"{section.title}{_at(shots)}, {what} (95% interval)"
            tables.append(Table(title, _entries(of), [*sentences, *notes]))
    return tables


def _entries(found: Sequence[Difference]) -> pd.DataFrame:
    rows = {
        of.baseline: {**{("", m): str(of.measures[m]) for m in (HARMONIC, CLEAN, ROBUST)}, ("", "pairs"): of.pairs}
        for of in found
    }
    return pd.DataFrame(rows).T


def about(section: Section, runs: pd.DataFrame, harmonic: bool = False) -> list[str]:
    """Returns what the figures of a table are of, and what is missing."""
    measured = runs.dropna(subset="robust")
    described = [_described(section, measured, harmonic)] if len(measured) else []
    return [*described, *_unequal(measured), *_troubles(runs, measured.drop_duplicates("name"))]


def _described(section: Section, measured: pd.DataFrame, harmonic: bool) -> str:
    clean, robust = set(measured.n_clean), set(measured.n)
    n = _range(robust) if clean == robust else f"{_range(robust)} under the attack, {_range(clean)} clean"
    parts = ["Accuracy in percent"]
    if measured.seed[measured.shots != 0].nunique() > 1:
        parts.append("mean ± sample standard deviation over seeds")
    ways = "; with a defence, the worst of every way to it" if measured.defence.astype(bool).any() else ""
    parts.append(f"robust: under {_in_words(section)}, {section.threat}{ways}")
    if section.has_gap:
        parts.append(f"{GAP}: points that robust accuracy is above that under AutoAttack, of the same images")
    if harmonic:
        parts.append("H: harmonic mean of clean and robust, of every run before it is averaged")
    each = "half of a task" if section.protocol == "base-to-new" else "task"
    return "; ".join([*parts, f"{section.split} split, n = {n} images for each {each}", f"model {section.model}."])


def _in_words(section: Section) -> str:
    """Returns what robust accuracy of a section is of: an attack, or a protocol with its attacks."""
    protocol = known_protocols().get(section.evaluation_protocol)
    if protocol is None or section.attack != BY_PROTOCOL + protocol.name:
        return section.attack
    step = f", step size {protocol.step_size}" if protocol.step_size else ""
    return f"{section.attack} ({', '.join(protocol.attacks)}{step})"


def _unequal(measured: pd.DataFrame) -> list[str]:
    """Returns which tasks were not measured on the same number of images in all rows."""
    tasks = []
    for (task, classes), of in measured.groupby(["task", "classes"], sort=False):
        sizes = sorted({*of.n.astype(int)})
        if len(sizes) > 1:
            tasks.append(f"{task}{'' if classes == 'all' else f' ({classes} classes)'} (n = {some(sizes, LISTED)})")
    return [f"Rows were not attacked on the same number of images of {some(tasks, LISTED)}."] if tasks else []


def _troubles(runs: pd.DataFrame, counted: pd.DataFrame) -> list[str]:
    """Returns which runs failed and which collapsed, of how many."""
    failed, collapsed = runs.dropna(subset="failure"), counted.dropna(subset="collapsed")
    rows = ", ".join(f"{n} of {label}" for label, n in collapsed.groupby("label", sort=False).size().items())
    by_row = f" ({rows})" if len(collapsed) > 1 else ""  # those that are not listed too
    failed = [f"{name} ({_short(why)})" for name, why in zip(failed.name, failed.failure, strict=True)]
    collapsed = [f"{name} ({_short(why)})" for name, why in zip(collapsed.name, collapsed.collapsed, strict=True)]
    notes = {
        f"Failed, and so missing: {len(failed)} of {len(counted) + len(failed)} runs": failed,
        f"Collapsed, and counted with their accuracies: {len(collapsed)} of {len(counted)} runs{by_row}": collapsed,
    }
    return [f"{start}: {some(of, LISTED, separator='; ')}." for start, of in notes.items() if of]


def _coverage(rows: Mapping[str, Rows]) -> list[str]:
    """Returns how much of the runs averages are over, by where they stand, as in "4 shots", where it is not all of them."""
    said: dict[str, list[str]] = {}
    for where, of in rows.items():
        tasks, seeds, left_out = of.common
        if not left_out:
            continue
        missing = [task for task in of.tasks if task not in tasks]
        text = (
            f" are over {len(tasks)} of {len(of.tasks)} tasks x {len(seeds)} of {len(of.scores.index.unique('seed'))} seeds, "
            f"those that all rows have{f'; left out: {some(missing, LISTED)}' if missing else ''}."
        )
        said.setdefault(text if tasks else ": none, as the rows have no runs in common.", []).append(where)
    return [f"Averages{' at ' * any(where)}{', '.join(where)}{text}" for text, where in said.items()]


def _at(shots: Shots) -> str:
    return f" at {shots_name(shots)}" if shots != 0 else ""


def _range(counts: set[float]) -> str:
    low, high = int(min(counts)), int(max(counts))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _short(text: str) -> str:
    line = text.strip().split("\n")[0].rstrip(".")
    return line if len(line) <= 100 else f"{line[:97]}..."
