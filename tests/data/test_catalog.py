"""The catalog: what every entry says, and small data sets in the layouts that it describes."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from coop_data import picture, write_coop, write_folders
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from capt_peft.data import CATALOG, Entry, list_tasks, load_task
from capt_peft.data.catalog import read_classes, recognize, to_catalog
from capt_peft.data.names import check_class_names
from capt_peft.tuner.config import DEFAULT_TEMPLATE, check_template

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
CLASSES = {
    **{"imagenet": 1000, "caltech101": 100, "oxford_pets": 37, "stanford_cars": 196, "oxford_flowers": 102},
    **{"food101": 101, "fgvc_aircraft": 100, "sun397": 397, "dtd": 47, "eurosat": 10, "ucf101": 101},
    **{"imagenet_v2": 1000, "imagenet_sketch": 1000, "imagenet_a": 200, "imagenet_r": 200, "objectnet": 113},
    **{"cifar10": 10, "cifar100": 100},
}
on_the_hub = pytest.mark.parametrize("item", [item for item in CATALOG.values() if item.hub_id], ids=lambda i: i.name)
with_split_file = pytest.mark.parametrize(
    "item", [item for item in CATALOG.values() if item.coop_split], ids=lambda i: i.name
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def told(row):
    red, green, _ = row["image"].convert("RGB").getpixel((0, 0))
    return red + 256 * green


def copy_of(item, labels, feature, places, column=None, **columns):
    """Images with labels of a copy of an entry; `places` are the labels of the catalog that they tell."""
    images = [picture(place) for place in places]
    column = column or item.image_column or "webp"
    values = {column: images, item.label_column: labels} | {name: value for name, (value, _) in columns.items()}
    features = {column: Image(), item.label_column: feature} | {name: f for name, (_, f) in columns.items()}
    return Dataset.from_dict(values, features=Features(features))


def like_the_hub(item, seed=0):
    """The columns and splits of the Hub's copy; named labels come in another order and spelling."""
    places = [0, 1, item.num_classes - 1] * 5
    if item.label_column == "wnid":
        places = list(range(item.num_classes))  # strings make a class of what occurs alone
        labels, feature = [read_classes(item.classes)[place][-1] for place in places], Value("string")
    elif item.labels_in_order:
        labels, feature = places, Value("int64")
    else:
        order = np.random.default_rng(seed).permutation(item.num_classes).tolist()
        names = [read_classes(item.classes)[place][-1].replace(" ", "_") for place in order]
        labels, feature = [order.index(place) for place in places], ClassLabel(names=names)
    more = {"another": (["x"] * len(places), Value("string")), "kind": ([0] * len(places), ClassLabel(names=["a"]))}
    return DatasetDict({name: copy_of(item, labels, feature, places, **more) for name in item.splits.values()})


def check(task, item, names=None):
    assert task.class_names == (names or item.class_names)
    for dataset in task.splits.values():
        for row in dataset:
            assert item.class_names[told(row)] == task.class_names[row["label"]]


# What every entry says


def test_the_catalog_has_the_data_sets_of_the_literature_with_their_number_of_classes():
    assert {name: len(item.class_names) for name, item in CATALOG.items()} == CLASSES
    assert all(item.num_classes == CLASSES[name] for name, item in CATALOG.items())


@pytest.mark.parametrize("item", CATALOG.values(), ids=lambda item: item.name)
def test_an_entry_has_names_a_template_and_sources(item):
    check_template(item.template)
    check_class_names(item.class_names)
    assert all(name == name.strip() and "_" not in name for name in item.class_names)
    assert item.licence and item.citation and item.sources and set(item.splits) <= {"train", "validation", "test"}
    assert item.hub_id or "Hub" in item.note


@pytest.mark.parametrize("classes", sorted({item.classes for item in CATALOG.values()}))
def test_no_class_goes_by_a_name_of_another(classes):
    rows = read_classes(classes)
    assert all(1 <= len(row) <= 2 for row in rows)
    said = [name.lower() for row in rows for name in dict.fromkeys(row)]
    assert len(set(said)) == len(said) or classes == "objectnet"


