"""What a strength that validation images chose is worth, for every method alike: adapters of a benchmark, whole and turned down.

capt-peft benchmark --suite toy --shots 1,4,16 --output outputs/toy.jsonl     # tunes the adapters
python benchmarks/strength.py outputs/toy.jsonl --output outputs/strength.jsonl
capt-peft report outputs/strength.jsonl

The lines are those of a benchmark on test images, so that `capt-peft report` makes tables of them, with these variants:

- that of the adapter, and zero-shot: as the benchmark measures them. What is in its lines already is taken from there.
- "dial": at the strength of the best H on validation images of what the adapter was tuned on, under the first attack.
- "dial, target": that of the best H on a few labelled images of each target, where it is not what was tuned on.

Each line has the chosen strengths and the fronts. Run again, it resumes where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from kept import Kept, or_one_sentence, read_kept, seeds_in
from tqdm.auto import tqdm

from capt_peft import ZeroShotClassifier, set_strength
from capt_peft.benchmark import Cell, Lines, Target
from capt_peft.benchmark.inputs import Inputs, drawn, read_task, template_of
from capt_peft.benchmark.lines import is_whole
from capt_peft.benchmark.run import measure
from capt_peft.data import Task
from capt_peft.evaluation.strength import strength_front
from capt_peft.results.accuracy import Accuracy
from capt_peft.utils.machine import describe_machine, versions

STRENGTHS = (0, 0.1, 0.25, 0.5, 1)
SOURCE, TARGET = "dial", "dial, target"
FEW = 50  # labelled images of a target
FINGERPRINT = "adapter_fingerprint"
CHOOSING = 100  # validation images of what an adapter was tuned on


def cells(cell: Cell, attacks: Sequence[str] = ()) -> dict[str, Cell]:
    """Returns the cells that an adapter is measured as on test images, by what chooses its strength; "": it is whole."""
    whole = replace(cell, split="test", attacks=tuple(attacks) or cell.attacks)
    if not cell.tuned:
        return {"": whole}
    named = [SOURCE, *([TARGET] if any(is_other(cell, target) for target in cell.targets) else [])]
    return {"": whole} | {how: replace(whole, variant=", ".join(filter(None, (cell.variant, how)))) for how in named}


def is_other(cell: Cell, target: Target) -> bool:
    """Returns whether an adapter was tuned on something else than this target."""
    return target.task != cell.task or target.classes == "new"


def few_images(task: Task, measured: int | None) -> datasets.Dataset:
    """Returns labelled images of a target, which are not measured: of its validation split, or the rest of its test split."""
    if "validation" in task.splits:
        return drawn(task["validation"], FEW)
    if measured is None or measured + FEW > len(task["test"]):
        raise ValueError(
            f"{task.name} has no validation images, and fewer than {FEW} test images that are not measured. Tune and measure "
            "with a smaller --limit."
        )
    return task["test"].shuffle(seed=0).select(range(measured, measured + FEW))  # `drawn` measures those before


class Measurement:
    """One adapter, or the base model, that is measured as several cells."""

    def __init__(self, kept: Kept, whole: Cell) -> None:
        self.cell, self.fingerprint = whole, kept.line.get(FINGERPRINT)
        self.model, self.processor = kept.load()
        self.fronts: dict[str, Any] = {}
        self.results: dict[tuple[Target, float], Any] = {}
        if is_whole(kept.line, whole):
            self.results = {(target, 1.0): row for target, row in zip(whole.targets, kept.line["results"], strict=True)}

    def chosen(self, how: str, target: Target) -> float:
        """Returns the strength at which a target is measured."""
        if not how:
            return 1.0
        own = self.cell.targets[0]
        place = target if how == TARGET and is_other(self.cell, target) else own
        name = f"{place.task}, {place.classes}"
        if name not in self.fronts:
            task = read_task(place.task, place.classes, None)
            data = drawn(task["validation"], CHOOSING) if place == own else few_images(task, self.cell.limit)
            classifier = ZeroShotClassifier(
                self.model, self.processor, task.class_names, template_of(self.cell, task), class_texts=task.class_texts
            )
            self.fronts[name] = strength_front(
                classifier, data, self.cell.parsed_attacks()[0], STRENGTHS, seed=self.cell.seed, progress=False
            )
        return float(self.fronts[name].chosen.strength)

    def measured(self, target: Target, strength: float) -> dict[str, Any]:
        """Returns clean and robust accuracy on a target's test images, at a strength."""
        if (target, strength) not in self.results:
            if self.cell.tuned:
                set_strength(self.model, strength)
            self.results[target, strength] = measure(self.cell, self.model, self.processor, target)
            if self.cell.tuned:
                set_strength(self.model, 1)
        return self.results[target, strength]

    def line(self, cell: Cell, how: str, digests: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the line of a cell."""
        strengths = {target: self.chosen(how, target) for target in cell.targets}
        results = [self.measured(target, strength) for target, strength in strengths.items()]
        more = {}
        if cell.tuned:
            more["strengths"] = {f"{target.task}, {target.classes}": strength for target, strength in strengths.items()}
            more["fronts"] = {
                name: [
                    {"strength": point.strength, "clean": count(point.clean), "robust": count(point.robust)}
                    for point in front.points
                ]
                for name, front in self.fronts.items()
            }
        line = {
            "key": cell.key,
            "status": "finished",
            "cell": cell.to_dict(),
            "results": results,
            "training": {},
            FINGERPRINT: self.fingerprint,
            **more,
        }
        return {**line, **digests, "versions": versions(), "machine": describe_machine()}


def count(accuracy: Accuracy) -> dict[str, int]:
    """Returns an accuracy as the lines of a benchmark have it."""
    return {"correct": accuracy.correct, "n": accuracy.n}


def main() -> None:
    """Measures what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="file of lines of capt-peft benchmark; its adapters are beside it")
    parser.add_argument("--output", type=Path, default=Path("outputs/strength.jsonl"), help="file of lines")
    parser.add_argument("--methods", help='methods, or rows of its tables such as "capt (rate 0.3)"; by default all')
    parser.add_argument("--seeds", help="seeds, such as 0,1,2; by default all")
    parser.add_argument("--attacks", help="attacks in place of the benchmark's, such as pgd-20,apgd-ce-20")
    args = parser.parse_args()
    if args.output.resolve() == args.lines.resolve():
        parser.error(f"--output {args.output} is the benchmark's own file")
    methods, attacks = ([part for part in (text or "").split(",") if part] for text in (args.methods, args.attacks))
    lines, inputs = Lines(args.output), Inputs()
    done = lines.read()
    todo = {}
    for kept in read_kept(args.lines, methods, seeds_in(args.seeds)):
        of = cells(kept.cell, attacks)
        now = kept.line.get(FINGERPRINT)  # an adapter that was tuned again is measured again
        left = {how: cell for how, cell in of.items() if done.get(cell.key, {FINGERPRINT: ""}).get(FINGERPRINT) != now}
        # of lines of the same adapter, the one that has the figures of the whole already
        if left and (of[""].key not in todo or kept.cell == of[""]):
            todo[of[""].key] = kept, of[""], left
    with tqdm(total=sum(len(left) for *_, left in todo.values()), unit="cell") as bar:
        for kept, whole, left in todo.values():
            measurement = Measurement(kept, whole)
            for how, cell in left.items():
                lines.append(measurement.line(cell, how, inputs.digests(cell)))
                bar.update()


if __name__ == "__main__":
    or_one_sentence(main)
