"""What must hold on a GPU too; skipped without one."""

import pytest
import torch
from helpers import adapted, random_clip
from peft import LoraConfig, get_peft_model
from training_helpers import adapter_of, losses, make_model, make_task, make_trainer

from capt_peft import PGD, ThreatModel, ZeroShotClassifier, evaluate, parse_attack
from capt_peft.randomness import example_generators
from capt_peft.tuner.fingerprint import adapter_fingerprint, base_fingerprint
from capt_peft.utils.machine import use_tf32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
NAMES = ("red circle", "green square", "seven")
ATTACKS = ("fgsm", "pgd-5", "pgd-5x2", "pgd-5-kl", "apgd-ce-10", "apgd-t-10", "fab-t-5", "square-50")


def on_gpu(processor, model=None):
    return ZeroShotClassifier((model or make_model()).cuda().eval(), processor, NAMES)


def images(n=6):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).cuda()


def test_fingerprints_do_not_depend_on_the_device():
    model = adapted(random_clip(), modules_to_save=["visual_projection"])
    on_cpu = base_fingerprint(model), adapter_fingerprint(model)
    assert (base_fingerprint(model.cuda()), adapter_fingerprint(model)) == on_cpu


@pytest.mark.parametrize("kind", ["capt", "modules_to_save", "lora"])
def test_the_frozen_classifier_is_bitwise_the_base_model(kind, processor):
    bare = make_model().unload()
    right = on_gpu(processor, bare)(images())
    extra = {"modules_to_save": ["visual_projection"]} if kind == "modules_to_save" else {}
    if kind == "lora":
        base = make_model().unload()
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    else:
        model = make_model(**extra)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    classifier = on_gpu(processor, model)
    assert not torch.equal(classifier(images()), right)
    with classifier.frozen():
        assert torch.equal(classifier(images()), right)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("norm, epsilon", [("linf", "8/255"), ("l2", "1")])
def test_attacks_run_and_stay_in_their_ball(name, norm, epsilon, processor):
    classifier, threat = on_gpu(processor), ThreatModel(norm, epsilon)
    pixels = images()
    labels = classifier(pixels).argmax(1)
    result = parse_attack(name, threat).run(classifier, pixels, labels, 0)
    assert result.images.device == pixels.device
    assert threat.norm_of(result.images - pixels).max() <= threat.epsilon + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_is_drawn_on_the_gpu_by_an_images_place_alone_and_without_waiting(norm):
    threat, pixels = ThreatModel(norm, "0.1"), images()

    def starts(rows):
        return threat.random_start(pixels[rows[0] : rows[-1] + 1], example_generators(0, rows, device=pixels.device))

    torch.cuda.set_sync_debug_mode("error")
    try:
        whole, parts = starts(range(6)), [starts(rows) for rows in (range(4), range(4, 5), range(5, 6))]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert whole.is_cuda and torch.equal(whole, torch.cat(parts)) and not torch.equal(whole, pixels)


def test_an_evaluation_names_the_gpu_and_its_precision(processor):
    classifier, pixels = on_gpu(processor), images()
    data, attack = (pixels, classifier(pixels).argmax(1)), PGD(ThreatModel("linf", "8/255"), steps=1)
    found = {}
    for enabled in (True, False):
        use_tf32(enabled)
        found[enabled] = evaluate(classifier, data, attack, progress=False).configuration
    assert [found[enabled]["model"]["precision"] for enabled in (True, False)] == ["tf32", "float32"]
    assert found[True]["device"] == "cuda"


def test_an_evaluation_is_reused_for_the_same_model_only(processor, tmp_path):
    classifier, pixels = on_gpu(processor), images()
    labels = classifier(pixels).argmax(1)
    attack = PGD(ThreatModel("linf", "8/255"), steps=3)
    first = evaluate(classifier, (pixels, labels), attack, output=tmp_path / "r.json", progress=False)
    again = evaluate(classifier, (pixels, labels), attack, output=tmp_path / "r.json", progress=False)
    assert first.to_dict() == again.to_dict()
    with torch.no_grad():
        next(p for p in classifier.parameters() if p.requires_grad).add_(1)
    other = evaluate(classifier, (pixels, labels), attack, output=tmp_path / "r.json", progress=False)
    assert other.to_dict() == evaluate(classifier, (pixels, labels), attack, progress=False).to_dict()


FULL_PRECISION_ATTACK = {"bf16": True, "full_precision_attack": True}


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"fp16": True}, {"tf32": True}, FULL_PRECISION_ATTACK])
def test_training_evaluates_saves_and_ends_in_finite_prompts(options, processor, tmp_path):
    trainer = make_trainer(
        tmp_path, processor, task=make_task(), use_cpu=False, max_steps=3, eval_strategy="steps", eval_steps=3,
        save_strategy="steps", save_steps=3, **options,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert len(losses(trainer)) == 3
    assert all(tensor.isfinite().all() and tensor.is_cuda for tensor in adapter_of(trainer).values())


def test_a_gpu_trains_as_a_cpu_does(processor, tmp_path):
    kinds = {}
    for kind, use_cpu in (("cpu", True), ("gpu", False)):
        trainer = make_trainer(
            tmp_path / kind, processor, task=make_task(), use_cpu=use_cpu, max_steps=2, learning_rate=1e-3
        )
        trainer.train()
        kinds[kind] = losses(trainer)
    assert kinds["gpu"] == pytest.approx(kinds["cpu"], rel=1e-2)
