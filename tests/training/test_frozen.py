"""The frozen model's outputs: features computed once, before training, and the same in a run that goes on."""

import pytest
import torch
from helpers import TINY_CLIP, shake
from training_helpers import adapter_of, make_task, make_trainer
from transformers import CLIPModel

from capt_peft import ZeroShotClassifier
from capt_peft.objectives import AdversarialCrossEntropy, PmgAftObjective
from capt_peft.training import frozen
from capt_peft.training.chunks import split_batch
from capt_peft.training.fare import FareTrainer, train_image_tower_alone


@pytest.fixture
def runs(monkeypatch):
    """The numbers of images that frozen models are run on."""
    sizes, plain = [], frozen.embed
    monkeypatch.setattr(frozen, "embed", lambda model, pixels: sizes.append(len(pixels)) or plain(model, pixels))
    return sizes


def features(trainer, places=range(12)):
    pixels = torch.stack([trainer.train_dataset[place]["pixels"] for place in places])
    return trainer._frozen_outputs.features(pixels, list(places))


def test_each_image_is_computed_once_and_comes_back_to_the_last_bit(tmp_path, processor, runs):
    trainer = make_trainer(tmp_path, processor)
    first = features(trainer)
    again = features(trainer, [7, 2])
    assert runs == [12]
    assert torch.equal(again, first[[7, 2]])


def test_a_run_computes_all_before_its_first_step_in_batches_of_their_own(tmp_path, processor, runs, monkeypatch):
    monkeypatch.setattr(frozen, "BATCH", 5)
    computed = []
    for size in (4, 3):
        trainer = make_trainer(tmp_path, processor, max_steps=1, per_device_train_batch_size=size)
        trainer.train()
        computed.append(trainer._frozen_outputs._features)
    assert runs == [5, 5, 2] * 2
    assert torch.equal(*computed)


def test_the_random_numbers_of_the_run_are_not_touched(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, dataloader_num_workers=1)
    before = torch.get_rng_state()
    trainer._frozen_outputs.compute()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("quiet", [True, False])
def test_what_takes_long_has_a_progress_bar_unless_it_is_not_wanted(tmp_path, processor, capfd, monkeypatch, quiet):
    monkeypatch.setattr("capt_peft.training.frozen.BAR_AFTER", 0)
    make_trainer(tmp_path, processor, disable_tqdm=quiet)._frozen_outputs.compute()
    assert ("Frozen model: 100%" in capfd.readouterr().err) is not quiet


def test_with_augmentation_no_image_is_kept(tmp_path, processor, runs):
    trainer = make_trainer(tmp_path, processor, augment=True, max_steps=2)
    trainer.train()
    assert runs == [4, 4]
    assert trainer._frozen_outputs._features is None


def test_an_objective_without_frozen_logits_computes_none(tmp_path, processor, runs):
    make_trainer(tmp_path, processor, num_train_epochs=1, objective=AdversarialCrossEntropy()).train()
    assert not runs


def test_the_frozen_model_runs_adversarial_images_where_the_objective_asks_for_them(tmp_path, processor, runs):
    trainer = make_trainer(tmp_path, processor, objective=PmgAftObjective())
    shake(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert runs == [4]  # the attacked images, and no clean ones
    with torch.no_grad():
        texts, clean = trainer.classifier.encode_texts(), trainer.classifier(batch["pixels"])
    attacked = trainer._attack(split_batch(batch, None)[0], texts, clean).images
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32).eval()
    plain = ZeroShotClassifier(base, processor, trainer.task.class_names, trainer.task.template)
    torch.testing.assert_close(outputs["views"].frozen_adversarial, plain(attacked).detach(), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain(attacked), plain(batch["pixels"]), atol=0.1)
    assert outputs["views"].frozen is None and not outputs["views"].frozen_adversarial.requires_grad


def test_the_frozen_features_are_those_of_the_frozen_predictions(tmp_path, processor, runs):
    trainer = make_trainer(tmp_path, processor, frozen_term="features", augment=True)
    batch = next(iter(trainer.get_train_dataloader()))
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert runs == [4]  # once, for both
    views, texts = outputs["views"], trainer._frozen_outputs._text_features()
    torch.testing.assert_close(views.frozen_features.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(trainer.classifier.logits(views.frozen_features, texts), views.frozen)
    assert views.frozen_adversarial is None
    trainer.train()
    assert "consistency_frozen" in trainer.state.log_history[0]


def test_a_model_that_moves_cannot_guide_pmg_aft(tmp_path, processor):
    model = train_image_tower_alone(CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32))
    with pytest.raises(ValueError, match="would change the frozen model"):
        make_trainer(tmp_path, processor, model=model, objective=PmgAftObjective())
    make_trainer(tmp_path, processor, objective=PmgAftObjective(), teacher=TINY_CLIP)
    with pytest.raises(ValueError, match="teacher= has no effect"):
        make_trainer(tmp_path, processor, objective=PmgAftObjective(0), teacher=TINY_CLIP)


def test_fares_features_are_kept_too(tmp_path, processor, runs):
    model = train_image_tower_alone(CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32))
    args = make_trainer(tmp_path, processor).args
    trainer = FareTrainer(model, args, task=make_task(), processor=processor)
    first, second = features(trainer), features(trainer)
    assert runs == [12]
    assert first.shape == (12, 128) and torch.equal(first, second)


def test_a_resumed_run_computes_the_same_features_and_ends_at_the_same_adapter(tmp_path, processor):
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, "attack_steps": 1}
    whole = make_trainer(tmp_path, processor, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, processor, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))  # within the first epoch
    assert all(torch.equal(tensor, adapter_of(whole)[name]) for name, tensor in adapter_of(resumed).items())
    assert torch.equal(resumed._frozen_outputs._features, whole._frozen_outputs._features)
