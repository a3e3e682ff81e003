"""Folders of images: which level holds the classes, which files count, what is left out and said."""

import os

import pytest
from PIL import Image

from capt_peft.data import load_task
from capt_peft.data.parts import split_of


def picture(path, number=0, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (number, 0, 0)).save(path, **settings)


def folders(root, **spec):
    for name, number in spec.items():
        for i in range(number):
            picture(root / name.replace("__", "/") / f"{i}.png", i)
    return root


def counts(task):
    return {
        name: sum(int((task.labels(split) == i).sum()) for split in task.splits)
        for i, name in enumerate(task.class_names)
    }


def sizes(task):
    return {split: len(dataset) for split, dataset in task.splits.items()}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[(name, "train") for name in ("Train", "training_set", "seg_train", "train2017", "trainset", "images-train")],
        *[(name, "validation") for name in ("val2017", "validation_set", "dev", "valid")],
        *[(name, "test") for name in ("test_set", "testing", "Eval", "seg_test")],
        *[(name, None) for name in ("train station", "test tube", "trains", "images", "contest", "valley", "2017", "train_test")],
    ],
)  # fmt: skip
def test_splits_are_known_by_the_words_that_matter(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("train", "test"),
    [("training_set", "test_set"), ("seg_train/seg_train", "seg_test/seg_test"), ("train2017", "val2017")],
)
def test_split_folders_are_splits_and_never_classes(tmp_path, train, test):
    for path, number in ((train, 5), (test, 3)):
        folders(tmp_path / path, cat=number, dog=number)
    task = load_task(tmp_path)
    assert task.class_names == ("cat", "dog") and len(task["test"]) == 6


@pytest.mark.parametrize("names", [("images", "annotations"), ("a", "b"), ("cat", "dog")])
def test_folders_of_the_same_folders_are_not_taken_for_classes(tmp_path, names):
    for name in names:
        folders(tmp_path / name, x=2, y=2)
    with pytest.raises(ValueError, match=r"hold no images themselves but folders of the same names \(x, y\)"):
        load_task(tmp_path)
    assert sizes(load_task(tmp_path, train_split=names[0], test_split=names[1]))["test"] == 4


def test_a_class_folder_may_hold_folders_of_its_own(tmp_path):
    folders(tmp_path, cat__indoors=2, cat__old=1, dog=2, eel__sea=1)
    assert counts(load_task(tmp_path)) == {"cat": 3, "dog": 2, "eel": 1}


def test_the_folders_that_a_class_is_pooled_from_are_told(tmp_path, caplog):
    folders(tmp_path / "animals", pets__cat=3, pets__dog=3, wild__wolf=3, wild__fox=3)
    task = load_task(tmp_path)
    assert task.class_names == ("pets", "wild")
    told = "4 names of folders inside a class folder that has no images itself, whose images count for the class: pets/cat, "
    assert told in task.summary() and told in caplog.text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("cat/train", "cat/test"), ("dog/training", "dog/testing")),
        (("cat/train", "cat/test"), ("dog",)),
        (("cat/train",), ("dog/test",)),
        (("cat/photos/train", "cat/photos/val"), ("dog",)),
    ],
)
def test_splits_inside_of_classes_are_refused(tmp_path, one, other):
    folders(tmp_path, **dict.fromkeys((*one, *other), 2))
    with pytest.raises(ValueError, match="are called like splits but lie inside of class folders"):
        load_task(tmp_path)


@pytest.mark.parametrize(
    "names", [("images", "masks"), ("JPEGImages", "SegmentationClass"), ("cat/images", "cat/ground_truth")]
)
def test_images_and_their_annotations_are_not_classes(tmp_path, names):
    folders(tmp_path, dog=1, **dict.fromkeys(names, 3))
    with pytest.raises(ValueError, match=f"{names[0]} and .*{names[1]} hold files of the same names"):
        load_task(tmp_path)


def test_a_folder_around_everything_is_passed_through(tmp_path):
    folders(tmp_path / "archive" / "data", train__cat=3, train__dog=3, test__cat=1, test__dog=1)
    assert load_task(tmp_path).class_names == ("cat", "dog")


def test_a_class_called_train_with_folders_inside_is_refused_with_its_neighbours(tmp_path):
    folders(tmp_path, car=2, bus=2, train__steam=2, train__diesel=2)
    with pytest.raises(ValueError, match=r"'train', called like a split, beside .*bus and .*car"):
        load_task(tmp_path)
    assert load_task(tmp_path, train_split="train").class_names == ("diesel", "steam")


def test_splits_without_class_folders_are_not_two_classes(tmp_path):
    with pytest.raises(ValueError, match="called like splits but have no class folders"):
        load_task(folders(tmp_path, train=3, test=3))


