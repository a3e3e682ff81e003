"""The picture of paired differences. It needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..plotting import import_figure
from .comparison import Difference, compare
from .lines import TRANSFERS, Section, Shots, shots_name
from .plots import COLOURS
from .statistics import HARMONIC, collect
from .tables import section_title


def differences_figure(sections: Sequence[Section], attack: str) -> Any | None:
    """Draws how far CAPT is above each baseline in H, with 95% intervals, one panel a section and number of shots.

    Args:
        sections: The sections.
        attack: The attack that robust accuracy is of.

    Returns:
        The figure; None where there is nothing to compare.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_class = import_figure()
    panels = [(f"{section_title(s)}\n{shots_name(n)}", _compared(s, n, attack)) for s in sections for n in s.shots]
    panels = [(title, found) for title, found in panels if found]
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(len(found) for _, found in panels)
    figure = figure_class(figsize=(3.6 * columns + 1.0, (0.36 * tallest + 1.1) * lines + 0.8), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for i, (axis, (title, found)) in enumerate(zip(axes, panels, strict=False)):
        _bars(axis, found)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelbottom=i + columns >= len(panels))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("points of H (95% interval; pale where it contains 0 or there is none)", fontsize=10)
    figure.suptitle(f"{panels[0][1][0].first} minus each baseline, robust under {attack}", fontsize=11)
    return figure


def _bars(axis: Any, found: Sequence[Difference]) -> None:
    for place, one in enumerate(found):
        of = one.measures[HARMONIC]
        sure = of.low is not None and of.high is not None and not of.low <= 0 <= of.high
        axis.barh(place, of.value, height=0.6, color=COLOURS[0], alpha=0.85 if sure else 0.3)
        if of.low is not None and of.high is not None:
            axis.plot([of.low, of.high], [place, place], color="black", lw=1.3, marker="|", markersize=6)
        # the figure stands beyond the bar and its interval, which may be too small to read
        ends = [v for v in (of.value, of.low, of.high, 0.0) if v is not None]
        side = 1 if of.value >= 0 else -1
        where = (max(ends) if side > 0 else min(ends), place)
        style = {"fontsize": 9, "va": "center", "ha": "left" if side > 0 else "right"}
        axis.annotate(f"{of.value:+.1f}", where, xytext=(4 * side, 0), textcoords="offset points", **style)
    axis.margins(x=0.16)
    axis.set_yticks(range(len(found)), [one.second for one in found], fontsize=10)
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.axvline(0, color="black", lw=0.8)
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _compared(section: Section, shots: Shots, attack: str) -> tuple[Difference, ...]:
    rows = collect(section.at(shots), attack)
    if section.protocol in TRANSFERS:
        rows = [row.of_tasks({task for task, _ in row.scores} - {section.source or ""}) for row in rows]
    found = compare(rows)
    return found.differences if found else ()
