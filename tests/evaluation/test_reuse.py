"""Results belong to their model, its adapters and its images: others are refused, and what is damaged is measured again."""

import json
import re
import shutil
from contextlib import suppress

import pytest
import torch
from datasets import ClassLabel, Value
from helpers import TINY_CLIP, shake
from peft import LoraConfig, get_peft_model
from torch import nn
from toy_models import make_model, some_images
from transformers import CLIPModel

from capt_peft import PGD, CaptConfig, ThreatModel, ZeroShotClassifier, evaluate, load_task
from capt_peft.evaluation import Accuracy, Evaluation
from capt_peft.evaluation import loop as loop_module
from capt_peft.evaluation.resume import compared_logits
from capt_peft.results.earlier import TOLERANCE, logit_changes
from capt_peft.tuner.fingerprint import adapter_fingerprint
from capt_peft.utils.files import DamagedFileError

ATTACK = PGD(ThreatModel("linf", "4/255"), steps=2)
PIXELS = some_images(30)
MODEL = make_model()
LABELS = MODEL(PIXELS).argmax(1)


def quiet(model, data=(PIXELS, LABELS), attacks=ATTACK, **kwargs):
    return evaluate(model, data, attacks, progress=False, **{"signs": False, **kwargs})


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.model, self.factor = make_model(), factor

    def forward(self, pixels):
        return self.factor * self.model(pixels)

    def logits(self, pixels):
        return self(pixels)


def closure(factor):
    def logits_fn(pixels):
        return factor * MODEL(pixels)

    return logits_fn


class Noisy(nn.Module):
    def __init__(self, model, generator=None):
        super().__init__()
        self.model, self.generator = model, generator

    def forward(self, pixels):
        return self.model(pixels) + 0.3 * torch.randn(len(pixels), 5, generator=self.generator)


def wide(factor):
    weight = torch.randn(192, 100, generator=torch.Generator().manual_seed(0))
    weight[:, 57] *= factor
    return lambda pixels: pixels.flatten(1) @ weight


OTHERS = {
    "lambdas": (lambda pixels: MODEL(pixels), lambda pixels: -MODEL(pixels)),
    "closures": (closure(1), closure(1.01)),
    "settings": (Scaled(1), Scaled(0.999)),
    "methods": (Scaled(1).logits, Scaled(2).logits),
    "closures over weights": (lambda pixels: Scaled(1)(pixels), Scaled(1).forward),
    "one of 100 classes": (wide(1), wide(1.1)),
    "random weights": (Noisy(make_model(4.0)), Noisy(make_model(4.00001))),
}


class Stopped(BaseException):
    pass


@pytest.fixture(params=["finished", "half done"])
def begun(request, tmp_path, monkeypatch):
    """Runs an evaluation to its end, or until it is stopped."""

    def run(model, **kwargs):
        path = tmp_path / "r.json"
        if request.param == "half done":
            monkeypatch.setattr(Evaluation, "save", lambda *_: (_ for _ in ()).throw(Stopped))
        with suppress(Stopped):
            quiet(model, output=path, **kwargs)
        monkeypatch.undo()
        return path

    return run


@pytest.fixture
def runs(monkeypatch):
    """Counts the batches that are attacked."""
    attack_batch, counted = loop_module.attack_batch, []
    monkeypatch.setattr(loop_module, "attack_batch", lambda *a, **k: counted.append(1) or attack_batch(*a, **k))
    return counted


@pytest.mark.parametrize("name", OTHERS)
def test_figures_of_another_model_are_kept_apart_whatever_it_is_called(begun, name, caplog):
    first, other = OTHERS[name]
    if not isinstance(first, nn.Module):
        first.__dict__["__qualname__"] = other.__dict__["__qualname__"] = "f"
    path = begun(first)
    before = path.read_bytes() if path.exists() else None
    measured = quiet(other, output=path)
    assert re.search(r"another configuration: model\.(logits|fingerprint|callable)", caplog.text)
    assert Evaluation.load(path) == measured
    assert before is None or path.with_name("r.old1.json").read_bytes() == before
    assert name == "random weights" or measured == quiet(other)


@pytest.mark.parametrize(
    "model", [MODEL, closure(1), Noisy(MODEL), Noisy(MODEL, torch.Generator()), wide(1), MODEL.bfloat16]
)
def test_the_same_model_goes_on_or_is_not_run_again(begun, runs, model):
    if model == MODEL.bfloat16:
        half = make_model().bfloat16()
        forward = half.forward
        half.forward = lambda pixels: forward(pixels.bfloat16())
        model = half
    path = begun(model)
    done = len(runs)
    quiet(model, output=path)
    assert len(runs) == done


def test_a_random_model_is_recorded_as_random():
    logits = quiet(Noisy(MODEL, torch.Generator())).configuration["model"]["logits"]
    assert logits == {"images": logits["images"], "scored": "random"}
    assert isinstance(quiet(Noisy(MODEL)).configuration["model"]["logits"]["scored"], list)  # it follows from a seed


