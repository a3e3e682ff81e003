"""What users of transformers' and TRL's trainers do works: splits to evaluate and predict, best checkpoints, saved adapters."""

import datasets
import numpy as np
import pytest
import torch
from helpers import TINY_CLIP, shake
from peft import LoraConfig, PeftModel, get_peft_model
from training_helpers import NAMES, adapter_of, frozen_logits, make_model, make_task, make_trainer
from transformers import CLIPModel

from capt_peft import CaptConfig, CaptTrainer, Task, ZeroShotClassifier
from capt_peft.data.columns import named_as
from capt_peft.data.pixels import PixelDataset
from capt_peft.data.task import task_features
from capt_peft.training.fare import train_image_tower_alone

STREAMED = datasets.IterableDataset.from_generator(lambda: iter([]))


def quick(folder, processor, eval_dataset=None, task=None, model=None, **settings):
    trainer = make_trainer(
        folder, processor, model=model, task=task, max_steps=1, attack_steps=1, eval_attack="pgd-1", **settings
    )
    if eval_dataset is None:
        return trainer
    return CaptTrainer(
        trainer.model, trainer.args, task=trainer.task, processor=processor, eval_dataset=eval_dataset
    )  # fmt: skip


def base():
    return CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)


def permuted(split, order):
    """The same images under the same names, whose labels count another order of the names."""
    names = [NAMES[place] for place in order]
    labels = [names.index(NAMES[label]) for label in split["label"]]
    columns = {"image": split.cast_column("image", datasets.Image(decode=False))["image"], "label": labels}
    return datasets.Dataset.from_dict(columns, features=task_features(names))


def accuracies(metrics, prefix="eval"):
    return {name.removeprefix(prefix): value for name, value in metrics.items() if "accuracy" in name}


# ----------------------------------------------------------------------------------------------- splits to be measured


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2)])
def test_labels_of_any_split_given_to_the_trainer_go_by_name(tmp_path, processor, order):
    task, model = make_task(), make_model()
    shake(model)
    other = permuted(task["validation"], order)
    trainer = quick(tmp_path, processor, model=model, task=task)
    expected = trainer.evaluate()
    right = trainer.predict(task["validation"])
    assert 0 < expected["eval_clean_accuracy"] < 1
    assert accuracies(trainer.evaluate(other)) == accuracies(expected)
    assert accuracies(trainer.evaluate(PixelDataset(other, trainer.classifier.transform))) == accuracies(expected)
    assert np.array_equal(trainer.predict(other).label_ids, right.label_ids)
    given = quick(tmp_path, processor, model=model, task=task, eval_dataset=other)
    assert accuracies(given.evaluate()) == accuracies(expected)
    turned = named_as(permuted(task["train"], order), NAMES)  # a Task refuses labels that count another order
    tuned = quick(tmp_path, processor, task=Task("patches", NAMES, {"train": turned}))
    assert tuned.train_dataset.labels == trainer.train_dataset.labels


@pytest.mark.parametrize(
    ("names", "words"),
    [(("red circle", "green square", "eight"), "has images of the class 'eight'"), (None, "has labels from 0 to 3")],
)
def test_splits_of_other_classes_are_refused_before_any_image_is_measured(tmp_path, processor, names, words):
    task = make_task()
    columns = {"image": task["validation"]["image"], "label": [0, 1, 2, 3 if names is None else 2] * 3}
    features = (
        task_features(names)
        if names
        else datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    )
    other = datasets.Dataset.from_dict(columns, features=features)
    trainer = quick(tmp_path, processor, task=task)
    trainer.prediction_step = None
    for use in (
        trainer.evaluate,
        trainer.predict,
        lambda split: quick(tmp_path, processor, task=task, eval_dataset=split),
    ):
        with pytest.raises(ValueError, match=words):
            use(other)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ([1, 2], "must be a datasets.Dataset with the columns `image` and `label`, not list"),
        (
            STREAMED,
            r"must be a datasets.Dataset with .*not IterableDataset \(streamed, .*load it without streaming=True",
        ),
        (datasets.IterableDatasetDict(test=STREAMED), r"The split 'test' must be .* not IterableDataset \(streamed"),
        (datasets.Dataset.from_dict({"text": ["a"]}), r"not the columns \['text'\]"),
        ("nonsense", "There is no split 'nonsense'. Give one of 'train', 'validation'"),
    ],
    ids=["a list", "streamed", "streamed splits", "another column", "a name"],
)
def test_what_is_no_split_is_refused_with_what_is_needed(tmp_path, processor, split, words):
    trainer = quick(tmp_path, processor)
    for use in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=words):
            use(split)


