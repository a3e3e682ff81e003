"""The tables of a benchmark, as Markdown and as LaTeX, and the sentences under them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import pandas as pd

from ..benchmark.plan import Shots, shots_name
from ..utils.markup import Markdown, escape, table_row
from ..utils.text import some
from .sections import Section
from .statistics import CLEAN, HARMONIC, OURS, ROBUST, Common, Rows, compare, rows_of

PREAMBLE = "% needs \\usepackage{booktabs,adjustbox}"
BOOTSTRAP = (
    "Intervals: 95% percentile bootstrap of 10,000 draws over tasks and, within a task, seeds. "
    "They know the tasks and seeds that were run, and are too narrow where those are few."
)
LISTED = 12  # longer lists are cut, with the number of what is left out
MISSING = "-"
_BOLD = re.compile(r"\*\*(.*?)\*\*")
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}


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
        names, rules, start = [""], "", 2
        for group, columns in groupby(group for group, _ in self.entries):
            end = start + len(list(columns))
            names.append(f"\\multicolumn{{{end - start}}}{{c}}{{{escape_latex(group)}}}")
            rules += f"\\cmidrule(lr){{{start}-{end - 1}}}"
            start = end
        groups = [_latex_row(names), rules] if any(group for group, _ in self.entries) else []
        rows = [
            _latex_row([escape_latex(label), *(_BOLD.sub(r"\\textbf{\1}", escape_latex(entry)) for entry in row)])
            for label, *row in self.entries.itertuples(name=None)
        ]
        about = escape_latex(" ".join(self.notes))
        return "\n".join(
            [
                r"\begin{table*}[t]",
                r"\centering",
                f"\\caption{{{escape_latex(self.title)}}}",
                r"\begin{adjustbox}{max width=\textwidth}",
                f"\\begin{{tabular}}{{l{'c' * self.entries.shape[1]}}}",
                r"\toprule",
                *groups,
                _latex_row(["", *(escape_latex(name) for _, name in self.entries)]),
                r"\midrule",
                *rows,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{adjustbox}",
                *([r"\par\smallskip", f"{{\\footnotesize {about}\\par}}"] if about else []),
                r"\end{table*}",
                "",
            ]
        )


def section_tables(section: Section) -> list[Table]:
    """Returns the tables of one section.

    Returns:
        Averages with the differences under them, then every task by itself. None where no cell has the attack.
    """
    if section.runs.robust.isna().all() and section.runs.failure.isna().all():
        return []
    if section.protocol == "few-shot":
        return _few_shot_tables(section)
    tables = _base_to_new_tables if section.protocol == "base-to-new" else _transfer_tables
    return [table for shots in section.shots for table in tables(section, shots)]


def to_markdown(parts: Sequence[tuple[Section, Sequence[Table]]]) -> str:
    """Returns the tables of several sections as one Markdown document."""
    lines = ["# Results", ""]
    for section, tables in parts:
        lines += [f"## {_heading(section)}", "", *(table.markdown() for table in tables)]
    return "\n".join(lines).rstrip() + "\n"


def to_latex(parts: Sequence[tuple[Section, Sequence[Table]]]) -> str:
    """Returns the tables of several sections as LaTeX, to be read by `input`."""
    lines = [PREAMBLE, ""]
    for section, tables in parts:
        lines += [f"% {escape_latex(_heading(section))}", "", *(table.latex() for table in tables)]
    return "\n".join(lines).rstrip() + "\n"


def escape_latex(text: str) -> str:
    """Returns a text with everything escaped that means something to LaTeX."""
    escaped = "".join(_LATEX.get(letter, letter) for letter in text)
    return re.sub(r"(?<!\S)(\(?)-(?=\d)", r"\1$-$", escaped)  # the minus of a number is longer than a hyphen


def numbers(mean: pd.DataFrame, spread: pd.DataFrame) -> pd.DataFrame:
    """Returns mean ± spread as Markdown.

    In each column all that look the same as the best one are bold, and none is where there is nothing to compare.
    """
    shown = mean.map("{:.1f}".format)
    best = shown.astype(float)
    bold = best.eq(best.max()) & (mean.count() > 1)
    text = shown + spread.map(" ± {:.1f}".format).where(spread.notna(), "")
    return text.mask(bold, "**" + text + "**").where(mean.notna(), MISSING)


def _few_shot_tables(section: Section) -> list[Table]:
    """Returns the averages over tasks against shots, the differences at each number of shots, and every task."""
    rows = {shots: rows_of(section, shots) for shots in section.shots}
    labels = rows_of(section).labels
    columns = {
        shots_name(shots): numbers(*of.averages).reindex(labels, fill_value=MISSING) for shots, of in rows.items()
    }
    about = [*_about(section, section.runs, harmonic=True), *_coverage({shots_name(s): of for s, of in rows.items()})]
    average = Table(f"{section.title}, average over tasks", pd.concat(columns, axis=1), about)
    compared = [table for shots, of in rows.items() for table in _differences(section, of, shots)]
    return [average, *compared, *(_tasks_table(section, of, shots) for shots, of in rows.items())]


def _base_to_new_tables(section: Section, shots: Shots) -> list[Table]:
    """Returns the averages over tasks, the differences, and a table for every task."""
    rows = rows_of(section, shots)
    meaning = "Both: the harmonic mean of base and new classes, of every run before it is averaged."
    groups = {"base classes": "base ", "new classes": "new ", "both": ""}

    def table(name: str, of: Rows, about: Sequence[str] = ()) -> Table:
        shown = numbers(*of.averages)
        entries = {(group, m): shown[f"{half}{m}"] for group, half in groups.items() for m in (CLEAN, ROBUST)}
        title = f"{section.title}{_at(shots)}, {name}"
        return Table(title, pd.DataFrame(entries), [*about, *_coverage({"": of})])

    average = table("average over tasks", rows, [*_about(section, section.at(shots)), meaning])
    each = [table(task, rows.of_tasks([task])) for task in rows.tasks]
    return [average, *_differences(section, rows, shots), *(each if len(each) > 1 else [])]


def _transfer_tables(section: Section, shots: Shots) -> list[Table]:
    """Returns source, targets and the average over targets, and the differences on the targets."""
    rows = rows_of(section, shots)
    targets = rows.of_tasks([task for task in rows.tasks if task != section.source])
    tasks = {f"{task} (source)": task for task in rows.tasks if task not in targets.tasks}
    columns, partial = _task_columns(rows, tasks | {task: task for task in targets.tasks})
    columns["", "average of targets"] = _clean_and_robust(targets)
    about = [*_about(section, section.at(shots)), *partial, *_coverage({"": targets})]
    table = Table(f"{section.title}{_at(shots)} (clean / robust)", pd.DataFrame(columns), about)
    return [table, *_differences(section, targets, shots)]


def _tasks_table(section: Section, rows: Rows, shots: Shots) -> Table:
    columns, partial = _task_columns(rows, {task: task for task in rows.tasks})
    title = f"{section.title}, every task{_at(shots)} (clean / robust)"
    return Table(title, pd.DataFrame(columns, index=rows.labels), [*_about(section, section.at(shots)), *partial])


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
    found, best = compare(rows)
    entries = {}
    for of in found:
        ends = {m: "" if i.low is None else f" ({i.low:.1f} to {i.high:.1f})" for m, i in of.measures.items()}
        shown = {("", m): f"{of.measures[m].value:+.1f}{ends[m]}" for m in (HARMONIC, CLEAN, ROBUST)}
        entries[of.baseline] = {**shown, ("", "pairs"): of.pairs}
    halves = "Clean and robust are harmonic means of base and new classes, H that of both."
    about = [*([best.sentence()] if best else []), *([halves] if section.protocol == "base-to-new" else []), BOOTSTRAP]
    title = f"{section.title}{_at(shots)}, {OURS} minus each baseline (95% interval)"
    return [Table(title, pd.DataFrame(entries).T, about)] if found else []


def _about(section: Section, runs: pd.DataFrame, harmonic: bool = False) -> list[str]:
    """Returns what the figures of a table are of, and what is missing."""
    measured = runs.dropna(subset="robust")
    return [
        *([_described(section, measured, harmonic)] if len(measured) else []),
        *_unequal(measured),
        *_troubles(runs, measured.drop_duplicates("name")),
    ]


def _described(section: Section, measured: pd.DataFrame, harmonic: bool) -> str:
    clean, robust = set(measured.n_clean), set(measured.n)
    n = _range(robust) if clean == robust else f"{_range(robust)} under the attack, {_range(clean)} clean"
    several = measured.seed[measured.shots != 0].nunique() > 1
    each = "half of a task" if section.protocol == "base-to-new" else "task"
    return "; ".join(
        [
            "Accuracy in percent",
            *(["mean ± sample standard deviation over seeds"] if several else []),
            f"robust: under {section.attack}, {section.threat}",
            *(["H: harmonic mean of clean and robust, of every run before it is averaged"] if harmonic else []),
            f"{section.split} split, n = {n} images for each {each}",
            f"model {section.model}.",
        ]
    )


def _unequal(measured: pd.DataFrame) -> list[str]:
    """Returns which tasks were not measured on the same number of images in all rows."""
    sizes = measured.groupby(["task", "classes"], sort=False).n.unique()
    tasks = [
        f"{task if classes == 'all' else f'{task} ({classes} classes)'} (n = {some(sorted(map(int, of)), LISTED)})"
        for (task, classes), of in sizes.items()
        if len(of) > 1
    ]
    return [f"Rows were not attacked on the same number of images of {some(tasks, LISTED)}."] if tasks else []


def _troubles(runs: pd.DataFrame, counted: pd.DataFrame) -> list[str]:
    """Returns which runs failed and which collapsed, of how many."""
    failed, collapsed = (
        [f"{name} ({_short(why)})" for name, why in zip(of.name, of[column], strict=True)]
        for of, column in (
            (runs.dropna(subset="failure"), "failure"),
            (counted.dropna(subset="collapsed"), "collapsed"),
        )
    )
    notes = {
        f"Failed, and so missing: {len(failed)} of {len(counted) + len(failed)} runs": failed,
        f"Collapsed, and counted with their accuracies: {len(collapsed)} of {len(counted)} runs": collapsed,
    }
    return [f"{start}: {some(of, LISTED, separator='; ')}." for start, of in notes.items() if of]


def _coverage(rows: Mapping[str, Rows]) -> list[str]:
    """Returns how much of the runs averages are over, where it is not all of them.

    Args:
        rows: By where their averages stand, as in "4 shots"; those with the same to say share a sentence.
    """
    said: dict[str, list[str]] = {}
    for where, of in rows.items():
        if of.common.left_out:
            said.setdefault(_covered(of.common, of.scores.index), []).append(where)
    return [f"Averages{' at ' * any(where)}{', '.join(where)}{text}" for text, where in said.items()]


def _covered(common: Common, places: pd.MultiIndex) -> str:
    if not common.tasks:
        return ": none, as the rows have no runs in common."
    (tasks, seeds), (all_tasks, all_seeds) = common[:2], (places.unique(level) for level in ("task", "seed"))
    text = f"{len(tasks)} of {len(all_tasks)} tasks x {len(seeds)} of {len(all_seeds)} seeds, those that all rows have"
    missing = [task for task in all_tasks if task not in tasks]
    return f" are over {text}; left out: {some(missing, LISTED)}." if missing else f" are over {text}."


def _heading(section: Section) -> str:
    return f"{section.title} ({section.split} split, {section.threat}, {section.model})"


def _at(shots: Shots) -> str:
    return f" at {shots_name(shots)}" if shots != 0 else ""


def _latex_row(texts: Sequence[str]) -> str:
    return " & ".join(texts) + r" \\"


def _range(counts: set[float]) -> str:
    low, high = int(min(counts)), int(max(counts))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _short(text: str) -> str:
    line = text.strip().split("\n")[0].rstrip(".")
    return line if len(line) <= 100 else f"{line[:97]}..."
