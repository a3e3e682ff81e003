"""What every defence keeps to, on the classifiers that it may be given."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers import TINY_CLIP, shake
from peft import get_peft_model
from small_undefended import SmallUndefended, small_images
from transformers import CLIPModel

from capt_peft import CaptConfig, ZeroShotClassifier, defences
from capt_peft.defences import (
    DEFENCES,
    TTC,
    Defended,
    Purifier,
    Undefended,
    defence_names,
    parse_defence,
    register_defence,
)

NAMES = ("ttc", "ttc-8x3-9", "lowpass", "lowpass-0.5", "tv", "tv-0.1", "clipure", "clipure-3x0.1")
NOISES = ("noise-8/255", "noise-0.1", "noise-0.1234567", "noise-1e-05", "smoothing-0.1234567x3")
CLASSES = ("red circle", "green square", "seven")


def classifier_of(processor, dtype=torch.float32, **config):
    model = CLIPModel.from_pretrained(TINY_CLIP, dtype=dtype)
    if config:
        torch.manual_seed(0)
        model = get_peft_model(model, CaptConfig(**config))
        shake(model)
    return ZeroShotClassifier(model.eval(), processor, CLASSES)


@pytest.fixture(scope="module", params=["bare", "adapter", "class-specific"])
def classifier(request, processor):
    configs = {
        "bare": {},
        "adapter": {"num_text_tokens": 2},
        "class-specific": {"class_specific": True, "class_names": list(CLASSES), "coupling": "none"},
    }
    return classifier_of(processor, **configs[request.param])


def images(count=3):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def seeded(function, *arguments):
    torch.manual_seed(5)
    return function(*arguments)


@pytest.mark.parametrize("name", [*NAMES, *NOISES, "lowpass-1e-05"])
def test_a_name_gives_the_defence_back(name):
    defence = parse_defence(name)
    assert defence.name == name and parse_defence(defence.name) == defence
    assert type(defence)(**{key: value for key, value in defence.to_dict().items() if key != "name"}) == defence


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ttc-0x2", "budget=0"), ("ttc-256x2", "to 255"), ("ttc-4x0", "steps=0"),
        ("lowpass-0", "share of the frequencies is 0.0"),
        ("lowpass-1.5", "at most 1"), ("tv-0", "must be above 0"), ("clipure-0x30", "steps=0"),
        ("clipure-10x0", "must be above 0"), ("ttc-4", "unknown defence"), ("tv-", "unknown defence"),
        ("clipure-10x" + "9" * 400, "unknown defence"), ("noise-" + "9" * 400, "unknown defence"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        parse_defence(name)


def test_every_defence_is_told_by_its_names():
    assert {shape.split("-")[0] for shape in defence_names()} >= {name.split("-")[0] for name in NAMES}
    assert len({kind.pattern for kind in DEFENCES}) == len(DEFENCES)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_finite_and_leave_the_classifier_as_it_is(name, classifier):
    defended = Defended(classifier, parse_defence(name))
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    given = images()
    logits = seeded(defended, given)
    assert logits.shape == (3, 3) and torch.isfinite(logits).all()
    with torch.no_grad():
        torch.testing.assert_close(seeded(defended, given), logits, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(seeded(defended, images()), logits, rtol=0, atol=0)
    assert torch.equal(given, images()) and not given.requires_grad
    assert not classifier.training and not any(m.training for m in classifier.modules())
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["straight-through", "unrolled", "black-box"])
def test_an_image_is_classified_whatever_the_others_are(name, way, classifier):
    surface = Defended(classifier, parse_defence(name)).surface(way)
    given = images()
    others = given.clone()
    others[1:] = others[1:].flip(0) * 0.5
    with torch.no_grad():
        a, b = seeded(surface, given), seeded(surface, others)
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-3)
        assert (a[1:] - b[1:]).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_straight_through_takes_the_gradient_at_the_purified_image(name, classifier):
    defence, model = parse_defence(name), Undefended(classifier)
    given = images().requires_grad_()
    (actual,) = torch.autograd.grad(seeded(defence.straight_through, model, given)[:, 0].sum(), given)
    if isinstance(defence, Purifier):
        point = seeded(defence.purify, model, images()).requires_grad_()
        (expected,) = torch.autograd.grad(model(point)[:, 0].sum(), point)
    else:  # a change of the feature: the logits are linear in it, so that a constant change keeps their gradient
        (expected,) = torch.autograd.grad(model(given)[:, 0].sum(), given)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(
        seeded(defence.straight_through, model, given), seeded(defence.logits, model, given), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("name", NAMES)
def test_unrolled_gradients_reach_every_pixel_on_a_real_model(name, classifier):
    """Second derivatives through attention too, which its fast kernels do not have."""
    surface = Defended(classifier, parse_defence(name)).surface("unrolled")
    given = images(2).requires_grad_()
    (gradient,) = torch.autograd.grad(seeded(surface, given)[:, 0].sum(), given)
    assert torch.isfinite(gradient).all() and (gradient != 0).double().mean() > 0.9


@pytest.mark.parametrize("name", ["ttc-4x2-0.05", "ttc-8x3-9", "lowpass-0.5", "tv-0.1", "clipure-3x0.1"])
def test_unrolled_gradients_are_those_of_double_precision(name):
    defence, model = parse_defence(name), SmallUndefended()
    assert torch.autograd.gradcheck(
        lambda x: seeded(defence.unrolled, model, x), small_images(2).requires_grad_(), fast_mode=True
    )


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_gives_nearly_the_same_answers(name, processor):
    wide, half = classifier_of(processor), classifier_of(processor, torch.bfloat16)
    defence, given = parse_defence(name), images(4)
    assert half.model.dtype == torch.bfloat16
    a, b = (seeded(Defended(each, defence), given) for each in (wide, half))
    assert torch.isfinite(b).all() and b.dtype == torch.float32
    # TTC's signs are those of gradients in half precision
    torch.testing.assert_close(a.softmax(1), b.softmax(1), rtol=0, atol=0.3 if name.startswith("ttc") else 0.1)


@pytest.mark.parametrize("name", ["tte-10001", "tte-0", "rtpt-99999999999999999999", "smoothing-0.1x10001"])
def test_sizes_that_nobody_could_wait_for_are_refused(name):
    with pytest.raises(ValueError, match=r"must be a whole number from \d to 10,000"):
        parse_defence(name)


def test_a_defence_of_ones_own_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(defences, "_KINDS", dict(defences._KINDS))

    @dataclass(frozen=True)
    class Mirror(Purifier):
        pattern: ClassVar[str] = "mirror"
        help: ClassVar[dict[str, str]] = {"mirror": "mirrors the image"}
        name = "mirror"

        def purify(self, model, pixels):
            return pixels.flip(-1)

    assert register_defence(Mirror) is Mirror and parse_defence("mirror") == Mirror()
    assert defence_names()["mirror"] == "mirrors the image"
    with pytest.raises(ValueError, match="is that of TTC already"):
        register_defence(type("Other", (Mirror,), {"pattern": TTC.pattern}))
    with pytest.raises(TypeError, match="with a pattern and a help"):
        register_defence(Purifier)
