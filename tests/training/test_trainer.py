"""CaptTrainer: what a step computes, what it costs, what it logs, and that it is reproducible."""

import math

import numpy as np
import pytest
import torch
from helpers import TINY_CLIP, shake
from training_helpers import NAMES, Scripted, adapter_of, frozen_logits, losses, make_model, make_task, make_trainer
from transformers import CLIPModel

from capt_peft import (
    PGD,
    CaptObjective,
    CaptTrainingArguments,
    ThreatModel,
    TrainingStopped,
    set_strength,
)
from capt_peft.clip.classifier import ZeroShotClassifier
from capt_peft.evaluation import evaluate
from capt_peft.objectives import Views
from capt_peft.randomness import example_generators
from capt_peft.training.callbacks import collapse


@pytest.mark.parametrize("strength", [1, 0.5])
def test_a_steps_loss_is_the_objective_of_plainly_computed_views(tmp_path, processor, strength):
    model = make_model()
    shake(model)
    set_strength(model, strength)  # an adapter is tuned at the strength that it has
    trainer = make_trainer(tmp_path, processor, model=model, seed=3)
    model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, batch)

    classifier = ZeroShotClassifier(model, processor, NAMES)
    pixels, labels = batch["pixels"], batch["labels"]
    generators = example_generators(3, batch["index"].tolist(), epoch=0)
    adversarial = PGD(ThreatModel("linf", "4/255"), steps=3)(classifier, pixels, labels, generators)
    with model.disable_adapter():
        frozen = ZeroShotClassifier(model, processor, NAMES)(pixels).detach()
    expected, _ = CaptObjective()(Views(classifier(pixels), classifier(adversarial), labels, frozen))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def count_calls(trainer):
    base = trainer.model.base_model.model
    calls = {"text": 0, "vision": 0}
    for tower, module in (("text", base.text_model), ("vision", base.vision_model)):
        module.register_forward_hook(lambda *_, tower=tower: calls.__setitem__(tower, calls[tower] + 1))
    return calls


def test_a_step_runs_the_text_tower_once_and_the_image_tower_k_plus_2_times(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, attack_steps=3)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)  # the first sight of an image also runs the frozen model
    calls = count_calls(trainer)
    trainer.compute_loss(trainer.model, batch)
    assert calls == {"text": 1, "vision": 3 + 2}


def test_frozen_logits_are_the_base_models_whatever_the_prompts_are(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor)
    batch = next(iter(trainer.get_train_dataloader()))
    first = frozen_logits(trainer, batch["pixels"], batch["index"].tolist())
    shake(trainer.model)
    again = frozen_logits(trainer, batch["pixels"], batch["index"].tolist())
    assert torch.equal(first, again)
    with trainer.classifier.frozen() as base, torch.no_grad():
        torch.testing.assert_close(base.eval()(batch["pixels"]), first, atol=1e-5, rtol=1e-5)


def test_training_lowers_the_loss_and_moves_only_the_prompts(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, num_train_epochs=8)
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    before = adapter_of(trainer)
    trainer.train()
    history = losses(trainer)
    assert np.mean(history[-3:]) < np.mean(history[:3]) - 0.1
    assert any(not torch.equal(before[name], p) for name, p in adapter_of(trainer).items())
    assert all(torch.equal(base[name], p) for name, p in trainer.model.named_parameters() if name in base)


