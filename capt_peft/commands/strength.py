"""Measures an adapter over its strength, from 0 (the base model) to 1, chooses one on validation images, and writes it.

capt-peft strength outputs/demo                         # the best harmonic mean of clean and robust accuracy
capt-peft strength outputs/demo --keep_clean 0.99       # the most robust one that keeps 99% of the base's clean accuracy
capt-peft strength outputs/demo --strengths 0,0.25,1    # at these
capt-peft strength outputs/demo --set 0.5               # this one, nothing is chosen

The accuracies in results.json are then measured again at that strength. A killed measurement resumes where it stopped.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..attacks import Attack, ThreatModel, parse_attack
from ..attacks.registry import known_attack
from ..clip.classifier import ZeroShotClassifier
from ..data import Task
from ..evaluation.loop import evaluate
from ..evaluation.strength import draw_front, strength_front, strength_kept
from ..randomness import check_seed
from ..results.card import CARD, adapter_config, is_replaceable
from ..results.hub import save_strength
from ..results.run import RunResults
from ..results.strength import STRENGTH, StrengthFront, check_keep_clean
from ..tuner.config import check_strength
from ..tuner.fingerprint import adapter_fingerprint
from ..utils.files import make_writable
from .card import adapter_folder
from .data import DataArguments, measured
from .ending import loading
from .export import say_what_stays
from .options import values_in
from .parser import Parser
from .tuned import TunedDataArguments, read_record, take_over


@dataclass
class Arguments(TunedDataArguments):
    """What is measured, on what, and which strength is written."""

    adapter: str = field(default="", metadata={"help": "Folder of a CAPT adapter."})
    strengths: str = field(
        default="0,0.1,0.25,0.5,0.75,1", metadata={"help": "Comma-separated, 0 to 1; 0 is measured in any case."}
    )
    keep_clean: float | None = field(
        default=None,
        metadata={
            "help": "The most robust one that keeps this share of the base's clean accuracy, e.g. 0.99; by default the one "
            "of the best H, the harmonic mean of clean and robust accuracy."
        },
    )
    set: float | None = field(default=None, metadata={"help": "Write this strength; nothing is measured to choose it."})
    evaluate: bool = field(
        default=True, metadata={"help": "Measure the accuracies in results.json again at the strength that is written."}
    )
    split: str = field(default="validation", metadata={"help": "Split that the strength is chosen on."})
    choose_on_test: bool = field(
        default=False, metadata={"help": "Allow --split test, whose accuracy is then too optimistic."}
    )
    limit: int | None = field(default=None, metadata={"help": "Choose on this many images, drawn by seed 0."})
    attacks: str | None = field(
        default=None,
        metadata={"help": "Comma-separated, the worst case counts; by default the one of results.json, or pgd-20."},
    )
    norm: str = field(default="linf", metadata={"help": "Norm of the threat model: linf, l2, l1 or patch."})
    epsilon: str = field(
        default="4/255",
        metadata={"help": "Radius in [0, 1] pixels, e.g. 4/255; by default that of the adapter's tuning."},
    )
    batch_size: int = field(default=128, metadata={"help": "Images per piece of work."})
    seed: int = field(default=0, metadata={"help": "Seed of the attacks."})
    overwrite: bool = field(default=False, metadata={"help": "Measure again what was measured before."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use an accelerator."})

    @property
    def values(self) -> list[float]:
        """The strengths to measure at."""
        try:
            return [float(word) for word in self.strengths.split(",")]
        except ValueError:
            raise ValueError(f"strengths={self.strengths!r} must be numbers from 0 to 1 with commas.") from None


def parse_args(argv: list[str]) -> tuple[Arguments, RunResults | None]:
    """Reads the command line and the adapter's record, and refuses what cannot work before anything is loaded."""
    (args,) = Parser(Arguments).into_dataclasses(argv)
    named = {*values_in(argv)}
    folder = adapter_folder(args.adapter, of_capt=True)
    for strength in args.values if args.set is None else [args.set]:
        check_strength(strength, adapter_config(folder).modules_to_save)
    if args.set is not None:
        idle = named - {"adapter", "set", "no_evaluate", "batch_size", "overwrite", "use_cpu"}
        if idle:
            raise ValueError(f"--{min(idle)} has no effect with --set, which chooses nothing.")
    check_keep_clean(args.keep_clean)
    check_seed(args.seed)
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if args.split == "train":
        raise ValueError("split='train' has the images that it was tuned on. Choose on validation images.")
    if args.split == "test" and not args.choose_on_test:
        raise ValueError(
            "A strength that is chosen on test images makes their accuracy too high. Leave --split out, or give --choose_on_test "
            "if you know other test images."
        )
    make_writable(folder, STRENGTH, CARD, given="adapter")
    record = read_record(str(folder)).run
    if args.set is None:
        take_over(args, args.adapter, named | {"split"})
    return args, record


def check_choice(task: Task, split: str) -> None:
    """Raises a ValueError unless a task has images to choose a strength on."""
    if split not in task.splits or not len(task[split]):
        raise ValueError(
            f"{task.name} has no {split} split to choose a strength on; it has {', '.join(task.splits)}. Give data that has one "
            "(--validation_split names it), or a strength itself."
        )


