"""What a training step costs, beside the published step and beside the least that it can cost.

python benchmarks/step.py                           # a randomly initialised CLIP ViT-B/32 of true shape; or `make bench`
python benchmarks/step.py --tiny --batch 4,8        # tiny CLIP, much faster
python benchmarks/step.py --repetitions 0           # operations and memory only, which other work on the machine does not disturb
python benchmarks/step.py --classes 1000 --reference_repetitions 0    # where the published step does not fit into memory

Three steps on the same model, images, texts and attack noise: the published one (`step_reference.py` says what it is), the
trainer's, and the floor of (2K + 4) forwards of the image tower and 2 of the text tower. First the published step and the
trainer's must give the same loss and the same gradients of the prompts; if they do not, nothing is measured. The trainer's step
and the floor then take turns; the published step, which takes a hundred times as long, has its turn right before them, in a
process of its own.

The trainer's step is measured with the frozen model's features known, as in every step without augmentation, which is the
figure to quote, and once more without. Peak memory is that of a process of its own for each step, above what the process holds
before it: the model, the images, Python and torch. For 100 classes the published step takes 11 GB and more. Its operations, and
the floor's, are counted by the shapes of their tensors, which needs no time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import peak, reset_peak, seconds
from safetensors.torch import load_file, save_file
from step_reference import Setting, Setup, floor_images, floor_texts, our_first_step, our_step, reference_step
from step_report import compare, ratios, summarise, table, targets
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from capt_peft.tuner import PromptLayer
from capt_peft.utils.machine import describe_machine, versions

DEFAULT_SET = ((4, 100, 2), (32, 100, 3))


def floor(setup: Setup) -> None:
    """Runs what a step cannot do without."""
    floor_images(setup)
    floor_texts(setup)


def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Counts attention forward by the shapes, as torch does for GPUs; on CPUs it counts none by itself."""
    return sdpa_flop_count(query, key, value)


def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Counts attention backward."""
    return sdpa_backward_flop_count(gradient, query, key, value)


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


# ------------------------------------------------------------------------------------------------------ operations, memory


def run_reference(setting: Setting, folder: Path) -> dict[str, Any]:
    """Runs the published step once; returns its time and memory, and leaves its loss and gradients in a file."""
    setup = Setup(setting)
    before = reset_peak(setting.device)
    taken, loss = seconds(partial(reference_step, setup), setting.device)
    memory = {"before_bytes": before, "peak_bytes": peak(setting.device)}
    save_file(outcome(setup, loss), folder / "reference.safetensors")
    return {"seconds": taken, "memory": memory}


def outcome(setup: Setup, loss: Tensor) -> dict[str, Tensor]:
    """Returns a step's loss and the gradients that it left, by name."""
    gradients = {key: p.grad.clone() for key, p in setup.prompts.items() if p.grad is not None}
    return {**gradients, "loss": loss}


def count(step: Callable[[Setup], Any], setup: Setup) -> tuple[int, Any]:
    """Returns the floating-point operations of a step (a multiplication and an addition are two), and its loss."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        loss = step(setup)
    return counter.get_total_flops(), loss


def count_by_shapes(step: Callable[[Setup], Any], setup: Setup) -> int:
    """Returns the operations of a step that asks no tensor for its values; nothing is computed."""
    for module in setup.model.modules():
        if isinstance(module, PromptLayer):
            module.end_token = None  # a check of the texts, which looks at them
    with FakeTensorMode(allow_non_fake_inputs=True):
        operations, _ = count(step, setup)
    setup.model.zero_grad()
    return operations


def in_a_process(task: str, setting: Setting, folder: Path, **options: int) -> dict[str, Any]:
    """Calls one of `TASKS` in a process of its own, which is what its peak of memory is of.

    Raises:
        ChildProcessError: It failed, for want of memory perhaps.
    """
    order = {"task": task, "setting": asdict(setting), "folder": str(folder), "options": options}
    done = subprocess.run([sys.executable, __file__, "--order", json.dumps(order)], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it was ended by signal {-done.returncode}, for want of memory?"]
        raise ChildProcessError(f"{task} failed ({setting}): {said[-1]}")
    found: dict[str, Any] = json.loads((folder / f"{task}.json").read_text())
    return found


def obey(order: str) -> None:
    """Does, in its process, what `in_a_process` asks for."""
    asked = json.loads(order)
    folder = Path(asked["folder"])
    result = TASKS[asked["task"]](Setting(**asked["setting"]), folder, **asked["options"])
    (folder / f"{asked['task']}.json").write_text(json.dumps(result))


# -------------------------------------------------------------------------------------------------------------------- time


def time_in_turns(setup: Setup, repetitions: int) -> dict[str, list[float]]:
    """Returns the times of our step and the floor's two parts, taken in turns, and one of our first step."""
    rounds: dict[str, list[float]] = {"ours_first": [seconds(partial(our_first_step, setup), setup.setting.device)[0]]}
    runs: dict[str, Callable[[Setup], Any]] = {
        "ours": our_step,
        "floor_images": floor_images,
        "floor_texts": floor_texts,
    }
    for _ in range(repetitions):
        for name, run in runs.items():
            rounds.setdefault(name, []).append(seconds(partial(run, setup), setup.setting.device)[0])
    return rounds


