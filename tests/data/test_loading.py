"""load_task: every layout of a data set, what is made up when splits are missing, what is refused with which words."""

import logging

import datasets
import huggingface_hub
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from capt_peft.data import list_tasks, load_image, load_task
from capt_peft.data import loading as loading_module
from capt_peft.data.loading import check_images
from capt_peft.data.task import encoded_images, task_features

NAMES = ("barn_owl", "cat", "eel")
CLEAN = ("barn owl", "cat", "eel")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(label=0, number=0):
    """An image that tells its label (red) and which one it is (green)."""
    return PILImage.new("RGB", (8, 8), (label, number, 0))


def write_classes(root, per_class=4, names=NAMES):
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            picture(label, number).save(root / name / f"{number}.png")
    return root


def raw(labels, feature=None, **columns):
    """A dataset as it might come, with more columns given as (values, feature)."""
    images = [picture(label if isinstance(label, int) else 0, number) for number, label in enumerate(labels)]
    columns = {"image": (images, Image()), "label": (labels, feature or ClassLabel(names=list(NAMES)))} | columns
    values, features = ({name: pair[i] for name, pair in columns.items()} for i in range(2))
    return Dataset.from_dict(values, features=Features(features))


def saved(path, splits):
    DatasetDict(splits).save_to_disk(str(path))
    return path


@pytest.fixture
def three_splits():
    return {"train": raw([0, 1, 2] * 5), "validation": raw([0, 1, 2]), "test": raw([0, 1, 2] * 2)}


def check_task(task, names=CLEAN):
    """Every image carries its label, and every split the columns of a task."""
    assert task.class_names == names
    for dataset in task.splits.values():
        assert dataset.features == task_features(names)
        for row in dataset:
            assert row["image"].getpixel((0, 0))[0] == row["label"]


def sizes(task):
    return {split: len(dataset) for split, dataset in task.splits.items()}


def identities(task, split):
    return {row["image"].getpixel((0, 0))[:2] for row in task[split]}


# Layouts


def test_a_folder_of_class_folders_is_split_as_coop_does(tmp_path, caplog):
    task = load_task(write_classes(tmp_path / "pets", per_class=10))
    check_task(task)
    assert sizes(task) == {"train": 15, "validation": 6, "test": 9} and task.name == "pets"
    assert set.union(*(identities(task, split) for split in task.splits)) == {
        (c, i) for c in range(3) for i in range(10)
    }
    assert "50/20/30" in caplog.text


def test_the_splits_that_are_made_up_follow_the_seed(tmp_path):
    root = write_classes(tmp_path / "pets", per_class=10)
    assert identities(load_task(root, seed=1), "test") == identities(load_task(root, seed=1), "test")
    assert identities(load_task(root, seed=1), "test") != identities(load_task(root, seed=2), "test")


@pytest.mark.parametrize(
    "names", [("train", "validation", "test"), ("training", "val", "testing"), ("train", "valid", "eval")]
)
def test_split_folders_are_known_by_several_names(tmp_path, names):
    for name, per_class in zip(names, (3, 1, 2), strict=True):
        write_classes(tmp_path / name, per_class)
    task = load_task(str(tmp_path))
    check_task(task)
    assert sizes(task) == {"train": 9, "validation": 3, "test": 6}


def test_a_class_may_be_called_test(tmp_path):
    names = ("cat", "owl", "test")
    check_task(load_task(write_classes(tmp_path, names=names)), names)


def test_folders_below_a_class_folder_hidden_files_and_other_files_do_no_harm(tmp_path):
    root = write_classes(tmp_path / "pets")
    (root / "cat" / "more").mkdir()
    picture(1, 9).save(root / "cat" / "more" / "9.PNG", format="PNG")
    (root / "cat" / "notes.txt").write_text("a note")
    (root / "cat" / "._0.png").write_text("a resource fork")
    (root / ".cache").mkdir()
    (root / "__MACOSX").mkdir()
    assert sum(sizes(load_task(root)).values()) == 13