def test_an_empty_split_is_refused(tmp_path, processor):
    trainer = quick(tmp_path, processor)
    with pytest.raises(ValueError, match="The split has no images"):
        trainer.evaluate(trainer.task["validation"].select([]))


def test_predict_returns_the_classes_of_clean_and_adversarial_images_with_their_accuracy(tmp_path, processor):
    model = make_model()
    shake(model)
    trainer = quick(tmp_path, processor, model=model)
    output = trainer.predict(trainer.task["validation"])
    clean, adversarial = output.predictions
    assert clean.shape == adversarial.shape == output.label_ids.shape == (12,)
    assert output.metrics["test_clean_accuracy"] == (clean == output.label_ids).mean()
    right = (clean == output.label_ids) & (adversarial == output.label_ids)
    assert output.metrics["test_robust_accuracy"] == right.mean()
    assert output.metrics["test_attack"] == "pgd-1, L-inf 4/255"
    assert accuracies(trainer.evaluate()) == accuracies(output.metrics, "test")
    assert np.array_equal(trainer.predict("validation").predictions[0], clean)  # by the name of a split of the task


def test_several_splits_are_measured_under_their_names(tmp_path, processor):
    task = make_task()
    splits = datasets.DatasetDict(
        {"few": task["validation"].select(range(5)), "all": permuted(task["validation"], (2, 1, 0))}
    )
    trainer = quick(tmp_path, processor, task=task, eval_dataset=splits, eval_strategy="steps", eval_steps=1)
    expected = trainer.evaluate(task["validation"])
    for metrics in (trainer.evaluate(), trainer.evaluate(splits)):
        assert (metrics["eval_few_n"], metrics["eval_all_n"]) == (5, 12)
        assert metrics["eval_all_robust_accuracy"] == expected["eval_robust_accuracy"]
    assert trainer.evaluate("few")["eval_n"] == 5
    trainer.train()
    assert {"eval_few_clean_accuracy", "eval_all_clean_accuracy"} <= {
        k for line in trainer.state.log_history for k in line
    }


# -------------------------------------------------------------------------------------------------- the best checkpoint

BEST = {
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
}


def test_the_best_model_is_that_of_the_highest_robust_accuracy_unless_said_otherwise(tmp_path, processor):
    trainer = make_trainer(
        tmp_path, processor, max_steps=3, attack_steps=1, eval_attack="pgd-1", learning_rate=0.5, **BEST
    )
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("eval_robust_accuracy", True)
    trainer.train()
    seen = [line["eval_robust_accuracy"] for line in trainer.state.log_history if "eval_robust_accuracy" in line]
    assert trainer.state.best_metric == max(seen) == trainer.evaluate()["eval_robust_accuracy"]


@pytest.mark.parametrize("metric", ["loss", "eval_accuracy", "robust"])
def test_a_metric_that_is_not_evaluated_is_refused_before_training(tmp_path, processor, metric):
    with pytest.raises(
        ValueError, match=f"metric_for_best_model='{metric}' is not evaluated. Give eval_robust_accuracy"
    ):
        quick(tmp_path, processor, metric_for_best_model=metric, **BEST)


