"""The pictures: accuracy against shots, clean against robust, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ..benchmark.plan import TRANSFERS, Shots, shots_name
from ..plotting import COLOURS, GREY, add_panels, new_figure, open_axis
from ..utils.text import cut
from .sections import Section
from .statistics import CLEAN, HARMONIC, OURS, ROBUST, Difference, Rows, compare, rows_of

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
LOOKS: tuple[tuple[str, str, Literal["full", "none"]], ...] = (
    (CLEAN, "-", "full"),
    (ROBUST, "--", "none"),
)  # lines, and how markers are filled
ISO = range(10, 100, 10)
DODGE = 0.05  # moves rows apart, so that their error bars do not cover each other
MARGIN = 0.4  # of a panel, beside its first and last number of shots
PREFERRED_SHOTS = 16
LONG = 32  # letters of a model's name
CROWDED = 24  # rows, of which a picture can name no more
CROWDED_PANELS = 16  # the same where each panel shows them all
Styles = dict[str, tuple[str, str]]


def shots_figure(section: Section) -> Any | None:
    """Draws clean and robust accuracy of a few-shot section against shots, one panel a task and one for their average.

    None where there are more than 16 rows, as those of a search: their legend would leave no room for panels.
    """
    rows = {shots: rows_of(section, shots) for shots in section.shots}
    tasks = list(dict.fromkeys(task for of in rows.values() for task in of.tasks))
    counts = sorted({len(of.common.tasks) for of in rows.values()})
    average = f"average of {counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} tasks"
    panels = {average: rows} if len(tasks) > 1 else {}
    panels |= {task: {shots: of.of_tasks([task]) for shots, of in rows.items()} for task in tasks}
    styles = row_styles(rows_of(section))
    if len(styles) > CROWDED_PANELS:
        return None
    columns, lines = min(4, len(panels)), -(-len(panels) // 4)
    figure = new_figure(max(2.9 * columns + 0.6, 5.5), 2.5 * lines + 1.2)
    axes = add_panels(figure, len(panels), columns, sharey=True)
    for axis, (title, of) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, of, styles)
        axis.set_title(title, fontsize=11)
    for axis in axes[-columns:]:
        axis.set_xlabel("shots", fontsize=11)
    figure.supylabel("accuracy (%)", fontsize=11)
    _legend(figure, styles)
    figure.suptitle(_heading(section), fontsize=11)
    return figure


def scatter_figure(section: Section) -> Any | None:
    """Draws robust against clean accuracy at 16 shots or else the most, averaged over tasks; None without common runs.

    Where there are more than 24 rows, one colour and marker stand for a method, and only its row of the highest H is named.
    """
    shots = PREFERRED_SHOTS if PREFERRED_SHOTS in section.shots else section.shots[-1]
    mean, spread = rows_of(section, shots).averages
    mean = mean.dropna()
    if mean.empty:
        return None
    styles = {label: style for label, style in row_styles(rows_of(section)).items() if label in mean.index}
    named = {*styles}
    if crowded := len(styles) > CROWDED:
        method = section.runs.drop_duplicates("label").set_index("label").method
        named = {*mean[HARMONIC].groupby(method).idxmax()}
        kinds = _cycled(sorted(method.unique(), key=lambda of: of != OURS))
        styles = {label: kinds[method[label]] if style[0] != GREY else style for label, style in styles.items()}
    figure = new_figure(7.2, max(4.6, 0.24 * len(named) + 0.3))  # as high as its legend
    axis = figure.subplots()
    for label, (colour, marker) in styles.items():
        style = {"color": colour, "marker": marker, "markersize": 8, "ls": "", "label": label, "zorder": 3}
        place = mean.loc[label, [CLEAN, ROBUST]]
        if label in named:
            xerr, yerr = (np.nan_to_num(spread.at[label, measure]) or None for measure in (CLEAN, ROBUST))
            axis.errorbar(*place, xerr=xerr, yerr=yerr, capsize=3, **style)
        else:
            axis.plot(*place, **style | {"markersize": 5, "alpha": 0.4, "label": None, "zorder": 2})
    for values, set_limits in ((mean[CLEAN], axis.set_xlim), (mean[ROBUST], axis.set_ylim)):
        pad = max(4.0, 0.15 * (values.max() - values.min()))
        set_limits(max(0, values.min() - pad), min(100, values.max() + pad))
    _iso_lines(axis)
    axis.set_xlabel("clean accuracy (%)", fontsize=11)
    axis.set_ylabel("robust accuracy (%)", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    title = "the best H of each method" if crowded else None
    figure.legend(loc="outside right upper", frameon=False, fontsize=10, title=title, alignment="left")
    axis.set_title(
        f"{_heading(section)}\n{shots_name(shots)}; grey lines: equal harmonic mean H of the averages", fontsize=10
    )
    return figure


def differences_figure(sections: Sequence[Section]) -> Any | None:
    """Draws how far CAPT is above each baseline in H, one panel a section and number of shots; None without any."""
    several = len({section.model for section in sections}) > 1
    named = [(s, f"{s.title}\n{_model(s)}, " if several else f"{s.title}\n") for s in sections]
    panels = [(f"{name}{shots_name(shots)}", _compared(s, shots)) for s, name in named for shots in s.shots]
    panels = [(title, found) for title, found in panels if found]
    if not panels:
        return None
    columns, lines = min(3, len(panels)), -(-len(panels) // 3)
    tallest = max(len(found) for _, found in panels)
    figure = new_figure(max(3.6 * columns + 1.0, 7.2), (0.36 * tallest + 1.1) * lines + 0.8)  # as wide as its title
    for axis, (title, found) in zip(add_panels(figure, len(panels), columns), panels, strict=True):
        _bars(axis, found)
        axis.set_title(title, fontsize=10)
    figure.supxlabel("points of H (95% interval; pale where it contains 0 or there is none)", fontsize=10)
    figure.suptitle(f"{OURS} minus each baseline, robust under {sections[0].attack}", fontsize=11)
    return figure


def row_styles(rows: Rows) -> Styles:
    """Returns the colour and the marker of each label, the same in every picture of a section."""
    trained = sorted((of for of in rows.labels if of not in rows.once), key=lambda label: label not in rows.ours)
    cycled = _cycled(trained)
    return {label: cycled.get(label, (GREY, "*")) for label in rows.labels}


def _cycled(names: Sequence[str]) -> Styles:
    """Returns a colour and a marker of each name; CAPT's come first."""
    return {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def _draw_panel(axis: Any, rows: Mapping[Shots, Rows], styles: Styles) -> None:
    trained = [label for label, (colour, _) in styles.items() if colour != GREY]
    dodge = min(DODGE, 2 * (MARGIN - DODGE) / len(trained)) if trained else DODGE  # all rows lie within the panel
    frames = [[frame.reindex(list(styles)) for frame in of.averages] for of in rows.values()]
    for label, (colour, marker) in styles.items():
        for measure, line, fill in LOOKS:
            means, spreads = ([frame.at[label, measure] for frame in of] for of in zip(*frames, strict=True))
            places = [i for i, mean in enumerate(means) if not np.isnan(mean)]
            means, spreads = [means[i] for i in places], [np.nan_to_num(spreads[i]) for i in places]
            if colour == GREY and places:
                # a horizontal line; it has steps where not the same tasks count at every number of shots
                ends = [i + side for i in places for side in (-0.5, 0.5)]
                axis.plot(ends, np.repeat(means, 2), color=GREY, ls=line, lw=1.4, zorder=1)
            elif places:
                shift = dodge * (trained.index(label) - (len(trained) - 1) / 2)
                style = {"color": colour, "marker": marker, "fillstyle": fill, "markersize": 4, "ls": line, "lw": 1.4}
                axis.errorbar([i + shift for i in places], means, yerr=spreads, capsize=2, elinewidth=0.9, **style)
    axis.set_xticks(range(len(rows)), [str(shots) for shots in rows])
    axis.set_xlim(-MARGIN, len(rows) - 1 + MARGIN)
    axis.set_ylim(-2, 102)  # a line at 0 or 100 is seen
    axis.tick_params(labelsize=10)
    open_axis(axis)


def _legend(figure: Any, styles: Styles) -> None:
    from matplotlib.lines import Line2D

    lines = {label: Line2D([], [], color=c, marker="" if c == GREY else m, lw=1.6) for label, (c, m) in styles.items()}
    for measure, line, fill in LOOKS:
        lines[measure] = Line2D([], [], color="black", ls=line, lw=1.4, marker=MARKERS[0], fillstyle=fill, markersize=5)
    widest = 0.9 + 0.08 * max(len(label) for label in styles)  # inches
    fitting = max(1, int(figure.get_figwidth() / widest))
    columns = -(-len(lines) // -(-len(lines) // fitting))  # lines of equal length
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)


def _iso_lines(axis: Any) -> None:
    """Draws robust = H clean / (2 clean - H) for round H, as far as it is in the picture."""
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    for h in ISO:
        grid = [left + (right - left) * i / 200 for i in range(201)]
        curve = [(c, h * c / (2 * c - h)) for c in grid if 2 * c > h]
        inside = [(c, r) for c, r in curve if low <= r <= high]
        if len(inside) > 1:
            axis.plot(*zip(*inside, strict=True), color=GREY, lw=0.7, alpha=0.5, zorder=0)
            style = {"fontsize": 8, "color": GREY, "ha": "right", "va": "bottom"}
            axis.annotate(f"H = {h}", inside[-1], xytext=(0, 1), textcoords="offset points", **style)
    axis.set_xlim(left, right)
    axis.set_ylim(low, high)


def _bars(axis: Any, found: Sequence[Difference]) -> None:
    for place, one in enumerate(found):
        value, ends = one.measures[HARMONIC]
        alpha = 0.3 if ends is None or ends[0] <= 0 <= ends[1] else 0.85
        axis.barh(place, value, height=0.6, color=COLOURS[0], alpha=alpha)
        if ends:
            axis.plot(ends, [place, place], color="black", lw=1.3, marker="|", markersize=6)
        # the figure stands beyond the bar and its interval, which may be too small to read
        side, end = (1, max) if value >= 0 else (-1, min)
        style = {"fontsize": 9, "va": "center", "ha": "left" if side > 0 else "right"}
        where = (end([value, 0.0, *(ends or ())]), place)
        axis.annotate(f"{value:+.1f}", where, xytext=(4 * side, 0), textcoords="offset points", **style)
    axis.margins(x=0.16)
    axis.set_yticks(range(len(found)), [one.baseline for one in found], fontsize=10)
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.axvline(0, color="black", lw=0.8)
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _compared(section: Section, shots: Shots) -> list[Difference]:
    rows = rows_of(section, shots)
    if section.protocol in TRANSFERS:
        rows = rows.of_tasks([task for task in rows.tasks if task != section.source])
    return compare(rows)[0]


def _heading(section: Section) -> str:
    return f"{section.title} ({section.split} split, {_model(section)})\n{section.attack}, {section.threat}"


def _model(section: Section) -> str:
    """Returns a name of the model that fits into a title."""
    name = section.model if len(section.model) <= LONG else section.model.replace("\\", "/").rstrip("/").split("/")[-1]
    return cut(name, LONG)
