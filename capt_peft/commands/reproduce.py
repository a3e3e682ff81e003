"""Runs the experiments of a published protocol on real CLIP, and writes our figures beside the published ones.

capt-peft reproduce --protocol fap --root /data --list       # what it needs, how long it takes, and nothing else
capt-peft reproduce --protocol fap --root /data
capt-peft reproduce --protocol fap --root /data --protocols few-shot --shots 16 --tasks dtd,eurosat --methods capt,fap
capt-peft reproduce --protocol apt --root /data --epsilon 4/255 --settings bf16=true,dataloader_num_workers=8

It is `capt-peft benchmark` with everything set: killed at any point and started again it goes on, and the same command on several
machines with a shared disk shares the work. Published figures, with sources, are those of capt_peft/report/published.yaml.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from huggingface_hub import constants

from ..attacks import get_protocol
from ..backbones.conversion import RECORD
from ..backbones.registry import BACKBONES
from ..backbones.store import cache_folder
from ..benchmark import PROTOCOLS, Cell, Lines, Plan, get_suite, run_cells
from ..benchmark.cost import GPU, gpu_seconds
from ..benchmark.inputs import load_base
from ..benchmark.lines import is_whole
from ..benchmark.plan import shots_name
from ..data.catalog import CATALOG
from ..data.presence import lacking
from ..methods import METHODS, method_name
from ..report import write_report
from ..report.published import SUITE, write_published
from ..utils.embedded import EMBEDDED
from ..utils.files import read_entries
from ..utils.markup import Markdown, table_row
from ..utils.text import some
from .benchmark import names, quiet, settings_of, show_lines
from .ending import loading
from .parser import Parser
from .places import check_places, is_cached

# settings that decide what is measured: they come from the protocol alone
DECIDED = {"epsilon", "norm", "eval_attack", "eval_step_size", "model_name_or_path"}
HUB = "https://huggingface.co"
ARCHIVES = (
    "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md links the data sets and CoOp's splits, and shows the folders. "
    "ImageNet is given to those who register at https://image-net.org and accept its terms. Archives of the data sets above:"
)
COUPLED_GB, OTHER_GB = 0.015, 0.001  # of an adapter of a ViT-B/32: 3.56 million parameters where towers are coupled
WEIGHTS_GB = 0.6  # of a ViT-B/32 in float32


@dataclass
class Arguments:
    """What is run of which published protocol, and where."""

    protocol: str = field(metadata={"help": "Whose experiments: fap or apt."})
    suite: str = field(default=SUITE, metadata={"help": "The data sets: paper."})
    root: str | None = field(
        default=None, metadata={"help": "Where the data sets lie (CoOp's $DATA); without it, the Hub."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Another CLIP than the protocol's: a folder, a Hub id or a backbone's name."}
    )
    epsilon: str | None = field(default=None, metadata={"help": "Radii, e.g. 4/255; all of the protocol by default."})
    methods: str | None = field(
        default=None, metadata={"help": "A part of the methods, e.g. capt,fap; by default all."}
    )
    protocols: str | None = field(
        default=None,
        metadata={"help": "A part of the experiments: of few-shot, base-to-new, cross-dataset, shift; by default all."},
    )
    tasks: str | None = field(default=None, metadata={"help": "A part of the 11 data sets; by default all."})
    shots: str | None = field(
        default=None, metadata={"help": "A part of few-shot's numbers of images per class; by default all."}
    )
    seeds: str = field(default="0,1,2", metadata={"help": "Seeds, each a run of its own."})
    settings: str | None = field(
        default=None,
        metadata={"help": "Settings in place of the published ones, name=value,...; the tables name them."},
    )
    output: str | None = field(
        default=None, metadata={"help": "File of lines; outputs/reproduce/PROTOCOL.jsonl by default."}
    )
    report: str | None = field(
        default=None, metadata={"help": "Folder of tables and plots; by default of the output's name."}
    )
    backend: str = field(default="loky", metadata={"help": "Where workers run: loky (this machine), ray or dask."})
    workers: int = field(default=1, metadata={"help": "Cells at a time."})
    list: bool = field(default=False, metadata={"help": "Show what it needs and how long it takes, and run nothing."})

    @property
    def lines(self) -> Path:
        """The file of lines."""
        return Path(self.output or f"outputs/reproduce/{self.protocol}.jsonl")


class Recipe(NamedTuple):  # the fields of a dataclass here would be options
    """What is run of a protocol: the fields of `reproduce.yaml`."""

    models: Mapping[str, str]
    changes: Mapping[str, Any]
    method_settings: Mapping[str, Mapping[str, Any]]
    parts: Sequence[Mapping[str, Any]]
    said: Sequence[str]


@cache
def recipes() -> dict[str, Recipe]:
    """Returns what can be reproduced, by protocol."""
    return {name: Recipe(**of) for name, of in read_entries(files(__package__) / "reproduce.yaml").items()}


def main(argv: list[str]) -> None:
    """Shows what is needed, runs what is left, and writes our figures beside the published ones."""
    if sum(word.partition("=")[0] == "--settings" for word in argv) > 1:  # of which the parser would keep the last
        raise ValueError("--settings is given twice: write all of them behind one, as name=value,name=value.")
    (args,) = Parser(Arguments).into_dataclasses(argv)
    quiet()
    check_places({"root": args.root, "model_name_or_path": args.model_name_or_path})
    cells = make_cells(args)
    problems = find_problems(cells, args.root)
    if PartialState(cpu=not torch.accelerator.is_available()).is_main_process:
        print(overview(args, cells, problems))
    if args.list:
        return
    if problems:
        whole = some((f"{name} {why}" for name, why in problems.items()), 3, separator="; ")
        raise ValueError(
            f"Not all is there that is needed: {whole}. Get it, or leave it out (--tasks, --protocols, --epsilon)."
        )
    for model in dict.fromkeys(cell.model for cell in cells):
        with loading(model):
            load_base(model, "cpu")
    lines = run_cells(cells, args.lines, backend=args.backend, workers=args.workers, root=args.root)
    show_lines(cells, lines, args.lines, lambda: report(args))


def report(args: Arguments) -> None:
    """Writes the tables of a benchmark, and the published ones beside ours, which are printed."""
    folder = Path(args.report) if args.report else args.lines.with_suffix("")
    changed = [f"Settings in place of the published ones: {args.settings}."] if args.settings else []
    paths = write_report(args.lines, folder)
    published = write_published(args.lines, folder, [*recipes()[args.protocol].said, *changed])
    print(published[0].read_text(encoding="utf-8"))
    print(*published, *paths, sep="\n")


# ------------------------------------------------------------------------------------------------------------ what runs


def make_cells(args: Arguments) -> list[Cell]:
    """Returns the cells that the arguments ask for: all of the first seed, then of the second.

    All methods are planned before some are chosen, so that a cell is the same one whatever else is asked for.

    Raises:
        ValueError: Something that the protocol or the suite does not have.
    """
    _among("suite", [args.suite], [SUITE])
    _among("protocol", [args.protocol], list(recipes()))
    recipe, protocol = recipes()[args.protocol], get_protocol(args.protocol)
    own = settings_of(args.settings)
    if decided := sorted(own.keys() & DECIDED):
        raise ValueError(
            f"--settings {decided[0]} would change what is published: leave it out (--epsilon chooses radii)."
        )
    epsilons = [protocol.radius(epsilon) for epsilon in names(args.epsilon or list(protocol.epsilon))]
    if args.model_name_or_path and len(epsilons) > 1:
        raise ValueError(
            f"--model_name_or_path is one CLIP, and the protocol {protocol.name} has one for each of {', '.join(epsilons)}: give "
            "--epsilon too."
        )
    asked: dict[str, Sequence[Any]] = {
        "methods": list(map(method_name, names(args.methods or list(METHODS)))),
        "protocols": _among("protocols", names(args.protocols or list(PROTOCOLS)), PROTOCOLS),
        "shots": _among("shots", names(args.shots or _shots(recipe)), _shots(recipe)),
        "seeds": [int(seed) if seed.isdecimal() else seed for seed in names(args.seeds)],
    }
    found: dict[str, Cell] = {}
    for epsilon, part in product(epsilons, recipe.parts):
        planned = _plan(args, part, own, seeds=[0, *asked["seeds"]], epsilon=epsilon)
        found |= {cell.key: cell for cell in planned.cells() if _is_asked(cell, asked)}
    if not found:
        raise ValueError("Nothing is left to run of what --methods, --protocols, --tasks, --shots and --seeds name.")
    return sorted(found.values(), key=lambda cell: cell.seed)


def _plan(args: Arguments, part: Mapping[str, Any], own: Mapping[str, Any], *, seeds: list[Any], epsilon: str) -> Plan:
    recipe = recipes()[args.protocol]
    published = {name: value for name, value in settings_of(args.protocol).items() if name not in DECIDED}
    settings = {**published, **recipe.changes, **part.get("settings", {}), **own, "epsilon": epsilon}
    methods = recipe.method_settings.items()
    return Plan(
        get_suite(SUITE),
        args.model_name_or_path or recipe.models[epsilon],
        protocols=part["protocols"],
        shots=part.get("shots", (16,)),
        seeds=seeds,
        tasks=names(args.tasks) if args.tasks else None,
        settings={name: value for name, value in settings.items() if value is not None},
        method_settings={name: {**of, **{k: own[k] for k in of.keys() & own.keys()}} for name, of in methods},
        attacks=part.get("attacks"),
        evaluation_protocol=None if "attacks" in part else args.protocol,
    )


def _is_asked(cell: Cell, asked: Mapping[str, Any]) -> bool:
    here = cell.method in asked["methods"] and cell.protocol in asked["protocols"]
    few = cell.protocol != "few-shot" or str(cell.shots) in asked["shots"]
    return here and (not cell.tuned or (few and cell.seed in asked["seeds"]))


def _shots(recipe: Recipe) -> list[str]:
    return [str(shots) for part in recipe.parts for shots in part.get("shots", ())]


def _among(name: str, given: Sequence[str], allowed: Sequence[str]) -> Sequence[str]:
    """Returns what is given; a ValueError names what is not allowed."""
    if unknown := [value for value in given if value not in allowed]:
        raise ValueError(f"Unknown {name} {', '.join(unknown)}. Allowed here: {', '.join(allowed)}.")
    return given


# ------------------------------------------------------------------------------------------------------- what it needs


def find_problems(cells: Sequence[Cell], root: str | None) -> dict[str, str]:
    """Returns what is not there, model or data set, each with the end of a sentence that says why it cannot be used."""
    found = {model: _lacking_model(model) for model in dict.fromkeys(cell.model for cell in cells)}
    found |= {task: lacking(CATALOG[task], root) for task in _tasks(cells)}
    return {name: why for name, why in found.items() if why}


def overview(args: Arguments, cells: Sequence[Cell], problems: Mapping[str, str]) -> str:
    """Returns what is needed: weights, data sets, disk and time."""
    protocol, tasks = get_protocol(args.protocol), _tasks(cells)
    known = [CATALOG[task].gigabytes for task in tasks]
    models = [_row_of_model(cell, problems) for cell in {cell.model: cell for cell in cells}.values()]
    unknown = f", and {known.count(None)} of unknown size" if None in known else ""
    tables = [
        _table(("radius", "CLIP", "here", "GB", "from", "licence"), models),
        _table(("data set", "here", "GB", "from", "licence"), [_row_of_task(of, args.root, problems) for of in tasks]),
    ]
    missing = ["\n".join(f"- {name} {why}." for name, why in problems.items())] if problems else []
    parts = [
        f"{protocol.title} ({protocol.paper}): {len(cells):,} cells by the protocol {protocol.name}.",
        *tables,
        *missing,
        f"{ARCHIVES} {sum(filter(None, known)):.0f} GB{unknown}. {_adapters(cells)}",
        *_time(cells, args.lines, args.workers),
    ]
    return "\n\n".join(parts) + "\n"


def _tasks(cells: Sequence[Cell]) -> list[str]:
    measured = {target.task for cell in cells for target in cell.targets}
    needed = measured | {cell.task for cell in cells if cell.tuned}
    return [task for task in CATALOG if task in needed]


def _lacking_model(model: str) -> str:
    if os.path.isdir(os.path.expanduser(model)) or model in EMBEDDED:
        return ""
    if model in BACKBONES:
        entry = BACKBONES[model]
        if entry.on_hub or (cache_folder() / model / RECORD).is_file():
            return ""
        return (
            f"is not on the Hub: get its file from {entry.address} and convert it once with `capt-peft backbones {model} "
            "--checkpoint FILE`"
        )
    if constants.HF_HUB_OFFLINE and not is_cached(model):
        return "is neither a folder here nor in the Hub's cache, and the Hub is not asked while HF_HUB_OFFLINE is set"
    return ""


def _row_of_model(cell: Cell, problems: Mapping[str, str]) -> tuple[str, ...]:
    entry = BACKBONES.get(cell.model)
    folder = os.path.isdir(os.path.expanduser(cell.model)) or cell.model in EMBEDDED
    here = folder or is_cached(cell.model) or bool(entry and (cache_folder() / cell.model / RECORD).is_file())
    place = Markdown(entry.address) if entry else "a folder" if folder else Markdown(f"{HUB}/{cell.model}")
    licence = entry.say("licence") if entry else "see there"
    return cell.epsilon, cell.model, _state(cell.model, problems, here), f"{WEIGHTS_GB}", place, licence


def _row_of_task(task: str, root: str | None, problems: Mapping[str, str]) -> tuple[str, ...]:
    entry = CATALOG[task]
    place = f"{root}/{entry.coop_folder or task}" if root else Markdown(f"{HUB}/datasets/{entry.hub_id}")
    place = place if root or entry.hub_id else "-"
    return task, _state(task, problems, root is not None), f"{entry.gigabytes or '?'}", place, entry.licence


def _state(name: str, problems: Mapping[str, str], here: bool) -> str:
    if name in problems:
        return "not whole" if problems[name].startswith("is not whole") else "no"
    return "yes" if here else "fetched at first use"


def _adapters(cells: Sequence[Cell]) -> str:
    tuned = {cell.training_key: cell for cell in cells if cell.tuned}
    size = sum(OTHER_GB if cell.prompts.get("coupling", "none") == "none" else COUPLED_GB for cell in tuned.values())
    return f"The {len(tuned):,} adapters take up to {size:.1f} GB beside the lines."


def _time(cells: Sequence[Cell], output: Path, workers: int) -> list[str]:
    """Returns a table of the experiments with the hours that are left, and what these are guessed from."""
    lines, seen = Lines(output).read(), set()
    rows: dict[tuple[str, ...], list[Any]] = {}  # cells, finished ones, and seconds of the others
    spent = expected = 0.0
    for cell in cells:
        seconds = gpu_seconds(cell, tuned=cell.training_key in seen)
        seen.add(cell.training_key)
        shots = shots_name(cell.shots) if cell.tuned else "no training"
        row = rows.setdefault((cell.epsilon, cell.protocol, shots, ", ".join(cell.attacks)), [0, 0, 0.0])
        row[0] += 1
        line = lines.get(cell.key)
        if line is not None and is_whole(line, cell):
            spent, expected = spent + line["seconds"], expected + seconds
            row[1] += 1
        else:
            row[2] += seconds
    pace, finished = (spent / expected if expected else 1.0), sum(of[1] for of in rows.values())
    head = ("epsilon", "experiment", "shots", "attacks", "cells", "finished", "hours left")
    shown = [(*place, f"{n}", f"{done}", f"{pace * left / 3600:,.1f}") for place, (n, done, left) in rows.items()]
    total = pace * sum(of[2] for of in rows.values()) / 3600
    several = f" ({total / workers:,.1f} with {workers} workers)" if workers > 1 else ""
    guessed = f"the pace of the {finished:,} finished cells" if finished else f"{GPU} (docs/performance.md)"
    return [
        _table(head, shown),
        f"Left: about {total:,.1f} hours{several}, guessed from operations and {guessed}; it may be off by a factor of two.",
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([table_row(head), "|" + "---|" * len(head), *map(table_row, rows)])
