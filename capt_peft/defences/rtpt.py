"""R-TPT: for each image, one step of prompt tuning towards certain views, and a mean that trusts views with close neighbours."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..clip.classifier import ZeroShotClassifier
from ..clip.texts import TextPart, class_means, normalize
from ..tuner import clip
from .base import Defence, Undefended, check_count, gradient_of

VIEWS = 64
TEXTS = 256  # that run at once, for several images; or those of one image
LEARNING_RATE = 5e-3
ADAM_EPSILON = 1e-8
SELECTED = 0.1  # share of the views whose entropy the step lowers
NEIGHBOURS = 20  # views that a view's reliability is the mean similarity to
TEMPERATURE = 0.01  # of the weights
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # area and shape of a crop


@dataclass(frozen=True)
class RTPT(Defence):
    """Robust test-time prompt tuning: the prompts are tuned to each image, and its views are weighted by their reliability.

    Sheng et al., CVPR 2025, arXiv 2504.11195; settings and order of github.com/TomSheng21/R-TPT at e085f13, rtpt.py:
    `select_confident_samples`, `test_time_tuning`, `get_top_sim`, `test_time_adapt_eval`. The views are the image and random
    crops, half of them mirrored, scaled to its size. One step of Adam (learning rate 0.005) lowers the mean entropy of the tenth
    of them with the lowest entropy. It moves the context, for all classes alike: the token embeddings of an adapter's text
    prompts, or of the template's words before the class name. The answer is the mean of all views' logits with the tuned
    context, weighted by the softmax of each view's mean cosine similarity to the 20 views most like it, over 0.01.

    It deviates where their code is bound to files and to one image: pixels are not rounded to 8 bits; crops may lie between
    pixels, and are not mixed by AugMix, which the code does for no variant of ImageNet; there is no weight decay, which changes
    the context by 0.005%; and a view is no neighbour of itself, where the code leaves out similarities of 1 or more, whatever
    the rounding. Deeper prompts of an adapter stay as they are.

    `straight_through` takes the tuned context and the weights as constants, and `unrolled` differentiates both. Adam's first step
    is nearly the gradient's sign, which has no derivative: `unrolled` takes a step of the same length along the gradient.

    Args:
        views: Their number, the image included, at least 2.
    """

    pattern: ClassVar[str] = r"rtpt-(?P<views>\d+)"
    help: ClassVar[dict[str, str]] = {
        "rtpt-VIEWS": f"R-TPT: prompts tuned to each image, and views weighted by reliability, as rtpt-{VIEWS}"
    }
    random: ClassVar[bool] = True
    samples: ClassVar[int] = 4  # each averages over views already
    ways: ClassVar[tuple[str, ...]] = ("straight-through", "unrolled")

    views: int = VIEWS

    def __post_init__(self) -> None:
        check_count("views", self.views, least=2)

    @property
    def name(self) -> str:
        """Such as "rtpt-64"."""
        return f"rtpt-{self.views}"

    def logits(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the weighted mean of the views' logits; to gradients, the tuned prompts and the weights are constants."""
        features = self._features(model, pixels)
        with torch.no_grad():
            texts, weights = _tuned(model, features.detach(), _adam), _weights(features.detach())
        return _weighted(_logits(model, features, texts), weights)

    def unrolled(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the same, but for a smooth step, with the gradient through the step and the weights."""
        features = self._features(model, pixels)
        return _weighted(_logits(model, features, _tuned(model, features, _along)), _weights(features))

    def _features(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the normalised features (V, B, D) of the views."""
        return model.features_of(pixels, [lambda given: given, *[random_crop] * (self.views - 1)])


def random_crop(pixels: Tensor) -> Tensor:
    """Returns a random crop of each image (B, 3, H, W), at the same size, mirrored half of the time."""
    area, ratio, right, down, mirrored = torch.rand(5, len(pixels), device=pixels.device)
    area = SCALE[0] + (SCALE[1] - SCALE[0]) * area
    low, high = map(math.log, RATIO)
    ratio = (low + (high - low) * ratio).exp()
    width, height = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)  # (B,), shares of the image
    zero = torch.zeros_like(area)
    side = torch.where(mirrored < 0.5, -width, width)
    across = torch.stack([side, zero, (1 - width) * (2 * right - 1)], -1)
    along = torch.stack([zero, height, (1 - height) * (2 * down - 1)], -1)
    places = functional.affine_grid(torch.stack([across, along], 1).to(pixels), list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, places, padding_mode="border", align_corners=False)


