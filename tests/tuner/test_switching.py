"""Adapter off is the base model, to the last bit, whatever PEFT has put on it and whoever asks."""

from contextlib import contextmanager

import pytest
import torch
from helpers import TINY_CLIP, shake
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from transformers import CLIPModel

from capt_peft import CaptConfig, ZeroShotClassifier
from capt_peft.evaluation.subject import subject_of
from capt_peft.tuner import adapters_in_use, adapters_off

NAMES = ("red circle", "green square", "seven")
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LORA = {"target_modules": ["q_proj", "fc1"], "init_lora_weights": False, "lora_dropout": 0.1}
SAVED = ["visual_projection", "text_projection"]


def base():
    return CLIPModel.from_pretrained(TINY_CLIP).eval()


def tuned(config, model=None):
    torch.manual_seed(0)
    model = get_peft_model(base() if model is None else model, config)
    shake(model)
    return model.eval()


def with_two(active, second):
    model = tuned(CaptConfig(modules_to_save=SAVED))
    model.add_adapter("second", second)
    model.set_adapter("second")
    shake(model)
    model.set_adapter(active)
    return model


def saved(tmp_path, config):
    tuned(config).save_pretrained(tmp_path)
    return str(tmp_path)


def added_by_transformers(config):
    model = base()
    model.add_adapter(config)
    shake(model)
    return model.eval()


def loaded_by_transformers(folder):
    model = base()
    model.load_adapter(folder)
    return model


MODELS = {
    "capt": lambda _: tuned(CaptConfig()),
    "capt with modules_to_save": lambda _: tuned(CaptConfig(modules_to_save=SAVED)),
    "capt for inference": lambda path: PeftModel.from_pretrained(
        base(), saved(path, CaptConfig(modules_to_save=SAVED))
    ).eval(),
    "lora": lambda _: tuned(LoraConfig(**LORA)),
    "dora with modules_to_save": lambda _: tuned(LoraConfig(**LORA, use_dora=True, modules_to_save=SAVED)),
    "ln-tuning": lambda _: tuned(LNTuningConfig(target_modules=["layer_norm1", "post_layernorm"])),
    "two, the first active": lambda _: with_two("default", CaptConfig(text_depth=2, vision_depth=2)),
    "two, the second active": lambda _: with_two("second", CaptConfig(text_depth=2, vision_depth=2)),
    "lora added by transformers": lambda _: added_by_transformers(LoraConfig(**LORA)),
    "capt added by transformers": lambda _: added_by_transformers(CaptConfig(modules_to_save=SAVED)),
    "capt loaded by from_pretrained": lambda path: CLIPModel.from_pretrained(saved(path, CaptConfig())).eval(),
    "lora loaded by load_adapter": lambda path: loaded_by_transformers(saved(path, LoraConfig(**LORA))),
}


@contextmanager
def switched_off_by_its_library(model):
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
        return
    model.disable_adapters()
    yield
    model.enable_adapters()


def logits(classifier):
    with torch.no_grad():
        return classifier(PIXELS).clone()


@pytest.fixture(scope="module")
def without_adapter(processor):
    return logits(ZeroShotClassifier(base(), processor, NAMES))


@pytest.mark.parametrize("name", MODELS)
def test_off_is_the_base_model_and_leaves_the_adapter_as_it_was(name, tmp_path, processor, without_adapter):
    model = MODELS[name](tmp_path)
    classifier = ZeroShotClassifier(model, processor, NAMES)
    before, trainable = logits(classifier), [p.requires_grad for p in model.parameters()]
    assert not torch.equal(before, without_adapter), "the adapter does nothing, so that this test could not fail"
    ways = {
        "frozen": classifier.frozen,
        "adapters_off": lambda: adapters_off(model),
        "twice": lambda: nested(adapters_off(model), classifier.frozen()),
        "in PEFT's own": lambda: nested(switched_off_by_its_library(model), adapters_off(model)),
        "around PEFT's own": lambda: (
            nested(adapters_off(model), model.disable_adapter())
            if isinstance(model, PeftModel)
            else adapters_off(model)
        ),
    }
    for way, off in ways.items():
        in_use = adapters_in_use(model)
        with off():
            assert torch.equal(logits(classifier), without_adapter), way
            assert adapters_in_use(model) == []
        if name == "capt added by transformers" and way == "in PEFT's own":
            switch_on_what_transformers_forgets(model)
        assert torch.equal(logits(classifier), before), way
        assert adapters_in_use(model) == in_use != []
        if "PEFT" not in way or "capt" in name:  # PEFT's own makes LoRA trainable
            assert [p.requires_grad for p in model.parameters()] == trainable, way
    assert torch.equal(subject_of(classifier, attack_target="frozen").attacked(PIXELS).detach(), without_adapter)


@contextmanager
def nested(outer, inner):
    with outer, inner:
        yield


def switch_on_what_transformers_forgets(model):
    for module in model.modules():
        if hasattr(module, "modules_to_save"):
            module.enable_adapters(True)


def test_an_exception_inside_switches_the_adapter_on_again():
    model = tuned(CaptConfig(modules_to_save=SAVED))
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        raise RuntimeError("inside")
    assert adapters_in_use(model) == ["default"]


def test_the_adapters_in_use_are_named():
    assert adapters_in_use(base()) == []
    model = with_two("second", CaptConfig(text_depth=2, vision_depth=2))
    assert adapters_in_use(model) == ["second"]
    model.delete_adapter("second")
    assert adapters_in_use(model) == ["default"]
    lora = tuned(LoraConfig(**LORA))
    lora.merge_adapter()
    assert adapters_in_use(lora) == ["default"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: tuned(LoraConfig(**LORA, bias="all")), "bias='all'"),
        (lambda: tuned(LoraConfig(**LORA, bias="lora_only")), "bias='lora_only'"),
        (lambda: tuned(LoraConfig(**{**LORA, "init_lora_weights": "pissa", "r": 2})), "init_lora_weights='pissa'"),
        (lambda: merged(tuned(LoraConfig(**LORA))), "merged"),
        (lambda: beside(tuned(CaptConfig())), "logit_scale is being trained beside the adapter"),
    ],
)
def test_off_is_refused_where_the_base_model_is_no_longer_there(change, says, processor):
    classifier = ZeroShotClassifier(change(), processor, NAMES)
    with pytest.raises(ValueError, match=says), classifier.frozen():
        pass
    with pytest.raises(ValueError, match=says):
        subject_of(classifier.eval(), attack_target="frozen")


def merged(model):
    model.merge_adapter()
    return model


def beside(model):
    model.base_model.model.logit_scale.requires_grad_(True)
    return model


def test_a_model_without_adapters_is_never_refused_however_much_of_it_is_trained():
    with adapters_off(base().requires_grad_(True)):
        pass
