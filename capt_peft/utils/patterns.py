"""Names with settings in them, such as "pgd-20": read by the patterns of what has them, or answered with all that there are."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Protocol, TypeVar


class Named(Protocol):
    """A class that goes by names with settings in them.

    Attributes:
        pattern: Regular expression of its names.
        help: Its names, or their shapes such as "pgd-STEPS", each with what it means and an example.
    """

    pattern: ClassVar[str]
    help: ClassVar[Mapping[str, str]]


Kind = TypeVar("Kind", bound=type[Any])


def add_kind(kind: Kind, base: type, kinds: dict[str, Any]) -> Kind:
    """Adds a class to kinds by their patterns, and returns it.

    Raises:
        TypeError: Not a subclass of `base` with a pattern and a help.
        ValueError: Another class has the same pattern.
    """
    texts: list[Any] = [getattr(kind, name, None) for name in ("pattern", "help")]
    if not (isinstance(kind, type) and issubclass(kind, base) and all(texts)):
        raise TypeError(f"{kind!r} must be a subclass of {base.__name__} with a pattern and a help.")
    other = kinds.setdefault(texts[0], kind)
    if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"The pattern {texts[0]!r} of {kind.__name__} is that of {other.__name__} already.")
    kinds[texts[0]] = kind
    return kind


def shapes_of(kinds: Collection[type[Named]]) -> dict[str, str]:
    """Returns the names of all kinds, or their shapes, each with what it means."""
    return {shape: meaning for kind in kinds for shape, meaning in kind.help.items()}


def from_name(what: str, name: object, kinds: Collection[Any], *arguments: Any) -> Any:
    """Returns what a name means: `kind.from_name(match, *arguments)` of the first kind whose pattern matches all of it.

    Args:
        what: What the kinds are, for messages: "attack".
        name: The name.
        kinds: Classes as `Named`, with `from_name`.
        arguments: Passed on.

    Raises:
        ValueError: Another name, or a setting out of range.
    """
    text = name if isinstance(name, str) else ""
    for kind in kinds:
        if match := re.fullmatch(kind.pattern, text):
            try:
                return kind.from_name(match, *arguments)
            except ValueError as error:
                raise ValueError(f"{what} {name!r}: {error}") from None
    known = "; ".join(f"{shape} ({meaning})" for shape, meaning in shapes_of(kinds).items())
    examples = [
        word for word in re.findall(r"\w(?:[\w./-]*\w)?", known) if any(re.fullmatch(k.pattern, word) for k in kinds)
    ]
    near = difflib.get_close_matches(text.lower(), examples, 1, 0.65)
    raise ValueError(f"unknown {what} {name!r}.{f' Did you mean {near[0]}?' if near else ''} Known: {known}")


def named_settings(match: re.Match[str]) -> dict[str, Any]:
    """Returns the settings that a name gives: the named groups of its pattern, digits as a whole number."""
    found = {name: text for name, text in match.groupdict().items() if text is not None}
    return {name: int(text) if text.isdecimal() else text for name, text in found.items()}
