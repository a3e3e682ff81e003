"""`capt-peft tasks`: the data sets that are known by name, and what one holds."""

import pytest
from PIL import Image

from capt_peft import list_tasks, load_task
from capt_peft.commands.tasks import main
from capt_peft.data.catalog import CATALOG
from capt_peft.toy.tasks import procedural_class_names


def test_every_name_is_a_row_with_its_number_of_classes(capsys):
    main([])
    head, rule, *rows = (line[2:-2].split(" | ") for line in capsys.readouterr().out.splitlines())
    assert head == ["name", "classes", "where from"] and len(rule) == 1
    assert [name for name, _, _ in rows] == list_tasks()
    numbers = {name: int(number) for name, number, _ in rows}
    assert numbers["digits"] == 10 and all(numbers[name] == entry.num_classes for name, entry in CATALOG.items())
    places = {name: place for name, _, place in rows}
    assert places["digits"] == "comes with capt-peft" and all(places.values())


def test_a_name_shows_how_many_images_each_class_has(capsys):
    main(["--name", "digits"])
    told = capsys.readouterr().out
    assert told == load_task("digits").summary() + "\n"
    assert told.startswith("| class | train | validation | test |")


def test_a_folder_shows_what_training_would_make_of_it(tmp_path, capsys):
    for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "1.png")
    (tmp_path / "train" / "cat" / ".hidden.png").write_bytes(b"")
    main(["--name", str(tmp_path)])
    told = capsys.readouterr().out
    assert "| cat | 1 | 1 |" in told and "| dog | 1 | 1 |" in told and "1 hidden" in told


def test_a_data_set_of_the_catalog_is_looked_for_below_its_root(tmp_path, capsys):
    for name in ("beagle", "siamese"):
        (tmp_path / name).mkdir()
        for number in range(20):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    main(["--name", "oxford_pets", "--root", str(tmp_path)])
    assert "| beagle | " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["digits", "counts", "shapes_sketched"])
def test_the_classes_that_are_counted_are_those_of_the_task(name):
    assert procedural_class_names(name) == load_task(name).class_names
