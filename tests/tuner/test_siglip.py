"""CAPT on SigLIP: where its prompts stand, how they start, strength, towers alone, and what is refused."""

import copy
import dataclasses
from itertools import pairwise

import pytest
import torch
from helpers import COUPLINGS, compiles
from peft import AutoPeftModel, PeftModel, get_peft_model, get_peft_model_state_dict
from reference_clip import deep_prompts
from reference_siglip import image_features, text_features
from siglip_models import (
    END,
    TEMPLATE_IDS,
    VOCABULARY,
    random_siglip,
    siglip_adapter,
    siglip_inputs,
    siglip_processor,
    siglip_tokenizer,
)
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPSegConfig,
    CLIPSegModel,
    Siglip2Config,
    Siglip2Model,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
)

from capt_peft import CaptConfig
from capt_peft.tuner import PromptLayer, adapters_off, clip
from capt_peft.tuner.fingerprint import base_fingerprint

INPUTS = siglip_inputs()
CLASSES = ["cat", "red dog", "blue shape"]
SHAPES = [("none", 1, 1, 2, 2), ("none", 3, 2, 1, 3), ("none", 0, 4, 2, 2), ("none", 2, 0, 2, 2)]
SHAPES += [(coupling, 2, 2, 2, 2) for coupling in COUPLINGS[:2]]


def outputs(model, inputs=INPUTS):
    with torch.no_grad():
        output = model(**inputs)
    return torch.cat([output.text_embeds.flatten(), output.image_embeds.flatten(), output.logits_per_image.flatten()])


@pytest.fixture(scope="module")
def saved_siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    random_siglip().save_pretrained(folder)
    siglip_processor().save_pretrained(folder)
    return str(folder)


def largest_error(model, coupling, depth, strength=1.0):
    w = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
    }
    text, vision = deep_prompts(get_peft_model_state_dict(model), coupling, depth, model.config)
    text, vision = ({i: p for i, p in prompts.items() if p is not None} for prompts in (text, vision))
    with torch.no_grad():
        output = model(**INPUTS)
        expected = [text_features(w, ids, text, 3, strength) for ids in INPUTS["input_ids"]]
        expected += [image_features(w, image, vision, 4, strength) for image in INPUTS["pixel_values"]]
    found = torch.cat([output.text_embeds, output.image_embeds])
    return (found - torch.nn.functional.normalize(torch.stack(expected))).abs().max().item()


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize(("coupling", "text_depth", "vision_depth", "text", "vision"), SHAPES)
def test_features_equal_an_independent_computation(coupling, text_depth, vision_depth, text, vision, strength):
    model = siglip_adapter(
        random_siglip(),
        coupling=coupling,
        text_depth=text_depth,
        vision_depth=vision_depth,
        num_text_tokens=text,
        num_vision_tokens=vision,
        strength=strength,
    )
    assert largest_error(model, coupling, (text_depth, vision_depth), strength) < 1e-5


def test_the_oracle_notices_a_prompt_at_another_place_and_one_that_is_pooled():
    model = siglip_adapter(random_siglip(), text_depth=3, vision_depth=3)
    base = model.get_base_model()
    layer = base.text_model.encoder.layers[2]
    layer.site, site = dataclasses.replace(layer.site, start=1), layer.site
    assert largest_error(model, "none", (3, 3)) > 1e-3
    layer.site = site
    assert largest_error(model, "none", (3, 3)) < 1e-5
    base.vision_model.embeddings.hooks[-1].remove()
    assert largest_error(model, "none", (3, 3)) > 1e-3


# --------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("family", [1, 2])
def test_texts_are_lower_case_and_padded_to_the_full_length_by_the_tokenizers_own_token(family):
    texts = ["A photo of a CAT.", "a photo of a cat."]
    inputs = clip.tokenize(random_siglip(), siglip_tokenizer(family), texts)
    dot = [] if family == 1 else [VOCABULARY["."]]
    words = [*TEMPLATE_IDS, VOCABULARY["cat"], *dot, END]
    expected = [*words, *[END if family == 1 else 0] * (12 - len(words))]
    assert list(inputs) == ["input_ids"]  # no mask: it was trained without
    assert inputs["input_ids"].tolist() == [expected, expected]


def test_published_configurations_name_clips_end_token_and_are_not_believed():
    model = random_siglip()
    assert model.config.text_config.eos_token_id == 49407
    assert clip.end_token(model) == END
    model.config.text_config.eos_token_id = 7
    assert clip.end_token(model) == 7


def test_prompts_that_would_overwrite_the_end_of_a_text_are_refused():
    model = siglip_adapter(random_siglip(), num_text_tokens=3)
    ids = torch.full((1, 12), END)
    ids[0, :3] = torch.tensor(TEMPLATE_IDS[:3])
    model.get_base_model().get_text_features(input_ids=ids)
    ids[0, 2] = END
    with pytest.raises(ValueError, match="replace its first 3 words"):
        model.get_base_model().get_text_features(input_ids=ids)