def test_the_log_says_which_accuracy_is_which(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for key in ("clean_loss", "consistency_tuned", "consistency_frozen", "alpha", "clean_accuracy", "robust_accuracy"):
        assert math.isfinite(entry[key])
    assert 0 <= entry["robust_accuracy"] <= entry["clean_accuracy"] <= 1
    assert 0 <= entry["zero_gradient_share"] <= 1
    assert entry["attack"] == "pgd-3"
    rebuilt = entry["clean_loss"]
    assert entry["loss"] >= rebuilt


def test_evaluate_reports_clean_and_robust_accuracy_under_the_stronger_attack(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, eval_attack="pgd-5x2")
    metrics = trainer.evaluate()
    assert metrics["eval_attack"] == "pgd-5x2, L-inf 4/255"
    assert metrics["eval_n"] == 12
    assert metrics["eval_robust_accuracy_low"] <= metrics["eval_robust_accuracy"] <= metrics["eval_clean_accuracy"]
    alone = evaluate(trainer.classifier, trainer.task["validation"], trainer.args.evaluation_attack, batch_size=5)
    assert metrics["eval_clean_accuracy"] == alone.clean.value
    assert metrics["eval_robust_accuracy"] == alone.robust.value


def test_the_same_seed_gives_bitwise_the_same_adapter_and_another_does_not(tmp_path, processor):
    runs = []
    for seed in (0, 0, 1):
        trainer = make_trainer(tmp_path, processor, model=make_model(seed=0), seed=seed)
        trainer.train()
        runs.append(adapter_of(trainer))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_accumulation_follows_the_same_losses_as_one_large_batch(tmp_path, processor):
    task = make_task(per_class=5)  # 15 images: the last batch is smaller
    runs = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        trainer = make_trainer(
            tmp_path, processor, task=task, model=make_model(), num_train_epochs=3, learning_rate=0.01,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        runs.append(losses(trainer))
    assert len(runs[0]) == 6
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)
    assert runs[2] == pytest.approx(runs[0], abs=1e-5)


@pytest.mark.parametrize("augment", [True, False])
def test_a_resumed_run_ends_bitwise_where_the_uninterrupted_one_does(tmp_path, processor, augment):
    settings = {
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "augment": augment,
        "lr_scheduler_type": "constant",
    }
    whole = make_trainer(tmp_path, processor, model=make_model(), **settings)
    whole.train()
    resumed = make_trainer(tmp_path, processor, model=make_model(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    expected = adapter_of(whole)
    assert all(torch.equal(expected[name], p) for name, p in adapter_of(resumed).items())


def test_augmented_images_differ_by_epoch_and_not_by_workers(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, augment=True)
    dataset = trainer.train_dataset
    first = dataset[0]["pixels"]
    dataset.set_epoch(1)
    assert not torch.equal(first, dataset[0]["pixels"])
    dataset.set_epoch(0)
    assert torch.equal(first, dataset[0]["pixels"])


def test_a_teacher_takes_the_place_of_the_frozen_model(tmp_path, processor):
    torch.manual_seed(5)
    other = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    with torch.no_grad():
        other.visual_projection.weight.add_(0.1 * torch.randn_like(other.visual_projection.weight))
    teacher = ZeroShotClassifier(other, processor, NAMES)
    trainer = make_trainer(tmp_path, processor, teacher=teacher)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = teacher.eval()(batch["pixels"])
    torch.testing.assert_close(frozen_logits(trainer, batch["pixels"], batch["index"].tolist()), expected)
    by_name = make_trainer(tmp_path, processor, teacher=TINY_CLIP)
    assert by_name.teacher.class_names == NAMES
    with pytest.raises(ValueError, match="other classes"):
        make_trainer(tmp_path, processor, teacher=ZeroShotClassifier(other, processor, NAMES[::-1]))


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_checkpoint(tmp_path, processor):
    class Diverges:
        needs_frozen = False
        calls = 0

        def __call__(self, views):
            self.calls += 1
            return views.clean.sum() * (float("nan") if self.calls == 3 else 0.0), {}

    trainer = make_trainer(tmp_path, processor, objective=Diverges(), save_strategy="steps", save_steps=1)
    with pytest.raises(TrainingStopped, match=r"loss is nan at step 2 .*checkpoint-2"):
        trainer.train()


def test_a_model_that_becomes_constant_stops_the_run(tmp_path, processor):
    settings = {"num_train_epochs": 2, "attack_steps": 1}
    with pytest.raises(TrainingStopped, match="become constant at step 3: the consistency loss fell"):
        make_trainer(tmp_path, processor, objective=Scripted(1.0, 2.0, 1e-4), **settings).train()
    make_trainer(tmp_path, processor, objective=Scripted(1.0, 2.0, 1e-4), stop_on_collapse=False, **settings).train()


def test_nearly_uniform_predictions_at_the_start_are_no_collapse(tmp_path, processor):
    make_trainer(tmp_path, processor, objective=Scripted(2e-4, 1e-4), num_train_epochs=3, attack_steps=1).train()


LOG_3 = math.log(3)


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        (
            [(1.0, 2.0), (LOG_3, 1.008 * LOG_3)],
            "loss of adversarial images fell from 2.00 to 1.11, while the clean loss is 1.10",
        ),
        ([(1.0, 2.0), (0.98 * LOG_3, LOG_3)], None),  # it still tells some clean images apart
        ([(1.0, 2.0), (LOG_3, 1.02 * LOG_3)], None),
        ([(LOG_3, 1.04 * LOG_3), (LOG_3, LOG_3)], None),  # it has never been anything else
    ],
)
def test_adversarial_training_without_a_consistency_loss_collapses_into_the_losses_of_guessing(losses, found):
    history = [{"clean_loss": clean, "adversarial_loss": attacked, "loss": attacked} for clean, attacked in losses]
    said = collapse([*history, {"eval_clean_accuracy": 0.3}], 3)
    assert said is None if found is None else found in said


def test_the_adapter_records_the_class_names_and_template(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor)
    config = trainer.model.peft_config["default"]
    assert (tuple(config.class_names), config.template) == (NAMES, "a photo of a {}.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"epsilon": "-1/255"}, "-1/255"),
        ({"epsilon": "4/0"}, "4/0"),
        ({"epsilon": "2"}, "epsilon"),
        ({"norm": "l7"}, "l7"),
        ({"attack_steps": -1}, "attack_steps=-1 must be at least 1"),
        ({"attack_steps": 0}, "attack_steps=0 must be at least 1"),
        ({"attack_step_size": "0"}, "step_size"),
        ({"attack_loss": "mse"}, "mse"),
        ({"eval_attack": "strong"}, "strong"),
        ({"eval_attack": "pgd-0"}, "steps=0 must be 1 or more"),
        ({"eval_attack": "square-0"}, "queries=0 must be 1 or more"),
        ({"consistency": -1.0}, "consistency=-1"),
        ({"weighting": "2"}, "weighting='2'"),
        ({"frozen_term": "labelled", "weighting": "0"}, "frozen_term='labelled' has no effect"),
        ({"frozen_term": "features", "consistency": 0.0}, "frozen_term='features' has no effect"),
        ({"remove_unused_columns": True}, "would drop the pixels"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_set_up(tmp_path, arguments, words):
    with pytest.raises(ValueError) as caught:
        CaptTrainingArguments(output_dir=str(tmp_path / "never"), use_cpu=True, **arguments)
    assert words in str(caught.value)
    assert not (tmp_path / "never").exists()


def test_the_name_of_a_task_is_no_task(tmp_path, processor):
    with pytest.raises(TypeError, match=r"task must be a Task, as load_task\('digits'\) returns one, not 'digits'"):
        make_trainer(tmp_path, processor, task="digits")


def test_an_adapter_of_strength_0_is_refused_and_one_of_less_than_1_learns(tmp_path, processor):
    model = make_model()
    set_strength(model, 0)
    with pytest.raises(ValueError, match="has strength 0: its prompts do not act, and no gradient would reach them"):
        make_trainer(tmp_path, processor, model=model)
    set_strength(model, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    make_trainer(tmp_path, processor, model=model, max_steps=1, learning_rate=1.0).train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert model.peft_config["default"].strength == 0.5


def test_a_task_without_training_images_is_refused(tmp_path, processor):
    with pytest.raises(KeyError, match="no split 'train'"):
        make_trainer(tmp_path, processor, task=make_task(splits=("test",)))
