"""Where images are, everything is: nothing is made on the CPU for images elsewhere, and nothing waits that is not listed."""

import json

import pytest
import torch
from elsewhere import DEVICE, Elsewhere, There, there
from toy_models import epsilon_for, make_model, some_images
from training_helpers import make_model as make_clip
from training_helpers import make_task, make_trainer

from capt_peft import CaptTrainingArguments, FareTrainer, evaluate
from capt_peft.attacks import APGD, FAB, PGD, AutoAttack, Square, ThreatModel, parse_attack
from capt_peft.randomness import example_generators
from capt_peft.training import train_image_tower_alone
from capt_peft.training.callbacks import CheckGradients
from capt_peft.utils.machine import tf32_in_use

SMALL = ("fgsm", "pgd-3", "pgd-3x2", "pgd-3-kl", "pgd-3-margin", "apgd-ce-6x2", "apgd-dlr-6", "apgd-t-6", "fab-t-4x2", "fab-4",
         "square-70")  # fmt: skip


class SmallAutoAttack(AutoAttack):
    """AutoAttack with few steps."""

    @property
    def parts(self):
        threat = self.threat_model
        return (
            APGD(threat, loss="ce", steps=4),
            APGD(threat, loss="t", steps=4),
            FAB(threat, steps=2),
            Square(threat, queries=8),
        )


def runs(attack, generator=0, report=None):
    """An attack on the CPU and elsewhere; returns both results' images and what was seen elsewhere."""
    model, images = make_model(), some_images(12)
    labels = model(images).argmax(1)
    here = attack.run(model, images, labels, generator).images
    with Elsewhere() as seen:
        found = attack.run(there(make_model()), there(images), there(labels), generator, report=report).images
    return here, found, seen


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", [*SMALL, "autoattack"])
def test_attacks_stay_where_the_images_are(name, norm):
    threat = epsilon_for(norm, 4)
    attack = SmallAutoAttack(threat) if name == "autoattack" else parse_attack(name, threat)
    here, found, seen = runs(attack)
    assert isinstance(found, There) and found.device == DEVICE and seen.made_here == []
    assert torch.equal(found.held, here)  # it was the attack indeed


@pytest.mark.parametrize("name", [*SMALL, "autoattack"])
def test_a_report_waits_for_nothing(name):
    threat = epsilon_for("linf", 4)
    attack = SmallAutoAttack(threat) if name == "autoattack" else parse_attack(name, threat)
    calls = []
    quiet, told = (runs(attack, report=report)[2].waits for report in (None, lambda *call: calls.append(call)))
    assert told == quiet and calls


@pytest.mark.parametrize("loss, more", [("ce", 0), ("margin", 0), ("kl", 1)])
@pytest.mark.parametrize("steps", [1, 3])
def test_pgd_waits_for_its_arguments_once_and_twice_in_a_step(loss, more, steps):
    *_, seen = runs(PGD(epsilon_for("linf", 4), steps=steps, loss=loss))
    assert sum(seen.waits.values()) == 2 + 2 * steps + more, seen.waits


def test_a_callers_generators_of_the_cpu_still_serve_images_elsewhere():
    threat = epsilon_for("linf", 4)
    model, images = make_model(), some_images(12)
    labels = model(images).argmax(1)
    here = PGD(threat, steps=2).run(model, images, labels, example_generators(0, range(12))).images
    with Elsewhere() as seen:
        generators = example_generators(0, range(12))
        assert len(seen.made_here) == 12
        found = PGD(threat, steps=2).run(there(make_model()), there(images), there(labels), generators).images
    assert torch.equal(found.held, here)


# ------------------------------------------------------------------------------------------------------- the training step


def step(trainer, inputs):
    """Runs a step, forward and backward; returns its loss and gradients."""
    model = trainer.classifier.model
    model.zero_grad()
    with torch.autograd.set_multithreading_enabled(False):
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad and p.grad is not None)]


# the frozen model's features of a whole training set stay in the CPU's memory, and those of a batch are copied from it
LOOKED_UP = {"frozen.py:features (aten.lift_fresh.default)"}


def batch_of(trainer):
    inputs = next(iter(trainer.get_train_dataloader()))
    return {name: inputs[name] for name in ("pixels", "labels", "index")}


@pytest.fixture
def elsewhere(monkeypatch):
    """Makes a trainer's model and batch be elsewhere."""

    def move(trainer, inputs):
        monkeypatch.setitem(vars(trainer.args), "_setup_devices", DEVICE)
        there(trainer.classifier.model)
        return {name: there(value) for name, value in inputs.items()}

    return move


