"""What a strength that validation images chose is worth: CAPT on the toy suite, beside zero-shot and the whole adapter.

capt-peft benchmark --suite toy --methods capt --shots 1,4,16 --output outputs/toy.jsonl     # tunes the adapters
python benchmarks/strength.py outputs/toy.adapters --output outputs/strength.jsonl
capt-peft report outputs/strength.jsonl

The lines are those of a benchmark, so that `capt-peft report` makes tables of them, with variants of the method:

- "": the whole adapter.
- "dial": the strength of the best H on validation images of what it was tuned on.
- "dial, target": that of the best H on a few labelled images of each target, where it is not what was tuned on.

Each line has the chosen strengths and the fronts. Run again, it resumes where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from peft import PeftModel
from tqdm.auto import tqdm

from capt_peft import ZeroShotClassifier, parse_attack
from capt_peft.benchmark import PROTOCOLS, Plan, get_suite
from capt_peft.benchmark.inputs import drawn, load_base, read_task, template_of
from capt_peft.benchmark.lines import Lines
from capt_peft.benchmark.plan import TRANSFERS, Cell, Target
from capt_peft.data import Task
from capt_peft.evaluation import evaluate
from capt_peft.evaluation.strength import strength_front
from capt_peft.utils.machine import describe_machine, versions

ATTACKS = ("pgd-20", "apgd-ce-20")  # the first one chooses
STRENGTHS = (0, 0.1, 0.25, 0.5, 1)
WHOLE, SOURCE, TARGET = "", "dial", "dial, target"
FEW = 50  # labelled images of a target
CHOOSING = 100  # validation images of what an adapter was tuned on
MEASURED = 100  # test images of a target


def cells(protocols: list[str], shots: list[int], seeds: list[int]) -> list[Cell]:
    """Returns a cell for each line, those of one adapter behind each other."""
    plan = Plan(
        get_suite("toy"), "tiny_clip", ["zero-shot", "capt"], protocols, shots, seeds, attacks=ATTACKS, limit=MEASURED
    )
    found = []
    for cell in plan.cells():
        if not cell.tuned:
            found.append(cell)
            continue
        found += [cell, replace(cell, variant=SOURCE)]
        others = [target for target in cell.targets if is_other(cell, target)]
        if others:
            found.append(replace(cell, variant=TARGET))
    return found


def is_other(cell: Cell, target: Target) -> bool:
    """Returns whether an adapter was tuned on something else than this target."""
    return target.task != cell.task or target.classes == "new"


def few_images(task: Task) -> datasets.Dataset:
    """Returns labelled images of a target, which are not measured: of its validation split, or the rest of its test split."""
    if "validation" in task.splits:
        return drawn(task["validation"], FEW)
    return task["test"].shuffle(seed=0).select(range(MEASURED, MEASURED + FEW))  # `drawn` measures those before


class Measurement:
    """One adapter, or the base model, of a cell."""

    def __init__(self, cell: Cell, adapters: Path) -> None:
        self.cell = cell
        base, self.processor = load_base(cell.model)
        self.model = PeftModel.from_pretrained(base, str(adapters / cell.training_key)) if cell.tuned else base
        self.attacks = [parse_attack(name, cell.threat) for name in cell.attacks]
        self.fronts: dict[str, Any] = {}
        self.results: dict[tuple[Target, float | None], dict[str, Any]] = {}

    def classifier(self, target: Target) -> tuple[ZeroShotClassifier, Task]:
        """Returns the classifier of a target's classes, and the target."""
        task = read_task(target.task, target.classes, None)
        return ZeroShotClassifier(self.model, self.processor, task.class_names, template_of(self.cell, task)), task

    def chosen(self, variant: str, target: Target) -> float:
        """Returns the strength at which a target is measured."""
        if variant == WHOLE:
            return 1.0
        own = self.cell.targets[0]
        place = target if variant == TARGET and is_other(self.cell, target) else own
        name = f"{place.task}, {place.classes}"
        if name not in self.fronts:
            classifier, task = self.classifier(place)
            data = drawn(task["validation"], CHOOSING) if place == own else few_images(task)
            self.fronts[name] = strength_front(
                classifier, data, self.attacks[0], STRENGTHS, seed=self.cell.seed, progress=False
            )
        return float(self.fronts[name].chosen.strength)

    def measured(self, target: Target, strength: float | None) -> dict[str, Any]:
        """Returns clean and robust accuracy on a target's test images, at a strength; None: without an adapter."""
        if (target, strength) not in self.results:
            classifier, task = self.classifier(target)
            if strength is not None:
                classifier.strength = strength
            data = drawn(task["test"], self.cell.limit)
            found = evaluate(classifier, data, self.attacks, seed=self.cell.seed, signs=False, progress=False)
            self.results[target, strength] = {
                "task": target.task,
                "classes": target.classes,
                "template": classifier.template,
                "clean": count(found.clean),
                "attacks": {outcome.name: count(outcome.accuracy) for outcome in found.attacks},
                "worst_case": count(found.robust),
            }
        return self.results[target, strength]

    def line(self, cell: Cell) -> dict[str, Any]:
        """Returns the line of a cell."""
        strengths = {target: self.chosen(cell.variant, target) if cell.tuned else None for target in cell.targets}
        results = [self.measured(target, strength) for target, strength in strengths.items()]
        fronts = {
            name: [
                {"strength": point.strength, "clean": count(point.clean), "robust": count(point.robust)}
                for point in front.points
            ]
            for name, front in self.fronts.items()
        }
        chosen = {f"{target.task}, {target.classes}": strength for target, strength in strengths.items()}
        more = {"strengths": chosen, "fronts": fronts} if cell.tuned else {}
        line = {
            "key": cell.key,
            "status": "finished",
            "cell": cell.to_dict(),
            "results": results,
            "training": {},
            **more,
        }
        return line | {"versions": versions(), "machine": describe_machine()}


