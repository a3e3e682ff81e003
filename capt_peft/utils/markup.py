"""Text from outside in Markdown: it can say anything and change nothing around it."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

LIMIT = 300  # characters of a name or sentence that are shown
_JOINERS = "\u200c\u200d"  # of many scripts and emoji; every other invisible character is left out
# What has a meaning within a line of Markdown: emphasis, code, links, HTML, cells, strikethrough, mathematics, addresses that
# become links by themselves, and underscores that are not within a word.
_SPECIAL = re.compile(r"[\\`*\[\]<>&|~$@]|:(?=\S)|(?<=www)\.|(?<![^\W_])_|_(?![^\W_])", re.IGNORECASE)
_CODE = re.compile(r"[\w./ :@+=,-]+")


class Markdown(str):
    """Text that is Markdown already; `escape` leaves it as it is."""

    __slots__ = ()


def plain(text: Any, limit: int = LIMIT) -> str:
    """Returns a text as one line, without control characters, and cut if it is long.

    Args:
        text: Anything with a `str`.
        limit: Number of characters to keep, at least 1.
    """
    line = " ".join(str(text).split())
    kept = (_visible(character) for character in line)
    line = " ".join("".join(kept).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _visible(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cs":  # half of a character: no file can hold it
        return "\ufffd"
    return "" if category in ("Cc", "Cf") and character not in _JOINERS else character


def escape(text: Any, limit: int = LIMIT) -> Markdown:
    """Returns a text as Markdown that shows it as it is, on one line.

    It cannot end a line or a cell of a table, nor bring emphasis, links, images, code or HTML. What has a meaning is written as a
    character reference (`&#42;`), which every dialect of Markdown reads, and a bar as tables want it.

    Args:
        text: Anything with a `str`; `Markdown` is returned unchanged.
        limit: Number of characters to keep, at least 1; a longer text is cut.
    """
    if isinstance(text, Markdown):
        return text
    return Markdown(_SPECIAL.sub(lambda m: "\\|" if m[0] == "|" else f"&#{ord(m[0])};", plain(text, limit)))


def code(text: Any) -> Markdown:
    """Returns a text as a code span or, if it has characters that are rare in names, escaped."""
    line = plain(text)
    return Markdown(f"`{line}`") if _CODE.fullmatch(line) else escape(line)


def quoted(text: Any) -> Markdown:
    """Returns a text as a string literal of Python, for a block of code; it holds no HTML and no backticks."""
    literal = json.dumps(plain(text), ensure_ascii=False)
    return Markdown(re.sub(r"[<>&`]", lambda match: f"\\u{ord(match[0]):04x}", literal))


def table_row(cells: Sequence[Any]) -> str:
    """Returns a row of a Markdown table; cells are escaped unless they are `Markdown`."""
    return "| " + " | ".join(map(escape, cells)) + " |"
