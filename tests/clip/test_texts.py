"""Class texts: what the tokenizer makes of them, which the model could not tell apart, and their parts."""

import copy
import json
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from helpers import TINY_CLIP, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from siglip_models import random_siglip
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    SiglipForImageClassification,
)

from capt_peft import CaptConfig, ZeroShotClassifier
from capt_peft.clip.texts import SIZE, WHOLE, split_texts

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WORDS = ["red", "green apple", "big blue house", "old dog", "tree", "small white cat on it", "car", "seven"]
CAFE = "caf\u00e9"


@pytest.fixture(scope="module")
def base():
    return CLIPModel.from_pretrained(TINY_CLIP).eval()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Crane", "crane"),
        ("cat ", "cat"),
        ("cat\n", "cat"),
        ("sea  lion", "sea lion"),
        ("sea\u00a0lion", "sea lion"),
        (unicodedata.normalize("NFD", CAFE), CAFE),
    ],
)
def test_two_classes_that_are_one_text_are_refused_by_name(base, processor, first, second):
    alike = r"the same text|must differ"  # refused by their names, or by their texts
    with pytest.raises(ValueError, match=alike) as caught:
        ZeroShotClassifier(base, processor, ["dog", first, second])
    assert repr(first) in str(caught.value) and repr(second) in str(caught.value)
    classifier = ZeroShotClassifier(base, processor, ["dog", "cat"])
    with pytest.raises(ValueError, match=alike):
        classifier.predict([], class_names=[first, second])


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(
        st.sampled_from(["a", "A", "b", " b", "b ", "b.", "c\u0327", "\u00e7", "1", "1 "]), min_size=2, unique=True
    )
)
def test_accepted_classes_have_different_tokens_up_to_the_end(names):
    model, processor = _tiny()
    tokens = [tuple(processor.tokenizer(f"a photo of a {name}.")["input_ids"]) for name in names]
    try:
        ZeroShotClassifier(model, processor, names)
    except ValueError:
        assert len(set(tokens)) < len(tokens)
    else:
        assert len(set(tokens)) == len(tokens)


def _tiny(loaded=[]):  # noqa: B006
    if not loaded:
        loaded.extend([CLIPModel.from_pretrained(TINY_CLIP).eval(), AutoProcessor.from_pretrained(TINY_CLIP)])
    return loaded


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|startoftext|>"])
def test_special_tokens_in_a_name_or_template_are_refused(base, processor, token):
    with pytest.raises(ValueError, match="special token"):
        ZeroShotClassifier(base, processor, [f"cat {token} red", f"cat {token} blue"])
    with pytest.raises(ValueError, match="special token"):
        ZeroShotClassifier(base, processor, ["cat", "dog"], "a photo " + token + " of a {}.")


def test_texts_are_padded_on_the_side_that_clip_reads(base, processor):
    left = copy.deepcopy(processor)
    left.tokenizer.padding_side = "left"
    names = ["cat", "a very big grey dog"]
    with torch.no_grad():
        expected = ZeroShotClassifier(base, processor, names)(PIXELS)
        assert torch.equal(ZeroShotClassifier(base, left, names)(PIXELS), expected)
    assert left.tokenizer.padding_side == "left"


def test_a_message_never_holds_more_than_a_few_hundred_characters_of_a_name(base, processor):
    huge = "x" * 5_000_000
    for names, template in (([huge, "dog"], "a photo of a {}."), (["cat", "dog"], f"{huge} {{}}")):
        with pytest.raises(ValueError, match="too long") as caught:
            ZeroShotClassifier(base, processor, names, template)
        assert len(str(caught.value)) < 1000


# ------------------------------------------------------------------------------------------- adapters that become active


def two_adapters(first="short", active="short"):
    torch.manual_seed(0)
    long = CaptConfig(num_text_tokens=8, template="this is a very nice photo of a {}.")
    short = CaptConfig(num_text_tokens=2)
    configs = {"short": short, "long": long}
    second = "long" if first == "short" else "short"
    model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), configs[first], adapter_name=first)
    model.add_adapter(second, configs[second])
    model.set_adapter(active)
    return model.eval()


NAMES = ["golden retriever", "golden hamster"]


def test_prompts_that_would_overwrite_the_class_name_are_refused_whenever_they_become_active(processor):
    model = two_adapters()
    classifier = ZeroShotClassifier(model, processor, NAMES)
    expected = classifier(PIXELS)
    model.set_adapter("long")
    for use in (lambda: classifier(PIXELS), classifier.with_fixed_texts, lambda: classifier.predict([PIXELS[0].numpy().T]),
                classifier.text_inputs, lambda: ZeroShotClassifier(model, processor, NAMES)):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"4 tokens before the class name, but the 8 text prompts of adapter 'long'"
        ):
            use()
    with classifier.frozen():
        classifier(PIXELS)
    model.set_adapter("short")
    assert torch.equal(classifier(PIXELS), expected)


