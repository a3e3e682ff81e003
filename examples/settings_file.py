"""Reading a YAML file of arguments: every value is of its argument's type, or a sentence says which is not."""

from __future__ import annotations

import difflib
import math
import reprlib
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

# what PyYAML raises for damaged files besides its own errors, as for `!!int ""`, `!!timestamp x` or ten thousand brackets
DAMAGE = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxlong, _short.maxother = 2, 80, 60, 80
short = _short.repr


class _Loader(yaml.SafeLoader):
    """YAML without aliases, of which a few lines can make gigabytes, and without keys that are given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not read; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.YAMLError(f"it gives {short(twice)} twice")
        return super().construct_mapping(node, deep)


def read_settings(path: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a YAML file with a line `name: value` for each argument.

    Args:
        path: The file.
        kinds: The types of all arguments by name.

    Returns:
        Values by name, of these types.

    Raises:
        ValueError: No such file, not YAML, an unknown name or a value of another type; the message names the file and the name.
    """
    try:
        content = load_yaml(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be opened ({error.strerror}). Check its name.") from error
    except ValueError as error:
        raise ValueError(f"{path} is no YAML that can be read: {error}.") from error
    return fit_settings(str(path), content, kinds)


def load_yaml(text: str | bytes) -> Any:
    """Reads YAML without aliases and without names that are given twice.

    Raises:
        ValueError: It is not YAML, or has these.
    """
    try:
        return yaml.load(text, _Loader)
    except DAMAGE as error:
        raise ValueError(" ".join(str(error)[:1000].split())) from error


def fit_settings(where: str, content: Any, kinds: Mapping[str, Any], what: str = "arguments") -> dict[str, Any]:
    """Returns values by name, each of its argument's type.

    Args:
        where: What holds them, for messages.
        content: What was read there.
        kinds: The types of all arguments by name.
        what: What they are called in messages.

    Raises:
        ValueError: It is no mapping, a name is unknown, or a value is of another type.
    """
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold `name: value` lines, not {short(content)}.")
    unknown = [key for key in content if key not in kinds]
    if unknown:
        names = ", ".join(key if isinstance(key, str) and key.isidentifier() else short(key) for key in unknown[:5])
        near = difflib.get_close_matches(str(unknown[0]), kinds, 1, 0.7)
        more = f"Did you mean {near[0]}?" if near else "`--help` lists them."
        which = (
            f"{where}: unknown {what} {names[:500]}"
            if what == "arguments"
            else f"Unknown {what} {names[:500]} in {where}"
        )
        raise ValueError(f"{which}. {more}")
    return {name: _fit(f"{where}: {name}", value, kinds[name]) for name, value in content.items()}


def _fit(name: str, value: Any, kind: Any) -> Any:
    """Returns a value as its type has it, where YAML reads `1e-3` as words, `no` as False, or 4 for "4"."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    words = [member.value for k in kinds if isinstance(k, type) and issubclass(k, Enum) for member in k]
    if words:
        value = "no" if value is False else value
        if value in words:
            return value
        raise ValueError(f"{name}={short(value)} must be one of {', '.join(words)}.")
    for k in kinds:
        fitted = _as(value, k)
        if fitted is not None or (value is None and k is type(None)):
            return fitted
    if str in kinds and value is True and name.endswith("resume_from_checkpoint"):
        return "true"
    wanted = " or ".join("None" if k is type(None) else getattr(k, "__name__", str(k)) for k in kinds)
    raise ValueError(
        f"{name}={short(value)} must be {wanted}; `--help` describes it. Words that YAML reads as else need quotes."
    )


def _as(value: Any, kind: Any) -> Any:
    """Returns a value as of this type, or None if it is not."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is int:
        return value if number and isinstance(value, int) and abs(value) < 2**63 else None
    if kind is float:
        try:
            found = float(value) if number or isinstance(value, str) else math.nan
        except (ValueError, OverflowError):
            return None
        return None if math.isnan(found) else value if number else found
    if kind is str:
        return str(value) if number and abs(value) < 2**63 else value if _is_text(value) else None
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else None
    if get_origin(kind) is list:
        return value if isinstance(value, list) and all(_is_one_of(item, get_args(kind)[0]) for item in value) else None
    if kind is dict or get_origin(kind) is dict:
        return value if isinstance(value, dict) and all(map(_is_text, value)) else None
    return None


def _is_one_of(value: Any, kind: Any) -> bool:
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return any(_is_text(value) if k is str else _as(value, k) is not None for k in kinds)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value and value.encode(errors="replace").decode() == value
