"""The frozen model's outputs: computed once an image, kept in memory, and the same in a run that goes on."""

import torch
from helpers import TINY_CLIP
from training_helpers import make_task, make_trainer
from transformers import CLIPModel

from capt_peft.objectives import AdversarialCrossEntropy
from capt_peft.training.fare import FareTrainer, train_image_tower_alone


def run_epoch(trainer, places=None):
    """Returns the frozen outputs of all training images, and how many images the frozen model was run on for them."""
    runs = []
    plain = trainer._run_frozen
    trainer._run_frozen = lambda pixels: runs.append(len(pixels)) or plain(pixels)
    places = list(range(len(trainer.train_dataset))) if places is None else places
    pixels = torch.stack([trainer.train_dataset[place]["pixels"] for place in places])
    outputs = trainer._frozen(pixels, places)
    trainer._run_frozen = plain
    return outputs, sum(runs)


def test_each_image_is_computed_once_and_comes_back_to_the_last_bit(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor)
    first, computed = run_epoch(trainer)
    again, more = run_epoch(trainer, places=[7, 2])
    assert (computed, more) == (12, 0)
    assert torch.equal(again, first[[7, 2]])


def test_with_augmentation_no_image_is_kept(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, augment=True)
    assert [run_epoch(trainer)[1] for _ in range(2)] == [12, 12]
    assert not trainer._frozen_outputs._known


def test_an_objective_without_frozen_logits_computes_none(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, num_train_epochs=1, objective=AdversarialCrossEntropy())
    trainer.train()
    assert not trainer._frozen_outputs._known


def test_fares_features_are_kept_too(tmp_path, processor):
    model = train_image_tower_alone(CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32))
    args = make_trainer(tmp_path, processor).args
    trainer = FareTrainer(model, args, task=make_task(), processor=processor)
    first, computed = run_epoch(trainer)
    second, again = run_epoch(trainer)
    assert (computed, again) == (12, 0)
    assert first.shape == (12, 128) and torch.equal(first, second)


def test_a_resumed_run_takes_the_frozen_outputs_of_its_checkpoint(tmp_path, processor):
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, "attack_steps": 1}
    whole = make_trainer(tmp_path, processor, **settings)
    whole.train()

    def adapter(trainer):
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])

    checkpoint = str(tmp_path / "out" / "checkpoint-2")  # within the first epoch
    resumed = make_trainer(tmp_path, processor, **settings)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert torch.equal(adapter(resumed), adapter(whole))
    assert all(output.equal(whole._frozen_outputs._known[i]) for i, output in resumed._frozen_outputs._known.items())
