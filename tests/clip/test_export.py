"""Exported files compute what the classifier computes, describe themselves, and are written whole or not at all."""

import json
import logging
import os

import pytest
import torch
from helpers import TINY_CLIP, random_clip, shake
from peft import get_peft_model
from siglip_models import random_siglip, siglip_adapter, siglip_processor
from transformers import CLIPModel, MetaClip2Config, MetaClip2Model

from capt_peft import CaptConfig, OnnxClassifier, ThreatModel, ZeroShotClassifier, evaluate, export, parse_attack
from capt_peft.clip import export as module
from capt_peft.clip.export import describe_export

NAMES = ("red circle", "green square", "seven")
EXACT = 1e-4  # of a logit


def make(processor, **config):
    torch.manual_seed(0)
    model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32), CaptConfig(**config))
    shake(model)
    return ZeroShotClassifier(model.eval(), processor, NAMES)


@pytest.fixture(scope="module")
def classifier(processor):
    """Coupled prompts, of which those of the image tower are computed from those of the text tower."""
    return make(processor, coupling="text_to_vision", num_vision_tokens=2)


@pytest.fixture(scope="module")
def files(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    differences = {
        "onnx": export(classifier, folder / "model.onnx"),
        "int8": export(classifier, folder / "model.int8.onnx", int8=True),
        "torch": export(classifier, folder / "model.pt2", "torch"),
    }
    return folder, differences


def images(count, seed=1):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(one, other, count=4):
    return float((one(images(count)) - other(images(count))).abs().max())


# ------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("count", [1, 2, 7])
def test_onnx_gives_the_classifiers_logits_for_any_number_of_images(classifier, files, count):
    found = OnnxClassifier(files[0] / "model.onnx")(images(count))
    assert found.shape == (count, 3) and found.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(found, classifier(images(count)), rtol=0, atol=EXACT)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_torchs_program_is_the_classifier_bit_for_bit_and_so_are_its_gradients(classifier, files, count):
    program = torch.export.load(files[0] / "model.pt2").module()
    pixels = images(count).requires_grad_()
    assert torch.equal(program(pixels), classifier(pixels))
    of_file, of_classifier = (torch.autograd.grad(f(pixels)[:, 0].sum(), pixels)[0] for f in (program, classifier))
    assert of_file.abs().max() > 0 and torch.equal(of_file, of_classifier)


@pytest.mark.parametrize(
    ("pixels", "error", "words"),
    [
        (images(1)[0], ValueError, r"shape \(3, 32, 32\), but the file takes \(B, 3, 32, 32\) of floats in \[0, 1\]"),
        (torch.rand(1, 3, 32, 48), ValueError, r"\(1, 3, 32, 48\), but"),
        (torch.rand(1, 32, 32, 3), ValueError, r"\(1, 32, 32, 3\), but"),
        (torch.rand(1, 1, 32, 32), ValueError, r"\(1, 1, 32, 32\), but"),
        (torch.tensor(0.5), ValueError, r"\(\), but"),
        (torch.ones(1, 3, 32, 32, dtype=torch.uint8), TypeError, r"torch.uint8, but the file takes \(B, 3, 32, 32\)"),
        (images(1).numpy(), TypeError, "ndarray, but"),
        (None, TypeError, "NoneType, but"),
    ],
)
def test_pixels_that_the_file_does_not_take_are_refused_with_what_it_takes(files, pixels, error, words):
    with pytest.raises(error, match=words):
        OnnxClassifier(files[0] / "model.onnx")(pixels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pixels_of_any_floating_point_are_taken(files, dtype):
    pixels, one = images(2).to(dtype), OnnxClassifier(files[0] / "model.onnx")
    assert torch.equal(one(pixels), one(pixels.float())) and one(pixels[:0]).shape == (0, 3)


def test_int8_is_smaller_and_near_but_not_the_same(classifier, files):
    folder, differences = files
    assert os.path.getsize(folder / "model.int8.onnx") < 0.4 * os.path.getsize(folder / "model.onnx")
    assert 1e-3 < difference(OnnxClassifier(folder / "model.int8.onnx"), classifier) < 1
    assert differences["torch"] == 0 and differences["onnx"] < EXACT and 1e-3 < differences["int8"] < 1


def test_the_text_tower_stays_outside(classifier, files):
    program = torch.export.load(files[0] / "model.pt2")
    names = [name for name in program.state_dict if "text_model" in name]
    assert names and all("capt_prompt" in name for name in names)  # from which the other tower's are computed
    assert torch.equal(program.state_dict["text_matrix"], classifier.text_features())
    assert os.path.getsize(files[0] / "model.pt2") < 0.8 * sum(4 * p.numel() for p in classifier.parameters())


@pytest.mark.parametrize("form", ["onnx", "int8", "torch"])
def test_no_path_of_this_machine_is_in_a_file(files, form):
    content = (files[0] / {"onnx": "model.onnx", "int8": "model.int8.onnx", "torch": "model.pt2"}[form]).read_bytes()
    assert b".py" not in content and os.getcwd().encode() not in content


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_prompts_have_their_strength_in_the_file(processor, tmp_path, attention):
    """In between, the image tower has a mask, which its two kinds of attention apply each in its own way."""
    one = make(processor)
    one.base_model.set_attn_implementation(attention)
    expected = {}
    for strength in (0, 0.5, 1):
        one.strength = strength
        with torch.no_grad():
            expected[strength] = one(images(4))
        export(one, path := tmp_path / f"{strength}.pt2", "torch")
        with torch.no_grad():
            found = torch.export.load(path).module()(images(4))
        assert torch.equal(found, expected[strength]) and describe_export(one)["strength"] == strength
    one.strength = 0.5
    export(one, tmp_path / "a.onnx")
    assert difference(OnnxClassifier(tmp_path / "a.onnx"), one) < EXACT
    assert min(float((expected[0.5] - expected[s]).abs().max()) for s in (0, 1)) > 0.1
    with one.frozen(), torch.no_grad():
        assert torch.equal(one(images(4)), expected[0])


@pytest.mark.parametrize("kind", ["off", "bare", "class_specific"])
def test_what_is_exported_is_what_the_classifier_is_now(processor, tmp_path, kind):
    """The adapter switched off, no adapter, and texts with prompts of their own."""
    options = {"class_specific": True, "class_names": list(NAMES)} if kind == "class_specific" else {}
    one = make(processor, **options)
    with torch.no_grad():
        adapted = one(images(4))
    if kind == "bare":
        one = ZeroShotClassifier(CLIPModel.from_pretrained(TINY_CLIP), processor, NAMES).eval()
    with one.frozen():
        frozen = one(images(4)).detach()
    if kind == "off":
        one.model.base_model.disable_adapter_layers()
    export(one, tmp_path / "a.pt2", "torch")  # takes less time than ONNX, and is where the kinds differ
    found = torch.export.load(tmp_path / "a.pt2").module()
    expected = frozen if kind in ("off", "bare") else adapted
    assert not torch.allclose(frozen, adapted, atol=0.1)
    with torch.no_grad():
        assert torch.equal(found(images(4)), expected)


def test_the_classifier_stays_as_it_was(processor, tmp_path):
    one = make(processor).train()
    trained = {name: p.requires_grad for name, p in one.named_parameters()}
    before = {name: value.clone() for name, value in one.state_dict().items()}
    export(one, tmp_path / "a.pt2", "torch")
    assert one.training and trained == {name: p.requires_grad for name, p in one.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


# ------------------------------------------------------------------------------------------------------- what is said


def test_a_file_describes_itself(classifier, files):
    description = describe_export(classifier)
    assert description["class_names"] == list(NAMES) and description["precision"] == "float32"
    assert description["texts"] == {name: [f"a photo of a {name}."] for name in NAMES}
    assert description["preprocessing"] == {
        "resize": {"shortest_edge": 32}, "resample": "bicubic", "center_crop": {"height": 32, "width": 32},
    }  # fmt: skip
    assert (description["strength"], description["calibration"]) == (1, None)
    assert description["size"] == [32, 32] and description["adapter"] != description["base_model"]
    extra = {"capt_peft.json": ""}
    torch.export.load(files[0] / "model.pt2", extra_files=extra)
    of_torch = json.loads(extra["capt_peft.json"])
    of_onnx, of_int8 = (OnnxClassifier(files[0] / name) for name in ("model.onnx", "model.int8.onnx"))
    assert of_torch == of_onnx.description == description
    assert of_int8.description == {**description, "precision": "int8"}
    assert of_onnx.class_names == NAMES


def test_the_texts_of_each_class_are_those_of_which_the_mean_is_taken(processor):
    own = {"seven": ["a photo of the digit 7", "a {} there"]}
    model = CLIPModel.from_pretrained(TINY_CLIP)
    one = ZeroShotClassifier(model, processor, NAMES, ["a {}", "the {}"], class_texts=own).eval()
    texts = describe_export(one)["texts"]
    assert list(texts) == list(NAMES) and texts["seven"] == ["a photo of the digit 7", "a seven there"]
    assert texts["red circle"] == ["a red circle", "the red circle"]
    again = ZeroShotClassifier(model, processor, NAMES, class_texts=texts).eval()  # what a reader of a file can do
    assert torch.equal(again.text_features(), one.text_features())


def test_a_file_of_before_the_texts_is_read(files, tmp_path):
    import onnx

    model = onnx.load(files[0] / "model.onnx")
    (entry,) = model.metadata_props
    entry.value = json.dumps({k: v for k, v in json.loads(entry.value).items() if k != "texts"})
    onnx.save(model, tmp_path / "old.onnx")
    old, new = OnnxClassifier(tmp_path / "old.onnx"), OnnxClassifier(files[0] / "model.onnx")
    assert old.class_names == NAMES and difference(old, new) == 0


def test_the_opset_is_the_one_that_is_stated(files):
    import onnx

    for name in ("model.onnx", "model.int8.onnx"):
        model = onnx.load(files[0] / name)
        onnx.checker.check_model(model, full_check=True)
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == module.OPSET
        assert [value.name for value in model.graph.input] == ["pixels"]
        assert [value.name for value in model.graph.output] == ["logits"]
        batch, *rest = (d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)
        assert isinstance(batch, str) and rest == [3, 32, 32]


def test_without_an_adapter_none_is_named(processor):
    bare = ZeroShotClassifier(CLIPModel.from_pretrained(TINY_CLIP), processor, NAMES)
    one = make(processor)
    with one.frozen():
        for described in (describe_export(one), describe_export(bare)):
            assert described["adapter"] is described["strength"] is described["calibration"] is None
    assert describe_export(one)["base_model"] == describe_export(bare)["base_model"]


# ---------------------------------------------------------------------------------------------------------- evaluated


def test_evaluate_measures_an_exported_file(classifier, files):
    with torch.no_grad():
        labels = classifier(images(12)).argmax(1)
    labels[:3] = (labels[:3] + 1) % 3
    one = OnnxClassifier(files[0] / "model.onnx")
    square = parse_attack("square-20", ThreatModel("linf", "16/255"))
    found = evaluate(
        one, (images(12), labels), square, signs=False, progress=False
    )  # to look for signs takes gradients
    assert found.clean.correct == 9 and found.attacks[0].accuracy.correct <= 9
    with pytest.raises(ValueError, match="does not pass gradients"):
        evaluate(one, (images(12), labels), parse_attack("pgd-2", ThreatModel("linf", "4/255")), progress=False)


def test_a_white_box_attack_goes_through_torchs_program(classifier, files):
    with torch.no_grad():
        labels = classifier(images(12)).argmax(1)
    program = torch.export.load(files[0] / "model.pt2").module()
    attack = parse_attack("pgd-5", ThreatModel("linf", "16/255"))
    one, other = (evaluate(f, (images(12), labels), attack, progress=False, signs=False) for f in (program, classifier))
    assert one.attacks[0].accuracy == other.attacks[0].accuracy and other.attacks[0].broken > 0


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.onnx", {"format": "onx"}, "Unknown format 'onx'. Allowed: onnx, torch."),
        ("a.pt2", {"format": "torch", "int8": True}, "int8 is for the format onnx, not torch"),
        ("a.pt", {"format": "torch"}, "'a.pt', must end with .pt2 for the format torch"),
        ("a.pt2", {}, "must end with .onnx for the format onnx"),
        ("taken.onnx", {}, "taken.onnx is there already. Give overwrite=True"),
        ("folder.onnx", {"overwrite": True}, "a folder has that name"),
        ("taken.onnx/a.onnx", {}, "Nothing can be written into output="),
    ],
)
def test_wrong_input_is_refused_and_nothing_is_written(classifier, tmp_path, name, options, words):
    (tmp_path / "taken.onnx").write_text("mine")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ValueError) as caught:
        export(classifier, tmp_path / name, **options)
    assert words in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.onnx", "taken.onnx"]
    assert (tmp_path / "taken.onnx").read_text() == "mine"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(processor, tmp_path, dtype):
    half = ZeroShotClassifier(CLIPModel.from_pretrained(TINY_CLIP, dtype=dtype), processor, NAMES)
    with pytest.raises(ValueError, match=f"this one has {dtype} on cpu"):
        export(half, tmp_path / "a.pt2", "torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["weights", "graph"])
def test_a_file_with_other_logits_is_not_left_behind(processor, tmp_path, monkeypatch, broken):
    one = make(processor)
    (tmp_path / "a.pt2").write_text("the earlier one")
    if broken == "weights":
        with torch.no_grad():
            one.base_model.visual_projection.weight[0] = float("nan")
    else:
        forward = module._Fixed.forward
        monkeypatch.setattr(module._Fixed, "forward", lambda self, pixels: forward(self, pixels.flip(-1)))
    with pytest.raises(ValueError, match="are not the classifier's"):
        export(one, tmp_path / "a.pt2", "torch", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]
    assert (tmp_path / "a.pt2").read_text() == "the earlier one"


def test_a_file_is_replaced_where_that_is_wanted(classifier, tmp_path):
    (tmp_path / "a.pt2").write_text("the earlier one")
    export(classifier, tmp_path / "a.pt2", "torch", overwrite=True)
    assert difference(torch.export.load(tmp_path / "a.pt2").module(), classifier) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]


