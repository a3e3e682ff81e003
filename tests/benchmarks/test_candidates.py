"""benchmarks/candidates.py: each change is what its name says, plain is the benchmark's cell, and the rule is the docs'."""

import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from capt_peft import PGD, ZeroShotClassifier
from capt_peft.benchmark import Lines, Plan, get_suite, run_cell, tune_adapter
from capt_peft.benchmark.inputs import drawn, load_base, read_task
from capt_peft.objectives import CaptObjective, Views
from capt_peft.results.accuracy import Accuracy

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import candidates
from candidates import CANDIDATES, PLAIN, asked_for, cells_of

SMALL = {"max_steps": 2, "attack_steps": 1}
RUN = ["--tasks", "digits", "--shots", "1", "--attacks", "pgd-1", "--limit", "8"]


def plain_cells(method="capt", tasks=("digits",), seeds=(0,), **settings):
    return Plan(
        get_suite("toy"), "tiny_clip", [method], ["few-shot"], [1], seeds, tasks, settings=SMALL | settings, attacks=["pgd-1"],
        split="validation", limit=8,
    ).cells()  # fmt: skip


def cell_of(name, method="capt", **changes):
    (cell,) = cells_of(plain_cells(method), [name])
    return replace(cell, settings={**cell.settings, **changes})


class Spy(TrainerCallback):
    """Notes, after each step, the prompts and the training attack."""

    def __init__(self, trainer):
        self.trainer, self.prompts, self.attacks = trainer, [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.prompts.append(prompts(model))
        self.attacks.append(self.trainer.attack.name)


def prompts(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])


def tuned(callback=None, **settings):
    """A run with a callback, the prompts that it leaves, and what a spy before the callback saw."""
    cell, seen = cell_of(PLAIN, **settings), []

    def change(trainer):
        seen.append(Spy(trainer))
        trainer.add_callback(seen[0])
        if callback is not None:
            seen.append(callback(trainer, cell))
            trainer.add_callback(seen[1])

    model, _ = tune_adapter(cell, *load_base(cell.model, "cpu"), change=change)
    return model, *seen


# ------------------------------------------------------------------------------------------------------- objectives

LAMBDA, STEP, STEPS = 1.5, 2, 8


