"""Training through the mean of several texts per class: prompts, frozen side, teacher, what is stored and what goes on."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import TINY_CLIP
from training_helpers import NAMES, adapter_of, losses, make_model, make_task, make_trainer
from transformers import CLIPModel

from capt_peft import ZeroShotClassifier

TEMPLATES = ["a photo of a {}.", "a drawing of the {}", "a photo of one small {}"]
OWN = {"seven": ["a photo of the digit seven", "a photo of seven"]}
STEPS = {"save_strategy": "steps", "save_steps": 1}


def task_of_texts(template=TEMPLATES, class_texts=OWN, **settings):
    return replace(make_task(**settings), template=template, class_texts=class_texts)


def base_classifier(processor):
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32).eval()
    return ZeroShotClassifier(base, processor, NAMES, TEMPLATES, class_texts=OWN)


@pytest.mark.parametrize("class_specific", [False, True])
def test_a_step_runs_the_mean_of_every_classes_texts(tmp_path, processor, class_specific):
    model = make_model(class_specific=class_specific, class_names=list(NAMES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    for size in (None, 3):
        trainer = make_trainer(tmp_path, processor, task=task_of_texts(), model=model, text_chunk_size=size)
        pixels = torch.stack([trainer.train_dataset[place]["pixels"] for place in range(2)])
        texts, _ = trainer._texts_and_clean_features(model, pixels)
        expected = trainer.classifier.encode_texts()
        assert texts.shape == (3, 128)
        torch.testing.assert_close(texts, expected, atol=1e-6, rtol=0)
        prompts = [p for name, p in model.named_parameters() if p.requires_grad and "text" in name]
        signs = torch.linspace(-1, 1, texts.numel()).view_as(texts)
        found, hand = (torch.autograd.grad((features * signs).sum(), prompts) for features in (texts, expected))
        for own, other in zip(found, hand, strict=True):
            assert other.norm() > 1e-3 and (own - other).norm() < 1e-5 * other.norm()


def test_runs_in_parts_are_the_same_run_up_to_rounding_and_another_one_than_with_one_text(tmp_path, processor):
    ends, said = [], []
    for settings in ({}, {"text_chunk_size": 2}, {"task": make_task()}):
        trainer = make_trainer(tmp_path, processor, **{"task": task_of_texts(), "max_steps": 3, **settings})
        trainer.train()
        ends.append(adapter_of(trainer))
        said.append(losses(trainer))
    assert said[0] == pytest.approx(said[1], rel=1e-4) and said[0] != pytest.approx(said[2], rel=1e-3)
    moved = max((ends[0][name] - ends[2][name]).abs().max() for name in ends[0])
    rounding = max((ends[0][name] - ends[1][name]).abs().max() for name in ends[0])
    assert rounding < 1e-3 * moved


def test_the_frozen_side_and_a_teacher_by_name_have_the_tasks_texts(tmp_path, processor):
    expected = base_classifier(processor).text_features()
    for teacher in (None, str(TINY_CLIP)):
        trainer = make_trainer(tmp_path, processor, task=task_of_texts(), teacher=teacher)
        torch.testing.assert_close(trainer._frozen_outputs._text_features(), expected, atol=1e-6, rtol=0)
        if teacher:
            assert trainer.teacher.texts == trainer.classifier.texts


def test_the_adapter_stores_its_texts_and_classifies_with_them(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, task=task_of_texts(), max_steps=1)
    trainer.train()
    trainer.model.peft_config["default"].base_model_name_or_path = str(TINY_CLIP)
    trainer.save_model(str(tmp_path / "saved"))
    stored = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert stored["template"] == TEMPLATES and stored["class_texts"] == OWN
    loaded = ZeroShotClassifier.from_pretrained(str(tmp_path / "saved"))
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), trainer.classifier.eval()(pixels))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert '| template | the mean of 3: "a photo of a {}.", "a drawing of the {}", "a photo of one small {}" |' in card
    assert "| own texts | 1 classes, 2 texts" in card


def test_a_task_without_texts_of_its_own_leaves_none_in_the_adapter(tmp_path, processor):
    model = make_model(class_names=list(NAMES), class_texts=OWN)
    make_trainer(tmp_path, processor, model=model)
    assert model.peft_config["default"].class_texts is None


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (task_of_texts(class_texts={"seven": ["a photo of the digit seven"]}), "class texts seven: "),
        (task_of_texts(class_texts=None), "class texts: nothing here"),
        (task_of_texts(TEMPLATES[:2]), "template: "),
        (
            task_of_texts(TEMPLATES[::-1]),
            "template 0: a photo of one small {} here, a photo of a {}. in the checkpoint",
        ),
    ],
)
def test_a_run_with_other_texts_does_not_go_on(tmp_path, processor, task, line):
    make_trainer(tmp_path, processor, task=task_of_texts(), max_steps=2, **STEPS).train()
    with pytest.raises(ValueError, match="is of another run") as caught:
        make_trainer(tmp_path, processor, task=task, max_steps=2, **STEPS).train(resume_from_checkpoint=True)
    assert line in str(caught.value)


def test_a_run_with_the_same_texts_goes_on_to_the_same_bits(tmp_path, processor):
    whole = make_trainer(tmp_path / "whole", processor, task=task_of_texts(), max_steps=4, **STEPS)
    whole.train()
    make_trainer(tmp_path / "cut", processor, task=task_of_texts(), max_steps=4, **STEPS).train()
    for folder in ("checkpoint-3", "checkpoint-4"):
        for path in (tmp_path / "cut" / "out" / folder).iterdir():
            path.unlink()
        (tmp_path / "cut" / "out" / folder).rmdir()
    again = make_trainer(tmp_path / "cut", processor, task=task_of_texts(), max_steps=4, **STEPS)
    again.train(resume_from_checkpoint=True)
    for name, values in adapter_of(whole).items():
        assert torch.equal(values, adapter_of(again)[name])
