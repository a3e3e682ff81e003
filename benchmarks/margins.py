"""What tuning does to clean images: which ones are forgotten and learned, their margins, and where their features went.

python benchmarks/margins.py outputs/search.jsonl --methods "capt (rate 0.3),adv-vlp (rate 0.3)" --output outputs/margins.json

reads the adapters that `capt-peft benchmark` kept and measures them, and zero-shot, on validation images of what they were
tuned on. The JSON file has the figures of every row and task. Beside it lie the picture and, in lines, what they are of, image
by image; run again, it resumes after the last of them.

For each image it computes the margin (the true class's logit less the largest other), clean and under PGD-20, white box; the
prediction; and the cosine of its clean feature with the frozen model's and with its own under attack. An image is forgotten if
zero-shot is right on it and the tuned model is not, and learned the other way round. Among the figures:

- "forgotten_of_sure": forgotten images of the half of its right answers that zero-shot was surer of.
- "alike": the mean cosine of the clean features of two images, 1 where the image tower gives the same for all of them.
- "information": what a clean prediction says about its image, (H(mean p) - mean H(p)) / log N, 0 where all predictions are the
  same and 1 where they are certain and even.
- "attacked_loss": the cross-entropy of attacked images over log N, the price of one even prediction for all images.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kept import Kept, or_one_sentence, read_kept, seeds_in
from torch import Tensor
from tqdm.auto import tqdm

from capt_peft import ZeroShotClassifier, parse_attack
from capt_peft.attacks.losses import margin
from capt_peft.benchmark import Lines
from capt_peft.benchmark.inputs import drawn, read_task, template_of
from capt_peft.benchmark.plan import ZERO_SHOT, shots_name
from capt_peft.evaluation.images import Examples
from capt_peft.plotting import COLOURS, GREY, RIGHT, WRONG, new_figure, open_axis, save_figure
from capt_peft.randomness import example_generators
from capt_peft.utils.files import write_json
from capt_peft.utils.machine import describe_machine, versions

ATTACK = (
    "pgd-20"  # of full length on every image: one that leaves an image once it is broken says nothing of its margin
)
SPLIT = "validation"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")  # of tasks
GRID = np.linspace(-6, 10, 161)  # margins at which the picture counts images

Row = dict[str, Any]  # an adapter, or zero-shot, on its task


def measure(kept: Kept) -> Row:
    """Returns what an adapter does to each validation image of its task."""
    cell = kept.cell
    model, processor = kept.load()
    task = read_task(cell.task, "all", None)
    classifier = ZeroShotClassifier(
        model, processor, task.class_names, template_of(cell, task), class_texts=task.class_texts
    )
    data = Examples(drawn(task[SPLIT], cell.limit), classifier)
    pixels, labels = data.batch(range(len(data)), classifier.device)
    with classifier.frozen():
        base, _, base_texts = look(classifier, pixels)
    clean, logits, texts = look(classifier, pixels)
    generators = example_generators(cell.seed, range(len(data)), stream="evaluation", device=pixels.device)
    attacked, logits_attacked, _ = look(
        classifier, parse_attack(ATTACK, cell.threat)(classifier.with_fixed_texts(), pixels, labels, generators)
    )
    by_image = {
        "label": labels,
        "prediction": logits.argmax(1),
        "clean": -margin(logits, labels),
        "attacked": -margin(logits_attacked, labels),
        "to_frozen": (clean * base).sum(1),
        "to_attacked": (clean * attacked).sum(1),
    }
    own = ~torch.eye(len(clean), dtype=torch.bool)
    whole = {
        "texts_to_frozen": (texts * base_texts).sum(1).mean(),
        "alike": (clean @ clean.T).cpu()[own].mean(),
        "information": information(logits.softmax(1)),
        "attacked_loss": F.cross_entropy(logits_attacked, labels) / np.log(logits.shape[1]),
    }
    return {
        **identity(kept),
        **{name: round(float(value), 4) for name, value in whole.items()},
        "images": {name: [round(value, 3) for value in values.tolist()] for name, values in by_image.items()},
    }


def identity(kept: Kept) -> Row:
    """Returns what the row of an adapter is of; its key has all of it."""
    cell = kept.cell
    found = {
        "row": cell.label, "task": cell.task, "seed": cell.seed, "shots": cell.shots, "attack": ATTACK,
        "threat": str(cell.threat), "model": cell.model, "limit": cell.limit, "adapter": kept.line.get("adapter_fingerprint"),
    }  # fmt: skip
    return {"key": json.dumps(found), **found}


@torch.no_grad()
def look(classifier: ZeroShotClassifier, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns normalised image features (n, D), logits (n, N) and normalised text features (N, D)."""
    features, texts = classifier.image_features(pixels), classifier.text_features()
    return features, classifier.logits(features, texts), texts