def test_a_saved_dataset_with_splits_is_loaded_as_it_is(tmp_path, three_splits):
    task = load_task(saved(tmp_path, three_splits))
    check_task(task)
    assert sizes(task) == {"train": 15, "validation": 3, "test": 6}


def test_a_saved_dataset_without_splits_is_split(tmp_path):
    raw([0, 1, 2] * 10).save_to_disk(str(tmp_path))
    assert sizes(load_task(tmp_path)) == {"train": 15, "validation": 6, "test": 9}


def test_a_parquet_file_is_split(tmp_path):
    raw([0, 1, 2] * 10).to_parquet(tmp_path / "pets.parquet")
    task = load_task(tmp_path / "pets.parquet")
    check_task(task)
    assert sizes(task) == {"train": 15, "validation": 6, "test": 9} and task.name == "pets"


@pytest.mark.parametrize("folder", [".", "data"])
def test_parquet_files_belong_to_the_split_that_their_name_begins_with(tmp_path, three_splits, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    for part in range(2):
        three_splits["train"].shard(2, part).to_parquet(tmp_path / folder / f"train-0000{part}-of-00002.parquet")
    three_splits["validation"].to_parquet(tmp_path / folder / "val_8px.parquet")
    three_splits["test"].to_parquet(tmp_path / folder / "test.parquet")
    task = load_task(tmp_path)
    check_task(task)
    assert sizes(task) == {"train": 15, "validation": 3, "test": 6}


def test_a_changed_parquet_file_is_read_anew(tmp_path):
    raw([0, 1, 2] * 10).to_parquet(tmp_path / "pets.parquet")
    load_task(tmp_path)
    raw([0, 1, 2] * 20).to_parquet(tmp_path / "pets.parquet")
    assert sizes(load_task(tmp_path))["train"] == 30


def test_image_bytes_that_another_library_wrote_are_images(tmp_path):
    encoded = raw([0, 1, 2] * 4).cast_column("image", Image(decode=False))
    plain = Features(image={"bytes": Value("binary"), "path": Value("string")}, label=encoded.features["label"])
    Dataset(encoded.data.table.replace_schema_metadata(None), info=datasets.DatasetInfo(features=plain)).save_to_disk(
        str(tmp_path)
    )
    check_task(load_task(tmp_path))


@pytest.mark.parametrize("layout", ["folder", "saved", "parquet"])
def test_nothing_is_written_into_the_folder_of_the_user(tmp_path, three_splits, layout):
    if layout == "folder":
        write_classes(tmp_path / "a")
    elif layout == "saved":
        saved(tmp_path / "a", three_splits)
    else:
        (tmp_path / "a").mkdir()
        three_splits["train"].to_parquet(tmp_path / "a" / "train.parquet")
    before = sorted(tmp_path.rglob("*"))
    task = load_task(tmp_path / "a").few_shot(1, 0)
    check_images(task)
    assert task["train"][0]["image"].size == (8, 8)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_catalog_is_known_by_name():
    assert list_tasks()[0] == "digits" and "shapes" in list_tasks()
    task = load_task("sizes", template="a drawing of a {}.")
    assert task.name == "sizes" and task.texts[0] == f"a drawing of a {task.class_names[0]}."


def test_the_class_names_of_a_catalog_task_can_be_given():
    names = ["tiny_1", "middling", "huge"]
    task = load_task("sizes", class_names=names)
    assert task.class_names == tuple(names) == tuple(task["test"].features["label"].names)
    with pytest.raises(ValueError, match="2 names are given for 3 classes"):
        load_task("sizes", class_names=["a", "b"])


@pytest.mark.parametrize("settings", [{"image_column": "image"}, {"train_split": "train"}, {"revision": "main"}])
def test_settings_that_do_not_belong_to_the_catalog_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        load_task("shapes", **settings)


def test_a_hub_dataset_is_asked_for_by_its_name_configuration_and_revision(monkeypatch, three_splits):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or DatasetDict(three_splits))
    task = load_task("someone/pets", name="small", revision="v1")
    assert calls == [(("someone/pets",), {"name": "small", "revision": "v1"})]
    assert (task.name, task.source) == ("someone/pets:small", "someone/pets@v1")
    check_task(task)