def test_rounding_is_the_same_model_and_more_is_not():
    old = {"images": [0, 1], "scored": [[30.0, -1.0], [2.0, 0.5]]}
    for change, same in ((TOLERANCE / 3, True), (3 * TOLERANCE, False)):
        new = {**old, "scored": [[30.0, -1.0 + change], [2.0, 0.5]]}
        found = logit_changes(new, old)
        assert (not found) is same
        assert same or "another machine, device or number of threads" in found[0]
    assert "another machine" not in logit_changes({**old, "scored": [[1.0, 9.0]] * 2}, old)[0]


@pytest.mark.parametrize("place", [1, 14, 28])
def test_one_other_pixel_of_one_image_is_another_data_set(begun, caplog, place):
    path = begun(MODEL)
    pixels = PIXELS.clone()
    pixels[place, 2, 5, 7] = 1 - pixels[place, 2, 5, 7]
    assert quiet(MODEL, (pixels, LABELS), output=path) == quiet(MODEL, (pixels, LABELS))
    assert "data.fingerprint" in caplog.text


# ---------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def digits():
    return load_task("digits")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, digits):
    """Folders of a CAPT and a LoRA adapter that change the answers."""
    folders = {}
    for name, config in {
        "capt": CaptConfig(template=digits.template),
        "lora": LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    }.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), config)
        shake(model)
        model.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("kind", ["capt", "lora"])
def test_an_adapter_that_transformers_loaded_is_recorded_with_the_fingerprint_of_its_folder(
    kind, adapters, processor, digits, tmp_path, caplog
):
    data = digits["test"].select(range(4))

    def of(model):
        return ZeroShotClassifier(model.eval(), processor, digits.class_names, digits.template)

    bare = quiet(of(CLIPModel.from_pretrained(TINY_CLIP)), data, (), output=tmp_path / "r.json").configuration["model"]
    model = CLIPModel.from_pretrained(TINY_CLIP)
    model.load_adapter(str(adapters[kind]))
    record = quiet(of(model), data, (), output=tmp_path / "r.json").configuration["model"]
    assert re.search(r"model\.adapter is .* now and was null", caplog.text)
    assert record["adapter"]["fingerprint"] == adapter_fingerprint(adapters[kind])
    assert record["base"]["fingerprint"] == bare["base"]["fingerprint"]
    model.disable_adapters()
    off = quiet(of(model), data, (), output=tmp_path / "r.json").configuration["model"]
    assert off["adapter"] is None and off["logits"] == bare["logits"]


# ------------------------------------------------------------------------------------------------------------ labels


def test_labels_are_matched_by_the_names_that_a_split_gives_them(processor, digits):
    names = list(digits.class_names)
    classifier = ZeroShotClassifier(CLIPModel.from_pretrained(TINY_CLIP).eval(), processor, names, digits.template)
    data = digits["test"].select(range(12))
    right = quiet(classifier, data, ()).clean

    def renamed(turned):
        column = [turned.index(names[i]) if names[i] in turned else i for i in data["label"]]
        return data.remove_columns("label").add_column("label", column, feature=ClassLabel(names=turned))

    assert right.correct > 6
    assert quiet(classifier, renamed(names[::-1]), ()).clean == right
    assert quiet(classifier, renamed([*names[3:], *names[:3], "ten"]), ()).clean == right
    assert quiet(classifier, data.cast_column("label", Value("int64")), ()).clean == right
    with pytest.raises(ValueError, match="images of the class 'none of them'"):
        quiet(classifier, renamed(["none of them", *names[1:]]), ())


# ------------------------------------------------------------------------------------------------------------ damage


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def binary(path):
    path.write_bytes(bytes(range(256)))


def null(path):
    path.write_text("null")


def nested(path):
    path.write_text("[" * 100_000)


def changed_digit(path):
    text = path.read_bytes()
    place = max(i for i, letter in enumerate(text) if letter in b"345")
    path.write_bytes(text[:place] + b"6" + text[place + 1 :])


damages = pytest.mark.parametrize("damage", [cut, empty, binary, null, nested])


@damages
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_damaged_results_are_measured_again(tmp_path, runs, caplog, damage, overwrite, suffix):
    path = tmp_path / "r.json"
    whole = quiet(MODEL, output=path)
    damage(path.with_suffix(suffix))
    assert quiet(MODEL, output=path, overwrite=overwrite) == whole and len(runs) == 2
    assert Evaluation.load(path) == whole
    assert overwrite or (path.name in caplog.text and "is measured again" in caplog.text)


def test_results_whose_figures_are_not_those_of_their_examples_are_measured_again(tmp_path, runs):
    path = tmp_path / "r.json"
    whole = quiet(MODEL, output=path)
    other = tmp_path / "other.json"
    quiet(MODEL, attacks=PGD(ThreatModel("linf", "9/255"), steps=2), output=other)
    shutil.copy(other.with_suffix(".parquet"), path.with_suffix(".parquet"))
    assert quiet(MODEL, output=path) == whole
    content = json.loads(path.read_text())
    content["attacks"][0]["correct"] = 700
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="damaged"):
        Evaluation.load(path)
    assert quiet(MODEL, output=path) == whole and len(runs) == 4


