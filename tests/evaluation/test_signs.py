"""Signs of masked gradients: each kind of masking raises its own, and a plain model raises none."""

import re

import pytest
import torch
from helpers import TINY_CLIP
from torch import nn
from toy_models import make_model, some_images
from transformers import CLIPModel

from capt_peft import APGD, PGD, Square, ThreatModel, ZeroShotClassifier, evaluate, load_task

THREAT = ThreatModel("linf", "4/255")
WHITE_AND_BLACK = [APGD(THREAT, steps=20), Square(THREAT, queries=300)]
NAMES = {
    "one_step_beats_many",
    "square_beats_white_box",
    "accuracy_left_at_epsilon_1",
    "zero_gradients",
    "random_outputs",
    "probabilities_instead_of_logits",
    "low_precision",
}


class Wrapped(nn.Module):
    """The plain model with something in front of it or behind it that masks its gradients."""

    def __init__(self, scale=4.0):
        super().__init__()
        self.model = make_model(scale)

    def forward(self, pixels):
        return self.model(pixels)


class Quantising(Wrapped):
    """Rounds its pixels to 64 levels: its gradients are those of a step function."""

    def forward(self, pixels):
        return self.model((pixels * 63).round() / 63)


class ZeroGradient(Wrapped):
    """Its logits saturate, so that most of the gradient is exactly zero."""

    def forward(self, pixels):
        return self.model(pixels).clamp(-0.01, 0.01) + 1e-7 * self.model(pixels).detach()


class Random(Wrapped):
    """Adds noise to its logits."""

    def forward(self, pixels):
        logits = self.model(pixels)
        return logits + 0.01 * torch.randn_like(logits)


class Softmax(Wrapped):
    """Returns probabilities."""

    def forward(self, pixels):
        return self.model(pixels).softmax(1)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixels, sign):
        ctx.sign = sign
        return pixels.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.sign * gradient, None


class Contrary(Wrapped):
    """Turns its gradient round at every other pass, so that steps undo each other."""

    def __init__(self):
        super().__init__()
        self.sign = 1

    def forward(self, pixels):
        if pixels.requires_grad:
            self.sign = -self.sign
        return self.model(_Turned.apply(pixels, self.sign))


def signs_of(model, attacks=WHITE_AND_BLACK):
    pixels = some_images(60)
    with torch.no_grad():
        labels = model(pixels).argmax(1)
    result = evaluate(model, (pixels, labels), attacks, progress=False)
    assert {sign.name for sign in result.signs} == NAMES
    return {sign.name: sign for sign in result.signs}


@pytest.mark.parametrize(
    ("model", "sign"),
    [
        (Quantising(), "square_beats_white_box"),
        (ZeroGradient(), "zero_gradients"),
        (Random(), "random_outputs"),
        (Softmax(), "probabilities_instead_of_logits"),
        (Contrary(), "one_step_beats_many"),
        (Wrapped().to(torch.bfloat16), "low_precision"),
    ],
    ids=["quantising", "zero gradient", "random", "softmax", "contrary", "bfloat16"],
)
def test_each_kind_of_masking_raises_its_own_sign(model, sign):
    if next(model.parameters()).dtype == torch.bfloat16:
        forward = model.model.forward
        model.forward = lambda pixels: forward(pixels.to(next(model.parameters()).dtype))
    found = signs_of(model)
    assert found[sign].raised
    assert found[sign].value > found[sign].threshold


def test_a_plain_model_raises_none():
    assert not [s for s in signs_of(Wrapped()).values() if s.raised or s.raised is None]


def test_plain_tiny_clip_raises_none(processor):
    digits = load_task("digits")
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    classifier = ZeroShotClassifier(base, processor, digits.class_names, digits.template).eval()
    data = digits["validation"].select(range(40))
    result = evaluate(classifier, data, [PGD(THREAT, steps=10), Square(THREAT, queries=40)], progress=False)
    assert [s.name for s in result.signs if s.raised] == []
    assert len(result.signs) == len(NAMES) and result.warnings() == []


def test_what_was_not_checked_says_so():
    sign = signs_of(Wrapped(), [Square(THREAT, queries=5)])["square_beats_white_box"]
    assert sign.raised is None and sign.value is None
    assert "Not checked" in sign.sentence and "autoattack" in sign.sentence


class _Led(torch.autograd.Function):
    """Passes pixels on, and a gradient that leads elsewhere."""

    @staticmethod
    def forward(ctx, pixels, lead):
        ctx.lead = lead
        return pixels.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.lead(gradient), None


def shuffled(gradient):
    order = torch.randperm(192, generator=torch.Generator().manual_seed(0))
    return gradient.flatten(1)[:, order].view_as(gradient)


def leaking(gradient):
    noise = torch.randn(gradient.shape[1:], generator=torch.Generator().manual_seed(0))
    return gradient + 10 * gradient.abs().max() * noise


class Led(Wrapped):
    def __init__(self, lead):
        super().__init__()
        self.lead = lead

    def forward(self, pixels):
        return self.model(_Led.apply(pixels, self.lead))


