"""Tables and pictures of a benchmark, from the lines of its runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..plotting import save_figure
from ..utils.files import written_whole
from .plots import differences_figure, scatter_figure, shots_figure
from .sections import Section, read_sections
from .tables import section_tables, to_latex, to_markdown

__all__ = ["Section", "read_sections", "section_tables", "to_latex", "to_markdown", "write_report"]


PICTURES = ("shots", "scatter", "differences")


def write_report(
    lines_path: str | Path | Sequence[str | Path], folder: str | Path, *, attack: str | None = None
) -> list[Path]:
    """Writes the tables and pictures of a benchmark: all of them, or none.

    Args:
        lines_path: As for `read_sections`.
        folder: Where to write tables.md, tables.tex, and shots, scatter and differences as PNG and SVG. A picture with nothing to
            draw is left out; they draw rows without a defence (`capt-peft leaderboard` draws all). With several few-shot
            sections, the names of shots and scatter say which one they are of. Those that an earlier report left
            under these names are removed, and nothing else.
        attack: As for `read_sections`.

    Returns:
        The paths of the files.

    Raises:
        ValueError: See `read_sections`.
    """
    sections = read_sections(lines_path, attack)
    parts = [(section, tables) for section in sections if (tables := section_tables(section))]
    figures: dict[str, Any] = {}
    plain = [replace(section, runs=section.runs[section.runs.defence.fillna("") == ""]) for section in sections]
    drawn = [s for s in plain if s.protocol == "few-shot" and s.runs.robust.notna().any()]
    for section, suffix in zip(drawn, _suffixes(drawn), strict=True):
        figures |= {f"shots{suffix}": shots_figure(section), f"scatter{suffix}": scatter_figure(section)}
    figures["differences"] = differences_figure(plain)
    names = ["tables.md", "tables.tex"]
    with written_whole(folder) as temporary:
        (temporary / "tables.md").write_text(to_markdown(parts), encoding="utf-8")
        (temporary / "tables.tex").write_text(to_latex(parts), encoding="utf-8")
        for name, figure in figures.items():
            if figure is not None:
                files = [f"{name}.png", f"{name}.svg"]
                save_figure(figure, *(temporary / file for file in files), dpi=130)
                names += files
    for old in {f"{kind}.{end}" for kind in PICTURES for end in ("png", "svg")}.difference(names):
        Path(folder, old).unlink(missing_ok=True)  # of an earlier report, and of other rows
    return [Path(folder, name) for name in names]


def _suffixes(sections: Sequence[Section]) -> list[str]:
    """Returns for each section the values of what tells it from the others, as the end of a file name."""
    fields = zip(*((s.suite, s.split, s.model, s.threat, s.evaluation_protocol) for s in sections), strict=True)
    telling = [values for values in fields if len(set(values)) > 1]
    return [re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join(["", *(f[i] for f in telling)])) for i in range(len(sections))]
