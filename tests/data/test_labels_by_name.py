"""Labels go by name: whatever source images come from, each ends with the name it had, or an error names both."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from capt_peft.data import Task, load_image, load_task
from capt_peft.data.columns import named_as
from capt_peft.data.names import labels_by_name, name_key
from capt_peft.data.task import encoded_images

# Each class has spellings that are one name, and each number of a class colours its images.
CLASSES = [
    ("cat", "Cat", "cat ", "_cat"),
    ("barn owl", "barn_owl", "Barn  owl", "BARN_OWL"),
    ("caf\u00e9", "cafe\u0301", "Caf\u00e9"),
    ("stra\u00dfe", "STRASSE"),
    ("__background__", "background"),
    ("train station", "Train_Station"),
    ("x[1]*?", "X[1]*?"),
    *[(str(number),) for number in range(12)],
]
ORDERS = st.lists(st.sampled_from(range(len(CLASSES))), min_size=2, max_size=5, unique=True)
NUMBERS = st.permutations(range(7, 19))  # the classes 0 to 11
SPLITS = ("train", "test")


@dataclass
class Data:
    """Images of some classes in two splits of two parts; each part spells and orders its class names in its own way."""

    classes: list[int]
    parts: dict[str, list[list[str]]] = field(default_factory=dict)  # by split and part: the names, in the part's order
    odd: bool = False  # suffixes that are missing or rare, hidden copies, linked folders

    def rows(self, names):
        """Returns an image for each class of a part: its name's place, and its class."""
        return [(place, class_of(name)) for place, name in enumerate(names)]


def class_of(name):
    return next(number for number, spellings in enumerate(CLASSES) if name_key(name) == name_key(spellings[0]))


@st.composite
def data(draw):
    classes = list(draw(ORDERS | NUMBERS))
    exact = draw(st.booleans())

    def part():
        order = draw(st.permutations(classes)) if len(classes) < 12 else draw(st.sampled_from([classes, classes[::-1]]))
        return [CLASSES[number][0] if exact else draw(st.sampled_from(CLASSES[number])) for number in order]

    return Data(classes, {split: [part(), part()] for split in SPLITS}, draw(st.booleans()))


def encoded(number, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (10 * number, 0, 0)).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


def labelled(names, rows, feature=None):
    columns = {"image": [encoded(number) for _, number in rows], "label": [place for place, _ in rows]}
    if feature is not None:
        columns["label"] = [names[place] for place in columns["label"]]
    return Dataset.from_dict(
        columns, features=Features(image=ImageFeature(), label=feature or ClassLabel(names=list(names)))
    )


# The sources: each writes the data and returns the arguments of `load_task`


def write_images(folder, names, rows, odd, start=0):
    for place, number in rows:
        path = folder / names[place].replace("/", " ") / f"{start}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number)["bytes"])
        if odd:
            (path.parent / f"{start}.jfif").write_bytes(encoded(number, "BMP")["bytes"])
            (path.parent / f"noext{start}").write_bytes(encoded(number)["bytes"])
            wrong = encoded((number + 1) % len(CLASSES))["bytes"]
            (path.parent / "notes.txt").write_text("a note")
            for hidden in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
                (path.parent / hidden).mkdir(exist_ok=True)
                (path.parent / hidden / "0.png").write_bytes(wrong)
            elsewhere = folder.parent / f"linked {folder.name} {start}" / str(place)
            elsewhere.mkdir(parents=True)
            (elsewhere / "0.png").write_bytes(encoded(number)["bytes"])
            (path.parent / f"more{start}").symlink_to(elsewhere)


def class_folders(root, given):
    write_images(root / "data", given.parts["train"][0], given.rows(given.parts["train"][0]), given.odd)
    return {"name_or_path": root / "data"}


def split_folders(root, given):
    for split, folder in (("train", "Training_set"), ("test", "seg_test/seg_test")):
        names = given.parts[split][0]
        write_images(root / "data" / folder, names, given.rows(names), False)
    return {"name_or_path": root / "data"}


def parquet_files(root, given, path="data/[{split}]*/{split}-{part}.parquet", feature=None):
    for split, parts in given.parts.items():
        for part, names in enumerate(parts):
            file = root / path.format(split=split, part=part)
            file.parent.mkdir(parents=True, exist_ok=True)
            labelled(names, given.rows(names), feature).to_parquet(str(file))
    return {"name_or_path": root / "data"}


def parquet_one_folder(root, given):
    return parquet_files(root, given, "data/{split}-{part}.parquet")


def parquet_of_words(root, given):
    for parts in given.parts.values():
        parts[1:] = [parts[0][::-1]]  # two spellings within a split are two words
    return parquet_files(root, given, "data/{split}-{part}.parquet", Value("string")) | {"label_column": "label"}


def parquet_file(root, given):
    names = given.parts["train"][0]
    labelled(names, given.rows(names)).to_parquet(str(root / "a file.parquet"))
    return {"name_or_path": root / "a file.parquet"}


def hub_layout(root, given):
    return parquet_files(root, given, "data/default/{split}/000{part}.parquet")


def saved(root, given):
    for split, parts in given.parts.items():
        labelled(parts[0], given.rows(parts[0])).save_to_disk(str(root / "data" / split))
    (root / "data" / "dataset_dict.json").write_text(json.dumps({"splits": list(given.parts)}))
    return {"name_or_path": root / "data"}