# Splits


def test_without_a_test_split_the_validation_split_serves_as_one(tmp_path, three_splits, caplog):
    del three_splits["test"]
    task = load_task(saved(tmp_path, three_splits))
    assert sizes(task) == {"train": 12, "validation": 3, "test": 3}
    assert "validation split serves as one" in caplog.text


def test_without_a_validation_split_a_fifth_of_the_training_images_is_one(tmp_path, three_splits, caplog):
    del three_splits["validation"]
    with caplog.at_level(logging.INFO):
        task = load_task(saved(tmp_path, three_splits))
    assert sizes(task) == {"train": 12, "validation": 3, "test": 6}
    assert np.bincount(task.labels("validation")).tolist() == [1, 1, 1]
    assert not identities(task, "validation") & identities(task, "train")
    assert "no validation split" in caplog.text


def test_a_made_up_validation_split_has_at_most_50_images_a_class(tmp_path, monkeypatch, three_splits):
    monkeypatch.setattr(loading_module, "MAX_VALIDATION_PER_CLASS", 2)
    task = load_task(saved(tmp_path, {"train": raw([0, 1, 2] * 20), "test": three_splits["test"]}))
    assert np.bincount(task.labels("validation")).tolist() == [2, 2, 2] and len(task["train"]) == 54


def test_a_test_split_alone_is_enough_to_evaluate(tmp_path, three_splits):
    assert sizes(load_task(saved(tmp_path, {"test": three_splits["test"]}))) == {"test": 6}


def test_splits_with_other_names_can_be_chosen(tmp_path, three_splits):
    path = saved(tmp_path, {"a": three_splits["train"], "b": three_splits["test"]})
    assert sizes(load_task(path, train_split="a", test_split="b")) == {"train": 12, "validation": 3, "test": 6}
    with pytest.raises(ValueError, match="which is which: a, b"):
        load_task(path)
    with pytest.raises(ValueError, match=r"no split 'c' for `test_split`. Available: a, b"):
        load_task(path, test_split="c")
    with pytest.raises(ValueError, match="cannot serve twice"):
        load_task(path, train_split="a", test_split="a")


def test_two_splits_for_one_purpose_are_ambiguous(tmp_path, three_splits):
    path = saved(tmp_path, three_splits | {"dev": three_splits["test"]})
    with pytest.raises(ValueError, match=r"Several splits could be the validation split: validation, dev"):
        load_task(path)
    assert len(load_task(path, validation_split="dev")["validation"]) == 6


def test_an_unlabelled_test_split_is_named_and_can_be_passed_over(tmp_path, three_splits):
    path = saved(tmp_path, three_splits | {"test": raw([-1, -1, 0])})
    with pytest.raises(ValueError, match=r"The test split has no labels for 2 of its 3 images .*`test_split`"):
        load_task(path)
    assert sizes(load_task(path, test_split="validation")) == {"train": 12, "validation": 3, "test": 3}


def test_missing_labels_are_named(tmp_path, three_splits):
    with pytest.raises(ValueError, match="train split has no labels for 1 of its 3"):
        load_task(saved(tmp_path / "a", {"train": raw([0, None, 2])}))
    with pytest.raises(ValueError, match="train split has no labels for 1 of its 3"):
        load_task(saved(tmp_path / "b", {"train": raw(["x", None, "y"], Value("string"))}), label_column="label")


def test_an_empty_split_is_named(monkeypatch, three_splits):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: three_splits | {"test": raw([])})
    with pytest.raises(ValueError, match="'test' is empty"):
        load_task("someone/pets")


