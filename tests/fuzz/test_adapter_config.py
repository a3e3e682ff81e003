"""An adapter's files with anything in them: it loads as it was saved and gives finite logits, or a ValueError says why not."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from fuzzing import LENGTHS, NUMBERS, TEXTS, VALUES, fuzz, memory_limit
from helpers import TINY_CLIP, adapted, random_clip
from hypothesis import strategies as st
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save, save_file
from transformers import AutoProcessor, CLIPModel

from capt_peft import CaptConfig, ZeroShotClassifier
from capt_peft.clip.loading import load_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CLASSES = ["cat", "dog"]
KINDS = {
    "coupled": {"coupling": "text_to_vision"},
    "saves a module": {"coupling": "none", "num_vision_tokens": 3, "modules_to_save": ["visual_projection"]},
    "class-specific": {"coupling": "none", "class_specific": True},
}
FIELDS = [
    "auto_mapping", "base_model_fingerprint", "base_model_name_or_path", "calibration", "class_names", "class_specific",
    "class_texts", "coupling", "inference_mode", "init", "init_std", "modules_to_save", "num_text_tokens", "num_vision_tokens",
    "peft_type",
    "peft_version", "revision", "runtime_config", "target_modules", "task_type", "template", "template_token_ids", "text_depth",
    "vision_depth",
]  # fmt: skip
LIKELY = st.sampled_from([
    "text_to_vision", "vision_to_text", "random", "LORA", "PREFIX_TUNING", "CAUSAL_LM", "FEATURE_EXTRACTION", "\ud800 {}",
    "{} {x}", ["a"], ["a", "a"], ["\ud800", "b"], ["a"] * 1000, [10**9] * 5, [2**70], [0] * 200, ["visual_projection"],
    ["text_model"], ["layer"], ["1"], [""], ["capt_prompt"], ["embeddings"], ["text_projection"],
])  # fmt: skip
CALIBRATION = {
    "temperature": 1.5, "threshold": 0.5, "false_rejection_rate": 0.05, "class_thresholds": [1.0, 2], "false_positive_rate": 0.05,
    "images": 100, "task": "pets", "split": "validation", "class_names": CLASSES, "texts": "0", "strength": 1, "fingerprint": "0",
}  # fmt: skip
CALIBRATIONS = st.tuples(st.sampled_from([*CALIBRATION]), VALUES).map(
    lambda change: {**CALIBRATION, change[0]: change[1]}
)
LOST = "lost"
ANY = VALUES | LIKELY | CALIBRATIONS | st.just(LOST)
CHANGES = st.lists(st.tuples(st.sampled_from(FIELDS) | TEXTS, ANY), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a base model that has a processor, and an adapter of every kind."""
    root = tmp_path_factory.mktemp("adapters")
    processor = AutoProcessor.from_pretrained(TINY_CLIP)
    ends = {"eos_token_id": processor.tokenizer.eos_token_id, "bos_token_id": processor.tokenizer.bos_token_id}
    words = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 77}
    random_clip(**ends, **words).save_pretrained(root / "base")
    processor.save_pretrained(root / "base")
    for kind, fields in KINDS.items():
        base = CLIPModel.from_pretrained(root / "base")
        adapted(base, template_token_ids=None, class_names=CLASSES, **fields).save_pretrained(root / kind)
    return root


@contextmanager
def copied(root, kind):
    """A copy of an adapter that may be spoiled."""
    folder = root / "copy"
    shutil.copytree(root / kind, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def change_fields(folder, changes):
    content = json.loads((folder / CONFIG).read_text())
    for field, value in changes:
        if value == LOST:
            content.pop(field, None)
        else:
            content[field] = value
    (folder / CONFIG).write_text(json.dumps(content))
    return content


def check(folder):
    """Every loader of this package and of PEFT loads the adapter as the file holds it, or refuses it with a sentence."""
    for load in (bare_model, classifier, config_alone):
        refuses(load, folder)
    try:
        content = json.loads((folder / CONFIG).read_text())
        ours = isinstance(content, dict) and content.get("peft_type") == "CAPT"
    except (ValueError, RecursionError):
        ours = False
    if ours:  # otherwise PEFT never asks CAPT
        refuses(peft_model, folder)
        refuses(trainable_peft_model, folder)


def refuses(load, folder):
    try:
        with memory_limit():
            load(folder)
    except ValueError as error:
        assert len(str(error)) > 30 and (load is not config_alone or str(folder) in str(error))
    except OSError as error:  # the base model that the adapter names is not there
        assert load in (bare_model, classifier) and str(folder.parent / "base") not in str(error)


def peft_model(folder, **settings):
    base = CLIPModel.from_pretrained(folder.parent / "base")
    as_saved(PeftModel.from_pretrained(base, str(folder), **settings), folder)


def trainable_peft_model(folder):
    peft_model(folder, is_trainable=True)


def bare_model(folder):
    as_saved(load_model(str(folder))[0], folder)


def classifier(folder):
    loaded = ZeroShotClassifier.from_pretrained(str(folder))
    with torch.no_grad():
        assert torch.isfinite(loaded(torch.rand(2, 3, 32, 32))).all()


def config_alone(folder):
    assert isinstance(CaptConfig.from_pretrained(str(folder)), CaptConfig)


def as_saved(model, folder):
    held, loaded = load_file(folder / WEIGHTS), get_peft_model_state_dict(model)
    assert held.keys() == loaded.keys()
    assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in held.items())


