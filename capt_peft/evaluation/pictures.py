"""Pictures for people: images, their adversarial examples, the noise, and what two classifiers say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attacks import Attack
from ..clip.classifier import ZeroShotClassifier
from ..data.corruptions import CORRUPTIONS, corrupt
from ..data.images import load_image
from ..plotting import RIGHT, WRONG, new_figure, save_figure
from ..randomness import example_generators


def attack_picture(
    classifiers: Mapping[str, ZeroShotClassifier],
    images: Sequence[Any],
    labels: Sequence[int],
    attack: Attack,
    path: str | Path,
    seed: int = 0,
) -> Path:
    """Draws images, their adversarial examples for each classifier, the noise, and the classifiers' answers.

    Each classifier is attacked itself (white box); the noise is scaled to fill the range.

    Args:
        classifiers: By name, over the same classes.
        images: B images, anything `load_image` reads.
        labels: Their B class indices.
        attack: The attack.
        path: Where to write; the suffix says the format (png, svg, pdf).
        seed: Seed of the attack.

    Returns:
        The path.
    """
    figure = new_figure(1.25 * len(images) + 1.1, 1.42 * 3 * len(classifiers))
    first = next(iter(classifiers.values()))
    pixels = first.transform.batch(images).to(first.device)  # (B, 3, H, W)
    truth = torch.tensor(list(labels), device=pixels.device)
    rows: list[tuple[str, Tensor, list[tuple[str, bool]]]] = []
    names = first.class_names
    for name, classifier in classifiers.items():
        attacked, noise, scale = attacked_and_noise(classifier, pixels, truth, attack, seed)
        rows.append((f"image\n{name}", pixels, _answers(classifier, pixels, truth, names)))
        rows.append((f"attacked\n{name}", attacked, _answers(classifier, attacked, truth, names)))
        rows.append((f"noise x{scale:.0f}", noise, []))
    axes = figure.subplots(len(rows), len(pixels), squeeze=False)
    for (title, row_pixels, answers), row in zip(rows, axes, strict=True):
        for i, axis in enumerate(row):
            axis.imshow(row_pixels[i].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if answers:
                axis.set_xlabel(answers[i][0], color=RIGHT if answers[i][1] else WRONG, fontsize=9)
        row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(f"{attack.name}, {attack.threat_model}; answers in green are right, in red wrong", fontsize=10)
    save_figure(figure, Path(path), dpi=110)
    return Path(path)


def corruption_picture(image: Any, path: str | Path, severity: int = 3, seed: int = 0) -> Path:
    """Draws an image and its 15 common corruptions at a severity.

    Args:
        image: Anything `load_image` reads, at the size at which a model sees it.
        path: Where to write; the suffix says the format (png, svg, pdf).
        severity: 1 to 5.
        seed: Seed of the corruptions.

    Returns:
        The path.
    """
    clean = load_image(image)
    shown = {"image": clean, **{kind: corrupt(clean, kind, severity, seed) for kind in CORRUPTIONS}}
    figure = new_figure(10, 2.9)
    for axis, (name, each) in zip(figure.subplots(2, 8).ravel(), shown.items(), strict=True):
        axis.imshow(each, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(name.replace("_", " "), fontsize=9)
    save_figure(figure, Path(path), dpi=110)
    return Path(path)


def image_grid(
    classifier: ZeroShotClassifier,
    pixels: Tensor,
    labels: Tensor,
    attack: Attack,
    seed: int = 0,
    places: Sequence[int] | None = None,
) -> Tensor:
    """Returns one picture without words: a row of clean images, one of their adversarial examples, and one of the scaled noise.

    Args:
        classifier: The classifier, in eval mode.
        pixels: (B, 3, H, W) in [0, 1], on its device.
        labels: (B,) class indices.
        attack: The attack, white box.
        seed: Seed of the attack.
        places: The images' places in their split, on which the attack's random numbers depend; by default 0 to B - 1.

    Returns:
        (3, 3 * H, B * W) in [0, 1].
    """
    attacked, noise, _ = attacked_and_noise(classifier, pixels, labels, attack, seed, places)
    return torch.cat([torch.cat(list(row), dim=2) for row in (pixels, attacked, noise)], dim=1)


def attacked_and_noise(
    classifier: ZeroShotClassifier,
    pixels: Tensor,
    labels: Tensor,
    attack: Attack,
    seed: int,
    places: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Returns adversarial examples, the noise scaled to fill the range around grey, both (B, 3, H, W), and that scale."""
    places = range(len(pixels)) if places is None else places
    generators = example_generators(seed, places, stream="evaluation", device=pixels.device)
    attacked = attack(classifier.with_fixed_texts(), pixels, labels, generators)
    scale = 0.5 / max(attack.threat_model.norm_of(attacked - pixels).max().item(), 1e-9)
    return attacked, (0.5 + scale * (attacked - pixels)).clamp(0, 1), scale


@torch.no_grad()
def _answers(
    classifier: ZeroShotClassifier, pixels: Tensor, labels: Tensor, names: Sequence[str]
) -> list[tuple[str, bool]]:
    predicted = classifier(pixels).argmax(-1)
    return [(names[i], right) for i, right in zip(predicted.tolist(), (predicted == labels).tolist(), strict=True)]