def test_a_tokenizer_of_another_model_is_refused():
    model = random_siglip()
    clip.check_tokenizer(siglip_tokenizer(), model, "here")
    model.config.text_config.vocab_size = 5
    with pytest.raises(ValueError, match="tokenizer of here does not belong"):
        clip.check_tokenizer(siglip_tokenizer(), model, "here")


# ------------------------------------------------------------------------------------------------------- the start


def changes(folder, **config):
    base = SiglipModel.from_pretrained(folder)
    expected = outputs(base)
    model = get_peft_model(base, CaptConfig(vision_depth=0, template="a photo of a {}.", **config)).eval()
    return (outputs(model) - expected).abs().max().item(), model


def test_class_specific_prompts_leave_the_texts_of_their_classes_as_they_were(saved_siglip):
    change, model = changes(saved_siglip, class_specific=True, class_names=CLASSES)
    assert change < 1e-5
    assert model.peft_config["default"].template_token_ids == TEMPLATE_IDS


def test_prompts_of_the_input_alone_leave_every_text_as_it_was(saved_siglip):
    assert changes(saved_siglip, text_depth=1)[0] < 1e-6


def test_shared_prompts_start_from_the_mean_of_the_states_in_the_texts_of_the_classes(saved_siglip):
    _, model = changes(saved_siglip, class_names=CLASSES)
    with torch.no_grad(), adapters_off(model):
        text_model = model.get_base_model().text_model
        states = text_model(input_ids=INPUTS["input_ids"], output_hidden_states=True).hidden_states
    for i in (1, 2):
        start = text_model.encoder.layers[i].capt_prompt["default"]
        torch.testing.assert_close(start, states[i][:, :2].mean(0), atol=1e-6, rtol=0)
    assert torch.equal(
        text_model.embeddings.token_embedding.capt_prompt["default"], states_of("a", "photo", text_model)
    )


def states_of(*words_and_tower):
    *words, tower = words_and_tower
    return tower.embeddings.token_embedding.base_layer.weight[[VOCABULARY[word] for word in words]]


def test_a_new_adapter_is_nearer_to_the_base_than_a_random_one_and_always_the_same(saved_siglip):
    names, other = {"class_names": CLASSES}, {"template_token_ids": TEMPLATE_IDS}
    torch.manual_seed(0)
    template, without_names, random = (
        changes(saved_siglip, **config)[0] for config in (names, {}, {**names, "init": "random", "init_std": 1.0})
    )
    assert template < 0.5 * random
    assert without_names < 0.5 * random
    assert changes(saved_siglip, **names)[0] == template == changes(saved_siglip, **names, **other)[0]


