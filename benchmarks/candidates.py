"""What changes of CAPT are worth: each is CAPT in one place changed, tuned and measured as a cell of the benchmark is.

python benchmarks/candidates.py --candidates all --settings learning_rate=0.3,max_steps=80 --output outputs/search.jsonl
python benchmarks/candidates.py --candidates "ema,early stop" --methods adv-vp --settings learning_rate=0.3,max_steps=80
python benchmarks/candidates.py --compare outputs/search.jsonl

--candidates is "all", "few" (what keeps clean accuracy, for --shots 1,4) or names; `CANDIDATES` has them. Every other option is
one of `capt-peft benchmark`, on top of benchmarks/search/candidates.yaml, and names the cells and the settings that a candidate
is a change of. "plain" is these settings alone: a cell of the benchmark itself, whose line and adapter are found where --output
has them and --variant is the name that they have there. A candidate is the variant of its name, which `capt-peft report` reads.

--compare prints what each candidate, and any other variant, adds to plain in clean, robust and H, with the 95% interval of the
paired difference, and what the rule of docs/search.md says of candidates.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from capt_peft import CaptTrainer, parse_attack, set_strength
from capt_peft.attacks import Attack, AttackResult
from capt_peft.benchmark import Cell, listing, run_cells, tune_adapter
from capt_peft.benchmark.inputs import Root, drawn
from capt_peft.benchmark.plan import ZERO_SHOT
from capt_peft.commands.benchmark import make_plan, names, parse_args, places
from capt_peft.evaluation import evaluate
from capt_peft.methods import PROMPT_FIELDS
from capt_peft.objectives import CaptObjective, Objective, Views, kl_to, true_probability
from capt_peft.report import read_sections
from capt_peft.report.statistics import HARMONIC, MEASURES, Difference, difference, rows_of
from capt_peft.results.accuracy import harmonic_mean

CELLS = Path(__file__).parent / "search" / "candidates.yaml"
PLAIN, CANDIDATE = "plain", "candidate"  # the latter: among the settings of a cell, so that it has a key of its own
OURS = "capt"
FIRST_SEED, SEEDS = 0, (0, 1, 2)  # of docs/search.md

# ---------------------------------------------------------------------------------------------------------- objectives


def frozen_share(frozen: Tensor, tuned: Tensor) -> Tensor:
    """Returns frozen / (frozen + tuned), and 1/2 where both are 0."""
    return torch.where(frozen + tuned > 0, frozen / (frozen + tuned).clamp_min(1e-30), 0.5)


class AlwaysFrozen(CaptObjective):
    """CAPT's objective with another α, or λ, from the frozen predictions, whatever `weighting` is."""

    @property
    def needs_frozen(self) -> bool:
        """Whether λ is above 0."""
        return self.consistency > 0


class AlphaAgreement(AlwaysFrozen):
    """α_i = 1 - JS(frozen_i, tuned_i) / log 2, of the predictions on the clean image.

    Where both models disagree, tuning has learned of the image what the frozen model does not know, and to be held to it would
    undo that; where they agree, the frozen predictions say the same and do not move.
    """

    @torch.no_grad()
    def alpha(self, views: Views) -> Tensor:
        """Returns α_i: (B,) in [0, 1]."""
        frozen, tuned = _frozen(views).softmax(-1), views.clean.softmax(-1)
        entropy = torch.special.entr
        divergence = (entropy((frozen + tuned) / 2) - (entropy(frozen) + entropy(tuned)) / 2).sum(-1)
        return (1 - divergence / torch.log(torch.tensor(2.0))).clamp(0, 1)


class AlphaPerClass(AlwaysFrozen):
    """α_i = F_c / (F_c + T_c), with c the class of image i, and F and T running means of p(y) of the frozen and the tuned model.

    A batch with images of a class moves its means by a tenth towards theirs; the first one sets them.
    """

    rate = 0.1

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._means: dict[int, Tensor] = {}  # by class: F and T

    @torch.no_grad()
    def alpha(self, views: Views) -> Tensor:
        """Returns α_i: (B,) in [0, 1], after the means have moved."""
        both = torch.stack([true_probability(z, views.labels) for z in (_frozen(views), views.clean)])  # (2, B)
        for label in views.labels.unique().tolist():
            here = both[:, views.labels == label].mean(1)
            self._means[label] = torch.lerp(self._means.get(label, here), here, self.rate)
        return frozen_share(*torch.stack([self._means[label] for label in views.labels.tolist()], 1))


