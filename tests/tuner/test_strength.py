"""An adapter's strength: 0 is the base model and 1 the whole adapter, bitwise, and what lies between is continuous."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from helpers import COUPLINGS, TEMPLATE_IDS, adapted, clip_inputs, compiles, random_clip
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from transformers import AutoProcessor, CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from capt_peft import CaptConfig, ZeroShotClassifier, set_strength
from capt_peft.toy import TINY_CLIP
from capt_peft.tuner.fingerprint import adapter_fingerprint

INPUTS = clip_inputs()


def outputs(model):
    with torch.no_grad():
        output = model(**INPUTS)
    return torch.cat([output.text_embeds.flatten(), output.image_embeds.flatten(), output.logits_per_image.flatten()])


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_ends_are_bitwise_the_base_and_the_adapter(coupling, attention):
    base = random_clip()
    base.set_attn_implementation(attention)
    expected = outputs(base)
    model = adapted(base, coupling=coupling)
    whole = outputs(model)
    for strength in (0.3, 0, 0.7, 1, 0):
        model.set_strength(strength)
        outputs(model)
    assert torch.equal(outputs(model), expected)
    model.set_strength(1)
    assert torch.equal(outputs(model), whole)
    assert not torch.equal(whole, expected)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_it_goes_from_the_base_to_the_adapter_without_a_jump(coupling):
    model = adapted(random_clip(), coupling=coupling).double()
    INPUTS64 = {**INPUTS, "pixel_values": INPUTS["pixel_values"].double()}

    def at(strength):
        model.set_strength(strength)
        with torch.no_grad():
            return model(**INPUTS64).logits_per_image

    whole = (at(1) - at(0)).norm()
    # a step of a hundredth of the way, at most so many times the whole way; near the ends it shrinks with the step
    steps = [(at(b / 64) - at(a / 64)).norm() for a, b in pairwise(range(65))]
    assert max(steps) < 0.35 * whole
    for end, sign in ((0, 1), (1, -1)):
        near, nearer = ((at(end + sign * step) - at(end)).norm() for step in (1e-3, 1e-5))
        assert nearer < 0.05 * near
        assert near < 0.2 * whole


def test_a_strength_below_one_acts_on_texts_of_another_template_too():
    base = random_clip()
    expected = outputs(base)
    model = adapted(base, coupling="none", template_token_ids=[TEMPLATE_IDS[0], 9, 9, 9])
    model.set_strength(1e-7)
    assert torch.allclose(outputs(model), expected, atol=1e-4)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_gradients_for_attacks_and_for_tuning_go_through_it(coupling):
    model = adapted(random_clip(), coupling=coupling).double()
    model.set_strength(0.4)
    pixels = INPUTS["pixel_values"].double()
    generator = torch.Generator().manual_seed(0)
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss(pixels):
        return model(input_ids=INPUTS["input_ids"], pixel_values=pixels).logits_per_image.tanh().sum()

    leaf = pixels.clone().requires_grad_()
    gradients = torch.autograd.grad(loss(leaf), [leaf, *tuned])
    directions = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in [leaf, *tuned]]
    step = 1e-6
    for index, (direction, gradient) in enumerate(zip(directions, gradients, strict=True)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                if index:
                    tuned[index - 1].add_(sign * step * direction)
                values.append(loss(pixels + sign * step * direction if index == 0 else pixels))
                if index:
                    tuned[index - 1].sub_(sign * step * direction)
        measured = (values[0] - values[1]) / (2 * step)
        assert measured == pytest.approx(float((gradient * direction).sum()), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("coupling", COUPLINGS[:2])
def test_baked_prompts_have_the_strength_of_coupled_ones(coupling):
    model = adapted(random_clip(), coupling=coupling)
    model.set_strength(0.4)
    before = outputs(model)
    model.base_model.bake()
    assert torch.equal(outputs(model), before)
    assert model.peft_config["default"].strength == 0.4


def test_single_towers():
    model = adapted(random_clip(), coupling="none", text_depth=3, vision_depth=2)
    model.set_strength(0.4)
    with torch.no_grad():
        whole = model(**INPUTS)
    state = {name: tensor for name, tensor in model.get_base_model().state_dict().items() if "capt_" not in name}
    config = {**model.peft_config["default"].to_dict(), "base_model_fingerprint": None}
    for kind, cls, inputs, expected in (
        ("text", CLIPTextModelWithProjection, {"input_ids": INPUTS["input_ids"]}, whole.text_embeds),
        ("vision", CLIPVisionModelWithProjection, {"pixel_values": INPUTS["pixel_values"]}, whole.image_embeds),
    ):
        tower = cls(getattr(random_clip().config, f"{kind}_config")).eval()
        tower.load_state_dict({name.replace(".base_layer.", "."): value for name, value in state.items()}, strict=False)
        tower = get_peft_model(tower, CaptConfig(**config))
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                if "capt_" in name:
                    parameter.copy_(own[name])
            output = tower.eval()(**inputs)
        features = output.text_embeds if kind == "text" else output.image_embeds
        assert torch.allclose(features / features.norm(dim=-1, keepdim=True), expected, atol=1e-6), kind


def test_adapters_have_strengths_of_their_own():
    model = adapted(random_clip(), coupling="none", strength=0.25)
    quarter = outputs(model)
    torch.manual_seed(5)
    model.add_adapter("other", CaptConfig(template_token_ids=TEMPLATE_IDS, num_text_tokens=3, num_vision_tokens=5))
    model.set_adapter("other")
    whole = outputs(model)
    model.set_strength(0.5, "default")
    assert torch.equal(outputs(model), whole)
    model.set_strength(0.5)
    assert not torch.equal(outputs(model), whole)
    model.set_adapter("default")
    assert not torch.equal(outputs(model), quarter)
    set_strength(model, 0.25)
    assert torch.equal(outputs(model), quarter)
    model.delete_adapter("other")
    assert torch.equal(outputs(model), quarter)


@pytest.mark.parametrize("inserted", [False, True], ids=["PEFT", "transformers"])
def test_adapters_and_models_of_one_configuration_have_strengths_of_their_own(inserted):
    config = CaptConfig(template_token_ids=TEMPLATE_IDS, init="normal", init_std=1.0)
    base = random_clip()
    expected = outputs(base)
    if inserted:
        model = base
        model.add_adapter(config, "first")
    else:
        model = get_peft_model(base, config, "first").eval()
    model.add_adapter(*((config, "second") if inserted else ("second", config)))
    other = get_peft_model(random_clip(), config).eval()
    model.set_adapter("first")
    first, whole = outputs(model), outputs(other)
    model.set_adapter("second")
    set_strength(model, 0)
    assert torch.equal(outputs(model), expected)
    model.set_adapter("first")
    assert torch.equal(outputs(model), first)
    assert torch.equal(outputs(other), whole)
    assert [model.peft_config[name].strength for name in ("first", "second")] == [1, 0]
    assert other.peft_config["default"].strength == config.strength == 1


def test_the_configuration_of_a_model_is_what_acts():
    base = random_clip()
    expected = outputs(base)
    model = adapted(base, coupling="text_to_vision")
    model.base_model.bake()
    model.peft_config["default"].strength = 0.0
    assert torch.equal(outputs(model), expected)


def test_it_is_saved_and_every_loader_has_it(saved_clip, tmp_path):
    model = adapted(CLIPModel.from_pretrained(saved_clip), coupling="none")
    before = adapter_fingerprint(model)
    model.set_strength(0.4)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["strength"] == 0.4
    inserted = CLIPModel.from_pretrained(saved_clip)
    inserted.load_adapter(str(tmp_path))
    for loaded in (
        PeftModel.from_pretrained(CLIPModel.from_pretrained(saved_clip), tmp_path),
        PeftModel.from_pretrained(CLIPModel.from_pretrained(saved_clip), tmp_path, low_cpu_mem_usage=True),
        AutoPeftModel.from_pretrained(str(tmp_path)),
        CLIPModel.from_pretrained(tmp_path),
        inserted,
    ):
        assert torch.equal(outputs(loaded.eval()), expected)
        set_strength(loaded, 0)
        assert torch.equal(outputs(loaded), outputs(CLIPModel.from_pretrained(saved_clip)))
    assert adapter_fingerprint(tmp_path) == adapter_fingerprint(model) != before
    model.set_strength(1)
    assert adapter_fingerprint(model) == before


def test_an_adapter_from_before_keeps_its_fingerprint(saved_clip, tmp_path):
    model = adapted(CLIPModel.from_pretrained(saved_clip), coupling="none")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config.pop("strength") == 1
    file.write_text(json.dumps(config))
    assert adapter_fingerprint(tmp_path) == adapter_fingerprint(model)
    assert AutoPeftModel.from_pretrained(str(tmp_path)).peft_config["default"].strength == 1


def test_the_fingerprint_is_that_of_the_versions_before():
    torch.manual_seed(0)
    model = get_peft_model(random_clip(), CaptConfig(template_token_ids=TEMPLATE_IDS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "capt_" in name:
                parameter.fill_(0.5)
    assert adapter_fingerprint(model) == "bb0bdd0a076648f3"  # of a random model by the version that had no strength


def test_copies_and_unloading():
    base = random_clip()
    expected = outputs(base)
    model = adapted(base, coupling="none")
    model.set_strength(0.5)
    half = outputs(model)
    copied = copy.deepcopy(model)
    copied.set_strength(0)
    assert torch.equal(outputs(model), half)
    assert torch.equal(outputs(copied), expected)
    model.set_strength(0)
    copied.set_strength(0.5)
    assert torch.equal(outputs(copied), half)
    model.set_strength(0.5)
    with model.disable_adapter():
        assert torch.equal(outputs(model), expected)
    unloaded = model.unload()
    assert torch.equal(outputs(unloaded), expected)
    assert not any(module._forward_pre_hooks for module in unloaded.modules())


def test_under_autocast_and_activation_checkpointing():
    model = adapted(random_clip(), coupling="none")
    model.set_strength(0.4)
    expected = outputs(model)
    for attention in ("sdpa", "eager"):
        model.get_base_model().set_attn_implementation(attention)
        with torch.autocast("cpu", torch.bfloat16):
            halved = outputs(model).float()
        assert (halved - expected).norm() < 0.05 * expected.norm()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(**INPUTS).logits_per_image.tanh().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@compiles
def test_compiled():
    model = adapted(random_clip(), coupling="none")
    compiled = torch.compile(model.get_base_model(), backend="eager")
    for strength in (0.5, 1, 0.25, 0):
        model.set_strength(strength)
        assert torch.equal(outputs(compiled), outputs(model)), strength


def test_a_classifier_has_a_dial():
    processor = AutoProcessor.from_pretrained(TINY_CLIP)
    model = CLIPModel.from_pretrained(TINY_CLIP)
    classifier = ZeroShotClassifier(model, processor, ["zero", "one"])
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    base = classifier(pixels)
    with pytest.raises(ValueError, match="no CAPT adapter"):
        classifier.strength = 0.5
    classifier = ZeroShotClassifier(adapted(model, coupling="none"), processor, ["zero", "one"])
    assert classifier.strength == 1
    whole = classifier(pixels)
    classifier.strength = 0.5
    assert classifier.strength == classifier.model.peft_config["default"].strength == 0.5
    half = classifier(pixels)
    classifier.strength = 0
    assert torch.equal(classifier(pixels), base)
    classifier.strength = 1
    assert torch.equal(classifier(pixels), whole)
    assert not torch.equal(half, whole)
    assert not torch.equal(half, base)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_strength_out_of_range_is_refused_and_changes_nothing(strength):
    model = adapted(random_clip(), coupling="none")
    before = outputs(model)
    with pytest.raises(ValueError, match=r"must be from 0 .* to 1"):
        model.set_strength(strength)
    with pytest.raises(ValueError, match=r"must be from 0 .* to 1"):
        CaptConfig(strength=strength)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("strength", [True, "0.5", None])
def test_a_strength_of_another_type_is_refused(strength):
    with pytest.raises(TypeError, match="strength"):
        adapted(random_clip(), coupling="none").set_strength(strength)
    with pytest.raises(TypeError, match="strength"):
        CaptConfig(strength=strength)


def test_what_can_have_no_strength_is_refused():
    with pytest.raises(ValueError, match="modules_to_save"):
        CaptConfig(strength=0.5, modules_to_save=["visual_projection"])
    model = adapted(random_clip(), coupling="none", modules_to_save=["visual_projection"])
    with pytest.raises(ValueError, match="modules_to_save"):
        model.set_strength(0)
    model.set_strength(1)
    lora = get_peft_model(random_clip(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="LORA"):
        set_strength(lora, 0.5)
    model = adapted(random_clip(), coupling="none")
    with pytest.raises(ValueError, match="'absent'"):
        model.set_strength(0.5, "absent")
    model.set_strength(0.5)
    model.get_base_model().vision_model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        outputs(model)