def test_hidden_and_system_entries_are_left_out_at_every_level_and_counted(tmp_path, caplog):
    root = folders(tmp_path, cat=5, dog=5, **{"cat__.ipynb_checkpoints": 4, "dog__@eaDir": 3, ".git": 1})
    folders(root / "dog" / "x" / "__MACOSX", y=2)
    (root / "cat" / "Thumbs.db").write_bytes(b"x")
    (root / "cat" / "._0.png").write_bytes(b"x")
    task = load_task(root)
    assert counts(task) == {"cat": 5, "dog": 5}
    assert [note.split(":")[0] for note in task.left_out] == ["12 hidden, or left there by a system"]
    assert "Left out of task" in caplog.text and "cat/.ipynb_checkpoints (4)" in caplog.text
    assert "12 hidden" in task.summary()


def test_an_image_is_known_by_its_suffix_or_by_its_first_bytes(tmp_path):
    root = folders(tmp_path, cat=1, dog=1)
    for name in ("a.jfif", "b.jpe", "c.JPEG", "noext", "d.jpg_large", "e.png.1"):
        picture(root / "cat" / name, format="JPEG")
    picture(root / "cat" / "f.data", format="BMP")
    picture(root / "cat" / "g.tga")
    (root / "dog" / "notes.txt").write_text("BM is how a bitmap begins, and a note")
    (root / "dog" / "empty").write_bytes(b"")
    task = load_task(root)
    assert counts(task) == {"cat": 8, "dog": 1}
    (note,) = task.left_out
    assert note.startswith("3 not images of a format that is read: ") and all(
        s in note for s in (".tga", ".txt", "no suffix")
    )


def test_images_outside_the_class_folders_and_broken_links_are_counted(tmp_path):
    root = folders(tmp_path, train__cat=3, train__dog=3, test__cat=1, test__dog=1)
    picture(root / "0.png")
    picture(root / "train" / "0.png")
    (root / "train" / "cat" / "9.png").symlink_to("nowhere.png")
    os.mkfifo(root / "train" / "dog" / "pipe.png")
    notes = "; ".join(load_task(root).left_out)
    assert "2 images outside the class folders: " in notes and "1 broken links: train/cat/9.png" in notes
    assert "1 not regular files: train/dog/pipe.png" in notes


def test_links_are_followed_once_and_never_in_circles(tmp_path):
    root, more = folders(tmp_path / "root", cat=3, dog=2), folders(tmp_path / "more", x=9)
    (root / "dog" / "x").symlink_to(more / "x")
    (root / "dog" / "y").symlink_to(more / "x")
    (root / "cat" / "loop").symlink_to(root)
    (root / "cat" / "own").symlink_to(root / "cat")
    (root / "eel").symlink_to(root)
    (root / "cat" / "self").symlink_to("self")
    (root / "cat" / "again.png").symlink_to("0.png")
    task = load_task(root)
    assert counts(task) == {"cat": 3, "dog": 11}
    notes = "; ".join(task.left_out)
    assert "3 links to a folder around them" in notes and "2 links to what is read already" in notes


@pytest.mark.parametrize("link", ["dog/x", "dog/0.png", "eel"])
def test_an_image_that_links_put_into_two_classes_is_refused_with_both(tmp_path, link):
    root = folders(tmp_path, cat=3, dog__more=2)
    (root / link).symlink_to(root / "cat" / "0.png" if "png" in link else root / "cat")
    with pytest.raises(ValueError, match=r"(dog|eel)\S* leads to images .*'(cat|dog|eel)' and '(cat|dog|eel)'"):
        load_task(root)


def test_a_split_linked_to_another_is_refused(tmp_path):
    root = folders(tmp_path, train__cat=3, train__dog=3)
    (root / "test").symlink_to(root / "train")
    with pytest.raises(ValueError, match=r"already: they would be both '(train|test)/cat' and '(train|test)/cat'"):
        load_task(root)


def test_a_class_between_two_underscores_is_a_class(tmp_path):
    root = folders(tmp_path, cat=3, dog=3)
    picture(root / "__background__" / "0.png")
    assert load_task(root).class_names == ("background", "cat", "dog")


@pytest.mark.parametrize("pair", [("Crane", "crane"), ("cat_", "cat"), ("a_b", "a b"), ("caf\u00e9", "cafe\u0301")])
def test_two_folders_of_one_class_name_are_both_named(tmp_path, pair):
    for name in (*pair, "dog"):
        picture(tmp_path / name / "0.png")
    with pytest.raises(ValueError, match="two classes of one name") as caught:
        load_task(tmp_path)
    assert all(repr(str(tmp_path / name)) in str(caught.value) for name in pair)


def test_a_name_that_is_not_utf_8_is_named(tmp_path):
    root = folders(tmp_path, cat=3, dog=3)
    os.rename(root / "cat" / "0.png", os.fsencode(root / "cat") + b"/caf\xe9.png")
    with pytest.raises(ValueError, match=r"caf\\udce9\.png is not UTF-8"):
        load_task(root)


def test_a_pipe_is_not_a_data_set(tmp_path):
    os.mkfifo(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="neither a folder nor a regular file"):
        load_task(tmp_path / "train.parquet")