def views(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    clean, adversarial, frozen = (3 * torch.randn(6, 4, generator=generator) for _ in range(3))
    frozen[0] = clean[0]  # one image of which both models say the same
    clean, adversarial = (logits.to(dtype).requires_grad_() for logits in (clean, adversarial))
    return Views(clean, adversarial, torch.tensor([0, 1, 2, 2, 3, 0]), frozen.to(dtype), progress=STEP / STEPS)


def softmax(row):
    exponentials = [math.exp(z - max(row)) for z in row]
    return [e / sum(exponentials) for e in exponentials]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


class ByHand:
    """The loss in plain Python, image by image, with what a candidate puts in place of a part."""

    def __init__(self, seen):
        self.rows = list(
            zip(seen.clean.tolist(), seen.adversarial.tolist(), seen.frozen.tolist(), seen.labels.tolist(), strict=True)
        )

    def confidence(self, clean, frozen, y):
        f, t = softmax(frozen)[y], softmax(clean)[y]
        return f / (f + t)

    def loss(self, alpha=None, weight=lambda *row: LAMBDA, target=lambda frozen, y: softmax(frozen), adversarial=0.0):
        alpha, total = alpha or self.confidence, 0.0
        for clean, attacked, frozen, y in self.rows:
            a, q = alpha(clean, frozen, y), softmax(attacked)
            cross = (1 - adversarial) * -math.log(softmax(clean)[y]) + adversarial * -math.log(q[y])
            total += cross + weight(frozen, y) * ((1 - a) * kl(softmax(clean), q) + a * kl(target(frozen, y), q))
        return total / len(self.rows)

    def agreement(self, clean, frozen, y):
        p, q = softmax(frozen), softmax(clean)
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return 1 - (kl(p, middle) + kl(q, middle)) / 2 / math.log(2)

    def per_class(self, clean, frozen, y):
        f, t = (
            sum(softmax(row[side])[y] for row in self.rows if row[3] == y) / sum(row[3] == y for row in self.rows)
            for side in (2, 0)
        )
        return f / (f + t)

    def trusted(self, frozen, y):
        return LAMBDA * softmax(frozen)[y] / (sum(softmax(row[2])[row[3]] for row in self.rows) / len(self.rows))


BY_HAND = {
    "alpha agreement": lambda by: by.loss(alpha=by.agreement),
    "alpha per class": lambda by: by.loss(alpha=by.per_class),
    "lambda rising": lambda by: by.loss(weight=lambda *row: LAMBDA * 2 * (STEP + 0.5) / STEPS),
    "lambda falling": lambda by: by.loss(weight=lambda *row: LAMBDA * 2 * (STEPS - STEP - 0.5) / STEPS),
    "lambda by confidence": lambda by: by.loss(weight=by.trusted),
    "adversarial cross-entropy": lambda by: by.loss(adversarial=0.5),
    "half label": lambda by: by.loss(
        target=lambda frozen, y: [(p + (j == y)) / 2 for j, p in enumerate(softmax(frozen))]
    ),
    "fixed clean": lambda by: by.loss(),
}


class Arguments:
    consistency, weighting, frozen_term, max_steps = LAMBDA, "confidence", "predictions", STEPS

    @property
    def args(self):
        return self


def objective_of(name):
    return CANDIDATES[name].objective(Arguments())


def test_every_objective_has_its_formula_here():
    assert set(BY_HAND) == {name for name, of in CANDIDATES.items() if of.objective}
    assert CaptObjective(LAMBDA)(views(torch.float64))[0].item() == pytest.approx(ByHand(views()).loss(), rel=1e-6)


@pytest.mark.parametrize("name", BY_HAND)
def test_an_objective_is_its_formula(name):
    seen, objective = views(torch.float64), objective_of(name)
    assert objective.needs_frozen
    loss, parts = objective(seen)
    assert loss.item() == pytest.approx(BY_HAND[name](ByHand(seen)), rel=1e-6)
    assert not any(part.requires_grad for part in parts.values())
    if name != "fixed clean":
        assert loss.item() != pytest.approx(ByHand(seen).loss(), rel=1e-3)


@pytest.mark.parametrize("name", ["alpha agreement", "alpha per class", "lambda by confidence"])
def test_weights_have_no_gradient(name):
    """With the predictions equal on both views, the consistency terms are at their least, and only a weight could move."""
    seen = views(torch.float64)
    same = replace(seen, frozen=seen.clean.detach(), adversarial=seen.clean.detach().clone().requires_grad_())
    loss, _ = objective_of(name)(same)
    (gradient,) = torch.autograd.grad(loss, same.clean)
    expected = (same.clean.softmax(-1) - torch.nn.functional.one_hot(same.labels, 4)) / 6
    torch.testing.assert_close(gradient, expected.detach())


@pytest.mark.parametrize("name", ["alpha agreement", "alpha per class"])
def test_alpha_stays_a_share_where_models_are_certain_or_certainly_wrong(name):
    seen = views()
    for clean, frozen in ((300.0, -300.0), (-300.0, 300.0), (-300.0, -300.0), (300.0, 300.0)):
        sure = torch.nn.functional.one_hot(seen.labels, 4)
        alpha = objective_of(name).alpha(replace(seen, clean=clean * sure, frozen=frozen * sure))
        assert ((alpha >= 0) & (alpha <= 1)).all()
        if clean == frozen:
            assert alpha.unique().item() == pytest.approx(1.0 if name == "alpha agreement" else 0.5)


def test_the_means_of_a_class_move_by_a_tenth():
    seen, objective = views(torch.float64), objective_of("alpha per class")
    objective(seen)
    other = replace(seen, frozen=seen.frozen.flip(1), clean=seen.clean.flip(1), labels=seen.labels.clamp(max=2))
    by, later = ByHand(seen), ByHand(other)

    def mean(rows, side, y):
        found = [softmax(row[side])[y] for row in rows if row[3] == y]
        return sum(found) / len(found)

    expected = []
    for y in other.labels.tolist():
        f, t = (0.9 * mean(by.rows, side, y) + 0.1 * mean(later.rows, side, y) for side in (2, 0))
        expected.append(f / (f + t))
    assert objective.alpha(other).tolist() == pytest.approx(expected)


def test_the_schedules_have_the_mean_of_lambda():
    seen = views(torch.float64)
    plain, _ = CaptObjective(LAMBDA)(seen)
    for name in ("lambda rising", "lambda falling"):
        losses = [objective_of(name)(replace(seen, progress=step / STEPS))[0].item() for step in range(STEPS)]
        assert sum(losses) / STEPS == pytest.approx(plain.item())
        assert losses == sorted(losses, reverse=name == "lambda falling")


def test_fixed_clean_predictions_have_the_gradient_of_their_cross_entropy_alone():
    seen = views(torch.float64)
    gradients = torch.autograd.grad(objective_of("fixed clean")(seen)[0], (seen.clean, seen.adversarial))
    of_plain = torch.autograd.grad(CaptObjective(LAMBDA)(seen)[0], (seen.clean, seen.adversarial))
    expected = (seen.clean.softmax(-1) - torch.nn.functional.one_hot(seen.labels, 4)) / 6
    torch.testing.assert_close(gradients[0], expected.detach())
    torch.testing.assert_close(gradients[1], of_plain[1])
    assert not torch.allclose(of_plain[0], expected)


# ------------------------------------------------------------------------------------------------------------ runs


def test_plain_is_the_cell_of_a_benchmark(tmp_path, monkeypatch, capsys):
    (cell,) = plain_cells()
    line = run_cell(cell)
    output = tmp_path / "lines.jsonl"
    words = [*RUN, "--settings", "max_steps=2,attack_steps=1", "--output", str(output)]
    candidates.main(["--candidates", "plain,fixed clean", *words])
    plain, fixed = Lines(output).read().values()
    lasting = ("key", "cell", "results", "adapter_fingerprint", "training_data", "measured_data")
    assert {name: plain[name] for name in lasting} == {name: line[name] for name in lasting}
    assert fixed["cell"]["variant"] == "fixed clean"
    assert fixed["adapter_fingerprint"] != plain["adapter_fingerprint"]
    assert {one.name for one in output.with_suffix(".adapters").iterdir()} == {
        cell.training_key, cells_of([cell], ["fixed clean"])[0].training_key,
    }  # fmt: skip
    before = output.read_bytes()
    candidates.main(["--candidates", "plain,fixed clean", *words])
    assert output.read_bytes() == before  # nothing is left to do
    candidates.main(["--compare", str(output), "--tasks", "digits"])
    assert "| fixed clean |" in capsys.readouterr().out


@pytest.mark.parametrize("name", CANDIDATES)
def test_two_steps_of_every_candidate(name, monkeypatch):
    monkeypatch.setattr(candidates.EarlyStop, "images", 8)
    cell = cell_of(name, max_steps=2)
    model, training = candidates.tune(cell, *load_base(cell.model, "cpu"), None)
    assert training["steps"] == 2 and torch.isfinite(prompts(model)).all()
    assert model.peft_config["default"].strength == 1
    if name == "early stop":
        assert training["candidate"]["images"] == 8 and training["candidate"]["step"] == 2


@pytest.mark.parametrize("name", ["ema", "perturbed prompts", "late attack steps", "random strength"])
def test_what_suits_any_method_runs_with_another(name):
    cell = cell_of(name, "adv-tp", max_steps=2)
    model, _ = candidates.tune(cell, *load_base(cell.model, "cpu"), None)
    assert torch.isfinite(prompts(model)).all()


def test_the_average_is_that_of_the_prompts_after_every_step(monkeypatch):
    monkeypatch.setattr(candidates.Average, "span", 0.5)
    steps, d = 6, 1 - 1 / 3
    model, spy, _ = tuned(candidates.Average, max_steps=steps)
    weights = [(1 - d) * d ** (steps - 1 - t) for t in range(steps)]
    expected = sum(w * p.double() for w, p in zip(weights, spy.prompts, strict=True)) / sum(weights)
    torch.testing.assert_close(prompts(model).double(), expected, atol=1e-7, rtol=1e-6)
    assert not torch.equal(prompts(model), spy.prompts[-1])


def test_an_early_stop_keeps_the_best_prompts_and_does_not_disturb_the_run(monkeypatch):
    monkeypatch.setattr(candidates.EarlyStop, "every", 2)
    monkeypatch.setattr(candidates.EarlyStop, "images", 4)
    figures, real = [(30, 10), (30, 20), (20, 30)], candidates.evaluate  # H: 15, 24, 24

    class Figures:
        def __init__(self, clean, robust):
            self.clean, self.robust = Accuracy(clean, 100), Accuracy(robust, 100)

    def scripted(classifier, data, attacks, **options):
        assert [attack.name for attack in attacks] == ["pgd-10"]
        real(classifier, data, attacks, **options)
        return Figures(*figures.pop(0))

    monkeypatch.setattr(candidates, "evaluate", scripted)
    model, spy, stop = tuned(candidates.EarlyStop, max_steps=5)
    _, alone = tuned(max_steps=5)
    assert all(map(torch.equal, spy.prompts, alone.prompts))
    assert torch.equal(prompts(model), spy.prompts[3])
    assert stop.record == {"images": 4, "harmonic": {"2": 15.0, "4": 24.0, "5": 24.0}, "step": 4}


@pytest.mark.parametrize(
    ("task", "split", "count"),
    [("positions", "validation", 80), ("digits", "validation", 100), ("shapes", "test", 100)],
)
def test_images_to_stop_on_are_not_measured(task, split, count):
    (cell,) = plain_cells(tasks=(task,))
    validation = read_task(task, "all", None)["validation"]
    validation = validation.add_column("place", range(len(validation)))
    cell = replace(cell, split=split, limit=100)
    left = candidates.unmeasured(validation, cell, 100)["place"]
    measured = drawn(validation, 100)["place"] if split == "validation" else []
    assert len(set(left)) == count and not set(left) & set(measured)


def test_without_images_left_an_early_stop_is_refused():
    (cell,) = plain_cells()
    validation = read_task("digits", "all", None)["validation"]
    for limit in (None, 300):
        with pytest.raises(ValueError, match=r"All 300 validation images of digits .* \(--limit\)"):
            candidates.unmeasured(validation, replace(cell, limit=limit), 100)


def test_a_perturbed_step_takes_the_gradient_of_the_same_images_at_worse_prompts(monkeypatch):
    made, real = [], PGD.run

    def run(self, logits_fn, pixels, labels, *args, **kwargs):
        made.append((pixels, labels, real(self, logits_fn, pixels, labels, *args, **kwargs)))
        return made[-1][-1]

    class Noting(candidates.PerturbedPrompts):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.start = prompts(model)

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.restored = torch.equal(prompts(model), self.start)
            self.gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]

    monkeypatch.setattr(PGD, "run", run)
    model, _, noting = tuned(Noting, max_steps=1, max_grad_norm=0.0)
    ((pixels, labels, attacked),) = made  # the attack has run once
    assert noting.restored and not torch.equal(prompts(model), noting.start)

    parameters = [p for p in model.parameters() if p.requires_grad]
    (cell,), task = plain_cells(), read_task("digits", "all", None)
    _, processor = load_base(cell.model, "cpu")
    classifier = ZeroShotClassifier(model, processor, task.class_names, task.template)
    with torch.no_grad():
        for parameter, start in zip(parameters, noting.start.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(start.view_as(parameter))
        with classifier.frozen() as frozen:
            of_frozen = frozen(pixels)

    def gradients():
        seen = Views(classifier(pixels), classifier(attacked.images), labels, of_frozen)
        return torch.autograd.grad(CaptObjective(1.5)(seen)[0], parameters)

    for parameter, gradient in zip(parameters, gradients(), strict=True):
        with torch.no_grad():
            moved = 0.05 * parameter.norm() * gradient / gradient.norm()
            assert 0 < moved.norm() < parameter.norm()
            parameter.add_(moved)
    for found, expected in zip(noting.gradients, gradients(), strict=True):
        assert (found - expected).norm() < 1e-4 * expected.norm()


def test_prompts_that_are_perturbed_by_nothing_are_plain(monkeypatch):
    monkeypatch.setattr(candidates.PerturbedPrompts, "share", 0.0)
    (model, *_), (plain, _) = tuned(candidates.PerturbedPrompts), tuned()
    assert torch.equal(prompts(model), prompts(plain))


def test_late_steps_come_in_the_second_half():
    _, spy, _ = tuned(candidates.LateSteps, max_steps=4, attack_steps=2)
    assert spy.attacks == ["pgd-2", "pgd-2", "pgd-4", "pgd-4"]


def test_every_step_has_a_strength_of_its_own():
    seen = []

    class Noting(candidates.RandomStrength):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.peft_config["default"].strength)

    model, *_ = tuned(Noting, max_steps=3)
    drawn_here = random.Random(0)
    assert seen == [drawn_here.uniform(0.25, 1) for _ in range(3)]
    assert model.peft_config["default"].strength == 1