def lowered(row):
    row |= Accuracy(row["correct"] - 1, row["n"]).to_dict()


EDITS = {
    "clean counts fewer": lambda content: lowered(content["clean"]),
    "clean counts more": lambda content: content["clean"].update(Accuracy(30, 30).to_dict()),
    "an attack counts fewer": lambda content: lowered(content["attacks"][0]),
    "an attack broke none": lambda content: content["attacks"][0].update(broken=0),
    "the worst case counts more": lambda content: content["worst_case"][0].update(Accuracy(30, 30).to_dict()),
    "no worst case": lambda content: content.update(worst_case=[]),
    "a share of its own": lambda content: content["clean"].update(accuracy=0.99),
    "an interval of its own": lambda content: content["attacks"][0].update(interval_95=[0.0, 1.0]),
    "an attack is left out": lambda content: content["attacks"].pop(0),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_figures_edited_by_hand_are_refused(tmp_path, edit):
    path = tmp_path / "r.json"
    attacks = [PGD(ThreatModel("linf", "9/255"), steps=steps) for steps in (1, 3)]
    whole = quiet(MODEL, (PIXELS, torch.cat([LABELS[:25], (LABELS[25:] + 1) % 5])), attacks, output=path)
    assert whole.clean == Accuracy(25, 30) and 0 < whole.robust.correct < 25
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match="damaged"):
        Evaluation.load(path)


@pytest.mark.parametrize("damage", [cut, empty, binary, null, nested, changed_digit])
@pytest.mark.parametrize("name", ["configuration.json", "jobs/clean-000000.json", "jobs/00-000001.json"])
def test_damaged_unfinished_work_is_measured_again(tmp_path, monkeypatch, caplog, damage, name):
    path = tmp_path / "r.json"
    monkeypatch.setattr(Evaluation, "save", lambda *_: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        quiet(MODEL, output=path, batch_size=10)
    monkeypatch.undo()
    if name == "configuration.json" and damage is changed_digit:
        (tmp_path / "r.partial" / name).unlink()
    else:
        damage(tmp_path / "r.partial" / name)
    assert quiet(MODEL, output=path, batch_size=10) == quiet(MODEL, batch_size=10)
    assert name.split("/")[-1] in caplog.text and "measured again" in caplog.text


def test_a_file_of_something_else_is_not_overwritten(tmp_path):
    path = tmp_path / "package.json"
    path.write_text('{"name": "something else"}')
    with pytest.raises(ValueError, match="something else than an evaluation"):
        quiet(MODEL, output=path)
    assert path.read_text() == '{"name": "something else"}'


# ------------------------------------------------------------------------------------ what sample logits alone do not show


def one_hot(weights):
    return lambda pixels: nn.functional.one_hot(((pixels - 0.5).flatten(1) @ weights).argmax(1), 4).float()


def in_numpy(weights):
    array = weights.numpy()
    return lambda pixels: one_hot(torch.from_numpy(array))(pixels)


def masked(weights, low):
    def logits(pixels):
        return torch.cat([(pixels - 0.5).flatten(1) @ weights, torch.full((len(pixels), 1), low)], 1)

    return logits


class Neighbours:
    def __init__(self, bank, labels):
        self.bank, self.labels = bank, labels

    def __call__(self, pixels):
        nearest = torch.cdist(pixels.flatten(1), self.bank).topk(5, largest=False).indices
        return nn.functional.one_hot(self.labels[nearest], 4).float().mean(1)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


W = drawn(0, 192, 4)
BANK, KINDS = drawn(3, 60, 192), torch.arange(60) % 4
HIDDEN = {
    "weights of a closure, hard labels": (one_hot(W), one_hot(W + 1e-3 * drawn(1, 192, 4))),
    "arrays of a closure": (in_numpy(W), in_numpy(W + 1e-3 * drawn(1, 192, 4))),
    "a class masked at -1e9": (masked(W, -1e9), masked(-W, -1e9)),
    "memory of an object": (Neighbours(BANK, KINDS), Neighbours(BANK, KINDS.where(torch.arange(60) > 0, 3))),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_callables_are_told_apart_by_what_they_hold_and_by_every_class(name, tmp_path):
    data = (PIXELS, LABELS.clamp(max=3))
    first, other = HIDDEN[name]
    for function in HIDDEN[name]:
        function.__dict__["__qualname__"] = "f"
    path = tmp_path / "r.json"
    before = quiet(first, data, (), output=path)
    assert quiet(first, data, (), output=path) == before and not list(tmp_path.glob("*.old*"))
    assert quiet(other, data, (), output=path) == quiet(other, data, ())
    assert list(tmp_path.glob("*.old1.json"))


def test_a_masked_class_does_not_hide_the_others():
    logits = torch.cat([drawn(4, 16, 40), torch.full((16, 1), -1e9)], 1).double()
    other = logits.clone()
    other[:, :40] += 0.1
    old, new = ({"images": [0], "scored": compared_logits(z, z)} for z in (logits, other))
    assert not logit_changes(old, old) and logit_changes(new, old)
