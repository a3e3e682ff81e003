"""Robust backbones: TeCoA and FARE, the script that makes them, and tiny CLIP made robust."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY_CLIP, adapted, random_clip
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPModel

from capt_peft import AdversarialCrossEntropy, CaptTrainer, CaptTrainingArguments, ZeroShotClassifier, load_task
from capt_peft.attacks import parse_attack
from capt_peft.attacks.features import squared_distance
from capt_peft.commands import demo
from capt_peft.commands.finetune_backbone import (
    OBJECTIVES,
    PUBLISHED,
    TINY,
    drawn_task,
    main,
    make_trainer,
    parse_args,
    save,
    thing,
)
from capt_peft.toy import TINY_CLIP_ROBUST
from capt_peft.toy.images import FACTS, HELD_OUT_PAIRS, draw, is_held_out
from capt_peft.training.chunks import split_batch
from capt_peft.training.fare import FareTrainer, embed, train_image_tower_alone

QUICK = [
    "--drawn_images", "40", "--num_train_epochs", "1", "--per_device_train_batch_size", "20", "--attack_steps", "2",
    "--eval_limit", "20", "--eval_attack", "pgd-2", "--use_cpu", "--disable_tqdm", "true", "--save_dtype", "float32",
]  # fmt: skip


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def in_image_tower(name):
    return name.startswith(("vision_model.", "visual_projection."))


@pytest.fixture(scope="module", params=OBJECTIVES)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "robust"
    return folder, main(["--objective", request.param, *QUICK, "--output_dir", str(folder)]).to_dict(), request.param


@pytest.fixture(scope="module")
def task():
    return drawn_task(24, seed=0)


@pytest.fixture
def tiny():
    return train_image_tower_alone(CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32))


def arguments(folder, **settings):
    defaults = {"use_cpu": True, "disable_tqdm": True, "epsilon": "8/255", "attack_steps": 2}
    return CaptTrainingArguments(str(folder), **defaults | settings)


def batch_of(trainer, size=6):
    rows = [trainer.train_dataset[i] for i in range(size)]
    indices = torch.tensor([row["index"] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    return {"pixels": torch.stack([row["pixels"] for row in rows]), "labels": labels, "index": indices}


def run_attack(trainer, batch):
    with torch.no_grad():
        texts, clean = trainer.classifier.encode_texts(), trainer.classifier(batch["pixels"])
    return trainer._attack(split_batch(batch, None)[0], texts, clean).images


# ------------------------------------------------------------------------------------------------------ the script


def test_only_the_image_tower_changes(run):
    folder, _, _ = run
    before, after = weights(TINY_CLIP), weights(folder)
    assert before.keys() == after.keys()
    frozen = [name for name in before if not in_image_tower(name)]
    assert {"logit_scale", "text_projection.weight"} < set(frozen) and len(frozen) > 30
    assert all(torch.equal(after[name], before[name].float()) for name in frozen)
    changed = [name for name in before if in_image_tower(name) and not torch.equal(after[name], before[name].float())]
    assert {"visual_projection.weight", "vision_model.embeddings.patch_embedding.weight"} < set(changed)
    assert len(changed) == len(before) - len(frozen)


def test_the_folder_is_a_plain_clip(run):
    folder, _, _ = run
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
        "results.json",
    }  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["CLIPModel"]
    assert CLIPModel.from_pretrained(folder).num_parameters() == CLIPModel.from_pretrained(TINY_CLIP).num_parameters()
    classifier = ZeroShotClassifier.from_pretrained(str(folder), class_names=["cat", "dog"])
    assert classifier(torch.rand(2, 3, 32, 32)).shape == (2, 2)


def test_the_results_say_what_was_done_and_measured(run):
    folder, results, objective = run
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (results["method"], results["task"]["name"], results["task"]["training_images"]) == (objective, "drawn", 40)
    assert results["parameters"]["trainable"] < results["parameters"]["all"]
    assert (results["evaluation"]["task"], results["evaluation"]["split"]) == ("digits", "validation")
    assert results["training"]["attack"]["threat_model"] == {"norm": "linf", "epsilon": 10 / 255}
    digits = load_task("digits")
    shown = digits["validation"].shuffle(seed=0).select(range(20))
    for stage, model in (("before", TINY_CLIP), ("after", str(folder))):
        classifier = ZeroShotClassifier.from_pretrained(model, class_names=digits.class_names, template=digits.template)
        with torch.no_grad():
            right = classifier(classifier.transform.batch(shown["image"])).argmax(-1) == torch.tensor(shown["label"])
        assert results["evaluation"][stage]["clean"]["accuracy"] == pytest.approx(right.float().mean().item())
        assert results["evaluation"][stage]["robust"]["n"] == 20


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tmp_path, run):
    folder, results, objective = run
    for seed in (results["seed"], results["seed"] + 1):
        main(["--objective", objective, *QUICK, "--seed", str(seed), "--output_dir", str(tmp_path / str(seed))])
    one, two, other = map(weights, (folder, *sorted(tmp_path.iterdir())))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["visual_projection.weight"], other["visual_projection.weight"])


def test_half_precision_is_for_the_file_alone(tmp_path, tiny, processor):
    save(tiny, processor, tmp_path / "half", "float16")
    assert {tensor.dtype for tensor in weights(tmp_path / "half").values()} == {torch.float16}
    assert {p.dtype for p in tiny.parameters()} == {torch.float32}
    assert {p.dtype for p in CLIPModel.from_pretrained(tmp_path / "half").parameters()} == {torch.float32}


def test_published_settings_for_a_named_model_and_those_of_tiny_clip_without():
    script, args = parse_args([])
    assert (script.model_name_or_path, args.output_dir) == ("tiny_clip", "outputs/tiny_clip_robust")
    assert (script.objective, script.save_dtype, args.epsilon) == ("fare", "float16", TINY["epsilon"])
    script, args = parse_args(["--model_name_or_path", "some/clip", "--epsilon", "4/255"])
    assert (args.learning_rate, args.per_device_train_batch_size) == (PUBLISHED["learning_rate"], 128)
    assert args.train_attack.resolved_step_size == pytest.approx(1 / 255) and args.train_attack.steps == 10
    assert script.save_dtype == "float32" and Path(args.output_dir).name == "robust"
    assert parse_args(["--objective", "pmg-aft"])[1].consistency == 1.0
    assert parse_args(["--objective", "pmg-aft", "--consistency", "2"])[1].consistency == 2.0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--objective", "magic"], "objective='magic'"),
        (["--save_dtype", "int8"], "save_dtype='int8'"),
        (["--drawn_images", "0"], "drawn_images=0"),
        (["--objective", "fare", "--attack_loss", "kl"], "attack_loss='kl'"),
        (["--dataset_name", "no/such/dataset"], "no/such/dataset"),
        (["--eval_split", "holdout"], "holdout"),
        (["--model_name_or_path", "./nowhere"], "nowhere"),
        (["--epsilon", "x"], "x"),
        (["--consistency", "2"], "--consistency has no effect here: it belongs to the objectives of CAPT and PMG-AFT"),
        (
            ["--objective", "pmg-aft", "--frozen_term", "features"],
            "--frozen_term has no effect here: it belongs to CAPT",
        ),
        (["--weighting=batch"], "--weighting has no effect"),
        (["--hub-model-id", "x"], "--hub_model_id has no effect"),
        (["--dataset_name", "digits"], "--drawn_images has no effect here"),
        (["--push_to_hub"], "--push_to_hub has no effect"),
        (["--eval_limit", "-1"], "eval_limit=-1"),
    ],
)
def test_bad_input_and_options_without_effect_are_refused_and_nothing_is_written(tmp_path, more, words):
    with pytest.raises((ValueError, KeyError, OSError)) as caught:
        main([*QUICK, "--output_dir", str(tmp_path / "out"), *more])
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_refused(tmp_path, saved_clip):
    adapted(CLIPModel.from_pretrained(saved_clip)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter"):
        main([*QUICK, "--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(tmp_path / "adapter")])


# ---------------------------------------------------------------------------------------------------- the objectives


def test_all_but_the_image_tower_is_frozen():
    model = train_image_tower_alone(random_clip())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if in_image_tower(name)
    }
    for other in (nn.Linear(2, 2), adapted(random_clip())):
        with pytest.raises(ValueError, match="bare CLIPModel"):
            train_image_tower_alone(other)


def test_the_loss_of_tecoa_is_the_cross_entropy_of_the_attacked_images(tmp_path, task, tiny, processor):
    trainer = CaptTrainer(
        tiny, arguments(tmp_path), task=task, processor=processor, objective=AdversarialCrossEntropy()
    )
    batch = batch_of(trainer)
    loss = trainer.compute_loss(tiny, batch)
    attacked = run_attack(trainer, batch)
    values = (attacked - trainer.classifier.mean) / trainer.classifier.std
    with torch.no_grad():
        texts = processor.tokenizer(task.texts, padding=True, return_tensors="pt")
        logits = tiny(**texts, pixel_values=values).logits_per_image
    by_hand = -torch.stack([row.log_softmax(0)[y] for row, y in zip(logits, batch["labels"], strict=True)]).mean()
    torch.testing.assert_close(loss, by_hand)
    assert by_hand > F.cross_entropy(trainer.classifier(batch["pixels"]), batch["labels"]) + 0.5  # the attack attacks


def test_the_loss_of_fare_is_the_squared_distance_to_the_originals_features(tmp_path, task, tiny, processor):
    trainer = FareTrainer(tiny, arguments(tmp_path), task=task, processor=processor)
    original = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32).eval()
    move(tiny)  # the model has moved on, the original has not
    batch = batch_of(trainer)
    loss = trainer.compute_loss(tiny, batch)
    attacked = run_attack(trainer, batch)

    def features(model, pixels):
        values = (pixels - trainer.classifier.mean) / trainer.classifier.std
        return model.visual_projection(model.vision_model(pixel_values=values).pooler_output)

    with torch.no_grad():
        difference = features(tiny, attacked) - features(original, batch["pixels"])
    by_hand = sum((row @ row) for row in difference) / len(difference)
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert tiny.visual_projection.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in trainer.teacher.parameters())


def move(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        noise = torch.randn(model.visual_projection.weight.shape, generator=generator)
        model.visual_projection.weight.add_(0.02 * noise)


def test_the_loss_of_pmg_aft_holds_the_attacked_images_to_what_the_original_says_of_them(
    tmp_path, task, tiny, processor
):
    trainer = make_trainer("pmg-aft", tiny, arguments(tmp_path, consistency=1.0), task, processor)
    original = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32).eval()
    move(tiny)  # the model has moved on, the original has not
    batch = batch_of(trainer)
    loss = trainer.compute_loss(tiny, batch)
    attacked = run_attack(trainer, batch)
    texts = processor.tokenizer(task.texts, padding=True, return_tensors="pt")

    def log_probabilities(model, pixels):
        values = (pixels - trainer.classifier.mean) / trainer.classifier.std
        return model(**texts, pixel_values=values).logits_per_image.log_softmax(-1)

    with torch.no_grad():
        own, clean, guide = (
            log_probabilities(*pair) for pair in ((tiny, attacked), (tiny, batch["pixels"]), (original, attacked))
        )
    kl = sum((target.exp() * (target - own)).sum(-1) for target in (clean, guide))
    by_hand = (kl - own[range(len(own)), batch["labels"]]).mean()
    torch.testing.assert_close(loss, by_hand, atol=1e-4, rtol=1e-4)
    loss.backward()
    assert tiny.visual_projection.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in trainer.teacher.parameters())


def test_the_loss_of_sim_clip_is_the_cosine_to_the_originals_features_and_its_attack_that_of_fare(
    tmp_path, task, tiny, processor
):
    trainer = make_trainer("sim-clip", tiny, arguments(tmp_path), task, processor)
    move(tiny)
    batch = batch_of(trainer)
    loss = trainer.compute_loss(tiny, batch)
    attacked = run_attack(trainer, batch)
    with torch.no_grad():
        views = [embed(trainer.classifier, attacked), embed(trainer.teacher, batch["pixels"])]
        by_hand = -sum((a / a.norm()) @ (b / b.norm()) for a, b in zip(*views, strict=True)) / 6
        far = squared_distance(views[0], embed(trainer.teacher, batch["pixels"]))
        near = squared_distance(embed(trainer.classifier, batch["pixels"]), embed(trainer.teacher, batch["pixels"]))
    torch.testing.assert_close(loss, by_hand)
    assert (far > near).all()
    loss.backward()
    assert tiny.visual_projection.weight.grad.abs().max() > 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_of_fare_climbs_the_distance_of_the_features_within_the_ball(tmp_path, task, tiny, processor, norm):
    epsilon = "8/255" if norm == "linf" else "1.0"
    distances = []
    for steps in (1, 3, 10):
        args = arguments(tmp_path, epsilon=epsilon, norm=norm, attack_steps=steps, attack_step_size="2/255")
        if norm == "l2":
            args = arguments(tmp_path, epsilon=epsilon, norm=norm, attack_steps=steps, attack_step_size="0.3")
        trainer = FareTrainer(tiny, args, task=task, processor=processor)
        batch = batch_of(trainer, 16)
        attacked = run_attack(trainer, batch)
        assert args.threat_model.norm_of(attacked - batch["pixels"]).max() <= args.threat_model.epsilon + 1e-6
        assert attacked.min() >= 0 and attacked.max() <= 1
        with torch.no_grad():
            original = embed(trainer.teacher, batch["pixels"])
            distances.append(squared_distance(embed(trainer.classifier, attacked), original))
    means = [d.mean().item() for d in distances]
    assert means == sorted(means) and means[-1] > 4 * means[0]
    assert (distances[-1] > distances[0]).all()
    labels = CaptTrainer(tiny, args, task=task, processor=processor, objective=AdversarialCrossEntropy())
    by_labels = squared_distance(embed(trainer.classifier, run_attack(labels, batch)), original)
    assert distances[-1].mean() > by_labels.mean()  # farther than an attack on the labels goes


def test_the_labels_are_nothing_to_fare(tmp_path, task, tiny, processor):
    trainer = FareTrainer(tiny, arguments(tmp_path), task=task, processor=processor)
    batch = batch_of(trainer)
    loss = trainer.compute_loss(tiny, batch)
    others = {**batch, "labels": (batch["labels"] + 1) % task.num_classes}
    assert torch.equal(trainer.compute_loss(tiny, others), loss)


# ---------------------------------------------------------------------------------------------------- what is drawn


def test_drawn_images_are_named_after_the_one_thing_that_they_show(task):
    assert task.num_classes == len(set(task.class_names)) == 2 * len(FACTS["shape"]) + 10 + 26 + 10
    assert {"a star", "stars", "crosses", "a striped texture", "the letter A", "the digit 3"} <= set(task.class_names)
    stream = np.random.default_rng([0, 4])
    for row in task["train"]:
        image, facts = draw(stream)
        assert task.class_names[row["label"]] == thing(facts)
        assert row["image"].tobytes() == image.tobytes()
        assert not any(is_held_out(facts, pair) for pair in HELD_OUT_PAIRS)


# ------------------------------------------------------------------------------------------------- tiny CLIP, robust


def test_the_robust_tiny_clip_is_tiny_clip_but_for_its_image_tower():
    assert sum(path.stat().st_size for path in Path(TINY_CLIP_ROBUST).iterdir()) <= 4_000_000
    before, after = weights(TINY_CLIP), weights(TINY_CLIP_ROBUST)
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    assert all(torch.equal(before[name], after[name]) for name in before if not in_image_tower(name))
    model = CLIPModel.from_pretrained(TINY_CLIP_ROBUST)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_the_robust_tiny_clip_withstands_what_tiny_clip_does_not():
    digits = load_task("digits")
    shown = digits["validation"].select(range(60))
    labels, robust = torch.tensor(shown["label"]), {}
    for folder in (TINY_CLIP, TINY_CLIP_ROBUST):
        classifier = ZeroShotClassifier.from_pretrained(
            folder, class_names=digits.class_names, template=digits.template
        )
        attack = parse_attack("pgd-20", arguments("unused", epsilon="10/255").threat_model)
        pixels = classifier.transform.batch(shown["image"])
        with torch.no_grad():
            clean = (classifier(pixels).argmax(-1) == labels).float().mean().item()
            attacked = classifier(attack(classifier, pixels, labels, 0)).argmax(-1)
        robust[folder] = (attacked == labels).float().mean().item()
        assert clean > 0.7
    assert robust[TINY_CLIP_ROBUST] > robust[TINY_CLIP] + 0.2


@pytest.mark.parametrize("option", ["--output_dir", "--dataset_name", "--method"])
def test_the_demo_refuses_what_would_make_it_another_one(option):
    with pytest.raises(ValueError, match=f"The demo sets {option} itself"):
        demo.main([f"{option}=x"])


def test_the_demo_starts_from_the_model_that_is_named(tmp_path, monkeypatch, capfd):
    quick = ["--shots", "1", "--num_train_epochs", "1", "--eval_limit", "4", "--eval_attack", "pgd-2", "--use_cpu"]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the fresh process must not depend on how many threads it would take
    monkeypatch.chdir(tmp_path)
    pictured = []
    monkeypatch.setattr(demo, "attack_picture", lambda models, *_: pictured.append(models["zero-shot"].model))
    demo.main(["--model_name_or_path", "tiny_clip_robust", *quick])
    assert "bit for bit" in capfd.readouterr().out
    adapter = json.loads((tmp_path / "outputs" / "demo" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == TINY_CLIP_ROBUST
    assert adapter["num_vision_tokens"] == 16  # the digits' settings
    projection = pictured[0].visual_projection.weight
    assert torch.equal(projection, weights(TINY_CLIP_ROBUST)["visual_projection.weight"].float())
