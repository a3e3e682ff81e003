"""Adapters of other PEFT methods: the frozen model, the texts, and what is kept beside their weights."""

import json
import shutil

import pytest
import torch
from helpers import TINY_CLIP, shake
from huggingface_hub.constants import HF_HUB_OFFLINE
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from capt_peft import CaptConfig, ZeroShotClassifier
from capt_peft.methods import ADAPTERS, adapter_config
from capt_peft.tuner.fingerprint import base_fingerprint
from capt_peft.tuner.others import (
    CLASSES,
    check_tunable,
    keep_classes,
    load_config,
    peft_name,
    save_classes,
    settings_of,
)

NAMES = ["red circle", "green square", "seven"]
TEMPLATE, TEXTS = "an image of a {}.", {"seven": ["the digit 7", "a seven"]}
PIXELS = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
assert HF_HUB_OFFLINE


def base():
    return CLIPModel.from_pretrained(TINY_CLIP).eval()


def tuned(config, model=None):
    torch.manual_seed(0)
    model = get_peft_model(model or base(), config)
    shake(model)
    return model.eval()


def kept(model):
    keep_classes(model, class_names=NAMES, template=TEMPLATE, class_texts=TEXTS)
    return model


@pytest.fixture
def saved(tmp_path):
    model = kept(tuned(adapter_config("lora", {})))
    model.save_pretrained(tmp_path / "lora")
    save_classes(model, tmp_path / "lora")
    return tmp_path / "lora"


def classifier_of(model, processor):
    return ZeroShotClassifier(model, processor, NAMES, TEMPLATE, class_texts=TEXTS)


# ------------------------------------------------------------------------------------------------ frozen model, texts


@pytest.mark.parametrize("peft", ADAPTERS)
def test_frozen_logits_are_bitwise_those_of_a_model_that_never_had_an_adapter(peft, processor):
    classifier, never = (classifier_of(m, processor) for m in (tuned(adapter_config(peft, {})), base()))
    plain = never(PIXELS).detach()
    assert not torch.equal(classifier(PIXELS).detach(), plain)
    with classifier.frozen():
        assert torch.equal(classifier(PIXELS).detach(), plain)
    assert not torch.equal(classifier(PIXELS).detach(), plain)
    assert base_fingerprint(classifier.model) == base_fingerprint(never.model)


@pytest.mark.parametrize("peft", ADAPTERS)
def test_text_features_follow_the_adapter(peft, processor):
    classifier = classifier_of(tuned(adapter_config(peft, {})), processor)
    before, plain = classifier.text_features(), classifier_of(base(), processor).text_features()
    assert not torch.allclose(before, plain, atol=1e-3)
    with torch.no_grad():
        for name, parameter in classifier.model.named_parameters():
            if parameter.requires_grad and "text_model" in name:
                parameter.add_(0.05)
    assert not torch.allclose(classifier.text_features(), before, atol=1e-4)
    with classifier.frozen():
        assert torch.equal(classifier.text_features(), plain)


# --------------------------------------------------------------------------------------------------- kept and loaded


@pytest.mark.parametrize("peft", ADAPTERS)
def test_a_saved_adapter_gives_bitwise_its_logits_with_its_own_classes_and_texts(peft, processor, tmp_path):
    model = kept(tuned(adapter_config(peft, {})))
    expected = classifier_of(model, processor)(PIXELS).detach()
    model.save_pretrained(tmp_path)
    save_classes(model, tmp_path)
    loaded = ZeroShotClassifier.from_pretrained(str(tmp_path))
    assert (list(loaded.class_names), loaded.template, loaded.class_texts) == (NAMES, TEMPLATE, TEXTS)
    assert torch.equal(loaded(PIXELS).detach(), expected)
    config = loaded.model.peft_config["default"]
    assert config.base_model_fingerprint == base_fingerprint(base())
    assert settings_of(config)["class_names"] == NAMES
    plain = json.loads((tmp_path / SETTINGS).read_text())
    assert not plain.keys() & {
        "class_names",
        "template",
        "class_texts",
        "base_model_fingerprint",
    }  # PEFT knows no such fields
    assert isinstance(PeftModel.from_pretrained(base(), tmp_path), PeftModel)


def test_an_adapter_of_a_name_has_its_classes_beside_its_own_weights(tmp_path):
    model = base()
    model = get_peft_model(model, adapter_config("lora", {}), adapter_name="own")
    kept(model).save_pretrained(tmp_path)
    save_classes(model, tmp_path)
    assert (tmp_path / "own" / CLASSES).is_file() and not (tmp_path / CLASSES).exists()
    assert ZeroShotClassifier.from_pretrained(str(tmp_path), subfolder="own").class_names == tuple(NAMES)


def test_an_adapter_that_peft_saved_by_itself_needs_its_classes(tmp_path):
    kept(tuned(adapter_config("lora", {}))).save_pretrained(tmp_path)
    assert not (tmp_path / CLASSES).exists()
    with pytest.raises(ValueError, match="records no class names"):
        ZeroShotClassifier.from_pretrained(str(tmp_path))
    assert not ZeroShotClassifier.from_pretrained(str(tmp_path), class_names=NAMES).class_texts


