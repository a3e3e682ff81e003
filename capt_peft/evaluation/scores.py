"""Pictures of scores: a reliability diagram, and risk against coverage, clean and under each attack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..plotting import COLOURS, GREY, new_figure, open_axis, save_figure
from ..results.evaluation import Evaluation
from ..results.reliability import BINS
from ..utils.files import written_whole


def draw_scores(evaluation: Evaluation, path: str | Path) -> list[Path]:
    """Draws the reliability diagrams of an evaluation and, where "none of these" was measured, risk against coverage.

    Args:
        evaluation: What was measured.
        path: Where to write, without suffix.

    Returns:
        The paths of the pictures, PNG and SVG.

    Raises:
        ValueError: The evaluation knows nothing of scores, as results of earlier versions.
    """
    if evaluation.reliability is None:
        raise ValueError("The evaluation has no scores: measure again.")
    path, rejection = Path(path), evaluation.rejection
    figure = new_figure(9 if rejection else 4.6, 3.8)
    axes = figure.subplots(1, 2 if rejection else 1, squeeze=False)[0]
    names = ["clean", *(f"{outcome.name}, {outcome.threat_model}" for outcome in evaluation.attacks)]
    diagrams = [evaluation.reliability, *(outcome.reliability for outcome in evaluation.attacks)]
    axes[0].plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    for name, diagram, colour in zip(names, diagrams, (GREY, *COLOURS), strict=False):
        if diagram is not None:
            scores, accuracies, counts = zip(*diagram.points(), strict=True)
            sizes = [4 + 200 * count / diagram.n for count in counts]
            axes[0].plot(scores, accuracies, color=colour, linewidth=0.8, alpha=0.5)
            label = f"{name}: {100 * diagram.ece:.1f}%"
            axes[0].scatter(scores, accuracies, s=sizes, color=colour, label=label, clip_on=False)
    title = f"Calibration error, {BINS} bins (area of a dot: images)"
    _label(axes[0], title, "score of the predicted class", "accuracy", legend="lower right")
    if rejection is not None:
        for name, outcome, colour in zip(names, rejection.outcomes, (GREY, *COLOURS), strict=False):
            coverages, risks = zip(*outcome.curve, strict=True)
            axes[1].plot(coverages, risks, color=colour, label=f"{name}: area {outcome.aurc:.3f}")
            if outcome.risk is not None:  # at the adapter's own threshold
                axes[1].plot(1 - outcome.rejected.value, outcome.risk, marker="o", markersize=6, color=colour)
        title, coverage = "Risk and coverage (dots: at the threshold)", "coverage: share that is accepted"
        _label(axes[1], title, coverage, "risk: share of these that is wrong", legend="upper right")
    figure.suptitle(f"n = {evaluation.clean.n} images of the classes", fontsize=10)
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    with written_whole(path.parent) as folder:
        save_figure(figure, *(folder / target.name for target in paths), dpi=120)
    return paths


def _label(axis: Any, title: str, x: str, y: str, *, legend: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    places = axis.legend(frameon=False, fontsize=7, loc=legend, handletextpad=0.2, borderpad=0)
    for handle in places.legend_handles:
        if hasattr(handle, "set_sizes"):  # not as large as the dots of the first bin
            handle.set_sizes([20])
    open_axis(axis)
