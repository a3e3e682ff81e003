"""Parquet files: each is read by its own class names, a path is a path, and the Hub's layouts are known."""

import io
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from capt_peft.data import load_task
from capt_peft.data.parquet import check_hub_files

NAMES = ["cat", "dog", "eel"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(name):
    buffer = io.BytesIO()
    PILImage.new("RGB", (4, 4), (NAMES.index(name), 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(names, words=("cat", "dog", "eel") * 4):
    columns = {
        "image": [{"bytes": png(word), "path": None} for word in words],
        "label": [names.index(w) for w in words],
    }
    return Dataset.from_dict(columns, features=Features(image=Image(), label=ClassLabel(names=list(names))))


def write(path, names=NAMES, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows(names, **settings).to_parquet(str(path))
    return path


def check(task):
    for dataset in task.splits.values():
        for row in dataset:
            assert NAMES[row["image"].getpixel((0, 0))[0]] == task.class_names[row["label"]]
    return {split: len(dataset) for split, dataset in task.splits.items()}


@pytest.mark.parametrize("file", ["test.parquet", "train-00001-of-00002.parquet"])
def test_files_that_list_their_classes_in_another_order_are_matched_by_name(tmp_path, file):
    write(tmp_path / "train-00000-of-00002.parquet")
    write(tmp_path / file, ["eel", "Cat", "dog"], words=["dog", "eel"] * 6)
    assert sum(check(load_task(tmp_path)).values()) == 24


def test_a_file_with_a_class_that_the_first_does_not_have_is_named_with_both_names(tmp_path):
    write(tmp_path / "train.parquet", ["dog", "cat"], words=["cat", "dog"] * 4)
    write(tmp_path / "test.parquet", ["eel", "cat"], words=["eel", "cat"])
    with pytest.raises(ValueError, match=r"test\.parquet has images of the class 'eel' \(label 0\).*label 0 is 'dog'"):
        load_task(tmp_path)


@pytest.mark.parametrize("name", ["a[b]", "x*y", "q?z", "sp ace", "caf\u00e9", "%41#1", "{a,b}"])
def test_a_path_is_a_path_and_never_a_pattern(tmp_path, name):
    for decoy in ("ab", "xy", "x1y", "qaz", "a"):
        write(tmp_path / decoy / f"{decoy}.parquet", words=["cat", "dog"] * 30)
        write(tmp_path / name / f"{decoy}.parquet" if decoy != "a" else tmp_path / "b.parquet", words=["cat"] * 60)
    file = write(tmp_path / name / f"{name}.parquet")
    assert sum(check(load_task(file)).values()) == 12
    write(tmp_path / f"set {name}" / "train.parquet")
    assert sum(check(load_task(tmp_path / f"set {name}")).values()) == 12
    DatasetDict(train=rows(NAMES)).save_to_disk(str(tmp_path / "saved" / name))
    assert sum(check(load_task(tmp_path / "saved" / name)).values()) == 12


def test_a_path_that_would_be_taken_for_a_chain_of_addresses_is_refused(tmp_path):
    write(tmp_path / "a" / "train.parquet").parent.rename(tmp_path / "a::b")
    with pytest.raises(ValueError, match=r"a::b.*chain of addresses"):
        load_task(tmp_path / "a::b" / "train.parquet")


@pytest.mark.parametrize("folder", ["", "default/", "data/plain/"])
def test_the_folders_of_the_hubs_own_export_are_splits(tmp_path, folder):
    write(tmp_path / f"{folder}train/0000.parquet")
    write(tmp_path / f"{folder}train/0001.parquet")
    write(tmp_path / f"{folder}test/0000.parquet", words=NAMES)
    assert check(load_task(tmp_path)) == {"train": 18, "validation": 6, "test": 3}


@pytest.mark.parametrize("file", ["test/0000.parquet", "test-00000-of-00001.parquet", "partial-test/0000.parquet"])
def test_test_images_alone_stay_test_images(tmp_path, file):
    assert check(load_task(write(tmp_path / file).parents[file.count("/")])) == {"test": 12}
    if "/" not in file:
        assert check(load_task(tmp_path / file)) == {"test": 12}


def test_several_configurations_are_listed(tmp_path):
    for config in ("large", "small"):
        write(tmp_path / config / "train" / "0000.parquet")
    with pytest.raises(ValueError, match="several folders that are not splits: large, small"):
        load_task(tmp_path)
    assert sum(check(load_task(tmp_path / "small")).values()) == 12


def test_a_file_of_one_split_in_the_folder_of_another_is_refused(tmp_path):
    write(tmp_path / "train" / "test-0.parquet")
    with pytest.raises(ValueError, match=r"test-0\.parquet names several splits: test, train"):
        load_task(tmp_path)


def test_a_parquet_file_among_the_images_of_a_class_is_not_the_data(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / name / "embeddings.parquet")
        (tmp_path / name / "0.png").write_bytes(png(name))
    task = load_task(tmp_path)
    assert sum(map(len, task.splits.values())) == 2 and ".parquet (2)" in task.left_out[0]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("words", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_plain_bytes_are_images(tmp_path, kind, words):
    labels = pa.array(NAMES * 4, pa.string()).cast(words) if words != pa.string() else pa.array(NAMES * 4)
    table = pa.table({"image": pa.array([png(name) for name in NAMES * 4], kind), "label": labels})
    pq.write_table(table, tmp_path / "pets.parquet")
    assert sum(check(load_task(tmp_path / "pets.parquet", label_column="label")).values()) == 12


def test_image_paths_start_at_the_parquet_file(tmp_path):
    for name in NAMES:
        (tmp_path / f"{name}.png").write_bytes(png(name))
    paths = [{"bytes": None, "path": f"{name}.png"} for name in NAMES] + [{"bytes": png("cat"), "path": "cat.png"}]
    table = pa.table({"image": paths, "label": [*NAMES, "cat"]})
    pq.write_table(table, tmp_path / "train.parquet")
    assert sum(check(load_task(tmp_path, label_column="label")).values()) == 4
    (tmp_path / "dog.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"train\.parquet lists the image 'dog\.png', and there is no file .*/dog\.png"
    ):
        load_task(tmp_path, label_column="label")


def test_a_file_without_rows_is_named_or_counted(tmp_path):
    write(tmp_path / "train-0.parquet", words=())
    with pytest.raises(ValueError, match=r"train-0\.parquet has no rows"):
        load_task(tmp_path)
    write(tmp_path / "train-1.parquet")
    task = load_task(tmp_path)
    assert sum(check(task).values()) == 12 and "train-0.parquet" in task.left_out[0]


def test_a_file_that_was_written_again_is_read_again_whatever_its_time_says(tmp_path):
    path, sizes = tmp_path / "train.parquet", set()
    for names in (["cat", "dog"], ["dog", "cat"]):
        images = [{"bytes": png(word)} for word in ("cat", "dog") * 4]
        pq.write_table(pa.table({"image": images, "label": names * 4}), path, compression="none", use_dictionary=False)
        os.utime(path, (1e9, 1e9))
        sizes.add(path.stat().st_size)
        task = load_task(path, label_column="label")
        for row in task["test"]:
            assert task.class_names[row["label"]] == names[row["image"].getpixel((0, 0))[0]]
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64())), r"Column 'more' of .*a\.parquet is map<"),
        (pa.array([True, False]), r"Column 'more' is Value\('bool'\)"),
        (pa.array([0.0, 1.0]), r"Column 'more' is Value\('float64'\)"),
    ],
)
def test_a_column_of_a_type_that_cannot_serve_is_named(tmp_path, column, words):
    pq.write_table(pa.table({"image": [{"bytes": png("cat")}] * 2, "more": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=words):
        load_task(tmp_path, label_column="more", class_names=["no", "yes"])


def test_classes_without_images_are_named_by_split(tmp_path, caplog):
    for split, labels in (("train", [1, 2]), ("test", [0, 1])):
        pq.write_table(pa.table({"image": [{"bytes": png("cat")}] * 2, "label": labels}), tmp_path / f"{split}.parquet")
    told = "no train images of 'zero'", "no test images of 'two'"
    summary = load_task(tmp_path, label_column="label", class_names=["zero", "one", "two"]).summary()
    assert all(words in summary and words in caplog.text for words in told)


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([b"x"]), pa.array(["cat"]), pa.array(["dog"])], ["image", "label", "label"])
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet has two columns called 'label'"):
        load_task(tmp_path)


