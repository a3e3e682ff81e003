"""What bf16, fp16 and torch.compile save in a training step, and what they change: gradients, losses, accuracies.

python benchmarks/precision.py --device cuda --batch 32       # steps of a random CLIP ViT-B/32, accuracies of tiny CLIP
python benchmarks/precision.py --tiny                         # tiny CLIP on digits for both
python benchmarks/precision.py --tiny --modes float32,bf16 --attack_loss kl --skip_accuracy

All modes run the trainer's own step on the same model, images, texts and attack noise, in turns. The attack's pixel gradients
are compared at the K points that float32's attack visits: the share of pixels whose gradient has float32's sign, which is all
that an L-inf attack uses, and the share whose gradient is exactly zero. Loss and prompts' gradient are those of the whole step,
with the adversarial images that each mode finds for itself. Accuracies: tiny CLIP is tuned on 16 digits a class in each mode,
and measured in float32 on 200 test images, clean and under PGD-20; epsilon is 10/255.

Accelerate has no fp16 on a CPU: it would run in float32. There fp16 is switched on by hand, for its numbers alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from precision_modes import EPSILON, MODES, SHOTS, Mode, make_trainer
from step_reference import TINY_CLIP, Setting, make_processor
from torch import Tensor
from transformers import CLIPModel, set_seed

from capt_peft import CaptConfig, load_task
from capt_peft.training.chunks import compiled_towers
from capt_peft.utils.machine import describe_machine, versions

LEARNING_RATE, TEST_IMAGES = 0.3, 200
FP16_ON_CPU = (
    "fp16 was switched on by hand: Accelerate runs it in float32 on a CPU, and its time here says nothing of a GPU."
)


# ------------------------------------------------------------------------------------------------------------ measuring


def measure_steps(names: Sequence[str], setting: Setting, repetitions: int) -> dict[str, dict[str, Any]]:
    """Returns of each mode its times in turns, in seconds, and how far it is from float32.

    Args:
        names: Modes; float32 is the first.
        setting: What to run them on.
        repetitions: Timed turns, after one that warms up.
    """
    points: list[Tensor] = []
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        modes = {}
        for name in names:
            mode = modes[name] = Mode(name, setting)
            stack.enter_context(compiled_towers(mode.trainer.classifier.base_model, mode.trainer.args))
            first = mode.seconds()
            values = mode.values(points)
            if name == "float32":
                exact = values
            found[name] = {"first_step_seconds": first, **compare(exact, values), "rounds": []}
        for repetition in range(repetitions + 1):
            for name, mode in modes.items():
                taken = mode.seconds()
                if repetition:
                    found[name]["rounds"].append(taken)
    for one in found.values():
        one["seconds"] = statistics.median(one["rounds"])
        one["times_float32"] = one["seconds"] / found["float32"]["seconds"]
    return found


def compare(exact: Sequence[Tensor], values: Sequence[Tensor]) -> dict[str, Any]:
    """Returns how far a mode's loss, gradient of the prompts and pixel gradients (K, B, 3, H, W) are from float32's."""
    agreement = (values[2].sign() == exact[2].sign()).double().mean(dim=(1, 2, 3, 4))
    return {
        "equal_signs": agreement.mean().item(),
        "equal_signs_by_attack_step": agreement.tolist(),
        "vanished": (values[2] == 0).double().mean().item(),
        "loss_difference": abs(values[0] / exact[0] - 1).item(),
        "gradient_cosine": torch.nn.functional.cosine_similarity(exact[1], values[1], dim=0).item(),
    }


def tune(mode: str, setting: Setting, seed: int, tuning_steps: int) -> dict[str, float]:
    """Tunes tiny CLIP on digits in a mode; returns clean and robust accuracy, measured in float32."""
    set_seed(seed)
    task = load_task("digits").few_shot(SHOTS, seed)
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    model = get_peft_model(base, CaptConfig(num_vision_tokens=16, template=task.template))
    trainer = make_trainer(
        model, task, make_processor(tiny=True), mode, Setting(batch=32, tiny=True, device=setting.device), seed,
        attack_loss=setting.attack_loss, learning_rate=LEARNING_RATE, max_steps=tuning_steps, eval_attack="pgd-20",
    )  # fmt: skip
    trainer.train()
    measured = trainer.evaluate(task["test"].shuffle(seed=0).select(range(TEST_IMAGES)))
    return {"clean": measured["eval_clean_accuracy"], "robust": measured["eval_robust_accuracy"]}


# ------------------------------------------------------------------------------------------------------------- report


def table(record: dict[str, Any]) -> str:
    """Returns a record of `precision.py` as Markdown."""
    tuned = "seeds" in record
    titles = ["mode", "seconds a step", "float32 = 1", "first step", "equal signs", "vanished", "loss", "cosine"]
    titles += ["clean", "robust"] if tuned else []
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    rows += [f"| {' | '.join(cells(name, found))} |" for name, found in record["modes"].items()]
    return "\n".join([*rows, "", *notes(record)])


def cells(name: str, found: dict[str, Any]) -> list[str]:
    """Returns a mode's row."""
    row = [
        name.replace("_", " "),
        f"{found['seconds']:.3g}",
        f"{found['times_float32']:.2f}",
        f"{found['first_step_seconds']:.3g}",
        f"{found['equal_signs']:.2%}",
        f"{found['vanished']:.4%}",
        f"{found['loss_difference']:.1e}",
        f"{found['gradient_cosine']:.5f}",
    ]
    for kind in ("clean", "robust") if "accuracies" in found else ():
        row.append(mean_and_spread([one[kind] for one in found["accuracies"]]))
    return row