def test_the_classes_of_imagenet_stand_in_the_order_of_their_wordnet_ids():
    for name in ("imagenet", "imagenet_a", "imagenet_r"):
        wnids = [row[1] for row in read_classes(name)]
        assert wnids == sorted(set(wnids)) and all(len(wnid) == 9 and wnid[0] == "n" for wnid in wnids)


def test_shifts_have_a_test_split_alone():
    assert {item.name for item in CATALOG.values() if item.test_only} == {
        item.name for item in CATALOG.values() if item.shift_of
    }


def test_the_catalog_is_listed_after_the_tasks_that_need_no_files():
    assert list_tasks()[0] == "digits" and list_tasks()[-len(CATALOG) :] == list(CATALOG)


# The Hub's copies


@on_the_hub
def test_the_hubs_copy_is_loaded_with_the_classes_and_the_template_of_the_catalog(item, monkeypatch):
    asked = []

    def load(path, name=None, revision=None):
        asked.append((path, name, revision))
        return like_the_hub(item)

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = load_task(item.name)
    check(task, item)
    assert asked == [(item.hub_id, item.hub_config, None)]
    assert (task.name, task.template, task.source) == (item.name, item.template, item.hub_id)
    assert set(task.splits) == ({"test"} if item.shift_of else {"train", "validation", "test"})


def test_settings_come_before_those_of_the_catalog(monkeypatch):
    item = CATALOG["oxford_pets"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: like_the_hub(item))
    task = load_task("oxford_pets", template="{}!", revision="v1")
    assert task.texts[0] == "abyssinian!" and task.source == "timm/oxford-iiit-pet@v1"
    swapped = load_task("oxford_pets", train_split="test", test_split="train")
    check(swapped, item)


def test_class_names_that_are_given_stay_in_the_order_of_the_data(monkeypatch):
    item = CATALOG["eurosat"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: like_the_hub(item))
    assert load_task("eurosat", class_names=list("abcdefghij")).class_names == tuple("abcdefghij")


def test_the_two_classes_that_coop_leaves_out_are_left_out(monkeypatch):
    item = CATALOG["caltech101"]
    names = ["BACKGROUND_Google", "Faces_easy", *(row[-1] for row in read_classes("caltech101"))]
    split = copy_of(item, [0, 1, 2, 101] * 5, ClassLabel(names=names), [9, 9, 0, 99] * 5)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: DatasetDict(train=split, test=split))
    task = load_task("caltech101")
    check(task, item)
    assert len(task["test"]) == 10


def test_the_long_names_of_imagenet_are_taken_by_their_place(monkeypatch):
    item = CATALOG["imagenet"]
    names = [f"{row[0]}, {row[1]} and more" for row in read_classes("imagenet")]
    split = copy_of(item, [0, 134, 999] * 5, ClassLabel(names=names), [0, 134, 999] * 5)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: DatasetDict(train=split, test=split))
    check(load_task("imagenet"), item)


def test_names_that_the_catalog_does_not_know_are_kept_with_a_warning(monkeypatch, caplog):
    item = CATALOG["dtd"]
    split = copy_of(item, [0, 1] * 5, ClassLabel(names=["banded", "brand_new"]), [0, 1] * 5)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: DatasetDict(train=split, test=split))
    task = load_task("dtd")
    assert task.class_names == ("banded", "brand new") and task.template == "{} texture."
    assert "1 of the 2 classes of this copy of DTD are not those of the catalog ('brand new')" in caplog.text


def test_folders_that_the_catalog_does_not_know_are_never_taken_by_their_place_in_the_alphabet():
    item = CATALOG["imagenet_sketch"]
    names = sorted(f"{row[0]}, {row[1]}" for row in read_classes("imagenet"))
    assert to_catalog({}, tuple(names), item, ordered=False)[1] == tuple(names)
    assert to_catalog({}, tuple(f"{row[0]}, {row[1]}" for row in read_classes("imagenet")), item)[1] == item.class_names


