"""A YAML file of arguments becomes the words of a command line, so that one parser reads, checks and describes both."""

from __future__ import annotations

import argparse
import difflib
import json
import reprlib
from collections.abc import Iterable
from typing import Any

import yaml

from .places import find_config

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


def load_yaml(text: str | bytes) -> Any:
    """Returns what YAML text holds, or raises a ValueError."""
    try:
        return yaml.load(text, _Loader)
    except DAMAGE as error:
        raise ValueError(" ".join(str(error)[:1000].split())) from error


def read_mapping(path: str, known: Iterable[str]) -> dict[str, Any]:
    """Returns the values of a YAML file with a line `name: value` for each of some known arguments.

    Raises:
        ValueError: No such file, not YAML, not such lines, or an unknown name; the message names the file.
    """
    try:
        content = load_yaml(find_config(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be opened ({error.strerror}). Check its name.") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}.") from error
    return known_names(path, content, known)


def known_names(where: str, content: Any, known: Iterable[str], what: str = "arguments") -> dict[str, Any]:
    """Returns a mapping whose names are all known; a ValueError says where it is and which name is not."""
    if not isinstance(content, dict | None):
        raise ValueError(f"{where} must hold `name: value` lines, not {short(content)}.")
    unknown = [key for key in content or {} if key not in known]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), known, 1, 0.7)
        names = ", ".join(key if isinstance(key, str) and key.isidentifier() else short(key) for key in unknown[:5])
        more = f"Did you mean {near[0]}?" if near else "`--help` lists them."
        raise ValueError(f"{where}: unknown {what} {names[:500]}. {more}")
    return content or {}


def as_words(action: argparse.Action, value: Any) -> list[str]:
    """Returns a value of a YAML file as one would type it after its option; none for null, which leaves the default.

    Raises:
        ValueError: It is of no type that one could type there: a list for an option of one value, yes or no for a text.
    """
    option, switch = f"--{action.dest}", action.nargs == "?" and action.const is True
    if value is None:
        return []
    if isinstance(value, bool) and not switch:
        # YAML reads `save_strategy: no` as false
        words = [word for word in action.choices or ("true",) if word == ("true" if value else "no")]
        if words and (action.choices or action.dest == "resume_from_checkpoint"):
            return [option, *words]
    elif isinstance(value, list) and action.nargs == "+" and value and all(map(_is_plain, value)):
        return [option, *map(str, value)]
    elif isinstance(value, list) and action.dest == "report_to" and len(value) == 1 and _is_plain(value[0]):
        return [f"{option}={value[0]}"]
    elif isinstance(value, dict) and action.dest.endswith(("_kwargs", "_config", "fsdp", "deepspeed")):
        return [f"{option}={json.dumps(value)}"]
    elif isinstance(value, bool) or _is_plain(value):
        return [f"{option}={value}"]
    kind = "a list" if isinstance(value, list) else "a mapping" if isinstance(value, dict) else type(value).__name__
    what = "one or more words" if action.nargs == "+" else "one value"
    raise ValueError(
        f"{action.dest}={short(value)} does not suit {option}, which takes {what}: YAML reads it as {kind}. Words such as no, on "
        "or 2024-01-01 need quotes."
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" not in value and value.encode(errors="replace").decode() == value
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
