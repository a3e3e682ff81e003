"""What an exported file costs: size, accuracy and time of ONNX, of its int8 version and of torch's program, beside the model.

python benchmarks/export.py outputs/demo            # the demo's adapter on all digits of the test split
python benchmarks/export.py --vit_b32               # sizes and times of a ViT-B/32 with random weights: nothing to be right about
python benchmarks/export.py outputs/demo --picture export.png --json export.json

The attack sees the model itself. Its adversarial images are then shown to each file: accuracy on them is the transfer of an
attack on the float model, not the robust accuracy of the file, which an attacker of the file itself may lower further.
`--square N` also attacks each one directly, without gradients, by Square with N queries. Times are those of the processor, in
turns, the median; give OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_reference import invent_names, make_model, make_processor
from torch import Tensor

from capt_peft import OnnxClassifier, ThreatModel, ZeroShotClassifier, evaluate, export, load_task, parse_attack
from capt_peft.data.pixels import PixelDataset
from capt_peft.plotting import COLOURS, GREY, new_figure, open_axis, save_figure
from capt_peft.randomness import example_generators
from capt_peft.utils.machine import describe_machine, versions

MODEL = "the model"
FILES = {"torch": ("torch", False), "onnx": ("onnx", False), "onnx, int8": ("onnx", True)}
COLUMNS = {"clean": "clean", "transfer": "adversarial images of the model", "square": "Square on itself"}


def export_all(
    classifier: ZeroShotClassifier, folder: Path
) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, Any]]:
    """Returns the model and its files as callables, and of each file its size in bytes and its difference in logits."""
    called: dict[str, Any] = {MODEL: classifier.with_fixed_texts()}
    found: dict[str, Any] = {MODEL: {}}
    for name, (form, int8) in FILES.items():
        path = folder / f"{len(called)}.{'onnx' if form == 'onnx' else 'pt2'}"
        difference = export(classifier, path, form, int8=int8)
        called[name] = OnnxClassifier(path) if form == "onnx" else torch.export.load(path).module()
        found[name] = {"bytes": path.stat().st_size, "difference": difference}
    return called, found


def measure_accuracy(
    called: dict[str, Callable[[Tensor], Tensor]], pixels: Tensor, labels: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Returns of each its clean accuracy, that on the model's adversarial images, and that under Square on itself."""
    threat = ThreatModel("linf", args.epsilon)
    parts = []
    for start in range(0, len(labels), 100):
        images, true = pixels[start : start + 100], labels[start : start + 100]
        generators = example_generators(args.seed, range(start, start + len(true)), stream="evaluation")
        parts.append(parse_attack(args.attack, threat)(called[MODEL], images, true, generators))
    adversarial = torch.cat(parts)
    found: dict[str, Any] = {}
    for name, one in called.items():
        options = {"signs": False, "progress": False, "seed": args.seed}
        found[name] = {
            kind: evaluate(one, (images, labels), **options).clean.to_dict()
            for kind, images in (("clean", pixels), ("transfer", adversarial))
        }
        if args.square:
            few = slice(args.square_images)
            attack = parse_attack(f"square-{args.square}", threat)
            outcome = evaluate(one, (pixels[few], labels[few]), attack, **options).attacks[0]
            found[name]["square"] = outcome.accuracy.to_dict()
    return found


def measure_time(
    called: dict[str, Callable[[Tensor], Tensor]], size: tuple[int, int], repetitions: int
) -> dict[str, Any]:
    """Returns of each its seconds per image, alone and in batches of 32: medians of as many turns, after one that warms up.

    They are seconds of the processor, which with one thread are those of the clock where nothing else runs.
    """
    rounds: dict[str, dict[str, list[float]]] = {name: {"1": [], "32": []} for name in called}
    with torch.inference_mode():
        for batch in ("1", "32"):
            pixels = torch.rand(int(batch), 3, *size, generator=torch.Generator().manual_seed(0))
            for turn in range(repetitions + 1):
                for name, one in called.items():
                    start = time.process_time()
                    one(pixels)
                    if turn:
                        rounds[name][batch].append((time.process_time() - start) / int(batch))
    return {name: {"seconds": {b: statistics.median(r) for b, r in by.items()}} for name, by in rounds.items()}


