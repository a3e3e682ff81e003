"""The models that come with the package: where they are, and which names mean them."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath

_FOLDER = Path(__file__).resolve().parents[1] / "toy"
TINY_CLIP = str(_FOLDER / "tiny_clip")
TINY_CLIP_ROBUST = str(_FOLDER / "tiny_clip_robust")
EMBEDDED = {Path(folder).name: folder for folder in (TINY_CLIP, TINY_CLIP_ROBUST)}


def model_path(name: str) -> str:
    """Returns the folder of an embedded model for its name, unless a folder of that name is here; other names as they are."""
    return name if os.path.isdir(name) else EMBEDDED.get(name, name)


def embedded_name(name: str) -> str | None:
    """Returns which embedded model a recorded name means: its own name, or its folder in any environment or checkout."""
    *_, folder, last = ("", "", *PureWindowsPath(name).parts)  # which splits at both slashes
    known = folder in ("toy", "examples") or name == last
    return last if known and last in EMBEDDED else None


def recorded_path(name: str) -> str:
    """Returns where the base model is that an adapter records: an embedded one that was in another place is taken from here."""
    return name if os.path.isdir(name) else EMBEDDED.get(embedded_name(name) or "", name)
