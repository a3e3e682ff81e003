"""CaptTrainer with LoRA, LN-tuning, IA3 and BOFT: the frozen model, the step, checkpoints, saving and what is gained."""

import json

import pytest
import torch
from helpers import TINY_CLIP, shake
from peft import get_peft_model
from training_helpers import NAMES, adapter_of, frozen_logits, make_trainer
from transformers import CLIPModel

from capt_peft import (
    AdversarialCrossEntropy,
    CaptObjective,
    FapObjective,
    PmgAftObjective,
    ZeroShotClassifier,
    load_task,
)
from capt_peft.clip.texts import normalize
from capt_peft.methods import ADAPTERS, adapter_config
from capt_peft.objectives import Views
from capt_peft.randomness import example_generators
from capt_peft.results.card import write_card
from capt_peft.results.hub import save_run
from capt_peft.results.run import RunResults
from capt_peft.tuner.clip import image_features, text_features

OBJECTIVES = [
    lambda: CaptObjective(1.5, "confidence"),
    lambda: FapObjective(1.5),
    AdversarialCrossEntropy,
    PmgAftObjective,
]


def base():
    return CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)


def adapted(peft, moved=True, **settings):
    torch.manual_seed(0)
    model = get_peft_model(base(), adapter_config(peft, settings))
    if moved:
        shake(model)
    return model


@pytest.mark.parametrize("peft", ADAPTERS)
def test_the_teacher_is_bitwise_the_base_before_and_after_a_run(peft, tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, model=adapted(peft), max_steps=2, attack_steps=1)
    task = trainer.task
    pure = ZeroShotClassifier(base(), processor, task.class_names, task.template).eval()
    places = list(range(len(trainer.train_dataset)))
    pixels = torch.stack([trainer.train_dataset[place]["pixels"] for place in places])
    before = adapter_of(trainer)
    trainer.train()
    moved = [name for name, p in adapter_of(trainer).items() if not torch.equal(p, before[name])]
    assert {"text_model" in name for name in moved} == {True, False}  # in both towers
    assert torch.equal(frozen_logits(trainer, pixels, places), pure(pixels).detach())
    with trainer.classifier.frozen():
        assert torch.equal(trainer.classifier.eval()(pixels).detach(), pure(pixels).detach())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["capt", "fap", "ce", "pmg-aft"])
