"""Runs the paper's protocols: methods, data sets, shots and seeds; then prints the tables.

python examples/benchmark.py --suite toy --quick                # every method and protocol once, a few minutes
python examples/benchmark.py --suite toy --methods capt,adv-maple,apt --shots 1,4,16,all --seeds 0,1,2
python examples/benchmark.py --suite toy --list                 # what would run, and how long it should take
python examples/benchmark.py --suite paper --root /data --model_name_or_path openai/clip-vit-base-patch32 \
        --settings examples/configs/fap.yaml --output outputs/fap.jsonl
python examples/benchmark.py --config examples/configs/ablations/weighting.yaml
python examples/benchmark.py --suite own --tasks pets=path/to/pets,dtd=path/to/dtd --model_name_or_path ...
accelerate launch examples/benchmark.py --suite paper ...       # all processes run each cell together
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml
from accelerate import PartialState
from train import ScriptArguments

from capt_peft import CaptConfig, CaptTrainingArguments
from capt_peft.benchmark import PROTOCOLS, SUITES, Plan, Suite, get_executor, get_suite, listing, run_cells
from capt_peft.methods import ALIASES, METHODS
from capt_peft.report import write_report

TINY_CLIP = Path(__file__).resolve().parent / "tiny_clip"
QUICK = {"max_steps": 4, "attack_steps": 2}


def names(text: Any) -> list[str]:
    """Reads a list separated by commas, or a list of a YAML file."""
    values = text.split(",") if isinstance(text, str) else text if isinstance(text, list) else [text]
    return [str(value).strip() for value in values if str(value).strip()]


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line; a YAML file may give the same names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of these arguments, `variants` and `method_settings`")
    parser.add_argument("--suite", default="toy", help=f"data sets: {', '.join(SUITES)}, or own")
    parser.add_argument("--model_name_or_path", help="folder or Hub id of a CLIP; tiny CLIP for the toy suite")
    parser.add_argument("--root", help="where the catalog's data sets lie (CoOp's $DATA); without it, the Hub")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join([*METHODS, *ALIASES])}")
    parser.add_argument("--protocols", default=",".join(PROTOCOLS), help=f"of {', '.join(PROTOCOLS)}")
    parser.add_argument("--tasks", help="a part of the suite's data sets; of --suite own, name=path,name=path")
    parser.add_argument("--shots", default="1,4,16,all", help="training images a class, for few-shot")
    parser.add_argument("--transfer_shots", default="16", help="the same for the other protocols")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--attacks", help="attacks that measure robust accuracy; the suite's by default")
    parser.add_argument("--limit", type=int, help="test images a data set, drawn by seed 0; 0: all")
    parser.add_argument("--split", default="test", help="split that is measured; validation to choose settings")
    parser.add_argument(
        "--settings", help="settings for all methods: a YAML file of examples/train.py, or name=value,..."
    )
    parser.add_argument("--variant", help="a name for these settings in the tables")
    parser.add_argument("--output", help="file of lines; outputs/benchmark/SUITE.jsonl by default")
    parser.add_argument("--report", help="folder of tables and plots; by default of the output's name")
    parser.add_argument("--tables", help="files of lines: only make tables and plots of them, into --report")
    parser.add_argument("--executor", default="local", help="local, ray or slurm")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--list", action="store_true", help="show what would run, and how long it should take")
    parser.add_argument("--quick", action="store_true", help="every method and protocol once, on little, in minutes")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Reads the command line, on top of a YAML file."""
    parser = build_parser()
    path = parser.parse_known_args(argv)[0].config
    own: dict[str, Any] = {"variants": None, "method_settings": {}}
    if path:
        content = read_yaml(path, parser)
        own |= {name: content.pop(name) for name in own if name in content}
        known = {action.dest for action in parser._actions} - {"help", "config"}
        unknown = sorted(set(content) - known)
        if unknown:
            parser.error(f"{path}: unknown arguments {', '.join(unknown)}. `--help` lists them.")
        parser.set_defaults(**content)
    return parser.parse_args(argv, argparse.Namespace(**own))