def test_a_split_folder_without_class_folders_is_named(tmp_path):
    write_classes(tmp_path / "train")
    (tmp_path / "test").mkdir()
    picture().save(tmp_path / "test" / "0.png")
    with pytest.raises(ValueError, match=r"test has no class folders, so its images have no labels"):
        load_task(tmp_path)


# Columns and class names


def test_the_only_image_and_class_columns_are_found_whatever_their_names(tmp_path):
    dataset = raw([0, 1, 2] * 5).rename_columns({"image": "img", "label": "fine"})
    check_task(load_task(saved(tmp_path, {"train": dataset})))


def test_two_image_columns_are_listed_and_one_can_be_chosen(tmp_path):
    path = saved(tmp_path, {"train": raw([0, 1, 2] * 5, mask=([picture(7)] * 15, Image()))})
    with pytest.raises(ValueError, match=r"could be the image: image, mask. Set `image_column`"):
        load_task(path)
    check_task(load_task(path, image_column="image"))
    assert load_task(path, image_column="mask")["train"][0]["image"].getpixel((0, 0))[0] == 7


def test_two_class_columns_are_listed_and_one_can_be_chosen(tmp_path):
    path = saved(tmp_path, {"train": raw([0, 1, 2] * 5, coarse=([0, 1, 1] * 5, ClassLabel(names=["bird", "other"])))})
    with pytest.raises(ValueError, match=r"could be the label: label, coarse. Set `label_column`"):
        load_task(path)
    assert load_task(path, label_column="coarse").class_names == ("bird", "other")


def test_missing_columns_are_listed(tmp_path):
    path = saved(tmp_path / "a", {"train": raw([0, 1, 2] * 5, Value("int64"))})
    with pytest.raises(ValueError, match=r"No column holds classes.*Columns: image, label. Set `label_column`"):
        load_task(path)
    with pytest.raises(ValueError, match=r"no column 'target'. Columns: image, label"):
        load_task(path, label_column="target")
    with pytest.raises(ValueError, match=r"Column 'label' has no images"):
        load_task(path, image_column="label")
    with pytest.raises(ValueError, match=r"No column holds images"):
        load_task(saved(tmp_path / "b", {"train": raw([0, 1]).remove_columns("image")}))


def test_strings_become_classes_in_alphabetical_order(tmp_path):
    words = [NAMES[label] for label in [2, 0, 1] * 5]
    dataset = raw([2, 0, 1] * 5, word=(words, Value("string")))
    check_task(load_task(saved(tmp_path, {"train": dataset}), label_column="word"))


def test_a_class_that_was_never_trained_on_is_named(tmp_path):
    splits = {"train": raw(["cat", "eel"] * 5, Value("string")), "test": raw(["cat", "yak"], Value("string"))}
    with pytest.raises(ValueError, match=r"test split has images of the class 'yak'.*none of the 2 classes"):
        load_task(saved(tmp_path, splits), label_column="label")


def test_whole_numbers_need_class_names(tmp_path):
    path = saved(tmp_path, {"train": raw([0, 1, 2] * 5, Value("int32"))})
    with pytest.raises(ValueError, match=r"numbers without names. Give `class_names`"):
        load_task(path, label_column="label")
    check_task(load_task(path, label_column="label", class_names=NAMES), NAMES)
    check_task(load_task(path, label_column="label", class_names=dict(enumerate(NAMES))), NAMES)
    with pytest.raises(ValueError, match="labels from 0 to 2, but there are 2 class names"):
        load_task(path, label_column="label", class_names=NAMES[:2])


@pytest.mark.parametrize("feature", [Value("float32"), datasets.List(Value("int64"))])
def test_labels_of_another_type_are_refused(tmp_path, feature):
    labels = [0.5, 1.5] if isinstance(feature, Value) else [[0, 1], [1]]
    with pytest.raises(ValueError, match="labels are a ClassLabel, strings or whole numbers"):
        load_task(saved(tmp_path, {"train": raw(labels, feature)}), label_column="label")


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c", "d"]])
def test_class_names_that_do_not_match_the_labels_are_refused(tmp_path, names, three_splits):
    with pytest.raises(ValueError, match=rf"do not match the labels: {len(names)} names are given for 3 classes"):
        load_task(saved(tmp_path / "a", three_splits), class_names=names)
    with pytest.raises(ValueError, match=rf"do not match the labels: {len(names)} names are given for 3 classes"):
        load_task(write_classes(tmp_path / "b"), class_names=names)


