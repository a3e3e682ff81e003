"""Checkpoints as folders: sealed with the hashes of their files, put in place by one rename, checked before they are read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..utils.files import unwritable

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
STAGING = ".saving"  # a checkpoint is written in here, beside the whole ones
_NAME = re.compile(r"checkpoint-(\d+)")


class Damaged(ValueError):
    """A folder is no whole checkpoint; the message says what is wrong with it."""


def step_of(folder: Path) -> int | None:
    """Returns the step in the name of a checkpoint, `checkpoint-300`, or None if it has another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns the folders that are named as checkpoints, whole or not, the highest step first; none if there is no folder."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes the manifest of a checkpoint, the last of its files, and waits until the disk holds all of them.

    Args:
        folder: Holds the files of the checkpoint.
        facts: What else the manifest shall say, in types that JSON has.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _describe(path, sync=True) for path in paths}
    content = {**facts, "files": files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n", encoding="utf-8")
    _describe(manifest, sync=True)
    for inner in {folder, *(path.parent for path in paths)}:
        _sync_folder(inner)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint whose every file is as it was written.

    Raises:
        Damaged: A file is missing, cut short or changed, or there is no manifest.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = content.pop("sha256") == _digest(content)
    except FileNotFoundError:
        raise Damaged(f"it has no {MANIFEST}: it was not written to its end, or not by this version") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise Damaged(f"its {MANIFEST} is damaged")
    for name, written in content["files"].items():
        _compare(folder / name, name, written)
    return dict(content)


def _compare(path: Path, name: str, written: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise Damaged(f"{name} is missing")
    if path.stat().st_size != written["bytes"]:
        raise Damaged(f"{name} has {path.stat().st_size} bytes instead of {written['bytes']}")
    try:
        found = _describe(path)
    except OSError as error:
        raise Damaged(f"{name} cannot be read ({error.strerror})") from error
    if found != written:
        raise Damaged(f"{name} has other bytes than were written")


def _describe(path: Path, *, sync: bool = False) -> dict[str, Any]:
    """Returns the size and hash of a file, once the disk holds it if asked."""
    if sync:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def named_and_before(named: Path) -> list[Path]:
    """Returns a checkpoint and those before it in the same folder, the newest first.

    Raises:
        ValueError: There is no such folder, or it is the folder of a run.
    """
    inside = checkpoints_in(named)
    if inside or not named.is_dir():
        others = ", ".join(str(path) for path in inside or checkpoints_in(named.parent)) or "none"
        raise ValueError(f"{named} is no checkpoint. There are: {others}. Name one, or let `true` find the newest.")
    step = step_of(named)
    return [named, *(path for path in checkpoints_in(named.parent) if step is not None and (step_of(path) or 0) < step)]


def newest_whole(candidates: list[Path]) -> tuple[Path, dict[str, Any]]:
    """Returns the first whole checkpoint of a list, and its manifest; those that it passes over are named in a warning.

    Raises:
        ValueError: None is whole.
    """
    faults: list[str] = []
    for folder in candidates:
        try:
            manifest = read_manifest(folder)
            if manifest["resumable"]:
                if faults:
                    logger.warning("Not whole:\n  %s\nThe run goes on from %s instead.", "\n  ".join(faults), folder)
                return folder, manifest
            faults.append(f"{folder}: it holds the weights alone (save_only_model)")
        except Damaged as error:
            faults.append(f"{folder}: {error}")
    lines = "\n  ".join(faults)
    raise ValueError(
        f"There is no whole checkpoint to go on from:\n  {lines}\nName one of another folder, or begin anew: without "
        "resume_from_checkpoint, and with another output_dir."
    )


def put_in_place(staged: Path, home: Path) -> None:
    """Moves a sealed checkpoint out of the staging folder; one that stands under its name moves into it."""
    target = home / staged.name
    if target.exists():
        os.rename(target, _old(staged.parent, target))
    os.rename(staged, target)
    _sync_folder(home)


def _old(staging: Path, checkpoint: Path) -> Path:
    return staging / f"old-{checkpoint.name}"


def clear_staging(home: Path) -> None:
    """Removes what a save left behind that was killed; one that was killed right before its rename is finished.

    Between the two renames of `put_in_place` neither checkpoint stands, and both are whole.
    """
    staging = home / STAGING
    for staged in checkpoints_in(staging):
        try:
            read_manifest(staged)
        except Damaged:
            continue
        put_in_place(staged, home)
    shutil.rmtree(staging, ignore_errors=True)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Removes checkpoints until `limit` are left: first those of later steps than the newest, then the oldest.

    Later steps are damaged, or of a run that was left behind. Transformers goes by modification times or, where these are too
    close, by steps alone, and may then remove the very checkpoint that was just written.

    Args:
        newest: The checkpoint that was just written; it stays.
        limit: How many may stay; None or 0 for all.
        best: The best checkpoint, if there is one; it stays.
    """
    if not limit or limit < 0:
        return
    home, step = newest.parent, step_of(newest) or 0
    keep = {newest.resolve(), *([Path(best).resolve()] if best else [])}
    others = [path for path in reversed(checkpoints_in(home)) if path.resolve() not in keep]
    others.sort(key=lambda path: (step_of(path) or 0) <= step)
    for path in others[: max(0, len(others) + len(keep) - limit)]:
        with staging_folder(home) as staging:
            # by one rename, so that half a checkpoint is never found
            os.rename(path, _old(staging, path))


@contextmanager
def staging_folder(home: Path) -> Iterator[Path]:
    """Gives the staging folder, which is removed at the end with all that is still in it."""
    staging = home / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def make_ready(home: Path) -> None:
    """Makes a folder ready for checkpoints, without what a killed save left.

    Raises:
        ValueError: It cannot be written into.
    """
    try:
        clear_staging(home)
        with staging_folder(home) as staging:
            (staging / "probe").write_bytes(b"0")
    except OSError as error:
        raise unwritable(home, error, "output_dir") from error