def read_yaml(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Reads a YAML file that must hold names and values."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"{path} cannot be read: {error}")
    if not isinstance(content, dict):
        parser.error(f"{path} holds {content!r}, not names and values.")
    return content


def read_settings(given: Any) -> dict[str, Any]:
    """Reads settings: a mapping, `name=value,name=value`, or a YAML file of examples/train.py, without what names its run."""
    if given is None or isinstance(given, dict):
        return given or {}
    if "=" in given:
        return {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in names(given))}
    parser = build_parser()
    content = read_yaml(given, parser)
    used = {field.name for kind in (CaptTrainingArguments, CaptConfig) for field in fields(kind)}
    used = (used | {"teacher", "model_name_or_path"}) - {"output_dir", "seed"}
    unknown = sorted(set(content) - used - {field.name for field in fields(ScriptArguments)} - {"output_dir", "seed"})
    if unknown:
        parser.error(f"{given}: unknown settings {', '.join(unknown)}.")
    return {name: value for name, value in content.items() if name in used}


def own_suite(tasks: str | None) -> Suite:
    """Returns a suite of data sets given as name=path; the first one is the source of cross-dataset."""
    pairs = [pair.partition("=") for pair in names(tasks or "")]
    if not pairs or not all(name and path for name, _, path in pairs):
        raise SystemExit(f"--suite own needs --tasks name=path,name=path; given: {tasks}.")
    found = tuple(name for name, _, _ in pairs)
    return Suite("own", found, source=found[0], shifts=())


def places(args: argparse.Namespace) -> str | dict[str, str] | None:
    """Returns where the data sets lie."""
    if args.suite != "own":
        return args.root
    return {name: path for name, _, path in (pair.partition("=") for pair in names(args.tasks))}


def make_plan(args: argparse.Namespace) -> Plan:
    """Returns what the arguments ask for."""
    suite = own_suite(args.tasks) if args.suite == "own" else get_suite(args.suite)
    settings, variants = read_settings(args.settings), args.variants or {args.variant or "": {}}
    model, attack = settings.pop("model_name_or_path", None), settings.pop("eval_attack", None)
    model = args.model_name_or_path or (os.path.relpath(TINY_CLIP) if args.suite == "toy" else model)
    if model is None:
        raise SystemExit(f"--suite {args.suite} needs --model_name_or_path, the folder or Hub id of a CLIP.")
    plan: dict[str, Any] = {
        "methods": names(args.methods),
        "protocols": names(args.protocols),
        "shots": [int(shots) if shots.isdecimal() else shots for shots in names(args.shots)],
        "seeds": [int(seed) if seed.isdecimal() else seed for seed in names(args.seeds)],
        "tasks": names(args.tasks) if args.tasks and args.suite != "own" else None,
        "attacks": names(args.attacks or attack or "") or None,
        "limit": args.limit,
        "settings": settings,
        "method_settings": args.method_settings,
        "variants": {name: values or {} for name, values in variants.items()},
        "split": args.split,
        "transfer_shots": int(args.transfer_shots) if str(args.transfer_shots).isdecimal() else args.transfer_shots,
    }
    if args.quick:
        plan |= {"tasks": list(suite.tasks[:2]), "shots": [1], "seeds": [0], "limit": 20, "transfer_shots": 1}
        plan |= {"attacks": ["pgd-5"], "settings": settings | QUICK}
    return Plan(suite, model, **plan)


def main(argv: list[str] | None = None) -> None:
    """Runs what is left of the plan and writes the report."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.tables:
        report(names(args.tables), args.report or Path(names(args.tables)[0]).with_suffix(""))
        return
    plan = make_plan(args)
    cells = plan.cells()
    output = Path(args.output or f"outputs/benchmark/{args.suite}{'-quick' if args.quick else ''}.jsonl")
    if args.list:
        print(listing(cells, output, plan.model, args.workers))
        return
    executor = get_executor(args.executor, args.workers)
    lines = run_cells(cells, output, executor=executor, root=places(args))
    if not PartialState().is_main_process:
        return
    failed = [line for line in lines.values() if line["status"] == "failed"]
    for line in failed:
        print(f"failed: {line['cell']['method']} on {line['cell']['task']}: {line['error']['message']}")
    if len(failed) < len(lines):
        report([output], args.report or output.with_suffix(""))
    print(f"\n{len(lines) - len(failed)} of {len(cells)} cells are finished; their lines are in {output}.")


def report(lines: list[Any], folder: Any) -> None:
    """Writes tables and plots, and prints the tables that are averaged over data sets."""
    paths = write_report(lines, folder)
    print(Path(folder, "tables.md").read_text(encoding="utf-8"))
    print(*paths, sep="\n")


if __name__ == "__main__":
    main()
