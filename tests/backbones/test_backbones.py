"""Conversions against an independent forward in OpenAI's own layout, which reads the state dict before it is converted."""

import json
import os
import pickle
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import TINY_CLIP
from openai_clip import (
    SMALL,
    VIT_B32,
    VOCABULARY,
    assert_same_model,
    fine_tuned,
    image_features,
    openai_state_dict,
    quick_gelu,
    text_features,
    vision_alone,
)
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, CLIPModel

from capt_peft import CaptConfig, ZeroShotClassifier
from capt_peft.backbones import convert_backbone, read_checkpoint, to_transformers
from capt_peft.backbones.model import MEAN, build
from capt_peft.commands.convert import main as run_script


def saved(content, path):
    torch.save(content, path)
    return path


# ---------------------------------------------------------------------------------------------------------- layouts


@pytest.fixture(scope="module")
def vit_b32():
    return openai_state_dict(VIT_B32)


def test_openai_vit_b32_is_converted_exactly(vit_b32, tmp_path):
    archive = {n: t.half() if t.ndim > 1 else t for n, t in vit_b32.items()}  # as OpenAI's: matrices in half precision
    sizes = {
        "input_resolution": torch.tensor(224),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    }
    info = convert_backbone(saved(archive | sizes, tmp_path / "ViT-B-32.pt"), tmp_path / "out")
    model = assert_same_model(CLIPModel.from_pretrained(tmp_path / "out"), archive, VIT_B32)
    openai = CLIPModel.config_class()  # transformers' defaults are openai/clip-vit-base-patch32
    for part in ("text_config", "vision_config"):
        mine, theirs = (getattr(config, part).to_dict() | {"dtype": None} for config in (model.config, openai))
        assert mine | theirs == mine
    assert info.architecture == "ViT-B/32, 224 pixels" and info.layout == "both towers"
    assert sum(p.numel() for p in model.parameters()) == 151_277_313  # as openai/clip-vit-base-patch32


def test_tecoa_vit_b32_takes_the_text_tower_of_its_base(vit_b32):
    robust = {n: t.flip(0) if n.startswith("visual.transformer") else t for n, t in vit_b32.items()}
    config, tensors = to_transformers(vision_alone(robust), base=to_transformers(vit_b32))
    assert_same_model(build(config, tensors), robust, VIT_B32)


@pytest.mark.parametrize("wrapper", ["", "module.", "model.", "module.model."])
def test_open_clip_checkpoints_are_converted_exactly(state, wrapper, tmp_path):
    wrapped = {wrapper + name: tensor for name, tensor in state.items()}
    wrapped[wrapper + "attn_mask"] = torch.full((20, 20), float("-inf")).triu(1)
    path = saved({"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": {"lr": 0.1}}, tmp_path / "epoch_3.pt")
    info = convert_backbone(path, tmp_path / "out")
    assert_same_model(tmp_path / "out", state, SMALL)
    assert info.container == "state_dict" and info.unused == ("epoch", "name", "optimizer")


def test_open_clips_custom_text_tower_is_converted_exactly(state, tmp_path):
    vision = {n: t for n, t in state.items() if n.startswith("visual.") or n == "logit_scale"}
    text = {f"text.{n}": t for n, t in state.items() if n not in vision}
    save_file(vision | text, tmp_path / "open_clip_model.safetensors")
    convert_backbone(tmp_path / "open_clip_model.safetensors", tmp_path / "out")
    assert_same_model(tmp_path / "out", state, SMALL)


def test_tecoas_own_file_is_read_with_its_numpy_number(state, base, tmp_path):
    robust = fine_tuned(state)
    file = {
        "epoch": 10, "state_dict": {}, "add_prompter": {"module.prompt": torch.zeros(1, 0, 768)},
        "vision_encoder_state_dict": vision_alone(robust), "best_acc1": np.float64(38.18),
        "optimizer": torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1).state_dict(),
    }  # fmt: skip
    path = saved(file, tmp_path / "TeCoAmodel_best.pth.tar")
    info = convert_backbone(path, tmp_path / "out", base=base)
    model = assert_same_model(tmp_path / "out", robust, SMALL, text_state=state)
    assert info.container == "vision_encoder_state_dict" and "best_acc1" in info.unused and info.base_similarity > 0.9
    original = CLIPModel.from_pretrained(base)
    assert torch.equal(model.text_projection.weight, original.text_projection.weight)
    assert not torch.equal(model.visual_projection.weight, original.visual_projection.weight)


