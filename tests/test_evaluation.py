"""Accuracies, their intervals, and that an evaluation does not depend on how it is batched."""

import pytest
import torch
from helpers import TINY_CLIP
from transformers import CLIPModel

from capt_peft import PGD, ThreatModel, ZeroShotClassifier, evaluate, load_task
from capt_peft.evaluation import Accuracy, wilson_interval


@pytest.fixture(scope="module")
def digits():
    return load_task("digits")


@pytest.fixture(scope="module")
def classifier(processor, digits):
    return ZeroShotClassifier(
        CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32), processor, digits.class_names, digits.template
    )


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # published values of the Wilson interval (Newcombe 1998, Table I, method 3)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_is_symmetric_and_stays_in_the_unit_range():
    low, high = wilson_interval(7, 20)
    assert wilson_interval(13, 20) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(5, 5)[1] == 1.0
    for correct, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no share"):
            wilson_interval(correct, n)


def test_an_accuracy_reads_as_people_write_it():
    assert str(Accuracy(81, 263)) == "30.8% (25.5 to 36.6, n=263)"


def test_the_batch_size_does_not_change_an_evaluation(classifier, digits):
    data = digits["validation"].select(range(24))
    attack = PGD(ThreatModel("linf", "8/255"), steps=4)
    whole = evaluate(classifier, data, attack, batch_size=24, progress=False)
    parts = evaluate(classifier, data, attack, batch_size=7, progress=False)
    assert whole == parts
    assert whole.robust.correct <= whole.clean.correct
    assert whole.clean.n == 24


def test_the_mode_of_the_classifier_is_given_back(classifier, digits):
    classifier.train()
    evaluate(classifier, digits["validation"].select(range(2)), PGD(ThreatModel("linf", 0.0), steps=1), progress=False)
    assert classifier.training
    classifier.eval()


def test_epsilon_0_leaves_robust_equal_to_clean(classifier, digits):
    result = evaluate(
        classifier, digits["validation"].select(range(20)), PGD(ThreatModel("linf", 0.0), steps=3), progress=False
    )
    assert result.robust == result.clean


def test_no_images_are_refused(classifier, digits):
    with pytest.raises(ValueError, match="no images to evaluate"):
        evaluate(classifier, digits["validation"].select([]), PGD(ThreatModel("linf", 0.1), steps=1), progress=False)