# ------------------------------------------------------------------------------------------------- cells and the rule


def test_candidates_are_changes_of_the_settings_in_one_place():
    plain = plain_cells(learning_rate=0.3, seeds=(0, 1))
    cells = cells_of(plain, asked_for("few,ema", ["capt"]))
    names = ["", "alpha 1", "lambda 3", "20 steps", "tenth of the rate", "ema"]
    assert [(cell.seed, cell.variant) for cell in cells] == [(seed, name) for seed in (0, 1) for name in names]
    assert cells[0] == plain[0]
    changes = [
        {k: v for k, v in cell.settings.items() if plain[0].settings.get(k) != v} for cell in cells[1 : len(names)]
    ]
    assert changes == [
        {"weighting": "1"}, {"consistency": 3.0}, {"max_steps": 20}, {"learning_rate": pytest.approx(0.03)}, {"candidate": "ema"}
    ]  # fmt: skip
    assert len({cell.training_key for cell in cells}) == len({cell.key for cell in cells}) == len(cells)


def test_other_methods_have_the_candidates_that_suit_them():
    generic = [
        "plain",
        "kl attack",
        "late attack steps",
        "ema",
        "random strength",
        "perturbed prompts",
        "16 vision prompts",
        "class-specific prompts",
        "320 steps",
        "early stop",
    ]
    assert asked_for("all", ["adv-vp", "fap"]) == generic
    assert [PLAIN, *(name for name, of in CANDIDATES.items() if not of.few)] == asked_for("all", ["capt"])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--candidates", "alpha"], "Unknown candidate 'alpha'. Allowed: all, few, plain, alpha margin"),
        (["--candidates", "lambda 1", "--methods", "adv-vp"], "'lambda 1' is a change of CAPT's objective"),
        (["--candidates", "ema", "--methods", "zero-shot"], "zero-shot tunes nothing"),
    ],
)
def test_what_cannot_be_a_candidate_is_refused(words, why, capsys):
    with pytest.raises(SystemExit) as ended:
        candidates.main(words)
    assert ended.value.code == 2 and why in capsys.readouterr().err


