"""Pictures of scores: a reliability diagram, and risk against coverage, clean and under each attack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..plotting import COLOURS, GREY, new_figure, open_axis, save_figure
from ..results.evaluation import Evaluation
from ..utils.files import written_whole

FEWEST = 5  # images of a bin that is drawn: accuracy over fewer is noise


def draw_scores(evaluation: Evaluation, path: str | Path) -> list[Path]:
    """Draws the reliability diagrams of an evaluation and, where "none of these" was measured, risk against coverage.

    Bins of fewer than 5 images are not drawn; they count in the calibration error.

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
    figure = new_figure(9 if rejection else 4.6, 4.4)
    axes = figure.subplots(1, 2 if rejection else 1, squeeze=False)[0]
    names = ["clean", *(f"{outcome.name}, {outcome.threat_model}" for outcome in evaluation.attacks)]
    diagrams = [evaluation.reliability, *(outcome.reliability for outcome in evaluation.attacks)]
    axes[0].plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    for name, diagram, colour in zip(names, diagrams, (GREY, *COLOURS), strict=False):
        if diagram is not None:
            shown = [point for point in diagram.points() if point[2] >= FEWEST]
            places = [point[0] for point in shown], [point[1] for point in shown]
            sizes = [4 + 200 * count / diagram.n for _, _, count in shown]
            axes[0].plot(*places, color=colour, linewidth=0.8, alpha=0.5)
            label = f"{name}: calibration error {100 * diagram.ece:.1f}%"
            axes[0].scatter(*places, s=sizes, color=colour, label=label, clip_on=False)
    title = f"Bins of {FEWEST} images or more (area of a dot: images)"
    _label(axes[0], title, "score of the predicted class", "accuracy")
    if rejection is not None:
        for name, outcome, colour in zip(names, rejection.outcomes, (GREY, *COLOURS), strict=False):
            coverages, risks = zip(*outcome.curve, strict=True)
            axes[1].plot(coverages, risks, color=colour, label=f"{name}: risk area {outcome.aurc:.3f}")
            if outcome.risk is not None:  # at the adapter's own threshold
                axes[1].plot(1 - outcome.rejected.value, outcome.risk, marker="o", markersize=6, color=colour)
        title, coverage = "Risk and coverage (dots: at the threshold)", "coverage: share that is accepted"
        _label(axes[1], title, coverage, "risk: share of these that is wrong")
    figure.suptitle(f"n = {evaluation.clean.n} images of the classes", fontsize=10)
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    with written_whole(path.parent) as folder:
        save_figure(figure, *(folder / target.name for target in paths), dpi=120)
    return paths


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}  # beside no point
    places = axis.legend(frameon=False, fontsize=8, handletextpad=0.5, borderpad=0, **below)
    for handle in places.legend_handles:
        if hasattr(handle, "set_sizes"):  # not as large as the dots of the first bin
            handle.set_sizes([20])
    open_axis(axis)
