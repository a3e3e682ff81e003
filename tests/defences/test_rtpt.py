"""R-TPT against a computation of its own, with PyTorch's optimiser on the adapter's parameters, in float64."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from capt_peft import ZeroShotClassifier
from capt_peft.defences import RTPT, Undefended
from capt_peft.defences.rtpt import _shifted, random_crop
from capt_peft.tuner import PromptLayer


class Precise(Undefended):
    """Its logits are float64, where a classifier's are float32."""

    def logits(self, features, texts=None):
        texts = self.texts if texts is None else texts
        scale = self.classifier.base_model.logit_scale.exp()
        return scale * features @ texts.T


def entropy(logits):
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1)


def by_hand(classifier, views, image):
    """The tuned answer for one image of the views (V, B, 3, H, W), by one step of PyTorch's Adam on the prompts themselves."""
    model = Precise(classifier)
    layer = next(m for m in classifier.modules() if isinstance(m, PromptLayer) and m.site.tower == "text")
    prompts = layer.capt_prompt["default"]
    start = prompts.detach().clone()
    with torch.no_grad():
        features = classifier.image_features(views[:, image])
        entropies = entropy(model.logits(features))
        chosen = features[entropies.argsort()[: int(0.1 * len(views))]]
        weights = []
        for i in range(len(views)):
            others = sorted((features[i] @ features[j] for j in range(len(views)) if j != i), reverse=True)
            weights.append(sum(others[:20]) / len(others[:20]) / 0.01)
    optimizer = torch.optim.Adam([prompts], lr=0.005)
    entropy(model.logits(chosen, classifier.encode_texts())).mean().backward()
    optimizer.step()
    with torch.no_grad():
        tuned = model.logits(features, classifier.encode_texts())
        prompts.copy_(start)
    for parameter in classifier.parameters():
        parameter.grad = None
    return torch.stack(weights).softmax(0) @ tuned


@pytest.mark.parametrize("views", [10, 30])
def test_the_answer_is_that_of_one_step_of_adam_on_the_prompts(adapter, images, views):
    adapter.double()
    images = images.double()
    torch.manual_seed(0)
    seen = torch.stack([images, *[random_crop(images) for _ in range(views - 1)]])
    expected = torch.stack([by_hand(adapter, seen, i) for i in range(3)])
    for differentiable in (images, images.clone().requires_grad_()):
        torch.manual_seed(0)
        found = RTPT(views).logits(Precise(adapter), differentiable)
        torch.testing.assert_close(found.detach(), expected, atol=1e-8, rtol=1e-8)
    with torch.no_grad():
        plain = Precise(adapter).logits(adapter.image_features(images))
    assert (found - plain).abs().max() > 1e-3


def test_the_unrolled_gradient_is_that_of_finite_differences(classifier, images):
    classifier.double()
    images = images[:2].double()
    model, defence = Precise(classifier), RTPT(12)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(pixels):
        torch.manual_seed(0)
        return defence.unrolled(model, pixels)[:, 1].sum()

    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(pixels), pixels)
    with torch.no_grad():
        step = 1e-6
        slope = (value(images + step * direction) - value(images - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, atol=1e-6, rtol=1e-5)
    torch.manual_seed(0)
    (constant,) = torch.autograd.grad(defence.straight_through(model, pixels)[:, 1].sum(), pixels)
    assert not torch.allclose(constant, gradient, rtol=0.01, atol=1e-4)  # so that both ways are tried


def test_texts_of_several_templates_and_images_run_at_once_or_not_to_the_same_answers(adapter, images, monkeypatch):
    templates = ["a photo of a {}.", "a photo of the {}.", "a photo of my {}."]
    classifier = ZeroShotClassifier(adapter.model, adapter.processor, adapter.class_names, templates)
    found = []
    for texts in (256, 24, 1):
        monkeypatch.setattr("capt_peft.defences.rtpt.TEXTS", texts)
        torch.manual_seed(0)
        pixels = images.clone().requires_grad_()
        logits = RTPT(6).unrolled(Undefended(classifier), pixels)
        found.append((logits.detach(), torch.autograd.grad(logits[:, 0].sum(), pixels)[0]))
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[0], found[2], atol=1e-3, rtol=1e-3)


def test_the_words_before_the_class_name_are_tuned_and_a_template_without_any_is_refused(adapter, processor, images):
    with adapter.frozen():
        bare = ZeroShotClassifier(adapter.model, processor, adapter.class_names, "a photo of the {}.")
        assert bare.context_places() == slice(1, 5)
        empty = ZeroShotClassifier(adapter.model, processor, adapter.class_names, "{} in a photo")
        with pytest.raises(ValueError, match="R-TPT tunes the words before the class name"):
            RTPT(4).logits(Undefended(empty), images)
    assert adapter.context_places() == slice(1, 1 + adapter.model.peft_config["default"].num_text_tokens)


def test_crops_are_as_random_resized_crops_are_drawn():
    torch.manual_seed(0)
    side = torch.linspace(0, 1, 64)
    image = torch.stack([side.expand(64, 64), side[:, None].expand(64, 64), torch.zeros(64, 64)])  # colours tell places
    crops = random_crop(image.expand(2000, -1, -1, -1))
    width = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]) * 64 / 63
    height = (crops[:, 1, -1, 0] - crops[:, 1, 0, 0]) * 64 / 63
    assert 0.45 < (width < 0).double().mean() < 0.55 and (height > 0).all()
    area, ratio = width.abs() * height, width.abs() / height
    assert area.min() > 0.07 and area.max() < 1.04 and abs(area.mean() - 0.54) < 0.03
    assert ratio.min() > 0.74 and ratio.max() < 1.35
    assert crops.min() >= 0 and crops.max() <= 1


def test_another_thread_sees_no_tuned_context(adapter):
    def texts():
        with torch.no_grad():
            return adapter.encode_texts()

    plain = texts()
    with ThreadPoolExecutor(1) as pool, _shifted(adapter, torch.randn(2, 128), slice(1, 3)):
        assert torch.equal(pool.submit(texts).result(), plain)
        assert not torch.allclose(texts(), plain, atol=0.01)
    assert torch.equal(texts(), plain)
