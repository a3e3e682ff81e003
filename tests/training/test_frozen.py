"""Where a run keeps the frozen model's outputs: shared between runs, by content, and off where it is of no use."""

import copy

import datasets
import numpy as np
import pytest
import torch
from helpers import TINY_CLIP, shake
from peft import get_peft_model
from PIL import Image
from transformers import CLIPModel

from capt_peft import CaptConfig, CaptTrainer, CaptTrainingArguments, Task
from capt_peft.classifier import ZeroShotClassifier
from capt_peft.data.task import DEFAULT_TEMPLATE, task_features
from capt_peft.finetune import FareTrainer, train_image_tower_alone
from capt_peft.objectives import AdversarialCrossEntropy
from capt_peft.training import frozen, frozen_store
from capt_peft.training.frozen import FrozenOutputs
from capt_peft.training.frozen_store import CHECK, ENTRY, KEY

NAMES = ("red circle", "green square", "seven")


def make_task(names=NAMES, template=DEFAULT_TEMPLATE, order=None, changed=None):
    """Twelve noisy patches, no two alike; `changed` is the number of one with another pixel."""
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(12)]
    if changed is not None:
        arrays[changed][5, 7, 1] ^= 1
    order = range(12) if order is None else order
    columns = {"image": [Image.fromarray(arrays[i]) for i in order], "label": [i % len(names) for i in order]}
    return Task(
        "patches", names, {"train": datasets.Dataset.from_dict(columns, features=task_features(names))}, template
    )


def make_base(nudge=0.0):
    model = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += nudge
    return model


def make_model(seed=0, nudge=0.0, **config):
    torch.manual_seed(seed)
    return get_peft_model(make_base(nudge), CaptConfig(**{"text_depth": 2, "vision_depth": 2, **config}))


