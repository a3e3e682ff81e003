"""Folders of class folders: which are splits, which are classes, which files are images, and what is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from os.path import commonpath, realpath, relpath, splitext
from pathlib import Path

from datasets import Dataset, Features, Image, Value

from ..utils.text import some
from .images import IMAGE_SUFFIXES, looks_like_image
from .names import check_apart, in_class_order, name_key
from .parts import Opened, Part, check_path, split_of

_SYSTEM_NAMES = frozenset((
    "#recycle", "$recycle.bin", "@eadir", "@recycle", "__macosx", "__pycache__", "desktop.ini", "ehthumbs.db", "lost+found",
    "system volume information", "thumbs.db",
))  # fmt: skip
_HIDDEN = "hidden, or left there by a system"
_OTHER = "not images of a format that is read"
_STRAY = "images outside the class folders"
_AROUND = "links to a folder around them"
_TWICE = "links to what is read already"
_BROKEN = "broken links"
_IRREGULAR = "not regular files"
_POOLED = "names of folders inside a class folder that has no images itself, whose images count for the class"
_PICTURES = frozenset(("image", "images", "img", "imgs", "jpegimages", "photos", "pictures", "rgb"))
_ANNOTATIONS = frozenset((
    "annotation", "annotations", "depth", "ground truth", "groundtruth", "gt", "label", "labels", "mask", "masks", "segmentation",
    "segmentations", "segmentationclass", "trimaps",
))  # fmt: skip


def open_folder(root: Path, chosen: Collection[str] = ()) -> Opened:
    """Opens a folder of class folders, or a folder of split folders of class folders.

    Hidden files and folders, and those that systems leave (`__MACOSX`, `@eaDir`, `Thumbs.db`), are left out at every level.
    A file is an image if its suffix or its first bytes say so. Links are followed.

    Args:
        root: The folder.
        chosen: Names of folders that the user called splits.

    Returns:
        Splits with the columns `image` (a path) and `label` (the name of the class folder).

    Raises:
        ValueError: No class folders, a class folder without images, a split folder without class folders, folders of which
            it is open whether they are splits or classes, or a folder or file that is linked under two names.
    """
    while len(_folders(root)) == 1 and not _split_like(_folders(root)[0], chosen) and _is_hollow(_folders(root)[0]):
        root = _folders(root)[0]
    folders = _folders(root)
    splits = [folder for folder in folders if _split_like(folder, chosen)]
    walk = _Walk(root)
    # A folder named `test` that has images and siblings that are classes is a class itself.
    if not any(_folders(folder) for folder in splits):
        if len({split_of(folder.name) or folder.name for folder in splits}) > 1:
            raise ValueError(
                f"The folders {_both(splits)} are called like splits but have no class folders, so their images have no labels. "
                "A folder of images needs a folder for each class (train/cat/1.png)."
            )
        return Opened("folder", {"train": [walk.class_folders(root)]}, walk.notes())
    flat = [folder for folder in splits if not _folders(folder)]
    if flat:
        raise ValueError(
            f"The split folder {flat[0]} has no class folders, so its images have no labels. Move it away."
        )
    others = [folder for folder in folders if folder not in splits]
    full = [folder for folder in others if not all(map(is_hidden, _images_below(folder)))]
    if full and not chosen:
        raise ValueError(
            f"{root} has {splits[0].name!r}, called like a split, beside {_both(full)}, which have images too. Move away what "
            f"does not belong here; or name the splits: `train_split={splits[0].name!r}` leaves the others out."
        )
    for folder in others:
        walk.leave("folders that are not splits", folder)
    walk.children(root, _STRAY)
    inner = [_inside(folder) for folder in splits]
    while all(len(_folders(folder)) == 1 and _is_hollow(_folders(folder)[0]) for folder in inner):
        inner = [_folders(folder)[0] for folder in inner]
    opened = {split.name: [walk.class_folders(folder)] for split, folder in zip(splits, inner, strict=True)}
    return Opened("folder", opened, walk.notes())


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or one that a system leaves."""
    return name.startswith(".") or name.casefold() in _SYSTEM_NAMES


