"""Tables and pictures of a benchmark, from the lines of its runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..plotting import import_figure
from ..utils.files import written_whole
from .difference_plot import differences_figure
from .lines import Section, choose_attack, read_lines, sections
from .plots import few_shot_sections, save_figure, scatter_figure, shots_figure
from .tables import section_tables, to_latex, to_markdown

__all__ = ["read_lines", "section_tables", "sections", "to_latex", "to_markdown", "write_report"]


def write_report(
    lines_path: str | Path | Sequence[str | Path], folder: str | Path, *, attack: str | None = None
) -> list[Path]:
    """Writes the tables and pictures of a benchmark: all of them, or none.

    Args:
        lines_path: A file of benchmark lines, or several.
        folder: Where to write tables.md, tables.tex, and shots, scatter and differences as PNG and SVG. A picture with nothing to
            draw is left out. With several few-shot sections, the names of shots and scatter say which one they are of.
        attack: The attack that robust accuracy is of; by default the one that most cells have.

    Returns:
        The paths of the files.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: A line is broken, one cell was run with different settings, or no cell has the attack.
    """
    import_figure()  # before any long work
    folder = Path(folder)
    cells = read_lines(lines_path)
    attack = choose_attack(cells, attack)
    found = sections(cells)
    parts = [(section, tables) for section in found if (tables := section_tables(section, attack))]
    names = ["tables.md", "tables.tex"]
    with written_whole(folder) as temporary:
        (temporary / "tables.md").write_text(to_markdown(parts), encoding="utf-8")
        (temporary / "tables.tex").write_text(to_latex(parts), encoding="utf-8")
        drawn = few_shot_sections(found, attack)
        for section, suffix in zip(drawn, _suffixes(drawn), strict=True):
            names += save_figure(shots_figure(section, attack), temporary, f"shots{suffix}")
            if (figure := scatter_figure(section, attack)) is not None:
                names += save_figure(figure, temporary, f"scatter{suffix}")
        if (figure := differences_figure(found, attack)) is not None:
            names += save_figure(figure, temporary, "differences")
    return [folder / name for name in names]


def _suffixes(drawn: Sequence[Section]) -> list[str]:
    """Returns for each section the values of what tells it from the others, as the end of a file name."""
    fields = [[s.suite for s in drawn], [s.split for s in drawn], [s.model for s in drawn], [s.threat for s in drawn]]
    telling = [values for values in fields if len(set(values)) > 1]
    words = ["-".join(["", *values]) for values in zip(*telling, strict=True)] or [""] * len(drawn)
    return [re.sub(r"[^A-Za-z0-9.-]+", "-", word) for word in words]