def make_trainer(tmp_path, processor, task=None, model=None, kind=CaptTrainer, **arguments):
    made = {key: arguments.pop(key) for key in ("objective", "teacher") if key in arguments}
    settings = {
        "output_dir": str(tmp_path / "out"), "use_cpu": True, "num_train_epochs": 2, "per_device_train_batch_size": 4,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 0.05, "attack_steps": 1,
        "frozen_cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    args = CaptTrainingArguments(**{**settings, **arguments})
    return kind(model or make_model(), args, task=task or make_task(), processor=processor, **made)


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


def test_a_second_run_reads_bitwise_what_the_first_computed_and_never_runs_the_frozen_model(tmp_path, processor):
    first, computed = run_epoch(make_trainer(tmp_path, processor))
    assert computed == 12
    in_memory, _ = run_epoch(make_trainer(tmp_path, processor, frozen_cache_dir=None))
    torch.testing.assert_close(first, in_memory)
    other = make_trainer(tmp_path, processor, seed=1, model=make_model(seed=1, vision_depth=1))
    shake(other.model)  # other prompts, and other layers that have them: the frozen model is the same
    second, computed = run_epoch(other)
    assert computed == 0
    assert torch.equal(first, second)


def test_runs_share_the_images_that_they_have_in_common(tmp_path, processor):
    first, _ = run_epoch(make_trainer(tmp_path, processor, task=make_task(order=[0, 3, 6, 1])))
    second, computed = run_epoch(make_trainer(tmp_path, processor, task=make_task(order=[6, 2, 0])))
    assert computed == 1
    assert torch.equal(second[[0, 2]], first[[2, 0]])


def other_mean(processor):
    """The processor with another mean: the pixels in [0, 1] are the same, what the model makes of them is not."""
    changed = copy.deepcopy(processor)
    changed.image_processor.image_mean = [0.4, 0.5, 0.5]
    return changed


def other_activation():
    model = make_base()
    model.config.vision_config.hidden_act = "gelu"
    return get_peft_model(model, CaptConfig(text_depth=2, vision_depth=2))


CHANGES = {
    "a pixel": (lambda p: {"task": make_task(changed=4)}, 1),
    "the transform": (lambda p: {"processor": other_mean(p)}, 12),
    "a class name": (lambda p: {"task": make_task(names=(*NAMES[:2], "eight"))}, 12),
    "the order of the classes": (lambda p: {"task": make_task(names=NAMES[::-1])}, 12),
    "the template": (lambda p: {"task": make_task(template="a drawing of a {}.")}, 12),
    "a weight": (lambda p: {"model": make_model(nudge=1e-6)}, 12),
    "the configuration": (lambda p: {"model": other_activation()}, 12),
    "the precision": (lambda p: {"bf16": True}, 12),
    "a teacher": (lambda p: {"teacher": ZeroShotClassifier(make_base(1e-6), p, NAMES)}, 12),
}


@pytest.mark.parametrize("what", CHANGES)
def test_outputs_are_computed_anew_when_this_changes(tmp_path, processor, what):
    run_epoch(make_trainer(tmp_path, processor))
    change, expected = CHANGES[what]
    _, computed = run_epoch(make_trainer(tmp_path, **{"processor": processor, **change(processor)}))
    assert computed == expected


def test_teachers_with_other_prompts_do_not_mix(tmp_path, processor):
    def teacher(seed):
        model = make_model()
        shake(model, seed)
        return ZeroShotClassifier(model, processor, NAMES)

    outputs = []
    for seed, expected in ((1, 12), (2, 12), (1, 0)):
        made, computed = run_epoch(make_trainer(tmp_path, processor, teacher=teacher(seed)))
        assert computed == expected
        outputs.append(made)
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


def test_fares_features_are_kept_too_and_are_no_logits(tmp_path, processor):
    def trainer():
        return make_trainer(tmp_path, processor, model=train_image_tower_alone(make_base()), kind=FareTrainer)

    first, computed = run_epoch(trainer())
    second, again = run_epoch(trainer())
    assert (computed, again) == (12, 0)
    assert first.shape == (12, 128) and torch.equal(first, second)


def test_features_and_as_many_logits_do_not_mix(tmp_path, processor):
    task = make_task(names=tuple(f"number {i}" for i in range(128)))
    run_epoch(
        make_trainer(tmp_path, processor, task=task, model=train_image_tower_alone(make_base()), kind=FareTrainer)
    )
    teacher = ZeroShotClassifier(make_base(), processor, task.class_names, task.template)
    logits, computed = run_epoch(make_trainer(tmp_path, processor, task=task, teacher=teacher))
    assert computed == 12 and logits.shape == (12, 128)


@pytest.mark.parametrize(
    "off", [{"augment": True}, {"objective": AdversarialCrossEntropy()}], ids=["augment", "no use"]
)
def test_nothing_is_kept_on_disk_where_it_is_of_no_use(tmp_path, processor, off, monkeypatch):
    monkeypatch.setattr(frozen, "MEMORY_BYTES", 0)
    trainer = make_trainer(tmp_path, processor, num_train_epochs=1, **off)
    trainer.train()
    assert isinstance(trainer._frozen_outputs, FrozenOutputs)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out" / "frozen_outputs").exists()


def test_a_base_model_that_is_tuned_itself_is_not_shared(tmp_path, processor, caplog):
    trainer = make_trainer(tmp_path, processor, model=train_image_tower_alone(make_base()))
    assert isinstance(trainer._frozen_outputs, FrozenOutputs)
    assert "the base model is tuned itself" in caplog.text


@pytest.mark.parametrize(("limit", "on_disk"), [(12 * 3 * 4, False), (12 * 3 * 4 - 1, True)])
def test_outputs_go_to_disk_by_themselves_when_they_are_too_large_for_memory(
    tmp_path, processor, monkeypatch, limit, on_disk
):
    monkeypatch.setattr(frozen, "MEMORY_BYTES", limit)
    trainer = make_trainer(tmp_path, processor, frozen_cache_dir=None, num_train_epochs=1)
    trainer.train()
    assert len(list((tmp_path / "out" / "frozen_outputs").rglob("*.rows"))) == on_disk


def spoil_other_runs(folder):
    """Adds a shard that comes before all others, with the same images and outputs that are a little different."""
    (rows,) = folder.rglob("*.rows")
    keys = rows.with_suffix(".keys")
    spoiled = np.fromfile(rows, "<f4").reshape(12, 3) + np.float32(0.01)
    digests = [keys.read_bytes()[i * ENTRY :][:KEY] for i in range(12)]
    checks = [frozen_store._checksum(key, row) for key, row in zip(digests, spoiled, strict=True)]
    assert all(len(check) == CHECK for check in checks)
    spoiled.tofile(rows.with_name("0.rows"))
    rows.with_name("0.keys").write_bytes(b"".join(k + c for k, c in zip(digests, checks, strict=True)))


def test_a_resumed_run_ends_bitwise_where_the_uninterrupted_one_does_whatever_others_wrote(tmp_path, processor):
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path, processor, **settings)
    whole.train()
    spoil_other_runs(tmp_path / "cache")
    assert not list((tmp_path / "out" / "checkpoint-2").glob("frozen_outputs*.safetensors"))

    def adapter(trainer):
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])

    resumed = make_trainer(tmp_path, processor, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))  # within the first epoch
    assert torch.equal(adapter(resumed), adapter(whole))
    misled = make_trainer(tmp_path, processor, **settings)
    misled._frozen_outputs.load = lambda *_: None
    misled.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert not torch.equal(adapter(misled), adapter(whole))