@pytest.mark.parametrize("first", ["short", "long"])
def test_inactive_adapters_never_make_a_classifier_refuse(processor, first):
    ZeroShotClassifier(two_adapters(first), processor, NAMES)(PIXELS)


def test_a_word_that_the_tokenizer_joins_with_the_name_counts_to_the_name(processor):
    model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), CaptConfig(num_text_tokens=4))
    ZeroShotClassifier(model, processor, ["cat", "dog"], "a photo of a {}.")
    with pytest.raises(ValueError, match="3 tokens before the class name"):
        ZeroShotClassifier(model, processor, ["cat", "dog"], "a photo of a{}.")


def test_an_adapter_that_is_switched_off_in_part_is_refused(processor):
    model = CLIPModel.from_pretrained(TINY_CLIP)
    model.add_adapter(CaptConfig(modules_to_save=["text_projection"]))
    classifier = ZeroShotClassifier(model.eval(), processor, NAMES)
    model.disable_adapters()
    model.enable_adapters()  # transformers forgets modules_to_save
    with pytest.raises(ValueError, match="switched off in some modules"):
        classifier(PIXELS)


def test_heads_for_classification_are_refused_by_name(processor):
    siglip, clip = random_siglip().config, CLIPConfig.from_pretrained(TINY_CLIP)
    for model in (SiglipForImageClassification(siglip), CLIPForImageClassification(clip)):
        name = type(model).__name__
        with pytest.raises(ValueError, match=f"does not support {name}"):
            ZeroShotClassifier(model, processor, ["cat", "dog"])
        with pytest.raises(ValueError, match=f"does not support {name}"):
            get_peft_model(model, CaptConfig())


# ---------------------------------------------------------------------------------------------- scores that are not finite


def break_weight(model):
    model.base_model.model.visual_projection.weight.data[0, 0] = float("nan")


def break_temperature(model):
    model.base_model.model.logit_scale.data.fill_(100.0)


def break_prompts(model):
    for name, p in model.named_parameters():
        if "capt_prompt" in name and "text_model" in name:
            p.data.fill_(3e38)


def break_images(model):
    for name, p in model.named_parameters():
        if "capt_prompt" in name and "vision_model" in name:
            p.data.fill_(3e38)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (break_weight, "visual_projection.weight hold NaN"),
        (break_temperature, r"the temperature overflows \(logit_scale=100"),
        (break_prompts, "the text features of class 'cat'"),
        (break_images, "the features of an image"),
    ],
)
def test_predict_gives_no_scores_of_a_model_that_is_not_finite(processor, change, cause):
    model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), CaptConfig()).eval()
    shake(model)
    classifier = ZeroShotClassifier(model, processor, ["cat", "dog"])
    image = (PIXELS[0].permute(1, 2, 0) * 255).byte().numpy()
    assert len(classifier.predict(image)[0]) == 2
    change(model)
    with pytest.raises(ValueError, match=cause):
        classifier.predict(image)


# ----------------------------------------------------------------------------------------------------- code of a base model


@pytest.mark.parametrize("model_type", ["clip", "clip_of_their_own"])
@pytest.mark.parametrize("load", ["from_pretrained", "adapter", "tokenizer"])
def test_code_that_comes_with_a_base_model_is_never_run_nor_asked_about(tmp_path, monkeypatch, model_type, load):
    base, adapter, proof = tmp_path / "base", tmp_path / "adapter", tmp_path / "proof"
    CLIPModel.from_pretrained(TINY_CLIP).save_pretrained(base)
    AutoProcessor.from_pretrained(TINY_CLIP).save_pretrained(base)
    get_peft_model(CLIPModel.from_pretrained(base), CaptConfig(class_names=["cat", "dog"])).save_pretrained(adapter)
    (base / "evil.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass Evil: pass\n")
    for file in base.glob("*config.json"):
        content = json.loads(file.read_text())
        classes = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor")
        content["auto_map"] = dict.fromkeys(classes, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", None]}
        if file.name == "config.json":
            content["model_type"] = model_type
        file.write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    names = ["cat", "dog"]
    if load == "tokenizer":
        model = CLIPModel.from_pretrained(TINY_CLIP)
        get_peft_model(model, CaptConfig(base_model_name_or_path=str(base)))
    else:
        with pytest.raises(ValueError, match="runs no code"):
            ZeroShotClassifier.from_pretrained(str(base if load == "from_pretrained" else adapter), class_names=names)
    assert not proof.exists()


def test_one_function_loads_models_and_processors_so_that_none_forgets_to_refuse_their_code():
    root = Path(__file__).parents[2]
    files = [*root.glob("capt_peft/**/*.py"), *root.glob("examples/*.py")]
    assert len(files) > 100
    assert not [
        str(f)
        for f in files
        if re.search(r"\bAuto(Model|Processor|Tokenizer|Config)\w*\.from_pretrained\(\w", f.read_text())
    ]


# ------------------------------------------------------------------------------------------------------- texts in parts


def texts(count, seed=0):
    """Token ids of `count` texts of different lengths; the first token says which text it is."""
    lengths = torch.randint(3, 12, (count,), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = mask * torch.arange(1, 13)
    ids[:, 0] = torch.arange(count)
    return {"input_ids": ids, "attention_mask": mask}


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 300), size=st.none() | st.integers(1, 40))
def test_every_text_is_run_and_comes_back_to_its_place(count, size):
    split = split_texts(texts(count), size)
    if split is None:
        assert count <= (size or WHOLE)
        return
    features = [part.inputs["input_ids"][:, :1] for part in split.parts]
    assert torch.equal(split.join(features)[:, 0], torch.arange(count))
    sizes = {len(part.rows) for part in split.parts}
    assert len(sizes) == 1 and (size is None or sizes.pop() <= size)
    assert sum(map(len, features)) - count < len(split.parts)  # what makes the parts equal is less than a text for each


