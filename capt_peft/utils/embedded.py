"""Models that go by a name: those that come with the package, and the published ones of `backbones/registry.yaml`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path, PureWindowsPath

import yaml

_PACKAGE = Path(__file__).resolve().parents[1]
TINY_CLIP = str(_PACKAGE / "toy" / "tiny_clip")
TINY_CLIP_ROBUST = str(_PACKAGE / "toy" / "tiny_clip_robust")
EMBEDDED = {Path(folder).name: folder for folder in (TINY_CLIP, TINY_CLIP_ROBUST)}
REGISTRY = _PACKAGE / "backbones" / "registry.yaml"
# the folders of published models in a cache end in these and their name, by which a recorded path is known again
CACHE = ("capt_peft", "backbones")

# makes the folder of a published model, fetching and converting it; set in capt_peft/__init__.py, for it builds on this
prepare_published: Callable[[str], str] | None = None


@cache
def published_names() -> tuple[str, ...]:
    """Returns the names of the published models."""
    return tuple(yaml.safe_load(REGISTRY.read_text(encoding="utf-8")))


def is_model_name(name: str) -> bool:
    """Tells whether a name means a model that comes with the package or that it knows where to get."""
    return name in EMBEDDED or (os.path.basename(name) == name and name in published_names())


def model_path(name: str) -> str:
    """Returns the folder of a model for its name, unless a folder of that name is here; other names as they are.

    A published model is fetched and converted at first use.
    """
    if os.path.isdir(name) or not is_model_name(name):
        return name
    if name in EMBEDDED:
        return EMBEDDED[name]
    assert prepare_published is not None
    return prepare_published(name)


def embedded_name(name: str) -> str | None:
    """Returns which model of these a recorded name means: its own name, or its folder in any environment or checkout."""
    *_, above, folder, last = ("", "", "", *PureWindowsPath(name).parts)  # which splits at both slashes
    if last in EMBEDDED and (folder in ("toy", "examples") or name == last):
        return last
    return last if ((above, folder) == CACHE or name == last) and is_model_name(last) else None


def recorded_path(name: str) -> str:
    """Returns where the base model is that an adapter records: one of these that was in another place is taken from here."""
    return name if os.path.isdir(name) else model_path(embedded_name(name) or name)
