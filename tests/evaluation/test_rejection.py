"""The answer "none of these" in an evaluation: attackers who want a class and to be accepted, and what is counted."""

from dataclasses import replace

import pytest
import torch
from helpers import TINY_CLIP
from peft import get_peft_model
from PIL import Image
from toy_models import make_model, some_images
from transformers import AutoProcessor, CLIPModel

from capt_peft import (
    APGD,
    PGD,
    CaptConfig,
    Square,
    ThreatModel,
    ZeroShotClassifier,
    evaluate,
    load_task,
    parse_attack,
)
from capt_peft.evaluation import Evaluation
from capt_peft.evaluation.calibration import calibrate, logits_and_labels
from capt_peft.evaluation.rejection import with_rejection
from capt_peft.evaluation.scores import draw_scores
from capt_peft.toy.tasks import load_toy_task

THREAT = ThreatModel("linf", "8/255")


def test_an_image_of_a_class_is_lost_exactly_where_it_is_accepted_as_another():
    logits = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    for label in range(4):
        merged = with_rejection(lambda _: logits, label, 0.8)(logits)
        lost = (logits.argmax(1) != label) & (logits.amax(1) >= 0.8)
        assert merged.shape == logits.shape and torch.equal(merged.argmax(1) != label, lost) and lost.any()


def test_an_image_of_no_class_is_lost_exactly_where_it_is_accepted():
    logits = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    merged = with_rejection(lambda _: logits, 4, 0.8)(logits)
    assert merged.shape == (500, 5) and torch.equal(merged.argmax(1) != 4, logits.amax(1) >= 0.8)