def test_capt_keeps_everything_in_its_configuration(tmp_path):
    model = kept(tuned(CaptConfig(template=TEMPLATE)))
    model.save_pretrained(tmp_path)
    save_classes(model, tmp_path)
    assert not (tmp_path / CLASSES).exists()
    config = load_config(tmp_path)
    assert isinstance(config, CaptConfig) and config.class_names == NAMES
    assert settings_of(config) == config.to_dict() and peft_name(settings_of(config)) == "CAPT"


def test_classes_of_other_weights_are_refused(saved):
    other = tuned(adapter_config("lora", {"r": 4}))
    other.save_pretrained(saved)  # over them, by PEFT alone
    with pytest.raises(ValueError, match=r"zero_shot\.json is of other weights"):
        ZeroShotClassifier.from_pretrained(str(saved))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "{}",
        '{"class_names": "cat"}',
        '{"class_names": ["a", "b"], "template": "no place", "class_texts": null}',
    ],
)
def test_a_damaged_file_of_classes_is_named(saved, content):
    (saved / CLASSES).write_text(content)
    with pytest.raises(ValueError, match=r"zero_shot\.json"):
        ZeroShotClassifier.from_pretrained(str(saved))


def test_another_base_is_told(saved, tmp_path, caplog):
    moved = base()
    with torch.no_grad():
        moved.visual_projection.weight.mul_(1.5)
    moved.save_pretrained(tmp_path / "moved")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (source := type(saved)(TINY_CLIP, name)).exists():
            shutil.copy(source, tmp_path / "moved")
    ZeroShotClassifier.from_pretrained(str(saved))
    assert "fingerprint" not in caplog.text
    ZeroShotClassifier.from_pretrained(str(saved), base=str(tmp_path / "moved"))
    assert "The adapter was tuned on the base model" in caplog.text


# ------------------------------------------------------------------------------------------------------ what is refused


def without_a_tensor(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors[min(tensors)]
    save_file(tensors, folder / WEIGHTS)


def not_finite(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors[min(tensors)][:] = float("nan")
    save_file(tensors, folder / WEIGHTS)


def other_shapes(folder):
    change(folder, r=4)


def change(folder, **values):
    path = folder / SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_a_tensor, "lacks 1 tensor"),
        (not_finite, "NaN or infinite"),
        (other_shapes, "does not fit CLIPModel"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no adapter_model.safetensors"),
        (lambda folder: change(folder, init_lora_weights="pissa"), "changes the weights of the base model"),
        (lambda folder: change(folder, bias="all"), r"bias='all'"),
        (lambda folder: change(folder, task_type="FEATURE_EXTRACTION"), "takes no images"),
        (lambda folder: change(folder, peft_type="magic"), "PEFT cannot read it"),
    ],
    ids=["missing", "nan", "shapes", "no weights", "pissa", "bias", "task", "unknown"],
)
def test_adapters_that_would_be_something_else_are_refused(saved, damage, words):
    (saved / CLASSES).unlink()  # which would tell that the weights are others
    damage(saved)
    with pytest.raises(ValueError, match=words):
        ZeroShotClassifier.from_pretrained(str(saved), class_names=NAMES)


def test_pickles_are_refused(saved):
    torch.save(load_file(saved / WEIGHTS), saved / "adapter_model.bin")
    (saved / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="not in safetensors format"):
        ZeroShotClassifier.from_pretrained(str(saved))


def merged():
    model = tuned(adapter_config("lora", {}))
    model.merge_adapter()
    return model


def with_two():
    model = tuned(adapter_config("lora", {}))
    model.add_adapter("second", adapter_config("lora", {}))
    model.base_model.set_adapter(["default", "second"])
    return model


def switched_off():
    model = tuned(adapter_config("lora", {}))
    model.base_model.disable_adapter_layers()
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (merged, "merged into the base weights"),
        (with_two, "The adapters that act are 'default', 'second'"),
        (switched_off, "The adapters that act are none"),
        (
            lambda: get_peft_model(base(), LoraConfig(target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")),
            "no images",
        ),
    ],
)
def test_what_cannot_be_tuned_by_itself_is_refused(model, words):
    with pytest.raises(ValueError, match=words):
        check_tunable(model())


def test_dropout_is_told_and_other_adapters_are_not(caplog):
    check_tunable(tuned(adapter_config("lora", {})))
    check_tunable(tuned(CaptConfig()))
    assert not caplog.text
    check_tunable(tuned(adapter_config("lora", {"lora_dropout": 0.1})))
    assert "lora_dropout=0.1: a step's attack" in caplog.text


def test_prompt_learning_of_language_models_is_refused(saved):
    config = PromptTuningConfig(num_virtual_tokens=4, token_dim=8, num_layers=1, num_attention_heads=1)
    config.save_pretrained(saved)
    with pytest.raises(ValueError, match="made for language models"):
        load_config(saved)
