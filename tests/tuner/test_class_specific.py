"""Every class has text prompts of its own: what they compute, and which texts they take."""

import json

import pytest
import torch
from helpers import TEMPLATE_IDS, adapted, clip_inputs, random_clip
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from reference_clip import deep_prompts, text_features
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from capt_peft import CaptConfig
from capt_peft.tuner import PromptLayer

NAMES = ["cat", "dog", "cow"]
SPECIFIC = {"coupling": "none", "class_specific": True, "class_names": NAMES}


def contexts(model, adapter_name="default"):
    """The text prompts, by layer."""
    layers = [m for m in model.modules() if isinstance(m, PromptLayer) and m.site.tower == "text"]
    return [layer.capt_prompt[adapter_name] for layer in layers]


def outputs(model, **inputs):
    with torch.no_grad():
        return model(**clip_inputs(**inputs))


@pytest.mark.parametrize(("depth", "tokens"), [(1, 3), (4, 2)])
def test_each_text_equals_an_independent_computation_with_its_own_prompts(depth, tokens):
    model = adapted(random_clip(), **SPECIFIC, text_depth=depth, num_text_tokens=tokens)
    assert {prompt.shape for prompt in contexts(model)} == {(3, tokens, 32)}
    weights = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
    }
    stored, config, features = get_peft_model_state_dict(model), model.config, outputs(model).text_embeds
    for i, ids in enumerate(clip_inputs()["input_ids"]):
        own = {name: tensor[i] if tensor.ndim == 3 else tensor for name, tensor in stored.items()}
        text, _ = deep_prompts(own, "none", (depth, depth), config)
        expected = text_features(weights, config.text_config, ids[: ids.argmax() + 1].tolist(), text)
        torch.testing.assert_close(features[i], expected / expected.norm(), atol=1e-5, rtol=0)


def test_equal_contexts_give_bitwise_the_logits_of_one_context_for_all():
    unified, specific = adapted(random_clip(), coupling="none"), adapted(random_clip(), **SPECIFIC)
    vision = [name for name, _ in unified.named_parameters() if "capt_prompt" in name and "vision_model" in name]
    with torch.no_grad():
        for own, shared in zip(contexts(specific), contexts(unified), strict=True):
            own.copy_(shared.expand_as(own))
        for name in vision:
            specific.get_parameter(name).copy_(unified.get_parameter(name))
        expected = outputs(unified).logits_per_image
        assert torch.equal(outputs(specific).logits_per_image, expected)
        contexts(specific)[0][1].neg_()
        changed = outputs(specific).logits_per_image
    assert torch.equal(changed[:, [0, 2]], expected[:, [0, 2]])
    assert not torch.allclose(changed[:, 1], expected[:, 1], atol=1e-3)


def test_a_context_gets_no_gradient_from_other_classes_texts(clip):
    model = adapted(clip, **SPECIFIC).train()
    model(**clip_inputs()).text_embeds[1, 0].backward()
    for prompt in contexts(model):
        assert prompt.grad[1].abs().sum() > 0
        assert not prompt.grad[[0, 2]].any()


@pytest.mark.parametrize("init", ["template", "random"])
def test_classes_start_alike_where_there_are_words_and_apart_where_the_start_is_random(clip, init):
    model = get_peft_model(clip, CaptConfig(**SPECIFIC, init=init, template_token_ids=TEMPLATE_IDS))
    words = clip.text_model.embeddings.token_embedding.base_layer(torch.tensor(TEMPLATE_IDS[1:3])).detach()
    first, *deep = contexts(model)
    assert all(torch.equal(first[i], words) for i in range(3))
    for prompt in deep:
        assert torch.equal(prompt[0], prompt[1]) == (init == "template")


@pytest.mark.parametrize("texts", [1, 2, 4])
def test_a_batch_that_is_not_the_classes_texts_is_refused(clip, texts):
    model = adapted(clip, **SPECIFIC)
    with pytest.raises(ValueError, match=f"Got {texts} texts, but the adapter has 3 classes"):
        outputs(model, lengths=(7,) * texts)
    with model.disable_adapter():
        assert outputs(model, lengths=(7,) * texts).text_embeds.shape == (texts, 24)


def test_one_class_alone_does_not_stand_for_several_texts(clip):
    model = adapted(clip, **{**SPECIFIC, "class_names": ["cat"]})
    with pytest.raises(ValueError, match="Got 3 texts, but the adapter has 1 classes"):
        outputs(model)


def test_the_number_of_images_is_free(clip):
    model = adapted(clip, **SPECIFIC)
    assert outputs(model, batch=5).logits_per_image.shape == (5, 3)


def test_it_is_switched_with_an_adapter_of_one_context_for_all(clip):
    model = adapted(clip, coupling="none")
    shared = outputs(model).logits_per_image
    model.add_adapter("own", CaptConfig(**SPECIFIC, init_std=1.0, init="random", template_token_ids=TEMPLATE_IDS))
    model.set_adapter("own")
    own = outputs(model.eval()).logits_per_image
    assert not torch.allclose(own, shared, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(outputs(model).logits_per_image, shared)
    assert outputs(model, lengths=(7,) * 5).text_embeds.shape == (5, 24)
    model.set_adapter("own")
    model.delete_adapter("default")
    assert torch.equal(outputs(model).logits_per_image, own)


def test_baking_changes_nothing(clip):
    model = adapted(clip, **SPECIFIC)
    expected = outputs(model).logits_per_image
    model.bake()
    assert torch.equal(outputs(model).logits_per_image, expected)
    assert all(len(prompt) == 3 for prompt in contexts(model))


@pytest.fixture
def saved(saved_clip, tmp_path):
    model = adapted(CLIPModel.from_pretrained(saved_clip), **SPECIFIC)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_each_tower_alone_loads_its_half(saved, saved_clip):
    folder, both = saved
    inputs, whole = clip_inputs(), outputs(both)
    with torch.no_grad():
        vision = PeftModel.from_pretrained(CLIPVisionModelWithProjection.from_pretrained(saved_clip), str(folder))
        image = vision(pixel_values=inputs["pixel_values"]).image_embeds
        tower = PeftModel.from_pretrained(CLIPTextModelWithProjection.from_pretrained(saved_clip), str(folder))
        text = tower(input_ids=inputs["input_ids"]).text_embeds
    torch.testing.assert_close(torch.nn.functional.normalize(image), whole.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.nn.functional.normalize(text), whole.text_embeds, atol=1e-6, rtol=0)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_names": ["cat", "dog"]}, "holds the prompts of 3 classes, but the configuration has 2 class_names"),
        ({"class_specific": False}, "has the shape (3, 2, 32), but the configuration and the base model need (2, 32)"),
        ({"class_names": None}, "class_specific=True needs the classes"),
        ({"coupling": "text_to_vision", "vision_depth": 4}, "class_specific=True needs coupling='none'"),
    ],
)
def test_a_configuration_that_does_not_suit_the_file_is_refused(saved, saved_clip, change, words, low_cpu_mem_usage):
    folder, _ = saved
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    assert content["class_specific"] is True and content["class_names"] == NAMES
    path.write_text(json.dumps({**content, **change}))
    base = CLIPModel.from_pretrained(saved_clip)
    with pytest.raises(ValueError) as caught:
        PeftModel.from_pretrained(base, str(folder), low_cpu_mem_usage=low_cpu_mem_usage)
    assert words in str(caught.value)