def test_given_class_names_keep_their_underscores(tmp_path, three_splits):
    path = saved(tmp_path, three_splits)
    new = {"cat": "b", "barn owl": "owl_1", "eel": "c"}
    check_task(load_task(path, class_names=new), ("owl_1", "b", "c"))


def test_a_list_of_other_class_names_is_refused_with_the_way_to_give_them(tmp_path, three_splits):
    path = saved(tmp_path, three_splits)
    for names in (["owl_1", "b", "c"], ["eel", "barn owl", "kitten"]):
        with pytest.raises(ValueError, match=r"'(owl_1|kitten)' is none of 'barn owl', 'cat', 'eel'.*class_names={"):
            load_task(path, class_names=names)
    with pytest.raises(ValueError, match=r"no new name for 'eel'"):
        load_task(path, class_names={"barn_owl": "a", "cat": "b", "eagle": "c"})
    with pytest.raises(ValueError, match=r"'a' and 'A'"):
        load_task(path, class_names={"barn_owl": "a", "cat": "A", "eel": "c"})


def test_class_names_that_the_data_has_are_matched_by_name(tmp_path, three_splits):
    task = load_task(saved(tmp_path, three_splits), class_names=["eel", "Barn Owl", "cat"])
    assert task.class_names == ("eel", "Barn Owl", "cat")
    for row in task["test"]:
        assert ("Barn Owl", "cat", "eel")[row["image"].getpixel((0, 0))[0]] == task.class_names[row["label"]]
    turned = load_task("sizes", class_names=["large", "small", "medium"])
    plain = load_task("sizes")
    assert [turned.class_names[i] for i in turned["test"]["label"]] == [
        plain.class_names[i] for i in plain["test"]["label"]
    ]
    with pytest.raises(ValueError, match="'tiny' is none of 'small', 'medium', 'large'"):
        load_task("sizes", class_names=["large", "tiny", "medium"])


@pytest.mark.parametrize("first", [0, 1])
def test_numbers_as_class_names_count_in_their_order(tmp_path, first):
    numbers = tuple(str(first + i) for i in range(12))
    root = write_classes(tmp_path / "numbers", 2, numbers)
    check_task(load_task(root), numbers)
    names = tuple(f"thing {letter}" for letter in "abcdefghijkl")
    check_task(load_task(root, class_names=names), names)
    with pytest.raises(ValueError, match="a list does not say which is which"):
        load_task(root, class_names=[str(first + 1 + i) for i in range(12)])


def test_numbers_with_gaps_as_class_names_ask_for_a_mapping(tmp_path):
    root = write_classes(tmp_path, 2, ("0", "1", "10"))
    with pytest.raises(ValueError, match="'a' is none of '0', '1', '10'"):
        load_task(root, class_names=["a", "b", "c"])
    check_task(load_task(root, class_names={0: "a", 10: "c", 1: "b"}), ("a", "b", "c"))


@pytest.mark.parametrize("kind", ["uint8", "uint64"])
def test_whole_numbers_may_be_unsigned(tmp_path, kind):
    path = saved(tmp_path, {"train": raw([0, 1, 2] * 5, Value(kind))})
    check_task(load_task(path, label_column="label", class_names=NAMES), NAMES)