def step_elsewhere(trainer, inputs, elsewhere):
    """Runs two steps elsewhere; returns what the first computed, what was seen, and how often the second waited, and for what."""
    trainer._sums.clear()
    with Elsewhere() as seen:
        inputs = elsewhere(trainer, inputs)
        trainer._frozen_outputs._texts = None
        found = step(trainer, inputs)
        seen.waits.clear()
        step(trainer, inputs)
        check = next(c for c in trainer.callback_handler.callbacks if isinstance(c, CheckGradients))
        check.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, model=trainer.classifier.model)
        waits = dict(seen.waits)
        trainer._means()
    made = [place for place in seen.made_here if place not in LOOKED_UP]
    return found, made, {place.split(" ")[0]: count for place, count in waits.items()}


OPTIONS = [
    {},
    {"attack_loss": "kl"},
    {"weighting": "entropy"},
    {"augment": True},
    {"image_chunk_size": 2},
    {"text_chunk_size": 1},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_training_step_stays_where_the_images_are(options, tmp_path, processor, elsewhere):
    trainer = make_trainer(tmp_path, processor, task=make_task(), **options)
    inputs = batch_of(trainer)
    trainer._frozen_outputs.compute()
    here = step(trainer, inputs)
    found, made, _ = step_elsewhere(trainer, inputs, elsewhere)
    assert made == [] and all(value.device == DEVICE for value in found)
    for a, b in zip(found, here, strict=True):
        torch.testing.assert_close(a.held, b, rtol=1e-4, atol=1e-4)


WAITS = {  # as docs/performance.md lists them
    "chunks.py:split_batch": 1, "threat.py:check_images": 1, "threat.py:check_label_range": 1,
    "base.py:check_logits": 3, "base.py:gradient_at": 3, "trainer.py:_check_loss": 1,
    "callbacks.py:on_pre_optimizer_step": 1,
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"weighting": "entropy"}, {"text_chunk_size": 1}])
def test_a_step_waits_for_the_device_where_the_documentation_says(options, tmp_path, processor, elsewhere):
    trainer = make_trainer(tmp_path, processor, task=make_task(), **options)
    inputs = batch_of(trainer)
    trainer._frozen_outputs.compute()
    *_, waits = step_elsewhere(trainer, inputs, elsewhere)
    parts = 1 if trainer._text_parts is None else len(trainer._text_parts.parts)
    texts = sum(waits.pop(f"clip.py:{name}", 0) for name in ("both_features", "text_features"))
    assert waits == WAITS and parts <= texts <= 2 * parts