GRADIENTS_ALONE = [
    [PGD(THREAT, steps=20)],
    [APGD(THREAT, steps=10)],
    [PGD(ThreatModel("linf", "2/255"), steps=10), PGD(THREAT, steps=10)],
    [PGD(ThreatModel("l2", 0.3), steps=20)],
]


@pytest.mark.parametrize("attacks", GRADIENTS_ALONE, ids=["pgd", "apgd", "two balls", "l2"])
@pytest.mark.parametrize("lead", [shuffled, leaking, lambda gradient: 0 * gradient + 1])
def test_a_few_hundred_queries_show_what_gradients_hide(lead, attacks):
    found = signs_of(Led(lead), attacks)["square_beats_white_box"]
    assert found.raised and "300 queries of Square" in found.sentence and found.value > found.threshold


@pytest.mark.parametrize("attacks", [*GRADIENTS_ALONE, [PGD(THREAT, steps=1, random_start=False)]])
def test_honest_gradients_are_not_suspected_even_of_a_weak_attack(attacks):
    found = signs_of(Wrapped(), attacks)["square_beats_white_box"]
    assert found.raised is False and "300 queries of Square" in found.sentence


def test_the_queries_are_few():
    class Counting(Wrapped):
        images = 0

        def forward(self, pixels):
            self.images += 0 if pixels.requires_grad else len(pixels)
            return super().forward(pixels)

    counts = []
    for attacks in ([PGD(THREAT, steps=2)], [PGD(THREAT, steps=2), Square(THREAT, queries=1)]):
        model = Counting()
        signs_of(model, attacks)
        counts.append(model.images)
    assert counts[0] - counts[1] < 60 * 300


def bf16(function, *tensors):
    return function(*[tensor.to(torch.bfloat16) for tensor in tensors])


def autocast_inside(model):
    def forward(pixels):
        with torch.autocast("cpu", torch.bfloat16):
            return model(pixels).float()

    return forward


class _InNumpy(torch.autograd.Function):
    """A linear model in NumPy, with a gradient written by hand."""

    @staticmethod
    def forward(ctx, pixels, weight, half):
        ctx.weight, ctx.shape = weight, pixels.shape
        values = pixels.detach().numpy().reshape(len(pixels), -1) @ weight.numpy()
        return torch.from_numpy(values.astype("float16").astype("float32") if half else values)

    @staticmethod
    def backward(ctx, gradient):
        return (gradient @ ctx.weight.T).view(ctx.shape), None, None


WEIGHT = torch.randn(192, 5, generator=torch.Generator().manual_seed(0))


class CastsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixels):
        return pixels.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.half().float()


@pytest.mark.parametrize(
    ("make", "raised", "says"),
    [
        (lambda model: model, False, "float32"),
        (lambda model: lambda pixels: model(pixels), False, "float32"),
        (lambda model: model.double() and (lambda pixels: model(pixels.double()).float()), False, "float32"),
        (lambda model: autocast_inside(model), True, "bfloat16.*so did what decides"),
        (lambda model: lambda pixels: bf16(torch.matmul, pixels.flatten(1), WEIGHT).float(), True, "bfloat16"),
        (lambda model: lambda pixels: model(pixels.half().float()), True, "float16"),
        (lambda model: lambda pixels: model(pixels).half().float(), True, "float16"),
        (lambda model: lambda pixels: model(CastsInBackward.apply(pixels)), True, "float16"),
        (lambda model: lambda pixels: _InNumpy.apply(pixels, WEIGHT, True), True, "float16"),
        (lambda model: lambda pixels: _InNumpy.apply(pixels, WEIGHT, False), None, "Not checked"),
    ],
    ids=[
        "module", "function", "float64", "autocast",
        "cast product", "cast pixels", "cast logits", "backward", "numpy half", "numpy",
    ],
)  # fmt: skip
def test_half_precision_is_seen_wherever_a_model_hides_it(make, raised, says):
    sign = signs_of(make(Wrapped()), [PGD(THREAT, steps=2), Square(THREAT, queries=2)])["low_precision"]
    assert sign.raised is raised
    assert re.search(says, sign.sentence)


def test_outcomes_of_a_low_precision_attack_are_decided_in_float32():
    precise = make_model()
    pixels = some_images(60)
    labels = precise(pixels).argmax(1)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make_model().to(torch.bfloat16)

        def forward(self, pixels):
            return self.model(pixels.to(next(self.model.parameters()).dtype))

    result = evaluate(Half(), (pixels, labels), PGD(ThreatModel("linf", "1/255"), steps=3), progress=False)
    rounded = make_model().to(torch.bfloat16).float()  # the weights as bfloat16 keeps them
    assert result.examples["clean_prediction"].to_pylist() == rounded(pixels).argmax(1).tolist()
    sign = next(s for s in result.signs if s.name == "low_precision")
    assert sign.raised and "bfloat16" in sign.sentence


def test_signs_can_be_left_out():
    model = make_model()
    pixels = some_images(8)
    result = evaluate(model, (pixels, model(pixels).argmax(1)), PGD(THREAT, steps=2), signs=False, progress=False)
    assert result.signs == () and result.configuration["signs"] is False