def coop_root(root, given):
    names, listed = given.parts["train"][0], {}
    for split in SPLITS:
        write_images(root / "images" / split, names, given.rows(names), False)
        listed[split] = [[f"{split}/{names[place]}/0.png", place, names[place]] for place, _ in given.rows(names)]
    (root / "split_zhou_Things.json").write_text(json.dumps(listed))
    return {"name_or_path": root}


SOURCES = [
    class_folders, split_folders, parquet_file, parquet_one_folder, parquet_of_words, hub_layout, saved, coop_root
]  # fmt: skip


def check_names(splits, class_names):
    """Every image has the name of the class that its colour tells; returns how many there are."""
    images = 0
    for dataset in splits.values():
        for row in encoded_images(dataset):
            number = load_image(row["image"]).getpixel((0, 0))[0] // 10
            assert name_key(class_names[row["label"]]) == name_key(CLASSES[number][0])
            images += 1
    return images


def names_both(error, given):
    """Whether a message tells two class names, or two spellings of one, that the data has."""
    names = {name for parts in given.parts.values() for part in parts for name in part}
    told = {name for name in names if repr(name) in str(error) or f"/{name}'" in str(error)}
    return len(told) >= 2


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


QUICK = settings(deadline=None, max_examples=4, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_every_image_ends_with_the_name_it_had(source):
    @QUICK
    @given(data(), st.data())
    def holds(given_data, more):
        with TemporaryDirectory() as folder:
            arguments = source(Path(folder), given_data)
            task = load_task(**arguments)
            assert {name_key(name) for name in task.class_names} == {
                name_key(CLASSES[i][0]) for i in given_data.classes
            }
            images = check_names(task.splits, task.class_names)
            parts = {class_folders: 1, parquet_file: 1, split_folders: 2, saved: 2, coop_root: 2}.get(source, 4)
            assert images == len(given_data.classes) * parts * (4 if given_data.odd and source is class_folders else 1)
            # the same names in any order and spelling are matched by name
            asked = [more.draw(st.sampled_from(CLASSES[i])) for i in more.draw(st.permutations(given_data.classes))]
            turned = load_task(**arguments, class_names=asked)
            assert turned.class_names == tuple(asked) and check_names(turned.splits, asked) == images

    holds()


@pytest.mark.parametrize("source", [parquet_one_folder, parquet_of_words, hub_layout, saved, split_folders])
def test_a_class_that_only_a_later_file_has_is_named_with_its_file(source):
    @QUICK
    @given(data().filter(lambda given: len(given.classes) > 2))
    def holds(given_data):
        lost = given_data.parts["train"][0][-1]
        given_data.parts["train"] = [names[:] for names in given_data.parts["train"]]
        for part in given_data.parts["train"]:
            part[:] = [name for name in part if name_key(name) != name_key(lost)]
        with TemporaryDirectory() as folder, pytest.raises(ValueError, match="none of the") as caught:
            load_task(**source(Path(folder), given_data))
        wrong = next(n for n in given_data.parts["test"][0] if name_key(n) == name_key(lost))
        assert repr(wrong) in str(caught.value)
        assert source in (saved, split_folders) or ".parquet" in str(caught.value)

    holds()


@pytest.mark.parametrize("source", [class_folders, parquet_file, parquet_one_folder, coop_root])
def test_two_spellings_of_one_class_are_refused_with_both(source):
    @QUICK
    @given(st.sampled_from([spellings for spellings in CLASSES if len(spellings) > 1]))
    def holds(spellings):
        names = ["dog", *spellings[:2]]
        given_data = Data([0], {split: [names, names] for split in SPLITS})
        given_data.rows = lambda names: [(place, 0) for place in range(len(names))]
        with TemporaryDirectory() as folder, pytest.raises(ValueError) as caught:
            load_task(**source(Path(folder), given_data))
        assert names_both(caught.value, given_data)

    holds()


def test_a_task_made_by_hand_and_a_split_given_by_hand_go_by_name():
    @QUICK
    @given(data())
    def holds(given_data):
        (names, others), _ = given_data.parts.values()
        mine, other = labelled(names, given_data.rows(names)), labelled(others, given_data.rows(others))
        assert check_names(Task("t", tuple(names), {"train": mine}).splits, names) == len(names)
        np.testing.assert_array_equal(
            labels_by_name(other, names), [[*map(class_of, names)].index(class_of(name)) for name in others]
        )
        assert check_names(Task("t", tuple(names), {"test": named_as(other, names)}).splits, names) == len(names)
        if [*map(class_of, names)] == [*map(class_of, others)]:
            assert check_names(Task("t", tuple(names), {"test": other}).splits, names) == len(names)
        else:
            with pytest.raises(ValueError) as caught:
                Task("t", tuple(names), {"test": other})
            place = next(i for i, name in enumerate(names) if class_of(name) != class_of(others[i]))
            assert repr(names[place]) in str(caught.value) and repr(others[place]) in str(caught.value)

    holds()


def test_splits_of_the_hub_go_by_name(monkeypatch):
    @QUICK
    @given(data())
    def holds(given_data):
        loaded = {s: labelled(parts[0], given_data.rows(parts[0])) for s, parts in given_data.parts.items()}
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: loaded)
        monkeypatch.setattr(
            datasets, "load_dataset_builder", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("offline"))
        )
        task = load_task("someone/things")
        assert check_names(task.splits, task.class_names) == 2 * len(given_data.classes)

    holds()