def test_a_data_set_that_no_source_has_on_the_hub_says_so():
    with pytest.raises(FileNotFoundError, match=r"no Hub dataset of UCF101\. .*Give `root`"):
        load_task("ucf101")


def test_a_hub_that_does_not_answer_leads_to_root(monkeypatch):
    def refuse(*args, **settings):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        FileNotFoundError, match=r"DTD could not be loaded from the Hub as tanganke/dtd: no route.*root"
    ):
        load_task("dtd")


# Local copies


@with_split_file
def test_a_coop_root_is_loaded_by_name_from_its_folder_or_the_one_above(item, tmp_path):
    folder = write_coop(item, tmp_path / item.coop_folder)
    for root in (tmp_path, str(folder), folder / item.coop_split):
        task = load_task(item.name, root=root)
        check(task, item, item.class_names[:2])
        assert (task.name, task.template, len(task["train"])) == (item.name, item.template, 8)
        assert task.source == str(root)


def test_the_lists_of_aircraft_name_what_is_missing(tmp_path):
    item = CATALOG["fgvc_aircraft"]
    folder = write_coop(item, tmp_path / item.coop_folder)
    (folder / "images" / "1_5.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 12 images that .*images_variant_train.txt lists .*1_5.jpg"):
        load_task("fgvc_aircraft", root=tmp_path)
    (folder / "images_variant_test.txt").write_text("0_5 Concorde\n")
    with pytest.raises(ValueError, match=r"test.txt has the line '0_5 Concorde'; a line is an image and a class"):
        load_task(folder)
    (folder / "images_variant_test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"images_variant_test.txt does not exist"):
        load_task(folder)


@with_split_file
def test_a_coop_root_is_recognized_by_its_split_file(item, tmp_path):
    folder = write_coop(item, tmp_path / "here")
    task = load_task(folder)
    assert task.template == item.template and task.name == "here" and recognize(folder) is item
    check(task, item, item.class_names[:2])


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_v2"])
def test_the_folders_of_a_shift_are_its_test_split(name, tmp_path):
    item = CATALOG[name]
    folder = tmp_path / item.coop_folder
    labels = (2, 10, item.num_classes - 1)
    called = {label: str(label) if name == "imagenet_v2" else read_classes(item.classes)[label][1] for label in labels}
    write_folders(folder / item.coop_images, called)
    (folder / item.coop_images / "README.txt").write_text("read me")
    (folder / "classnames.txt").write_text("n01440764 tench")
    for task in (load_task(name, root=tmp_path), load_task(folder), load_task(folder / item.coop_images)):
        check(task, item, tuple(item.class_names[label] for label in labels))
        assert set(task.splits) == {"test"} and task.template == item.template


def test_the_validation_images_of_an_imagenet_folder_are_its_test_split(tmp_path):
    item = CATALOG["imagenet"]
    for split in ("train", "val"):
        write_folders(tmp_path / "imagenet" / "images" / split, {0: "n01440764", 1: "n01443537"})
    task = load_task("imagenet", root=tmp_path)
    check(task, item, ("tench", "goldfish"))
    assert len(task["test"]) == 2


def test_a_parquet_copy_with_other_columns_and_splits_is_loaded_too(tmp_path):
    item = CATALOG["cifar100"]
    feature = ClassLabel(names=["whale", "cra", "apple"])
    for split in ("train", "val", "test"):
        Dataset.from_dict(
            {"image": [picture(place) for place in (95, 26, 0)], "fine": [0, 1, 2]},
            features=Features(image=Image(), fine=feature),
        ).to_parquet(tmp_path / f"{split}.parquet")
    check(load_task("cifar100", root=tmp_path), item, ("apple", "crab", "whale"))


@pytest.mark.parametrize("name", ["cifar10", "own"])
def test_a_name_is_that_of_a_folder_in_the_root(name, tmp_path):
    """Of the catalog or not; the other data sets that lie there do not count."""
    for folder in (name, "other"):
        (tmp_path / folder).mkdir()
        for split in ("train", "test"):
            Dataset.from_dict(
                {"image": [picture(place) for place in (0, 1)], "label": [0, 1]},
                features=Features(image=Image(), label=ClassLabel(names=["cat", "dog"])),
            ).to_parquet(tmp_path / folder / f"{split}.parquet")
    task = load_task(name, root=tmp_path)
    assert task.name == name and sorted(task.class_names) == ["cat", "dog"]
    assert Path(task.source) in (tmp_path, tmp_path / name)


def test_a_root_that_is_not_there_or_of_no_data_set_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root .*nowhere' of 'dtd' does not exist"):
        load_task("dtd", root=tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"`root` says where a data set of the catalog lies \(imagenet, .*'pets' is not one of them"
    ):
        load_task("pets", root=tmp_path)
    with pytest.raises(ValueError, match=r"'cifar' is not one of them, .* Did you mean (cifar10|cifar100) or cifar10"):
        load_task("cifar", root=tmp_path)
    write_folders(tmp_path / "root" / "own", {0: "cat", 1: "dog"})
    for path in (str(tmp_path / "root" / "own"), "../root/own", "./own"):  # paths, and not names of what is in the root
        with pytest.raises(ValueError, match="Give its path as the first argument"):
            load_task(path, root=tmp_path / "root")
    with pytest.raises(ValueError, match="takes no root"):
        load_task("digits", root=tmp_path)
    with pytest.raises(ValueError, match="takes no revision"):
        load_task("dtd", root=tmp_path, revision="v1")


def test_a_path_of_the_same_name_is_no_entry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folders(Path("dtd"), {0: "cat", 1: "dog"})
    assert load_task("./dtd").template == DEFAULT_TEMPLATE


# The real files, where they are


@with_split_file
def test_the_names_are_those_of_coops_split_file(item):
    path = SHARED / "coop_splits" / "splits" / item.coop_split
    if not path.exists():
        pytest.skip(f"{path} is not there")
    listed = {label: name for split in json.loads(path.read_text()).values() for _, label, name in split}
    assert item.class_names == tuple(listed[label].replace("_", " ") for label in range(len(listed)))


@pytest.mark.parametrize(("name", "found"), [("cifar10", 10), ("dtd", 10), ("oxford_pets", 37)])
def test_real_images_are_loaded_with_the_catalogs_names(name, found):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not there")
    item = CATALOG[name]
    task = load_task(name, root=SHARED / name)
    assert task.class_names == item.class_names[:found] and task.template == item.template
    assert np.unique(task.labels("test")).tolist() == list(range(found))


# The table in the docs


def row(item: Entry):
    hub = f"`{item.hub_id}`" if item.hub_id else "-"
    splits = ", ".join(f"{split}: {name}" if split != name else split for split, name in item.splits.items())
    columns = f"{item.image_column or '(by type)'}, {item.label_column}" if item.hub_id else "-"
    coop = f"`{item.coop_folder}/{item.coop_split or item.coop_images or ''}`" if item.coop_folder else "-"
    return (
        f"| `{item.name}` | {item.title} | {item.num_classes:,} | {hub} | {columns} | {splits if item.hub_id else '-'} | "
        f"{item.images or '-'} | {item.gigabytes or '-'} | {coop} | {item.template} | {item.licence} |"
    )


@pytest.mark.parametrize("item", CATALOG.values(), ids=lambda item: item.name)
def test_the_docs_have_the_row_the_note_and_the_sources_of_an_entry(item):
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    assert row(item) in text.splitlines()
    for words in (item.citation, item.note, *item.sources):
        assert words in text
