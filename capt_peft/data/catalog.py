"""The published data sets that `load_task` knows by name; what is known of them stands in `catalog.yaml`, with its sources."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import yaml

from .published import Entry


def _read() -> dict[str, Entry]:
    content = yaml.safe_load((files(__package__) / "catalog.yaml").read_text(encoding="utf-8"))
    entries = {}
    for name, values in content.items():
        values |= {key: tuple(values[key]) for key in ("sources", "left_out") if key in values}
        entries[name] = Entry(name=name, **{"classes": name, **values})
    return entries


CATALOG: dict[str, Entry] = _read()


def recognize(path: Path) -> Entry | None:
    """Returns the entry whose CoOp folder (or split file) `path` is, or None."""
    return next((item for item in CATALOG.values() if item.is_coop_root(path)), None)
