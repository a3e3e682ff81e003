"""CaptConfig refuses what cannot work, field by field."""

import copy

import pytest
import torch
from helpers import COUPLINGS, TEMPLATE_IDS, TINY_CLIP, adapted, clip_inputs, random_clip
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPModel,
    MetaClip2Config,
    MetaClip2Model,
)

from capt_peft import CaptConfig, CaptModel
from capt_peft.tuner import register
from capt_peft.tuner.config import CaptPeftType

CLASS_SPECIFIC = {"class_specific": True, "class_names": ["cat", "dog", "cow"]}


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"depth": 3}, TypeError, "depth"),
        ({"text_depth": -1}, ValueError, "text_depth=-1 must not be negative"),
        ({"vision_depth": -2}, ValueError, "vision_depth=-2 must not be negative"),
        ({"num_text_tokens": -1}, ValueError, "num_text_tokens=-1"),
        ({"num_vision_tokens": 2.5}, TypeError, "num_vision_tokens=2.5 must be an integer"),
        ({"text_depth": True}, TypeError, "text_depth=True must be an integer"),
        ({"text_depth": "9"}, TypeError, "text_depth='9' must be an integer"),
        ({"coupling": "both"}, ValueError, "coupling='both' is unknown"),
        ({"coupling": None}, TypeError, "coupling=None must be a string"),
        ({"coupling": "text_to_vision", "num_vision_tokens": 4}, ValueError, "equal numbers of tokens"),
        ({"coupling": "text_to_vision", "text_depth": 2, "vision_depth": 3}, ValueError, "equal depths"),
        ({"coupling": "vision_to_text", "text_depth": 0}, ValueError, "equal depths"),
        ({"template": "a photo"}, ValueError, "exactly one {}"),
        ({"template": "{} and {}"}, ValueError, "exactly one {}"),
        ({"template": 3}, TypeError, "template=3 must be a string"),
        ({"init": "zeros"}, ValueError, "init='zeros' is unknown"),
        ({"init_std": -0.1}, ValueError, "init_std=-0.1"),
        ({"init_std": float("nan")}, ValueError, "init_std=nan"),
        ({"init_std": "big"}, TypeError, "init_std='big' must be a number"),
        ({"template_token_ids": []}, ValueError, "not empty"),
        ({"template_token_ids": [1, -1]}, ValueError, "token ids"),
        ({"template_token_ids": "1 2"}, TypeError, "list of int"),
        ({"class_names": [1, 2]}, TypeError, "list of str"),
        ({"base_model_fingerprint": 5}, TypeError, "base_model_fingerprint=5"),
        ({"target_modules": ["q_proj"]}, ValueError, "CAPT finds its places itself"),
        ({"coupling": "none", "text_depth": 0, "vision_depth": 0}, ValueError, "no prompts at all"),
        ({"coupling": "none", "num_text_tokens": 0, "vision_depth": 0}, ValueError, "no prompts at all"),
        ({"class_specific": "yes"}, TypeError, "class_specific='yes' must be True or False"),
        ({"class_specific": True}, ValueError, "got class_names=None. Give their names in order"),
        ({"class_specific": True, "class_names": []}, ValueError, "got class_names=[]"),
        ({**CLASS_SPECIFIC, "coupling": "text_to_vision"}, ValueError, "needs coupling='none', got 'text_to_vision'"),
        ({**CLASS_SPECIFIC, "text_depth": 0}, ValueError, "needs text prompts, got text_depth=0"),
        ({**CLASS_SPECIFIC, "num_text_tokens": 0}, ValueError, "and num_text_tokens=0"),
    ],
)
def test_bad_fields_are_refused_with_a_sentence(fields, error, words):
    with pytest.raises(error) as caught:
        CaptConfig(**fields)
    assert words in str(caught.value)


@pytest.mark.parametrize("coupling", ["none", "text_to_vision"])
def test_the_default_depth_is_cut_to_the_models(clip, coupling):
    config = CaptConfig(coupling=coupling, template_token_ids=TEMPLATE_IDS)
    get_peft_model(clip, config)
    assert (config.text_depth, config.vision_depth) == ((4, 5) if coupling == "none" else (4, 4))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"coupling": "none", "text_depth": 5}, "text_depth=5 is more than the 4 layers"),
        ({"coupling": "none", "vision_depth": 6}, "vision_depth=6 is more than the 5 layers"),
        ({"coupling": "vision_to_text", "text_depth": 5, "vision_depth": 5}, "4 layers that both towers have"),
    ],
)
def test_a_depth_beyond_the_model_is_refused_and_the_model_left_alone(clip, fields, words):
    names = set(clip.state_dict())
    with pytest.raises(ValueError) as caught:
        get_peft_model(clip, CaptConfig(template_token_ids=TEMPLATE_IDS, **fields))
    assert words in str(caught.value)
    assert set(clip.state_dict()) == names


