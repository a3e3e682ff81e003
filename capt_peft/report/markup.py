"""Tables as Markdown and as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..utils.markup import Markdown, escape, table_row
from .statistics import Summary

PREAMBLE = "% needs \\usepackage{booktabs,adjustbox}"
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}
MISSING = "-"
Part = tuple[str, bool]  # a text, and whether it is bold
Entry = tuple[Part, ...]  # parts with slashes between them; none for what is missing


@dataclass(frozen=True)
class Table:
    """A table without any markup.

    Attributes:
        title: What it shows.
        columns: Names of the columns after the first one.
        rows: The name of each row, and one entry a column.
        notes: Sentences under the table.
        groups: Names over the columns, each with the number of columns that it is over; none for no such line.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Entry, ...]], ...]
    notes: tuple[str, ...] = ()
    groups: tuple[tuple[str, int], ...] = ()

    def markdown(self) -> str:
        """Returns the table as Markdown."""
        groups = [f"{name}, " for name, width in self.groups for _ in range(width)] or [""] * len(self.columns)
        header = ["", *(f"{group}{column}" for group, column in zip(groups, self.columns, strict=True))]
        lines = [f"### {escape(self.title)}", "", table_row(header), "|" + "---|" * len(header)]
        for label, entries in self.rows:
            cells = [_text([(escape(t), b) for t, b in entry], "**", "**") for entry in entries]
            lines.append(table_row([label, *map(Markdown, cells)]))
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])

    def latex(self) -> str:
        """Returns the table as LaTeX with booktabs; `PREAMBLE` says which packages it needs."""
        lines = [r"\begin{table*}[t]", r"\centering", f"\\caption{{{escape_latex(self.title)}}}"]
        lines += [
            r"\begin{adjustbox}{max width=\textwidth}",
            f"\\begin{{tabular}}{{l{'c' * len(self.columns)}}}",
            r"\toprule",
        ]
        if self.groups:
            names = [f"\\multicolumn{{{width}}}{{c}}{{{escape_latex(name)}}}" for name, width in self.groups]
            lines += [_latex_row(["", *names]), *_rules(self.groups)]
        lines += [_latex_row(["", *map(escape_latex, self.columns)]), r"\midrule"]
        for label, entries in self.rows:
            cells = [_text([(escape_latex(t), b) for t, b in entry], r"\textbf{", "}") for entry in entries]
            lines.append(_latex_row([escape_latex(label), *cells]))
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{adjustbox}"]
        if self.notes:
            lines += [r"\par\smallskip", f"{{\\footnotesize {escape_latex(' '.join(self.notes))}\\par}}"]
        return "\n".join([*lines, r"\end{table*}", ""])


def number_columns(columns: Sequence[Sequence[Sequence[Summary | None]]]) -> list[tuple[Entry, ...]]:
    """Returns the rows of a table of numbers, the best of every column in bold.

    Args:
        columns: For each column and row, one number or several that share an entry. Those of one place are compared with each
            other; all that look the same as the best one are bold, and none is where there is nothing to compare.

    Returns:
        For each row, one entry a column.
    """
    entries = []
    for column in columns:
        places = list(zip(*column, strict=True))
        best = [max((f"{s.mean:.1f}" for s in place if s), key=float, default="") for place in places]
        several = sum(any(row) for row in column) > 1
        entries.append(
            [
                tuple(
                    (_number(s), s is not None and several and f"{s.mean:.1f}" == b)
                    for s, b in zip(row, best, strict=True)
                )
                if any(row)
                else ()
                for row in column
            ]
        )
    return list(zip(*entries, strict=True))


def plain(*texts: str) -> tuple[Entry, ...]:
    """Returns one entry a text, none of them bold."""
    return tuple(((text, False),) for text in texts)


def escape_latex(text: str) -> str:
    """Returns a text with everything escaped that means something to LaTeX."""
    escaped = "".join(LATEX.get(letter, letter) for letter in text)
    return re.sub(r"(?<!\S)(\(?)-(?=\d)", r"\1$-$", escaped)  # the minus of a number is longer than a hyphen


def _number(summary: Summary | None) -> str:
    if summary is None:
        return MISSING
    return f"{summary.mean:.1f}" + (f" ± {summary.std:.1f}" if summary.std is not None else "")


def _text(entry: Sequence[Part], start: str, end: str) -> str:
    return " / ".join(f"{start}{text}{end}" if bold else text for text, bold in entry) or MISSING


def _latex_row(texts: Sequence[str]) -> str:
    return " & ".join(texts) + r" \\"


def _rules(groups: Sequence[tuple[str, int]]) -> list[str]:
    rules, start = [], 2
    for _, width in groups:
        rules.append(f"\\cmidrule(lr){{{start}-{start + width - 1}}}")
        start += width
    return ["".join(rules)]
