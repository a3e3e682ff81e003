"""`capt-peft verify`: an adapter's own evaluation agrees with its weights; a change since ends with exit status 1."""

import json
import shutil

import pytest
from hub_client import Client, StepFailed
from hub_server import Hub
from safetensors.torch import load_file, save_file

from capt_peft.commands.evaluate import main as evaluate
from capt_peft.commands.train import main as train
from capt_peft.commands.verify import main

TOKEN = "hf_" + "Secret" * 5
QUICK = ["--use_cpu", "--epsilon", "4/255"]


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """An adapter for the digits, with its evaluation and the images of it."""
    folder = tmp_path_factory.mktemp("measured") / "adapter"
    settings = [
        "--shots",
        "1",
        "--max_steps",
        "1",
        "--eval_limit",
        "20",
        "--eval_attack",
        "pgd-2",
        "--attack_steps",
        "1",
    ]
    train([*QUICK, *settings, "--save_strategy", "no", "--output_dir", str(folder)])
    how = ["--attacks", "pgd-3", "--limit", "20", "--signs", "false", "--use_cpu"]
    evaluate(["--adapter", str(folder), *how, "--save_images", "--update_card"])
    return folder


@pytest.fixture
def folder(measured, tmp_path):
    return shutil.copytree(measured, tmp_path / "adapter")


def refused(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words), "--use_cpu"])
    assert ended.value.code == 1
    told = capsys.readouterr().out
    assert told.endswith("Not verified.\n") and "verified upper bound" not in told
    return told


def change(path, **values):
    content = json.loads(path.read_text())
    for name, value in values.items():
        *parents, last = name.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(content))


def test_an_adapter_with_its_own_images_is_verified(folder, capsys):
    assert "`evaluation.safetensors` (0.2 MB)" in (folder / "README.md").read_text()
    main(["--adapter", str(folder), "--use_cpu"])
    told = capsys.readouterr().out
    clean, worst = (json.loads((folder / "evaluation.json").read_text())[name] for name in ("clean", "worst_case"))
    assert f"Clean accuracy: {100 * clean['accuracy']:.1f}%" in told
    assert f"At most {100 * worst[0]['accuracy']:.1f}%" in told and "L-inf 4/255: verified upper bound" in told


def test_other_weights_are_not_verified(folder, capsys):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, folder / "adapter_model.safetensors")
    assert "model.adapter is" in refused(capsys, "--adapter", folder)


def test_a_base_of_another_name_is_not_verified(folder, capsys):
    change(folder / "evaluation.json", configuration__model__base__name="openai/clip-vit-large-patch14")
    told = refused(capsys, "--adapter", folder)
    assert "the record names the base openai/clip-vit-large-patch14; the adapter's is tiny_clip." in told


def test_a_record_of_fewer_images_is_not_verified(folder, capsys):
    change(folder / "evaluation.json", configuration__task__limit=10)
    assert "the record is of other data than these" in refused(capsys, "--adapter", folder)


def test_data_that_cannot_be_loaded_leave_nothing_verified(folder, capsys):
    (folder / "results.json").unlink()
    change(folder / "evaluation.json", configuration__task__source="no/such-data")
    told = refused(capsys, "--adapter", folder)
    assert (
        "At most" in told
        and "not verified" in told
        and "no/such-data, the data of the record, cannot be loaded" in told
    )
    main(["--adapter", str(folder), "--use_cpu", "--dataset_name", "digits"])
    assert "verified upper bound" in capsys.readouterr().out
    change(folder / "evaluation.json", configuration__task__source="digits", configuration__task__split="none")
    assert "digits, the data of the record, cannot be loaded" in refused(capsys, "--adapter", folder)