@pytest.mark.parametrize("peft", ADAPTERS)
def test_a_step_has_the_gradients_of_an_independent_computation(peft, objective, tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, model=adapted(peft), objective=objective(), max_steps=1, attack_steps=2)
    rows = [trainer.train_dataset[place] for place in range(4)]
    batch = {"pixels": torch.stack([row["pixels"] for row in rows]),
             "labels": torch.tensor([row["label"] if "label" in row else row["labels"] for row in rows]),
             "index": torch.arange(4)}  # fmt: skip
    trainer.state.max_steps = 1
    model = trainer.model.train()
    loss = trainer.compute_loss(model, batch)
    own = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    classifier, plain = trainer.classifier, base().eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in classifier.transform.normalization)
    room = plain.config.text_config.max_position_embeddings
    words = [trainer.task.template.format(name) for name in NAMES]
    inputs = processor.tokenizer(words, padding="max_length", max_length=room, return_tensors="pt")

    def features(clip, pixels):
        return normalize(image_features(clip, (pixels - mean) / std))

    def logits(images, texts):
        return images @ texts.t() * plain.logit_scale.exp()

    texts = normalize(text_features(model, dict(inputs)))
    clean = features(model, batch["pixels"])
    attacked = trainer.attack.run(
        lambda pixels: logits(features(model, pixels), texts.detach()),
        batch["pixels"],
        batch["labels"],
        example_generators(trainer.args.seed, [0, 1, 2, 3], epoch=0, device=torch.device("cpu")),
        clean_logits=logits(clean, texts).detach(),
    ).images
    adversarial = features(model, attacked)
    with torch.no_grad():
        plain_texts = normalize(text_features(plain, dict(inputs)))
        frozen, guide = (logits(features(plain, pixels), plain_texts) for pixels in (batch["pixels"], attacked))
    views = Views(
        clean=logits(clean, texts),
        adversarial=logits(adversarial, texts),
        labels=batch["labels"],
        frozen=frozen if trainer.objective.needs_frozen else None,
        progress=0.0,
        clean_features=clean,
        adversarial_features=adversarial,
        frozen_adversarial=guide,
    )
    expected_loss = trainer.objective(views)[0]
    expected = torch.autograd.grad(expected_loss, [p for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert any(gradient.abs().max() > 0 for gradient in own)
    for found, known in zip(own, expected, strict=True):
        torch.testing.assert_close(found, known, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("peft", ADAPTERS)
def test_a_resumed_run_ends_bitwise_where_the_whole_one_ends(peft, tmp_path, processor):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "attack_steps": 1, "learning_rate": 1e-3}
    whole = make_trainer(tmp_path, processor, model=adapted(peft, moved=False), **settings)
    whole.train()
    expected = adapter_of(whole)
    whole.unlock()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert json.loads((checkpoint / "zero_shot.json").read_text())["class_names"] == list(NAMES)
    again = make_trainer(tmp_path, processor, model=adapted(peft, moved=False), **settings)
    again.train(resume_from_checkpoint=str(checkpoint))
    found = adapter_of(again)
    assert found.keys() == expected.keys() and all(torch.equal(p, expected[name]) for name, p in found.items())
    again.unlock()
    if peft == "lora":
        other = make_trainer(tmp_path, processor, model=adapted(peft, moved=False, r=4), **settings)
        with pytest.raises(ValueError, match="is of another run"):
            other.train(resume_from_checkpoint=str(checkpoint))


def test_saving_keeps_the_classes_and_the_card_names_the_method(tmp_path, processor):
    trainer = make_trainer(
        tmp_path, processor, model=adapted("lora", r=4), max_steps=1, attack_steps=1, eval_attack="pgd-2"
    )
    with trainer.classifier.frozen():
        before = trainer.evaluate(metric_key_prefix="before")
    trainer.train()
    after = trainer.evaluate(metric_key_prefix="after")
    pixels = torch.stack([trainer.train_dataset[place]["pixels"] for place in range(4)])
    expected = trainer.classifier.eval()(pixels).detach()

    trainer.save_model(str(tmp_path / "saved"))
    loaded = ZeroShotClassifier.from_pretrained(str(tmp_path / "saved"))
    assert loaded.class_names == NAMES and loaded.template == trainer.task.template
    assert torch.equal(loaded(pixels).detach(), expected)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "# LoRA adapter for tiny_clip" in card and "**Not known.**" in card

    results = RunResults.of(trainer, before, after, method="capt", split="validation", seconds=1.0)
    written = save_run(trainer.model, results, tmp_path / "run", "mine")
    assert written.label == "capt, LoRA" and "| CAPT, LoRA |" in written.table()
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    for card in ((tmp_path / "run" / "README.md").read_text(), write_card(tmp_path / "run").read_text()):
        assert f"| LoRA of PEFT | {parameters:,} parameters; r 4; target_modules q_proj, v_proj; lora_alpha 8 |" in card
        assert "LoRA, a method of PEFT, for" in card and "| capt, LoRA | robust |" in card
        assert "prompts" not in card and "- lora\n" in card and "- capt\n" not in card
    assert torch.equal(ZeroShotClassifier.from_pretrained(str(tmp_path / "run"))(pixels).detach(), expected)


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"init_lora_weights": "pissa"}], ids=["bias", "pissa"])
def test_an_adapter_that_changes_the_base_has_no_frozen_model(settings, tmp_path, processor):
    with pytest.raises(ValueError, match=r"the base is tuned itself|changes the weights of the base model"):
        make_trainer(tmp_path, processor, model=adapted("lora", moved=False, **settings))


def test_lora_learns_to_be_robust(tmp_path, processor):
    """On digits: the robust accuracy of 60 validation images under PGD-5."""
    task = load_task("digits").few_shot(16, seed=0)
    trainer = make_trainer(
        tmp_path, processor, model=adapted("lora", moved=False), task=task, epsilon="6/255", max_steps=40, attack_steps=2,
        per_device_train_batch_size=16, learning_rate=5e-3, optim="adamw_torch", eval_attack="pgd-5", logging_steps=20,
    )  # fmt: skip
    images = task["validation"].select(range(60))
    before = trainer.evaluate(images)
    trainer.train()
    after = trainer.evaluate(images)
    assert after["eval_robust_accuracy"] > before["eval_robust_accuracy"] + 0.1
    assert after["eval_clean_accuracy"] > 0.7