def test_a_tower_is_switched_off_by_depth_or_length(clip):
    for fields in ({"text_depth": 0}, {"num_text_tokens": 0, "num_vision_tokens": 2}):
        model = adapted(copy.deepcopy(clip), coupling="none", **fields)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert names
        assert all("vision_model" in name for name in names)


def test_a_model_without_clips_towers_is_refused_by_name():
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(ValueError, match="does not support BertModel"):
        get_peft_model(bert, CaptConfig())
    with pytest.raises(ValueError, match="does not support Linear"):
        get_peft_model(torch.nn.Linear(2, 2), CaptConfig())


def test_a_single_tower_takes_no_coupled_prompts(clip):
    vision = clip.vision_model
    with pytest.raises(ValueError, match="one tower only"):
        get_peft_model(vision, CaptConfig(coupling="text_to_vision"))
    model = adapted(vision, coupling="none", text_depth=0, vision_depth=3)
    assert model(clip_inputs()["pixel_values"]).pooler_output.shape == (3, 48)


def test_metaclip_2_is_supported():
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "projection_dim": 16,
    }
    config = MetaClip2Config(
        text_config={**shape, "vocab_size": 60, "max_position_embeddings": 20, "eos_token_id": 59, "bos_token_id": 58},
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    base = MetaClip2Model(config).eval()
    inputs = clip_inputs()
    with torch.no_grad():
        expected = base(**inputs).logits_per_image
        model = adapted(base)
        assert not torch.allclose(model(**inputs).logits_per_image, expected, atol=1e-4)
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits_per_image, expected)


@pytest.mark.parametrize("fields", [*({"coupling": coupling} for coupling in COUPLINGS), CLASS_SPECIFIC])
def test_a_new_adapter_leaves_texts_of_the_template_as_they_were(clip, fields):
    inputs = clip_inputs()
    with torch.no_grad():
        expected = clip(**inputs).text_embeds
        model = get_peft_model(clip, CaptConfig(**fields, template_token_ids=TEMPLATE_IDS)).eval()
        torch.testing.assert_close(model(**inputs).text_embeds, expected, atol=1e-5, rtol=0)


def test_a_random_start_is_maples(clip):
    ids = torch.tensor(TEMPLATE_IDS[1:3])
    expected = clip.text_model.embeddings.token_embedding(ids).detach()
    model = get_peft_model(clip, CaptConfig(coupling="none", init="random", template_token_ids=TEMPLATE_IDS))
    text = model.base_model.model.text_model
    assert torch.equal(text.embeddings.token_embedding.capt_prompt["default"], expected)
    deep = torch.cat([text.encoder.layers[i].capt_prompt["default"].flatten() for i in (1, 2, 3)])
    assert 0.01 < deep.std() < 0.03


def test_the_template_is_tokenized_by_the_base_models_tokenizer():
    model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), CaptConfig(template="a photo of the digit {}."))
    tokenizer = AutoTokenizer.from_pretrained(TINY_CLIP)
    expected = tokenizer("a photo of the digit")["input_ids"][:-1]
    assert model.peft_config["default"].template_token_ids == expected


def test_a_base_without_tokenizer_warns_and_starts_at_random(clip, caplog):
    get_peft_model(clip, CaptConfig())
    assert "No tokenizer for the base model (the model has no name): the text prompts start at random" in caplog.text


@pytest.mark.parametrize("eos_token_id", [59, 2], ids=["eos", "legacy eos"])
def test_a_text_whose_end_the_prompts_would_overwrite_is_refused(eos_token_id):
    model = adapted(random_clip(eos_token_id=eos_token_id))
    fits = torch.tensor([[58, 5, 6, 59]])
    model.get_text_features(input_ids=fits)
    for ids in ([[58, 5, 59, 0]], [[58, 5, 59, 59]], [[58, 59]]):
        with pytest.raises(ValueError, match="too short for 2 text prompts"):
            model.get_text_features(input_ids=torch.tensor(ids))


def test_registering_twice_changes_nothing_and_another_class_is_refused():
    register(CaptConfig, CaptModel)

    class Impostor(CaptModel):
        pass

    with pytest.raises(KeyError, match="already has a method named CAPT"):
        register(CaptConfig, Impostor)
    assert PEFT_TYPE_TO_TUNER_MAPPING["CAPT"] is CaptModel
    assert PEFT_TYPE_TO_TUNER_MAPPING[CaptPeftType.CAPT] is CaptModel


def test_the_default_number_of_vision_prompts_suits_the_coupling():
    assert CaptConfig().num_vision_tokens == 8
    assert CaptConfig(coupling="text_to_vision", num_text_tokens=3).num_vision_tokens == 3