def table(record: dict[str, Any]) -> str:
    """Returns a record as Markdown."""
    kinds = [kind for kind in COLUMNS if kind in record["files"][MODEL]]
    titles = ["", "MB", "logits differ by", *(f"{COLUMNS[kind]}, %" for kind in kinds), "ms, alone", "ms, of 32"]
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, one in record["files"].items():
        size = f"{one['bytes'] / 1e6:.2f}" if "bytes" in one else ""
        difference = f"{one['difference']:.1e}" if "difference" in one else ""
        shares = [f"{100 * one[kind]['accuracy']:.1f}" for kind in kinds]
        times = [f"{1000 * one['seconds'][batch]:.2f}" for batch in ("1", "32")]
        rows.append(f"| {' | '.join([name, size, difference, *shares, *times])} |")
    return "\n".join([*rows, "", f"{record['machine']}; {record['date']}; torch {record['versions']['torch']}, onnxruntime "
                      f"{record['versions']['onnxruntime']}."])  # fmt: skip


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws accuracies and times of the model and its files."""
    files = record["files"]
    kinds = [kind for kind in COLUMNS if kind in files[MODEL]]
    figure = new_figure(9, 3.4)
    accuracy, times = figure.subplots(1, 2, width_ratios=(len(kinds) + 1, 2))
    colours = (GREY, *COLOURS)
    for i, (name, one) in enumerate(files.items()):
        for axis, heights in (
            (accuracy, [100 * one[kind]["accuracy"] for kind in kinds]),
            (times, [1000 * one["seconds"][batch] for batch in ("1", "32")]),
        ):
            places = [place + 0.2 * (i - 1.5) for place in range(len(heights))]
            bars = axis.bar(places, heights, 0.18, color=colours[i], label=name)
            axis.bar_label(bars, fmt="{:.1f}", fontsize=7)
            if axis is accuracy and name == "onnx, int8" and "square" in kinds:
                bars[kinds.index("square")].set(hatch="////", edgecolor="white")
                figure.supxlabel(
                    "Hatched: Square sees int8's rounded scores here, so that this is no measure of robustness.",
                    fontsize=8,
                )
    accuracy.set(title="Right answers, %", ylim=(0, 105))
    accuracy.set_xticks(range(len(kinds)), [COLUMNS[kind].replace(" of ", "\nof ") for kind in kinds])
    times.set(title="Milliseconds per image")
    times.set_xticks((0, 1), ("one image", "in batches of 32"))
    for axis in (accuracy, times):
        open_axis(axis)
    times.legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=150)


def load(args: argparse.Namespace) -> tuple[ZeroShotClassifier, Tensor | None, Tensor | None]:
    """Returns the classifier, and the pixels and labels that it is measured on."""
    if args.vit_b32:
        processor = make_processor(tiny=False)
        names = invent_names(processor.tokenizer, 100)
        return ZeroShotClassifier(make_model(False, processor.tokenizer).eval(), processor, names), None, None
    task = load_task(args.dataset_name)
    classifier = ZeroShotClassifier.from_pretrained(args.adapter, class_names=task.class_names)
    split = task[args.split] if args.limit is None else task[args.split].shuffle(seed=0).select(range(args.limit))
    data = PixelDataset(split, classifier.transform)
    return classifier, torch.stack([data[i]["pixels"] for i in range(len(data))]), torch.tensor(data.labels)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="?", help="folder of a CAPT adapter")
    parser.add_argument(
        "--vit_b32", action="store_true", help="a CLIP ViT-B/32 with random weights and an adapter instead"
    )
    parser.add_argument("--dataset_name", default="digits")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="images; by default all")
    parser.add_argument("--attack", default="pgd-20")
    parser.add_argument("--epsilon", default="10/255")
    parser.add_argument("--square", type=int, default=0, help="queries of Square on each file itself; 0: leave it out")
    parser.add_argument("--square_images", type=int, default=200, help="images that it gets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=21, help="timed turns")
    parser.add_argument("--picture", type=Path, help="draw the figures into this file")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    args = parser.parse_args(arguments)
    if (args.adapter is None) != args.vit_b32:
        parser.error("give an adapter, or --vit_b32")
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns what `--json` writes."""
    args = parse(arguments)
    classifier, pixels, labels = load(args)
    with tempfile.TemporaryDirectory() as folder:
        called, files = export_all(classifier, Path(folder))
        if pixels is not None and labels is not None:
            files = {name: {**one, **measured} for (name, one), measured in
                     zip(files.items(), measure_accuracy(called, pixels, labels, args).values(), strict=True)}  # fmt: skip
        for name, measured in measure_time(called, classifier.transform.size, args.repetitions).items():
            files[name] |= measured
    record = {
        "settings": {name: str(value) for name, value in vars(args).items() if name not in ("json", "picture")},
        "files": files, "machine": describe_machine(), "date": time.strftime("%Y-%m-%d"),
        "versions": versions("onnx", "onnxruntime", "onnxscript"),
    }  # fmt: skip
    print(table(record))
    if args.picture:
        draw(record, args.picture)
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    return record


if __name__ == "__main__":
    main()
