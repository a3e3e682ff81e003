"""The paper's protocols, methods and seeds: what is run, where, and the lines that it leaves."""

from .lines import Line, Lines, Result, read_lines
from .plan import PROTOCOLS, Cell, Plan, Target
from .run import listing, run_cell, run_cells, tune_adapter
from .suites import SUITES, Suite, get_suite
from .workers import BACKENDS

__all__ = [
    "BACKENDS", "PROTOCOLS", "SUITES", "Cell", "Line", "Lines", "Plan", "Result", "Suite", "Target", "get_suite", "listing",
    "read_lines", "run_cell", "run_cells", "tune_adapter",
]  # fmt: skip
