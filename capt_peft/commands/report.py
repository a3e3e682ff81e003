"""Makes tables and plots of what benchmarks wrote down.

capt-peft report outputs/benchmark/toy.jsonl
capt-peft report fap.jsonl capt.jsonl --output outputs/both
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..report import write_report
from ..report.tables import QUICK_NOTE
from .parser import Parser


@dataclass
class Arguments:
    """What is reported, and where."""

    lines: list[str] = field(metadata={"help": "Files of lines, each the --output of a benchmark."})
    output: str | None = field(default=None, metadata={"help": "Folder to write; by default the first file's name."})


def main(argv: list[str]) -> None:
    """Writes the report."""
    (args,) = Parser(Arguments).into_dataclasses(argv)
    for path in args.lines:
        if not Path(path).is_file():
            raise ValueError(f"There is no file {path} (--lines). A benchmark's --output is one.")
    folder = Path(args.output) if args.output else Path(args.lines[0]).with_suffix("")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, but a folder is written. Give another --output.")
    show_report(args.lines, folder)


def show_report(lines: Sequence[str | Path], folder: str | Path) -> None:
    """Writes tables and plots, and prints the tables that are averaged over data sets."""
    paths = write_report(lines, folder)
    tables = Path(folder, "tables.md").read_text(encoding="utf-8")
    print(tables)
    if QUICK_NOTE in tables:
        print(f"{QUICK_NOTE}\n")  # again, where it is seen after many tables
    print(*paths, sep="\n")
