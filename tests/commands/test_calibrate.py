"""`capt-peft calibrate` as users run it."""

import json

import pytest
import torch
from helpers import TINY_CLIP
from peft import get_peft_model
from transformers import CLIPModel

from capt_peft import CaptConfig, ZeroShotClassifier, load_task
from capt_peft.commands.calibrate import main
from capt_peft.toy import TINY_CLIP_ROBUST
from capt_peft.tuner.fingerprint import adapter_fingerprint

RUN = ["--dataset_name", "digits", "--limit", "60", "--use_cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    digits = load_task("digits")
    base = CLIPModel.from_pretrained(TINY_CLIP)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(base, CaptConfig(template=digits.template, class_names=list(digits.class_names))).save_pretrained(
        folder
    )
    return folder


def test_it_writes_the_calibration_into_the_adapter_and_nothing_else(folder, capsys):
    path = folder / "adapter_config.json"
    (folder / "model.onnx").touch()
    before, fingerprint = json.loads(path.read_text()), adapter_fingerprint(folder)
    found = main(["--adapter", str(folder), *RUN])
    after = json.loads(path.read_text())
    assert after == {**before, "calibration": found.to_dict()} and list(after) == sorted(after)
    assert adapter_fingerprint(folder) == fingerprint == found.fingerprint and found.images == 60
    (folder / "model.onnx").unlink()
    shown = capsys.readouterr().out
    assert "Fitted on 60 images of the validation split of digits, 10 classes, strength 1:" in shown
    assert "Exported before this change, and still as it was then: model.onnx." in shown
    assert "temperature" in shown and '"none of these" where the largest logit is below' in shown
    classifier = ZeroShotClassifier.from_pretrained(str(folder))
    assert classifier.calibration == found
    assert "none of these" in (folder / "README.md").read_text()


def test_other_bases_and_precisions_have_none(folder):
    main([*RUN, "--adapter", str(folder), "--split", "test", "--choose_on_test"])
    assert ZeroShotClassifier.from_pretrained(str(folder)).calibration.split == "test"
    for other in ({"base": str(TINY_CLIP_ROBUST)}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}):
        assert ZeroShotClassifier.from_pretrained(str(folder), **other).calibration is None


def test_the_classes_are_the_adapters_in_its_order(folder, tmp_path):
    """The same classes in another order, in a folder of pictures."""
    digits = load_task("digits")["validation"]
    for i in range(60):
        place = tmp_path / "data" / "test" / ("ABCDEFGHIJ"[9 - digits[i]["label"]] + str(digits[i]["label"]))
        place.mkdir(parents=True, exist_ok=True)
        digits[i]["image"].save(place / f"{i}.png")
    names = [f"{'ABCDEFGHIJ'[9 - i]}{i}" for i in range(10)]  # sorted, they are in the opposite order
    base = CLIPModel.from_pretrained(TINY_CLIP)
    get_peft_model(base, CaptConfig(class_names=names)).save_pretrained(tmp_path / "adapter")
    data = [
        "--dataset_name",
        str(tmp_path / "data"),
        "--use_cpu",
        "--temperature",
        "1",
        "--split",
        "test",
        "--choose_on_test",
    ]
    found = main(["--adapter", str(tmp_path / "adapter"), *data, "--false_rejection_rate", "0.1"])
    assert found.class_names == names and load_task(str(tmp_path / "data")).class_names[0] == "A9"
    assert ZeroShotClassifier.from_pretrained(str(tmp_path / "adapter")).calibration == found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--false_rejection_rate", "0.01"], r"false_rejection_rate=0\.01 cannot be told with 60 images .* needs 99"),
        (["--false_rejection_rate", "2"], "must be above 0 and below 1"),
        (["--split", "test"], "makes their calibration error .* look better .* give --choose_on_test"),
        (
            ["--dataset_name", "letters"],
            r"letters has the 26 classes .*the adapter has the 10 classes '0', .* never hold",
        ),
        (["--template", "one digit: {}"], r"other texts of its classes than 'one digit: 0' .*Leave out --template"),
        (["--split", "train"], "has the images that it was tuned on"),
        (["--limit", "0"], "limit=0 must be at least 1"),
        (["--temperature", "nan"], "must be a finite number above 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused_and_nothing_is_written(folder, options, words):
    path = folder / "adapter_config.json"
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        main(["--adapter", str(folder), *RUN, *options])
    assert path.read_bytes() == before


def test_an_adapter_without_a_record_needs_its_data(folder):
    with pytest.raises(
        ValueError, match=r"has no results\.json, which would say what it was tuned on: give --dataset_name\."
    ):
        main(["--adapter", str(folder)])
    with pytest.raises(ValueError, match="Give the folder of a CAPT adapter"):
        main([])
