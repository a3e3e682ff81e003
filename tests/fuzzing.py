"""What the fuzz tests share: a bounded, repeatable run of hypothesis, values of every kind, and a limit on memory."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

# the same examples in every run; `make test-all` takes ten times as many
LENGTHS = pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.long)], ids=["short", "long"])

NUMBERS = st.sampled_from([
    0, 1, 2, 3, 4, 5, 8, 9, 74, 75, 76, 77, -1, 10**4, 10**9, 2**31, 2**63, 2**64, -(10**30), 10**400,
    0.0, -0.0, 0.5, 1.5, 1e-300, 1e308, float("nan"), float("inf"), float("-inf"),
])  # fmt: skip
TEXTS = st.text(max_size=12) | st.sampled_from(["", " ", "2", "none", "CAPT", "{}", "a {", "\x00", "..", "é" * 300])
SCALARS = NUMBERS | TEXTS | st.booleans() | st.none()
VALUES = SCALARS | st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)


def fuzz(examples, *strategies):
    """Runs a property at once, on this many examples of the strategies."""

    def run(holds):
        bounds = {
            "max_examples": examples,
            "derandomize": True,
            "deadline": None,
            "database": None,
            "phases": [Phase.generate],  # shrinking would take minutes
            "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        }
        settings(**bounds)(given(*strategies)(holds))()

    return run


@contextmanager
def memory_limit(gib=2.0):
    """Within it, the process can have this much more memory: an absurd size fails at once, and swaps nothing."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gib * 2**30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