def count(accuracy: Any) -> dict[str, int]:
    """Returns an accuracy as the lines of a benchmark have it."""
    return {"correct": accuracy.correct, "n": accuracy.n}


def by_adapter(todo: list[Cell]) -> Iterator[list[Cell]]:
    """Yields cells of the same adapter and targets together, so that a front is measured once."""
    groups: dict[Any, list[Cell]] = {}
    for cell in todo:
        groups.setdefault((cell.protocol, cell.method, cell.task, cell.shots, cell.seed), []).append(cell)
    yield from groups.values()


def main() -> None:
    """Measures what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path, help="folder of the adapters, OUTPUT.adapters of capt-peft benchmark")
    parser.add_argument("--output", type=Path, default=Path("outputs/strength.jsonl"), help="file of lines")
    parser.add_argument(
        "--protocols", default=",".join([*TRANSFERS, "few-shot", "base-to-new"]), help="as for capt-peft benchmark"
    )
    parser.add_argument("--shots", default="1,4,16", help="of the protocol few-shot")
    parser.add_argument("--seeds", default="0,1,2", help="seeds")
    args = parser.parse_args()
    numbers = [[int(number) for number in text.split(",")] for text in (args.shots, args.seeds)]
    asked = args.protocols.split(",")
    if unknown := [name for name in asked if name not in PROTOCOLS]:
        parser.error(f"unknown protocols {', '.join(unknown)}; allowed: {', '.join(PROTOCOLS)}")
    lines = Lines(args.output)
    done = lines.read()
    todo = [cell for name in asked for cell in cells([name], *numbers) if cell.key not in done]
    with tqdm(total=len(todo), unit="cell") as bar:
        for group in by_adapter(todo):
            measurement = Measurement(group[0], args.adapters)
            for cell in group:
                lines.append(measurement.line(cell))
                bar.update()


if __name__ == "__main__":
    main()