def test_of_several_splits_one_must_be_named_that_chooses_the_best(tmp_path, processor):
    split = make_task()["validation"]
    with pytest.raises(ValueError, match="Give eval_a_robust_accuracy, eval_b_robust_accuracy"):
        quick(tmp_path, processor, eval_dataset={"a": split, "b": split}, **BEST)


def test_it_is_said_when_the_test_images_choose_the_best_checkpoint(tmp_path, processor, caplog):
    quick(tmp_path, processor, **BEST)
    assert "chosen on the test images" not in caplog.text
    quick(tmp_path, processor, task=make_task(splits=("train", "test")), **BEST)
    assert "chosen on the test images" in caplog.text


# ----------------------------------------------------------------------------------------------------- what is tuned


def test_an_adapter_loaded_for_inference_is_evaluated_as_it_is_and_tuned_further_as_a_trainable_one(
    tmp_path, processor
):
    make_model().save_pretrained(tmp_path / "adapter")
    tuned = []
    for options in ({}, {"is_trainable": True}):
        trainer = quick(tmp_path, processor, model=PeftModel.from_pretrained(base(), tmp_path / "adapter", **options))
        assert trainer.evaluate()["eval_n"] == 12
        assert any(p.requires_grad for p in trainer.model.parameters()) is bool(options)
        trainer.train()
        tuned.append(adapter_of(trainer))
    assert tuned[0].keys() == tuned[1].keys()
    assert all(torch.equal(tensor, tuned[1][name]) for name, tensor in tuned[0].items())


def lora(**config):
    return get_peft_model(base(), LoraConfig(target_modules=["q_proj", "v_proj"], **config))


def with_a_trained_norm():
    model = make_model()
    model.base_model.model.vision_model.post_layernorm.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    "moving",
    [lambda: train_image_tower_alone(base()), lambda: lora(bias="all"), with_a_trained_norm],
    ids=["bare", "bias", "norm"],
)
def test_a_base_that_is_tuned_itself_cannot_be_the_frozen_model(tmp_path, processor, moving):
    with pytest.raises(ValueError, match=r"(the base is tuned itself|The model has no adapter).* give teacher="):
        quick(tmp_path, processor, model=moving())
    task = make_task()
    teacher = ZeroShotClassifier(base(), processor, task.class_names, task.template)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    trainer = quick(tmp_path, processor, model=moving(), task=task, teacher=teacher)
    trainer.train()
    assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())


def test_a_teacher_that_would_move_with_the_model_is_refused(tmp_path, processor):
    task, clip = make_task(), base()
    teacher = ZeroShotClassifier(clip, processor, task.class_names, task.template)
    model = get_peft_model(clip, CaptConfig(template=task.template))  # which puts the prompts into the teacher too
    with pytest.raises(ValueError, match="The teacher shares parameters with the model that is tuned"):
        quick(tmp_path, processor, model=model, task=task, teacher=teacher)


def noisy():
    model = base()
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.dropout = 0.5
    return model


ADAPTERS = {
    "capt": lambda: get_peft_model(base(), CaptConfig()),
    "modules_to_save": lambda: get_peft_model(base(), CaptConfig(modules_to_save=["visual_projection"])),
    "lora": lambda: lora(lora_dropout=0.5, init_lora_weights=False),
    "dropout in the base": lambda: get_peft_model(noisy(), CaptConfig()),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_teacher_of_a_run_is_bitwise_the_base_without_any_adapter(tmp_path, processor, kind):
    model = ADAPTERS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    trainer = make_trainer(
        tmp_path, processor, model=model, max_steps=4, attack_steps=1, train_sampling_strategy="sequential"
    )
    trainer.train()
    task = trainer.task
    pure = ZeroShotClassifier(base(), processor, task.class_names, task.template).eval()
    places = list(range(len(trainer.train_dataset)))
    pixels = torch.stack([trainer.train_dataset[place]["pixels"] for place in places])
    assert torch.equal(frozen_logits(trainer, pixels, places), pure(pixels).detach())
