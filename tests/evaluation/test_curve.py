"""Robustness curves: the points, what is monotone, and the pictures."""

import json

import pytest
import torch
from helpers import TINY_CLIP, shake
from peft import get_peft_model
from PIL import Image
from transformers import CLIPModel

from capt_peft import CaptConfig, ThreatModel, ZeroShotClassifier, load_task
from capt_peft.evaluation import Accuracy
from capt_peft.evaluation import curve as curve_module
from capt_peft.evaluation.curve import EPSILONS, Curve, robustness_curves

STEPS = (1, 5, 20)


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curve_module, "STEPS", STEPS)
        yield


@pytest.fixture(scope="module")
def curves(tmp_path_factory, processor):
    digits = load_task("digits")
    model = get_peft_model(
        CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32), CaptConfig(template=digits.template)
    )
    shake(model)
    classifier = ZeroShotClassifier(model, processor, digits.class_names, digits.template).eval()
    path = tmp_path_factory.mktemp("curve") / "results.curve"
    data = digits["validation"].select(range(16))
    arguments = (classifier, data, ThreatModel("linf", "4/255"), path)
    return path, robustness_curves(*arguments, steps=5, progress=False), arguments


def test_epsilon_and_steps_are_swept_for_the_base_and_the_adapter(curves):
    _, found, _ = curves
    assert list(found) == ["zero-shot", "CAPT"]
    for curve in found.values():
        assert [round(e * 255, 6) for e, _ in curve.epsilon] == list(EPSILONS)
        assert [s for s, _ in curve.steps] == [0, *STEPS]
        assert curve.epsilon[0][1] == curve.steps[0][1]  # epsilon 0 and no step: clean accuracy
        assert curve.epsilon[-1][1].correct == 0
        assert curve.rises() == []
    assert found["zero-shot"] != found["CAPT"]


def test_what_is_written_is_what_is_returned_and_is_not_measured_twice(curves):
    path, found, arguments = curves
    content = json.loads(path.with_name("results.curve.json").read_text())
    assert content == json.loads(json.dumps({name: curve.to_dict() for name, curve in found.items()}))
    svg = path.with_name("results.curve.svg")
    before = svg.read_bytes()
    assert robustness_curves(*arguments, steps=5, progress=False) == found
    assert svg.read_bytes() == before


def test_the_picture_can_be_looked_at(curves):
    path, _, _ = curves
    with Image.open(path.with_name("results.curve.png")) as image:
        assert image.width > 800 and image.height > 300
    text = path.with_name("results.curve.svg").read_text()
    assert "zero-shot" in text or "<path" in text


def test_a_rise_beyond_noise_is_told():
    def points(values, n=1000):
        return tuple((i, Accuracy(value, n)) for i, value in enumerate(values))

    assert Curve(points([900, 500, 504]), points([900, 300])).rises() == []
    (sentence,) = Curve(points([900, 500, 520]), points([900, 300])).rises()
    assert sentence == "accuracy rises from 50.0% to 52.0% between epsilon 1 and 2"
    assert "between steps 0 and 1" in Curve(points([9, 5], 10), points([3, 5], 10)).rises()[0]