@pytest.mark.parametrize("prefix", ["", "visual.", "module.", "module.visual."])
def test_robustvlms_image_towers_are_converted_exactly(state, base, prefix, tmp_path):
    robust = fine_tuned(state)
    path = saved({prefix + n: t for n, t in vision_alone(robust).items()}, tmp_path / "fare_eps_2.pt")
    info = convert_backbone(path, tmp_path / "out", base=base)
    assert_same_model(tmp_path / "out", robust, SMALL, text_state=state)
    assert (
        info.container is None and json.loads((tmp_path / "out" / "backbone.json").read_text())["sha256"] == info.sha256
    )


def test_half_precision_weights_are_written_in_float32_unless_asked(state, tmp_path):
    half = {name: tensor.half() for name, tensor in state.items()}
    path = saved(half, tmp_path / "half.pt")
    convert_backbone(path, tmp_path / "out")
    assert assert_same_model(tmp_path / "out", half, SMALL).dtype == torch.float32
    convert_backbone(path, tmp_path / "half", dtype="float16")
    assert CLIPModel.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_the_activation_is_an_argument_and_matters(state, tmp_path):
    path = saved(state, tmp_path / "laion.pt")
    convert_backbone(path, tmp_path / "gelu", activation="gelu")
    assert_same_model(tmp_path / "gelu", state, SMALL, activation=nn.functional.gelu)
    with pytest.raises(AssertionError):
        assert_same_model(tmp_path / "gelu", state, SMALL, activation=quick_gelu)


