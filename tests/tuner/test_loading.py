"""Damaged, foreign and hostile adapters are refused, and nothing of them is loaded."""

import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TEMPLATE_IDS, adapted, clip_inputs, random_clip
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from capt_peft import CaptConfig
from capt_peft.tuner.fingerprint import base_fingerprint

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(saved_clip, tmp_path):
    adapted(CLIPModel.from_pretrained(saved_clip)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(adapter, change):
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)


def first(tensors):
    return sorted(name for name in tensors if "capt_proj.weight" in name)[0]


def set_nan(tensors):
    tensors[first(tensors)][0, 0] = float("nan")


def lose_one(tensors):
    del tensors[first(tensors)]


def add_one(tensors):
    tensors["base_model.model.text_model.encoder.layers.9.capt_prompt"] = torch.zeros(2, 32)


def reshape_one(tensors):
    tensors[first(tensors)] = torch.zeros(3, 3)


def make_integer(tensors):
    tensors[first(tensors)] = tensors[first(tensors)].to(torch.int32)


def refused(adapter, base, words):
    """Every way of PEFT to load it raises the same clear error, and the model it was meant for is as it was."""
    for load in (
        lambda: PeftModel.from_pretrained(CLIPModel.from_pretrained(base), str(adapter)),
        lambda: PeftModel.from_pretrained(CLIPModel.from_pretrained(base), str(adapter), low_cpu_mem_usage=True),
        lambda: AutoPeftModel.from_pretrained(str(adapter)),
        lambda: _load_as_second(base, adapter),
    ):
        with pytest.raises(ValueError) as caught:
            load()
        assert words in str(caught.value)
        assert str(adapter) in str(caught.value)


def _load_as_second(base, adapter):
    model = adapted(CLIPModel.from_pretrained(base))
    model.load_adapter(str(adapter), adapter_name="second")


@pytest.mark.parametrize("share", [0, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_named(adapter, saved_clip, share):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[: int(len(content) * share)])
    refused(adapter, saved_clip, "not a whole safetensors file")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_nan, "NaN or infinite"),
        (lose_one, "lacks 1 tensor"),
        (add_one, "has unexpectedly 1 tensor (base_model.model.text_model.encoder.layers.9.capt_prompt)"),
        (reshape_one, "has the shape (3, 3)"),
        (make_integer, "not floating point"),
    ],
)
def test_wrong_tensors_are_named(adapter, saved_clip, change, words):
    edit(adapter, change)
    refused(adapter, saved_clip, words)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_is_refused_and_never_run(adapter, saved_clip, tmp_path):
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    refused(adapter, saved_clip, "reads no pickles")
    assert not (tmp_path / "ran").exists()


def test_transformers_own_loading_refuses_prompts_that_are_not_finite(adapter):
    edit(adapter, set_nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        CLIPModel.from_pretrained(adapter)


def test_transformers_own_loading_refuses_wrong_shapes_and_truncated_files(adapter):
    shutil.copytree(adapter, adapter.parent / "short")
    path = adapter.parent / "short" / WEIGHTS
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(Exception, match=r"(?i)header|safetensors|incomplete"):
        CLIPModel.from_pretrained(path.parent)
    edit(adapter, reshape_one)
    with pytest.raises(RuntimeError):
        CLIPModel.from_pretrained(adapter)


def test_a_folder_with_a_configuration_alone_still_gives_its_configuration(adapter):
    (adapter / WEIGHTS).unlink()
    assert CaptConfig.from_pretrained(str(adapter)).coupling == "text_to_vision"


def test_another_base_model_is_a_warning_that_names_both(adapter, saved_clip, caplog):
    fingerprint = CaptConfig.from_pretrained(str(adapter)).base_model_fingerprint
    other = random_clip(seed=5)
    with caplog.at_level(logging.WARNING, "capt_peft"):
        PeftModel.from_pretrained(other, str(adapter))
    assert fingerprint in caplog.text
    assert base_fingerprint(random_clip(seed=5)) in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "capt_peft"):
        PeftModel.from_pretrained(CLIPModel.from_pretrained(saved_clip), str(adapter))
    assert not caplog.text


def test_the_fingerprint_sees_the_base_weights_and_nothing_else(clip):
    before = base_fingerprint(clip)
    assert base_fingerprint(random_clip().half().float()) != before
    halved = random_clip().half()
    assert base_fingerprint(halved) == base_fingerprint(halved.float())
    model = adapted(clip, modules_to_save=["visual_projection"])
    assert model.peft_config["default"].base_model_fingerprint == before
    assert base_fingerprint(model.base_model.model) == before
    with torch.no_grad():
        clip.logit_scale.add_(1e-3)
    assert base_fingerprint(clip) != before


def test_a_meta_model_has_no_fingerprint():
    with torch.device("meta"):
        assert base_fingerprint(torch.nn.Linear(2, 2)) is None


def test_an_adapter_cannot_pretend_to_be_another_shape(adapter, saved_clip):
    config = CaptConfig.from_pretrained(str(adapter))
    config.num_text_tokens = config.num_vision_tokens = 3
    config.save_pretrained(adapter)
    refused(adapter, saved_clip, "has the shape (2, 32)")


def test_a_loaded_adapter_ignores_no_template(adapter, saved_clip):
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(saved_clip), str(adapter))
    assert model.peft_config["default"].template_token_ids == TEMPLATE_IDS
    with torch.no_grad():
        assert torch.isfinite(model(**clip_inputs()).logits_per_image).all()
