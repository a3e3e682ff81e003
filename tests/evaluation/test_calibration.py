"""Calibration: the temperature is the best, thresholds keep their rates, and both are used where they hold and nowhere else."""

import copy
import math

import pytest
import torch
from helpers import TINY_CLIP, shake
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import functional as F
from transformers import CLIPModel

from capt_peft import CaptConfig, ZeroShotClassifier, load_task
from capt_peft.clip import calibration
from capt_peft.evaluation.calibration import (
    calibrate,
    class_thresholds,
    fit_temperature,
    logits_and_labels,
    rejection_threshold,
)
from capt_peft.toy import TINY_CLIP_ROBUST
from capt_peft.toy.tasks import load_toy_task
from capt_peft.tuner.fingerprint import base_fingerprint
from capt_peft.tuner.switching import base_parameters


def drawn(n, temperature=1.0, seed=0, classes=5):
    """Logits, and labels that are drawn from softmax(logits / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 6 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial((logits / temperature).softmax(1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_the_one_that_labels_were_drawn_with_and_has_the_smallest_likelihood(temperature):
    logits, labels = drawn(20_000, temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.06)
    nll = [F.cross_entropy(logits / t, labels).item() for t in (found * 0.999, found, found * 1.001)]
    assert nll[1] < nll[0] and nll[1] < nll[2]
    assert fit_temperature(2 * logits, labels) == pytest.approx(2 * found, rel=1e-9)


def test_images_that_leave_the_temperature_open_are_refused():
    logits, _ = drawn(20)
    with pytest.raises(ValueError, match=r"All 20 images are classified correctly.*Give more images"):
        fit_temperature(logits, logits.argmax(1))
    with pytest.raises(ValueError, match="20 images leave the temperature open"):
        fit_temperature(logits, logits.argmin(1))


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (60, 0.05), (200, 0.01), (50, 0.5)])
def test_the_rejection_rate_of_new_images_is_k_in_n_plus_1_on_average(n, rate):
    """Over many draws of n images: never more than was asked for, and no less than one in n + 1 below it."""
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(4000, n, 1, generator=generator, dtype=torch.float64)
    shares = torch.distributions.Normal(0, 1).cdf(torch.tensor([rejection_threshold(each, rate) for each in logits]))
    expected = math.floor(rate * (n + 1) + 1e-9) / (n + 1)
    error = 4 * math.sqrt(rate * (1 - rate) / (n + 2) / len(logits))
    assert expected <= rate < expected + 1 / (n + 1)
    assert shares.mean().item() == pytest.approx(expected, abs=error)


def test_a_rate_that_so_few_images_cannot_tell_is_refused():
    logits, labels = drawn(98)
    with pytest.raises(ValueError, match=r"false_rejection_rate=0\.01 cannot be told with 98 images.* needs 99"):
        rejection_threshold(logits, 0.01)
    assert rejection_threshold(drawn(99)[0], 0.01) == drawn(99)[0].amax(1).min()
    with pytest.raises(ValueError, match=r"false_positive_rate=0\.01 cannot be told with \d+ images of other classes"):
        class_thresholds(logits, labels, 0.01, "abcde")
    for rate in (0, 1, math.nan, -0.1):
        with pytest.raises(ValueError, match="must be above 0 and below 1"):
            rejection_threshold(logits, rate)


def test_a_class_lets_through_fewer_than_k_images_of_the_others():
    logits, labels = drawn(400)
    for i, threshold in enumerate(class_thresholds(logits, labels, 0.05, "abcde")):
        others = logits[labels != i, i]
        k = math.floor(0.05 * (len(others) + 1))
        assert (others > threshold).sum() == k - 1 and (others >= threshold).sum() == k


# ------------------------------------------------------------------------------------- what an adapter's calibration does


@pytest.fixture(scope="module")
def task():
    return load_task("digits")


@pytest.fixture
def classifier(task, processor):
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    model = get_peft_model(base, CaptConfig(template=task.template, class_names=list(task.class_names), init_std=0.001))
    return ZeroShotClassifier(model.eval(), processor, task.class_names, task.template)


@pytest.fixture
def calibrated(classifier, task):
    logits, labels = logits_and_labels(classifier, task["validation"].select(range(120)))
    found = calibrate(classifier, logits, labels, task="digits", split="validation")
    classifier.model.peft_config["default"].calibration = found.to_dict()
    return classifier


def test_logits_and_labels_are_those_of_the_classifier_in_whatever_batches(classifier, task):
    data = task["validation"].select(range(10))
    logits, labels = logits_and_labels(classifier.train(), data, batch_size=4)
    assert classifier.training and labels.tolist() == data["label"]
    with torch.no_grad():
        expected = classifier.eval()(classifier.transform.batch(list(data["image"])))
    torch.testing.assert_close(logits, expected.double(), atol=1e-4, rtol=0)


def test_predict_has_the_scores_of_the_temperature_and_says_none_below_the_threshold(calibrated, task):
    found, images = calibrated.calibration, list(task["test"].select(range(60))["image"])
    with torch.no_grad():
        logits = calibrated(calibrated.transform.batch(images)).double()
    answers, rejecting = calibrated.predict(images), calibrated.predict(images, reject=True, batch_size=7)
    scores = (logits / found.temperature).softmax(1)
    assert found.temperature != pytest.approx(1, abs=0.05)
    for answer, strict, row, of_image in zip(answers, rejecting, logits, scores, strict=True):
        assert answer[0]["score"] == pytest.approx(of_image.max().item(), abs=1e-5)
        assert [each["label"] for each in strict] == (
            [each["label"] for each in answer] if row.max() >= found.threshold else []
        )
    few_shapes = load_toy_task("shapes", train_per_class=1, validation_per_class=1, test_per_class=2)
    outside = calibrated.predict(list(few_shapes["test"]["image"]), reject=True)
    assert outside.count([]) > 10 > rejecting.count([])
    with calibrated.frozen():
        with torch.no_grad():
            base = calibrated(calibrated.transform.batch(images[:1])).softmax(1).max().item()
        assert calibrated.predict(images[0])[0][0]["score"] == base and calibrated.calibration is None


def test_several_labels_are_those_above_their_thresholds(calibrated, task):
    images = list(task["test"].select(range(40))["image"])
    with torch.no_grad():
        logits = calibrated(calibrated.transform.batch(images)).double()
    above = logits - torch.tensor(calibrated.calibration.class_thresholds)
    for answer, row in zip(calibrated.predict(images, multi_label=True), above, strict=True):
        names = [calibrated.class_names[i] for i in row.argsort(descending=True) if row[i] > 0]
        assert [each["label"] for each in answer] == names
        assert all(each["score"] > 0.5 for each in answer)
    with pytest.raises(ValueError, match="reject=True has no effect with multi_label=True"):
        calibrated.predict(images, reject=True, multi_label=True)


def others(calibrated, processor, change):
    """The calibrated model as another classifier."""
    names, template, model = list(calibrated.class_names), calibrated.template, calibrated.model
    of_adapter = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    if change == "classes":
        names = names[:-1]
    if change == "order":
        names = names[::-1]
    if change == "texts":
        template = "the digit {}."
    if change == "strength":
        calibrated.strength = 0.5
    if change == "weights":
        shake(model)
    if change == "precision":
        model = model.to(torch.bfloat16)
    if change == "precision of the base":  # as PEFT loads an adapter on it: the prompts stay in float32
        for _, parameter in base_parameters(model):
            parameter.data = parameter.data.to(torch.bfloat16)
    if change == "base":
        other = PeftModel(CLIPModel.from_pretrained(TINY_CLIP_ROBUST), model.peft_config["default"])
        set_peft_model_state_dict(other, get_peft_model_state_dict(model))
        model = other.eval()
    if change == "base in place":
        with torch.no_grad():
            dict(base_parameters(model))["visual_projection.weight"][3, 4] += 0.5
    if change == "base rounded":
        model = model.to(torch.bfloat16).to(torch.float32)
        set_peft_model_state_dict(model, of_adapter)
    if change == "adapters":
        model.add_adapter("other", CaptConfig(template=template))
        model.set_adapter("other")
    texts = {"0": ["a scan of the digit {}.", "a photo of the digit {}."]} if change == "several texts" else None
    return ZeroShotClassifier(model, processor, names, template, class_texts=texts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("classes", "for the 10 classes '0', '1', '2', '3', '4' and 5 more, not for the 9 classes"),
        ("order", "not for the 10 classes '9', '8'"),
        ("texts", "for other texts of the classes"),
        ("several texts", "for other texts of the classes"),
        ("strength", "for strength 1, and it is 0.5 here"),
        ("weights", "with other weights"),
        ("precision", "in float32, and its base model is in bfloat16 here"),
        ("precision of the base", "in float32, and its base model is in bfloat16 here"),
        ("base", "on a base model with other weights"),
        ("base in place", "on a base model with other weights"),
        ("base rounded", "on a base model with other weights"),
        ("adapters", "the adapter has no calibration; capt-peft calibrate ADAPTER fits one"),
    ],
)
def test_it_is_used_for_exactly_what_it_holds_for(calibrated, processor, task, change, words):
    image = task["test"][0]["image"]
    assert calibrated.calibration is not None
    other = others(calibrated, processor, change)
    with torch.no_grad():
        own = other(other.transform.batch([image])).softmax(1).max().item()
    assert other.calibration is None and other.predict(image)[0][0]["score"] == own
    for option in ("reject", "multi_label"):
        with pytest.raises(ValueError, match=f"{option}=True needs thresholds") as caught:
            other.predict(image, **{option: True})
        assert words in str(caught.value)


def test_the_base_is_hashed_again_only_when_its_weights_are_others(calibrated, monkeypatch):
    model, hashed = calibrated.model, []
    monkeypatch.setattr(calibration, "base_fingerprint", lambda model: hashed.append(1) or base_fingerprint(model))
    weight = dict(base_parameters(model))["text_projection.weight"]
    original = weight.detach().clone()
    assert calibrated.calibration is not None and calibrated.calibration is not None and not hashed
    with torch.no_grad():
        weight.mul_(2)
    assert calibrated.calibration is None and calibrated.calibration is None and len(hashed) == 1
    weight.data = original
    assert calibrated.calibration is not None and len(hashed) == 2
    copied = copy.deepcopy(calibrated)
    assert copied.calibration is not None and len(hashed) == 3


def test_weights_whose_changes_nothing_tells_are_hashed_each_time():
    with torch.inference_mode():
        base = torch.nn.Linear(3, 3)
        before = calibration.base_weights(base)
        base.weight.mul_(2)
    assert base.weight.is_inference() and before != calibration.base_weights(base) == base_fingerprint(base)


def test_a_base_model_and_an_adapter_without_one_say_so(classifier, processor, task):
    with pytest.raises(ValueError, match="the adapter has no calibration; capt-peft calibrate ADAPTER fits one"):
        classifier.predict(task["test"][0]["image"], reject=True)
    base = ZeroShotClassifier(CLIPModel.from_pretrained(TINY_CLIP).eval(), processor, task.class_names)
    with pytest.raises(ValueError, match="a calibration belongs to one adapter, and no adapter acts here"):
        base.predict(task["test"][0]["image"], reject=True)
    logits, labels = drawn(60, classes=10)
    with pytest.raises(ValueError, match="One CAPT adapter is calibrated, and 0 adapters act here"):
        calibrate(base, logits, labels, task="digits", split="validation")


def test_classes_without_images_are_named(classifier, caplog):
    logits, labels = drawn(300, classes=10)
    keep = labels != 3
    calibrate(classifier, logits[keep], labels[keep], task="digits", split="validation")
    assert "The calibration has seen no images of '3'." in caplog.text
