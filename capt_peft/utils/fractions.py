"""Numbers as this field writes them: "4/255"."""

from __future__ import annotations

import math
import numbers
import re
from fractions import Fraction

_FRACTION = re.compile(r"\s*(-?\d+\.?\d*)\s*/\s*(\d+\.?\d*)\s*")


def parse_fraction(value: float | int | str) -> float:
    """Returns a non-negative number, exact where it is written as a fraction.

    Args:
        value: a number, or a text such as `"4/255"` or `"0.03"`.

    Returns:
        The float nearest to the value.

    Raises:
        TypeError: `value` is neither a number nor a text.
        ValueError: the text cannot be read, or the number is negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
        raise TypeError(f"a number or a text such as '4/255' is needed, got {value!r} of type {type(value).__name__}")
    try:
        fraction = _FRACTION.fullmatch(value) if isinstance(value, str) else None
        number = float(Fraction(fraction[1]) / Fraction(fraction[2])) if fraction else float(value)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(
            f"{value!r} is not a number: write a fraction such as '4/255' or a decimal such as '0.03'"
        ) from None
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{value!r} is not allowed: the value must be finite and at least 0, such as '4/255' or 0.03")
    return number + 0.0  # minus zero becomes zero


def format_fraction(value: float) -> str:
    """Writes a number as this field does: a short decimal if that is exact, else n/255 if that is, else six digits."""
    levels = round(value * 255)
    short = f"{value:.6g}"
    if float(short) != value and math.isclose(levels / 255, value, rel_tol=1e-12):
        return f"{levels}/255"
    return short
