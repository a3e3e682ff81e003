"""What commands take over from the record of an adapter, and what is named instead."""

import json

import pytest

from capt_peft.commands import COMMANDS, calibrate, evaluate, strength
from capt_peft.commands.options import options_in

# another data set than the default, with options that say more of it
SCRIPT = {
    "dataset_name": "shapes", "image_column": "picture", "validation_split": "dev", "class_names": ["a", "b"],
    "template": ["a photo of a {}.", "a drawing of a {}."], "class_texts": {"a": ["a red thing"]},
}  # fmt: skip
PARSERS = {
    "evaluate": evaluate.parse_args,
    "calibrate": calibrate.parse_args,
    "strength": lambda argv: strength.parse_args(argv)[0],
}


@pytest.fixture
def tuned_on_shapes(adapter):
    record = json.loads((adapter / "results.json").read_text())
    record["task"] |= {"name": "shapes", "source": "shapes"}
    record["configuration"] |= {"script": {**SCRIPT, "shots": "4"}}
    (adapter / "results.json").write_text(json.dumps(record))
    return adapter


@pytest.mark.parametrize("command", PARSERS)
@pytest.mark.parametrize(
    ("named", "changed"),
    [
        ({}, {}),
        ({"split": "test"}, {}),
        ({"template": "a {}."}, {"template": "a {}.", "class_texts": None}),
        ({"class_texts": "texts.json"}, {"class_texts": {"b": ["blue"]}}),
        ({"template": "a {}.", "class_texts": "texts.json"}, {"template": "a {}.", "class_texts": {"b": ["blue"]}}),
        ({"class_names": "c"}, {"class_names": ["c"], "template": None, "class_texts": None}),
        ({"image_column": "image"}, {"image_column": "image"}),
        ({"validation_split": "test"}, {"validation_split": "test"}),
        ({"root": "."}, {"root": "."}),
        ({"dataset_name": "textures"}, {**dict.fromkeys(SCRIPT), "dataset_name": "textures"}),
    ],
)
def test_only_the_name_of_a_data_set_names_another_one(
    command, named, changed, tuned_on_shapes, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.json").write_text('{"b": "blue"}')
    words = [word for name, value in named.items() for word in (f"--{name}", value)]
    if command != "evaluate" and "split" in named:
        words.append("--choose_on_test")
    args = PARSERS[command](["--adapter", str(tuned_on_shapes), *words])
    expected = {**SCRIPT, **changed}
    assert {name: getattr(args, name) for name in expected} == expected
    assert ("--dataset_name shapes" in capsys.readouterr().out) == ("dataset_name" not in named)


def test_what_was_taken_over_can_be_pasted_or_is_told_in_words(tuned_on_shapes, capsys):
    evaluate.parse_args(["--adapter", str(tuned_on_shapes)])
    words = "--dataset_name shapes --image_column picture --validation_split dev, its 2 class names, its 2 templates, its texts of 1 class"  # noqa: E501
    assert capsys.readouterr().out == f"As {tuned_on_shapes} was tuned: {words}\n"
    evaluate.parse_args(["--adapter", str(tuned_on_shapes), "--class_names", "c", "--template", "a {}."])
    shown = capsys.readouterr().out
    assert shown.endswith("--validation_split dev\n")


@pytest.mark.parametrize("command", [*PARSERS, "train"])
def test_the_help_says_whose_data_are_the_default(command):
    told = (
        "by default the data that the adapter was tuned on"
        in options_in(*COMMANDS[command].sources)["dataset_name"].help
    )
    assert told == (command != "train")