@LENGTHS
def test_any_fields_load_or_are_refused_with_a_sentence(root, times):
    @fuzz(30 * times, st.sampled_from(list(KINDS)), CHANGES)
    def holds(kind, changes):
        with copied(root, kind) as folder:
            change_fields(folder, changes)
            check(folder)


@LENGTHS
def test_any_numbers_load_or_are_refused_with_a_sentence(root, times):
    names = ["num_text_tokens", "num_vision_tokens", "text_depth", "vision_depth", "init_std"]

    @fuzz(30 * times, st.sampled_from(list(KINDS)), st.dictionaries(st.sampled_from(names), NUMBERS, min_size=1))
    def holds(kind, numbers):
        with copied(root, kind) as folder:
            change_fields(folder, numbers.items())
            check(folder)


@LENGTHS
def test_any_configuration_file_loads_or_is_refused_with_a_sentence(root, times):
    files = VALUES.map(json.dumps).map(str.encode) | st.binary(max_size=40) | st.just(b"[" * 10**5) | st.floats(0, 1)

    @fuzz(30 * times, st.sampled_from(list(KINDS)), files)
    def holds(kind, content):
        with copied(root, kind) as folder:
            path = folder / CONFIG
            whole = path.read_bytes()
            path.write_bytes(whole[: int(content * len(whole))] if isinstance(content, float) else content)
            check(folder)


@LENGTHS
def test_any_damage_to_the_weights_loads_or_is_refused_with_a_sentence(root, times):
    flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3)

    @fuzz(40 * times, st.sampled_from(list(KINDS)), st.sampled_from([1, 0.999, 0.5, 0.01]), flips)
    def holds(kind, share, flips):
        with copied(root, kind) as folder:
            content = bytearray((folder / WEIGHTS).read_bytes())
            header = 8 + int.from_bytes(content[:8], "little")  # flipped values may be finite, and yet overflow later
            for place, byte in flips:
                content[int(place * header)] = byte
            (folder / WEIGHTS).write_bytes(content[: int(share * len(content))])
            check(folder)


@LENGTHS
def test_any_other_tensors_load_or_are_refused_with_a_sentence(root, times):
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64]
    kinds += [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]
    values = st.sampled_from([0.25, float("nan"), float("inf"), -float("inf"), 1e300])
    shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)

    @fuzz(
        20 * times, st.sampled_from(list(KINDS)), st.integers(0, 99), st.sampled_from(kinds), st.none() | shapes, values
    )
    def holds(kind, place, dtype, shape, value):
        with copied(root, kind) as folder:
            tensors = load_file(folder / WEIGHTS)
            name = sorted(tensors)[place % len(tensors)]
            tensors[name] = torch.full(shape or tensors[name].shape, value, dtype=torch.float64).to(dtype)
            (folder / WEIGHTS).write_bytes(save(tensors))
            check(folder)


# ------------------------------------------------------------------------------------------- what the fuzzing has found


