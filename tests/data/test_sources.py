"""CoOp roots: split_zhou_*.json beside a folder of images."""

import json

import pytest
from PIL import Image

from capt_peft.data import load_task

NAMES = ("Barn_Owl", "cat", "eel")


def write_root(root, folder="images", per_class=4):
    """Writes images and the split file; of each class half trains, one validates, one tests."""
    splits = {"train": [], "val": [], "test": []}
    for label, name in enumerate(NAMES):
        (root / folder / name).mkdir(parents=True)
        for number, split in enumerate(["train"] * (per_class - 2) + ["val", "test"]):
            Image.new("RGB", (8, 8), (label, number, 0)).save(root / folder / name / f"{number}.png")
            splits[split].append([f"{name}/{number}.png", label, name])
    return write_splits(root, splits)


def write_splits(root, splits):
    (root / "split_zhou_Pets.json").write_text(json.dumps(splits))
    return splits


@pytest.mark.parametrize("folder", ["images", "2750", "."])
def test_the_images_are_found_in_any_folder_beside_the_split_file(tmp_path, folder):
    write_root(tmp_path, folder)
    (tmp_path / "annotations").mkdir()
    task = load_task(tmp_path)
    assert {split: len(dataset) for split, dataset in task.splits.items()} == {"train": 6, "validation": 3, "test": 3}
    assert task.class_names == ("Barn Owl", "cat", "eel")
    assert all(row["image"].getpixel((0, 0))[0] == row["label"] for split in task.splits for row in task[split])


def test_the_split_file_itself_can_be_given(tmp_path):
    write_root(tmp_path / "pets")
    task = load_task(tmp_path / "pets" / "split_zhou_Pets.json")
    assert task.name == "pets" and len(task["train"]) == 6


def test_the_split_file_decides_over_the_class_folders(tmp_path):
    splits = write_root(tmp_path, ".")
    write_splits(tmp_path, splits | {"test": splits["test"][:2]})
    assert len(load_task(tmp_path)["test"]) == 2


def test_an_empty_validation_list_is_no_split(tmp_path):
    write_splits(tmp_path, write_root(tmp_path, per_class=8) | {"val": []})
    assert len(load_task(tmp_path)["validation"]) == 3


def test_class_names_can_be_given_for_those_of_the_split_file(tmp_path):
    write_root(tmp_path)
    new = {"eel": "c", "Barn_Owl": "a_1", "cat": "b"}
    assert load_task(tmp_path, class_names=new).class_names == ("a_1", "b", "c")
    with pytest.raises(ValueError, match="do not match the labels: 2 names are given for 3 classes"):
        load_task(tmp_path, class_names=["a", "b"])


def test_a_listed_image_that_does_not_exist_is_named_and_counted(tmp_path):
    write_root(tmp_path)
    for path in ("cat/1.png", "eel/3.png"):
        (tmp_path / "images" / path).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"2 of the 12 images .* do not exist, the first is .*images/cat/1\.png"
    ):
        load_task(tmp_path)


def test_missing_images_are_asked_for(tmp_path):
    write_splits(tmp_path, {"train": [["cat/1.png", 0, "cat"]], "test": [["eel/1.png", 1, "eel"]]})
    (tmp_path / "archive").mkdir()
    with pytest.raises(FileNotFoundError, match=r"images of .* are missing: the listed cat/1\.png .*\(archive\)"):
        load_task(tmp_path)


def test_a_damaged_image_is_named(tmp_path):
    write_root(tmp_path)
    (tmp_path / "images" / "cat" / "3.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"1 of the 3 images of split 'test' cannot be used. .*cat/3\.png"):
        load_task(tmp_path)


def test_several_split_files_are_listed(tmp_path):
    write_root(tmp_path)
    (tmp_path / "split_zhou_Zoo.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several split files: split_zhou_Pets\.json, split_zhou_Zoo\.json"):
        load_task(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a split file of CoOp"),
        ('{"train": []}', "not a split file of CoOp"),
        ('{"train": [], "test": 3}', "not a split file of CoOp"),
        ('{"train": [["a.png", 0]], "test": []}', r"entry \['a.png', 0\] in 'train'"),
        ('{"train": [["a.png", "0", "cat"]], "test": []}', "an entry is"),
        ('{"train": [], "test": []}', "lists no images"),
        ('{"train": [["a.png", 0, "cat"]], "test": [["b.png", 0, "dog"]]}', "label 0 both 'cat' and 'dog'"),
        ('{"train": [["a.png", 0, "cat"]], "test": [["b.png", 1, "Cat"]]}', r"split_zhou_Pets\.json .*'cat' and 'Cat'"),
        ('{"train": [["a.png", 0, "cat"]], "test": [["b.png", 2, "dog"]]}', "labels 0, 2; they must be 0 to 1"),
    ],
)
def test_a_split_file_of_another_form_says_what_is_wrong(tmp_path, content, message):
    (tmp_path / "split_zhou_Pets.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path)
