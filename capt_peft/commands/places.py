"""Models, data sets and files that are not there, as far as that is known without asking a Hub."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ..utils.embedded import EMBEDDED, is_model_name, published_names
from .ending import shorten

MODELS = ("model_name_or_path", "adapter", "base", "teacher", "processor")  # a folder, or a Hub id
DATA = ("dataset_name", "eval_dataset_name", "out_of_class")  # a task's name, a Hub id, a folder or a file
FILES = ("config", "checkpoint", "root", "class_texts")  # a file or a folder here
CONFIGS = Path(__file__).parent / "configs"


def find_config(name: str) -> Path:
    """Returns the YAML file of this name: a file here, or one that comes with the package, as "fap" or "parts"."""
    path = Path(name).expanduser()
    own = packaged_configs().get(name.removesuffix(".yaml"))
    return own if own and not path.is_file() else path


def packaged_configs() -> dict[str, Path]:
    """Returns the YAML files that come with the package, by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def check_places(values: Mapping[str, Any]) -> None:
    """Raises a ValueError for a model, data set or file that is not there, as far as that is known without asking a Hub.

    Args:
        values: Values by the names of their options.
    """
    for name, value in values.items():
        if not isinstance(value, str) or not value:
            continue
        if name == "config" and find_config(value).is_file():
            continue
        if os.path.exists(os.path.expanduser(value)):
            if name == "adapter" and not {"adapter_config.json", "config.json"} & {
                *os.listdir(os.path.expanduser(value))
            }:
                raise ValueError(f"{shorten(value, 300)} is not an adapter: it has no adapter_config.json (--adapter).")
            continue
        if name in FILES or (name in (*MODELS, *DATA) and is_path(value)):
            kind = "folder" if name in (*MODELS, "root") else "file" if name in FILES else "folder or file"
            configs = packaged_configs() if name == "config" else ()
            more = f" The package has {', '.join(configs)}." if configs else ""
            near = _nearest(value, configs) or _near_path(value) or more
            raise ValueError(f"There is no {kind} {shorten(value, 300)} (--{name}).{near}")
        if name in MODELS and constants.HF_HUB_OFFLINE and not is_model_name(value) and not is_cached(value):
            raise ValueError(
                f"--{name} {shorten(value, 300)} is neither a folder here nor a Hub model in the cache, and the Hub is not asked "
                f"while HF_HUB_OFFLINE is set.{_nearest(value, (*EMBEDDED, *published_names()))}"
            )


def is_path(value: str) -> bool:
    """Tells whether a value can only be meant as a path, where a Hub id is the other possibility."""
    if value.startswith((".", "/", "~")) or value.endswith("/") or value.count("/") > 1:
        return True
    return "/" in value and os.path.isdir(value.split("/")[0]) and not is_cached(value)


def is_cached(name: str) -> bool:
    """Tells whether the Hub's cache has a model or adapter of this name."""
    try:
        files = (try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json"))
        return any(isinstance(file, str) for file in files)
    except HFValidationError:
        return False


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, 1, 0.7)
    return f" Did you mean {near[0]}?" if near else ""


def _near_path(value: str) -> str:
    path = Path(os.path.expanduser(value))
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), 1, 0.7)
    return f" Did you mean {path.with_name(near[0])}?" if near else ""
