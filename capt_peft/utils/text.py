"""Values from outside in messages: a few of many, never more than a few hundred characters, and where two of them differ."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

LIMIT = 120  # characters


def some(items: Iterable[object], limit: int = 3, *, quote: bool = False, separator: str = ", ") -> str:
    """Returns the first items and the number of the others, as "a, b, c and 2 more".

    Args:
        items: Anything with a `str`.
        limit: Number of items to name, at least 1.
        quote: Write each as Python does, and cut it after 40 characters.
        separator: What stands between two items.
    """
    texts = [shown(item, 40) if quote else str(item) for item in items]
    more = f" and {len(texts) - limit:,} more" if len(texts) > limit else ""
    return separator.join(texts[:limit]) + more


def counted(n: int, one: str, many: str | None = None) -> str:
    """Returns a number with its noun, as "1 token" and "2 tokens"; `many` is the plural where that is not `one` with an s."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def shown(value: Any, limit: int = LIMIT) -> str:
    """Returns the `repr` of a value, cut after `limit` characters; then its length follows."""
    if isinstance(value, str) and len(value) > limit:
        return f"{value[:limit]!r}... ({len(value)} characters)"
    return cut(repr(value), limit)


def cut(text: Any, limit: int = 3 * LIMIT) -> str:
    """Returns a text, such as another library's error, cut after `limit` characters."""
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def short(text: Any, limit: int = 300) -> str:
    """Returns the end of a long path or message, for an error."""
    text = os.fsdecode(text) if isinstance(text, bytes) else str(text)
    return text if len(text) <= limit else f"...{text[-limit:]}"


def differences(
    new: Any, old: Any, *, missing: Any = None, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Any, Any]]:
    """Yields where two JSON contents differ: keys and places that lead there, and both values.

    Objects are compared entry by entry, and lists that are equally long.

    Args:
        new: One content.
        old: The other.
        missing: What stands for an entry that one of them lacks.
        path: What leads to both, for those who call it with a part.
    """
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        for key in {**new, **old}:
            yield from differences(new.get(key, missing), old.get(key, missing), missing=missing, path=(*path, key))
    elif isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        for i, (one, other) in enumerate(zip(new, old, strict=True)):
            yield from differences(one, other, missing=missing, path=(*path, i))
    elif new != old:
        yield path, new, old
