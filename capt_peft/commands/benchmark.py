"""Runs the paper's experiments: methods, data sets, shots and seeds; then prints the tables.

capt-peft benchmark --suite toy --quick                # every method and protocol once, a few minutes
capt-peft benchmark --suite toy --methods capt,adv-maple,apt --shots 1,4,16,all --seeds 0,1,2
capt-peft benchmark --suite toy --list                 # what would run, and how long it should take
capt-peft benchmark --suite paper --root /data --model_name_or_path openai/clip-vit-base-patch32 \
        --settings fap --output outputs/fap.jsonl
capt-peft benchmark --suite paper --protocol fap ...     # measured as FAP's paper measures; capt-peft protocols lists them
capt-peft benchmark --config parts
capt-peft benchmark --suite own --tasks pets=path/to/pets,dtd=path/to/dtd --model_name_or_path ...
accelerate launch -m capt_peft benchmark --suite paper ...      # all processes run each cell together
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import PartialState

from ..benchmark import PROTOCOLS, Cell, Plan, Suite, get_suite, listing, run_cells
from ..benchmark.lines import read_lines
from ..benchmark.plan import QUICK_LIMIT
from ..benchmark.run import training_arguments
from ..methods import METHODS
from ..report.sections import check_rows
from ..training import CaptTrainingArguments
from ..tuner import CaptConfig
from ..utils.text import some
from .options import values_in
from .parser import Parser
from .places import check_places, is_path
from .report import show_report
from .settings_file import known_names, load_yaml, read_mapping
from .train import ScriptArguments

QUICK = {"max_steps": 4, "attack_steps": 2}


def names(text: Any) -> list[str]:
    """Reads a list separated by commas, or a list of a YAML file."""
    values = text.split(",") if isinstance(text, str) else text if isinstance(text, list) else [text]
    return [str(value).strip() for value in values if str(value).strip()]


def build_parser() -> Parser:
    """Returns the command line; a YAML file may give the same names."""
    parser = Parser([], description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of these arguments, `variants` and `method_settings`")
    parser.add_argument("--suite", default="toy", help="data sets: toy, paper, or own")
    parser.add_argument("--model_name_or_path", help="folder or Hub id of a CLIP; tiny CLIP for the toy suite")
    parser.add_argument("--root", help="where the catalog's data sets lie (CoOp's $DATA); without it, the Hub")
    parser.add_argument(
        "--methods",
        default=",".join(METHODS),
        help="of zero-shot, capt, trades-maple, fap, pmg-aft, adv-maple, adv-vlp, adv-vp, adv-tp (apt); all by default",
    )
    parser.add_argument(
        "--protocols",
        default=",".join(PROTOCOLS),
        help="the paper's experiments: of few-shot, base-to-new, cross-dataset, shift; all by default",
    )
    parser.add_argument(
        "--protocol",
        help="a published evaluation protocol, such as fap (capt-peft protocols lists them): it sets attacks, step size, norm, "
        "epsilon, images and zero-shot's text, and what contradicts it is refused",
    )
    parser.add_argument("--tasks", help="a part of the suite's data sets; of --suite own, name=path,name=path")
    parser.add_argument("--shots", default="1,4,16,all", help="training images per class, for few-shot")
    parser.add_argument("--transfer_shots", default="16", help="the same for the other protocols")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, each a run of its own")
    parser.add_argument("--attacks", help="attacks that measure robust accuracy; the suite's by default")
    parser.add_argument(
        "--defences",
        default="none",
        help="defences that each adapter is measured with, e.g. none,ttc; attacked by all ways",
    )
    parser.add_argument("--limit", type=int, help="test images per data set, drawn by seed 0; 0: all")
    parser.add_argument("--split", default="test", help="split that is measured; validation to choose settings")
    parser.add_argument(
        "--settings",
        action="append",
        help="settings for all methods: a YAML file of `capt-peft train`, or name=value,...; a second one comes on top",
    )
    parser.add_argument("--variant", help="a name for these settings in the tables")
    parser.add_argument("--output", help="file of lines; outputs/benchmark/SUITE.jsonl by default")
    parser.add_argument("--report", help="folder of tables and plots; by default of the output's name")
    parser.add_argument("--backend", default="loky", help="where workers run: loky (this machine), ray or dask")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--list", action="store_true", help="show what would run, and how long it should take")
    parser.add_argument("--quick", action="store_true", help="every method and experiment once, on little, in minutes")
    return parser


LISTS = ("methods", "protocols", "tasks", "shots", "seeds", "attacks", "defences")
QUICK_SETS = ("tasks", "shots", "seeds", "limit", "transfer_shots", "attacks", "protocol")


def parse_args(argv: list[str]) -> Namespace:
    """Reads the command line, on top of a YAML file, and refuses what would have no effect."""
    parser = build_parser()
    named = values_in(argv)
    path = parser.parse_known_args(argv)[0].config
    own: dict[str, Any] = {"variants": None, "method_settings": {}, "file_settings": None}
    words: list[str] = []
    if path:
        try:
            content = read_mapping(path, {**parser.options, **own})
            own["file_settings"] = content.pop("settings", None)
            for name in own.keys() & content.keys():
                own[name] = known_names(f"{path}: {name}", content[name], content[name], "names")
        except ValueError as error:
            parser.error(str(error))
        rest = {name: value for name, value in content.items() if name not in own}
        words = parser.words(path, {name: _listed(name, value) for name, value in rest.items()})
    args = parser.parse_args([*words, *argv], Namespace(**own))
    without_effect = {
        "quick": {*named} & {*QUICK_SETS},
        "variants": {*named} & {"variant"},
    }
    for name, idle in without_effect.items():
        if idle and getattr(args, name):
            raise ValueError(f"--{min(idle)} has no effect beside {name}: leave one of them out.")
    if args.root and args.suite in ("own", "toy"):
        raise ValueError(
            f"--root has no effect with --suite {args.suite}: its data sets do not lie there. Leave it out."
        )
    if args.workers < 1:
        raise ValueError(f"workers={args.workers} must be at least 1.")
    check_places({"root": args.root, "model_name_or_path": args.model_name_or_path})
    args.asked = {*settings_of(args.settings)}
    for setting, argument in (("eval_attack", "attacks"), ("model_name_or_path", "model_name_or_path")):
        if setting in args.asked and argument not in named:  # the file's gives way to the command line's
            setattr(args, argument, None)
    if args.output is None or (args.quick and "output" not in named):
        path = Path(args.output or f"outputs/benchmark/{args.suite}.jsonl")
        args.output = path.with_stem(f"{path.stem}-quick") if args.quick else path
    return args


def _listed(name: str, value: Any) -> Any:
    """Returns a list of a YAML file as the command line has it: with commas."""
    plain = isinstance(value, list) and all(isinstance(item, str | int) and item is not True for item in value)
    return ",".join(map(str, value)) if name in LISTS and plain else value


# the settings that a run may have, and those of one run, which a benchmark sets itself
SETTINGS = Parser([ScriptArguments, CaptTrainingArguments])
OF_A_RUN = ({f.name for f in fields(ScriptArguments)} | {"output_dir", "seed"}) - {f.name for f in fields(CaptConfig)}
OF_A_RUN -= {"teacher", "model_name_or_path"}


def settings_of(given: Any, where: str = "settings") -> dict[str, Any]:
    """Reads settings: a mapping, `name=value,name=value`, or a YAML file of `capt-peft train`, without what names its run.

    Of a list of these, each one comes on top of those before it.
    """
    if isinstance(given, list):
        return {name: value for one in given for name, value in settings_of(one, where).items()}
    if isinstance(given, str) and "=" not in given:
        content = read_mapping(given, SETTINGS.options)
        return _typed(given, {name: value for name, value in content.items() if name not in OF_A_RUN})
    if isinstance(given, str):
        pairs = [pair.partition("=") for pair in names(given)]
        repeated = [name for name, count in Counter(name for name, _, _ in pairs).items() if count > 1]
        if repeated:
            raise ValueError(f"--settings gives {some(repeated)} twice: give each setting once.")
        where, given = "--settings", {name: load_yaml(value) for name, _, value in pairs}
    return _typed(where, known_names(where, given, SETTINGS.options, "settings"))


def _typed(where: str, values: dict[str, Any]) -> dict[str, Any]:
    parsed = SETTINGS.parse_known_args(SETTINGS.words(where, values))[0]
    return {name: getattr(parsed, name) for name, value in values.items() if value is not None}


def own_suite(tasks: str | None) -> Suite:
    """Returns a suite of data sets given as name=path; the first one is the source of cross-dataset."""
    pairs = [pair.partition("=") for pair in names(tasks or "")]
    if not pairs or not all(name and path for name, _, path in pairs):
        raise ValueError(f"--suite own needs --tasks name=path,name=path{f'; given: {tasks}' if tasks else ''}.")
    for name, _, path in pairs:
        if is_path(path) and not os.path.exists(os.path.expanduser(path)):
            raise ValueError(f"There is no folder or file {path} (--tasks {name}=...).")
    found = tuple(name for name, _, _ in pairs)
    return Suite("own", found, source=found[0], shifts=())


def places(args: Namespace) -> str | dict[str, str] | None:
    """Returns where the data sets lie."""
    if args.suite != "own":
        return args.root
    return {name: path for name, _, path in (pair.partition("=") for pair in names(args.tasks))}


def make_plan(args: Namespace) -> Plan:
    """Returns what the arguments ask for."""
    suite = own_suite(args.tasks) if args.suite == "own" else get_suite(args.suite)
    settings = {**settings_of(args.file_settings), **settings_of(args.settings)}
    variants = args.variants or {args.variant or "": {}}
    changed = {
        what: {name: settings_of(values, f"{what}: {name}") for name, values in mapping.items()}
        for what, mapping in (("variants", variants), ("method_settings", args.method_settings))
    }
    quick = {name: value for name, value in QUICK.items() if name not in args.asked} if args.quick else {}
    changed["method_settings"] = {  # of the file, over which the command line wins
        method: {name: value for name, value in values.items() if name not in args.asked | quick.keys()}
        for method, values in changed["method_settings"].items()
    }
    model, attack = settings.pop("model_name_or_path", None), settings.pop("eval_attack", None)
    model = args.model_name_or_path or model or ("tiny_clip" if args.suite == "toy" else None)
    if model is None:
        raise ValueError(f"--suite {args.suite} needs --model_name_or_path, the folder or Hub id of a CLIP.")
    plan: dict[str, Any] = {
        "methods": names(args.methods),
        "protocols": names(args.protocols),
        "shots": [int(shots) if shots.isdecimal() else shots for shots in names(args.shots)],
        "seeds": [int(seed) if seed.isdecimal() else seed for seed in names(args.seeds)],
        "tasks": names(args.tasks) if args.tasks and args.suite != "own" else None,
        "attacks": names(args.attacks or attack or "") or None,
        "defences": ["" if name == "none" else name for name in names(args.defences)],
        "limit": args.limit,
        "settings": settings,
        **changed,
        "split": args.split,
        "evaluation_protocol": args.protocol,
        "transfer_shots": int(args.transfer_shots) if str(args.transfer_shots).isdecimal() else args.transfer_shots,
    }
    if args.quick:
        plan |= {"tasks": list(suite.tasks[:2]), "shots": [1], "seeds": [0], "limit": QUICK_LIMIT}
        plan |= {"transfer_shots": 1, "attacks": ["pgd-5"], "settings": settings | quick}
    return Plan(suite, model, **plan)


def quiet() -> None:
    """Leaves warnings of ours, and bars of a benchmark's cells alone."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def main(argv: list[str]) -> None:
    """Runs what is left of the plan and writes the report."""
    args = parse_args(argv)
    quiet()
    plan = make_plan(args)
    cells = plan.cells()
    check_settings(cells)
    output = Path(args.output)
    check_rows([*cells, *(line.cell for line in read_lines(output) if not line.error)] if output.is_file() else cells)
    if args.list:
        print(listing(cells, output, args.workers, root=places(args)))
        return
    lines = run_cells(cells, output, backend=args.backend, workers=args.workers, root=places(args))
    show_lines(cells, lines, output, lambda: show_report([output], args.report or output.with_suffix("")))


def check_settings(cells: Sequence[Cell]) -> None:
    """Raises a ValueError for the first method whose settings no training takes, before anything runs."""
    for cell in {(cell.label, str(cell.settings), str(cell.prompts)): cell for cell in cells if cell.tuned}.values():
        try:
            training_arguments(cell, os.devnull)  # names a folder that is not made
            CaptConfig(**cell.prompts, class_names=["one", "other"])  # whose names are the task's
        except ValueError as error:
            raise ValueError(f"{cell.label}: {error}") from error


def show_lines(cells: Sequence[Cell], lines: Mapping[str, Any], output: Path, report: Callable[[], None]) -> None:
    """Says in the main process which cells failed, writes the report unless all did, and says how many are finished."""
    if not PartialState().is_main_process:
        return
    failed = [line for line in lines.values() if line["status"] == "failed"]
    for line in failed:
        print(f"failed: {line['cell']['method']} on {line['cell']['task']}: {line['error']['message']}")
    if len(failed) < len(lines):
        report()
    print(f"\n{len(lines) - len(failed)} of {len(cells)} cells are finished; their lines are in {output}.")
    if failed and len(failed) == len(lines):
        raise SystemExit(1)
