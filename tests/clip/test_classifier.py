"""ZeroShotClassifier: the model's own logits, from pixels in [0, 1]."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_CLIP, random_clip, shake
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import CLIPModel, pipeline

from capt_peft import CaptConfig, ZeroShotClassifier
from capt_peft.clip.loading import load_model

NAMES = ("red circle", "green square", "seven")


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    peft_model = get_peft_model(base, CaptConfig())
    shake(peft_model)
    return peft_model.eval()


@pytest.fixture
def classifier(model, processor):
    return ZeroShotClassifier(model, processor, NAMES)


def images(count=3, size=(40, 50)):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def test_logits_equal_the_models_own(classifier, model, processor):
    inputs = processor(text=classifier.texts, images=images(), return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        actual = classifier(classifier.transform.batch(images()))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


def test_predict_equals_the_pipelines_scores(classifier, model, processor):
    pipe = pipeline(
        "zero-shot-image-classification", model=model.base_model.model, tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )  # fmt: skip
    expected = pipe(images(), candidate_labels=list(NAMES), hypothesis_template="a photo of a {}.")
    for ours, theirs in zip(classifier.predict(images()), expected, strict=True):
        assert [entry["label"] for entry in ours] == [entry["label"] for entry in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_images_may_be_pil_images_paths_or_arrays(classifier, tmp_path):
    image = images(1)[0]
    image.save(tmp_path / "image.png")
    array = np.asarray(image)
    expected = classifier.predict(image)
    for same in (tmp_path / "image.png", str(tmp_path / "image.png"), array, array.astype(np.float32) / 255):
        assert classifier.predict(same) == expected


def test_the_batch_size_changes_nothing_and_top_k_cuts(classifier):
    whole, parts = classifier.predict(images(5)), classifier.predict(images(5), batch_size=2)
    for a, b in zip(whole, parts, strict=True):
        assert [entry["label"] for entry in a] == [entry["label"] for entry in b]
    assert [len(entry) for entry in classifier.predict(images(2), top_k=2)] == [2, 2]
    assert classifier.predict([]) == []


def test_texts_are_padded_to_the_longest_only(classifier):
    lengths = [len(ids) for ids in classifier.processor.tokenizer(classifier.texts)["input_ids"]]
    assert classifier.input_ids.shape == (3, max(lengths))


def test_text_features_have_a_gradient_only_while_training(classifier):
    assert not classifier.text_features().requires_grad
    assert classifier.train().text_features().requires_grad


def test_with_fixed_texts_runs_the_texts_once_and_gives_the_same_logits(classifier, model):
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = classifier(pixels)
    calls = []
    model.base_model.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        logits_fn = classifier.with_fixed_texts()
    for _ in range(3):
        leaf = pixels.clone().requires_grad_()
        logits = logits_fn(leaf)
        assert torch.equal(logits, expected)
        torch.autograd.grad(logits.sum(), leaf)
    assert len(calls) == 1


def prompts_of(model):
    return [p for name, p in model.named_parameters() if "capt_prompt" in name or "lora_B" in name]


def noise_like(p):
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p)


def set_data(model):
    for p in prompts_of(model):
        p.data = noise_like(p)


def optimiser_step(model):
    for p in prompts_of(model):
        p.grad = noise_like(p)
    torch.optim.SGD(prompts_of(model), lr=1.0).step()


def averaged(model):
    average = torch.optim.swa_utils.AveragedModel(torch.nn.ParameterList(prompts_of(model)))
    set_data(model)
    average.update_parameters(torch.nn.ParameterList(prompts_of(model)))
    for p, mean in zip(prompts_of(model), average.module, strict=True):
        p.data.copy_(mean.data + 1)


CHANGES = {
    "an optimiser's step": optimiser_step,
    "p.data.copy_": lambda model: [p.data.copy_(noise_like(p)) for p in prompts_of(model)],
    "p.data =": set_data,
    "vector_to_parameters": lambda model: torch.nn.utils.vector_to_parameters(
        torch.ones(sum(p.numel() for p in prompts_of(model))), prompts_of(model)
    ),
    "load_state_dict": lambda model: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}),
    "averaged weights": averaged,
    "set_adapter": lambda model: model.set_adapter("second"),
    "disable_adapter_layers": lambda model: model.base_model.disable_adapter_layers(),
    "disable and enable": lambda model: (model.base_model.disable_adapter_layers(), set_data(model),
                                         model.base_model.enable_adapter_layers()),
    "delete_adapter": lambda model: (model.set_adapter("second"), model.delete_adapter("default")),
    "to(dtype)": lambda model: model.to(torch.bfloat16),
    "storage": lambda model: [p.untyped_storage().copy_(noise_like(p).untyped_storage()) for p in prompts_of(model)],
}  # fmt: skip


@pytest.mark.parametrize("method", ["capt", "lora"])
@pytest.mark.parametrize("change", CHANGES)
def test_text_features_are_never_stale(change, method, processor):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), CaptConfig() if method == "capt" else lora).eval()
    model.add_adapter("second", CaptConfig(text_depth=1, vision_depth=1, init="random") if method == "capt" else lora)
    classifier = ZeroShotClassifier(model, processor, NAMES)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = classifier(pixels)
        CHANGES[change](model)
        model.eval()
        after = classifier(pixels)
        assert torch.equal(after, ZeroShotClassifier(model, processor, NAMES)(pixels))
    if method == "lora" or "disable_adapter" not in change:  # a new CAPT adapter starts from the base's own states
        assert not torch.equal(after, before)


def test_gradients_reach_the_pixels_through_the_prompts(classifier):
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(classifier(pixels)[:, 0].sum(), pixels)
    with classifier.frozen():
        (frozen,) = torch.autograd.grad(classifier(pixels)[:, 0].sum(), pixels)
    assert gradient.abs().sum() > 0
    assert not torch.allclose(gradient, frozen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_are_float32_whatever_the_model_is_in(processor, dtype):
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=dtype).eval()
    logits = ZeroShotClassifier(base, processor, NAMES)(torch.rand(2, 3, 32, 32))
    assert logits.dtype == torch.float32


def test_an_adapter_is_loaded_by_one_name(model, processor, tmp_path):
    model.peft_config["default"].class_names = list(NAMES)
    model.save_pretrained(tmp_path)
    loaded = ZeroShotClassifier.from_pretrained(str(tmp_path))
    assert loaded.class_names == NAMES
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), ZeroShotClassifier(model, processor, NAMES)(pixels))
    other = ZeroShotClassifier.from_pretrained(str(tmp_path), class_names=["cat", "dog"])
    assert other.class_names == ("cat", "dog")


def test_a_bare_clip_needs_class_names():
    assert ZeroShotClassifier.from_pretrained(TINY_CLIP, class_names=NAMES).class_names == NAMES
    with pytest.raises(ValueError, match="records no class names"):
        ZeroShotClassifier.from_pretrained(TINY_CLIP)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"template": "a photo"}, "exactly one {}"),
        ({"class_names": ["cat"]}, "At least two class names"),
        ({"class_names": ["cat", "cat"]}, "more than one label"),
        ({"class_names": ["cat", " "]}, "must be a word"),
        ({"class_names": ["cat", "very " * 100 + "long"]}, "tokens, but the model takes"),
        ({"template": "a {}."}, "would overwrite 2"),
        ({"template": "{}"}, "would overwrite 2"),
    ],
)
def test_texts_that_cannot_work_are_refused(model, processor, arguments, words):
    with pytest.raises(ValueError) as caught:
        ZeroShotClassifier(model, processor, **{"class_names": NAMES, **arguments})
    assert words in str(caught.value)


def test_unreadable_images_are_named(classifier, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        classifier.predict([tmp_path / "broken.png"])
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        classifier.predict(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="top_k=0"):
        classifier.predict(images(1), top_k=0)


def test_a_processor_of_another_model_is_refused(processor):
    with pytest.raises(ValueError, match="does not belong to the model"):
        ZeroShotClassifier(random_clip(), processor, NAMES)


def test_other_classes_can_be_named_for_one_call(processor):
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    classifier = ZeroShotClassifier(base, processor, ["0", "1"], "a photo of the digit {}.").eval()
    image = Image.new("RGB", (32, 32), "red")
    own = classifier.predict(image)
    other = classifier.predict(image, class_names=["red", "blue", "green"], template="a {} picture.")
    assert {row["label"] for row in other[0]} == {"red", "blue", "green"}
    fresh = ZeroShotClassifier(base, processor, ["red", "blue", "green"], "a {} picture.").eval()
    assert other == fresh.predict(image)
    assert classifier.predict(image) == own and classifier.class_names == ("0", "1")
    with pytest.raises(ValueError, match="At least two class names"):
        classifier.predict(image, class_names=["red"])


def test_the_bare_model_is_loaded_by_name(tmp_path):
    assert isinstance(load_model(TINY_CLIP)[0], CLIPModel)
    model = get_peft_model(
        CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32), CaptConfig(template="a photo of the digit {}.")
    )
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))[0]
    assert isinstance(loaded, PeftModel) and not loaded.training
    assert next(loaded.parameters()).dtype == torch.float32
    assert isinstance(load_model(str(tmp_path), base=TINY_CLIP)[0], PeftModel)


def test_further_arguments_reach_the_base_model(tmp_path):
    get_peft_model(CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32), CaptConfig()).save_pretrained(tmp_path)
    for name in (TINY_CLIP, str(tmp_path)):
        loaded = load_model(name, attn_implementation="eager", device_map="auto")[0]
        assert loaded.config._attn_implementation == "eager"
        with pytest.raises(TypeError, match="devcie_map"):
            load_model(name, devcie_map="auto")


@pytest.fixture
def class_specific():
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    peft_model = get_peft_model(base, CaptConfig(class_specific=True, class_names=list(NAMES)))
    shake(peft_model)
    return peft_model.eval()


def test_a_class_specific_adapter_classifies_its_own_classes(class_specific, processor, tmp_path):
    pixels = torch.rand(2, 3, 32, 32)
    class_specific.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = ZeroShotClassifier(class_specific, processor, NAMES)(pixels)
        assert expected.shape == (2, 3)
        assert torch.equal(ZeroShotClassifier.from_pretrained(str(tmp_path))(pixels), expected)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("green square", "red circle", "seven"), "class 0 is 'red circle' there and 'green square' here"),
        (("red circle", "green square"), "but is given the 2 classes 'red circle', 'green square' (class 2 is 'seven'"),
        ([str(i) for i in range(12)], "'8', '9' and 2 more"),
    ],
)
def test_a_class_specific_adapter_knows_no_other_classes(class_specific, processor, names, words):
    with pytest.raises(ValueError) as caught:
        ZeroShotClassifier(class_specific, processor, names)
    assert words in str(caught.value)
    assert "for the 3 classes 'red circle', 'green square', 'seven'" in str(caught.value)
    with pytest.raises(ValueError, match="class-specific text prompts"):
        ZeroShotClassifier(class_specific, processor, NAMES).predict(images(1), class_names=names)
    with class_specific.disable_adapter():
        others = ZeroShotClassifier(class_specific, processor, names)
        assert len(others.predict(images(1))[0]) == len(names)


def test_a_class_specific_adapter_that_becomes_active_later_is_noticed(class_specific, processor):
    with class_specific.disable_adapter():
        classifier = ZeroShotClassifier(class_specific, processor, NAMES[::-1])  # as many classes, in another order
    with pytest.raises(ValueError, match="class-specific text prompts"):
        classifier(torch.rand(1, 3, 32, 32))


def test_a_classifier_follows_its_model_to_another_device(processor):
    """As a Trainer moves the model alone; `meta` stands for a GPU, which tests need not have."""
    classifier = ZeroShotClassifier(CLIPModel.from_pretrained(TINY_CLIP), processor, ["cat", "dog"])
    classifier.model.to("meta")
    pixels = torch.rand(3, 3, 32, 32, device="meta")
    assert classifier.device.type == "meta"
    assert {tensor.device.type for tensor in classifier.text_inputs().values()} == {"meta"}
    assert classifier.image_features(pixels).device.type == "meta"


def test_an_embedded_model_loads_by_its_name_and_below_adapters_of_other_environments(
    model, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    bare = ZeroShotClassifier.from_pretrained("tiny_clip", class_names=NAMES)
    model.save_pretrained("adapter")
    pixels = bare.transform.batch(images())
    expected = ZeroShotClassifier.from_pretrained("adapter", class_names=NAMES)(pixels)
    with model.disable_adapter():
        assert torch.equal(bare(pixels), ZeroShotClassifier(model, bare.processor, NAMES)(pixels))
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    for name, warned in (("tiny_clip", False), ("tiny_clip_robust", True)):
        moved = {**config, "base_model_name_or_path": f"/another/place/capt_peft/toy/{name}"}
        Path("adapter/adapter_config.json").write_text(json.dumps(moved))
        there = ZeroShotClassifier.from_pretrained("adapter", class_names=NAMES)(pixels)
        assert torch.equal(there, expected) != warned
        assert ("was tuned on the base model" in caplog.text) == warned


# ----------------------------------------------------------------------------------------------------- embeddings


def test_products_of_embeddings_are_the_classifiers_logits(classifier):
    pictures, texts = classifier.embed_images(images(5), batch_size=2), classifier.embed_texts(classifier.texts)
    assert pictures.shape == (5, 128) and texts.shape == (3, 128)
    for rows in (pictures, texts):
        assert rows.dtype == torch.float32 and rows.device.type == "cpu" and not rows.requires_grad
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)), atol=1e-6, rtol=0)
    with torch.no_grad():
        expected = classifier(classifier.transform.batch(images(5)))
    torch.testing.assert_close(classifier.logits(pictures, texts), expected, atol=1e-4, rtol=1e-5)
    with classifier.frozen():
        assert not torch.allclose(classifier.embed_texts(classifier.texts), texts, atol=1e-3)
        assert not torch.allclose(classifier.embed_images(images(5)), pictures, atol=1e-3)


def test_embeddings_do_not_depend_on_batches_or_on_what_else_is_embedded(classifier):
    texts = ["a photo of a red circle", "a photo of a large blue square in the top left.", "a photo of a red circle"]
    whole = classifier.embed_texts(texts)
    assert torch.equal(whole[0], whole[2])
    torch.testing.assert_close(classifier.embed_texts(texts, batch_size=1), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(classifier.embed_texts(texts[0]), whole[:1], atol=1e-6, rtol=0)
    one = classifier.embed_images(images(3)[1])
    torch.testing.assert_close(classifier.embed_images(images(3))[1:2], one, atol=1e-6, rtol=0)
    assert classifier.embed_images([]).shape == (0, 128) == classifier.embed_texts([]).shape


def test_embedding_leaves_the_mode_alone_and_uses_eval(classifier):
    expected = classifier.embed_images(images(2))
    classifier.train()
    assert torch.equal(classifier.embed_images(images(2)), expected) and classifier.training


def test_embeddings_of_a_model_in_half_precision_have_length_one(model, processor):
    rows = ZeroShotClassifier(model.bfloat16(), processor, NAMES).embed_images(images(2))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("texts", "error", "sentence"),
    [
        (["a photo of a cat", "two red circles"], ValueError, "'two red circles' does not begin with 'a photo'"),
        (["cat"], ValueError, "does not begin with 'a photo'"),
        (["a photo " + "very " * 100], ValueError, "tokens, but the model takes"),
        (["a photo of " + "x" * 20_000], ValueError, "is too long"),
        (["a photo of <|endoftext|> a cat"], ValueError, "special token '<|endoftext|>'"),
        (["a photo", " "], ValueError, "Text 1 is empty"),
        (["a photo", 3], TypeError, r"Text 1 is 3 \(int\)"),
        (None, TypeError, r"texts=None \(NoneType\) must be a text or a list of texts"),
        (3, TypeError, r"texts=3 \(int\) must be a text or a list of texts"),
    ],
)
def test_texts_that_prompts_or_the_model_cannot_take_are_refused(classifier, texts, error, sentence):
    with pytest.raises(error, match=sentence.replace("|", r"\|")):
        classifier.embed_texts(texts)


def test_without_prompts_a_text_may_begin_as_it_likes(classifier):
    with classifier.frozen():
        assert classifier.embed_texts(["two red circles", "cat"]).shape == (2, 128)


def test_class_specific_prompts_know_no_free_texts(processor):
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    specific = get_peft_model(base, CaptConfig(class_specific=True, coupling="none", class_names=list(NAMES)))
    classifier = ZeroShotClassifier(specific.eval(), processor, NAMES)
    with pytest.raises(ValueError, match="class-specific text prompts"):
        classifier.embed_texts(classifier.texts)
    assert classifier.embed_images(images(2)).shape == (2, 128)


def test_damaged_weights_give_no_embeddings(classifier, model):
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "visual_projection" in name).fill_(float("nan"))
    with pytest.raises(ValueError, match="features are not finite"):
        classifier.embed_images(images(1))
