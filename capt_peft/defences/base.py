"""What a defence at test time is, the classifier that it is given, and the classifier that it makes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ..attacks.threat import LogitsFn
from ..clip.classifier import ZeroShotClassifier
from ..clip.texts import normalize
from ..tuner import clip
from ..utils.patterns import named_settings
from ..utils.text import shown

NUMBER = r"\d{1,9}(?:\.\d{1,30})?(?:e-\d{1,3})?"  # in a name, as `number` writes it

AT_ONCE = 64  # views that run at once, of a batch that is smaller
MOST = 10_000  # of views, copies or steps


class Undefended:
    """A classifier as a defence is given it: its texts are run once, and it counts the images that its image tower runs on.

    Args:
        classifier: A classifier in eval mode, which stays as it is.

    Attributes:
        classifier: The classifier.
        texts: (N, D) normalised text features of its classes, without gradient.
        forwards: Images that the image tower has run on.
        gradients: Those of them that had a gradient.
    """

    def __init__(self, classifier: ZeroShotClassifier) -> None:
        self.classifier = classifier
        with torch.inference_mode(False), torch.no_grad():
            self.texts = classifier.encode_texts()
        self.forwards = self.gradients = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns the logits (B, N) of pixels (B, 3, H, W) in [0, 1]."""
        return self.logits(self.features(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        """Returns the normalised image features (B, D) of pixels (B, 3, H, W) in [0, 1]."""
        return normalize(self.raw_features(pixels))

    def raw_features(self, pixels: Tensor) -> Tensor:
        """Returns the image features (B, D) of pixels (B, 3, H, W) in [0, 1] at the length that the model gives them."""
        self.forwards += len(pixels)
        self.gradients += len(pixels) if pixels.requires_grad and torch.is_grad_enabled() else 0
        return clip.image_features(self.classifier.model, self.classifier.pixel_values(pixels))

    @cached_property
    def blank(self) -> Tensor:
        """The feature (D,) of no class in particular: the base model's for the template without a name ("a photo of a .").

        Of several templates it is the mean, scaled to length 1. The base model's, because prompts belong to the classes' texts.
        """
        template = self.classifier.template
        texts = [text.replace("{}", "") for text in ([template] if isinstance(template, str) else template)]
        with torch.inference_mode(False), self.classifier.frozen() as base:
            return normalize(base.embed_texts(texts).mean(0)).to(self.texts.device)

    def features_of(self, pixels: Tensor, views: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """Returns the normalised features (V, B, D) of V views of the images: functions of (B, 3, H, W) to the same, in order.

        The image tower runs on no more than `AT_ONCE` images at once, or on one view of the batch. Where that takes several
        passes with gradients, their activations are not kept, and the backward pass runs them again, which does not count.
        """
        count = max(1, AT_ONCE // len(pixels))
        groups = [views[start : start + count] for start in range(0, len(views), count)]
        passes = len(pixels) * len(views)
        self.forwards += passes
        traced = pixels.requires_grad and torch.is_grad_enabled()
        self.gradients += passes if traced else 0

        def run(given: Tensor, group: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
            return self.classifier.image_features(torch.cat([view(given) for view in group]))

        kept = not traced or len(groups) == 1
        parts = [run(pixels, g) if kept else checkpoint(run, pixels, g, use_reentrant=False) for g in groups]
        return torch.cat(parts).unflatten(0, (len(views), len(pixels)))

    def logits(self, features: Tensor, texts: Tensor | None = None) -> Tensor:
        """Returns the logits (B, N) of normalised image features (B, D) and of the classes' text features, or others (N, D)."""
        return self.classifier.logits(features, self.texts if texts is None else texts)


class Defence(ABC):
    """What is done to an image, or to a classifier, when an image is classified; a frozen dataclass with its settings.

    The functions below take pixels (B, 3, H, W) in [0, 1] and return logits (B, N). Images do not influence each other. What is
    drawn comes from PyTorch's global random numbers, on the device of the pixels. What is optimised within a function is
    optimised where gradients are switched off, too (`gradient_of`).

    Attributes:
        pattern: Regular expression of its names; its named groups are settings.
        help: Its names, or their shapes, each with what it means.
        random: Whether the same image can get different logits.
        samples: Draws of a random defence that one gradient is averaged over, where the way is "expectation".
        ways: Those of `straight_through` and `unrolled` whose gradients are not the same: what a white-box attack has to try.
    """

    pattern: ClassVar[str]
    help: ClassVar[Mapping[str, str]]
    random: ClassVar[bool] = False
    samples: ClassVar[int] = 20  # as AutoAttack's version for random classifiers
    ways: ClassVar[tuple[str, ...]] = ("unrolled",)

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name for results, from which `parse_defence` makes the same defence."""

    @classmethod
    def from_name(cls, match: re.Match[str]) -> Defence:
        """Returns the defence of a name that `pattern` matches; by default, the pattern's named groups are its settings."""
        return cls(**named_settings(match))

    def to_dict(self) -> dict[str, Any]:
        """Returns the name and every setting, in types that JSON has."""
        return {"name": self.name, **{each.name: getattr(self, each.name) for each in fields(cast(Any, self))}}

    @abstractmethod
    def logits(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns what decides, with whatever gradient it has."""

    def straight_through(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the logits that decide, with a gradient as if what the defence does were constant."""
        return self.logits(model, pixels)

    def unrolled(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the logits, or smooth ones close to them, with the gradient through all that the defence computes."""
        return self.logits(model, pixels)


class Purifier(Defence):
    """A defence that changes the image, and then classifies it as ever."""

    ways = ("straight-through", "unrolled")

    @abstractmethod
    def purify(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the changed pixels (B, 3, H, W), in [0, 1]."""

    def smooth(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns what `purify` returns, or pixels close to it, with the gradient through all that it computes."""
        return self.purify(model, pixels)

    def logits(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the logits of the changed image."""
        return model(self.purify(model, pixels))

    def straight_through(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the same logits; to gradients, the change of the image is a constant (BPDA with the identity)."""
        with torch.no_grad():
            change = self.purify(model, pixels.detach()) - pixels
        return model(pixels + change)

    def unrolled(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the logits of the image that `smooth` makes."""
        return model(self.smooth(model, pixels))


def number(value: float) -> str:
    """Returns a setting as it stands in a name: 0.5, 30, 1e-05."""
    return repr(float(value)).removesuffix(".0")


def gradient_of(values: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Returns the gradient (B, ...) of the sum of `values(pixels)`, for a defence that takes steps along it.

    It works where gradients are switched off. Where they are on and `pixels` have one, so has the result (second derivatives,
    with PyTorch's plain attention: its fast kernels have none); else it is a constant.
    """
    create_graph = torch.is_grad_enabled() and pixels.requires_grad
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext():
        point = pixels if create_graph else pixels.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(values(point).sum(), point, create_graph=create_graph)
    return gradient


def check_count(name: str, value: object, least: int = 1, most: int = MOST) -> None:
    """Raises a ValueError unless a setting is a whole number from `least` to `most`: names may come from strangers' records."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}={shown(value, 40)} must be a whole number from {least} to {most:,}")


class Defended(nn.Module):
    """A classifier with a defence in front of it: `pixels in [0, 1] -> logits`, as the classifier itself.

    `evaluate` attacks it in ways that know the defence (`WAYS`). As a plain callable it is attacked like any other: through
    whatever gradients it has, which for many defences are of no use.

    Args:
        classifier: An adapter's classifier, or one of a bare CLIP.
        defence: The defence.

    Raises:
        TypeError: Another kind of classifier or defence.
    """

    def __init__(self, classifier: ZeroShotClassifier, defence: Defence) -> None:
        super().__init__()
        if not isinstance(classifier, ZeroShotClassifier):
            raise TypeError(f"A defence stands before a ZeroShotClassifier, not {type(classifier).__name__}.")
        if not isinstance(defence, Defence):
            raise TypeError(f"defence must be a Defence such as parse_defence('ttc'), got {defence!r}.")
        self.classifier = classifier
        self.defence = defence
        self.train(classifier.training)

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the logits that decide: (B, 3, H, W) pixels in [0, 1] -> (B, N).

        Raises:
            ValueError: The classifier is in training mode.
        """
        if self.training:
            raise ValueError("A defence acts when images are classified: call eval() first.")
        return self.surface("black-box")(pixels)

    def surface(self, way: str, model: Undefended | None = None, *, samples: int = 1) -> LogitsFn:
        """Returns what an attack of a way sees, as a function of pixels; right while the classifier stays as it is.

        Args:
            way: One of `WAYS`.
            model: The classifier to run, which counts; by default a new one.
            samples: Draws that "expectation" averages.
        """
        model = Undefended(self.classifier) if model is None else model
        defence = self.defence
        functions: dict[str, Callable[[Undefended, Tensor], Tensor]] = {
            "transfer": lambda model, pixels: model(pixels),
            "straight-through": defence.straight_through,
            "unrolled": defence.unrolled,
            "expectation": lambda *given: torch.stack([defence.unrolled(*given) for _ in range(samples)]).mean(0),
            "black-box": defence.logits,
        }
        function = functions[way]

        def logits_fn(pixels: Tensor) -> Tensor:
            with torch.inference_mode(False):  # tensors made in inference mode could not be optimised over
                return function(model, pixels.clone() if pixels.is_inference() else pixels)

        return logits_fn
