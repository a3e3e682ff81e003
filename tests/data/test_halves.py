"""Base and new classes: which images they hold, how these are numbered, and what cannot be halved."""

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from capt_peft.data.task import Task, task_features

NAMES = ("ant", "bee", "cat", "dog", "elk")


def make_task(names=NAMES, sizes=(2, 3, 4, 5, 6)):
    """Images of one colour; the red channel is the label, the green one the image's place in its class."""
    rows = [(label, i) for i in range(max(sizes)) for label, size in enumerate(sizes) if i < size]
    images = [Image.new("RGB", (4, 4), (label, i, 7)) for label, i in rows]
    data = Dataset.from_dict({"image": images, "label": [label for label, _ in rows]}, features=task_features(names))
    return Task(
        "zoo", tuple(names), {"train": data, "test": data.select(range(len(names)))}, "a drawing of a {}.", "there"
    )


def colours(task, split="train"):
    return [np.asarray(row["image"])[0, 0].tolist() for row in task[split]]


@pytest.mark.parametrize(("classes", "base"), [(4, 2), (5, 3), (9, 5)])
def test_base_is_the_first_half_of_the_classes_rounded_up(classes, base):
    names = tuple(f"thing {i}" for i in range(classes))
    task = make_task(names, [1] * classes)
    assert task.half("base").class_names == names[:base]
    assert task.half("new").class_names == names[base:]


def test_the_labels_of_a_half_start_at_0_and_name_the_classes_that_they_named():
    new = make_task().half("new")
    assert new.labels("train").tolist() == [int(red) - 3 for red, _, _ in colours(new)]
    assert set(new.labels("train").tolist()) == {0, 1}
    assert new["train"].features["label"].names == ["dog", "elk"] == list(new.class_names)
    assert new.texts == ["a drawing of a dog.", "a drawing of a elk."]


def test_the_halves_share_no_image_and_hold_every_image_unchanged():
    task = make_task()
    for split in ("train", "test"):
        base, new = (Counter(map(tuple, colours(task.half(which), split))) for which in ("base", "new"))
        assert not base & new
        assert base + new == Counter(map(tuple, colours(task, split)))
        assert {red for red, _, _ in base} == {0, 1, 2} and {red for red, _, _ in new} == {3, 4}


def test_a_half_keeps_the_order_of_the_images_and_all_that_is_not_about_classes():
    task = make_task()
    base = task.half("base")
    assert colours(base) == [colour for colour in colours(task) if colour[0] < 3]
    assert (base.name, base.template, base.source) == (task.name, task.template, task.source)
    assert task.num_classes == 5 and len(task["train"]) == 20  # the task itself is as it was


def test_classes_are_numbered_in_the_order_in_which_they_are_given():
    chosen = make_task().select_classes([4, 1])
    assert chosen.class_names == ("elk", "bee")
    assert chosen.labels("train").tolist() == [{4: 0, 1: 1}[red] for red, _, _ in colours(chosen)]


def test_a_split_without_an_image_of_the_classes_is_left_out():
    task = make_task()
    few = Task(task.name, task.class_names, {"train": task["train"], "test": task["train"].select([0])}, task.template)
    assert set(few.half("new").splits) == {"train"}
    assert set(few.half("base").splits) == {"train", "test"}


def test_few_shots_of_a_half_are_those_of_its_classes_in_the_whole():
    """Each class is drawn on its own, so that base-to-new trains on images of the few-shot runs."""
    task = make_task()
    whole = [colour for colour in colours(task.few_shot(2, seed=3)) if colour[0] < 3]
    assert colours(task.half("base").few_shot(2, seed=3)) == whole


def test_three_classes_have_no_two_halves():
    with pytest.raises(ValueError, match="'zoo' has 3 classes; base-to-new needs at least 4, two in each half"):
        make_task(NAMES[:3], (1, 1, 1)).half("base")


def test_another_word_than_base_and_new_is_refused():
    with pytest.raises(ValueError, match=r"'old' is not a half of the classes. Allowed: base, new."):
        make_task().half("old")


@pytest.mark.parametrize("labels", [[], [1], [1, 1], [0, 2, 0], [0, 5], [-1, 0]])
def test_labels_must_be_different_ones_of_the_task(labels):
    with pytest.raises(ValueError, match="must be at least two different labels of task 'zoo', which has 0 to 4"):
        make_task().select_classes(labels)
