"""CLIPure: how far the feature is turned, and where to."""

import math

import pytest
import torch
from helpers import TINY_CLIP
from small_undefended import SmallUndefended, small_images
from torch.nn.functional import cosine_similarity, normalize
from transformers import CLIPModel

from capt_peft import ZeroShotClassifier
from capt_peft.defences import CLIPure, Undefended


def features_at(angles, blank, seed=0):
    """Features of length 1 at these angles from `blank`, each in a direction of its own."""
    across = torch.randn(len(angles), len(blank), generator=torch.Generator().manual_seed(seed), dtype=blank.dtype)
    across = normalize(across - (across @ blank)[:, None] * blank)
    angles = torch.tensor(angles, dtype=blank.dtype)[:, None]
    return angles.cos() * blank + angles.sin() * across, across


@pytest.mark.parametrize("defence", [CLIPure(), CLIPure(3, 0.1), CLIPure(1, 2.0), CLIPure(7, 30.0)])
def test_each_step_follows_the_gradient_of_the_cosine(defence):
    blank, found = SmallUndefended().blank, features_at([0.3, 0.9, 1.4, 2.5], SmallUndefended().blank)[0]
    expected = found.clone()
    for _ in range(defence.steps):
        point = expected.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(cosine_similarity(point, blank[None]).sum(), point)
        expected = normalize(expected + defence.size * normalize(gradient))
    torch.testing.assert_close(defence.moved(found, blank), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("steps", "size"), [(1, 0.1), (4, 0.1), (10, 30.0), (9, 30.0), (3, 5.0)])
def test_a_step_turns_the_feature_by_the_arc_tangent_of_its_size(steps, size):
    blank, angles = SmallUndefended().blank, [0.3, 0.9, 1.4, 1.6, 2.5]
    found, across = features_at(angles, blank)
    for _ in range(steps):
        angles = [angle - math.copysign(math.atan(size), angle) for angle in angles]
    turned = torch.tensor(angles, dtype=blank.dtype)[:, None]
    expected = turned.cos() * blank + turned.sin() * across
    torch.testing.assert_close(CLIPure(steps, size).moved(found, blank), expected, rtol=0, atol=1e-8)


def test_the_published_steps_bring_a_feature_within_88_degrees_back_to_where_it_was():
    blank = SmallUndefended().blank
    near, far = (features_at([angle], blank)[0] for angle in (1.5, 1.6))  # 86 and 92 degrees; atan(30) is 88.1
    torch.testing.assert_close(CLIPure().moved(near, blank), near, rtol=0, atol=1e-9)
    assert (CLIPure().moved(far, blank) - far).norm() > 1.9  # the other side of `blank`


def test_a_feature_that_is_there_already_stays():
    blank = SmallUndefended().blank
    point = blank[None].clone().requires_grad_()
    moved = CLIPure(3, 0.1).moved(point, blank)
    assert torch.isfinite(moved).all()
    (gradient,) = torch.autograd.grad(moved.sum(), point)
    assert torch.isfinite(gradient).all()


def test_the_steps_are_those_of_each_image_alone():
    """The published norm over the batch would make a second image halve the square of the step."""
    model, images = SmallUndefended(), small_images(3)
    together = CLIPure(3, 0.1).logits(model, images)
    alone = torch.cat([CLIPure(3, 0.1).logits(model, image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("template", ["a photo of a {}.", ["a photo of a {}.", "{} in a drawing", "one {}"]])
def test_blank_is_the_mean_of_the_templates_without_a_class(template, processor):
    model = CLIPModel.from_pretrained(TINY_CLIP).eval()
    classifier = ZeroShotClassifier(model, processor, ("a", "b"), template)
    texts = [each.replace("{}", "") for each in ([template] if isinstance(template, str) else template)]
    inputs = processor.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = normalize(normalize(model.text_projection(model.text_model(**inputs).pooler_output)).mean(0), dim=0)
    torch.testing.assert_close(Undefended(classifier).blank, expected, rtol=0, atol=1e-5)