def test_ids_alone_are_enough_for_a_start():
    torch.manual_seed(0)
    starts = []
    for _ in range(2):
        model = get_peft_model(random_siglip(), CaptConfig(template_token_ids=TEMPLATE_IDS))
        starts.append([v for k, v in get_peft_model_state_dict(model).items() if "text_model" in k])
    assert len(starts[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


# --------------------------------------------------------------------------------------- off, strength, loading, towers


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_off_is_bitwise_the_base_and_strength_goes_there_without_a_jump(coupling, attention):
    base = random_siglip().requires_grad_(
        False
    )  # torch's pooling attention rounds otherwise where weights need gradients
    base.set_attn_implementation(attention)
    expected, fingerprint = outputs(base), base_fingerprint(base)
    model = siglip_adapter(base, coupling=coupling, text_depth=2, vision_depth=2)
    whole = outputs(model)
    assert base_fingerprint(model) == fingerprint
    with adapters_off(model):
        assert torch.equal(outputs(model), expected)
    with model.disable_adapter():
        assert torch.equal(outputs(model), expected)

    def at(strength):
        model.set_strength(strength)
        return outputs(model)

    assert torch.equal(at(0), expected)
    distance = (whole - expected).norm()
    assert (at(1e-4) - expected).norm() < 0.02 * distance
    assert (at(1 - 1e-4) - whole).norm() < 0.02 * distance
    assert max((at(b / 32) - at(a / 32)).norm() for a, b in pairwise(range(33))) < 0.4 * distance
    assert torch.equal(at(1), whole)
    copied = copy.deepcopy(model)
    copied.set_strength(0)
    assert torch.equal(outputs(copied), expected)
    assert torch.equal(outputs(model), whole)
    unloaded = model.unload()
    assert torch.equal(outputs(unloaded), expected)
    assert not any(module._forward_pre_hooks for module in unloaded.modules())


def test_several_adapters_leave_the_pooling_with_as_many_prompts_as_they_have():
    model = siglip_adapter(random_siglip(), num_vision_tokens=3, text_depth=0)
    three = outputs(model)
    torch.manual_seed(2)
    model.add_adapter("other", CaptConfig(num_vision_tokens=1, text_depth=0))
    model.set_adapter("other")
    one = outputs(model)
    model.set_adapter("default")
    assert torch.equal(outputs(model), three)
    assert not torch.equal(one, three)
    model.delete_adapter("other")
    assert torch.equal(outputs(model), three)


def test_every_loader_gives_the_same_adapter_back(saved_siglip, tmp_path):
    model = siglip_adapter(SiglipModel.from_pretrained(saved_siglip), strength=0.6)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    inserted = SiglipModel.from_pretrained(saved_siglip)
    inserted.load_adapter(str(tmp_path))
    for loaded in (
        PeftModel.from_pretrained(SiglipModel.from_pretrained(saved_siglip), tmp_path),
        PeftModel.from_pretrained(SiglipModel.from_pretrained(saved_siglip), tmp_path, low_cpu_mem_usage=True),
        AutoPeftModel.from_pretrained(str(tmp_path)),
        SiglipModel.from_pretrained(tmp_path),
        inserted,
    ):
        assert torch.equal(outputs(loaded.eval()), expected)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_baked_prompts_are_bitwise_the_same_and_load_into_each_tower_alone(saved_siglip, coupling, tmp_path, caplog):
    model = siglip_adapter(SiglipModel.from_pretrained(saved_siglip), coupling=coupling, text_depth=3, vision_depth=3)
    expected = outputs(model)
    model.bake()
    assert torch.equal(outputs(model), expected)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        whole = model(**INPUTS)
        text = PeftModel.from_pretrained(SiglipTextModel.from_pretrained(saved_siglip), str(tmp_path))
        vision = PeftModel.from_pretrained(SiglipVisionModel.from_pretrained(saved_siglip), str(tmp_path))
        texts = text(input_ids=INPUTS["input_ids"]).pooler_output
        images = vision(pixel_values=INPUTS["pixel_values"]).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(texts), whole.text_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.nn.functional.normalize(images), whole.image_embeds, atol=1e-6, rtol=0)
    assert "fingerprint" not in caplog.text


def test_gradients_of_pixels_and_prompts_are_those_of_finite_differences():
    model = siglip_adapter(random_siglip(), strength=0.6).double()
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    leaves = [INPUTS["pixel_values"].double().requires_grad_(), *tuned]
    generator = torch.Generator().manual_seed(0)

    def loss():
        return model(input_ids=INPUTS["input_ids"], pixel_values=leaves[0]).logits_per_image.tanh().sum()

    gradients = torch.autograd.grad(loss(), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        direction, values = torch.randn(leaf.shape, generator=generator, dtype=torch.float64), []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                leaf.add_(step * direction)
                values.append(loss())
            leaf.add_(1e-6 * direction)
        measured = (values[0] - values[1]) / 2e-6
        assert measured.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-7)


@compiles
def test_compiled():
    model = siglip_adapter(random_siglip(text_layers=1, vision_layers=1))
    compiled = torch.compile(model.get_base_model(), backend="eager")
    for strength in (0.5, 1):
        model.set_strength(strength)
        torch.testing.assert_close(outputs(compiled), outputs(model), atol=1e-6, rtol=0)


# -------------------------------------------------------------------------------------------------------- refusals

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**TINY, "image_size": 16, "patch_size": 8}
NEIGHBOURS = {
    "NaFlex": lambda: Siglip2Model(Siglip2Config(text_config={**TINY, "vocab_size": 50}, vision_config={**TINY})),
    "ChineseCLIP": lambda: ChineseCLIPModel(ChineseCLIPConfig(text_config={**TINY, "vocab_size": 50}, vision_config=VISION)),
    "AltCLIP": lambda: AltCLIPModel(AltCLIPConfig(text_config={**TINY, "vocab_size": 50}, vision_config=VISION)),
    "CLIPSeg": lambda: CLIPSegModel(CLIPSegConfig(text_config={**TINY, "vocab_size": 50}, vision_config=VISION)),
}  # fmt: skip


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_models_that_are_near_are_refused_by_name(name):
    model = NEIGHBOURS[name]()
    match = f"does not support {type(model).__name__}" + (".*fixed resolution" if name == "NaFlex" else "")
    with pytest.raises(ValueError, match=match):
        get_peft_model(model, CaptConfig(template_token_ids=TEMPLATE_IDS))
    assert not any(isinstance(module, PromptLayer) for module in model.modules())


def test_nothing_is_said_to_be_experimental(caplog):
    siglip_adapter(random_siglip())
    assert not caplog.records