@pytest.mark.parametrize("missing", [["onnxruntime"], ["onnxscript"], ["onnxruntime", "onnxscript"]])
def test_a_missing_extra_is_named_for_onnx_alone(classifier, tmp_path, monkeypatch, missing):
    find_spec = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name, *a: None if name in missing else find_spec(name, *a)
    )
    with pytest.raises(ModuleNotFoundError, match=r" not installed: pip install 'capt-peft\[export\]'\.$") as caught:
        export(classifier, tmp_path / "a.onnx")
    assert all(name in str(caught.value) for name in missing) and not list(tmp_path.iterdir())
    export(classifier, tmp_path / "a.pt2", "torch")


def test_weights_above_what_onnx_holds_are_refused(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LARGEST", 1000)
    with pytest.raises(ValueError, match=r"a file of ONNX holds 2 at most\. Export with the format torch"):
        export(classifier, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_other_files_are_no_exported_ones(files, tmp_path):
    import onnx

    with pytest.raises(FileNotFoundError, match="There is no file"):
        OnnxClassifier(tmp_path / "a.onnx")
    (tmp_path / "a.onnx").write_text("not a model")
    with pytest.raises(ValueError, match="cannot be read as an ONNX file"):
        OnnxClassifier(tmp_path / "a.onnx")
    model = onnx.load(files[0] / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="was not written by `capt-peft export`"):
        OnnxClassifier(tmp_path / "other.onnx")


def test_exporters_say_nothing_and_leave_loggers_and_warnings_alone(classifier, tmp_path, capfd, recwarn):
    level = logging.getLogger("torch.onnx").level
    export(classifier, tmp_path / "a.onnx", int8=True)
    told = capfd.readouterr()
    assert (told.out, told.err, list(recwarn)) == ("", "", [])
    assert logging.getLogger("torch.onnx").level == level


def test_towers_of_different_widths_are_exported(processor, tmp_path):
    """And another patch size, 5 layers, prompts in the first two of them."""
    text = {"vocab_size": 737, "bos_token_id": processor.tokenizer.bos_token_id, "max_position_embeddings": 77}
    model = random_clip(eos_token_id=processor.tokenizer.eos_token_id, **text)
    with torch.no_grad():
        model.logit_scale.fill_(4.6052)  # 100, as published CLIPs have
    model = get_peft_model(model, CaptConfig(vision_depth=2, text_depth=1, num_vision_tokens=5))
    shake(model)
    one = ZeroShotClassifier(model.eval(), processor, NAMES)
    export(one, tmp_path / "a.onnx")
    assert difference(OnnxClassifier(tmp_path / "a.onnx"), one) < EXACT


def test_a_siglip_is_exported_with_its_scale_and_bias(tmp_path):
    """And with its preprocessing, which has no crop, at a strength in between."""
    names = ["cat", "red dog", "blue shape"]
    one = ZeroShotClassifier(siglip_adapter(random_siglip(), strength=0.5), siglip_processor(), names).eval()
    export(one, tmp_path / "a.onnx")
    found = OnnxClassifier(tmp_path / "a.onnx")
    assert difference(found, one) < EXACT
    assert found(images(4)).max() < -5  # the bias is -10
    steps = {"resize": {"height": 32, "width": 32}, "resample": "bicubic", "center_crop": None}
    assert found.description["preprocessing"] == steps


@pytest.mark.parametrize("bare", [False, True])
def test_a_metaclip_2_is_exported(processor, tmp_path, bare):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 16,
    }  # fmt: skip
    tokenizer = processor.tokenizer
    text = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    vision = {**shape, "image_size": 32, "patch_size": 8}
    config = MetaClip2Config(text_config={**shape, **text}, vision_config=vision, projection_dim=16)
    model = MetaClip2Model(config)
    with torch.no_grad():  # its initial weights are so small that every layer is nearly the identity
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    if not bare:
        shake(model := get_peft_model(model, CaptConfig(coupling="text_to_vision", num_vision_tokens=2, strength=0.5)))
    one = ZeroShotClassifier(model.eval(), processor, NAMES)
    export(one, tmp_path / "a.onnx")
    assert difference(OnnxClassifier(tmp_path / "a.onnx"), one) < EXACT
    export(one, tmp_path / "a.pt2", "torch")
    assert difference(torch.export.load(tmp_path / "a.pt2").module(), one) == 0
    with torch.no_grad():
        assert one(images(4)).std(0).max() > 0.1  # images matter
        if not bare:
            with one.frozen():
                assert (one(images(4)) - torch.export.load(tmp_path / "a.pt2").module()(images(4))).abs().max() > 0.1