def test_a_bare_clip_is_verified_with_its_evaluation(tmp_path, capsys):
    output = tmp_path / "zero-shot.json"
    how = ["--dataset_name", "digits", "--attacks", "pgd-2", "--limit", "10", "--signs", "false", *QUICK]
    evaluate(["--base", "tiny_clip", *how, "--save_images", "--output", str(output)])
    assert f"The worst-case images: {output.with_suffix('.safetensors')} (0.1 MB)" in capsys.readouterr().out
    main(["--base", "tiny_clip", "--evaluation", str(output), "--use_cpu"])
    assert "verified upper bound" in capsys.readouterr().out
    told = refused(capsys, "--base", "tiny_clip_robust", "--evaluation", output)
    assert "the record is of another model: model.base is" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give --adapter"),
        (["--base", "tiny_clip"], "Give --adapter"),
        (["--adapter", "FOLDER", "--attacks", "pdg-20"], "unknown attack 'pdg-20'"),
        (["--adapter", "FOLDER", "--batch_size", "0"], "batch_size=0 must be 1 or more"),
        (["--adapter", "FOLDER", "--evaluation", "none.json"], "There is no file none.json"),
        (["--base", "FOLDER", "--evaluation", "FOLDER/evaluation.json"], "a CLIP with an adapter"),
    ],
)
def test_wrong_input_is_refused(folder, words, message):
    with pytest.raises(ValueError, match=message):
        main([word.replace("FOLDER", str(folder)) for word in words])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", ["x"], "The record's model is .* not a JSON object"),
        ("task", "x", "The record's task is x, which is not a JSON object"),
        ("defence", "ttc", "The record's defence is ttc, which is not a JSON object"),
        ("defence", {"name": 5}, "unknown defence '5'"),
        ("defence", {"name": "tte-99999999999"}, "tte-99999999999"),
        ("model__template", 5, "The record's template is 5"),
        ("model__class_texts", ["x"], "The record's class_texts is"),
    ],
)
def test_a_record_of_another_shape_is_refused_in_a_sentence(folder, name, value, message):
    change(folder / "evaluation.json", **{f"configuration__{name}": value})
    with pytest.raises(ValueError, match=message):
        main(["--adapter", str(folder), "--use_cpu"])


def test_a_record_whose_base_is_no_object_is_not_verified(folder, capsys):
    change(folder / "evaluation.json", configuration__model__base="x")
    assert "the record names the base None" in refused(capsys, "--adapter", folder)


def test_an_evaluation_without_images_is_refused(folder):
    (folder / "evaluation.safetensors").unlink()
    with pytest.raises(ValueError, match=r"evaluation\.safetensors, the worst-case images of .* is missing"):
        main(["--adapter", str(folder)])
    change(folder / "evaluation.json", images=None)
    with pytest.raises(
        ValueError, match=r"names no worst-case images\. They are kept by capt-peft evaluate --save_images"
    ):
        main(["--adapter", str(folder)])
    (folder / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=r"has no evaluation\.json"):
        main(["--adapter", str(folder)])


def test_a_repository_is_verified_as_it_was_pushed(folder, tmp_path):
    with Hub({TOKEN: "someone"}) as hub:
        run = Client(tmp_path / "log.txt", HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"), HF_TOKEN=TOKEN)
        told = run("command", "push", str(folder), "someone/capt")
        assert told.endswith(", with 0.2 MB of worst-case images\n")
        images = hub.repos["someone/capt"].files()["evaluation.safetensors"]
        assert images == (folder / "evaluation.safetensors").read_bytes()
        assert "verified upper bound" in run("command", "verify", "someone/capt", "--use_cpu")
        (folder / "evaluation.safetensors").write_bytes(images[:-1] + b"?")
        run("command", "push", str(folder), "someone/capt")
        assert "evaluation.safetensors" not in hub.repos["someone/capt"].files()
        with pytest.raises(StepFailed, match=r"has no evaluation\.json with worst-case images"):
            run("command", "verify", "someone/capt", "--use_cpu")
        with pytest.raises(StepFailed, match="neither a folder here nor a repository on the Hub"):
            run("command", "verify", "someone/nothing", "--use_cpu")
        run.close()
