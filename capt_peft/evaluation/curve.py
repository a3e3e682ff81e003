"""Robustness curves: accuracy against epsilon, and against the steps of the attack."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState

from ..attacks import PGD, ThreatModel
from ..clip.classifier import ZeroShotClassifier
from ..plotting import COLOURS, GREY, new_figure, open_axis, save_figure
from ..results.accuracy import Accuracy
from ..results.retrieval import DIRECTIONS, Retrieval
from ..tuner import adapters_in_use
from ..utils.files import make_writable, write_json, written_whole
from ..utils.fractions import format_fraction
from ..utils.outputs import main_process_says
from .loop import evaluate

logger = logging.getLogger(__name__)

EPSILONS = (0, 0.5, 1, 2, 4, 8, 16, 255)  # of 255
STEPS = (1, 5, 10, 20, 50, 100)
NOISE = 0.005  # a rise of accuracy with a stronger attack by no more than this, or one image, is noise
ZERO_SHOT, ADAPTER = "zero-shot", "CAPT"


@dataclass(frozen=True)
class Curve:
    """Accuracy of one classifier against the strength of PGD.

    Attributes:
        epsilon: (epsilon, accuracy) at a fixed number of steps.
        steps: (steps, accuracy) at a fixed epsilon; 0 steps is clean accuracy.
    """

    epsilon: tuple[tuple[float, Accuracy], ...]
    steps: tuple[tuple[int, Accuracy], ...]

    def rises(self) -> list[str]:
        """Returns sentences that say where a stronger attack leaves more accuracy, beyond noise."""
        found = []
        for name, points in (("epsilon", self.epsilon), ("steps", self.steps)):
            for (weak, before), (strong, after) in pairwise(points):
                if after.value - before.value > max(NOISE, 1 / after.n):
                    texts = [format_fraction(v) if name == "epsilon" else str(v) for v in (weak, strong)]
                    found.append(
                        f"accuracy rises from {100 * before.value:.1f}% to {100 * after.value:.1f}% between {name} "
                        f"{texts[0]} and {texts[1]}"
                    )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns the points, for results."""
        return {
            "epsilon": [{"epsilon": e, **a.to_dict()} for e, a in self.epsilon],
            "steps": [{"steps": s, **a.to_dict()} for s, a in self.steps],
            "rises": self.rises(),
        }


def robustness_curves(
    classifier: ZeroShotClassifier,
    data: datasets.Dataset,
    threat_model: ThreatModel,
    path: str | Path,
    *,
    steps: int = 20,
    **settings: Any,
) -> dict[str, Curve]:
    """Measures accuracy under PGD against epsilon and against its steps, and draws both, zero-shot and with the adapter.

    Args:
        classifier: What is measured; without an adapter, there is one curve.
        data: A split of a task.
        threat_model: Its norm, and the epsilon at which the steps are swept.
        path: Where to write, without suffix: NAME.json, .png and .svg, and an evaluation for each classifier.
        steps: Steps of the attack while epsilon is swept.
        settings: `batch_size`, `seed`, `overwrite`, `details` and `progress` of `evaluate`.

    Returns:
        The curves by name: "zero-shot", and "CAPT" with an adapter.

    Raises:
        ValueError: As for `evaluate`.
    """
    path = Path(path)
    main_process_says(lambda: make_writable(path.parent, *(f"{path.name}.{kind}" for kind in ("json", "png", "svg"))))
    scale = 1.0 if threat_model.norm == "linf" else threat_model.epsilon / (4 / 255)
    by_epsilon = [PGD(ThreatModel(threat_model.norm, scale * level / 255), steps=steps) for level in EPSILONS]
    by_steps = [PGD(threat_model, steps=s) for s in STEPS]
    curves = {}
    for name in (ZERO_SHOT, ADAPTER) if adapters_in_use(classifier.model) else (ZERO_SHOT,):
        output = path.with_name(f"{path.name}.{name}.json")
        attacks = list(dict.fromkeys([*by_epsilon, *by_steps]))
        with classifier.frozen() if name == ZERO_SHOT else nullcontext():
            evaluation = evaluate(classifier, data, attacks, signs=False, output=output, **settings)
        accuracy = {attack: outcome.accuracy for attack, outcome in zip(attacks, evaluation.attacks, strict=True)}
        curves[name] = Curve(
            epsilon=tuple((attack.threat_model.epsilon, accuracy[attack]) for attack in by_epsilon),
            steps=((0, evaluation.clean), *((attack.steps, accuracy[attack]) for attack in by_steps)),
        )
        for sentence in curves[name].rises():
            logger.warning("%s: %s.", name, sentence)
    if PartialState().is_main_process:
        write_json(path.with_name(f"{path.name}.json"), {name: curve.to_dict() for name, curve in curves.items()})
        draw_curves(curves, threat_model, steps, path)
    return curves


