"""Every setting of transformers' Trainer works here, is refused by name, or is none of the Trainer's business."""

import copy
import inspect
import math
from dataclasses import fields

import pytest
import torch
from helpers import TINY_CLIP, shake
from training_helpers import Scripted, adapter_of, make_model, make_task, make_trainer
from transformers import AutoProcessor, Trainer, TrainingArguments

from capt_peft import PGD, CaptTrainer, CaptTrainingArguments, ThreatModel, ZeroShotClassifier
from capt_peft.training.arguments import ALLOWED, REFUSED, REFUSED_OF_TRAINER, SHARDING_ARGUMENTS

# what the Trainer's own loop does with it reaches our step, evaluation and checkpoints
WORKS = {
    "accelerator_config", "activation_checkpointing", "activation_checkpointing_kwargs", "adam_beta1", "adam_beta2",
    "adam_epsilon", "bf16", "data_seed", "dataloader_drop_last", "dataloader_in_order", "dataloader_multiprocessing_context",
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph",
    "ddp_timeout", "debug", "disable_tqdm", "eval_accumulation_steps", "eval_delay", "eval_on_start", "eval_steps",
    "eval_strategy", "fp16", "full_determinism", "gradient_accumulation_steps", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "greater_is_better", "hub_model_id", "hub_private_repo", "hub_revision", "hub_token",
    "ignore_data_skip", "learning_rate", "load_best_model_at_end", "log_level", "log_level_replica", "log_on_each_node",
    "logging_first_step", "logging_steps", "logging_strategy", "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm",
    "max_steps", "metric_for_best_model", "num_train_epochs", "optim", "optim_args", "output_dir",
    "per_device_eval_batch_size", "per_device_train_batch_size", "project", "push_to_hub", "report_to",
    "restore_callback_states_from_checkpoint", "run_name", "save_on_each_node", "save_only_model", "save_steps",
    "save_strategy", "save_total_limit", "seed", "skip_memory_metrics", "tf32", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "torch_empty_cache_steps", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
    "use_cpu", "warmup_steps", "weight_decay",
    "logging_dir", "warmup_ratio",  # of older versions
}  # fmt: skip
HARMLESS = {
    "do_eval": "for scripts; the Trainer does not read it",
    "do_predict": "for scripts; the Trainer does not read it",
    "do_train": "for scripts; the Trainer does not read it",
    "local_rank": "set by the launcher",
    "logging_nan_inf_filter": "a loss that is not finite stops the run before it is logged",
    "resume_from_checkpoint": "for scripts; train() has an argument of that name",
}
WRONG = {
    "auto_find_batch_size": True, "average_tokens_across_devices": False, "batch_eval_metrics": True, "bf16_full_eval": True,
    "enable_jit_checkpoint": True, "eval_do_concat_batches": False, "eval_use_gather_object": True, "fp16_full_eval": True,
    "hub_always_push": True, "hub_strategy": "all_checkpoints", "include_for_metrics": ["loss"],
    "include_num_input_tokens_seen": "all", "label_names": ["targets"], "label_smoothing_factor": 0.1,
    "length_column_name": "words", "liger_kernel_config": {"rope": True}, "neftune_noise_alpha": 5.0,
    "optim_target_modules": "all-linear", "prediction_loss_only": True, "remove_unused_columns": True,
    "train_sampling_strategy": "group_by_length", "use_cache": True, "use_liger_kernel": True,
}  # fmt: skip
GIVEN = {"callbacks", "eval_dataset", "optimizer_cls_and_kwargs", "optimizers", "processing_class", "model", "args"}


def test_every_field_of_the_installed_transformers_has_a_verdict():
    """A field that a new version brings must be tried, and then listed here or in `training.arguments`."""
    verdicts = [WORKS, set(HARMLESS), set(REFUSED), set(ALLOWED), {*SHARDING_ARGUMENTS}]
    names = {field.name for field in fields(TrainingArguments)}
    assert names - set().union(*verdicts) == set(), "new fields"
    assert sum(len(verdict & names) for verdict in verdicts) == len(names), "two verdicts on one field"


