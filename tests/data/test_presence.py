"""Whether a data set of the catalog lies below a root: whole, in part, or not at all."""

import shutil
from dataclasses import replace

import pytest
from coop_data import picture, write_data_set
from datasets import ClassLabel, Dataset, Features, Image

from capt_peft.data import CATALOG, load_task
from capt_peft.data.presence import lacking

FOUR = {name: replace(item, num_classes=4) for name, item in CATALOG.items() if item.coop_folder}
every = pytest.mark.parametrize("item", FOUR.values(), ids=lambda item: item.name)


@every
def test_a_whole_data_set_in_coops_layout_lacks_nothing_and_is_loaded(item, tmp_path):
    write_data_set(item, tmp_path, range(4))
    assert lacking(item, tmp_path) == "" == lacking(item, str(tmp_path))
    assert load_task(item.name, root=tmp_path).num_classes == 4


@every
def test_one_that_is_not_there_or_lacks_a_class_says_so(item, tmp_path):
    assert lacking(item, tmp_path) == f"is missing: {tmp_path} has no folder {item.coop_folder}"
    write_data_set(item, tmp_path, range(3))
    assert "has images of 3 of its 4 classes" in lacking(item, tmp_path)


def test_empty_class_folders_and_missing_splits_do_not_count(tmp_path):
    item = FOUR["imagenet"]
    write_data_set(item, tmp_path, range(4))
    images = tmp_path / "imagenet" / "images"
    for file in next((images / "val").iterdir()).iterdir():
        file.unlink()
    assert lacking(item, tmp_path) == f"is not whole: {images / 'val'} has images of 3 of its 4 classes"
    shutil.rmtree(images / "val")
    assert lacking(item, tmp_path) == f"is not whole: {images} has neither test nor validation images"
    (images / "train").rename(images / "val")
    assert lacking(item, tmp_path) == f"is not whole: {images} has no training images"


def test_images_that_a_split_file_lists_have_to_be_there(tmp_path):
    item = FOUR["eurosat"]
    write_data_set(item, tmp_path, range(4))
    (tmp_path / "eurosat" / "images" / "2_0.png").unlink()
    assert "is not whole: 1 of the 72 images that" in lacking(item, tmp_path)
    (tmp_path / "eurosat" / item.coop_split).write_text("{")
    assert "is not valid JSON" in lacking(item, tmp_path)


def test_a_parquet_copy_is_taken_as_it_is(tmp_path):
    (tmp_path / "dtd" / "data").mkdir(parents=True)
    rows = {"image": [picture(0)], "label": [0]}
    data = Dataset.from_dict(rows, features=Features(image=Image(), label=ClassLabel(names=["banded"])))
    data.to_parquet(tmp_path / "dtd" / "data" / "train-00000.parquet")
    assert lacking(CATALOG["dtd"], tmp_path) == ""


def test_without_a_root_it_is_the_hubs_where_the_hub_has_it():
    assert lacking(CATALOG["dtd"], None) == ""
    assert lacking(CATALOG["ucf101"], None) == "is not on the Hub and has to lie below --root"