def draw_curves(curves: Mapping[str, Curve], threat_model: ThreatModel, steps: int, path: Path) -> list[Path]:
    """Draws curves with their 95% intervals, as PNG and SVG.

    Args:
        curves: By name.
        threat_model: The one at which the steps were swept.
        steps: The steps at which epsilon was swept.
        path: Where to write, without suffix.

    Returns:
        The paths of the pictures.
    """
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for (name, curve), colour in zip(curves.items(), (GREY, *COLOURS), strict=False):
        for axis, points in ((left, curve.epsilon), (right, curve.steps)):
            places = list(range(len(points)))
            axis.plot(places, [100 * a.value for _, a in points], marker="o", markersize=4, color=colour, label=name)
            low, high = zip(*[a.interval for _, a in points], strict=True)
            axis.fill_between(places, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.15, lw=0)
    epsilons = [e for e, _ in next(iter(curves.values())).epsilon]
    norm = str(threat_model).split()[0]
    _label(left, [_level(e) if threat_model.norm == "linf" else f"{e:.3g}" for e in epsilons], f"{norm} epsilon")
    left.set_title(f"PGD-{steps}", fontsize=10)
    left.set_ylabel("accuracy (%)")
    left.legend(frameon=False)
    _label(right, ["clean", *map(str, STEPS)], "attack steps")
    right.set_title(f"PGD, {threat_model}", fontsize=10)
    n = next(iter(curves.values())).epsilon[0][1].n
    figure.suptitle(f"Accuracy against the strength of the attack (n = {n}; shaded: 95% interval)", fontsize=11)
    return _saved(figure, path)


def draw_recall(results: Mapping[str, Retrieval], path: Path) -> list[Path]:
    """Draws Recall@1 of retrieval against epsilon with 95% intervals, in both directions, as PNG and SVG.

    Under each threat model it is the worst case over the attacks that were run.

    Args:
        results: By the names of the models, of the same images and attacks.
        path: Where to write, without suffix.

    Returns:
        The paths of the pictures.
    """
    figure = new_figure(9, 3.8)
    axes = figure.subplots(1, len(DIRECTIONS), sharey=True)
    first = next(iter(results.values()))
    clean, norms = first.clean, {threat.norm for threat in first.worst_case}
    for axis, (direction, words) in zip(axes, DIRECTIONS.items(), strict=True):
        for (name, result), colour in zip(results.items(), (GREY, *COLOURS), strict=False):
            points = [(0.0, getattr(result.clean, direction)[0])]
            points += [(threat.epsilon, getattr(row, direction)[0]) for threat, row in result.worst_case.items()]
            places = [epsilon * (1 if norms == {"l2"} else 255) for epsilon, _ in points]
            axis.plot(places, [100 * r.value for _, r in points], marker="o", markersize=4, color=colour, label=name)
            low, high = zip(*[r.interval for _, r in points], strict=True)
            axis.fill_between(places, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.15, lw=0)
        axis.set_title(f"{words}, of {getattr(clean, direction)[0].queries} queries", fontsize=10)
        axis.set_xlabel("L2 epsilon" if norms == {"l2"} else "L-inf epsilon, in 255ths")
        axis.set_ylim(0, 100)
        open_axis(axis)
    axes[0].set_ylabel(f"Recall@{clean.image_to_text[0].k} (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("Retrieval under attack (worst case over attacks; shaded: 95% interval)", fontsize=11)
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> list[Path]:
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    with written_whole(path.parent) as folder:
        save_figure(figure, *(folder / target.name for target in paths), dpi=120)
    return paths


def _level(epsilon: float) -> str:
    return f"{epsilon:g}" if epsilon in (0, 1) else f"{255 * epsilon:.3g}/255"


def _label(axis: Any, ticks: Sequence[str], title: str) -> None:
    axis.set_xticks(range(len(ticks)), ticks, fontsize=8)
    axis.set_xlabel(title)
    axis.set_ylim(0, 100)
    open_axis(axis)
