"""Fronts over strengths: each point is the evaluation at that strength, and the classifier is as it was."""

import pytest
import torch
from helpers import TINY_CLIP, adapted, random_clip, shake
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import CLIPModel

from capt_peft import PGD, CaptConfig, ThreatModel, ZeroShotClassifier, load_task
from capt_peft.evaluation import evaluate
from capt_peft.evaluation import strength as module
from capt_peft.evaluation.strength import draw_front, strength_front
from capt_peft.results.strength import StrengthFront
from capt_peft.tuner.fingerprint import adapter_fingerprint

PGD5 = PGD(ThreatModel("linf", "2/255"), steps=5)
STRENGTHS = (1, 0.5)


@pytest.fixture(scope="module")
def digits():
    return load_task("digits")


def made(digits, processor, **config):
    model = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    peft = get_peft_model(model, CaptConfig(template=digits.template, **config))
    shake(peft)
    return ZeroShotClassifier(peft, processor, digits.class_names, digits.template).eval()


@pytest.fixture(scope="module")
def classifier(digits, processor):
    return made(digits, processor)


@pytest.fixture(scope="module")
def data(digits):
    return digits["validation"].select(range(24))


@pytest.fixture(scope="module")
def measured(classifier, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("front") / "front.json"
    classifier.strength = 0.3
    details = {"task": {"name": "digits", "split": "validation"}}
    found = strength_front(classifier, data, PGD5, STRENGTHS, output=path, details=details, progress=False)
    return path, found


def test_each_point_is_the_evaluation_at_that_strength(measured, classifier, data):
    _, front = measured
    assert [point.strength for point in front.points] == [0, 0.5, 1]  # 0 is always among them
    for point in front.points:
        classifier.strength = point.strength
        alone = evaluate(classifier, data, PGD5, signs=False, progress=False)
        assert (point.clean, point.robust) == (alone.clean, alone.robust)
    assert len({(point.clean, point.robust) for point in front.points}) == 3


def test_the_point_of_strength_0_is_the_base_model(measured, classifier, data):
    with classifier.frozen():
        base = evaluate(classifier, data, PGD5, signs=False, progress=False)
    assert (measured[1].base.clean, measured[1].base.robust) == (base.clean, base.robust)


def test_attacks_go_through_the_dial(classifier, data):
    """An attack on the model at strength 1 breaks fewer images at strength 0.5 than the attack on what is measured."""
    seen = []

    class Watching(PGD):
        def run(self, logits_fn, images, labels, generators, report=None):
            seen.append((classifier.strength, logits_fn(images).detach()))
            return super().run(logits_fn, images, labels, generators, report=report)

    strength_front(classifier, data, Watching(PGD5.threat_model, steps=1), STRENGTHS, progress=False)
    assert [strength for strength, _ in seen] == [0, 0.5, 1]
    classifier.strength = 0.5
    pixels = torch.stack([classifier.transform(image) for image in data["image"]])
    expected = classifier(pixels)
    rows = [int((expected - row).abs().amax(1).argmin()) for row in seen[1][1]]
    assert torch.allclose(expected[rows], seen[1][1], atol=1e-4)
    assert not torch.allclose(expected[rows][: len(seen[2][1])], seen[2][1][: len(rows)], atol=1e-2)


def test_the_classifier_has_its_strength_again(classifier, data, monkeypatch):
    classifier.strength = 0.3
    strength_front(classifier, data, PGD5, (1,), progress=False)
    assert classifier.strength == 0.3
    before = adapter_fingerprint(classifier.model)

    def broken(*args, **kwargs):
        if classifier.strength == 1:
            raise RuntimeError("no memory")
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        strength_front(classifier, data, PGD5, (1,), progress=False)
    assert adapter_fingerprint(classifier.model) == before


def test_it_is_saved_and_goes_on_where_it_was(measured, classifier, data, monkeypatch):
    path, front = measured
    assert StrengthFront.load(path) == front
    files = {each.name for each in path.parent.iterdir() if each.suffix == ".json"}
    assert files == {"front.json", "front.0.0.json", "front.0.5.json", "front.1.0.json"}
    attacked = []
    monkeypatch.setattr(PGD, "run", lambda self, *args, **kwargs: attacked.append(self))
    details = {"task": {"name": "digits", "split": "validation"}}
    classifier.strength = 0.8  # the strength that the classifier happens to have is no part of a front
    again = strength_front(classifier, data, PGD5, STRENGTHS, output=path, details=details, progress=False)
    assert again == front and attacked == []


def test_its_configuration_says_of_which_weights_and_images_it_is(measured, classifier):
    _, front = measured
    classifier.strength = 1
    assert front.fingerprint == adapter_fingerprint(classifier.model)
    assert "strength" not in front.configuration["model"]["adapter"]["config"]
    assert front.configuration["data"]["fingerprint"] and front.configuration["versions"]
    assert front.configuration["seed"] == 0
    assert (front.attack, front.images) == ("pgd-5, L-inf 2/255", "24 images of the validation split of digits")


def test_several_attacks_count_by_their_worst_case(classifier, data):
    attacks = [PGD5, PGD(PGD5.threat_model, steps=10)]
    front = strength_front(classifier, data, attacks, (1,), progress=False)
    classifier.strength = 1
    assert front.points[-1].robust == evaluate(classifier, data, attacks, signs=False, progress=False).robust
    assert front.attack == "pgd-5 and pgd-10, L-inf 2/255"


@pytest.mark.parametrize(
    ("attacks", "strengths", "words"),
    [
        ([], (1,), "needs an attack"),
        ([PGD5, PGD(ThreatModel("linf", "4/255"))], (1,), "one threat model"),
        (PGD5, (1.5,), "from 0 .* to 1"),
        (PGD5, (float("nan"),), "from 0 .* to 1"),
        (PGD5, (0.5, 0.5), "twice"),
        (PGD5, (0, 0.0), "twice"),
        (PGD5, ("0.5",), "must be numbers"),
        (PGD5, (True,), "must be numbers"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(attacks, strengths, words, classifier, data, monkeypatch):
    monkeypatch.setattr(module, "evaluate", None)
    with pytest.raises((ValueError, TypeError), match=words):
        strength_front(classifier, data, attacks, strengths, progress=False)


def test_models_without_a_strength_are_refused(digits, processor, data):
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    bare = ZeroShotClassifier(base, processor, digits.class_names, digits.template)
    with pytest.raises(ValueError, match="no CAPT adapter"):
        strength_front(bare, data, PGD5)
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no CAPT adapter"):
        strength_front(ZeroShotClassifier(lora, processor, digits.class_names, digits.template), data, PGD5)
    saved = adapted(random_clip(), modules_to_save=["visual_projection"])
    with pytest.raises(ValueError, match="modules_to_save"):
        module.check_strengths(type("Any", (), {"model": saved}), (1,))


def test_an_output_that_cannot_be_is_refused_before_anything_is_measured(classifier, data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "evaluate", None)
    with pytest.raises(ValueError, match=r"must end in \.json"):
        strength_front(classifier, data, PGD5, output=tmp_path / "front.txt")
    with pytest.raises(ValueError, match="keep_clean"):
        strength_front(classifier, data, PGD5, keep_clean=2, output=tmp_path / "front.json")


def test_the_picture_can_be_looked_at(measured, tmp_path):
    paths = draw_front(measured[1], tmp_path / "front")
    assert [path.name for path in paths] == ["front.png", "front.svg"]
    with Image.open(paths[0]) as image:
        assert image.width > 800 and image.height > 300
    before = paths[1].read_bytes()
    draw_front(measured[1], tmp_path / "front")
    assert paths[1].read_bytes() == before