def test_every_argument_of_the_installed_trainer_has_a_verdict():
    names = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert names - GIVEN - set(REFUSED_OF_TRAINER) == set()


@pytest.mark.parametrize("name", sorted({*REFUSED, *ALLOWED}))
def test_a_training_argument_without_effect_is_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=f"^{name}=.* is refused: "):
        CaptTrainingArguments(str(tmp_path), use_cpu=True, **{name: WRONG[name]})


def test_a_training_argument_that_is_changed_later_is_refused_too(tmp_path, processor):
    args = CaptTrainingArguments(str(tmp_path), use_cpu=True)
    args.label_smoothing_factor = 0.5
    with pytest.raises(ValueError, match=r"^label_smoothing_factor=0.5 is refused"):
        CaptTrainer(make_model(), args, task=make_task(), processor=processor)


@pytest.mark.parametrize("config", [{"split_batches": True}, {"dispatch_batches": True}, {"even_batches": False}])
def test_loaders_that_would_share_images_unevenly_are_refused(tmp_path, config):
    with pytest.raises(ValueError, match=r"^accelerator_config: .* is refused"):
        CaptTrainingArguments(str(tmp_path), use_cpu=True, accelerator_config=config)


def test_settings_of_adam_are_refused_beside_sgd_which_is_the_default(tmp_path):
    with pytest.raises(ValueError, match=r"^adam_beta2=0.95 has no effect on optim='sgd'. Give optim='adamw_torch'"):
        CaptTrainingArguments(str(tmp_path), use_cpu=True, adam_beta2=0.95)
    CaptTrainingArguments(str(tmp_path), use_cpu=True, adam_beta2=0.95, optim="adamw_torch")


@pytest.mark.parametrize("name", sorted(REFUSED_OF_TRAINER))
def test_a_trainers_argument_without_effect_is_refused_by_name(tmp_path, name):
    args = CaptTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=f"^{name}= is refused: "):
        CaptTrainer(None, args, task=None, processor=None, **{name: print})


def test_a_name_that_no_trainer_knows_and_plain_training_arguments_are_refused(tmp_path, processor):
    args = CaptTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'callback'"):
        CaptTrainer(make_model(), args, task=make_task(), processor=processor, callback=[])
    with pytest.raises(TypeError, match="must be CaptTrainingArguments, not TrainingArguments"):
        CaptTrainer(None, TrainingArguments(str(tmp_path), use_cpu=True), task=None, processor=None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [f.name for f in fields(CaptTrainingArguments) if "float" in str(f.type)])
def test_a_number_that_is_not_finite_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"^{name}={value} (must be a finite number|is refused|has no effect)"):
        CaptTrainingArguments(str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": -0.1}, "learning_rate=-0.1 must be at least 0."),
        ({"weight_decay": -1}, "weight_decay=-1 must be at least 0."),
        ({"max_grad_norm": -1}, "max_grad_norm=-1 must be at least 0."),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1."),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size=0 must be at least 1."),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1."),
        ({"norm": "patch", "epsilon": "1/8"}, "PGD is built for linf, l2, l1, not for patch 0.125"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0 to 4294967295."),
        ({"seed": 2**32}, "seed=4294967296 must be a whole number from 0 to 4294967295."),
        ({"data_seed": -1}, "data_seed=-1 must be a whole number from 0 to 4294967295."),
        ({"num_train_epochs": 0}, "num_train_epochs=0: nothing would be trained"),
        ({"num_train_epochs": -1.0}, "num_train_epochs=-1.0: nothing would be trained"),
        ({"max_steps": 0}, "max_steps=0: nothing would be trained"),
        ({"optim_args": "foo"}, "optim_args='foo' must be names with values, such as 'momentum=0.9,nesterov=true'."),
        ({"optim_args": "momentum=0.9,"}, "optim_args='momentum=0.9,' must be names with values"),
        ({"optim_args": "momentum=much"}, "optim_args: momentum='much' must be a finite number."),
        ({"optim_args": "dampening=nan"}, "optim_args: dampening='nan' must be a finite number."),
        ({"optim_args": "momentun=0.9"}, "optim_args: 'momentun' has no effect on optim='sgd'. Allowed: momentum, "),
    ],
)
def test_a_number_that_cannot_work_is_refused(tmp_path, settings, words):
    with pytest.raises(ValueError) as caught:
        CaptTrainingArguments(str(tmp_path), use_cpu=True, **settings)
    assert str(caught.value).startswith(words)