def test_the_rule_is_that_of_the_docs(tmp_path, monkeypatch):
    tasks = ["digits", "shapes", "inks", "positions", "textures"]
    plain = plain_cells(tasks=tasks, seeds=(0, 1, 2))
    gains = {
        "ema": lambda cell: 10, "kl attack": lambda cell: 20 * (cell.task == "digits") - 5 * (cell.task != "digits"),
        "alpha margin": lambda cell: 1, "lambda 1": lambda cell: -1, "lambda 0.5": lambda cell: 2,
    }  # fmt: skip
    only = {"alpha margin": [0], "lambda 1": [0], "lambda 0.5": [0, 1]}
    lines = Lines(tmp_path / "lines.jsonl")
    part = [replace(cell, variant="alpha 0") for cell in plain]  # no candidate
    for cell in [*cells_of(plain, [PLAIN, *gains]), *part]:
        if cell.seed in only.get(cell.variant, [0, 1, 2]):
            robust = 40 + (gains[cell.variant](cell) if cell.variant in gains else 0)
            count = {"correct": robust, "n": 100}
            row = {"task": cell.task, "classes": "all", "clean": {"correct": 60, "n": 100}}
            row |= {"attacks": {"pgd-1": count}, "worst_case": count}
            lines.append(
                {"key": cell.key, "status": "finished", "cell": cell.to_dict(), "results": [row], "training": {}}
            )
    table = candidates.comparison([str(lines.path)], "", tasks)
    rows = {
        cells[1]: cells[2:-1] for row in table.splitlines() if len(cells := [c.strip() for c in row.split("|")]) > 3
    }
    verdicts = {
        "ema": "stays", "kl attack": "does not stay", "alpha margin": "seeds 1 and 2 too", "lambda 1": "does not stay",
        "lambda 0.5": "unfinished",
    }  # fmt: skip
    assert {name: rows[name][-1] for name in gains} == verdicts
    assert rows["ema"][:2] == ["+0.0 (0.0 to 0.0)", "+10.0 (10.0 to 10.0)"]
    assert rows["ema"][3] == "5 tasks x 3 seeds"
    assert rows["alpha 0"][1:] == ["+0.0 (0.0 to 0.0)", "+0.0 (0.0 to 0.0)", "5 tasks x 3 seeds", ""]
    assert "No candidate stands beside" in candidates.comparison([str(lines.path)], "rate 0.3", tasks)