def _logits(model: Undefended, features: Tensor, texts: Tensor) -> Tensor:
    """Returns the logits (B, V, N) of views (V, B, D), by each image's own texts (B, N, D)."""
    return torch.stack([model.logits(features[:, i], each) for i, each in enumerate(texts)])


def _weighted(logits: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted mean (B, N) of the logits (B, V, N), by the weights (B, V) of the views."""
    return (weights[..., None] * logits).sum(1)


def _weights(features: Tensor) -> Tensor:
    """Returns the weights (B, V) of views (V, B, D) by their mean similarity to those that are most like them."""
    of_images = features.transpose(0, 1)
    similar = of_images @ of_images.transpose(1, 2)  # (B, V, V)
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    close = similar.masked_fill(itself, -math.inf).topk(min(NEIGHBOURS, len(features) - 1)).values.mean(-1)  # (B, V)
    return (close.to(_wide(features)) / TEMPERATURE).softmax(-1)


def _tuned(model: Undefended, features: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the text features (B, N, D) for each image, after one step on the context; its views' features are (V, B, D)."""
    classifier = model.classifier
    places = classifier.context_places()
    if places.stop <= places.start:
        raise ValueError(
            f"R-TPT tunes the words before the class name, and the template {classifier.template!r} has none in a text. Put "
            "words before {}, as in 'a photo of a {}.'."
        )
    width = clip.find_towers(clip.base_model(classifier.model))["text"].dim
    traced = torch.is_grad_enabled() and features.requires_grad
    found = []
    for views in features.split(max(1, TEXTS // len(classifier.texts)), dim=1):  # (V, b, D)
        texts = model.texts.expand(views.shape[1], -1, -1)
        count = max(1, int(SELECTED * len(views)))
        certain = _entropy(_logits(model, views, texts)).topk(count, largest=False).indices  # (b, k)
        chosen = views[certain.T, torch.arange(views.shape[1], device=views.device)]  # (k, b, D)

        def entropy(shifts: Tensor, chosen: Tensor = chosen) -> Tensor:
            return _entropy(_logits(model, chosen, _encoded(classifier, shifts, places))).mean(1)

        shape = views.shape[1], places.stop - places.start, width
        start = torch.zeros(shape, dtype=_wide(views), device=views.device, requires_grad=traced)
        found.append(_encoded(classifier, step(gradient_of(entropy, start)), places))
    return torch.cat(found)


def _wide(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def _entropy(logits: Tensor) -> Tensor:
    """Returns the entropy (...) of each row (..., N)."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def _adam(gradient: Tensor) -> Tensor:
    """Returns Adam's first step."""
    return -LEARNING_RATE * gradient / (gradient.abs() + ADAM_EPSILON)


def _along(gradient: Tensor) -> Tensor:
    """Returns a step along the gradient that is as long as one along its sign."""
    mean_square = gradient.square().mean((1, 2), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    return -LEARNING_RATE * gradient / mean_square.sqrt()


def _encoded(classifier: ZeroShotClassifier, shifts: Tensor, places: slice) -> Tensor:
    """Returns the features (b, N, D) of the classes' texts, of b shifts (n, dim) of their token embeddings at some places."""
    labels = torch.tensor(classifier.text_labels)  # (T,)
    inputs = {name: ids.repeat(len(shifts), 1) for name, ids in classifier.text_inputs().items()}
    part = TextPart(labels.repeat(len(shifts)), inputs)
    with _shifted(classifier, shifts.repeat_interleave(len(labels), 0), places), classifier.part_inputs(part) as inputs:
        features = normalize(clip.text_features(classifier.model, inputs))
    counts = torch.bincount(labels).tolist()
    return torch.stack([class_means(each, counts) for each in features.unflatten(0, (len(shifts), -1))])


@contextmanager
def _shifted(classifier: ZeroShotClassifier, shifts: Tensor, places: slice) -> Iterator[None]:
    """Moves token embeddings (T, L, dim), an adapter's prompts included, in this thread alone: others may run the same model."""
    model, thread = clip.base_model(classifier.model), threading.get_ident()

    def move(_: Any, __: Any, tokens: Tensor) -> Tensor | None:
        if threading.get_ident() != thread:
            return None
        moved = tokens[:, places] + shifts.to(tokens)
        return torch.cat([tokens[:, : places.start], moved, tokens[:, places.stop :]], dim=1)

    hook = model.get_submodule(clip.find_towers(model)["text"].modules[0]).register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()