def test_open_clips_configuration_beside_the_file_says_what_shapes_do_not(state, tmp_path):
    path = saved(state, tmp_path / "open_clip_pytorch_model.bin")
    text = {"context_length": 20, "vocab_size": VOCABULARY, "width": 64, "heads": 1, "layers": 2}
    config = {"model_cfg": {"vision_cfg": {"width": 128, "head_width": 32}, "text_cfg": text}}
    config["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    info = convert_backbone(path, tmp_path / "out", processor=TINY_CLIP)
    loaded = CLIPModel.from_pretrained(tmp_path / "out").config.vision_config
    assert info.activation == loaded.hidden_act == "gelu" and loaded.num_attention_heads == 4
    classifier = ZeroShotClassifier.from_pretrained(str(tmp_path / "out"), class_names=["cat", "dog"])
    assert classifier.mean.flatten().tolist() == [0.5, 0.5, 0.5] and classifier.std.flatten().tolist() == [0.25] * 3
    config["model_cfg"]["vision_cfg"]["pool_type"] = "avg"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pool_type='avg' makes this another model"):
        convert_backbone(path, tmp_path / "other")


def test_heads_of_vit_h_are_80_wide():
    state = openai_state_dict(SMALL | {"vision_width": 1280, "vision_layers": 1, "grid": 1})
    config, _ = to_transformers(state)
    assert config.vision_config.num_attention_heads == 16 and config.text_config.num_attention_heads == 1


# ----------------------------------------------------------------------------------------------------------- errors


def without(name):
    return lambda state: state.pop(name)


def changed(name, change):
    return lambda state: state.update({name: change(state[name])})


def extra(name, value=None):
    return lambda state: state.update({name: torch.zeros(2) if value is None else value})


RES = "transformer.resblocks"
DAMAGE = {
    "bias gone": (without(f"visual.{RES}.1.ln_2.bias"), f"lacks visual.{RES}.1.ln_2.bias"),
    "block gone": (lambda s: [s.pop(n) for n in list(s) if f"visual.{RES}.1." in n], "lacks .* and 9 more"),
    "projection gone": (without("visual.proj"), "lacks visual.proj"),
    "scale gone": (without("logit_scale"), "lacks logit_scale"),
    "patches gone": (without("visual.conv1.weight"), "lacks visual.conv1.weight"),
    "layer scale": (extra(f"visual.{RES}.0.ls_1.gamma"), r"has unexpectedly visual.*ls_1.gamma"),
    "unknown tensor": (extra("head.weight"), "has unexpectedly head.weight"),
    "narrow layer": (changed(f"{RES}.0.mlp.c_proj.weight", lambda t: t[:, :-1]), "c_proj.weight has the shape"),
    "transposed": (
        changed("visual.ln_pre.weight", lambda t: t[None]),
        r"visual.ln_pre.weight has the shape \(1, 128\)",
    ),
    "no square": (changed("visual.positional_embedding", lambda t: t[:-1]), "has 16 rows"),
    "flat patches": (changed("visual.conv1.weight", lambda t: t.flatten(1)), "needs 4 dimensions"),
    "towers of two models": (changed("text_projection", lambda t: t[:, :-1]), "features of 48, text_projection of 47"),
    "NaN": (changed("ln_final.bias", lambda t: t * float("nan")), "ln_final.bias holds NaN"),
    "infinite": (changed("visual.proj", lambda t: t / 0), "visual.proj holds NaN or infinite"),
    "integers": (changed("ln_final.bias", lambda t: t.int()), "ln_final.bias is torch.int32"),
    "open mask": (extra("attn_mask", torch.zeros(20, 20)), "not the causal mask"),
    "wrong resolution": (extra("input_resolution", torch.tensor(224)), "input_resolution is 224, .* say 32"),
    "ResNet": (extra("visual.layer1.0.conv1.weight"), "a ResNet CLIP"),
    "ConvNeXt": (extra("visual.trunk.stem.0.weight"), "ConvNeXt"),
    "SigLIP": (extra("logit_bias"), "a SigLIP"),
    "converted before": (extra("text_model.final_layer_norm.weight"), "already in transformers' layout"),
    "no CLIP": (lambda s: [s.pop(n) for n in list(s) if "embedding" in n or "conv1" in n], "no weights of a CLIP"),
    "two text towers": (extra("text.ln_final.weight"), "two text towers"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_not_a_whole_clip_is_refused_by_name_and_nothing_is_written(case, state, tmp_path):
    damage, message = DAMAGE[case]
    damage(state)
    path = saved(state, tmp_path / "damaged.pt")
    with pytest.raises(ValueError, match=message) as error:
        convert_backbone(path, tmp_path / "out")
    assert "damaged.pt" in str(error.value) and "Nothing was written" in str(error.value)
    assert os.listdir(tmp_path) == ["damaged.pt"]


def test_every_single_tensor_is_needed(state):
    for name in state:
        with pytest.raises(ValueError):
            to_transformers({n: t for n, t in state.items() if n != name})


def test_an_image_tower_needs_the_base_it_comes_from(state, base, tmp_path, caplog):
    path = saved(vision_alone(state), tmp_path / "fare.pt")
    with pytest.raises(ValueError, match="Name the CLIP it was fine-tuned from as base"):
        convert_backbone(path, tmp_path / "out")
    whole = saved(state, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match="needs no base"):
        convert_backbone(whole, tmp_path / "out", base=base)
    with pytest.raises(ValueError, match=r"width 128, not 256.*features of 48, not 40"):
        other = saved(openai_state_dict(SMALL | {"vision_width": 256, "features": 40}), tmp_path / "other.pt")
        convert_backbone(path, tmp_path / "out", base=str(other))
    with pytest.raises(ValueError, match=r"activation='gelu', but the base .* has quick_gelu"):
        convert_backbone(path, tmp_path / "out", base=base, activation="gelu")
    with pytest.raises(ValueError, match=r"head_width=32, but the base .* has 64"):
        convert_backbone(path, tmp_path / "out", base=base, head_width=32)
    with pytest.raises(ValueError, match=r"fare.pt: This is an image tower alone"):
        convert_backbone(path, tmp_path / "out", base=str(path))
    assert not (tmp_path / "out").exists() and not caplog.records
    stranger = saved(vision_alone(openai_state_dict(SMALL, seed=5)), tmp_path / "stranger.pt")
    info = convert_backbone(stranger, tmp_path / "out", base=base)
    assert abs(info.base_similarity) < 0.1 and "fine-tuned from another CLIP" in caplog.text


def test_visual_prompts_beside_the_encoder_are_refused(state, base, tmp_path):
    prompts = {"add_prompter": {"module.prompt": torch.zeros(1, 5, 768)}}
    path = saved({"vision_encoder_state_dict": vision_alone(state), **prompts}, tmp_path / "prompted.pth.tar")
    with pytest.raises(ValueError, match=r"holds visual prompts \(add_prompter\)"):
        convert_backbone(path, tmp_path / "out", base=base)


def test_settings_that_do_not_exist_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="activation='relu' must be one of quick_gelu, gelu"):
        convert_backbone(tmp_path / "none.pt", tmp_path / "out", activation="relu")
    with pytest.raises(ValueError, match="dtype='int8' must be one of"):
        convert_backbone(tmp_path / "none.pt", tmp_path / "out", dtype="int8")


def test_a_folder_that_is_not_empty_stays_as_it_was(state, tmp_path):
    path = saved(state, tmp_path / "clip.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert_backbone(path, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "mine"
    convert_backbone(path, tmp_path / "out", overwrite=True)
    assert_same_model(tmp_path / "out", state, SMALL)


# ------------------------------------------------------------------------------------------------------------ files


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("place", ["args", "state_dict"])
def test_a_malicious_pickle_is_not_run(state, write, place, tmp_path):
    marker = tmp_path / "marker"
    write({"model": state, place: Malicious(str(marker))}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt"):
        convert_backbone(tmp_path / "evil.pt", tmp_path / "out")
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_other_objects_beside_the_weights_are_named(state, tmp_path):
    path = saved({"state_dict": state, "args": Namespace(eps=4)}, tmp_path / "args.pt")
    with pytest.raises(ValueError, match=r"more than tensors \(argparse.Namespace\).*save its state dict alone"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["clip.pt", "clip.safetensors"])
@pytest.mark.parametrize("share", [0.5, 0.999, 0.01, 0])
def test_a_file_that_is_cut_short_is_named(state, name, share, tmp_path):
    path = tmp_path / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{name}.*Download it again"):
        convert_backbone(path, tmp_path / "out")


def test_old_files_of_torch_are_read(state, tmp_path):
    torch.save({"state_dict": state}, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    convert_backbone(tmp_path / "old.pth.tar", tmp_path / "out")
    assert_same_model(tmp_path / "out", state, SMALL)


def test_what_is_no_checkpoint_is_named(state, tmp_path):
    (tmp_path / "page.pt").write_text("<html>Please log in</html>")
    with pytest.raises(ValueError, match=r"page.pt \(26 bytes\) is not a checkpoint"):
        read_checkpoint(tmp_path / "page.pt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"no weights of a model but the entries \['epoch'\]"):
        read_checkpoint(saved({"epoch": 3}, tmp_path / "epoch.pt"))
    with pytest.raises(ValueError, match="no weights of a model but list"):
        read_checkpoint(saved([torch.zeros(2)], tmp_path / "list.pt"))
    with pytest.raises(ValueError, match="b is not a named tensor"):
        read_checkpoint(saved({"a": torch.zeros(2), "b": 3}, tmp_path / "mixed.pt"))
    with pytest.raises(ValueError, match="7 is not a named tensor"):
        read_checkpoint(saved({"a": torch.zeros(2), 7: torch.zeros(2)}, tmp_path / "numbered.pt"))


def test_torchscript_archives_are_refused_with_what_to_do(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(ValueError, match=r"TorchScript archive.*openai/clip-vit-base-patch32"):
        read_checkpoint(tmp_path / "ViT-B-32.pt")


# -------------------------------------------------------------------------------------------------------------- use


def test_a_converted_folder_classifies_and_takes_an_adapter(state, base, tmp_path):
    path = saved(vision_alone(fine_tuned(state)), tmp_path / "fare_eps_4.pt")
    folder = str(tmp_path / "out")
    info = convert_backbone(path, folder, base=base)
    classifier = ZeroShotClassifier.from_pretrained(folder, class_names=["cat", "dog"])
    assert classifier.mean.flatten().tolist() == pytest.approx(MEAN)
    pixels = torch.rand(2, 3, 32, 32)
    normalised = (pixels - classifier.mean) / classifier.std
    expected = image_features(fine_tuned(state), normalised)
    ids = AutoTokenizer.from_pretrained(folder)(classifier.texts, padding=True, return_tensors="pt").input_ids
    texts = text_features(state, ids)
    cosines = nn.functional.normalize(expected) @ nn.functional.normalize(texts).T
    assert torch.allclose(classifier(pixels), cosines * state["logit_scale"].exp(), atol=1e-3)
    adapted = get_peft_model(CLIPModel.from_pretrained(folder), CaptConfig(template="a photo of a {}."))
    adapted.save_pretrained(tmp_path / "adapter")
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_fingerprint"]
        == info.fingerprint
    )
    tuned = ZeroShotClassifier.from_pretrained(str(tmp_path / "adapter"), class_names=["cat", "dog"])
    assert torch.isfinite(tuned(pixels)).all()


def test_a_tokenizer_of_another_model_is_refused_and_a_missing_one_is_told(state, tmp_path, caplog):
    path = saved(openai_state_dict(SMALL | {"vocabulary": 500}), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="737 tokens and ends texts with 736, the model has 500 and 499"):
        convert_backbone(path, tmp_path / "out", processor=TINY_CLIP)
    with pytest.raises(ValueError, match="has no tokenizer"):
        convert_backbone(path, tmp_path / "out", processor=str(tmp_path))
    assert not (tmp_path / "out").exists()
    convert_backbone(path, tmp_path / "out")
    assert "no tokenizer" in caplog.text


def test_the_script_converts(state, base, tmp_path, capsys):
    path = saved(vision_alone(state), tmp_path / "fare.pt")
    run_script(["--checkpoint", str(path), "--output", str(tmp_path / "out"), "--base", base])
    assert "vision tower alone" in capsys.readouterr().out
    assert_same_model(tmp_path / "out", state, SMALL)
