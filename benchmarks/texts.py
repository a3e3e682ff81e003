"""One template against several: zero-shot and tuned, clean and under PGD-20, on toy tasks.

python benchmarks/texts.py                    # everything; the figures are kept, so that a killed run goes on
python benchmarks/texts.py --draw             # the table and the picture of what has been measured
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import set_seed

from capt_peft import CaptTrainingArguments, ThreatModel, ZeroShotClassifier, evaluate, load_task, parse_attack
from capt_peft.clip.loading import load_model
from capt_peft.data import TEMPLATES, Task
from capt_peft.methods import make_trainer
from capt_peft.plotting import COLOURS, GREY, new_figure, open_axis, save_figure

HERE = Path(__file__).parents[1] / "docs"
FIGURES, PICTURE = HERE / "results" / "texts" / "figures.json", HERE / "texts.svg"
TASKS, SEEDS, SHOTS, IMAGES = ("digits", "shapes"), (0, 1, 2), 16, 100
OPENINGS = ("a photo of", "a picture of", "an image of", "a drawing of")  # those of tiny CLIP's captions
SETS = ("the task's own", "four openings", "clip-imagenet-7", "clip-imagenet-80")
TUNED = SETS[:3]  # with 80 texts of each class a step takes many times as long
THREAT = ThreatModel("linf", "4/255")
ATTACK = parse_attack("pgd-20", THREAT)


def templates(task: Task, name: str) -> str | list[str]:
    """Returns the templates of a set for a task."""
    own = str(task.template)
    return {"the task's own": own, "four openings": [own.replace(OPENINGS[0], opening) for opening in OPENINGS]}.get(
        name, TEMPLATES.get(name, own)
    )


def measure(classifier: ZeroShotClassifier, task: Task) -> list[float]:
    """Returns clean and robust accuracy in percent on test images that are drawn by seed 0."""
    images = task["test"].shuffle(seed=0).select(range(min(IMAGES, len(task["test"]))))
    found = evaluate(classifier.eval(), images, ATTACK, signs=False, progress=False)
    return [round(100 * accuracy.value, 1) for accuracy in (found.clean, found.robust)]


def tuned(task: Task, seed: int, folder: str) -> ZeroShotClassifier:
    """Returns a classifier whose adapter was tuned on 16 images per class, with the toy suite's settings and one text prompt."""
    args = CaptTrainingArguments(
        folder, seed=seed, epsilon="4/255", attack_steps=2, max_steps=40, learning_rate=0.3, save_strategy="no", use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, report_to=[],
    )  # fmt: skip
    set_seed(seed)
    base, processor = load_model("tiny_clip")
    few = task.few_shot(SHOTS, seed)
    trainer = make_trainer("capt", base, args, task=few, processor=processor, prompts={"num_text_tokens": 1})
    trainer.train()
    return trainer.classifier


def run(known: dict[str, list[float]]) -> None:
    """Measures what is not known yet, and writes it down after each figure."""
    for name in TASKS:
        task = load_task(name)
        for texts in SETS:
            with_texts = replace(task, template=templates(task, texts))
            for seed in (None, *(SEEDS if texts in TUNED else ())):
                key = f"{name}, {texts}, {'zero-shot' if seed is None else f'seed {seed}'}"
                if key in known:
                    continue
                if seed is None:
                    model, processor = load_model("tiny_clip")
                    classifier = ZeroShotClassifier(model, processor, task.class_names, with_texts.template)
                    known[key] = measure(classifier, task)
                else:
                    with TemporaryDirectory() as folder:
                        known[key] = measure(tuned(with_texts, seed, folder), task)
                print(key, known[key], flush=True)
                FIGURES.parent.mkdir(parents=True, exist_ok=True)
                FIGURES.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def figures(known: dict[str, list[float]], task: str, texts: str, kind: str) -> list[list[float]]:
    """Returns clean and robust accuracy of zero-shot, or of each seed."""
    keys = (
        [f"{task}, {texts}, zero-shot"] if kind == "zero-shot" else [f"{task}, {texts}, seed {seed}" for seed in SEEDS]
    )
    return [known[key] for key in keys if key in known]


def table(known: dict[str, list[float]]) -> str:
    """Returns the figures as Markdown; a spread is the standard deviation over the seeds."""
    lines = ["| task | texts | zero-shot | tuned |", "|---|---|---:|---:|"]
    for task in TASKS:
        for texts in SETS:
            cells = []
            for kind in ("zero-shot", "tuned"):
                found = [*zip(*figures(known, task, texts, kind), strict=True)]
                cells.append(
                    " / ".join(f"{mean(v):.1f}" + (f" ± {stdev(v):.1f}" if len(v) > 1 else "") for v in found) or "–"
                )
            lines.append(f"| {task} | {texts} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(known: dict[str, list[float]]) -> None:
    """Draws clean and robust accuracy of every set of texts, a panel for each task."""
    figure = new_figure(6.4, 5)
    axes = figure.subplots(2, len(TASKS), sharex=True, sharey="row")
    for column, task in enumerate(TASKS):
        for row, what in enumerate(("clean", "PGD-20, 4/255")):
            axis: Any = axes[row][column]
            for kind, colour, shift in (("zero-shot", GREY, -0.12), ("tuned", COLOURS[0], 0.12)):
                for place, texts in enumerate(SETS):
                    values = [pair[row] for pair in figures(known, task, texts, kind)]
                    axis.plot([place + shift] * len(values), values, "o", color=colour, alpha=0.75, ms=5)
                    if values:
                        axis.plot([place + shift - 0.1, place + shift + 0.1], [mean(values)] * 2, color=colour, lw=2)
            open_axis(axis)
            axis.set_xticks(
                range(len(SETS)), ["task's", "4 openings", "CLIP's 7", "CLIP's 80"], rotation=35, ha="right"
            )
            axis.set_xlim(-0.5, len(SETS) - 0.5)
            if row == 0:
                axis.set_title(task, fontsize=10)
            if column == 0:
                axis.set_ylabel(f"{what}, %")
    handles = [
        axes[0][0].plot([], [], "o", color=colour, label=label)[0]
        for label, colour in (("zero-shot", GREY), ("tuned, 3 seeds", COLOURS[0]))
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, PICTURE, dpi=100)


def main() -> None:
    """Measures, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}
    if not args.draw:
        run(known)
    print(table(known))
    draw(known)


if __name__ == "__main__":
    main()
