"""What users of PEFT do with adapters: save, load, switch, disable, delete, unload, compile."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from helpers import COUPLINGS, TEMPLATE_IDS, adapted, clip_inputs, compiles, shake
from peft import (
    AutoPeftModel,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from capt_peft import CaptConfig, CaptModel

PROMPTS = [
    *(pytest.param({"coupling": coupling}, id=coupling) for coupling in COUPLINGS),
    pytest.param(
        {"coupling": "none", "class_specific": True, "class_names": ["cat", "dog", "cow"]}, id="class_specific"
    ),
]


def logits(model):
    with torch.no_grad():
        return model(**clip_inputs()).logits_per_image


@pytest.fixture(params=PROMPTS)
def saved(request, saved_clip, tmp_path):
    """A saved adapter, the base it belongs to, and the logits it gave."""
    model = adapted(CLIPModel.from_pretrained(saved_clip), **request.param)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), saved_clip, logits(model)


def test_a_loaded_adapter_gives_bitwise_the_same(saved):
    adapter, base, expected = saved
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), adapter)
    assert isinstance(model.base_model, CaptModel)
    assert torch.equal(logits(model), expected)


def test_auto_peft_model_finds_the_base_by_itself(saved):
    adapter, _, expected = saved
    assert torch.equal(logits(AutoPeftModel.from_pretrained(adapter)), expected)


def test_clip_model_from_pretrained_takes_an_adapter(saved):
    adapter, _, expected = saved
    assert torch.equal(logits(CLIPModel.from_pretrained(adapter)), expected)


def test_transformers_can_load_it_into_a_model(saved):
    adapter, base, expected = saved
    model = CLIPModel.from_pretrained(base)
    model.load_adapter(adapter, adapter_name="robust")
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(CLIPModel.from_pretrained(base)))
    model.enable_adapters()
    model.delete_adapter("robust")
    assert torch.equal(logits(model), logits(CLIPModel.from_pretrained(base)))


def test_low_cpu_memory_loading_gives_bitwise_the_same(saved):
    adapter, base, expected = saved
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), adapter, low_cpu_mem_usage=True)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("saved", PROMPTS[:1], indirect=True)
def test_a_fresh_process_gives_bitwise_the_same(saved, tmp_path):
    adapter, base, expected = saved
    torch.save({"inputs": clip_inputs(), "expected": expected}, tmp_path / "expected.pt")
    script = (
        "import sys, torch, capt_peft\n"
        "from peft import PeftModel\n"
        "from transformers import CLIPModel\n"
        "torch.set_num_threads(int(sys.argv[4]))\n"
        "saved = torch.load(sys.argv[3], weights_only=True)\n"
        "model = PeftModel.from_pretrained(CLIPModel.from_pretrained(sys.argv[2]), sys.argv[1])\n"
        "with torch.no_grad(): logits = model(**saved['inputs']).logits_per_image\n"
        "sys.exit(0 if torch.equal(logits, saved['expected']) else 3)\n"
    )
    arguments = [adapter, base, str(tmp_path / "expected.pt"), str(torch.get_num_threads())]
    assert subprocess.run([sys.executable, "-c", script, *arguments], check=False).returncode == 0


def test_the_file_holds_the_prompts_and_nothing_else(saved):
    adapter, base, _ = saved
    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), adapter, is_trainable=True)
    assert sum(t.numel() for t in tensors.values()) == model.get_nb_trainable_parameters()[0]
    assert all(".capt_" in name for name in tensors)


def test_the_config_survives_a_round_trip(saved):
    adapter, _, _ = saved
    config = PeftConfig.from_pretrained(adapter)
    assert isinstance(config, CaptConfig)
    assert config.peft_type == "CAPT"
    assert (config.text_depth, config.vision_depth) == ((4, 5) if config.coupling == "none" else (4, 4))
    assert config.template_token_ids == TEMPLATE_IDS
    config.save_pretrained(adapter)
    assert PeftConfig.from_pretrained(adapter) == config


def test_a_config_from_a_newer_version_loads_with_a_warning(saved):
    adapter, base, expected = saved
    path = f"{adapter}/adapter_config.json"
    with open(path) as file:
        content = json.load(file)
    with open(path, "w") as file:
        json.dump({**content, "invented_tomorrow": 1}, file)
    with pytest.warns(UserWarning, match="invented_tomorrow"):
        model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), adapter)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_a_disabled_adapter_leaves_the_base_bitwise(clip, prompts):
    expected = logits(copy.deepcopy(clip))
    model = adapted(clip, **prompts)
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(model), expected, atol=1e-3)


def test_disabling_does_not_make_a_loaded_adapter_trainable(saved):
    adapter, base, _ = saved
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), adapter)
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in model.parameters())


def test_two_adapters_of_different_shape_are_switched(clip):
    model = adapted(clip, coupling="text_to_vision", text_depth=3, vision_depth=3)
    first = logits(model)
    config = CaptConfig(
        coupling="none",
        num_text_tokens=3,
        num_vision_tokens=1,
        text_depth=2,
        vision_depth=5,
        template_token_ids=TEMPLATE_IDS,
    )
    model.add_adapter("other", config)
    model.set_adapter("other")
    shake(model, seed=7)
    other = logits(model.eval())
    assert not torch.allclose(first, other, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), other)
    assert not any(".default" in name for name in model.state_dict())


def test_a_second_adapter_starts_from_the_base_not_from_the_first(clip):
    model = adapted(clip, coupling="none")
    model.add_adapter("fresh", CaptConfig(coupling="none", template_token_ids=TEMPLATE_IDS))
    model.set_adapter("fresh")
    inputs = clip_inputs()
    with torch.no_grad():
        fresh = model(**inputs).text_embeds
        with model.disable_adapter():
            base = model(**inputs).text_embeds
    torch.testing.assert_close(fresh, base, atol=1e-6, rtol=0)


def test_two_adapters_at_once_are_refused(clip):
    model = adapted(clip)
    model.add_adapter("other", CaptConfig(template_token_ids=TEMPLATE_IDS))
    with pytest.raises(ValueError, match="one active adapter at a time"):
        model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize("prompts", PROMPTS)
def test_unload_gives_the_base_back(clip, prompts):
    expected, names = logits(copy.deepcopy(clip)), set(clip.state_dict())
    unloaded = adapted(clip, **prompts).unload()
    assert torch.equal(logits(unloaded), expected)
    assert set(unloaded.state_dict()) == names


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused(clip, merge):
    with pytest.raises(ValueError, match="cannot be merged"):
        getattr(adapted(clip), merge)()


@pytest.mark.parametrize("coupling", ["text_to_vision", "vision_to_text"])
def test_baked_prompts_give_bitwise_the_same_and_are_small(saved_clip, coupling, tmp_path):
    model = adapted(CLIPModel.from_pretrained(saved_clip), coupling=coupling)
    expected, size = logits(model), model.get_nb_trainable_parameters()[0]
    model.bake()
    assert torch.equal(logits(model), expected)
    assert model.get_nb_trainable_parameters()[0] == 4 * 2 * (32 + 48) < size / 10
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(CLIPModel.from_pretrained(saved_clip), str(tmp_path))
    assert torch.equal(logits(reloaded), expected)


def test_a_baked_adapter_loads_into_each_tower_alone(saved_clip, tmp_path, caplog):
    both = adapted(CLIPModel.from_pretrained(saved_clip))
    both.bake()
    both.save_pretrained(tmp_path)
    inputs = clip_inputs()
    with torch.no_grad():
        whole = both(**inputs)
        vision = PeftModel.from_pretrained(_tower(CLIPVisionModelWithProjection, saved_clip), str(tmp_path))
        image = vision(pixel_values=inputs["pixel_values"]).image_embeds
        text_model = PeftModel.from_pretrained(_tower(CLIPTextModelWithProjection, saved_clip), str(tmp_path))
        text = text_model(input_ids=inputs["input_ids"]).text_embeds
    torch.testing.assert_close(torch.nn.functional.normalize(image), whole.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.nn.functional.normalize(text), whole.text_embeds, atol=1e-6, rtol=0)
    assert "fingerprint" not in caplog.text


def _tower(tower_class, base):
    return tower_class.from_pretrained(base)


def test_baking_an_unknown_adapter_is_refused(clip):
    with pytest.raises(ValueError, match="no adapter 'nope'"):
        adapted(clip).base_model.bake("nope")


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(clip, prompts, reentrant):
    model = adapted(clip, **prompts).train()

    def gradients():
        model.zero_grad()
        output = model(**clip_inputs())
        (output.logits_per_image.sum() + output.image_embeds[:, 0].sum()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    if reentrant:
        model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed = gradients()
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases_keep_float32_prompts(clip, dtype):
    model = adapted(clip.to(dtype), coupling="text_to_vision")
    inputs = clip_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    output = model(**inputs)
    assert output.logits_per_image.dtype == dtype
    assert torch.isfinite(output.logits_per_image).all()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trainable)
    output.logits_per_image.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable)


def test_autocast_gives_nearly_the_same(clip):
    model = adapted(clip)
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(model) - expected).abs().max() < 0.05 * expected.abs().max() + 0.1


@compiles
@pytest.mark.parametrize("prompts", [PROMPTS[0], PROMPTS[-1]])
def test_torch_compile_finds_one_graph_without_a_break(clip, prompts):
    model = adapted(clip, **prompts)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = compiled(**clip_inputs()).logits_per_image
    torch.testing.assert_close(actual, logits(model), atol=1e-4, rtol=1e-4)


def test_low_level_injection_works(clip):
    config = CaptConfig(num_vision_tokens=2, template_token_ids=TEMPLATE_IDS)
    source = adapted(copy.deepcopy(clip), coupling="none")
    model = inject_adapter_in_model(config, clip)
    set_peft_model_state_dict(model, get_peft_model_state_dict(source))
    assert torch.equal(logits(model.eval()), logits(source))


def test_modules_to_save_are_trained_and_saved(saved_clip, tmp_path):
    model = adapted(CLIPModel.from_pretrained(saved_clip), modules_to_save=["visual_projection"])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(CLIPModel.from_pretrained(saved_clip), str(tmp_path))
    assert torch.equal(logits(reloaded), expected)


def test_a_copied_model_maps_its_own_prompts(clip):
    model = adapted(clip)
    twin = copy.deepcopy(model)
    expected = logits(model)
    shake(twin, seed=9)
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(twin), expected, atol=1e-3)


def test_only_the_prompts_are_trained(clip):
    before = {name: p.clone() for name, p in clip.named_parameters()}
    model = adapted(clip).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**clip_inputs()).logits_per_image.sum().backward()
    optimizer.step()
    after = dict(model.unload().named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_status_and_tags_name_the_method(clip, tmp_path):
    model = adapted(clip)
    status = model.get_model_status()
    assert status.peft_types == {"default": "CAPT"}
    assert status.active_adapters == ["default"]
    model.save_pretrained(tmp_path)
    with open(tmp_path / "adapter_config.json") as file:
        assert json.load(file)["peft_type"] == "CAPT"


@pytest.mark.parametrize("coupling", ["text_to_vision", "vision_to_text"])
@pytest.mark.parametrize("init", ["template", "random"])
def test_a_coupled_adapter_of_either_start_is_loaded_again(coupling, init, saved_clip, tmp_path):
    model = adapted(CLIPModel.from_pretrained(saved_clip), coupling=coupling, init=init, num_text_tokens=2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(CLIPModel.from_pretrained(saved_clip), tmp_path).eval()
    inputs = clip_inputs()
    assert torch.equal(again(**inputs).logits_per_image, model(**inputs).logits_per_image)
