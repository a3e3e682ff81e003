"""Accuracy under common corruptions: what is counted, kept, shown and refused; robust accuracy does not hear of it."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from toy_models import make_model, some_images

from capt_peft import PGD, ThreatModel, evaluate
from capt_peft.evaluation import CorruptedAccuracy, Evaluation
from capt_peft.evaluation.corruption import corrupt_pixels
from capt_peft.evaluation.pictures import corruption_picture
from capt_peft.results.accuracy import Accuracy

FEW = ["fog-1", "gaussian_noise-5", "contrast-5"]


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def data(model):
    pixels = some_images(24)
    return pixels, model(pixels).argmax(1)


def quiet(*args, **kwargs):
    return evaluate(*args, progress=False, **kwargs)


def test_the_figures_are_those_of_the_corrupted_images(model, data):
    pixels, labels = data
    result = quiet(model, data, corruptions=FEW, batch_size=7)
    for name in FEW:
        right = model(corrupt_pixels(pixels, name, 0)).argmax(1) == labels
        assert result.corruptions.accuracies[name] == Accuracy(int(right.sum()), 24)
    shares = [accuracy.value for accuracy in result.corruptions.accuracies.values()]
    assert result.corruptions.mean == pytest.approx(sum(shares) / 3) and min(shares) < 1
    assert result.corruptions.interval[0] < result.corruptions.mean <= result.corruptions.interval[1]


def test_robust_accuracy_does_not_hear_of_corruptions(model, data):
    attack = PGD(ThreatModel("linf", "4/255"), steps=3)
    with_them, without = quiet(model, data, attack, corruptions=FEW), quiet(model, data, attack)
    assert with_them.clean == without.clean and with_them.attacks == without.attacks
    assert with_them.worst_case == without.worst_case and with_them.signs == without.signs
    assert without.corruptions is None and "corruptions" not in without.to_dict()
    assert "corruptions" not in without.configuration and "corruption" not in without.table()
    assert with_them.table().startswith(without.table().split("\n\nExpected")[0])


def test_the_batch_size_changes_no_corrupted_image(model, data):
    first, other = (quiet(model, data, corruptions=FEW, batch_size=size) for size in (24, 5))
    assert first.corruptions == other.corruptions


def test_pixels_stay_in_their_range_and_are_of_8_bits():
    pixels = some_images(4)
    changed = corrupt_pixels(pixels, "shot_noise-3", 0)
    assert changed.shape == pixels.shape and changed.dtype == torch.float32
    assert changed.min() >= 0 and changed.max() <= 1
    torch.testing.assert_close(changed * 255, (changed * 255).round(), atol=1e-4, rtol=0)
    assert not torch.equal(changed, corrupt_pixels(pixels, "shot_noise-3", 1))


def test_a_table_has_a_row_for_each_kind_and_a_column_for_each_severity(model, data, tmp_path):
    result = quiet(model, data, corruptions=["fog-1", "fog-3", "snow-3"], output=tmp_path / "r.json")
    table = result.table()
    assert "| corruption | severity 1 | severity 3 | mean |" in table
    fog = [result.corruptions.accuracies[f"fog-{severity}"].value for severity in (1, 3)]
    assert f"| fog | {100 * fog[0]:.1f} | {100 * fog[1]:.1f} | {50 * sum(fog):.1f} |" in table
    assert "(3 of 75), which are not an adversary" in table
    assert Evaluation.load(tmp_path / "r.json") == result


def test_the_pieces_of_a_killed_evaluation_are_used_again(model, data, tmp_path, monkeypatch):
    output, calls = tmp_path / "r.json", []

    def counted(pixels, name, seed):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return corrupt_pixels(pixels, name, seed)

    monkeypatch.setattr("capt_peft.evaluation.corruption.corrupt_pixels", counted)
    with pytest.raises(KeyboardInterrupt):
        quiet(model, data, corruptions=FEW, output=output, batch_size=12, signs=False)
    result = quiet(model, data, corruptions=FEW, output=output, batch_size=12, signs=False)
    assert len(calls) == 3 + 4
    assert result.corruptions == quiet(model, data, corruptions=FEW, signs=False).corruptions


@pytest.mark.parametrize("way", ["mean", "n", "error", "name", "severity"])
def test_figures_that_cannot_be_are_refused(model, data, tmp_path, way):
    output = tmp_path / "r.json"
    quiet(model, data, corruptions=FEW, output=output)
    content = json.loads(output.read_text())
    found = content["corruptions"]
    if way == "mean":
        found["mean"] += 0.01
    elif way == "error":
        found["error"] = 0.6
    elif way == "n":
        for name in FEW:
            found["accuracies"][name] = Accuracy(20, 25).to_dict()
        found |= CorruptedAccuracy({name: Accuracy(20, 25) for name in FEW}, 0.01).to_dict()
    elif way == "severity":
        found["accuracies"]["snow"] = found["accuracies"].pop("fog-1")
    else:
        found["accuracies"]["rain-3"] = found["accuracies"].pop("fog-1")
    output.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"under corruptions|is not a corruption"):
        Evaluation.load(output)


def test_a_picture_shows_the_image_and_every_kind(tmp_path):
    image = Image.new("RGB", (32, 32), (200, 120, 40))
    path = corruption_picture(image, tmp_path / "kinds.svg")
    assert path.read_text().count("<image") == 16
    assert path.read_bytes() == corruption_picture(image, tmp_path / "again.svg").read_bytes()


def test_unknown_corruptions_are_refused_before_anything_is_measured(model, data):
    with pytest.raises(ValueError, match="'rain-3' is not a corruption"):
        quiet(model, data, corruptions=["fog-3", "rain-3"])
