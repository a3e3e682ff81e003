"""A SigLIP as a classifier: its own logits, its sigmoid, texts in parts, its true shape, and a tiny one that is tuned."""

import copy

import pytest
import torch
from helpers import random_clip
from peft import get_peft_model
from PIL import Image
from siglip_models import (
    TEMPLATE_IDS,
    random_siglip,
    siglip_adapter,
    siglip_processor,
    siglip_tokenizer,
)
from torch.nn.functional import logsigmoid, one_hot
from training_helpers import make_task
from transformers import SiglipConfig, SiglipModel, SiglipProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from capt_peft import PGD, CaptConfig, CaptTrainer, CaptTrainingArguments, ThreatModel, ZeroShotClassifier, evaluate
from capt_peft.data.pixels import PixelTransform
from capt_peft.tuner import clip

NAMES = ["cat", "red dog", "blue shape", "green star", "pink shape"]
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IMAGES = [Image.fromarray((p.permute(1, 2, 0) * 255).byte().numpy()) for p in PIXELS]


@pytest.mark.parametrize("family", [1, 2])
def test_logits_are_those_of_the_model_with_its_processor(family):
    model, processor = random_siglip(), siglip_processor(family)
    classifier = ZeroShotClassifier(model, processor, ["CAT", *NAMES[1:]]).eval()
    texts = [f"a photo of a {name}." for name in NAMES]
    inputs = processor(text=texts, images=IMAGES, padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        found = classifier(classifier.transform.batch(IMAGES))
    assert torch.equal(classifier.input_ids, inputs["input_ids"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert set(classifier.text_inputs()) == {"input_ids"}


def test_capitals_of_free_texts_do_not_count_either():
    classifier = ZeroShotClassifier(siglip_adapter(random_siglip()), siglip_processor(2), NAMES)
    low, high = classifier.embed_texts(["a photo of a red star", "A Photo of a Red STAR"])
    assert torch.equal(low, high)


def test_copies_and_half_precision_are_evaluated():
    classifier = ZeroShotClassifier(siglip_adapter(random_siglip()), siglip_processor(2), NAMES).eval()
    assert torch.equal(copy.deepcopy(classifier)(PIXELS), classifier(PIXELS))
    half = ZeroShotClassifier(copy.deepcopy(classifier.model).bfloat16(), siglip_processor(2), NAMES).eval()
    labels = classifier(PIXELS).argmax(1)
    evaluation = evaluate(half, (PIXELS, labels), PGD(ThreatModel("linf", "1/255"), steps=1), signs=False)
    assert evaluation.clean.n == 2


def test_every_word_before_the_name_can_be_a_prompt():
    for tokens, fits in ((4, True), (5, False)):
        model = siglip_adapter(random_siglip(), num_text_tokens=tokens, num_vision_tokens=1)
        if fits:
            ZeroShotClassifier(model, siglip_processor(), NAMES)
        else:
            with pytest.raises(ValueError, match="has 4 tokens before the class name"):
                ZeroShotClassifier(model, siglip_processor(), NAMES)


def test_a_processor_of_another_model_is_refused(processor):
    with pytest.raises(ValueError, match="processor does not belong to the model"):
        ZeroShotClassifier(random_siglip(), processor, ["cat", "dog"])


def test_sigmoid_scores_are_the_models_own_and_of_no_other():
    classifier = ZeroShotClassifier(random_siglip(), siglip_processor(), NAMES)
    with torch.no_grad():
        logits = classifier.eval()(classifier.transform.batch(IMAGES))
    softmax, sigmoid = classifier.predict(IMAGES), classifier.predict(IMAGES, sigmoid=True, top_k=3)
    for row, expected, usual in zip(sigmoid, logits.sigmoid(), softmax, strict=True):
        assert [answer["label"] for answer in row] == [answer["label"] for answer in usual[:3]]
        assert [answer["score"] for answer in row] == expected.topk(3).values.tolist()
    assert classifier.predict(IMAGES, sigmoid=True, class_names=["cat", "dog"])[0][0]["label"] in ("cat", "dog")
    with pytest.raises(ValueError, match="two kinds"):
        classifier.predict(IMAGES, sigmoid=True, multi_label=True)


def test_sigmoid_scores_of_a_clip_are_refused(processor):
    model = random_clip(vocab_size=len(processor.tokenizer), eos_token_id=processor.tokenizer.eos_token_id)
    with pytest.raises(ValueError, match="CLIPModel has no bias"):
        ZeroShotClassifier(model, processor, ["cat", "dog"]).predict(IMAGES, sigmoid=True)


@pytest.mark.parametrize("specific", [False, True])
def test_texts_in_parts_give_the_same_features_and_gradients(specific):
    model = siglip_adapter(random_siglip(), class_specific=specific, class_names=NAMES)
    found = []
    for size in (None, 2):
        classifier = ZeroShotClassifier(model, siglip_processor(), NAMES, text_chunk_size=size).train()
        assert size is None or {part.inputs["input_ids"].shape[1] for part in classifier.text_parts().parts} == {12}
        features = classifier.encode_texts()
        prompts = [p for name, p in model.named_parameters() if p.requires_grad and "text_model" in name]
        found.append([features, *torch.autograd.grad(features.square().cumsum(1).sum(), prompts)])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


def test_a_folder_with_an_adapter_is_loaded_with_its_processor(tmp_path):
    random_siglip().save_pretrained(tmp_path / "base")
    siglip_processor(2).save_pretrained(tmp_path / "base")
    model = siglip_adapter(SiglipModel.from_pretrained(tmp_path / "base"), class_names=NAMES, strength=0.5)
    with torch.no_grad():
        expected = ZeroShotClassifier(model, siglip_processor(2), NAMES)(PIXELS)
        model.save_pretrained(tmp_path / "adapter")
        loaded = ZeroShotClassifier.from_pretrained(str(tmp_path / "adapter"))
        assert torch.equal(loaded(PIXELS), expected)
        assert loaded.class_names == tuple(NAMES)
        bare = ZeroShotClassifier.from_pretrained(str(tmp_path / "base"), class_names=NAMES)
        with loaded.frozen():
            torch.testing.assert_close(loaded(PIXELS), bare(PIXELS), atol=1e-6, rtol=0)


def test_the_true_shape_of_siglip_base_patch16_224():
    """Random weights of google/siglip-base-patch16-224's shape, of which transformers' defaults are."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = SiglipModel(SiglipConfig())
    model = model.to_empty(device="cpu").eval()
    for module in model.modules():
        if hasattr(module, "position_ids"):  # not among the weights
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
        model.logit_scale.fill_(4.7)
        model.logit_bias.fill_(-16.5)
    model.requires_grad_(False)
    image_processor = SiglipImageProcessorPil(size={"height": 224, "width": 224})
    processor = SiglipProcessor(image_processor=image_processor, tokenizer=siglip_tokenizer())
    pixels = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        base = ZeroShotClassifier(model, processor, NAMES[:2])(pixels)
        tuned = get_peft_model(model, CaptConfig(template_token_ids=TEMPLATE_IDS, strength=0.5)).eval()
        classifier = ZeroShotClassifier(tuned, processor, NAMES[:2])
        assert classifier.input_ids.shape == (2, 64)
        assert tuned.get_nb_trainable_parameters()[0] == 9 * (2 + 8) * 768
        assert torch.isfinite(classifier(pixels)).all()
        assert not torch.equal(classifier(pixels), base)
        with classifier.frozen():
            assert torch.equal(classifier(pixels), base)
        classifier.strength = 0
        assert torch.equal(classifier(pixels), base)


def pretrained_siglip(task, processor, seed):
    """A SigLIP of 52 thousand parameters after 60 steps of its own sigmoid loss, image by class text."""
    model = random_siglip(seed, text_layers=2, vision_layers=2).train()
    pixels, labels = PixelTransform(processor).batch(task["train"]["image"]), torch.tensor(task["train"]["label"])
    ids = clip.tokenize(model, processor.tokenizer, task.texts)["input_ids"]
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(seed)
    for _ in range(60):
        rows = torch.randint(len(labels), (32,), generator=generator)
        logits = model(input_ids=ids, pixel_values=2 * pixels[rows] - 1).logits_per_image
        signs = 2 * one_hot(labels[rows], task.num_classes) - 1
        optimizer.zero_grad()
        (-logsigmoid(signs * logits).sum(-1).mean()).backward()
        optimizer.step()
    return model.eval()


def tuned_tiny_siglip(folder, seed):
    """Clean and robust accuracy at 40/255, on images that were not trained on, before and after tuning."""
    task = make_task(per_class=16, names=("red shape", "green shape", "blue shape"))
    processor, threat = siglip_processor(), ThreatModel("linf", "40/255")
    base = pretrained_siglip(task, processor, seed)
    torch.manual_seed(seed)
    # text prompts alone: an image of 16 patches is disturbed by any further token
    config = CaptConfig(class_names=list(task.class_names), num_vision_tokens=0, template_token_ids=TEMPLATE_IDS)
    model = get_peft_model(base, config)
    arguments = CaptTrainingArguments(
        output_dir=str(folder), use_cpu=True, num_train_epochs=40, per_device_train_batch_size=48, learning_rate=0.1,
        epsilon="40/255", save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=seed,
    )  # fmt: skip
    trainer = CaptTrainer(model, arguments, task=task, processor=processor)

    def measured():
        result = evaluate(trainer.classifier, task["validation"], PGD(threat, steps=10), progress=False)
        return result.clean.value, result.robust.value

    with trainer.classifier.frozen():
        before = measured()
    trainer.train()
    return before, measured()


def test_a_tiny_siglip_learns_to_classify_and_then_to_withstand_attacks(tmp_path):
    (clean, robust), (tuned_clean, tuned_robust) = tuned_tiny_siglip(tmp_path, seed=0)
    assert clean > 0.9  # a third by chance, as every answer that is always the same
    assert robust < 0.1
    assert tuned_clean > 0.5
    assert tuned_robust > 0.4
