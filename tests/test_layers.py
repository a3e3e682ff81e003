"""The rooms of the package import only what stands above them in the table of CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "capt_peft"
TABLE = re.findall(
    r"^\| ((?:`[\w.]+`(?:, )?)+) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
)
LEVELS = {room.removesuffix(".py"): level for level, room in enumerate(re.findall(r"`([\w.]+)`", " ".join(TABLE)))}
ROOMS = sorted(path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())
BESIDE = {"backbones": {"utils", "tuner"}}


def imported(path):
    """Yields the rooms that a file of the package imports by a relative import, its own left out."""
    inside = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == len(inside):
            yield from [node.module.split(".")[0]] if node.module else [name.name for name in node.names]


def test_the_table_has_every_room():
    assert set(LEVELS) | {"__init__", "__main__"} == set(ROOMS) and next(iter(LEVELS)) == "utils"


@pytest.mark.parametrize("room", sorted(LEVELS))
def test_a_room_imports_what_stands_above_it(room):
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").is_file() else sorted((PACKAGE / room).rglob("*.py"))
    found = {(path.name, other) for path in files for other in imported(path) if other in LEVELS}
    if room in BESIDE:
        assert {other for _, other in found} <= BESIDE[room]
    else:
        assert not [pair for pair in sorted(found) if LEVELS[pair[1]] >= LEVELS[room] and pair[1] != "backbones"]
