"""Fronts: clean and robust accuracy over strengths of an adapter, measured white box at each of them, and drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from torch import Tensor

from ..attacks import Attack
from ..clip.classifier import ZeroShotClassifier
from ..plotting import COLOURS, GREY, new_figure, open_axis, save_figure
from ..results.evaluation import Evaluation
from ..results.strength import StrengthFront, StrengthPoint, check_keep_clean
from ..tuner.config import check_strength
from ..tuner.fingerprint import adapter_fingerprint
from ..tuner.model import capt_config
from ..utils.files import make_writable, written_whole
from ..utils.outputs import main_process_says
from .loop import evaluate

STRENGTHS = (0, 0.1, 0.25, 0.5, 0.75, 1)


def strength_front(
    classifier: ZeroShotClassifier,
    data: datasets.Dataset | tuple[Tensor, Tensor],
    attacks: Attack | Sequence[Attack],
    strengths: Sequence[float] = STRENGTHS,
    *,
    keep_clean: float | None = None,
    output: str | Path | None = None,
    **settings: Any,
) -> StrengthFront:
    """Measures clean and robust accuracy at each strength of the active adapter; attacks see the model at that strength.

    The classifier has its own strength again afterwards, also if something raises. A strength that is chosen on images must be
    chosen on validation images: accuracy on the images that chose it is too high.

    Args:
        classifier: A classifier with a CAPT adapter.
        data: A split of a task, or pixels (n, 3, H, W) in [0, 1] and labels (n,).
        attacks: One attack, or several of one threat model, whose worst case is then robust accuracy.
        strengths: From 0 to 1; 0, the base model, is measured in any case.
        keep_clean: The rule of the front's `chosen`, see `StrengthFront.choose`; by default the best H.
        output: JSON file for the front. Beside it lies an evaluation for each strength (NAME.0.5.json), from which a killed front
            goes on when it is measured again.
        settings: `batch_size`, `seed`, `overwrite`, `details` and `progress` of `evaluate`.

    Returns:
        The front, the same in every process.

    Raises:
        TypeError: A strength that is not a number.
        ValueError: No CAPT adapter, or one with `modules_to_save`; strengths out of range or named twice; attacks of no or of
            several threat models; or as for `evaluate`.
    """
    attacks = [attacks] if isinstance(attacks, Attack) else list(attacks)
    order = check_strengths(classifier, strengths)
    check_keep_clean(keep_clean)
    if len({attack.threat_model for attack in attacks}) != 1:
        raise ValueError(
            "A front needs an attack, or several of one threat model: robust accuracy is their worst case."
        )
    output = None if output is None else Path(output)
    if output is not None:
        if output.suffix != ".json":
            raise ValueError(f"output={str(output)!r} must end in .json.")
        main_process_says(lambda: make_writable(output.parent, output.name))
    evaluations = {}
    with strength_kept(classifier):
        for strength in order:
            classifier.strength = strength
            file = None if output is None else output.with_name(f"{output.stem}.{strength!r}.json")
            evaluations[strength] = evaluate(classifier, data, attacks, signs=False, output=file, **settings)
    front = StrengthFront(
        tuple(StrengthPoint(strength, each.clean, each.robust) for strength, each in evaluations.items()),
        _common(evaluations[0.0], adapter_fingerprint(classifier.model, strength=1)),
        evaluations[0.0].machine,
        keep_clean,
    )
    if output is not None and PartialState().is_main_process:
        front.save(output)
    return front


@contextmanager
def strength_kept(classifier: ZeroShotClassifier) -> Iterator[None]:
    """Within it the strength may be set to anything; afterwards it is what it was."""
    before = classifier.strength
    try:
        yield
    finally:
        classifier.strength = before


def check_strengths(classifier: ZeroShotClassifier, strengths: Sequence[float]) -> list[float]:
    """Returns the strengths of a front in increasing order, from 0 on; raises as `strength_front`, which measures at them."""
    modules = capt_config(classifier.model).modules_to_save
    for strength in (0, *strengths):
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise TypeError(f"strengths={strengths!r} must be numbers from 0 to 1.")
        check_strength(strength, modules)
    if len(set(strengths)) < len(strengths):
        raise ValueError(f"strengths={strengths!r} name a strength twice.")
    return sorted({0.0, *map(float, strengths)})


def _common(evaluation: Evaluation, fingerprint: str) -> dict[str, Any]:
    """Returns the configuration of all points, less what depends on the strength."""
    configuration = evaluation.configuration
    model = {key: value for key, value in configuration["model"].items() if key not in ("logits", "adapters")}
    config = {key: value for key, value in model["adapter"]["config"].items() if key != "strength"}
    model["adapter"] = {**model["adapter"], "fingerprint": fingerprint, "config": config}
    return {**configuration, "model": model}


def draw_front(front: StrengthFront, path: str | Path) -> list[Path]:
    """Draws a front with its 95% intervals, over the strength and as robust against clean accuracy, as PNG and SVG.

    Args:
        front: The front; its chosen strength is marked.
        path: Where to write, without suffix.

    Returns:
        The paths of the pictures.
    """
    path = Path(path)
    figure = new_figure(9, 3.8)
    left, right = figure.subplots(1, 2)
    strengths = [point.strength for point in front.points]
    for name, colour in (("clean", COLOURS[0]), ("robust", COLOURS[1])):
        accuracies = [getattr(point, name) for point in front.points]
        left.plot(strengths, [100 * a.value for a in accuracies], marker="o", markersize=4, color=colour, label=name)
        low, high = zip(*[a.interval for a in accuracies], strict=True)
        left.fill_between(strengths, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.15, lw=0)
    left.plot(strengths, [100 * point.h for point in front.points], ls="--", color=COLOURS[2], label="H")
    left.axvline(front.chosen.strength, color=GREY, lw=1, ls=":")
    left.set_xticks(strengths, [f"{s:g}" for s in strengths], fontsize=8)
    left.set_xlabel("strength (0: base model, 1: the whole adapter)")
    left.set_ylabel("accuracy (%)")
    left.set_ylim(0, 100)
    left.legend(frameon=False)
    places = [(100 * point.clean.value, 100 * point.robust.value) for point in front.points]
    right.plot(*zip(*places, strict=True), marker="o", markersize=4, color=COLOURS[0])
    for place, point in zip(places, front.points, strict=True):
        bars = [
            [[100 * abs(limit - accuracy.value)] for limit in accuracy.interval]
            for accuracy in (point.clean, point.robust)
        ]
        right.errorbar(*place, xerr=bars[0], yerr=bars[1], color=COLOURS[0], alpha=0.35, elinewidth=0.8)
        right.annotate(f"{point.strength:g}", place, textcoords="offset points", xytext=(-7, 5), ha="right", fontsize=8)
    chosen = front.chosen
    right.plot(
        100 * chosen.clean.value, 100 * chosen.robust.value,
        marker="o", markersize=11, mfc="none", color=GREY, ls="", label=f"chosen: {chosen.strength:g}",
    )  # fmt: skip
    right.margins(0.12)
    right.set_xlabel("clean accuracy (%)")
    right.set_ylabel("robust accuracy (%)")
    right.legend(frameon=False, loc="upper left")
    for axis in (left, right):
        open_axis(axis)
    figure.suptitle(f"{front.attack}; {front.images}; shaded, and bars: 95% interval", fontsize=11)
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    with written_whole(path.parent) as folder:
        save_figure(figure, *(folder / target.name for target in paths), dpi=120)
    return paths
