"""The frozen model's outputs: features computed once, before training, and the same in a run that goes on."""

import pytest
import torch
from helpers import TINY_CLIP
from training_helpers import adapter_of, make_task, make_trainer
from transformers import CLIPModel

from capt_peft.objectives import AdversarialCrossEntropy
from capt_peft.training import frozen
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


def test_fares_features_are_kept_too(tmp_path, processor, runs):
    model = train_image_tower_alone(CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32))
    args = make_trainer(tmp_path, processor).args
    trainer = FareTrainer(model, args, task=make_task(), processor=processor)
    pixels = torch.stack([trainer.train_dataset[place]["pixels"] for place in range(12)])
    first, second = trainer._frozen(pixels, list(range(12))), trainer._frozen(pixels, list(range(12)))
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
