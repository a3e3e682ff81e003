"""matplotlib, where it is installed."""

from __future__ import annotations

from typing import Any


def import_figure() -> Any:
    """Returns matplotlib's Figure.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'capt-peft[plot]'.") from error
    return Figure
