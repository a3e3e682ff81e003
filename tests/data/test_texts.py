"""The texts of a task's classes: templates, published sets by name, own texts and the files that hold them."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

from capt_peft import Task, load_task
from capt_peft.data import TEMPLATES
from capt_peft.data.texts import read_class_texts, read_template, texts_for
from capt_peft.tuner.config import check_template

NAMES = ("red", "green", "grey", "black")
PUBLISHED = {
    "clip-imagenet-80": 80, "clip-imagenet-7": 7, "clip-caltech101": 34, "clip-cifar": 18, "clip-dtd": 8, "clip-eurosat": 3,
    "clip-fgvc_aircraft": 2, "clip-resisc45": 18, "clip-stanford_cars": 8, "clip-sun397": 2, "clip-ucf101": 48,
}  # fmt: skip


def test_the_published_sets_are_whole_and_come_with_their_licence():
    assert {name: len(templates) for name, templates in TEMPLATES.items()} == PUBLISHED
    for templates in TEMPLATES.values():
        assert check_template(templates) == templates  # one {} each, and none twice
    assert TEMPLATES["clip-imagenet-7"][0] == "itap of a {}." and set(TEMPLATES["clip-imagenet-7"]) < set(
        TEMPLATES["clip-imagenet-80"]
    )
    text = (files("capt_peft.data") / "templates.yaml").read_text(encoding="utf-8")
    words = " ".join(re.sub(r"^# ?", "", line) for line in text.splitlines())
    assert "MIT License  Copyright (c) 2021 OpenAI" in words
    assert "permission notice shall be included in all copies or substantial portions of the Software." in words


def test_a_set_is_a_copy_that_nobody_can_spoil():
    read_template("clip-sun397").append("a {}")
    assert len(read_template("clip-sun397")) == 2


@pytest.mark.parametrize(
    ("given", "stored"), [(["a {}"], "a {}"), (("a {}", "the {}"), ["a {}", "the {}"]), ("{}", "{}")]
)
def test_a_task_stores_one_template_as_a_word_and_several_as_a_list(given, stored):
    task = Task("t", NAMES, {}, given)
    assert task.template == stored
    several = [stored] if isinstance(stored, str) else stored
    assert task.texts == [template.format(name) for name in NAMES for template in several]


def test_texts_of_ones_own_go_with_their_classes():
    own = {"Grey": ["an elephant's {}", "the color gray"], "red": "a stop sign"}
    task = Task("t", NAMES, {}, ["a {}", "the {}"], class_texts=own)
    assert task.class_texts == {"red": ["a stop sign"], "grey": own["Grey"]}
    assert task.texts == [
        "a stop sign", "a green", "the green", "an elephant's grey", "the color gray", "a black", "the black",
    ]  # fmt: skip
    assert task.half("new").texts == ["an elephant's grey", "the color gray", "a black", "the black"]
    assert task.select_classes([1, 3]).class_texts is None
    assert task.select_classes([2, 0]).texts == ["an elephant's grey", "the color gray", "a stop sign"]


def test_a_name_that_is_none_of_the_classes_is_refused_unless_told():
    own = {"red": ["a"], "gren": ["b"]}
    with pytest.raises(
        ValueError,
        match=r"class_texts has texts for 'gren', but the classes are 'red', 'green', 'grey', 'black'\. Did you mean 'green'",
    ):
        Task("t", NAMES, {}, class_texts=own)
    with pytest.raises(ValueError, match=r"'b' and 5 more\. Did you mean 'hexagon'\? Write the names"):
        texts_for([*"axyzb", *"cdef", "hexagon"], {"qqq": ["a"], "hexagonn": ["b"]})
    with pytest.raises(ValueError, match=r"'black'\. Write the names as they are there"):
        texts_for(NAMES, {"pink": "x"})
    assert texts_for(NAMES, own, strict=False) == {"red": ["a"]}
    assert texts_for(NAMES, {}) is None and texts_for(NAMES, {"pink": "x"}, strict=False) is None


def test_load_task_takes_names_of_sets_and_files_of_texts(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({"Seven": ["a seven", "the digit 7"]}), encoding="utf-8")
    names = {
        str(digit): word
        for digit, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    }
    task = load_task("digits", class_names=names, template="clip-sun397", class_texts=path)
    assert task.template == TEMPLATES["clip-sun397"] and task.class_texts == {"seven": ["a seven", "the digit 7"]}
    assert len(task.texts) == 20 and "the digit 7" in task.texts and "a photo of the eight." in task.texts
    assert load_task("digits").texts == [f"a photo of the digit {digit}." for digit in range(10)]


@pytest.mark.parametrize("kind", [str, Path])
def test_files_stand_wherever_templates_and_texts_do(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    Path("templates.txt").write_text("a photo of a {}.\n\n  \nthe {}\n", encoding="utf-8")
    Path("texts.json").write_text(json.dumps({"red": "a stop sign"}), encoding="utf-8")
    template, own = kind("templates.txt"), kind("texts.json")
    task = Task("t", NAMES, {}, template, class_texts=own)
    assert task.template == ["a photo of a {}.", "the {}"] and task.texts[:2] == ["a stop sign", "a photo of a green."]
    Path("texts.json").write_text(json.dumps({"3": "a three"}), encoding="utf-8")
    loaded = load_task("digits", template=template, class_texts=own)
    assert (loaded.template, loaded.class_texts) == (task.template, {"3": ["a three"]})
    Path("clip-sun397").write_text("mine {}")
    assert read_template("clip-sun397") == TEMPLATES["clip-sun397"]  # the set, as documented
    Path("one.txt").write_text("the {}\n")
    assert read_template(kind("one.txt")) == "the {}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a {}\nno place", r"t\.txt: template='no place' must hold exactly one \{\}"),
        ("\n\n", r"t\.txt: template=\[\] has no template"),
        ("a {}\na {}", r"t\.txt: .* is given twice"),
    ],
)
def test_a_file_of_templates_that_is_none_is_named(tmp_path, content, words):
    (tmp_path / "t.txt").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_template(str(tmp_path / "t.txt"))


def test_a_file_of_templates_that_is_not_there_is_told(tmp_path):
    with pytest.raises(
        ValueError, match=r"txt' must hold exactly one .* No file has this name either. Sets of templates have"
    ):
        read_template(str(tmp_path / "templates.txt"))
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_template(tmp_path / "templates.txt")
    for name in ("x" * 5000, "\0", str(tmp_path), "~nobody-of-this-name/x"):
        with pytest.raises(ValueError, match="must hold exactly one"):
            read_template(name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('["a"]', "texts.json: class_texts=.* must map class names to lists"),
        ('{"a": 3}', "texts.json: The texts of class 'a' are 3; they must be a list of strings"),
        ('{"a": ["x"], "a": ["y"]}', r"texts.json cannot be read \(it names 'a' twice\)"),
        ("{'a': 1}", "texts.json cannot be read"),
        ("[" * 100_000, "texts.json cannot be read"),
        ('{"a": ["' + "x" * 9_000_000 + '"]}', "up to 8,388,608 are stored with an adapter"),
    ],
)
def test_a_file_of_texts_that_is_none_is_named(tmp_path, content, words):
    path = tmp_path / "texts.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=words) as caught:
        read_class_texts(str(path))
    assert len(str(caught.value)) < 1000


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load_task("digits", class_texts=tmp_path / "none.json")
    with pytest.raises(ValueError, match="folder"):
        read_class_texts(tmp_path)
