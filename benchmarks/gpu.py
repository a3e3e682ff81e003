"""What a GPU does with this package, in one command of at most 8 minutes and one JSON file.

python benchmarks/gpu.py                            # on a GPU
python benchmarks/gpu.py --device cpu --tiny        # whether it runs
python benchmarks/gpu.py --json gpu.json            # again: parts that are in the file already are not run again

A training step of a CLIP ViT-B/32 of true shape (100 classes, 3 attack steps on cross-entropy) in float32, TF32 and bf16, and
compiled, with 32 and with 256 images: images per second, the share of the time that (2K + 4) forwards of the image tower and 2
of the text tower take, and the peak of memory. Images per second of PGD-20 and AutoAttack on images that stand the attack, which
cost most. And the tests that need a GPU, where pytest and datasets are installed.

Each part runs in a process of its own, which is stopped at its limit; what does not fit into the time is listed. The file is
written after each part. It needs torch, transformers and PEFT.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
TESTS = HERE.parents[1] / "tests" / "test_gpu.py"
START = 20  # seconds that a part may need before it measures; less is not worth a try


@dataclass(frozen=True)
class Part:
    """One part of the measurement.

    Attributes:
        name: Its name in the file.
        limit: Seconds after which it is stopped.
        measures: The function of `gpu_parts` that does it; without one it is the tests.
        settings: What the function is given.
    """

    name: str
    limit: int
    measures: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def parts(device: str, *, tiny: bool) -> list[Part]:
    """Returns all parts, those that take longest last."""
    batches = (4, 8) if tiny else (32, 256)
    shared = {"device": device, "tiny": tiny}
    precisions = ("float32", "bf16") if device == "cpu" else ("float32", "tf32", "bf16")

    def step(batch: int, precision: str, compiled: bool = False) -> Part:
        name = f"step, {batch} images, {'compiled' if compiled else precision}"
        settings = {"batch": batch, "precision": precision, "compiled": compiled, "repetitions": 5}
        return Part(name, 150 if compiled else 60, "measure_step", settings | shared)

    def attack(name: str, images: int) -> Part:
        return Part(name, 180, "measure_attack", {"attack": name, "images": images} | shared)

    return [
        *(step(batch, precision) for batch in batches for precision in precisions),
        attack("pgd-20", batches[1]),
        Part("tests", 120),
        attack("autoattack", batches[0]),
        *(step(batch, "float32", compiled=True) for batch in batches),
    ]


def run_part(part: Part, seconds: float) -> dict[str, Any]:
    """Runs a part within a time; returns what it found, or why it was not run."""
    if part.measures:
        return measure(part, seconds)
    missing = [name for name in ("pytest", "datasets") if importlib.util.find_spec(name) is None]
    if missing or not TESTS.is_file():
        return {"not_run": f"{' and '.join(missing) or TESTS.name} not found here"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    return within(command, seconds, lambda done: {"passed": done.returncode == 0, "said": last_line(done.stdout)})


def measure(part: Part, seconds: float) -> dict[str, Any]:
    """Runs a function of `gpu_parts` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        order = json.dumps({"function": part.measures, "settings": part.settings, "answer": str(answer)})

        def read(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
            if done.returncode == 0 and answer.is_file():
                found: dict[str, Any] = json.loads(answer.read_text())
                return found
            return {"not_run": f"it failed: {last_line(done.stderr) or f'exit status {done.returncode}'}"}

        return within([sys.executable, str(HERE), "--order", order], seconds, read)


def within(command: list[str], seconds: float, read: Any) -> dict[str, Any]:
    """Runs a command within a time; returns what `read` makes of it."""
    try:
        found: dict[str, Any] = read(subprocess.run(command, capture_output=True, text=True, timeout=seconds))
    except subprocess.TimeoutExpired:
        found = {"not_run": f"it was stopped after {seconds:.0f} seconds"}
    return found


def last_line(text: str) -> str:
    """Returns the last line that says something."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def obey(order: str) -> None:
    """Does, in its process, what `measure` asks for."""
    import gpu_parts

    asked = json.loads(order)
    found = getattr(gpu_parts, asked["function"])(**asked["settings"])
    Path(asked["answer"]).write_text(json.dumps(found))


def table(record: dict[str, Any]) -> str:
    """Returns a record as Markdown."""
    measured = {name: found for name, found in record["parts"].items() if "not_run" not in found}
    steps = {name: found for name, found in measured.items() if "share_of_floor" in found}
    attacks = {name: found for name, found in measured.items() if "passes_per_image" in found}
    rows = ["| step | images a second | seconds | share of the floor | first step | peak memory |", "|---" * 6 + "|"]
    for name, found in steps.items():
        rows.append(
            f"| {name.removeprefix('step, ')} | {found['images_per_second']:.3g} | {found['seconds']:.3g} | "
            f"{found['share_of_floor']:.0%} | {found['first_step_seconds']:.3g} | "
            f"{found['peak_bytes_above_model'] / 1e9:.2f} GB |"
        )
    rows += ["", "| attack | images a second | seconds | images | passes an image |", "|---" * 5 + "|"]
    for name, found in attacks.items():
        rows.append(
            f"| {name} | {found['images_per_second']:.3g} | {found['seconds']:.3g} | {found['images']} | "
            f"{found['passes_per_image']:.0f} |"
        )
    rows += ["", f"{record['model']}; {record['machine']}; torch {record['versions']['torch']}; {record['date']}"]
    rows += [f"Tests: {found['said']}" for found in measured.values() if "said" in found]
    rows += [f"Not run: {name}: {found['not_run']}" for name, found in record["parts"].items() if "not_run" in found]
    return "\n".join(rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="a small CLIP, 4 and 8 images: whether it runs")
    parser.add_argument("--minutes", type=float, default=8, help="time for all of it")
    parser.add_argument("--only", default="", help="parts whose names hold this text")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="write everything to this file")
    parser.add_argument("--order", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def begun(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the record so far: that of the file, if it is of the same machine, versions and model, or a new one.

    Raises:
        ValueError: There is no GPU, no such part, or the file holds something else.
    """
    import torch

    from capt_peft.utils.machine import describe_machine, versions

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA GPU here; use --device cpu.")
    if not any(args.only in part.name for part in parts(args.device, tiny=args.tiny)):
        raise ValueError(f"--only {args.only!r} is in the name of no part.")
    record: dict[str, Any] = {
        "model": "a small CLIP" if args.tiny else "CLIP ViT-B/32, random weights, 100 classes, K = 3, cross-entropy",
        "machine": describe_machine() if args.device == "cuda" else f"CPU, threads: {torch.get_num_threads()}",
        "versions": versions(), "date": time.strftime("%Y-%m-%d"), "parts": {},
    }  # fmt: skip
    if not args.json.exists():
        return record
    try:
        found = json.loads(args.json.read_text())
        same = all(found[key] == record[key] for key in ("model", "machine", "versions"))
    except (ValueError, TypeError, KeyError):
        same = False
    if not same:
        raise ValueError(f"{args.json} is of another machine, model or version. Give another --json.")
    return record | {"parts": {name: one for name, one in found["parts"].items() if "not_run" not in one}}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures what is not in the file yet, prints the tables, and returns what was written."""
    end = time.monotonic() - 10  # to start and to write
    args = parse(arguments)
    if args.order:
        obey(args.order)
        return {}
    end += 60 * args.minutes
    try:
        record = begun(args)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for part in parts(args.device, tiny=args.tiny):
        if part.name in record["parts"] or args.only not in part.name:
            continue
        left = min(part.limit, end - time.monotonic())
        if left < START:
            record["parts"][part.name] = {"not_run": f"no time was left of {args.minutes:g} minutes"}
        else:
            print(f"{part.name} ...", file=sys.stderr, flush=True)
            record["parts"][part.name] = run_part(part, left)
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    print(table(record))
    return record


if __name__ == "__main__":
    main()
