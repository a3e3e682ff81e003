"""Pictures by matplotlib: figures without pyplot's state, their style, and files that come out the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind people can tell apart, and three more; CAPT has the first one wherever it is drawn
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8c564b", "#5e3c99", "#999933")
GREY = "#6e7781"  # of zero-shot
RIGHT, WRONG = "#1a7f37", "#cf222e"


def new_figure(width: float, height: float) -> Any:
    """Returns an empty figure of a size in inches."""
    from matplotlib.figure import Figure  # here, for it takes a second that most commands do not need

    return Figure(figsize=(width, height), layout="constrained")


def add_panels(figure: Any, count: int, columns: int, **shared: bool) -> list[Any]:
    """Adds lines of panels; only the last one of a column has numbers below, also above a place that is empty."""
    axes = figure.subplots(-(-count // columns), columns, squeeze=False, sharex=True, **shared).ravel()
    for i, axis in enumerate(axes):
        axis.set_visible(i < count)
        axis.tick_params(labelbottom=i + columns >= count)
    return list(axes[:count])


def open_axis(axis: Any) -> None:
    """Draws a pale grid, and no frame above and on the right."""
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, *paths: Path, dpi: int) -> None:
    """Writes a figure to files of the formats that their suffixes say; the same figure gives the same PNG and SVG."""
    from matplotlib import rc_context

    for path in paths:
        with rc_context({"svg.hashsalt": "capt-peft"}):
            figure.savefig(path, dpi=dpi, metadata={"Date": None} if path.suffix == ".svg" else None)
