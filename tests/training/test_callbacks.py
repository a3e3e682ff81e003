"""A run that goes wrong stops or warns, with step, images and the last good checkpoint: each way is provoked."""

import logging

import pytest
import torch
from training_helpers import Scripted, adapter_of, make_task, make_trainer
from transformers import TrainerCallback

from capt_peft import PGD, AdversarialCrossEntropy, ThreatModel, TrainingStopped, load_task
from capt_peft.attacks import Attack, AttackResult
from capt_peft.evaluation import Accuracy
from capt_peft.training import StopOnCollapse
from capt_peft.training.callbacks import at_chance, overfitting


class ExplodingGradient(torch.autograd.Function):
    """The identity, until its gradient becomes infinite at the third backward pass."""

    calls = 0

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        ExplodingGradient.calls += 1
        return gradient * (float("inf") if ExplodingGradient.calls == 3 else 1.0)


class Explodes:
    needs_frozen = False

    def __call__(self, views):
        return ExplodingGradient.apply(views.clean.logsumexp(1).mean()), {}


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_adapter(tmp_path, processor):
    ExplodingGradient.calls = 0
    trainer = make_trainer(tmp_path, processor, objective=Explodes(), save_strategy="steps", save_steps=1)
    with pytest.raises(
        TrainingStopped, match=r"gradient is not finite at step 2 \(images \d+, .*checkpoint-2\."
    ) as caught:
        trainer.train()
    assert "learning rate (0.05)" in str(caught.value)
    assert all(torch.isfinite(p).all() for p in adapter_of(trainer).values())


