"""Values from outside in messages: never more than a few hundred characters of them."""

from __future__ import annotations

from typing import Any

LIMIT = 120


def shown(value: Any, limit: int = LIMIT) -> str:
    """Returns the `repr` of a value, cut after `limit` characters; then its length follows."""
    if isinstance(value, str) and len(value) > limit:
        return f"{value[:limit]!r}... ({len(value)} characters)"
    return cut(repr(value), limit)


def cut(text: Any, limit: int = 3 * LIMIT) -> str:
    """Returns a text, such as another library's error, cut after `limit` characters."""
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