def test_numbers_at_the_end_of_their_range_are_taken(tmp_path):
    largest = {"seed": 2**32 - 1, "data_seed": 2**32 - 1, "learning_rate": 0, "max_grad_norm": None}
    CaptTrainingArguments(str(tmp_path), use_cpu=True, **largest, optim_args="momentum=0, nesterov=false")
    CaptTrainingArguments(
        str(tmp_path), use_cpu=True, num_train_epochs=0, max_steps=1, optim="adamw_torch", optim_args="a=b"
    )


def test_settings_of_the_attack_are_refused_beside_an_attack(tmp_path, processor):
    attack = PGD(ThreatModel("linf", "4/255"), steps=1)
    with pytest.raises(ValueError, match=r"^attack_steps=7 has no effect beside attack="):
        make_trainer(tmp_path, processor, attack=attack, attack_steps=7)


def test_a_teacher_is_refused_where_the_objective_has_no_use_for_it(tmp_path, processor):
    task = make_task()
    teacher = ZeroShotClassifier(make_model(), processor, task.class_names, task.template)
    with pytest.raises(ValueError, match=r"^teacher= has no effect"):
        make_trainer(tmp_path, processor, task=task, objective=Scripted(1.0), teacher=teacher)


# ------------------------------------------------------------------------------------------------- settings that work


def quick(folder, processor, **settings):
    return make_trainer(folder, processor, max_steps=1, attack_steps=1, eval_attack="pgd-1", **settings)


def accuracies(metrics):
    return {name: value for name, value in metrics.items() if "accuracy" in name or name.endswith("_n")}


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader_drop_last": True},
        {"eval_accumulation_steps": 1},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_an_evaluation_is_of_all_images_of_its_split_whatever_the_loader(tmp_path, processor, settings):
    model, task = make_model(), make_task()
    shake(model)
    splits = [task["validation"], task["validation"].select(range(7)), task["validation"].select([0, 3, 6])]
    plain = quick(tmp_path, processor, model=model, per_device_eval_batch_size=5)
    expected = [accuracies(plain.evaluate(split)) for split in splits]
    trainer = quick(tmp_path, processor, model=model, per_device_eval_batch_size=5, **settings)
    assert [accuracies(trainer.evaluate(split)) for split in splits] == expected
    assert accuracies(trainer.evaluate()) == expected[0]
    assert [found["eval_n"] for found in expected] == [12, 7, 3]


def test_a_given_optimizer_class_is_what_takes_the_steps(tmp_path, processor):
    adapters = []
    for rate in (0.0, 0.1):
        args = quick(tmp_path, processor).args
        trainer = CaptTrainer(
            make_model(), args, task=make_task(), processor=processor, optimizer_cls_and_kwargs=(torch.optim.Adam, {"lr": rate})
        )  # fmt: skip
        before = adapter_of(trainer)
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, torch.optim.Adam)
        adapters.append(all(torch.equal(before[name], p) for name, p in adapter_of(trainer).items()))
    assert adapters == [True, False]


def test_sequential_sampling_takes_the_images_in_their_order(tmp_path, processor):
    trainer = quick(tmp_path, processor, train_sampling_strategy="sequential")
    assert next(iter(trainer.get_train_dataloader()))["index"].tolist() == [0, 1, 2, 3]


def test_the_processor_may_go_by_its_name_in_the_trainer(tmp_path, processor):
    args = quick(tmp_path, processor).args
    trainer = CaptTrainer(make_model(), args, task=make_task(), processing_class=processor)
    assert trainer.classifier.processor is processor
    for given in ({}, {"processor": processor, "processing_class": copy.copy(processor)}):
        with pytest.raises(ValueError, match="of processor= and processing_class= is given"):
            CaptTrainer(make_model(), args, task=make_task(), **given)
    assert isinstance(processor, type(AutoProcessor.from_pretrained(TINY_CLIP)))
