"""The leaderboard: one page that needs no server and loads nothing, from boards of entries that may be compared."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..utils.files import write_text
from ..utils.markup import plain
from .boards import Board, Found
from .entries import VERIFIED, BoardEntry, Score

TITLE = "Robust CLIPs and their defences"
PAGE = "index.html"
COLOURS = 6
# a heading, how its column is sorted, and which way first
COLUMNS = (
    ("Method", "text", "up"), ("Rank", "number", "up"), ("Clean", "number", "down"), ("Robust", "number", "down"),
    ("By transfer", "number", "down"), ("Defence", "text", "up"), ("Backbone", "text", "up"), ("n", "number", "down"),
    ("Seeds", "number", "down"), ("Masked gradients", "text", "up"), ("Verified", "text", "down"), ("Card", "text", "up"),
)  # fmt: skip
LEFT, RIGHT, TOP, BOTTOM = 50, 400, 10, 270  # of the plot
_HERE = Path(__file__).parent


def write_leaderboard(found: Found, folder: str | Path) -> Path:
    """Writes the page of a leaderboard.

    Args:
        found: Its boards, and what could not be shown.
        folder: Where to write index.html.

    Returns:
        The path of the page.

    Raises:
        ValueError: There is nothing to show.
    """
    if not found.boards:
        reasons = "; ".join(f"{plain(place, 80)}: {plain(reason, 120)}" for place, reason in found.left_out[:3])
        raise ValueError(f"There is nothing to show{f' ({reasons})' if reasons else ''}.")
    path = Path(folder, PAGE)
    write_text(path, page(found))
    return path


def page(found: Found) -> str:
    """Returns the page as HTML; text from outside is escaped, and a script of anybody else does not run."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    own = {
        kind: (_HERE / f"leaderboard.{suffix}").read_text(encoding="utf-8")
        for kind, suffix in (("style", "css"), ("script", "js"))
    }
    boards = [_board(number, board) for number, board in enumerate(_in_order(found.boards))]
    return environment.get_template("leaderboard.html").render(
        title=TITLE,
        hashes={kind: f"sha256-{_digest(text)}" for kind, text in own.items()},
        **{kind: Markup(text) for kind, text in own.items()},  # our own files
        filters=_filters(boards),
        boards=boards,
        columns=COLUMNS,
        left_out=[(plain(place), plain(reason)) for place, reason in found.left_out],
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _in_order(boards: Iterable[Board]) -> list[Board]:
    """Returns the boards with the most entries first, before them those that show what a defence changes."""
    return sorted(
        boards,
        key=lambda board: (
            {bool(entry.defence) for entry in board.entries} != {True, False}, -len(board.entries), board.protocol,
            board.data, str(board.threat), board.attacks,
        ),
    )  # fmt: skip


def _filters(boards: list[dict[str, Any]]) -> list[tuple[str, str, list[str], str]]:
    """Returns name, label, values and the first value of each filter; the page begins with one protocol."""
    found = []
    for name, label in (("protocol", "Protocol"), ("norm", "Norm"), ("epsilon", "Epsilon"), ("data", "Data")):
        values = list(dict.fromkeys(board[name] for board in boards))
        found.append((name, label, sorted(values), values[0] if name == "protocol" else ""))
    bases = sorted({row["base"] for board in boards for row in board["rows"]})
    return [*found, ("base", "Backbone", bases, "")]


def _board(number: int, board: Board) -> dict[str, Any]:
    """Returns what the template shows of a board."""
    bases = sorted({plain(entry.base) for entry in board.entries})
    colours = {base: i % COLOURS for i, base in enumerate(bases)}
    norm, epsilon = str(board.threat).split(" ", 1)
    rows, points = [], []
    for place, (entry, rank) in enumerate(zip(board.entries, board.ranks, strict=True)):
        point = None if entry.robust is None else f"point-{number}-{place}"
        rows.append(_row(entry, rank, point))
        if entry.robust is not None:
            points.append({"id": point, "colour": colours[plain(entry.base)], **_point(entry, entry.robust)})
    ticks = [{"label": value, "x": _x(value / 100), "y": _y(value / 100)} for value in range(0, 101, 20)]
    return {
        "id": number, "protocol": plain(board.protocol), "data": plain(board.data), "threat": str(board.threat), "norm": norm,
        "epsilon": epsilon, "attacks": [plain(name) for name in board.attacks] or ["no attack"], "rows": rows,
        "points": points, "ticks": ticks, "bases": [{"name": base, "colour": colours[base]} for base in bases],
    }  # fmt: skip


def _row(entry: BoardEntry, rank: int | None, point: str | None) -> dict[str, Any]:
    link = entry.link if entry.link.startswith(("https://", "http://", "cards/")) else ""
    signs = None if entry.signs is None else ", ".join(map(plain, entry.signs)) or "none"
    mark = "good" if entry.verified == VERIFIED else "bad" if entry.verified.startswith("not verified") else ""
    return {
        "method": plain(entry.method), "rank": rank, "base": plain(entry.base), "defence": plain(entry.defence),
        "clean": _shown(entry.clean), "robust": _shown(entry.robust), "attacks": [plain(name) for name in entry.attacks],
        "transfer": _shown(entry.transfer), "undefended": _shown(entry.undefended), "n": entry.clean.n,
        "decisions": entry.decisions, "seeds": entry.seeds,
        "signs": signs, "verified": plain(entry.verified), "mark": mark, "link": link,
        "place": plain(entry.place, 60), "unranked": plain(entry.unranked), "point": point,
    }  # fmt: skip


def _shown(score: Score | None) -> dict[str, str]:
    if score is None:
        return {"value": "", "text": "–", "interval": ""}
    low, high = score.interval
    spread = "" if score.spread is None else f" ± {100 * score.spread:.1f}"
    return {
        "value": f"{score.value:.6f}",
        "text": f"{100 * score.value:.1f}{spread}",
        "interval": f"{100 * low:.1f} to {100 * high:.1f}",
    }


def _point(entry: BoardEntry, robust: Score) -> dict[str, Any]:
    """Returns where a row lies in the plot, with its intervals."""
    (x0, x1), (y0, y1) = entry.clean.interval, robust.interval
    defence = f" with {entry.defence}" if entry.defence else ""
    label = (
        f"{entry.method} on {entry.base}{defence}: clean {100 * entry.clean.value:.1f}, robust {100 * robust.value:.1f}"
    )
    return {
        "base": plain(entry.base), "defended": bool(entry.defence), "label": plain(label), "x": _x(entry.clean.value),
        "y": _y(robust.value), "x0": _x(x0), "x1": _x(x1), "y0": _y(y0), "y1": _y(y1),
    }  # fmt: skip


def _x(share: float) -> float:
    return round(LEFT + (RIGHT - LEFT) * share, 1)


def _y(share: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * share, 1)
