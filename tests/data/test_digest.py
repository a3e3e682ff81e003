"""digest_images: a hash in which every image and every label counts, and which ends."""

import os
from io import BytesIO

import datasets
import numpy as np
import pytest
from PIL import Image

from capt_peft.data.pixels import digest_images
from capt_peft.data.task import encoded_images, task_features

IMAGES = 1500  # more than were looked at before, and no multiple of a batch


def png(level):
    buffer = BytesIO()
    Image.fromarray(np.full((2, 2), level % 256, dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue() + level.to_bytes(4, "big")  # no two alike


CONTENT = [png(number) for number in range(IMAGES)]


def split(images, labels=None, names=("cat", "dog")):
    labels = [number % 2 for number in range(len(images))] if labels is None else labels
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=task_features(names))


def embedded(content):
    return [{"bytes": each, "path": None} for each in content]


@pytest.fixture(scope="module")
def known():
    return digest_images(split(embedded(CONTENT)))


@pytest.mark.parametrize("place", [0, 1, 31, 32, 700, 1023, 1024, IMAGES - 2, IMAGES - 1])
def test_one_changed_image_or_label_changes_the_hash(known, place):
    content = [*CONTENT]
    content[place] = content[place][:-1] + b"x"
    assert digest_images(split(embedded(content))) != known
    labels = [number % 2 for number in range(IMAGES)]
    labels[place] = 1 - labels[place]
    assert digest_images(split(embedded(CONTENT), labels)) != known


def test_the_order_counts_and_the_way_the_images_are_kept_does_not(known, tmp_path):
    whole = split(embedded(CONTENT))
    assert digest_images(encoded_images(whole)) == known
    assert digest_images(whole.select(range(IMAGES))) == known
    assert digest_images(whole.select([1, 0, *range(2, IMAGES)])) != known
    paths = []
    for number, content in enumerate(CONTENT[:40]):
        paths.append(str(tmp_path / f"{number}.png"))
        (tmp_path / f"{number}.png").write_bytes(content)
    assert digest_images(split(paths)) == digest_images(whole.select(range(40)))


def test_labels_count_by_the_names_of_their_classes(known):
    swapped = [1 - number % 2 for number in range(IMAGES)]
    assert digest_images(split(embedded(CONTENT), swapped, names=("dog", "cat"))) == known
    assert digest_images(split(embedded(CONTENT), names=("dog", "cat"))) != known


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing", "empty"])
def test_what_is_not_a_file_is_named_at_once_and_not_read(tmp_path, kind):
    path = tmp_path / "image.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    words = "Image 1 of the split is empty" if kind == "empty" else str(path)
    good = {"bytes": CONTENT[0], "path": None}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        digest_images(split([good, None if kind == "empty" else {"bytes": None, "path": str(path)}]))
