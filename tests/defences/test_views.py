"""What holds of the defences that run several views of an image, or noisy ones, on a classifier that stays as it was."""

import json
from copy import deepcopy

import pytest
import torch

from capt_peft.defences import Defended, Undefended, parse_defence
from capt_peft.tuner import clip

# a name of each, and the images that the image tower runs on for each image
NAMES = {
    "identity": 1,
    "tte-5": 5,
    "noise-8/255": 1,
    "smoothing-0.1x6": 6,
    "rtpt-6": 6,
}
WAYS = ("straight-through", "unrolled", "black-box")


def run(classifier, name, pixels, way="black-box", seed=0, model=None):
    torch.manual_seed(seed)
    return Defended(classifier, parse_defence(name)).surface(way, model)(pixels)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_makes_the_defence_that_has_it(name):
    defence = parse_defence(name)
    assert defence.name == name and parse_defence(defence.name) == defence
    assert json.loads(json.dumps(defence.to_dict()))["name"] == name
    assert set(defence.ways) <= {"straight-through", "unrolled"} and "unrolled" in defence.ways


@pytest.mark.parametrize("name", ["tte-0", "noise-0", "noise-2", "smoothing-0.1x0", "smoothing-0x4", "rtpt-1"])
def test_settings_out_of_range_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^defence '{name}': "):
        parse_defence(name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_images_do_not_influence_each_other_and_random_draws_alone_change_an_answer(classifier, images, name, way):
    logits = run(classifier, name, images, way)
    assert logits.shape == (3, 4) and torch.isfinite(logits).all()
    again = run(classifier, name, images, way, seed=1)
    assert torch.equal(logits, again) != parse_defence(name).random
    if not parse_defence(name).random:
        alone = torch.cat([run(classifier, name, image[None], way) for image in images])
        torch.testing.assert_close(alone, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_has_no_gradient_in_the_logits_of_another(classifier, images, name):
    for way in parse_defence(name).ways:
        pixels = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(run(classifier, name, pixels, way)[0, 1], pixels)
        assert gradient[0].abs().max() > 0 and (gradient[1:] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_same_with_and_without_gradients_and_in_inference_mode(classifier, images, name):
    for way in WAYS:
        with torch.no_grad():
            expected = run(classifier, name, images, way)
        with torch.inference_mode():
            inferred = run(classifier, name, images, way)
        traced = run(classifier, name, images.clone().requires_grad_(), way)
        torch.testing.assert_close(inferred, expected)
        torch.testing.assert_close(traced.detach(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_classifier_stays_as_it_was(classifier, images, name):
    def state():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in classifier.modules()]
        return [(m.training, len(m.__dict__)) for m in classifier.modules()], hooks

    before, weights = state(), deepcopy(classifier.state_dict())
    flags = [p.requires_grad for p in classifier.parameters()]
    with torch.no_grad():
        logits = classifier(images)
    for way in WAYS:
        pixels = images.clone().requires_grad_()
        torch.autograd.grad(run(classifier, name, pixels, way).sum(), pixels)
        with torch.no_grad():
            run(classifier, name, images, way)
    assert state() == before and [p.requires_grad for p in classifier.parameters()] == flags
    assert all(p.grad is None for p in classifier.parameters())
    assert all(torch.equal(value, weights[key]) for key, value in classifier.state_dict().items())
    with torch.no_grad():
        assert torch.equal(classifier(images), logits)


@pytest.mark.parametrize(("name", "forwards"), NAMES.items())
def test_runs_of_the_image_tower_are_counted(classifier, images, monkeypatch, name, forwards):
    ran = []
    features = clip.image_features
    monkeypatch.setattr(clip, "image_features", lambda model, p: ran.append(len(p)) or features(model, p))
    model = Undefended(classifier)
    with torch.no_grad():
        run(classifier, name, images, model=model)
    assert model.forwards == sum(ran) == 3 * forwards and model.gradients == 0
    run(classifier, name, images.clone().requires_grad_(), "unrolled", model=model)
    assert model.forwards == sum(ran) == 6 * forwards and model.gradients == 3 * forwards


def test_an_expectation_has_the_mean_of_the_gradients(adapter, images):
    defended = Defended(adapter, parse_defence("noise-0.1"))
    pixels = images.clone().requires_grad_()
    torch.manual_seed(0)
    expected = [torch.autograd.grad(defended.surface("unrolled")(pixels)[:, 2].sum(), pixels)[0] for _ in range(3)]
    torch.manual_seed(0)
    (gradient,) = torch.autograd.grad(defended.surface("expectation", samples=3)(pixels)[:, 2].sum(), pixels)
    torch.testing.assert_close(gradient, sum(expected) / 3, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(expected[0], expected[1], atol=1e-4)


def test_views_run_in_passes_that_bound_the_memory_to_the_same_logits_and_gradients(adapter, images, monkeypatch):
    def found():
        pixels = images.clone().requires_grad_()
        logits = run(adapter, "smoothing-0.1x6", pixels, "unrolled", model=model)
        return logits.detach(), torch.autograd.grad(logits[:, 0].sum(), pixels)[0]

    model = Undefended(adapter)
    whole, sizes, features = found(), [], type(adapter).image_features
    monkeypatch.setattr(type(adapter), "image_features", lambda self, p: sizes.append(len(p)) or features(self, p))
    monkeypatch.setattr("capt_peft.defences.base.AT_ONCE", 7)
    for one, other in zip(found(), whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert sizes == [6, 6, 6, 6, 6, 6]  # forwards, and again in the backward pass with the same draws
    assert model.forwards == 2 * 18