def test_splits_with_other_classes_are_refused(tmp_path, monkeypatch, three_splits):
    three_splits["test"] = raw([0, 1], ClassLabel(names=["x", "y"]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: three_splits)
    with pytest.raises(ValueError, match=r"The test split has images of the class 'x'.*whose label 0 is 'barn_owl'"):
        load_task("someone/pets")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "a photo"}, "exactly one {}"),
        ({"class_names": ["a", "a"]}, "'a' stands for more than one"),
        ({"class_names": "ab"}, "must be a list"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_opened(settings, message):
    with pytest.raises(ValueError, match=message):
        load_task("no/such/place/anywhere", **settings)


# What is not there, or damaged


@pytest.mark.parametrize("name", ["no_such_task", "someone/nothing"])
def test_an_unknown_name_says_what_was_tried(name, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=rf"'{name}' is not a task of the catalog \(digits, .*Hub failed"):
        load_task(name)


@pytest.mark.parametrize("path", ["./nothing", "/nothing", "a/b/c", "https://example.org/data"])
def test_an_unknown_path_is_not_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="no file or folder here"):
        load_task(path)


def test_a_hub_dataset_that_cannot_be_loaded_so_says_why(monkeypatch):
    def refuse(*args, **settings):
        raise ValueError("Config name is missing. Please pick one among ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"'someone/pets' \(name=None.*pick one among"):
        load_task("someone/pets")


def test_hub_settings_for_a_local_path_are_refused(tmp_path):
    with pytest.raises(ValueError, match="takes no name or revision"):
        load_task(write_classes(tmp_path / "a"), name="small", revision="v1")


def test_a_folder_without_classes_is_refused(tmp_path):
    picture().save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="has no class folders"):
        load_task(tmp_path)


def test_an_empty_class_folder_is_named(tmp_path):
    (write_classes(tmp_path) / "yak").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*yak has no images"):
        load_task(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"labels\.csv is neither a parquet file nor"):
        load_task(tmp_path / "labels.csv")


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read as parquet"):
        load_task(tmp_path)


def test_a_parquet_file_of_no_split_beside_those_of_splits_is_named(tmp_path):
    for name in ("train", "extra"):
        raw([0, 1, 2]).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"extra\.parquet does not begin with a split"):
        load_task(tmp_path)


def test_a_damaged_image_of_a_folder_is_named_at_once(tmp_path):
    root = write_classes(tmp_path)
    damaged = root / "cat" / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    (root / "eel" / "0.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"of the \d+ images of split '\w+' cannot be used. .*(2|0)\.png cannot be read"
    ):
        load_task(root)


def test_images_of_a_large_folder_are_not_opened_until_they_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(loading_module, "MAX_CHECKED_IMAGES", 5)
    root = write_classes(tmp_path)
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    task = load_task(root)
    with pytest.raises(ValueError, match=r"\.png cannot be read"):
        load_image(encoded_images(task["test"])[0]["image"])


def test_check_images_counts_what_is_missing_and_damaged(tmp_path, three_splits):
    root = write_classes(tmp_path / "a")
    paths = [str(root / "cat" / f"{number}.png") for number in (0, 9, 1, 8)]
    columns = {"image": paths, "label": [1, 1, 1, 1]}
    missing = Dataset.from_dict(columns, features=task_features(CLEAN))
    task = load_task(saved(tmp_path / "b", three_splits))
    task = loading_module.replace(task, splits={**task.splits, "test": missing})
    check_images(task, ["train"])
    with pytest.raises(FileNotFoundError, match=r"2 of the 4 images of split 'test' cannot be used. .*9\.png"):
        check_images(task)


def test_an_image_in_a_parquet_file_can_be_damaged_too(tmp_path):
    rows = [{"bytes": b"nonsense", "path": "train/cat/1.jpg"}] * 12
    Dataset.from_dict(
        {"image": rows, "label": [0, 1, 2] * 4}, features=Features(image=Image(), label=ClassLabel(names=list(NAMES)))
    ).to_parquet(tmp_path / "train.parquet")
    task = load_task(tmp_path)
    with pytest.raises(ValueError, match=r"6 of the 6 .*train/cat/1\.jpg cannot be read"):
        check_images(task)