ATTACKS = [
    PGD(THREAT, steps=20),
    PGD(THREAT, steps=20, loss="margin"),
    APGD(THREAT, loss="t", steps=10),
    Square(THREAT, queries=200),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_on_class_and_score_finds_at_least_what_one_on_the_class_alone_does(attack):
    """Of those that are both wrong and accepted, which is what the attacker wants."""
    model, images = make_model(), some_images(24)
    with torch.no_grad():
        logits = model(images)
    labels, threshold = logits.argmax(1), logits.amax(1).quantile(0.5).item()

    def lost(adversarial, of):
        with torch.no_grad():
            found = model(adversarial)
        return int(((found.argmax(1) != of) & (found.amax(1) >= threshold)).sum())

    plain = lost(attack(model, images, labels, 0), labels)
    both = sum(
        lost(
            attack(with_rejection(model, label, threshold), images[labels == label], labels[labels == label], 0), label
        )
        for label in labels.unique().tolist()
    )
    assert both >= plain - (attack.name == "square-200") and both > 0


# ------------------------------------------------------------------------------------------------------ in an evaluation


@pytest.fixture(scope="module")
def digits():
    return load_task("digits")


@pytest.fixture(scope="module")
def outside():
    return load_toy_task("letters", train_per_class=1, validation_per_class=1, test_per_class=1)["test"].select(
        range(14)
    )


@pytest.fixture(scope="module")
def classifier(digits):
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    model = get_peft_model(base, CaptConfig(template=digits.template, class_names=list(digits.class_names)))
    classifier = ZeroShotClassifier(
        model.eval(), AutoProcessor.from_pretrained(TINY_CLIP), digits.class_names, digits.template
    )
    logits, labels = logits_and_labels(classifier, digits["validation"].select(range(100)))
    found = calibrate(classifier, logits, labels, task="digits", split="validation")
    model.peft_config["default"].calibration = found.to_dict()
    return classifier


def measured(classifier, digits, outside, attacks=(), **settings):
    data = digits["test"].select(range(20))
    return evaluate(classifier, data, attacks, out_of_class=outside, signs=False, progress=False, **settings)


def test_what_is_counted_is_what_predict_answers(classifier, digits, outside):
    clean = measured(classifier, digits, outside).rejection.outcomes[0]
    data = digits["test"].select(range(20))
    answers = classifier.predict(list(data["image"]), reject=True)
    names = [digits.class_names[label] for label in data["label"]]
    assert clean.rejected.correct == answers.count([])
    assert clean.right.correct == sum(bool(a) and a[0]["label"] == n for a, n in zip(answers, names, strict=True))
    others = classifier.predict(list(outside["image"]), reject=True)
    assert (clean.accepted.n, clean.accepted.correct) == (14, 14 - others.count([]))


def test_attacks_get_accepted_and_the_figures_are_written_shown_and_read_again(classifier, digits, outside, tmp_path):
    attacks = [parse_attack("pgd-5-margin", ThreatModel("linf", "4/255"))]
    found = measured(classifier, digits, outside, attacks, output=tmp_path / "r.json", batch_size=8)
    clean, attacked = found.rejection.outcomes
    assert attacked.attack["name"] == "pgd-5-margin" and clean.attack is None
    assert attacked.wrong.correct > clean.wrong.correct and attacked.accepted.correct > clean.accepted.correct
    assert attacked.auroc < clean.auroc and attacked.aurc > clean.aurc
    assert Evaluation.load(tmp_path / "r.json") == found
    shown = found.table()
    assert 'With "none of these" below a largest logit of' in shown and "|  | clean | " in found.rejection.table()
    assert "the 20 images of the classes accepted as a wrong class, and the 14 images of no class" in shown
    assert "A rejected image is not right. AUROC: 1 is best, 0.5 is chance; risk area: 0 is best." in shown
    assert found.rejection.table() in found.table() and "Expected calibration error (15 bins" in found.table()
    temperature = classifier.calibration.temperature
    assert f"scores at the adapter's temperature, {temperature:.4g}" in found.table()
    again = measured(classifier, digits, outside, attacks, output=tmp_path / "r.json", batch_size=8)
    assert again == found


def test_its_reliability_is_that_of_the_scores_of_predict(classifier, digits, outside):
    data = digits["test"].select(range(20))
    found = measured(classifier, digits, outside).reliability
    best = [answer[0] for answer in classifier.predict(list(data["image"]))]
    right = [each["label"] == digits.class_names[y] for each, y in zip(best, data["label"], strict=True)]
    assert sum(found.scores) == pytest.approx(sum(each["score"] for each in best), abs=1e-4)
    assert sum(found.right) == sum(right)


def test_what_cannot_be_measured_is_refused(classifier, digits, outside):
    with pytest.raises(
        ValueError,
        match=r"no class \(out_of_class\) are of the classes '0', '1', '2' and 7 more, which the classifier knows",
    ):
        measured(classifier, digits, digits["test"])
    with pytest.raises(ValueError, match="needs white-box attacks"):
        measured(classifier, digits, outside, attack_target="frozen")
    with (
        classifier.frozen(),
        pytest.raises(ValueError, match=r"out_of_class needs a threshold: .* no adapter acts here"),
    ):
        measured(classifier, digits, outside)
    model = make_model()
    with pytest.raises(ValueError, match="out_of_class needs a ZeroShotClassifier"):
        evaluate(model, (some_images(4), torch.zeros(4, dtype=torch.long)), out_of_class=some_images(2))


def test_images_of_no_class_may_be_pixels(classifier, digits, outside):
    pixels = classifier.transform.batch(list(outside["image"]))
    assert measured(classifier, digits, pixels).rejection == measured(classifier, digits, outside).rejection


def test_the_picture_of_the_scores_is_drawn_with_and_without_none_of_these(classifier, digits, outside, tmp_path):
    found = measured(classifier, digits, outside)
    for name, each in (("both", found), ("one", replace(found, rejection=None))):
        png, svg = draw_scores(each, tmp_path / name)
        before = svg.read_bytes()
        with Image.open(png) as image:
            assert (image.width > 900) == (name == "both")
        assert draw_scores(each, tmp_path / name) == [png, svg] and svg.read_bytes() == before
    with pytest.raises(ValueError, match="has no scores: measure again"):
        draw_scores(replace(found, reliability=None), tmp_path / "none")
