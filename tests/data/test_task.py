"""Task: what it refuses, its texts and labels, few-shot training images."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from PIL import Image

from capt_peft import describe_task
from capt_peft.data import Task, load_task
from capt_peft.data.columns import named_as
from capt_peft.data.names import labels_by_name
from capt_peft.data.task import task_features

NAMES = ("cat", "owl", "eel")


def split(labels, names=NAMES):
    images = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(len(labels))]
    return Dataset.from_dict({"image": images, "label": labels}, features=task_features(names))


@pytest.fixture
def task():
    return Task("pets", NAMES, {"train": split([0, 1, 2] * 4), "test": split([2, 1, 0])})


def test_streamed_images_are_refused_with_what_to_do_and_that_does_it():
    stream = split([0, 1, 2] * 4).to_iterable_dataset()
    for use in (lambda: Task("t", NAMES, {"train": stream}), lambda: load_task(stream)):
        with pytest.raises(TypeError, match=r"not IterableDataset \(streamed, .*or keep a part of a split, ") as caught:
            use()
    recipe = str(caught.value).split("of a split, ")[1].split(". A datasets")[0][:-1]
    kept = eval(recipe.replace("1000", "6"), {"Dataset": Dataset, "split": stream})
    assert Task("t", NAMES, {"train": kept}).labels("train").tolist() == [0, 1, 2] * 2


def test_a_data_set_in_place_of_a_name_or_a_split_is_refused_with_what_to_do():
    data = split([0, 1, 2])
    with pytest.raises(
        TypeError, match=r"not Dataset. A datasets.Dataset with the columns .* becomes a task by Task\("
    ):
        load_task(data)
    with pytest.raises(TypeError, match=r"Split 'train' of task 't' must be a datasets.Dataset, not DatasetDict"):
        Task("t", NAMES, {"train": DatasetDict(train=data)})


def test_texts_put_each_class_name_into_the_template(task):
    assert task.texts == ["a photo of a cat.", "a photo of a owl.", "a photo of a eel."]


def test_a_class_name_with_braces_stays_as_it_is():
    assert Task("t", ("{x}", "b"), {}).texts[0] == "a photo of a {x}."


@pytest.mark.parametrize("template", ["a photo.", "{} and {}", "{name}", "a {} {", "{0}"])
def test_a_template_needs_exactly_one_place_for_the_class_name(template):
    with pytest.raises(ValueError, match=r"exactly one \{\}"):
        Task("t", NAMES, {}, template)


@pytest.mark.parametrize(
    ("names", "message"),
    [(("cat",), "two class names"), (("cat", " "), "label 1"), (("cat", "cat"), "'cat'")],
)
def test_class_names_must_be_two_or_more_different_words(names, message):
    with pytest.raises(ValueError, match=message):
        Task("t", names, {})


@pytest.mark.parametrize(
    "names", [set(NAMES), frozenset(NAMES), dict(enumerate(NAMES)), dict.fromkeys(NAMES).keys(), iter(NAMES), "cat"]
)
def test_class_names_without_an_order_are_refused(names):
    for use in (
        lambda: Task("t", names, {"train": split([0, 1, 2])}),
        lambda: labels_by_name(split([0, 1, 2]), names),
        lambda: named_as(split([0, 1, 2]), names),
        lambda: load_task("digits", class_names=names if not isinstance(names, dict) else names.values()),
    ):
        with pytest.raises(ValueError, match="must be a list in the order of the labels, not a "):
            use()
    assert load_task("digits", class_names=np.array([f"digit {i}" for i in range(10)])).num_classes == 10


def test_labels_without_a_class_name_are_refused():
    with pytest.raises(ValueError, match=r"'train'.*labels from 0 to 2, but there are 2 class names"):
        Task("t", ("cat", "owl"), {"train": split([0, 1, 2])})


def test_labels_below_zero_are_refused():
    with pytest.raises(ValueError, match=r"'test'.*labels from -1 to 0"):
        Task("t", NAMES, {"test": split([0, -1])})


@pytest.mark.parametrize("names", [("owl", "cat", "eel"), ("cat", "owl", "yak")])
def test_a_split_that_calls_its_labels_something_else_is_refused_with_both_names(names):
    with pytest.raises(
        ValueError, match=r"Label \d is '(owl|yak)' in the class names of task 't', but '(cat|eel)' in its split"
    ):
        Task("t", names, {"train": split([0, 1, 2])})
    turned = named_as(split([0, 1, 2]), ("eel", "Owl", "cat"))
    task = Task("t", ("eel", "Owl", "cat"), {"train": turned})
    assert [row["image"].getpixel((0, 0))[0] for row in task["train"]] == [0, 1, 2]
    assert task["train"]["label"][:] == [2, 1, 0]


def test_a_split_may_spell_the_class_names_in_another_way():
    assert Task("t", ("Cat", "owl ", "e_el"), {"train": split([0, 1, 2], ("cat", "owl", "e el"))}).num_classes == 3


@pytest.mark.parametrize("pair", [("Crane", "crane"), ("cat ", "cat"), ("a_b", "a b"), ("caf\u00e9", "cafe\u0301")])
def test_class_names_that_no_text_tells_apart_are_refused_with_both(pair):
    with pytest.raises(ValueError, match=f"labels 0 and 2 are {pair[0]!r} and {pair[1]!r}"):
        Task("t", (pair[0], "dog", pair[1]), {})


def test_labels_are_matched_by_the_words_of_a_column_too():
    words = Dataset.from_dict({"label": ["eel", "Cat", "eel"]})
    assert labels_by_name(words, NAMES).tolist() == [2, 0, 2]
    with pytest.raises(ValueError, match="images of the class 'yak'"):
        labels_by_name(Dataset.from_dict({"label": ["yak"]}), NAMES)
    with pytest.raises(ValueError, match="without a label"):
        labels_by_name(Dataset.from_dict({"label": [0, None]}), NAMES)


def test_the_summary_counts_images_by_class_and_split_and_says_what_was_left_out():
    names = ("c|t", "owl", "eel")
    splits = {"train": split([0, 1, 2] * 4, names), "test": split([2, 1], names)}
    task = Task("pets", names, splits, left_out=("3 <b>: x\ny",))
    lines = describe_task(task).splitlines()
    assert task.summary().splitlines() == lines
    assert lines[0] == "| class | train | test |" and lines[2:] == [
        "| c\\|t | 4 | 0 |",
        "| owl | 4 | 1 |",
        "| eel | 4 | 1 |",
        "| all 3 | 12 | 2 |",
        "",
        "- no test images of 'c\\|t'",
        "- left out: 3 &#60;b&#62;: x y",
    ]
    assert task.few_shot(1, 0).left_out == task.left_out


def test_the_summary_of_many_classes_is_short():
    names = tuple(f"class {i}" for i in range(100))
    lines = Task("t", names, {"test": split(list(range(100)), names)}).summary().splitlines()
    assert len(lines) == 2 + 21 and lines[-2:] == ["| 81 more | 81 |", "| all 100 | 100 |"]


def test_labels_that_are_words_are_refused():
    words = Dataset.from_dict(
        {"image": ["a"], "label": ["cat"]}, features=Features(image=Value("string"), label=Value("string"))
    )
    with pytest.raises(ValueError, match="whole numbers"):
        Task("t", NAMES, {"train": words})


def test_other_columns_and_splits_are_refused():
    with pytest.raises(ValueError, match="needs `image` and `label`"):
        Task("t", NAMES, {"train": split([0, 1]).rename_column("label", "target")})
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        Task("t", NAMES, {"dev": split([0, 1])})


def test_a_missing_split_is_named_with_those_that_there_are(task):
    assert len(task["test"]) == 3
    with pytest.raises(KeyError, match="no split 'validation'; it has train, test"):
        task["validation"]


def test_labels_are_those_of_the_selected_images(task):
    np.testing.assert_array_equal(task.labels("test"), [2, 1, 0])
    chosen = Task("t", NAMES, {"test": task["test"].select([2, 0])})
    np.testing.assert_array_equal(chosen.labels("test"), [0, 2])


def test_few_shot_and_labels_open_no_image():
    columns = {"image": ["missing.png"] * 4, "label": [0, 1, 0, 1]}
    task = Task("t", ("cat", "owl"), {"train": Dataset.from_dict(columns, features=task_features(("cat", "owl")))})
    assert sorted(task.few_shot(1, 0).labels("train")) == [0, 1]


def test_few_shot_writes_nothing_beside_a_saved_dataset(tmp_path):
    split([0, 1, 2] * 4).save_to_disk(str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    Task("t", NAMES, {"train": Dataset.load_from_disk(str(tmp_path))}).few_shot(1, 0).labels("train")
    assert sorted(tmp_path.rglob("*")) == before


def test_few_shot_draws_training_images_and_leaves_the_test_images(task):
    few = task.few_shot(2, seed=0)
    assert np.bincount(few.labels("train")).tolist() == [2, 2, 2]
    assert len(few["test"]) == 3 and len(task["train"]) == 12
    assert few.class_names == task.class_names


def test_few_shot_images_keep_their_labels(task):
    for row in task.few_shot(3, seed=5)["train"]:
        assert row["image"].getpixel((0, 0))[0] % 3 == row["label"]


def test_few_shot_names_a_class_with_too_few_images(task):
    with pytest.raises(ValueError, match=r"'cat' has 4 images, but 5 are asked"):
        task.few_shot(5, seed=0)
    assert len(task.few_shot(5, seed=0, allow_fewer=True)["train"]) == 12