# ----------------------------------------------------------------------------------------------------------------- command


def measure(setting: Setting, folder: Path, *, repetitions: int, reference_repetitions: int) -> dict[str, Any]:
    """Measures a setting; returns all that is known of it.

    Args:
        setting: What to measure.
        folder: Where files may be left.
        repetitions: Turns of our step and the floor.
        reference_repetitions: Runs of the published step.

    Raises:
        ValueError: The two steps do not compute the same.
        ChildProcessError: The published step could not run.
    """
    setup = Setup(setting)
    operations = {
        name: count_by_shapes(step, setup) for name, step in (("reference", reference_step), ("floor", floor))
    }
    result: dict[str, Any] = {**asdict(setting), "text_tokens": setup.text_tokens, "rounds": {}}
    before = reset_peak(setting.device)
    ours = {name: outcome(setup, step(setup)) for name, step in (("ours_first", our_first_step), ("ours", our_step))}
    result["memory"] = {"ours": {"before_bytes": before, "peak_bytes": peak(setting.device)}}
    for _ in range(reference_repetitions):
        found = in_a_process("reference", setting, folder)
        result["memory"]["reference"] = found["memory"]
        result["rounds"].setdefault("reference", []).append(found["seconds"])
    if reference_repetitions:
        reference = load_file(folder / "reference.safetensors", device=setting.device)
        result["difference"] = {name: compare(reference, tensors, name) for name, tensors in ours.items()}
    operations["ours"] = count(our_step, setup)[0]  # after the memory: counting keeps tensors alive
    result |= {"operations": operations, "ratios": ratios(operations, "operations")}
    if repetitions:
        result["rounds"] |= time_in_turns(setup, repetitions)
        result["seconds"] = summarise(setting, result["rounds"])
        result["ratios"] |= ratios(result["seconds"], "seconds")
    result["targets"] = targets(setting, result["ratios"])
    return result


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"measure": measure, "reference": run_reference}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", help="images, a list with commas")
    parser.add_argument("--classes", help="classes, a list with commas")
    parser.add_argument(
        "--steps", help="steps of the attack, a list with commas; all combinations of the three are run"
    )
    parser.add_argument("--attack_loss", default="kl", choices=("kl", "ce"), help="kl as FAP attacks, ce as APT does")
    parser.add_argument("--tiny", action="store_true", help="tiny CLIP instead of a ViT-B/32")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--repetitions", type=int, default=3, help="turns of our step and the floor; 0 measures no time"
    )
    parser.add_argument(
        "--reference_repetitions", type=int, default=1, help="runs of the published step; 0 counts its operations only"
    )
    parser.add_argument("--image_chunk_size", type=int, help="images that our step computes at a time")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--order", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def settings(args: argparse.Namespace) -> list[Setting]:
    """Returns what to measure.

    Raises:
        ValueError: An argument that cannot be.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA GPU here; use --device cpu.")
    if args.repetitions < 0 or args.reference_repetitions < 0:
        raise ValueError("--repetitions and --reference_repetitions must be 0 or more.")
    named = {"batch": args.batch, "classes": args.classes, "steps": args.steps}
    combinations = DEFAULT_SET
    if any(text is not None for text in named.values()):
        given = [numbers(name, text) for name, text in named.items()]
        combinations = tuple(itertools.product(*given))  # type: ignore[assignment]
    rest = {name: getattr(args, name) for name in ("attack_loss", "tiny", "device", "image_chunk_size")}
    return [Setting(batch, classes, steps, **rest) for batch, classes, steps in combinations]


def numbers(name: str, text: str | None) -> list[int]:
    """Reads a list with commas, by default the first of the default set.

    Raises:
        ValueError: Not a list of whole numbers, or one out of range.
    """
    low, high, default = {"batch": (1, 4096, 4), "classes": (2, 10000, 100), "steps": (1, 1000, 2)}[name]
    try:
        found = [default] if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(low <= number <= high for number in found):
        raise ValueError(
            f"--{name}={text} must be whole numbers from {low} to {high} with commas between them, such as 4,32."
        )
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the tables, and returns what `--json` writes."""
    args = parse(arguments)
    if args.order:
        obey(args.order)
        return {}
    machine = describe_machine() if args.device == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    record: dict[str, Any] = {
        "model": "tiny CLIP" if args.tiny else "CLIP ViT-B/32, random weights",
        "repetitions": args.repetitions, "reference_repetitions": args.reference_repetitions,
        "machine": machine, "versions": versions(), "date": time.strftime("%Y-%m-%d"), "settings": [],
    }  # fmt: skip
    try:
        for setting in settings(args):
            with tempfile.TemporaryDirectory() as folder:
                options = {"repetitions": args.repetitions, "reference_repetitions": args.reference_repetitions}
                record["settings"].append(in_a_process("measure", setting, Path(folder), **options))
            print(table(record["settings"][-1]), end="\n\n", flush=True)
    except (ValueError, ChildProcessError) as error:
        raise SystemExit(str(error)) from None
    print(f"{record['model']}; {machine}; torch {torch.__version__}; {record['date']}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    return record


if __name__ == "__main__":
    main()
