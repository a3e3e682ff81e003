"""The pictures of few-shot runs: accuracy against shots, and clean against robust. They need the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plotting import import_figure
from .lines import FEW_SHOT, Section, Shots, shots_name
from .statistics import CLEAN, ROBUST, Runs, Summary, collect, common_runs, summarise
from .tables import section_title

# Okabe and Ito's colours, which colour-blind people can tell apart; CAPT has the first one wherever it is drawn
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
GREY = "#6e7781"
STYLES = ((CLEAN, "-"), (ROBUST, "--"))
AVERAGE = "average"
ISO = range(10, 100, 10)
DODGE = 0.05  # moves rows apart, so that their error bars do not cover each other
PREFERRED_SHOTS = 16


def shots_figure(section: Section, attack: str) -> Any:
    """Draws clean and robust accuracy against shots, one panel a task and one for their average.

    Args:
        section: A few-shot section.
        attack: The attack that robust accuracy is of.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_class = import_figure()
    rows = {shots: collect(section.at(shots), attack) for shots in section.shots}
    tasks = list(dict.fromkeys(task for of in rows.values() for row in of for task, _ in row.scores))
    panels = [AVERAGE, *tasks] if len(tasks) > 1 else tasks
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    styles = row_styles(collect(section.cells, attack))
    figure = figure_class(figsize=(max(2.9 * columns + 0.6, 5.5), 2.5 * lines + 1.2), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        of = {s: rows[s] if panel == AVERAGE else [row.of_tasks([panel]) for row in rows[s]] for s in section.shots}
        _draw_panel(axis, of, section.shots, styles)
        axis.set_title(_averaged(rows) if panel == AVERAGE else panel, fontsize=11)
    for i, axis in enumerate(axes):
        axis.set_visible(i < len(panels))
        if i + columns >= len(panels):  # also above a place that is empty
            axis.tick_params(labelbottom=True)
            axis.set_xlabel("shots", fontsize=11)
    figure.supylabel("accuracy (%)", fontsize=11)
    _legend(figure, styles)
    figure.suptitle(_heading(section, attack), fontsize=11)
    return figure


def scatter_figure(section: Section, attack: str) -> Any | None:
    """Draws robust against clean accuracy, averaged over tasks, with lines of equal harmonic mean.

    Args:
        section: A few-shot section; of its numbers of shots, 16 is drawn, or else the largest.
        attack: The attack that robust accuracy is of.

    Returns:
        The figure; None where the rows have no runs in common.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_class = import_figure()
    shots = PREFERRED_SHOTS if PREFERRED_SHOTS in section.shots else section.shots[-1]
    rows = collect(section.at(shots), attack)
    styles = row_styles(collect(section.cells, attack))
    common = common_runs(rows)
    if not common.tasks:
        return None
    figure = figure_class(figsize=(7.2, 4.6), layout="constrained")
    axis = figure.subplots()
    drawn = []
    for row in rows:
        clean, robust = (summarise(row, measure, common) for measure in (CLEAN, ROBUST))
        if clean is None or robust is None:
            continue
        drawn.append((clean.mean, robust.mean))
        colour, marker = styles[row.label]
        bars = {"xerr": clean.std or None, "yerr": robust.std or None}
        axis.errorbar(
            clean.mean,
            robust.mean,
            **bars,
            color=colour,
            marker=marker,
            markersize=8,
            ls="",
            capsize=3,
            label=row.label,
            zorder=3,
        )
    _limits(axis, drawn)
    _iso_lines(axis)
    axis.set_xlabel("clean accuracy (%)", fontsize=11)
    axis.set_ylabel("robust accuracy (%)", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=10)
    axis.set_title(f"{_heading(section, attack)}\n{shots_name(shots)}; grey lines: equal harmonic mean H", fontsize=10)
    return figure


def row_styles(rows: Sequence[Runs]) -> dict[str, tuple[str, str]]:
    """Returns the colour and the marker of each label, the same in every picture of a section."""
    trained = sorted((row for row in rows if not row.once), key=lambda row: not row.ours)  # CAPT first
    styles = {row.label: (GREY, "*") for row in rows if row.once}
    for i, row in enumerate(trained):
        styles[row.label] = (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
    return {row.label: styles[row.label] for row in rows}


def save_figure(figure: Any, folder: Path, name: str) -> list[str]:
    """Writes a figure as PNG and SVG; the same figures give the same files.

    Args:
        figure: The figure.
        folder: Where to write.
        name: Name of the files without suffix.

    Returns:
        The names of the files.
    """
    from matplotlib import rc_context

    names = [f"{name}.{kind}" for kind in ("png", "svg")]
    for file in names:
        with rc_context({"svg.hashsalt": "capt-peft"}):
            # without a date and random ids, the same figures give the same file
            figure.savefig(folder / file, dpi=130, metadata={"Date": None} if file.endswith("svg") else None)
    return names


def _draw_panel(
    axis: Any, rows: dict[Shots, list[Runs]], shots: Sequence[Shots], styles: dict[str, tuple[str, str]]
) -> None:
    trained = [label for label, (colour, _) in styles.items() if colour != GREY]
    common = {s: common_runs(of) for s, of in rows.items()}
    for label, (colour, marker) in styles.items():
        found = {s: next((row for row in of if row.label == label), None) for s, of in rows.items()}
        for measure, style in STYLES:
            points = [(i, summarise(row, measure, common[s])) for i, s in enumerate(shots) if (row := found[s])]
            kept = [(i, summary) for i, summary in points if summary]
            if not kept:
                continue
            if colour == GREY:
                _draw_reference(axis, kept, style)
                continue
            shift = DODGE * (trained.index(label) - (len(trained) - 1) / 2)
            axis.errorbar(
                [i + shift for i, _ in kept],
                [summary.mean for _, summary in kept],
                yerr=[summary.std or 0 for _, summary in kept],
                color=colour,
                marker=marker,
                ls=style,
                markersize=4,
                lw=1.4,
                capsize=2,
                elinewidth=0.9,
            )
    axis.set_xticks(range(len(shots)), [str(s) for s in shots])
    axis.set_xlim(-0.4, len(shots) - 0.6)
    axis.set_ylim(-2, 100)  # a line at 0 is seen
    axis.tick_params(labelsize=10)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _averaged(rows: dict[Shots, list[Runs]]) -> str:
    counts = sorted({len(common_runs(of).tasks) for of in rows.values()})
    return f"average of {counts[0]} tasks" if len(counts) == 1 else f"average of {counts[0]} to {counts[-1]} tasks"


def _draw_reference(axis: Any, points: Sequence[tuple[int, Summary]], style: str) -> None:
    """Draws zero-shot as a horizontal line; it has steps where not the same tasks count at every number of shots."""
    ends = [(i + side, summary.mean) for i, summary in points for side in (-0.5, 0.5)]
    axis.plot(*zip(*ends, strict=True), color=GREY, ls=style, lw=1.4, zorder=1)


def _legend(figure: Any, styles: dict[str, tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    names = [
        Line2D([], [], color=c, marker="" if c == GREY else m, markersize=6, lw=1.6, label=label)
        for label, (c, m) in styles.items()
    ]
    kinds = [Line2D([], [], color="black", ls=style, lw=1.4, label=measure) for measure, style in STYLES]
    handles = [*names, *kinds]
    widest = 0.9 + 0.08 * max(len(label) for label in styles)  # inches
    fitting = max(1, int(figure.get_figwidth() / widest))
    lines = -(-len(handles) // fitting)
    columns = -(-len(handles) // lines)  # lines of equal length
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)


def _limits(axis: Any, points: Sequence[tuple[float, float]]) -> None:
    for values, set_limits in zip(zip(*points, strict=True), (axis.set_xlim, axis.set_ylim), strict=False):
        pad = max(4.0, 0.15 * (max(values) - min(values)))
        set_limits(max(0, min(values) - pad), min(100, max(values) + pad))


def _iso_lines(axis: Any) -> None:
    """Draws robust = H clean / (2 clean - H) for round H, as far as it is in the picture."""
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    for h in ISO:
        grid = [left + (right - left) * i / 200 for i in range(201)]
        curve = [(c, h * c / (2 * c - h)) for c in grid if 2 * c > h]
        inside = [(c, r) for c, r in curve if low <= r <= high]
        if len(inside) > 1:
            axis.plot(*zip(*inside, strict=True), color=GREY, lw=0.7, alpha=0.5, zorder=0)
            axis.annotate(
                f"H = {h}",
                inside[-1],
                fontsize=8,
                color=GREY,
                ha="right",
                va="bottom",
                textcoords="offset points",
                xytext=(0, 1),
            )
    axis.set_xlim(left, right)
    axis.set_ylim(low, high)


def few_shot_sections(sections: Sequence[Section], attack: str) -> list[Section]:
    """Returns the sections that are drawn against shots: few-shot ones that have the attack."""
    return [s for s in sections if s.protocol == FEW_SHOT and any(cell.has(attack) for cell in s.cells)]


def _heading(section: Section, attack: str) -> str:
    return f"{section_title(section)} ({section.split} split, {attack}, {section.threat})"
