"""The paper's protocols, methods and seeds: what is run, where, and the lines that it leaves."""

from .executors import get_executor
from .lines import Lines
from .plan import PROTOCOLS, Cell, Plan, Target
from .run import run_cell
from .runner import listing, run_cells
from .suites import SUITES, Suite, get_suite

__all__ = [
    "PROTOCOLS", "SUITES", "Cell", "Lines", "Plan", "Suite", "Target", "get_executor", "get_suite", "listing", "run_cell",
    "run_cells",
]  # fmt: skip
