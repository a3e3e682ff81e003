"""What cannot work, or would act unseen, is refused by name: leftovers on the base, PEFT's options, huge files and values."""

import json
import struct
import time

import pytest
import torch
from helpers import Quantised, adapted, clip_inputs, random_clip
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from capt_peft import CaptConfig
from capt_peft.tuner.fingerprint import base_fingerprint, tensors_fingerprint
from capt_peft.tuner.loading import MAX_HEADER

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
HUGE = "x" * 17_000_000
MESSAGE = 1500  # characters of the longest message


# --------------------------------------------------------------------------------------------------- leftovers on the base


@pytest.mark.parametrize("first", [CaptConfig(text_depth=4, vision_depth=4), CaptConfig(modules_to_save=["text_projection"]),
                                   LoraConfig(target_modules=["q_proj"])])  # fmt: skip
def test_a_second_adapter_of_a_name_on_the_same_base_is_refused_and_the_first_left_alone(first):
    base = random_clip()
    model = get_peft_model(base, first).eval()
    with torch.no_grad():
        expected = model(**clip_inputs()).logits_per_image
    with pytest.raises(ValueError, match="still has an adapter 'default'"):
        get_peft_model(base, CaptConfig(text_depth=1, vision_depth=1))
    assert model.peft_config["default"] is first and model.base_model.peft_config["default"] is first
    with torch.no_grad():
        assert torch.equal(model(**clip_inputs()).logits_per_image, expected)


@pytest.mark.parametrize("way", ["unloaded", "of another name"])
def test_old_prompts_never_act_beside_new_ones(way):
    new = {"text_depth": 1, "vision_depth": 1, "coupling": "none", "modules_to_save": ["visual_projection"]}
    reference, base = adapted(random_clip(), seed=2, **new), random_clip()
    old = adapted(base, text_depth=4, vision_depth=4, modules_to_save=["text_projection"])
    name = "default" if way == "unloaded" else "new"
    model = adapted(old.unload() if way == "unloaded" else base, adapter_name=name, **new)
    set_peft_model_state_dict(model, get_peft_model_state_dict(reference), adapter_name=name)
    with torch.no_grad():
        assert torch.equal(model(**clip_inputs()).logits_per_image, reference(**clip_inputs()).logits_per_image)


def test_unload_gives_back_the_base_model_without_modules_to_save():
    with torch.no_grad():
        expected = random_clip()(**clip_inputs()).logits_per_image
        base = adapted(random_clip(), modules_to_save=["text_projection"]).unload()
        assert torch.equal(base(**clip_inputs()).logits_per_image, expected)


# ------------------------------------------------------------------------------------------------------------ adapter names


@pytest.mark.parametrize("name", ["half", "train", "items", "keys", "_keys", "_modules", "a.b", ""])
def test_a_name_that_torch_cannot_hold_is_refused_before_anything_changes(name):
    base = random_clip()
    modules = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=rf"cannot have the name {name!r}, which .* Give it another \(adapter_name="):
        get_peft_model(base, CaptConfig(), adapter_name=name)
    assert [type(module) for module in base.modules()] == modules
    model = adapted(base).eval()
    with torch.no_grad():
        expected = model(**clip_inputs()).logits_per_image
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot have the name"):
        model.add_adapter(name, CaptConfig(text_depth=1, vision_depth=1))
    assert [*model.peft_config] == ["default"] and model.active_adapter == "default"
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    with torch.no_grad():
        assert torch.equal(model(**clip_inputs()).logits_per_image, expected)


@pytest.mark.parametrize("name", ["capt_v2", "capt_prompt", "prompt", "weight", "original_module"])
def test_an_adapter_may_have_the_name_of_a_tensor(name, tmp_path):
    model = adapted(random_clip(), adapter_name=name, coupling="text_to_vision").eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(random_clip(), str(tmp_path / name), adapter_name=name)
    with torch.no_grad():
        assert torch.equal(loaded(**clip_inputs()).logits_per_image, model(**clip_inputs()).logits_per_image)


# ------------------------------------------------------------------------------------------------------------ PEFT's options


def test_adapter_names_in_a_forward_are_refused_by_name():
    model = adapted(random_clip())
    with pytest.raises(ValueError, match="CAPT has one active adapter"):
        model(**clip_inputs(), adapter_names=["default", "__base__", "default"])
    model(**clip_inputs())


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "SEQ_CLS"])
def test_task_types_are_refused(task):
    with pytest.raises(ValueError, match=r"Leave it out \(None\)"):
        CaptConfig(task_type=task)


