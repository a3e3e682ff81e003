"""FrozenStore: what the frozen model says of the training images, on disk, for sets that do not fit into memory.

A store is a folder of shards, each written by one process: `NAME.rows` holds rows of N float32 and nothing else, `NAME.keys`
what each row is of and its checksum. `about.json` says, for people, which model and classes the rows are of.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..files import write_json

logger = logging.getLogger(__name__)

KEY, CHECK = 16, 8  # bytes: digest of an image; digest of that and its row
ENTRY = KEY + CHECK


class FrozenStore:
    """The frozen model's output for each image, found by the image's content, in memory-mapped files.

    Runs share a store, at the same time too: each process reads the shards that are there when it opens the store, and writes one
    of its own. A row counts once its key is written, and only if its checksum is right, so a process may be killed at any moment.
    Memory holds the places of the images and the keys of the rows, about 60 bytes each, and no rows.

    Args:
        folder: Where stores are; this one is a folder in it, named by a digest of `about`.
        about: All that decides the outputs besides the image, as JSON takes it.
        images: Number of training images.
        width: N, the numbers of an output.

    Raises:
        NotADirectoryError: `folder` is a file.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], images: int, width: int) -> None:
        if Path(folder).exists() and not Path(folder).is_dir():
            raise NotADirectoryError(
                f"frozen_cache_dir={str(folder)!r} is a file. Name a folder; it is made if needed."
            )
        self.about = json.loads(json.dumps(about, default=str))
        self.folder = Path(folder) / content_key(json.dumps(self.about, sort_keys=True).encode()).hex()
        self.width = width
        self._images = images
        self._open()

    def _open(self, limits: Mapping[str, int] | None = None) -> None:
        """Reads the keys of all shards, or those of the first `limits[name]` rows of the named ones."""
        paths = sorted(self.folder.glob("*.keys")) if limits is None else [self.folder / f"{n}.keys" for n in limits]
        shards = [_read_shard(path, self.width, None if limits is None else limits[path.stem]) for path in paths]
        self._shards = [shard for shard in shards if shard is not None]
        self._starts = np.cumsum([0, *(len(shard.rows) for shard in self._shards)]).tolist()
        self._own = _OwnShard(self.folder, self.about, self.width)
        keys = np.concatenate([np.empty(0, f"S{KEY}"), *(shard.keys for shard in self._shards)])
        self._order = np.argsort(keys, kind="stable")  # (rows,) places, by their keys
        self._keys = keys[self._order]
        self._places = np.full(self._images, -1)  # (images,) place of each image's row; -1: not met yet
        logger.info("Frozen outputs of %d images are in %s.", self._starts[-1], self.folder)

    def get(self, indices: Sequence[int], pixels: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the outputs of a batch, (B, N) float32.

        Args:
            indices: The B places of its images.
            pixels: The images, (B, 3, H, W).
            compute: Maps the images that are not known yet, (b, 3, H, W), to their outputs, (b, N).
        """
        met = [row for row, index in enumerate(indices) if self._places[index] < 0]
        keys = {row: content_key(image) for row, image in zip(met, pixels[met].cpu().numpy(), strict=True)}
        for row, key in keys.items():
            self._places[indices[row]] = self._find(key)
        places = [int(self._places[index]) for index in indices]
        new = [row for row, place in enumerate(places) if place < 0]
        known = [row for row, place in enumerate(places) if place >= 0]
        outputs = torch.empty(len(indices), self.width, device=pixels.device)
        if known:
            outputs[known] = torch.from_numpy(np.stack([self._row(places[row]) for row in known])).to(pixels.device)
        if new:
            outputs[new] = compute(pixels[new]).float()
            first = self._own.append([keys[row] for row in new], outputs[new].cpu().numpy())
            if first is not None:
                for count, row in enumerate(new):
                    self._places[indices[row]] = self._starts[-1] + first + count
        return outputs

    def _find(self, key: bytes) -> int:
        """Returns the place of an image's row, or -1. Other shards may have sound copies of a row that is damaged in one."""
        wanted = np.array([key], f"S{KEY}")
        first, last = (int(np.searchsorted(self._keys, wanted, side)[0]) for side in ("left", "right"))
        for place in self._order[first:last].tolist():
            number = bisect_right(self._starts, place) - 1
            if self._shards[number].is_sound(place - self._starts[number], key):
                return int(place)
        return -1

    def _row(self, place: int) -> np.ndarray:
        if place >= self._starts[-1]:
            return self._own.row(place - self._starts[-1])
        number = bisect_right(self._starts, place) - 1
        return self._shards[number].rows[place - self._starts[number]]

    def save(self, path: Path) -> None:
        """Writes, beside `path` as JSON, which rows this run knows: shards and their lengths, not the rows.

        Other runs may add rows computed in other batches, whose last bits differ; a run that goes on must not see those.
        """
        shards = {shard.name: len(shard.rows) for shard in self._shards} | self._own.length()
        write_json(path.with_suffix(".json"), {"store": self.folder.name, "shards": shards})

    def load(self, path: Path, device: torch.device) -> None:
        """Goes back to the rows that `save` wrote of, if it did and this is the same store."""
        path = path.with_suffix(".json")
        if path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["store"] == self.folder.name:
                self._open(saved["shards"])


def content_key(content: bytes | np.ndarray) -> bytes:
    """Returns the digest under which an image, or what a store is about, is known: 16 bytes of BLAKE2b."""
    digest = blake2b(digest_size=KEY)
    if isinstance(content, np.ndarray):
        digest.update(f"{content.dtype.str}{content.shape}".encode())
        digest.update(np.ascontiguousarray(content).reshape(-1).view(np.uint8).data)
    else:
        digest.update(content)
    return digest.digest()


def _checksum(key: bytes, row: np.ndarray) -> bytes:
    return blake2b(key + row.tobytes(), digest_size=CHECK).digest()


class _Shard:
    """Rows that a process wrote before this store was opened."""

    def __init__(self, name: str, entries: np.ndarray, rows: np.ndarray) -> None:
        self.name = name
        self.rows = rows  # (n, N) float32, a memory map
        self._entries = entries  # (n, ENTRY) bytes
        self._warned = False

    @property
    def keys(self) -> np.ndarray:
        """The digests of the images, (n,)."""
        return np.ascontiguousarray(self._entries[:, :KEY]).view(f"S{KEY}")[:, 0]

    def is_sound(self, number: int, key: bytes) -> bool:
        """Whether a row is as it was written."""
        if self._entries[number, KEY:].tobytes() == _checksum(key, self.rows[number]):
            return True
        if not self._warned:
            logger.warning(
                "Row %d of the frozen outputs %s is damaged; what is damaged is computed anew.", number, self.name
            )
            self._warned = True
        return False


def _read_shard(path: Path, width: int, limit: int | None) -> _Shard | None:
    """Opens a shard up to its last whole row, or up to `limit` rows; warns and returns None if it cannot be read."""
    rows_path = path.with_suffix(".rows")
    try:
        content = path.read_bytes()
        entries = np.frombuffer(content, np.uint8, len(content) // ENTRY * ENTRY).reshape(-1, ENTRY)[:limit]
        whole = rows_path.stat().st_size // (4 * width)  # may be more: a row is written before its key
        expected = len(entries) if limit is None else limit
        entries = entries[:whole]
        if len(entries) < expected:
            logger.warning("%s has %d of its %d rows; the others are computed anew.", rows_path, len(entries), expected)
        if not len(entries):
            return None
        return _Shard(path.stem, entries, np.memmap(rows_path, "<f4", "r", shape=(len(entries), width)))
    except OSError as error:
        logger.warning("The frozen outputs %s cannot be read (%s); they are computed anew.", path, error)
        return None


class _OwnShard:
    """Rows that this process writes; the files are made with the first of them."""

    def __init__(self, folder: Path, about: Mapping[str, Any], width: int) -> None:
        self._folder = folder
        self._about = about
        self._width = width
        self._name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        self._files: tuple[BinaryIO, BinaryIO] | None = None  # held open: another run may delete the folder
        self._written = 0
        self._map: np.ndarray = np.empty((0, width), "<f4")
        self._failed = False

    def append(self, keys: Sequence[bytes], rows: np.ndarray) -> int | None:
        """Writes rows (b, N) and then their keys; returns the number of the first, or None if they cannot be written."""
        if self._failed:
            return None
        rows = rows.astype("<f4")
        entries = b"".join(key + _checksum(key, row) for key, row in zip(keys, rows, strict=True))
        first = self._written
        try:
            rows_file, keys_file = self._files = self._files or self._create()
            _write_at(rows_file, first * 4 * self._width, rows.tobytes())
            _write_at(keys_file, first * ENTRY, entries)
        except OSError as error:
            self._failed = True
            logger.warning(
                "Frozen outputs cannot be written to %s (%s). What is not there is computed in every epoch. Make room, or "
                "name another folder: frozen_cache_dir.", self._folder, error,
            )  # fmt: skip
            return None
        self._written += len(rows)
        return first

    def _create(self) -> tuple[BinaryIO, BinaryIO]:
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / "about.json").exists():
            write_json(self._folder / "about.json", self._about)
        # unbuffered: what a call has written is there, whatever becomes of this process
        rows, keys = ((self._folder / f"{self._name}.{kind}").open("xb+", buffering=0) for kind in ("rows", "keys"))
        return rows, keys

    def row(self, number: int) -> np.ndarray:
        """Returns a written row, (N,) float32."""
        if number >= len(self._map):
            assert self._files is not None  # the row was written
            self._map = np.memmap(self._files[0], "<f4", "r", shape=(self._written, self._width))
        return self._map[number]

    def length(self) -> dict[str, int]:
        """Returns the shard's name and its number of rows, if it has any."""
        return {self._name: self._written} if self._written else {}


def _write_at(file: BinaryIO, offset: int, content: bytes) -> None:
    """Writes all of `content`, which may take several calls; always at its own place, whatever an interrupted call left."""
    file.seek(offset)
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