def task_details(task: Task, split: str, limit: int | None = None) -> dict[str, Any]:
    """Returns what an evaluation records of the data."""
    return {"task": {"name": task.name, "source": task.source, "split": split, "limit": limit}}


def chosen_attacks(args: Arguments, record: RunResults | None, named: Mapping[str, str]) -> list[Attack]:
    """Returns the attacks of the front: those that are named, or the one that the record's accuracies were measured with."""
    if record is not None and not named.keys() & {"attacks", "norm", "epsilon"}:
        return [recorded_attack(record)]
    name = "pgd-20" if record is None else str(record.evaluation.attack["name"])
    names = [word.strip() for word in (args.attacks or name).split(",")]
    return [parse_attack(word, ThreatModel(args.norm, args.epsilon)) for word in names if word != "clean"]


def recorded_attack(record: RunResults) -> Attack:
    """Returns the attack that a record's accuracies were measured with."""
    attack = known_attack(record.evaluation.attack)
    if attack is None:
        raise ValueError(
            f"results.json has the figures of an attack of somebody else's, {record.evaluation.attack['name']}. Name one with "
            "--attacks, and give --no_evaluate."
        )
    return attack


def load_classifier(folder: Path, task: Task, data: DataArguments, device: torch.device) -> ZeroShotClassifier:
    """Returns the adapter as a classifier over the task's classes."""
    with loading(str(folder)):
        classifier = ZeroShotClassifier.from_pretrained(
            str(folder), class_names=task.class_names, **data.texts, dtype=torch.float32
        )
    return classifier.to(device)


def measure_front(args: Arguments, attacks: list[Attack], folder: Path, device: torch.device) -> StrengthFront:
    """Measures the front on the images that the strength is chosen on."""
    task = args.load()
    check_choice(task, args.split)
    classifier = load_classifier(folder, task, args, device)
    return strength_front(
        classifier,
        measured(task, args.split, args.limit),
        attacks,
        args.values,
        keep_clean=args.keep_clean,
        output=folder / "evaluations" / STRENGTH,
        batch_size=args.batch_size,
        seed=args.seed,
        overwrite=args.overwrite,
        details=task_details(task, args.split, args.limit),
    )


def measure_again(
    folder: Path, record: RunResults, strength: float, batch_size: int, device: torch.device
) -> RunResults:
    """Returns a record whose accuracies are those of the adapter at another strength, under the same attack and images."""
    attack = recorded_attack(record)
    data = DataArguments()
    take_over(data, str(folder), set())
    task = data.load()
    split, limit = record.evaluation.split, (record.configuration.get("script") or {}).get("eval_limit")
    classifier = load_classifier(folder, task, data, device)
    with strength_kept(classifier):
        classifier.strength = strength
        evaluation = evaluate(
            classifier,
            measured(task, split, limit),
            attack,
            signs=False,
            batch_size=batch_size,
            seed=record.seed,
            output=folder / "evaluations" / f"results.{strength!r}.json",
            details=task_details(task, split, limit),
        )
    return record.at_strength(evaluation, strength, adapter_fingerprint(folder, strength=strength))


def draw(front: StrengthFront, folder: Path) -> str:
    """Draws a front into an adapter's folder, and says where."""
    return f"The picture: {draw_front(front, folder / 'strength')[0]}"


def told(strength: float) -> str:
    """Says which strength an adapter has now."""
    acts = "" if strength else " It acts as the base model: nothing of the tuning is left at this strength."
    return f"The adapter's strength is {strength:g} now (0: the base model, 1: the whole adapter).{acts}"


def main(argv: list[str]) -> float:
    """Measures, chooses, writes and shows; returns the strength."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args, record = parse_args(argv)
    folder = adapter_folder(args.adapter, of_capt=True)
    attacks = [] if args.set is not None else chosen_attacks(args, record, values_in(argv))
    again = record if args.evaluate else None
    if again is not None:
        recorded_attack(again)  # or it raises
    state = PartialState(cpu=args.use_cpu or not torch.accelerator.is_available(), timeout=timedelta(days=7))
    front, strength = None, args.set
    if strength is None:
        front = measure_front(args, attacks, folder, state.device)
        strength = front.chosen.strength
    results = None
    if again is not None and again.strength != strength:
        results = measure_again(folder, again, strength, args.batch_size, state.device)
    if not state.is_main_process:
        return strength
    if front is not None:
        print(f"\n{front.table()}\n\n{draw(front, folder)}")
    before = adapter_config(folder).strength
    save_strength(folder, strength, front=front, results=results)
    print(f"\n{told(strength)}")
    given, calibration = shlex.quote(args.adapter), adapter_config(folder).calibration
    if calibration is not None and calibration["strength"] != strength:
        print(
            f"Its calibration held for strength {calibration['strength']:g} and no longer holds; capt-peft calibrate {given} "
            "fits one again."
        )
    shown = results or record
    if shown is not None and shown.strength == strength:
        print(f"\n{shown.table()}")
    elif record is not None:
        print(
            f"The accuracies in results.json are of strength {record.strength:g}, so the card does not show them; "
            f"capt-peft strength {given} --set {strength!r} measures again."
        )
    if strength != before:
        say_what_stays(folder)
    if not is_replaceable(folder / CARD):
        print(f"{folder / CARD} was written by a person and stays as it is.")
    return strength