def information(p: Tensor) -> Tensor:
    """Returns what predictions (n, N) say about their images, in [0, 1]: their mean's entropy less their own, over log N."""
    entropies = torch.special.entr(torch.cat([p.mean(0, keepdim=True), p])).sum(1)
    return (entropies[0] - entropies[1:].mean()) / np.log(p.shape[1])


def with_zero_shot(found: Sequence[Kept]) -> list[Kept]:
    """Returns a row of the base model for each task, and the tuned adapters, each once.

    Raises:
        ValueError: They are of several models, threat models or numbers of images, or two of them would be one row.
    """
    places = {(of.cell.model, str(of.cell.threat), of.cell.limit) for of in found}
    if len(places) > 1:
        raise ValueError(
            "The adapters are of more than one model, threat model or limit, whose images cannot be compared: "
            f"{'; '.join(sorted(f'{model}, {threat}, limit {limit}' for model, threat, limit in places))}."
        )
    tuned: dict[tuple[str, str, int], Kept] = {}
    for of in (of for of in found if of.cell.tuned):
        one = tuned.setdefault((of.cell.label, of.cell.task, of.cell.seed), of)
        if one.folder != of.folder:
            raise ValueError(
                f"{one.cell} has adapters of different settings. Keep them in files of their own, or give one a variant."
            )
    bases = {
        of.cell.task: Kept(replace(of.cell, method=ZERO_SHOT, variant="", shots=0, seed=0), {}, Path())
        for of in tuned.values()
    }
    return [*bases.values(), *tuned.values()]


# ------------------------------------------------------------------------------------------------------------- figures


def figures_of(row: Row, zero_shot: Row) -> dict[str, float]:
    """Returns the figures of a row, shares in percent of its images."""
    images = {name: np.array(values) for name, values in row["images"].items()}
    before = {name: np.array(values) for name, values in zero_shot["images"].items()}
    knew, right = before["prediction"] == before["label"], images["prediction"] == images["label"]
    sure = before["clean"] > np.median(before["clean"][knew]) if knew.any() else knew
    return {
        "clean": 100 * right.mean(),
        "robust": 100 * (right & (images["attacked"] > 0)).mean(),
        "forgotten": 100 * (knew & ~right).mean(),
        "forgotten_of_sure": 100 * (knew & sure & ~right).mean(),
        "learned": 100 * (~knew & right).mean(),
        "median_margin": np.median(images["clean"]),
        "median_margin_attacked": np.median(images["attacked"]),
        "to_frozen": images["to_frozen"].mean(),
        "to_attacked": images["to_attacked"].mean(),
        "texts_to_frozen": row["texts_to_frozen"],
        "alike": row["alike"],
        "information": row["information"],
        "attacked_loss": row["attacked_loss"],
    }


