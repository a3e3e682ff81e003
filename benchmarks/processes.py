"""How training steps scale over processes: images a second with one and with two, of the same images a step.

python benchmarks/processes.py                   # a random ViT-B/32; two GPUs if there are, or a thread for each process
python benchmarks/processes.py --tiny --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from step_reference import invent_names, make_model, make_processor, make_task
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from capt_peft import CaptTrainer, CaptTrainingArguments

SCRIPT = Path(__file__).resolve()
LOSS_TOLERANCE = 1e-4  # relative: steps after the first start from weights that were rounded differently


class StepTimes(TrainerCallback):
    """Measures the seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self._start = now()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops the clock."""
        self.seconds.append(now() - self._start)


def now() -> float:
    """Returns the time, once the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains as one of the processes that torchrun has started; the first one writes what it measured."""
    processes = int(os.environ["WORLD_SIZE"])
    on_cpu = torch.cuda.device_count() < processes
    if on_cpu:
        torch.set_num_threads(1)
    set_seed(0)
    processor = make_processor(options.tiny)
    names = invent_names(processor.tokenizer, options.classes)
    # every image once, so that no step finds the frozen model's logits already known
    images = options.batch * (options.warmup + options.steps)
    task = make_task(names, images, processor.image_processor.crop_size["height"])
    arguments = CaptTrainingArguments(
        str(folder), use_cpu=on_cpu, per_device_train_batch_size=options.batch // processes, num_train_epochs=1,
        attack_steps=2, learning_rate=1e-3, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    times = StepTimes()
    model = make_model(options.tiny, processor.tokenizer)
    trainer = CaptTrainer(model, arguments, task=task, processor=processor, callbacks=[times])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = times.seconds[options.warmup :]
    return {"processes": processes, "device": str(trainer.args.device.type), "losses": losses, "seconds": seconds}


def launch(options: argparse.Namespace, processes: int) -> dict[str, Any]:
    """Runs this script in processes with a thread each, and returns what the first one measured."""
    with tempfile.TemporaryDirectory() as folder:
        forwarded = ["--batch", options.batch, "--classes", options.classes, "--steps", options.steps, "--warmup"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*torchrun, str(SCRIPT), "--worker", folder, *map(str, forwarded), str(options.warmup)]
        done = subprocess.run(
            [*command, *(["--tiny"] if options.tiny else [])], env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{processes} processes failed:\n{done.stderr}")
        measured: dict[str, Any] = json.loads((Path(folder) / "measured.json").read_text())
    return measured


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Runs one and two processes in turn, checks that they train alike, and returns their speeds.

    Raises:
        RuntimeError: The losses differ, so that the times are not of the same work.
    """
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(options.repeats):
        for processes, measured in runs.items():
            measured.append(launch(options, processes))
    one, two = runs[1][0]["losses"], runs[2][0]["losses"]
    worst = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
    if worst > LOSS_TOLERANCE:
        raise RuntimeError(f"The losses of one and of two processes differ by {worst:.1e}: {one} and {two}.")
    median = {n: statistics.median([s for run in measured for s in run["seconds"]]) for n, measured in runs.items()}
    return {
        "model": "tiny CLIP" if options.tiny else "ViT-B/32 with random weights", "device": runs[2][0]["device"],
        "images a step": options.batch, "classes": options.classes, "steps": options.steps * options.repeats,
        "largest difference of a loss": worst,
        "images a second": {str(n): options.batch / seconds for n, seconds in median.items()},
        "ratio": median[1] / median[2],
    }  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny CLIP instead of a ViT-B/32")
    parser.add_argument("--batch", type=int, default=8, help="images a step, over all processes")
    parser.add_argument("--classes", type=int, default=20, help="classes")
    parser.add_argument("--steps", type=int, default=8, help="steps that are measured, a run")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each, in turn")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.batch % 2 or min(options.batch, options.steps, options.repeats) < 1:
        parser.error("--batch must be even, and --steps and --repeats at least 1.")
    return options


def main(argv: list[str] | None = None) -> None:
    """Measures and prints; or is one of the processes that are measured."""
    options = parse(argv)
    if options.worker:
        measured = train(options, Path(options.worker))
        if os.environ["RANK"] == "0":
            (Path(options.worker) / "measured.json").write_text(json.dumps(measured))
        return
    found = compare(options)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['model']}, {found['device']}, {found['images a step']} images a step, {found['classes']} classes\n")
    print("| processes | images a second | ratio |\n|---|---|---|")
    for processes, speed in found["images a second"].items():
        print(f"| {processes} | {speed:.2f} | {1.0 if processes == '1' else found['ratio']:.2f} |")
    print(f"\nLosses agree to {found['largest difference of a loss']:.0e}; medians of {found['steps']} steps.")


if __name__ == "__main__":
    main()