def test_saving_as_a_pickle_is_refused(tmp_path):
    model = adapted(random_clip())
    with pytest.raises(ValueError, match="is a pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    model.save_pretrained(tmp_path)  # a safetensors file beside it is what is loaded
    PeftModel.from_pretrained(random_clip(), str(tmp_path))


# ------------------------------------------------------------------------------------------------------- quantised base models


def test_a_base_whose_weights_are_kept_in_parts_gets_an_adapter():
    values = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    quantised = Quantised(values)
    assert tensors_fingerprint([("w", quantised)]) == tensors_fingerprint([("w", quantised.dequantize())])
    model = random_clip()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(Quantised(module.weight.data), requires_grad=False)
    assert base_fingerprint(model) == base_fingerprint(adapted(model)) is not None
    model(**clip_inputs())


# ------------------------------------------------------------------------------------------------------ huge files and values


def test_a_huge_list_of_tensors_is_refused_before_it_is_parsed(tmp_path):
    adapted(random_clip()).save_pretrained(tmp_path)
    header = json.dumps(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(40_000)}
    ).encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    start = time.process_time()
    with pytest.raises(ValueError, match="is not an adapter: the list of its tensors has"):
        PeftModel.from_pretrained(random_clip(), str(tmp_path))
    assert time.process_time() - start < 5


def test_real_adapters_stay_far_below_the_bound(tmp_path):
    names = [f"class {i}" for i in range(1000)]
    modules = ["text_projection", "visual_projection", "mlp", "self_attn", "layer_norm1", "layer_norm2"]
    config = CaptConfig(class_names=names, class_specific=True, modules_to_save=modules, text_depth=1, vision_depth=1)
    get_peft_model(random_clip(), config).save_pretrained(tmp_path)
    (header,) = struct.unpack("<Q", (tmp_path / WEIGHTS).read_bytes()[:8])
    assert header * 12 < MAX_HEADER / 2  # 4 and 5 layers here, at most 24 of a ViT-L
    PeftModel.from_pretrained(random_clip(), str(tmp_path))


def test_a_huge_configuration_is_refused_before_it_is_parsed(tmp_path):
    adapted(random_clip()).save_pretrained(tmp_path)
    (tmp_path / SETTINGS).write_text(json.dumps({"peft_type": "CAPT", "template": HUGE}))
    with pytest.raises(ValueError, match="bytes; up to") as caught:
        PeftModel.from_pretrained(random_clip(), str(tmp_path))
    assert len(str(caught.value)) < MESSAGE


def test_messages_about_settings_are_bounded_whatever_the_value():
    fields = ("num_text_tokens", "num_vision_tokens", "text_depth", "vision_depth", "coupling", "template", "init", "init_std",
              "template_token_ids", "class_names", "class_specific", "base_model_fingerprint", "target_modules",
              "modules_to_save", "task_type", "auto_mapping", "base_model_name_or_path", "revision")  # fmt: skip
    values = (HUGE[:2_000_000], 10**4000, [HUGE[:2_000_000]], [1] * 100_000 + ["a"], {"a": HUGE[:2_000_000]})
    refused = 0
    for name in fields:
        for value in values:
            try:
                CaptConfig(**{name: value})
            except (TypeError, ValueError) as error:
                refused += 1
                assert len(str(error)) < MESSAGE, (name, type(value))
    assert refused > len(fields) * 3


@pytest.mark.parametrize("field", ["modules_to_save", "template", "class_names", "adapter"])
def test_messages_about_models_are_bounded_whatever_the_names(tmp_path, field):
    name = HUGE[: MAX_HEADER // 2]
    model = adapted(random_clip())
    with pytest.raises(ValueError) as caught:
        if field == "adapter":
            model.save_pretrained(tmp_path)
            save_file({name: torch.zeros(1)}, tmp_path / WEIGHTS)
            PeftModel.from_pretrained(random_clip(), str(tmp_path))
        elif field == "class_names":
            classes = {"class_specific": True, "class_names": [name, "b"], "coupling": "none"}
            adapted(random_clip(), **classes)(**clip_inputs())
        elif field == "template":
            CaptConfig(template=name)
        else:
            get_peft_model(random_clip(), CaptConfig(modules_to_save=[name]))
    assert len(str(caught.value)) < MESSAGE