class LambdaSchedule(CaptObjective):
    """λ of step t is a line through λ at the middle of the T steps: 2λ (t + 1/2) / T, or 2λ (1 - (t + 1/2) / T) falling."""

    def __init__(self, *args: Any, steps: int, rising: bool) -> None:
        super().__init__(*args)
        if steps < 1:
            raise ValueError(f"max_steps={steps}: a schedule of λ needs the number of steps. Give max_steps.")
        self.steps, self.rising = steps, rising

    def __call__(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss with the λ of the step, and its parts."""
        share = views.progress + 0.5 / self.steps
        now = 2 * self.consistency * (share if self.rising else 1 - share)
        return CaptObjective(now, self.weighting, self.frozen_term)(views)


class LambdaByConfidence(AlwaysFrozen):
    """λ_i = λ p_frozen(y_i) / mean_j p_frozen(y_j), over the images j of the batch."""

    def __call__(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its parts, without λ_i."""
        if not self.needs_frozen:
            return super().__call__(views)
        trust = true_probability(_frozen(views), views.labels)
        weights, alpha = trust / trust.mean().clamp_min(1e-30), self.alpha(views)
        clean_loss = F.cross_entropy(views.clean, views.labels)
        tuned, frozen = kl_to(views.adversarial, views.clean), self._distance_to_frozen(views)
        loss = clean_loss + self.consistency * (weights * ((1 - alpha) * tuned + alpha * frozen)).mean()
        parts = {"clean_loss": clean_loss, "consistency_tuned": tuned.mean(), "consistency_frozen": frozen.mean()}
        return loss, {name: part.detach() for name, part in (parts | {"alpha": alpha.mean()}).items()}


class AndAdversarialCrossEntropy(CaptObjective):
    """CAPT's objective with (CE(clean, y) + CE(adversarial, y)) / 2 in place of CE(clean, y)."""

    def __call__(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its parts, `adversarial_loss` too."""
        loss, parts = super().__call__(views)
        clean, adversarial = (F.cross_entropy(logits, views.labels) for logits in (views.clean, views.adversarial))
        return loss + (adversarial - clean) / 2, parts | {"adversarial_loss": adversarial.detach()}


class HalfLabel(CaptObjective):
    """CAPT's objective with (p_frozen + onehot(y)) / 2 in place of p_frozen in the divergence; α stays that of p_frozen."""

    def _distance_to_frozen(self, views: Views) -> Tensor:
        label = F.one_hot(views.labels, views.clean.shape[1])
        mixed = (_frozen(views).softmax(-1) + label) / 2
        return super()._distance_to_frozen(replace(views, frozen=mixed.clamp_min(1e-30).log()))


class FixedClean(CaptObjective):
    """CAPT's objective without a gradient through the clean predictions that adversarial ones are drawn to."""

    def __call__(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the same loss and parts, the gradient of the clean images being that of their cross-entropy alone."""
        loss, parts = super().__call__(replace(views, clean=views.clean.detach()))
        clean = F.cross_entropy(views.clean, views.labels)
        return loss + (clean - clean.detach()), parts


def _frozen(views: Views) -> Tensor:
    assert views.frozen is not None  # `needs_frozen` asks for it
    return views.frozen


# ----------------------------------------------------------------------------------------------------------- callbacks


class LateSteps(TrainerCallback):
    """Gives the training attack other steps in the second half of the run."""

    def __init__(self, trainer: CaptTrainer, cell: Cell, steps: int = 4) -> None:
        self.trainer, self.steps = trainer, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Changes the attack once half of the steps are done."""
        if 2 * state.global_step >= state.max_steps:
            attack: Any = self.trainer.attack
            self.trainer.attack = replace(attack, steps=self.steps)


class Average(TrainerCallback):
    """Leaves the exponential average of the prompts over the steps, which spans about the last tenth of the T steps.

    a_t = d a_{t-1} + (1 - d) θ_t from a_0 = 0, with d = 1 - 10 / T, and in the end θ = a_T / (1 - d^T).
    """

    span = 0.1

    def __init__(self, trainer: CaptTrainer, cell: Cell) -> None:
        self.parameters = [p for p in trainer.classifier.model.parameters() if p.requires_grad]
        self.sums = [torch.zeros_like(p) for p in self.parameters]
        self.weight = 0.0  # 1 - d^t

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the prompts of the step."""
        decay = max(0.0, 1 - 1 / (self.span * state.max_steps))
        self.weight = decay * self.weight + 1 - decay
        for average, parameter in zip(self.sums, self.parameters, strict=True):
            average.mul_(decay).add_(parameter.detach(), alpha=1 - decay)

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the average in place of the prompts."""
        for average, parameter in zip(self.sums, self.parameters, strict=True):
            parameter.copy_(average / self.weight)


class RandomStrength(TrainerCallback):
    """Draws the strength of the prompts for each step, uniformly from [0.25, 1]; in the end it is 1."""

    least = 0.25

    def __init__(self, trainer: CaptTrainer, cell: Cell) -> None:
        self.model = trainer.classifier.model
        self.random = random.Random(cell.seed)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws."""
        set_strength(self.model, self.random.uniform(self.least, 1))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives the prompts their full strength back."""
        set_strength(self.model, 1)


class PerturbedPrompts(TrainerCallback):
    """Takes each step's gradient at prompts that are worse by 5% of their length (AWP, Wu et al. 2020, arXiv 2004.05884).

    v = 0.05 ‖θ‖ g / ‖g‖ for each tensor θ of the prompts, with g the gradient of the step's loss at θ; the step is that of θ with
    the gradient at θ + v, on the adversarial images that were made at θ. The log's means are over both passes.
    """

    share = 0.05

    def __init__(self, trainer: CaptTrainer, cell: Cell) -> None:
        self.trainer, self.step = trainer, trainer.training_step
        self.parameters = [p for p in trainer.classifier.model.parameters() if p.requires_grad]
        trainer.training_step = self.training_step  # type: ignore[method-assign]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Runs a step in the place of the trainer's own."""
        trainer, attack, before = self.trainer, self.trainer.attack, [p.detach().clone() for p in self.parameters]
        kept: Any = Kept(attack)
        inputs = trainer._prepare_inputs(inputs)
        try:
            trainer.attack = kept
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs)
            gradients = torch.autograd.grad(loss, self.parameters)
            with torch.no_grad():
                for parameter, gradient in zip(self.parameters, gradients, strict=True):
                    length = self.share * parameter.norm() / gradient.norm().clamp_min(1e-30)
                    parameter.add_(gradient * length)
            kept.again = True
            return self.step(model, inputs, *args)
        finally:
            trainer.attack = attack
            with torch.no_grad():
                for parameter, own in zip(self.parameters, before, strict=True):
                    parameter.copy_(own)


class Kept:
    """An attack whose images of a first pass are those of a second too."""

    def __init__(self, attack: Attack) -> None:
        self.attack, self.results, self.again = attack, list[AttackResult](), False

    def run(self, *args: Any, **kwargs: Any) -> AttackResult:
        """Attacks, or returns what the first pass had."""
        if self.again:
            return self.results.pop(0)
        self.results.append(self.attack.run(*args, **kwargs))
        return self.results[-1]


class EarlyStop(TrainerCallback):
    """Leaves the prompts of the best H on validation images that are not measured, of equal ones the first.

    Attributes:
        record: For the line: how many images there were, H of each point in percent, and the step that was chosen.
    """

    every = 40  # steps
    images = 100  # at most
    attack = "pgd-10"

    def __init__(self, trainer: CaptTrainer, cell: Cell) -> None:
        self.classifier, self.seed = trainer.classifier, cell.seed
        self.attacks = [parse_attack(self.attack, cell.threat)]
        self.data = unmeasured(trainer.task["validation"], cell, self.images)
        self.parameters = [p for p in trainer.classifier.model.parameters() if p.requires_grad]
        self.best: tuple[float, list[Tensor]] = -1.0, []
        self.record: dict[str, Any] = {"images": len(self.data), "harmonic": {}, "step": None}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures after every 40 steps, and after the last."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        found = evaluate(self.classifier, self.data, self.attacks, seed=self.seed, signs=False, progress=False)
        value = harmonic_mean(100 * found.clean.value, 100 * found.robust.value)
        self.record["harmonic"][str(state.global_step)] = round(value, 2)
        if value > self.best[0]:
            self.best = value, [p.detach().clone() for p in self.parameters]
            self.record["step"] = state.global_step

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the best prompts in place of the last."""
        for parameter, best in zip(self.parameters, self.best[1], strict=True):
            parameter.copy_(best)


def unmeasured(validation: datasets.Dataset, cell: Cell, images: int) -> datasets.Dataset:
    """Returns validation images that a cell does not measure, `images` of them or, if there are fewer, those.

    Raises:
        ValueError: All of them are measured.
    """
    measured = (len(validation) if cell.limit is None else cell.limit) if cell.split == "validation" else 0
    order = drawn(validation, len(validation))  # whose first ones are measured
    if measured >= len(order):
        raise ValueError(
            f"All {len(order)} validation images of {cell.task} are measured, so that none are left to stop on. Measure fewer "
            "of them (--limit), or leave this candidate out."
        )
    return order.select(range(measured, min(measured + images, len(order))))


# ---------------------------------------------------------------------------------------------------------- candidates

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A change of a method in one place.

    Args:
        settings: Settings that it has in place of plain ones; or what makes them of the plain ones.
        objective: Makes the objective of the trainer's arguments.
        callback: Makes a callback of the trainer and the cell.
        any_method: Whether it suits other methods than CAPT.
        few: Whether it is for few shots, and not one of "all".
    """

    settings: Settings | Callable[[Settings], Settings] = field(default_factory=dict)
    objective: Callable[[CaptTrainer], Objective] | None = None
    callback: Callable[[CaptTrainer, Cell], TrainerCallback] | None = None
    any_method: bool = False
    few: bool = False

    @property
    def is_settings(self) -> bool:
        """Whether it needs no code beside the package."""
        return self.objective is None and self.callback is None


def of_arguments(kind: Callable[..., Objective], **more: Any) -> Callable[[CaptTrainer], Objective]:
    """Returns what makes an objective with the λ, α and frozen term of a trainer's arguments."""
    return lambda trainer: kind(trainer.args.consistency, trainer.args.weighting, trainer.args.frozen_term, **more)


def schedule(rising: bool) -> Callable[[CaptTrainer], Objective]:
    """Returns what makes an objective whose λ rises or falls over the run."""
    return lambda trainer: of_arguments(LambdaSchedule, steps=trainer.args.max_steps, rising=rising)(trainer)


def tenth_of_the_rate(plain: Settings) -> Settings:
    """Returns a tenth of the learning rate of plain settings."""
    return {"learning_rate": plain.get("learning_rate", 0.1) / 10}


CANDIDATES: dict[str, Candidate] = {
    "alpha margin": Candidate({"weighting": "margin"}),
    "alpha agreement": Candidate(objective=of_arguments(AlphaAgreement)),
    "alpha per class": Candidate(objective=of_arguments(AlphaPerClass)),
    "lambda rising": Candidate(objective=schedule(rising=True)),
    "lambda falling": Candidate(objective=schedule(rising=False)),
    "lambda by confidence": Candidate(objective=of_arguments(LambdaByConfidence)),
    "adversarial cross-entropy": Candidate(objective=of_arguments(AndAdversarialCrossEntropy)),
    "frozen features": Candidate({"frozen_term": "features"}),
    "kl attack": Candidate({"attack_loss": "kl"}, any_method=True),
    "late attack steps": Candidate({"attack_steps": 2}, callback=LateSteps, any_method=True),
    "ema": Candidate(callback=Average, any_method=True),
    "random strength": Candidate(callback=RandomStrength, any_method=True),
    "perturbed prompts": Candidate(callback=PerturbedPrompts, any_method=True),
    "16 vision prompts": Candidate({"num_vision_tokens": 16}, any_method=True),
    "class-specific prompts": Candidate({"class_specific": True}, any_method=True),
    "320 steps": Candidate({"max_steps": 320}, any_method=True),
    "early stop": Candidate({"max_steps": 320}, callback=EarlyStop, any_method=True),
    "lambda 0.5": Candidate({"consistency": 0.5}),
    "lambda 1": Candidate({"consistency": 1.0}),
    "half label": Candidate(objective=of_arguments(HalfLabel)),
    "fixed clean": Candidate(objective=of_arguments(FixedClean)),
    "alpha 1": Candidate({"weighting": "1"}, few=True),
    "lambda 3": Candidate({"consistency": 3.0}, few=True),
    "20 steps": Candidate({"max_steps": 20}, any_method=True, few=True),
    "tenth of the rate": Candidate(tenth_of_the_rate, any_method=True, few=True),
}


def asked_for(text: str, methods: Sequence[str]) -> list[str]:
    """Returns the names of candidates that a list means, in which "all" and "few" are plain and those that suit the methods.

    Raises:
        ValueError: An unknown name, a change of CAPT's objective for another method, or a method that tunes nothing.
    """
    if ZERO_SHOT in methods:
        raise ValueError(f"{ZERO_SHOT} tunes nothing, so that no candidate changes it. Leave it out of --methods.")
    suited = [name for name, of in CANDIDATES.items() if of.any_method or set(methods) == {OURS}]
    groups = {
        group: [PLAIN, *(name for name in suited if CANDIDATES[name].few == (group == "few"))]
        for group in ("all", "few")
    }
    found = [name for word in text.split(",") for name in groups.get(word.strip(), [word.strip() or PLAIN])]
    for name in found:
        if name != PLAIN and name not in CANDIDATES:
            raise ValueError(f"Unknown candidate {name!r}. Allowed: all, few, {', '.join([PLAIN, *CANDIDATES])}.")
        if name != PLAIN and name not in suited:
            raise ValueError(f"{name!r} is a change of CAPT's objective. Give --methods capt, or leave it out.")
    return list(dict.fromkeys(found))


def cells_of(plain: Iterable[Cell], asked: Sequence[str]) -> list[Cell]:
    """Returns the cells of candidates: for each seed those of one candidate behind each other."""
    found: dict[tuple[int, int], list[Cell]] = {}
    for cell, (place, name) in product(plain, enumerate(asked)):
        changed = cell
        if name != PLAIN:
            own = CANDIDATES[name].settings
            new = own(cell.settings) if callable(own) else own
            prompts = {**cell.prompts, **{name: value for name, value in new.items() if name in PROMPT_FIELDS}}
            settings = {**cell.settings, **{name: value for name, value in new.items() if name not in PROMPT_FIELDS}}
            settings |= {} if CANDIDATES[name].is_settings else {CANDIDATE: name}
            changed = replace(cell, variant=name, settings=settings, prompts=prompts)
        found.setdefault((cell.seed, place), []).append(changed)
    return [cell for of in sorted(found) for cell in found[of]]


def tune(cell: Cell, base: nn.Module, processor: Any, root: Root) -> tuple[PeftModel, dict[str, Any]]:
    """Tunes the adapter of a cell as `tune_adapter` does, with what its candidate changes."""
    settings = dict(cell.settings)
    candidate = CANDIDATES[settings.pop(CANDIDATE)] if CANDIDATE in settings else Candidate()
    more: dict[str, Any] = {}

    def change(trainer: CaptTrainer) -> None:
        if candidate.objective is not None:
            trainer.objective = candidate.objective(trainer)
        if candidate.callback is not None:
            callback = candidate.callback(trainer, cell)
            trainer.add_callback(callback)
            if isinstance(callback, EarlyStop):
                more[CANDIDATE] = callback.record

    model, training = tune_adapter(replace(cell, settings=settings), base, processor, root, change=change)
    return model, training | more


# ------------------------------------------------------------------------------------------------------------ the rule


def comparison(paths: Sequence[str], variant: str, tasks: Sequence[str]) -> str:
    """Returns tables of what candidates and other variants add to plain, one for each method and number of shots.

    Args:
        paths: Files of lines.
        variant: The variant of plain.
        tasks: The development tasks.
    """
    tables = []
    for section in read_sections(paths):
        for shots, method in product(section.shots, section.runs.method.unique()):
            scores = {label: of.droplevel("label") for label, of in rows_of(section, shots).scores.groupby("label")}
            plain = scores.get(label_of(method, variant))
            others = [label[len(method) + 2 : -1] for label in scores if label.startswith(f"{method} (")]
            known = dict.fromkeys(name for name in (*CANDIDATES, *others, "") if name != variant)
            theirs = {name: scores[label] for name in known if (label := label_of(method, name)) in scores}
            if plain is not None and theirs:
                rows = [row_of(name, of, plain, tasks) for name, of in theirs.items()]
                columns = "| candidate | clean | robust | H | runs | rule |\n|---|---|---|---|---|---|"
                head = f"{label_of(method, variant)} at {shots} shots, {section}, {section.attack}:\n"
                tables.append("\n".join([head, columns, *rows]))
    return "\n\n".join(tables) or f"No candidate stands beside {label_of(OURS, variant)!r}. --variant names plain."


def row_of(name: str, candidate: pd.DataFrame, plain: pd.DataFrame, tasks: Sequence[str]) -> str:
    """Returns the row of a candidate, from both sides' scores by task and seed."""
    found = difference(candidate, plain, name)
    if found is None:
        return f"| {name} | | | | no pairs | unfinished |"
    figures, pairs = [str(found.measures[measure]) for measure in MEASURES], {*candidate.index} & {*plain.index}
    rule = verdict(found, pairs, tasks) if name in CANDIDATES else ""
    return f"| {' | '.join([name or PLAIN, *figures, found.pairs, rule])} |"


def label_of(method: str, variant: str) -> str:
    """Returns a row's label, as `Cell.label` has it."""
    return f"{method} ({variant})" if variant else method


def verdict(found: Difference, pairs: set[tuple[str, int]], tasks: Sequence[str]) -> str:
    """Returns what the rule of docs/search.md says of a candidate, from its difference to plain on pairs of task and seed."""
    value, ends = found.measures[HARMONIC]
    if pairs == set(product(tasks, SEEDS)) and ends is not None:
        return "stays" if ends[0] > 0 else "does not stay"
    if pairs == set(product(tasks, [FIRST_SEED])):
        return "seeds 1 and 2 too" if value > 0 else "does not stay"
    return "unfinished"


def main(argv: list[str]) -> None:
    """Runs what is left of the candidates, or compares them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--candidates", default="all", help='"all", "few", or names separated by commas')
    parser.add_argument(
        "--compare", help="files of lines, separated by commas, whose candidates are compared with plain"
    )
    own, rest = parser.parse_known_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    args = parse_args(["--config", str(CELLS), *rest])
    if own.compare:
        print(comparison(names(own.compare), args.variant or "", names(args.tasks)))
        return
    try:
        plan = make_plan(args)
        cells = cells_of(plan.cells(), asked_for(own.candidates, plan.methods))
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        print(listing(cells, args.output, args.workers, root=places(args)))
        return
    lines = run_cells(cells, args.output, backend=args.backend, workers=args.workers, root=places(args), tune=tune)
    failed = [line for line in lines.values() if line["status"] == "failed"]
    for line in failed:
        print(f"failed: {line['cell']['variant']} on {line['cell']['task']}: {line['error']['message']}")
    print(f"{len(lines) - len(failed)} of {len(cells)} cells are finished; their lines are in {args.output}.")


if __name__ == "__main__":
    main(sys.argv[1:])
