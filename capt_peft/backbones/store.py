"""Published backbones as folders in a cache: fetched, held to the hash of their first use, and converted."""

from __future__ import annotations

import hashlib
import os
import tempfile
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModel, AutoProcessor, PreTrainedModel

from ..tuner.loading import load_pretrained
from ..utils.embedded import CACHE
from ..utils.files import make_writable, read_json, write_json
from ..utils.text import cut
from .conversion import RECORD, convert_backbone, copy_backbone, sha256_of
from .model import CONFIG_NAME, open_clip_settings
from .registry import ALONE, BACKBONES, Backbone

OF_TRANSFORMERS = ("config.json", "*.safetensors", "*.safetensors.index.json")


def cache_folder() -> Path:
    """Returns where converted backbones are kept: in `capt_peft/backbones` below `HF_HOME`, beside the Hub's cache."""
    return Path(constants.HF_HOME, *CACHE)


def find_backbone(name: str) -> Backbone:
    """Returns a published backbone.

    Args:
        name: Its name, as in "fare4-vit-l14".

    Raises:
        ValueError: An unknown name.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    near = get_close_matches(name, BACKBONES, n=3)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"Unknown backbone {name[:80]!r}.{meant} `capt-peft backbones` lists all {len(BACKBONES)}.")


def load_backbone(name: str, *, checkpoint: str | Path | None = None) -> tuple[PreTrainedModel, Any]:
    """Loads a published robust CLIP by name, in float32, and its processor.

    At first use it is fetched from the Hub and converted (see `convert_backbone`) into `capt_peft/backbones/NAME` below
    `HF_HOME`, and its SHA-256 is written down there; later uses need no network.

    Args:
        name: Its name, as in "fare4-vit-l14"; `capt-peft backbones` lists them.
        checkpoint: The file, where you have it; needed for those that are not on the Hub.

    Returns:
        The model in eval mode, and its processor.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        OSError: It is neither here nor to be had from the Hub.
        ValueError: An unknown name, a file that is another one than at first use, or one that cannot be converted.
    """
    folder = backbone_folder(name, checkpoint=checkpoint)
    model = load_pretrained(AutoModel, folder, dtype=torch.float32).eval()
    return model, load_pretrained(AutoProcessor, folder)


def backbone_folder(name: str, *, checkpoint: str | Path | None = None) -> str:
    """Returns the folder of a published backbone, which is fetched and converted if it is not there yet.

    Args:
        name: See `load_backbone`.
        checkpoint: See `load_backbone`.

    Raises:
        FileNotFoundError, OSError, ValueError: See `load_backbone`.
    """
    entry = find_backbone(name)
    folder = cache_folder() / name
    if (folder / RECORD).is_file():
        _hold_to_first_use(entry, str(read_json(folder / RECORD).get("sha256")), folder)
        if checkpoint is not None:
            _hold_to_first_use(entry, _hash(Path(checkpoint)), Path(checkpoint))
        return str(folder)
    make_writable(cache_folder(), given="HF_HOME")
    path = _fetch(entry) if checkpoint is None else Path(checkpoint)
    sha256 = _hash(path)
    _hold_to_first_use(entry, sha256, path)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache_folder()) as temporary:
        made = Path(temporary, name)
        try:
            _convert(entry, path, made, sha256)
        except OSError as error:
            raise _unreachable(entry, error, have=path) from error
        _remember(entry, sha256, path)
        try:
            os.replace(made, folder)  # whole or not at all
        except OSError:
            if not (folder / RECORD).is_file():  # or another process was faster
                raise
    return str(folder)


def _convert(entry: Backbone, path: Path, output: Path, sha256: str) -> None:
    if entry.layout == "transformers":
        copy_backbone(path, output, processor=entry.processor, sha256=sha256)
        return
    told = entry.layout in ALONE or (path.parent / CONFIG_NAME).is_file()
    convert_backbone(
        path,
        output,
        base=entry.base,
        activation=None if told else entry.activation,
        processor=entry.processor,
    )


# ------------------------------------------------------------------------------------------------------ from the Hub


def _fetch(entry: Backbone) -> Path:
    """Returns the file, or for transformers' form the folder, in the Hub's cache."""
    if not entry.on_hub:
        raise OSError(
            f"{entry.name} is not on the Hub: get its file from {entry.address} and give it as checkpoint=, or once with "
            f"`capt-peft backbones {entry.name} --checkpoint FILE`."
        )
    try:
        if entry.layout == "transformers":
            return Path(snapshot_download(entry.where, allow_patterns=list(OF_TRANSFORMERS)))
        if entry.layout == "open_clip":  # before the large file: it may say that this is no CLIPModel
            open_clip_settings(Path(hf_hub_download(entry.where, CONFIG_NAME)))
        return _first_of(entry)
    except OSError as error:
        raise _unreachable(entry, error) from error


def _first_of(entry: Backbone) -> Path:
    missing: Exception | None = None
    for file in entry.files:
        try:
            return Path(hf_hub_download(entry.where, file))
        except EntryNotFoundError as error:  # or it is not in the cache, and the Hub is not asked
            missing = missing or error
    raise OSError(f"it has none of {', '.join(entry.files)} ({cut(missing)})")


def _unreachable(entry: Backbone, error: Exception, have: Path | None = None) -> OSError:
    """Returns the error for what is neither here nor can be fetched, with all that would be."""
    needs = [] if have else [f"{' or '.join(entry.files)} of {entry.address}"]
    needs += [f"the text tower of {entry.base}"] * bool(entry.base) + [f"the tokenizer of {entry.processor}"]
    return OSError(
        f"{entry.name} is not here yet, and something that it is made of cannot be fetched ({cut(error)}). It needs "
        f"{', '.join(needs)}. Run this once with a network (without HF_HUB_OFFLINE), or give the file as checkpoint=."
    )


# ------------------------------------------------------------------------------------------- the hash of the first use


def _hash(path: Path) -> str:
    """Returns the SHA-256 of a file; of a folder of transformers, that of its weights, or of the list of several files'."""
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"The checkpoint {path} does not exist; download it first.")
        return sha256_of(path)
    found = {file.name: sha256_of(file) for file in sorted(path.glob("*.safetensors"))}
    if not found:
        raise ValueError(f"{path} holds no weights in safetensors.")
    lines = "".join(f"{digest}  {file}\n" for file, digest in found.items())
    return next(iter(found.values())) if len(found) == 1 else hashlib.sha256(lines.encode()).hexdigest()


def _hold_to_first_use(entry: Backbone, sha256: str, path: Path) -> None:
    """Raises a ValueError if a file is another one than the first that was used under a name."""
    record = _record(entry)
    known = read_json(record)["sha256"] if record.is_file() else sha256
    if sha256 != known:
        raise ValueError(
            f"{path} is another {entry.name} than at first use: its SHA-256 is {sha256}, that of the first {known} ({record}). "
            f"If you trust the new one, remove {record} and {cache_folder() / entry.name}."
        )


def _remember(entry: Backbone, sha256: str, path: Path) -> None:
    if not _record(entry).is_file():
        day = datetime.now(UTC).date().isoformat()
        content = {"name": entry.name, "file": path.name, "where": entry.address, "sha256": sha256, "first_used": day}
        write_json(_record(entry), content)


def _record(entry: Backbone) -> Path:
    return cache_folder() / f"{entry.name}.json"