def summary(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the figures by row and task, averaged over seeds, and as "all" over tasks too, each counting as much."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in dict.fromkeys(row["row"] for row in rows):
        by_task: dict[str, dict[str, float]] = {}
        for task in dict.fromkeys(row["task"] for row in rows if row["row"] == name):
            seeds = [figures_of(row, base_of(row, rows)) for row in rows if (row["row"], row["task"]) == (name, task)]
            by_task[task] = {figure: fmean(of[figure] for of in seeds) for figure in seeds[0]}
        every = {figure: fmean(of[figure] for of in by_task.values()) for figure in next(iter(by_task.values()))}
        found[name] = {
            task: {figure: round(float(value), 3) for figure, value in of.items()}
            for task, of in {"all": every, **by_task}.items()
        }
    return found


def base_of(row: Row, rows: Sequence[Row]) -> Row:
    """Returns the row of zero-shot on the same images."""
    return next(other for other in rows if (other["row"], other["task"]) == (ZERO_SHOT, row["task"]))


# ------------------------------------------------------------------------------------------------------------- picture


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws what was forgotten and learned, the margins, and forgetting over how alike predictions have become."""
    found = summary(rows)
    tuned = [name for name in found if name != ZERO_SHOT]
    colours = {ZERO_SHOT: GREY, **{name: COLOURS[i % len(COLOURS)] for i, name in enumerate(tuned)}}
    figure = new_figure(9.6, 4.2)
    bars, margins, points = figure.subplots(1, 3, width_ratios=(1, 1.25, 1.15))
    draw_bars(bars, {name: found[name]["all"] for name in tuned}, colours)
    draw_margins(margins, rows, colours)
    draw_points(points, rows, colours)
    tasks, seeds = {row["task"] for row in rows}, {row["seed"] for row in rows if row["row"] != ZERO_SHOT}
    figure.suptitle(
        f"{len(tasks)} task{'s' * (len(tasks) > 1)}, {shots_name(rows[-1]['shots'])}, {len(seeds)} "
        f"seed{'s' * (len(seeds) > 1)}, {SPLIT} images; attack: {ATTACK}, {rows[0]['threat']}",
        fontsize=10,
    )
    handles, names = margins.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=10)
    save_figure(figure, path, dpi=110)


def draw_bars(axis: Any, found: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> None:
    """Draws forgotten images to the left and learned ones to the right, a line for each row."""
    for place, of in enumerate(found.values()):
        for value, colour, side in ((-of["forgotten"], WRONG, "right"), (of["learned"], RIGHT, "left")):
            axis.barh(place, value, height=0.55, color=colour, alpha=0.8)
            shift = 3 if value >= 0 else -3
            style = {"textcoords": "offset points", "ha": side, "va": "center", "fontsize": 9}
            axis.annotate(f"{abs(value):.0f}", (value, place), xytext=(shift, 0), **style)
    axis.set_yticks(range(len(found)), list(found), fontsize=9)
    for tick, name in zip(axis.get_yticklabels(), found, strict=True):
        tick.set_color(colours[name])
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.axvline(0, color="black", lw=0.8)
    axis.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axis.set_xlabel("images (%), against zero-shot")
    axis.set_title("forgotten | learned", fontsize=10)
    open_axis(axis)


def draw_margins(axis: Any, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    """Draws which share of the images has at least a margin, clean and under attack; at 0 it is the accuracy."""
    for name, colour in colours.items():
        of_row = [row["images"] for row in rows if row["row"] == name]
        for kind, style in (("clean", "-"), ("attacked", "--")):
            share = [(np.array(images[kind])[:, None] > GRID).mean(0) for images in of_row]
            label = name if kind == "clean" else None
            axis.plot(GRID, 100 * np.mean(share, 0), color=colour, ls=style, lw=1.6, label=label)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_ylim(0, 100)
    axis.set_xlim(GRID[0], GRID[-1])
    axis.set_xlabel("margin: true class less the next")
    axis.set_ylabel("images above it (%)")
    axis.set_title("clean (lines), attacked (dashed)", fontsize=10)
    open_axis(axis)


def draw_points(axis: Any, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    """Draws forgetting over what predictions say about their images, a point for each adapter."""
    tasks = dict(zip(dict.fromkeys(row["task"] for row in rows), MARKERS * len(rows), strict=False))
    for row in rows:
        base = base_of(row, rows)
        of, knew = figures_of(row, base), figures_of(base, base)["clean"]
        if row["row"] != ZERO_SHOT and knew:
            place = of["information"], 100 * of["forgotten"] / knew
            axis.plot(*place, tasks[row["task"]], color=colours[row["row"]], ms=6, alpha=0.75)
    for task, marker in tasks.items():
        axis.plot([], [], marker, color=GREY, ms=6, label=task)
    axis.legend(frameon=False, fontsize=9)
    axis.set_ylim(bottom=-2)
    axis.set_xlim(0, 1)
    axis.set_xlabel("information of a clean prediction\n(0: the same for every image)")
    axis.set_ylabel("forgotten of what zero-shot knew (%)")
    axis.set_title("a point for each adapter", fontsize=10)
    open_axis(axis)


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Measures what is left, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="file of lines of capt-peft benchmark; its adapters are beside it")
    parser.add_argument(
        "--methods", required=True, help='rows of its tables, such as "capt (rate 0.3),adv-vp (rate 0.3)"'
    )
    parser.add_argument("--seeds", help="seeds, such as 0,1,2; by default all")
    parser.add_argument("--shots", default="16", help="the number of shots of the protocol few-shot")
    parser.add_argument("--output", type=Path, default=Path("outputs/margins.json"), help="JSON file of the figures")
    args = parser.parse_args()
    seeds = seeds_in(args.seeds)
    if args.output.suffix != ".json" or args.output.with_suffix(".jsonl").resolve() == args.lines.resolve():
        parser.error(f"--output {args.output}: it must end in .json, and its lines must not be those of the benchmark")
    found = [of for name in args.methods.split(",") for of in read_kept(args.lines, [name], seeds)]
    asked = with_zero_shot([of for of in found if (of.cell.protocol, str(of.cell.shots)) == ("few-shot", args.shots)])
    if not asked:
        parser.error(
            f"{args.lines} has no adapters of these methods and seeds with {args.shots} shots (--shots takes another number)"
        )
    lines = Lines(args.output.with_suffix(".jsonl"))
    known = lines.read()
    for kept in tqdm([kept for kept in asked if identity(kept)["key"] not in known], unit="adapter"):
        lines.append(measure(kept))
    known = lines.read()
    rows = [known[identity(kept)["key"]] for kept in asked]
    write_json(
        args.output,
        {
            "command": shlex.join(["python", *sys.argv]),
            "machine": describe_machine(),
            "versions": versions(),
            "images": f"{SPLIT}, {ATTACK}, {rows[0]['threat']}",
            "figures": summary(rows),
        },
    )
    draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    or_one_sentence(main)