def test_parts_are_cut_at_their_longest_text_unless_shapes_must_stay():
    inputs = texts(100)
    lengths = inputs["attention_mask"].sum(1)
    for part in split_texts(inputs, 10).parts:
        assert part.inputs["input_ids"].shape[1] == lengths[part.rows].max()
        assert torch.equal(part.inputs["attention_mask"].sum(1), lengths[part.rows])
    run = sum(part.inputs["input_ids"].numel() for part in split_texts(inputs, 10).parts)
    assert run < 1.15 * lengths.sum() < 0.75 * inputs["input_ids"].numel()
    assert all(part.inputs["input_ids"].shape == (10, 12) for part in split_texts(inputs, 10, cut=False).parts)


def test_the_default_is_one_part_up_to_256_texts_and_at_most_64_texts_a_part_above():
    assert split_texts(texts(WHOLE), None) is None
    parts = split_texts(texts(WHOLE + 1), None).parts
    assert [len(part.rows) for part in parts] == [52] * 5 and SIZE == 64


@pytest.fixture(params=[False, True], ids=["one context", "class-specific"])
def model(request):
    config = {"class_names": WORDS, "class_specific": True} if request.param else {}
    torch.manual_seed(0)
    model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32), CaptConfig(**config))
    shake(model)
    return model


def features_and_gradients(model, processor, size):
    classifier = ZeroShotClassifier(model.train(), processor, WORDS, text_chunk_size=size)
    model.zero_grad()
    features = classifier.encode_texts()
    (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return features.detach(), gradients


@pytest.mark.parametrize("size", [1, 3, 7])
def test_parts_give_the_features_and_gradients_of_the_whole(model, processor, size):
    whole, parts = (features_and_gradients(model, processor, s) for s in (None, size))
    torch.testing.assert_close(parts[0], whole[0], atol=1e-5, rtol=1e-5)
    assert parts[1].keys() == whole[1].keys() and len(whole[1]) >= 2
    for name, gradient in whole[1].items():
        assert gradient.norm() > 1e-4 and (parts[1][name] - gradient).norm() < 1e-5 * gradient.norm()


def test_predictions_do_not_depend_on_the_parts(model, processor):
    model.eval()
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = ZeroShotClassifier(model, processor, WORDS)(pixels)
    torch.testing.assert_close(ZeroShotClassifier(model, processor, WORDS, text_chunk_size=3)(pixels), whole)


def kept(model, processor, count, size):
    """Bytes that autograd keeps for the backward pass of `count` texts."""
    names = [f"{a} {b} {c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"][:count]
    classifier = ZeroShotClassifier(model.train(), processor, names, text_chunk_size=size)
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size() * (tensor.requires_grad or tensor.grad_fn is not None)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        classifier.encode_texts()
    return total


def test_what_is_kept_for_backward_does_not_grow_with_the_classes(processor):
    model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32), CaptConfig())
    assert kept(model, processor, 200, None) > 3 * kept(model, processor, 50, None)
    few, many = (kept(model, processor, count, 25) for count in (50, 400))
    assert many < 0.05 * kept(model, processor, 200, None)
    assert few < 0.05 * kept(model, processor, 200, None)


def test_a_size_below_one_is_refused(model, processor):
    with pytest.raises(ValueError, match="text_chunk_size=0 must be at least 1"):
        ZeroShotClassifier(model, processor, WORDS, text_chunk_size=0)