def test_fare_stays_where_the_images_are(tmp_path, processor, elsewhere):
    arguments = make_trainer(tmp_path, processor).args
    base = train_image_tower_alone(make_clip().unload())
    trainer = FareTrainer(base, arguments, task=make_task(), processor=processor)
    inputs = batch_of(trainer)
    trainer._frozen_outputs.compute()
    here = step(trainer, inputs)
    found, made, _ = step_elsewhere(trainer, inputs, elsewhere)
    assert made == []
    torch.testing.assert_close(found[0].held, here[0], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- planted mistakes


def test_noise_that_is_drawn_on_the_cpu_is_found(monkeypatch):
    monkeypatch.setattr("capt_peft.attacks.threat.draw", lambda sample, shape, generator: sample(tuple(shape)))
    *_, seen = runs(PGD(epsilon_for("linf", 4), steps=1))
    assert seen.made_here == ["threat.py:random_start (aten.rand.default)"]


def test_generators_of_the_cpu_are_found(monkeypatch):
    def forgotten(seed, indices, **_):
        return example_generators(seed, indices)

    monkeypatch.setattr("capt_peft.randomness.example_generators", forgotten)
    *_, seen = runs(PGD(epsilon_for("linf", 4), steps=1))
    assert "randomness.py:example_generator (Generator)" in seen.made_here


def test_a_tensor_of_the_cpu_among_those_elsewhere_is_refused(monkeypatch):
    monkeypatch.setattr(ThreatModel, "direction", lambda self, gradient, x: torch.ones(gradient.shape))
    with pytest.raises(RuntimeError, match="tensors on lazy:0 and on the CPU"):
        runs(PGD(epsilon_for("linf", 4), steps=1))


def test_a_value_that_is_looked_at_is_counted(monkeypatch):
    def looked_at(self, gradient, x):
        return gradient.sign() if gradient.abs().sum() > 0 else gradient

    monkeypatch.setattr(ThreatModel, "direction", looked_at)
    *_, seen = runs(PGD(epsilon_for("linf", 4), steps=3))
    assert sum(seen.waits.values()) == 2 + 2 * 3 + 3


# -------------------------------------------------------------------------------------------------------- loading, precision


def test_images_are_pinned_and_workers_stay_where_there_is_an_accelerator(tmp_path, monkeypatch):
    def arguments(kind, **given):
        monkeypatch.setattr(CaptTrainingArguments, "device", property(lambda self: torch.device(kind)))
        args = CaptTrainingArguments(str(tmp_path), **given)
        return args.dataloader_pin_memory, args.accelerator_config.non_blocking, args.dataloader_persistent_workers

    assert arguments("cpu", dataloader_num_workers=2) == (False, False, False)
    assert arguments("cuda", dataloader_num_workers=2) == (True, True, True)
    assert arguments("cuda") == (True, True, False)
    assert arguments("mps", dataloader_num_workers=2) == (False, False, True)
    given = {"dataloader_pin_memory": False, "dataloader_persistent_workers": False, "accelerator_config": {}}
    assert arguments("cuda", dataloader_num_workers=2, **given) == (False, False, False)


def test_a_run_on_a_cpu_does_not_warn_of_pinned_memory(tmp_path, processor, recwarn):
    trainer = make_trainer(tmp_path, processor, task=make_task(), use_cpu=False, max_steps=1, eval_strategy="epoch")
    trainer.train()
    assert not [str(warning.message) for warning in recwarn if "pin_memory" in str(warning.message)]


def test_workers_that_stay_are_the_trainings_alone(tmp_path, processor):
    trainer = make_trainer(
        tmp_path, processor, task=make_task(), dataloader_num_workers=1, dataloader_persistent_workers=True
    )
    assert trainer.get_train_dataloader().persistent_workers
    assert not trainer.get_eval_dataloader().persistent_workers and trainer.args.dataloader_persistent_workers


def test_tf32_is_off_unless_it_is_asked_for_and_then_recorded(tmp_path, monkeypatch):
    switched = []
    monkeypatch.setattr("capt_peft.training.arguments.COMPILING_TORCH", "2")
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.enable_tf32", switched.append)
    for given in ({}, {"torch_compile": True}, {"tf32": True}):
        args = CaptTrainingArguments(str(tmp_path), use_cpu=True, **given)
        assert args.to_dict()["tf32"] is given.get("tf32", False)
    assert [switched[0], switched[-1]] == [False, True] and switched[-2] is False  # the last word on torch_compile's


def test_tf32_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match="--tf32 requires Ampere"):
        CaptTrainingArguments(str(tmp_path), use_cpu=True, tf32=True)


def test_an_evaluation_says_that_float32_was_rounded(monkeypatch):
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert tf32_in_use(torch.device("cuda")) and not tf32_in_use(torch.device("cpu"))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert not tf32_in_use(torch.device("cuda"))
    model, pixels = make_model(), some_images(6)
    data, attack = (pixels, model(pixels).argmax(1)), PGD(epsilon_for("linf", 4), steps=1)
    plain = evaluate(model, data, attack, progress=False)
    for module in ("subject", "signs"):
        monkeypatch.setattr(f"capt_peft.evaluation.{module}.tf32_in_use", lambda device: True)
    found = evaluate(model, data, attack, progress=False)
    sign = {sign.name: sign for sign in found.signs}["low_precision"]
    assert sign.raised and "in tf32" in sign.sentence and "(tf32)" in sign.sentence
    assert not {sign.name: sign for sign in plain.signs}["low_precision"].raised
    assert found.clean == plain.clean


def test_an_evaluation_of_another_kind_of_device_is_not_gone_on_with(tmp_path, caplog):
    output = tmp_path / "r.json"
    model, pixels = make_model(), some_images(6)
    data, attack = (pixels, model(pixels).argmax(1)), PGD(epsilon_for("linf", 4), steps=1)
    first = evaluate(model, data, attack, output=output, progress=False)
    assert "device" not in first.configuration  # of the CPU, as ever
    content = json.loads(output.read_text())
    content["configuration"]["device"] = "cuda"
    output.write_text(json.dumps(content))
    evaluate(model, data, attack, output=output, progress=False)
    assert 'device is null now and was "cuda"' in caplog.text and (tmp_path / "r.old1.json").exists()
