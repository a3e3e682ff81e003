"""What the released trainers of FAP and APT do otherwise than ours: schedule, decay, last batch, start, pixels, attack."""

import math

import numpy as np
import pytest
import torch
from helpers import TEMPLATE_IDS, random_clip
from peft import get_peft_model
from PIL import Image
from torch.nn import functional as F
from training_helpers import make_model, make_trainer

from capt_peft import PGD, CaptConfig, CaptTrainingArguments, ThreatModel
from capt_peft.data.pixels import PixelTransform


def rates_of(trainer):
    trainer.train()
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_the_rate_by_epoch_is_that_of_coops_toolbox(tmp_path, processor):
    """Four epochs of three steps: one at 1e-5, then 0.2 (1 + cos(pi (e - 1) / 4)) / 2, as its own scheduler steps them."""
    reference = []
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4.0)
    for epoch in range(4):
        reference += [1e-5 if epoch == 0 else optimizer.param_groups[0]["lr"]] * 3
        if epoch > 0:
            optimizer.step()
            cosine.step()
    trainer = make_trainer(tmp_path, processor, num_train_epochs=4, learning_rate=0.2, lr_schedule="epoch")
    assert rates_of(trainer) == pytest.approx(reference)


def test_the_rate_by_epoch_counts_optimizer_steps_under_accumulation_and_max_steps(tmp_path, processor):
    trainer = make_trainer(
        tmp_path, processor, max_steps=5, gradient_accumulation_steps=2, learning_rate=0.2, lr_schedule="epoch"
    )
    half = 0.2 * (1 + math.cos(math.pi / 3)) / 2  # 2 steps an epoch, 3 epochs
    assert rates_of(trainer) == pytest.approx([1e-5, 1e-5, 0.2, 0.2, half])


def test_a_run_of_one_epoch_by_epoch_is_warned_of(tmp_path, processor, caplog):
    make_trainer(tmp_path, processor, num_train_epochs=1, lr_schedule="epoch").train()
    assert "this run has no second one" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr_schedule": "epochs"}, "Allowed: step, epoch"),
        ({"lr_schedule": "epoch", "warmup_steps": 0.1}, "warmup_steps have no effect"),
        ({"lr_schedule": "epoch", "lr_scheduler_type": "linear"}, "lr_scheduler_type"),
        ({"squash": True, "augment": True}, "Choose one"),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        CaptTrainingArguments(str(tmp_path), use_cpu=True, **arguments)


@pytest.mark.parametrize("biases", [False, True])
def test_weight_decay_reaches_the_biases_if_asked_to(tmp_path, processor, biases):
    model = make_model(coupling="vision_to_text", init="random")
    trainer = make_trainer(tmp_path, processor, model=model, weight_decay=5e-4, decay_biases=biases)
    trainer.create_optimizer()
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    trained = {name: id(p) in decayed for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 4 and all(trained[name] == (biases or not name.endswith("bias")) for name in trained)


def test_the_last_batch_is_dropped_in_training_alone(tmp_path, processor):
    """12 training images in batches of 8; all 12 of the evaluation are measured, and a set smaller than a batch is kept."""
    trainer = make_trainer(tmp_path, processor, per_device_train_batch_size=8, dataloader_drop_last=True)
    assert len(trainer.get_train_dataloader()) == 1
    trainer.args.per_device_eval_batch_size = 8
    assert trainer.evaluate()["eval_n"] == 12
    assert trainer.args.dataloader_drop_last
    small = make_trainer(tmp_path, processor, per_device_train_batch_size=32, dataloader_drop_last=True)
    assert [len(batch["labels"]) for batch in small.get_train_dataloader()] == [12]


def test_the_maps_between_the_towers_start_as_copies_of_one():
    """MaPLe's and FAP's code clone one Linear for the deeper layers; the one at the input is its own."""
    shape = {"text_depth": 4, "vision_depth": 4, "template_token_ids": TEMPLATE_IDS}
    model = get_peft_model(random_clip(), CaptConfig(coupling="vision_to_text", init="random", **shape))
    maps = {name: p for name, p in model.named_parameters() if "capt_proj" in name and name.endswith("weight")}
    deep = [p for name, p in maps.items() if ".layers." in name]
    assert len(deep) == 3 and len(maps) == 4
    assert all(torch.equal(p, deep[0]) and p is not deep[0] for p in deep[1:])


@pytest.mark.parametrize("class_specific", [False, True])
def test_the_start_of_apt_is_normal_at_the_input_too(class_specific):
    settings = {"num_text_tokens": 2, "text_depth": 1, "vision_depth": 0, "class_specific": class_specific}
    model = make_model(init="normal", class_names=[f"class {i}" for i in range(20)], **settings)
    (prompt,) = (p for p in model.parameters() if p.requires_grad)
    assert prompt.shape[:-1] == ((20, 2) if class_specific else (2,))
    assert prompt.std().item() == pytest.approx(0.02, rel=0.2) and abs(prompt.mean().item()) < 0.005
    assert not torch.equal(prompt.flatten(0, -2)[0], prompt.flatten(0, -2)[1])


def test_a_squashed_image_keeps_its_edges_and_a_cropped_one_does_not(processor):
    image = Image.fromarray(np.zeros((20, 80, 3), np.uint8))
    image.paste((255, 255, 255), (0, 0, 10, 20))
    squashed, cropped = (PixelTransform(processor, squash=squash) for squash in (True, False))
    assert squashed(image).shape == cropped(image).shape
    assert squashed(image)[:, :, 0].min() > 0.9 and cropped(image).max() == 0
    assert squashed.to_dict()["squash"] is True and "squash" not in cropped.to_dict()


def test_training_images_are_squashed_and_evaluated_ones_are_not(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, squash=True)
    assert trainer.train_dataset.transform.squash and not trainer.eval_dataset.transform.squash


def test_the_unclipped_attack_is_apts_loop():
    """delta is kept in the ball alone; only what the model sees, and what is returned, is cut to [0, 1]."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    images, labels, epsilon = torch.rand(4, 3, 4, 4).round(), torch.tensor([0, 1, 2, 0]), 0.2
    attack = PGD(ThreatModel("linf", epsilon), steps=3, clip_each_step=False)
    found = attack.run(model, images, labels, 0).images
    delta = attack.threat_model.random_start(images, None, clip=False) - images
    assert (images + delta).min() < 0 and (images + delta).max() > 1
    for _ in range(3):
        seen = (images + delta).clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(seen), labels), seen)
        delta = (delta + 2 / 3 * epsilon * gradient.sign()).clamp(-epsilon, epsilon)
    torch.testing.assert_close(found, (images + delta).clamp(0, 1), atol=1e-6, rtol=0)
    clipped = PGD(ThreatModel("linf", epsilon), steps=3)
    assert not torch.equal(found, clipped.run(model, images, labels, 0).images)
    assert attack.name == "pgd-3-unclipped" and attack.to_dict()["clip_each_step"] is False
    assert clipped.name == "pgd-3" and "clip_each_step" not in clipped.to_dict()
