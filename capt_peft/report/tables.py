"""The tables of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from . import notes
from .comparison import Comparison, Interval, compare, sentence
from .lines import BASE_TO_NEW, FEW_SHOT, Cell, Section, Shots, shots_name
from .markup import PREAMBLE, Entry, Table, escape_latex, number_columns, plain
from .statistics import CLEAN, HARMONIC, MEASURES, ROBUST, Common, Runs, Summary, collect, common_runs, summarise

HALVES = ("base clean", "base robust", "new clean", "new robust", CLEAN, ROBUST)
BOOTSTRAP = (
    "Intervals: 95% percentile bootstrap of 10,000 draws over tasks and, within a task, seeds. "
    "They know the tasks and seeds that were run, and are too narrow where those are few."
)


def section_title(section: Section) -> str:
    """Returns the suite and the protocol, and the task that was trained on where others are measured."""
    title = f"{section.suite}: {section.protocol}"
    return f"{title} from {section.source}" if section.source else title


def section_tables(section: Section, attack: str) -> list[Table]:
    """Returns the tables of one section.

    Args:
        section: The cells.
        attack: The attack that robust accuracy is of.

    Returns:
        Averages with the differences under them, then every task by itself. None where no cell has the attack.
    """
    if not any(cell.has(attack) or cell.failure(attack) for cell in section.cells):
        return []
    if section.protocol == FEW_SHOT:
        return few_shot_tables(section, attack)
    tables = base_to_new_tables if section.protocol == BASE_TO_NEW else transfer_tables
    return [table for shots in section.shots for table in tables(section, attack, shots)]


def few_shot_tables(section: Section, attack: str) -> list[Table]:
    """Returns the averages over tasks against shots, the differences at each number of shots, and every task."""
    rows = {shots: collect(section.at(shots), attack) for shots in section.shots}
    common = {shots: common_runs(of) for shots, of in rows.items()}
    labels = [row.label for row in collect(section.cells, attack)]
    columns = [
        [[_of_label(rows[shots], label, measure, common[shots])] for label in labels]
        for shots in section.shots
        for measure in MEASURES
    ]
    partial = notes.coverage({shots_name(s): of for s, of in common.items()})
    average = Table(
        f"{section_title(section)}, average over tasks",
        MEASURES * len(section.shots),
        tuple(zip(labels, number_columns(columns), strict=True)),
        (*_about(section, section.cells, attack, harmonic=True), *partial),
        tuple((shots_name(shots), len(MEASURES)) for shots in section.shots),
    )
    compared = [table for s in section.shots for table in _differences(section, rows[s], s)]
    return [average, *compared, *(_tasks_table(section, rows[shots], attack, shots) for shots in section.shots)]


def base_to_new_tables(section: Section, attack: str, shots: Shots) -> list[Table]:
    """Returns the averages over tasks, the differences, and a table for every task."""
    cells = section.at(shots)
    rows = collect(cells, attack)
    title = f"{section_title(section)}{notes.at(shots)}"
    meaning = "Both: the harmonic mean of base and new classes, of every run before it is averaged."

    def table(name: str, of: list[Runs], about: Sequence[str] = ()) -> Table:
        common = common_runs(of)
        columns = [[[summarise(row, measure, common)] for row in of] for measure in HALVES]
        partial = notes.coverage({"": common})
        pairs = tuple((group, 2) for group in ("base classes", "new classes", "both"))
        entries = tuple(zip([row.label for row in of], number_columns(columns), strict=True))
        return Table(f"{title}, {name}", (CLEAN, ROBUST) * 3, entries, (*about, *partial), pairs)

    tasks = list(dict.fromkeys(task for row in rows for task, _ in row.scores))
    average = table("average over tasks", rows, [*_about(section, cells, attack), meaning])
    each = [table(task, [row.of_tasks([task]) for row in rows]) for task in tasks]
    return [average, *_differences(section, rows, shots), *(each if len(tasks) > 1 else [])]


def transfer_tables(section: Section, attack: str, shots: Shots) -> list[Table]:
    """Returns source, targets and the average over targets, and the differences on the targets."""
    cells = section.at(shots)
    rows = collect(cells, attack)
    tasks = list(dict.fromkeys(task for row in rows for task, _ in row.scores))
    targets = [task for task in tasks if task != section.source]
    on_targets = [row.of_tasks(targets) for row in rows]
    common = common_runs(on_targets)
    sources = [task for task in tasks if task == section.source]
    columns, partial = _task_columns(rows, [*sources, *targets])
    columns.append([[summarise(row, measure, common) for measure in (CLEAN, ROBUST)] for row in on_targets])
    table = Table(
        f"{section_title(section)}{notes.at(shots)} (clean / robust)",
        (*(f"{task} (source)" for task in sources), *targets, "average of targets"),
        tuple(zip([row.label for row in rows], number_columns(columns), strict=True)),
        (*_about(section, cells, attack), *partial, *notes.coverage({"": common})),
    )
    return [table, *_differences(section, on_targets, shots)]


def to_markdown(parts: Sequence[tuple[Section, Sequence[Table]]]) -> str:
    """Returns the tables of several sections as one Markdown document."""
    lines = ["# Results", ""]
    for section, tables in parts:
        lines += [f"## {section_title(section)} ({_where(section)})", ""]
        lines += [table.markdown() for table in tables]
    return "\n".join(lines).rstrip() + "\n"


def to_latex(parts: Sequence[tuple[Section, Sequence[Table]]]) -> str:
    """Returns the tables of several sections as LaTeX, to be read by `input`."""
    lines = [PREAMBLE, ""]
    for section, tables in parts:
        lines += [f"% {escape_latex(f'{section_title(section)} ({_where(section)})')}", ""]
        lines += [table.latex() for table in tables]
    return "\n".join(lines).rstrip() + "\n"


def _tasks_table(section: Section, rows: list[Runs], attack: str, shots: Shots) -> Table:
    tasks = list(dict.fromkeys(task for row in rows for task, _ in row.scores))
    columns, partial = _task_columns(rows, tasks)
    return Table(
        f"{section_title(section)}, every task{notes.at(shots)} (clean / robust)",
        tuple(tasks),
        tuple(zip([row.label for row in rows], number_columns(columns) or [()] * len(rows), strict=True)),
        (*_about(section, section.at(shots), attack), *partial),
    )


def _task_columns(rows: list[Runs], tasks: Sequence[str]) -> tuple[list[list[list[Summary | None]]], list[str]]:
    """Returns clean and robust accuracy of each row on each task, and a note on seeds that not all rows have."""
    columns, common = [], {}
    for task in tasks:
        of = [row.of_tasks([task]) for row in rows]
        common[task] = common_runs(of)
        columns.append([[summarise(row, measure, common[task]) for measure in (CLEAN, ROBUST)] for row in of])
    return columns, notes.seeds_left_out(common)


def _differences(section: Section, rows: list[Runs], shots: Shots) -> list[Table]:
    found = compare(rows)
    if found is None:
        return []
    lines = [sentence(found.best)] if found.best else []
    halves = "Clean and robust are harmonic means of base and new classes, H that of both."
    return [
        Table(
            f"{section_title(section)}{notes.at(shots)}, {found.differences[0].first} minus each baseline (95% interval)",
            ("H", CLEAN, ROBUST, "pairs"),
            tuple(_difference_row(found, i) for i in range(len(found.differences))),
            (*lines, *([halves] if section.protocol == BASE_TO_NEW else []), BOOTSTRAP),
        )
    ]


def _difference_row(found: Comparison, index: int) -> tuple[str, tuple[Entry, ...]]:
    one = found.differences[index]
    texts = [_interval(one.measures[measure]) for measure in (HARMONIC, CLEAN, ROBUST)]
    return one.second, plain(*texts, one.pairs)


def _interval(of: Interval) -> str:
    return f"{of.value:+.1f}" + (f" ({of.low:.1f} to {of.high:.1f})" if of.low is not None else "")


def _of_label(rows: list[Runs], label: str, measure: str, common: Common) -> Summary | None:
    return next((summarise(row, measure, common) for row in rows if row.label == label), None)


def _about(section: Section, cells: Sequence[Cell], attack: str, harmonic: bool = False) -> list[str]:
    described = [notes.describe(section, cells, attack, harmonic)] if any(cell.has(attack) for cell in cells) else []
    return [*described, *notes.unequal(cells, attack), *notes.troubles(cells, attack)]


def _where(section: Section) -> str:
    return f"{section.split} split, {section.threat}, {section.model}"