def test_the_images_of_the_whole_step_are_named(tmp_path, processor):
    ExplodingGradient.calls = 1
    trainer = make_trainer(
        tmp_path, processor, objective=Explodes(), per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    with pytest.raises(TrainingStopped, match=r"at step 0 \(images \d+, \d+, \d+, \d+ of the training set\)"):
        trainer.train()


class Nothing(Attack):
    """An attack that does nothing: what is trained with it is accuracy, and its robust accuracy is an illusion."""

    name = "nothing"

    def __init__(self, threat_model):
        self.threat_model = threat_model

    def to_dict(self):
        return {"name": self.name}

    def run(self, logits_fn, images, labels, generator=None, *, clean_logits=None, report=None):
        return AttackResult(images, torch.zeros(len(images)))


class StrongerEvaluation(TrainerCallback):
    """From step 12 on, evaluation finds how little was learned: its epsilon is 64 times as large."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 12:
            args.epsilon = "64/255"


def overfitted(tmp_path, processor, **arguments):
    trainer = make_trainer(
        tmp_path, processor, task=make_task(per_class=10), eval_strategy="steps", eval_steps=10, epsilon="1/255",
        eval_attack="pgd-2", per_device_train_batch_size=10, max_steps=24, save_strategy="steps", save_steps=10,
        learning_rate=0.02, attack=Nothing(ThreatModel("linf", "1/255")),
        objective=AdversarialCrossEntropy(), **arguments,
    )  # fmt: skip
    trainer.add_callback(StrongerEvaluation())
    return trainer


def test_over_fitting_to_the_training_attack_is_warned_of(tmp_path, processor, caplog):
    trainer = overfitted(tmp_path, processor)
    with caplog.at_level(logging.WARNING, logger="capt_peft"):
        trainer.train()
    found = next(r.getMessage() for r in caplog.records if "over-fitting" in r.getMessage())
    assert found.startswith(
        "Catastrophic over-fitting at step 20: robust accuracy under pgd-2, L-inf 64/255 fell from "
    )
    assert "(step 10) to 0.0%, while under the training attack it rose from" in found
    assert "training attack (nothing)" in found and "checkpoint-10." in found
    assert trainer.state.global_step == 24


def test_over_fitting_stops_the_run_where_that_is_asked_for(tmp_path, processor):
    with pytest.raises(TrainingStopped, match="Catastrophic over-fitting at step 20"):
        overfitted(tmp_path, processor, stop_on_overfitting=True).train()


def history(*lines):
    """Log lines: a number is training's robust accuracy; a triple an evaluation's, with its interval."""
    entries = []
    for step, line in enumerate(lines):
        if isinstance(line, tuple):
            value, low, high = line
            entries.append(
                {"eval_robust_accuracy": value, "eval_robust_accuracy_low": low, "eval_robust_accuracy_high": high}
                | {"eval_attack": "pgd-20, L-inf 4/255", "step": step}
            )
        else:
            entries.append({"loss": 1.0, "robust_accuracy": line, "step": step})
    return entries


GOOD, BAD = (0.5, 0.45, 0.55), (0.1, 0.07, 0.14)


def test_robust_accuracy_that_falls_in_evaluation_and_rises_in_training_is_over_fitting():
    found = overfitting(history(0.3, 0.4, GOOD, 0.6, 0.8, BAD))
    assert found == (
        "robust accuracy under pgd-20, L-inf 4/255 fell from 50.0% (step 2) to 10.0%, while under the training attack it rose "
        "from 35.0% to 70.0%"
    )


@pytest.mark.parametrize(
    "lines",
    [
        (0.3, GOOD),
        (0.3, GOOD, 0.8, GOOD),
        (0.3, GOOD, 0.8, (0.46, 0.41, 0.51)),  # within the interval
        (0.8, GOOD, 0.3, BAD),  # both fall: another trouble
        (0.3, BAD, 0.8, GOOD),
        (GOOD, 0.8, BAD),  # nothing was logged before the first evaluation
    ],
)
def test_anything_else_is_not(lines):
    assert overfitting(history(*lines)) is None


def test_the_best_evaluation_is_what_counts_not_the_last_one():
    found = overfitting(history(0.3, GOOD, 0.5, (0.44, 0.4, 0.48), 0.6, (0.3, 0.26, 0.34)))
    assert "fell from 50.0% (step 1) to 30.0%" in found and "from 30.0% to 60.0%" in found


class Masked(Attack):
    """PGD whose gradients vanish for one pixel in a hundred."""

    name = "masked"

    def __init__(self, threat_model):
        self.threat_model, self.inner = threat_model, PGD(threat_model, steps=1)

    def to_dict(self):
        return {"name": self.name}

    def run(self, logits_fn, images, labels, generator=None, *, clean_logits=None, report=None):
        keep = torch.ones_like(images[0])
        keep.view(-1)[::100] = 0
        return self.inner.run(lambda x: logits_fn(x * keep + (x * (1 - keep)).detach()), images, labels, generator)


def test_pixel_gradients_that_vanish_are_warned_of_once(tmp_path, processor, caplog):
    trainer = make_trainer(tmp_path, processor)
    trainer.attack = Masked(trainer.args.threat_model)
    with caplog.at_level(logging.WARNING, logger="capt_peft"):
        trainer.train()
    found = [r.getMessage() for r in caplog.records if "pixel gradients" in r.getMessage()]
    assert len(found) == 1 and "1.0" in found[0] and "Something in the model masks them" in found[0]


def test_gradients_that_do_not_vanish_are_not(tmp_path, processor, caplog):
    with caplog.at_level(logging.WARNING, logger="capt_peft"):
        make_trainer(tmp_path, processor).train()
    assert not any("pixel gradients" in r.getMessage() for r in caplog.records)


class StopEarly(StopOnCollapse):
    """Another rule in the place of ours."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        control.should_training_stop = True


def test_what_watches_a_run_can_be_removed_and_replaced(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, objective=Scripted(1.0, 1.0, 1e-4), max_steps=4)
    trainer.remove_callback(StopOnCollapse)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.collapsed is None
    trainer.add_callback(StopEarly(3))
    trainer.train()
    assert trainer.state.global_step == 1
    trainer.remove_callback(StopEarly)
    trainer.add_callback(StopOnCollapse(3))
    trainer.objective = Scripted(1.0, 1.0, 1e-4)
    with pytest.raises(TrainingStopped, match="has become constant at step 3"):
        trainer.train()


# ------------------------------------------------------------------------------------------ a base that only guesses


@pytest.mark.parametrize(
    ("correct", "n", "classes", "guesses"),
    [
        (3, 40, 10, True),
        (0, 40, 10, True),
        (15, 100, 10, True),
        (20, 100, 10, False),
        (3, 4, 3, False),
        (2, 100, 1000, False),
    ],
)
def test_an_accuracy_is_at_chance_unless_its_interval_lies_above_guessing(correct, n, classes, guesses):
    assert (at_chance(Accuracy(correct, n), classes) is not None) == guesses


def test_a_base_that_only_guesses_is_said_early_and_once(tmp_path, processor, caplog):
    """Words that the base does not know, in place of the class names."""
    task = make_task(names=("xyzzy", "plugh", "frotz"))
    trainer = make_trainer(tmp_path, processor, task=task, num_train_epochs=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found = [r.getMessage() for r in caplog.records if "not clearly above guessing among 3 classes" in r.getMessage()]
    assert len(found) == 1 and trainer.at_chance in found[0]
    n = int(trainer.at_chance.split("n=")[1].split(")")[0])
    where = f"split{'s' if len(task.splits) > 1 else ''} {', '.join(task.splits)}"
    assert n == sum(map(len, task.splits.values())) and f"On {n} images of the task 'patches', at even" in found[0]
    assert f"distances in its {where}, zero-shot" in found[0]


def test_a_base_that_knows_the_task_is_not_warned_of(tmp_path, processor, caplog):
    task = load_task("digits").few_shot(2, seed=0)
    trainer = make_trainer(tmp_path, processor, task=task, num_train_epochs=1, attack_steps=1)
    trainer.train()
    assert trainer.at_chance is None and "guessing" not in caplog.text