@pytest.mark.parametrize("names", [["Crane", "crane"], ["a_b", "a b"]])
def test_two_classes_of_one_name_are_refused_with_the_file(tmp_path, names):
    columns = {"image": [{"bytes": png("cat"), "path": None}] * 2, "label": [0, 1]}
    features = Features(image=Image(), label=ClassLabel(names=names))
    Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match=rf"train\.parquet has two classes of one name, '{names[0]}' and '{names[1]}'"):
        load_task(tmp_path)


def test_saved_splits_that_list_their_classes_in_another_order_are_matched_by_name(tmp_path):
    DatasetDict(train=rows(NAMES), test=rows(NAMES)).save_to_disk(str(tmp_path))
    rows(["eel", "dog", "cat"]).save_to_disk(str(tmp_path / "test"))
    assert check(load_task(tmp_path))["test"] == 12


def test_splits_of_the_hub_that_list_their_classes_in_another_order_are_matched_by_name(monkeypatch):
    loaded = {"train": rows(NAMES), "test": rows(["dog", "eel", "cat"])}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: loaded)
    assert check(load_task("someone/pets"))["test"] == 12


def test_hub_files_that_datasets_would_read_by_the_names_of_the_first_are_refused(tmp_path):
    files = [str(write(tmp_path / "0.parquet")), str(write(tmp_path / "1.parquet"))]
    check_hub_files(datasets.load_dataset("parquet", data_files=files, split="train"), files)
    write(tmp_path / "1.parquet", ["dog", "cat", "eel"])
    loaded = datasets.load_dataset("parquet", data_files=files, split="train")
    with pytest.raises(
        ValueError, match=r"Label 0 of column 'label' is 'dog' in .*1\.parquet, but 'cat' in the dataset"
    ):
        check_hub_files(loaded, files)