def refusal(root, kind, **fields):
    with copied(root, kind) as folder:
        change_fields(folder, fields.items())
        with pytest.raises(ValueError) as caught, memory_limit():
            peft_model(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("coupled", {"num_text_tokens": "2"}, "num_text_tokens='2' must be an integer"),
        ("coupled", {"base_model_name_or_path": 5}, "base_model_name_or_path=5 must be a string"),
        ("coupled", {"revision": []}, "revision=[] must be a string"),
        ("coupled", {"auto_mapping": "x"}, "auto_mapping='x' must be a dictionary"),
        ("coupled", {"init_std": 10**400}, "must be a finite number"),
        ("coupled", {"task_type": "CAUSAL_LM"}, "CAPT adds no head"),
        ("coupled", {"template": "\ud800 {}"}, "half of a character"),
        ("coupled", {"class_names": ["\ud800", "b"]}, "half of a character"),
        ("coupled", {"template": ["a {}", "\ud800 {}"]}, "half of a character"),
        ("coupled", {"template": ["a {}", 3]}, "template=['a {}', 3] must be a string or a list of strings"),
        ("coupled", {"template": []}, "has no template"),
        ("coupled", {"class_texts": {"a": ["\ud800"]}}, "half of a character"),
        ("coupled", {"class_texts": {"\ud800": ["x"]}}, "half of a character"),
        ("coupled", {"class_texts": [["a", "x"]]}, "must map class names to lists of texts"),
        ("coupled", {"class_texts": {"a": {"x": 1}}}, "they must be a list of strings"),
        ("coupled", {"class_texts": {"a": []}}, "Class 'a' has no text"),
        ("coupled", {"template_token_ids": [10**9] * 5}, "template_token_ids has 1000000000"),
        ("coupled", {"modules_to_save": ["visual_projection"]}, "lacks 1 tensor (visual_projection.weight)"),
        ("coupled", {"modules_to_save": ["layer"]}, "'layer' is not a module"),
        ("coupled", {"modules_to_save": ["1"]}, "whose prompts are saved anyway"),
        ("saves a module", {"num_text_tokens": 10**9}, "num_text_tokens=1000000000 is too many"),
        ("saves a module", {"num_vision_tokens": 2**63}, "is too many"),
        ("saves a module", {"num_text_tokens": 76}, "more than the 75 tokens"),
        (
            "saves a module",
            {"num_text_tokens": 0},
            "unexpectedly",
        ),  # its text prompts in the file were left out in silence
        (
            "class-specific",
            {"num_text_tokens": 75, "class_names": ["a"] * 10**5},
            "but its configuration describes prompts of",
        ),
    ],
)
def test_a_field_that_does_not_fit_is_named(root, kind, fields, words):
    assert words in refusal(root, kind, **fields)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[1]", b"5", b"null", b'["runtime_config"]', b"[" * 10**5, b"{}"]
)
@pytest.mark.parametrize("load", [bare_model, classifier, config_alone])
def test_a_configuration_file_of_another_kind_is_named(root, load, content):
    with copied(root, "coupled") as folder:
        (folder / CONFIG).write_bytes(content)
        said = r"cannot be used: it is|does not say of which PEFT method|is not that of a CAPT adapter"
        with pytest.raises(ValueError, match=rf"copy.adapter_config\.json ({said})"):
            load(folder)


@pytest.mark.parametrize("method", ["LORA", "magic", 5, [], LOST])
def test_an_adapter_of_another_method_is_refused_where_it_cannot_be_one(root, method):
    with copied(root, "coupled") as folder:
        change_fields(folder, [("peft_type", method)])
        with pytest.raises(ValueError, match="is not that of a CAPT adapter: its peft_type is"):
            config_alone(folder)
        with pytest.raises(
            ValueError, match=r"PEFT cannot read it|does not say of which PEFT method|target_modules|lacks"
        ):
            bare_model(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["visual_projection.weight", "text_model.embeddings.token_embedding.capt_prompt"])
def test_values_that_are_not_finite_are_refused_in_every_precision_and_module(root, dtype, name):
    with copied(root, "saves a module") as folder:
        tensors = load_file(folder / WEIGHTS)
        value = 1e300 if dtype == torch.float64 else float("nan")
        shape = tensors[f"base_model.model.{name}"].shape
        tensors[f"base_model.model.{name}"] = torch.full(shape, value, dtype=torch.float64).to(dtype)
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(ValueError, match="NaN or infinite"):
            peft_model(folder)


def test_a_saved_module_of_another_shape_is_refused(root):
    with copied(root, "saves a module") as folder:
        tensors = load_file(folder / WEIGHTS)
        tensors["base_model.model.visual_projection.weight"] = torch.zeros(3, 3)
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(ValueError, match=r"has the shape \(3, 3\)"):
            peft_model(folder)