def mean_and_spread(shares: Sequence[float]) -> str:
    """Returns a mean in percent, with the standard deviation over seeds if there are several."""
    mean = f"{100 * statistics.mean(shares):.1f}%"
    return f"{mean} ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else mean


def notes(record: dict[str, Any]) -> list[str]:
    """Returns what stands under the table."""
    lines = [
        f"{record['model']}, batch {record['batch']}, {record['classes']} classes, attack on {record['attack_loss']} with K = "
        f"{record['steps']}, median of {record['repetitions']} turns; {record['machine']}; torch {record['versions']['torch']}, "
        f"transformers {record['versions']['transformers']}, accelerate {record['versions']['accelerate']}; {record['date']}.",
        "The first step compiles. Equal signs, vanished: of the attack's pixel gradients, at the points of float32's attack.",
        "Loss: relative difference of the step's loss from float32; cosine: of the prompts' gradient with float32's.",
    ]
    if "seeds" in record:
        seeds = ", ".join(map(str, record["seeds"]))
        lines.append(
            f"Clean, robust (PGD-20): tiny CLIP after {record['tuning_steps']} steps on {SHOTS} digits a class, epsilon "
            f"{EPSILON}; {TEST_IMAGES} test images, in float32; mean and standard deviation over seeds {seeds}."
        )
    return [*lines, FP16_ON_CPU] if record["device"] == "cpu" and "fp16" in record["modes"] else lines


# -------------------------------------------------------------------------------------------------------------- command


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="steps of tiny CLIP on digits instead of a ViT-B/32 on noise"
    )
    parser.add_argument("--modes", default=",".join(MODES), help="a list with commas; float32 is always among them")
    parser.add_argument("--batch", type=int, help="images a step; by default 4, and 32 with --tiny")
    parser.add_argument("--classes", type=int, default=100, help="classes; --tiny has the ten digits")
    parser.add_argument("--steps", type=int, default=3, help="steps of the training attack")
    parser.add_argument("--attack_loss", default="ce", choices=("ce", "kl"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repetitions", type=int, default=5, help="timed turns")
    parser.add_argument("--skip_accuracy", action="store_true", help="tune nothing")
    parser.add_argument("--seeds", default="0,1", help="of the tuning, a list with commas")
    parser.add_argument("--tuning_steps", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    return checked(parser.parse_args(arguments))


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """Returns the arguments with lists read and defaults filled in.

    Raises:
        ValueError: An argument that cannot be.
    """
    unknown = sorted(set(args.modes.split(",")) - set(MODES))
    if unknown:
        raise ValueError(f"--modes {', '.join(unknown)}: there is no such mode. Allowed: {', '.join(MODES)}.")
    args.modes = ["float32", *(name for name in MODES if name in args.modes.split(",") and name != "float32")]
    if not all(part.strip().isdecimal() for part in args.seeds.split(",")):
        raise ValueError(f"--seeds {args.seeds} must be whole numbers with commas between them, such as 0,1.")
    args.seeds = [int(part) for part in args.seeds.split(",")]
    args.classes = 10 if args.tiny else args.classes
    args.batch = (32 if args.tiny else 4) if args.batch is None else args.batch
    if args.tiny and args.batch > args.classes * SHOTS:
        raise ValueError(f"--batch {args.batch} is more than the {args.classes * SHOTS} digits that --tiny trains on.")
    least = {"batch": 1, "classes": 2, "steps": 1, "repetitions": 1, "tuning_steps": 1}
    for name, low in least.items():
        if getattr(args, name) < low:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least {low}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA GPU here; use --device cpu.")
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns what `--json` writes."""
    try:
        args = parse(arguments)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    named = ("batch", "classes", "steps", "attack_loss", "tiny", "device")
    setting = Setting(**{name: getattr(args, name) for name in named})
    record: dict[str, Any] = {
        "model": "tiny CLIP on digits" if args.tiny else "CLIP ViT-B/32, random weights, on noise", **asdict(setting),
        "repetitions": args.repetitions, "versions": versions(), "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine() if args.device == "cuda" else f"CPU, threads: {torch.get_num_threads()}",
        "modes": measure_steps(args.modes, setting, args.repetitions),
    }  # fmt: skip
    if not args.skip_accuracy:
        record |= {"seeds": args.seeds, "tuning_steps": args.tuning_steps}
        for seed in args.seeds:
            for name in args.modes:
                print(f"tuning: {name}, seed {seed}", file=sys.stderr)
                record["modes"][name].setdefault("accuracies", []).append(tune(name, setting, seed, args.tuning_steps))
    print(table(record))
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    return record


if __name__ == "__main__":
    main()