class _Walk:
    """Reads class folders; remembers where it has been and what it left out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out: dict[str, Counter[str]] = {}
        self._folders: dict[str, Path] = {}  # the class folder that a real folder was read for
        self._files: dict[str, Path] = {}  # the class folder of a real file
        self._links: list[tuple[str, str, Path]] = []  # link, real file, class folder

    def class_folders(self, root: Path) -> Part:
        """Reads a folder of class folders."""
        folders = [Path(folder) for folder in self.children(root, _STRAY)[0] if not self._leads_around(folder, ())]
        if not folders:
            raise ValueError(
                f"{root} has no class folders. A folder of images needs a folder for each class (root/cat/1.png), or "
                "train, validation and test folders of these."
            )
        _check_level(folders)
        _check_not_annotations(folders)
        check_apart([folder.name for folder in folders], [repr(str(folder)) for folder in folders], str(root))
        images = {folder.name: self._images(folder, folder, ()) for folder in folders}
        twice = self._linked_twice()
        images = {name: sorted(path for path in found if path not in twice) for name, found in images.items()}
        empty = next((folder for folder in folders if not images[folder.name]), None)
        if empty is not None:
            raise ValueError(f"The class folder {empty} has no images{self._beside()}. Fill it or remove it.")
        labels = in_class_order(images)
        columns = {
            "image": [path for label in labels for path in images[label]],
            "label": [label for label in labels for _ in images[label]],
        }
        return Part(Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("string")})))

    def children(self, folder: Path | str, stray: str = "") -> tuple[list[str], list[os.DirEntry[str]]]:
        """Returns the folders in a folder and its images, by name; notes what else there is, and the images as `stray`."""
        folders, images = [], []
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                reason = "" if _is_folder(entry) and not is_hidden(entry.name) else _why_not(entry)
                if reason:
                    hidden = reason == _HIDDEN and entry.is_dir(follow_symlinks=False)
                    self.leave(reason, entry.path, len(_images_below(entry.path)) if hidden else 1)
                elif _is_folder(entry):
                    check_path(Path(entry.path))
                    folders.append(entry.path)
                elif stray:
                    self.leave(stray, entry.path)
                else:
                    check_path(Path(entry.path))
                    images.append(entry)
        return folders, images

    def leave(self, reason: str, path: Path | str, count: int = 1) -> None:
        """Notes that something is left out."""
        if count:
            name = splitext(path)[1].lower() or "no suffix" if reason == _OTHER else relpath(path, self.root)
            self.left_out.setdefault(reason, Counter())[name] += count

    def notes(self) -> list[str]:
        """Returns a sentence for each reason, with the number of files and examples."""
        return [
            f"{sum(counts.values()):,} {reason}: "
            + some(f"{name} ({count:,})" if count > 1 else name for name, count in counts.most_common())
            for reason, counts in self.left_out.items()
        ]

    def _images(self, folder: Path | str, owner: Path, above: tuple[str, ...]) -> list[str]:
        """Returns the images below a folder, which belong to the class folder `owner`."""
        real = realpath(folder)
        if self._leads_around(folder, above):
            return []
        if real in self._folders:
            self._same(self._folders[real], owner, folder)
            return []
        self._folders[real] = owner
        below, entries = self.children(folder)
        for entry in entries:
            if entry.is_symlink():
                self._links.append((entry.path, realpath(entry.path), owner))
            else:
                self._files[os.path.join(real, entry.name)] = owner
        images = [entry.path for entry in entries]
        inside = [Path(child) for child in below]
        if len({split_of(child.name) for child in inside} - {None}) > 1:
            raise ValueError(_splits_inside(inside))
        _check_not_annotations(inside)
        if not above and len(below) > 1 and not entries:
            for child in below:
                self.leave(_POOLED, child)
        for child in below:
            images += self._images(child, owner, (*above, real))
        return images

    def _leads_around(self, folder: Path | str, above: Sequence[str]) -> bool:
        """Whether a folder is a link to one that it lies in, which is noted."""
        real = realpath(folder)
        around = real in above or commonpath([real, realpath(self.root)]) == real
        if around:
            self.leave(_AROUND, folder)
        return around

    def _linked_twice(self) -> set[str]:
        """Returns the links to files that are read already."""
        twice = set()
        for link, real, owner in self._links:
            if real in self._files:
                self._same(self._files[real], owner, link)
                twice.add(link)
            else:
                self._files[real] = owner
        self._links = []
        return twice

    def _same(self, one: Path, other: Path, link: Path | str) -> None:
        """Notes a second way to the same images, or raises a ValueError if it is in another class or split."""
        if one != other:
            raise ValueError(
                f"{link} leads to images that are read already: they would be both {relpath(one, self.root)!r} and "
                f"{relpath(other, self.root)!r}. Remove the link."
            )
        self.leave(_TWICE, link)

    def _beside(self) -> str:
        notes = "; ".join(self.notes())
        return f" that are read ({notes})" if notes else ""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # a link to itself is not an error here


def _why_not(entry: os.DirEntry[str]) -> str:
    """Returns why a file is not read, or an empty text."""
    if is_hidden(entry.name):
        return _HIDDEN
    if not os.path.isfile(entry.path):
        return _BROKEN if entry.is_symlink() and not os.path.exists(entry.path) else _IRREGULAR
    suffix = splitext(entry.name)[1].lower()
    return "" if suffix in IMAGE_SUFFIXES or looks_like_image(entry.path) else _OTHER


def _folders(root: Path) -> list[Path]:
    """Returns the folders in `root` by name, without hidden ones and those that systems leave."""
    return sorted(folder for folder in root.iterdir() if folder.is_dir() and not is_hidden(folder.name))


def _inside(split: Path) -> Path:
    """Returns the folder of the class folders, where a split folder holds nothing but one of its own name."""
    below = _folders(split)
    again = len(below) == 1 and _is_hollow(below[0]) and split_of(below[0].name) == split_of(split.name) is not None
    return _inside(below[0]) if again else split


def _split_like(folder: Path, chosen: Collection[str]) -> bool:
    return folder.name in chosen or split_of(folder.name) is not None


def _is_hollow(folder: Path) -> bool:
    """Whether a folder holds folders, and no images itself."""
    with os.scandir(folder) as entries:
        seen = [entry for entry in entries if not is_hidden(entry.name)]
    return any(map(_is_folder, seen)) and all(_is_folder(entry) or _why_not(entry) for entry in seen)


def _images_below(folder: Path | str) -> list[str]:
    """Returns the names of the image files in and below a folder, hidden ones too."""
    names = [name for _, _, files in os.walk(folder) for name in files]
    return [name for name in names if splitext(name)[1].lower() in IMAGE_SUFFIXES]


def _check_level(folders: Sequence[Path]) -> None:
    """Raises a ValueError if these look like splits, or groups, of the same class folders."""
    below = {folder: {name_key(child.name) for child in _folders(folder)} for folder in folders if _is_hollow(folder)}
    times = Counter(name for names in below.values() for name in names)
    alike = [folder for folder, names in below.items() if 2 * sum(times[name] > 1 for name in names) >= len(names)]
    if len(alike) > 1:
        raise ValueError(
            f"The folders {_both(alike)} hold no images themselves but folders of the same names "
            f"({some(sorted(below[alike[0]]))}), so they do not seem to be classes. Are they splits? Then name them "
            "(`train_split`, `test_split`). If they are classes, move their images up."
        )

    splits = {folder: [split_of(child.name) for child in _folders(folder)] for folder in below}
    only = [folder for folder, found in splits.items() if all(found)]
    if len({split for folder in only for split in splits[folder]}) > 1:
        raise ValueError(_splits_inside([child for folder in only for child in _folders(folder)]))


def _splits_inside(folders: Sequence[Path]) -> str:
    return (
        f"{_both(folders)} are called like splits but lie inside of class folders, so their images would be put together. Put "
        "the class folders into the splits (train/cat/1.png, test/cat/2.png); or rename these folders, if they are not splits."
    )


def _check_not_annotations(folders: Sequence[Path]) -> None:
    """Raises a ValueError if these are pictures and, under the same file names, their masks or other annotations."""
    pictures = [folder for folder in folders if name_key(folder.name) in _PICTURES]
    for other in (folder for folder in folders if name_key(folder.name) in _ANNOTATIONS):
        for one in pictures:
            names = [filter(lambda name: not is_hidden(name), os.listdir(folder)) for folder in (one, other)]
            stems = [{splitext(name)[0] for name in found} for found in names]
            if 2 * len(stems[0] & stems[1]) > min(map(len, stems)):
                raise ValueError(
                    f"{one} and {other} hold files of the same names, so they seem to be images and their annotations, not "
                    "classes. Move the annotations away, and put the images into a folder for each class."
                )


def _both(folders: Sequence[Path]) -> str:
    return some(folders, 2, separator=" and ")
