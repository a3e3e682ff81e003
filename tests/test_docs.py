"""The documentation: every public name is in it, its links lead somewhere, its commands and code are what the package knows."""

import importlib
import json
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
from helpers import TINY_CLIP
from peft import get_peft_model
from PIL import Image
from siglip_models import random_siglip, siglip_processor
from transformers import CLIPModel

import capt_peft
from capt_peft.benchmark import Lines
from capt_peft.commands import COMMANDS
from capt_peft.commands.options import check_options, options_in
from capt_peft.methods import METHODS
from capt_peft.objectives import WEIGHTINGS

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
MODELS = sorted((ROOT / "capt_peft" / "toy").rglob("README.md"))
READMES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").rglob("README.md")), *MODELS]
PAGES = [*DOCS, *READMES]
ROOMS = ("attacks", "backbones", "benchmark", "data", "defences", "evaluation", "report", "toy", "training", "tuner")
WITH_ALL = ("capt_peft", *(f"capt_peft.{room}" for room in ROOMS))
WITHOUT_ALL = {
    "capt_peft.report.boards": ("collect", "Found", "Board", "Source"),
    "capt_peft.report.entries": ("BoardEntry", "Score"),
    "capt_peft.report.leaderboard": ("write_leaderboard",),
    "capt_peft.results.card": ("write_card", "CardDetails"),
    "capt_peft.results.hub": ("save_run", "update_card"),
    "capt_peft.results.run": ("RunResults",),
    "capt_peft.randomness": ("example_generator", "example_generators"),
}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """The code blocks of a page, without their indent."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [re.sub(r"(?m)^  (?=\S)", "", code) if language == "" else code for kind, code in found if kind == language]


def commands(page):
    """The command lines of a page that run one of ours, as lists of words from the command's name on."""
    lines = [
        line for block in (*blocks(page, ""), *blocks(page, "bash")) for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"`((?:capt-peft|accelerate|torchrun) [^`]*)`", page.read_text(encoding="utf-8"))
    for line in lines:
        words = shlex.split(line, comments=True)
        at = next((i for i, word in enumerate(words) if word in ("capt-peft", "capt_peft")), len(words))
        if at == 0 or words[at - 1 : at] == ["-m"]:
            yield words[at + 1 :]


def documented():
    """The names that the API pages show, as they are written there: `capt_peft.attacks.PGD`."""
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    return {name for page in pages for name in re.findall(r"(?m)^::: (\S+)$", page.read_text(encoding="utf-8"))}


def find(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("module", [*WITH_ALL, *WITHOUT_ALL])
def test_every_public_name_has_a_place_in_the_reference(module):
    names = WITHOUT_ALL.get(module) or importlib.import_module(module).__all__
    shown = {name.rsplit(".", 1)[1] for name in documented()}
    assert sorted(set(names) - shown) == [], f"add them to a page of docs/api (`::: {module}.NAME`)"


def test_no_room_has_public_names_that_are_not_looked_for():
    rooms = [info.name for info in pkgutil.iter_modules(capt_peft.__path__) if info.ispkg]
    assert {room for room in rooms if hasattr(importlib.import_module(f"capt_peft.{room}"), "__all__")} == set(ROOMS)


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_code_fits_its_box(page):
    """84 columns are what a page shows beside both navigations, on a screen of 1366 pixels."""
    lines = [line for _, code in FENCE.findall(page.read_text(encoding="utf-8")) for line in code.splitlines()]
    assert [line for line in lines if len(line) > 84] == []


def test_the_reference_shows_nothing_that_is_not_there():
    for name in documented():
        find(name)
    names = [name.rsplit(".", 1)[1] for name in documented()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_images_lead_to_files(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = [
        target
        for target in targets
        if not re.match(r"[a-z]+:|#", target) and not (page.parent / target.split("#")[0]).exists()
    ]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_have_options_that_there_are(page):
    for name, *words in commands(page):
        if name not in ("COMMAND", "--help"):
            check_options(words, options_in(*COMMANDS[name].sources))


@pytest.mark.parametrize(("page", "names"), [("train.md", METHODS), ("how_it_works.md", WEIGHTINGS)])
def test_every_method_and_weighting_is_explained(page, names):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert [name for name in names if f"| `{name}`" not in text] == []


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in DOCS)


def test_commands_are_found():
    assert [words[0] for words in commands(ROOT / "docs" / "evaluate.md")].count("evaluate") >= 3
    assert [words[0] for words in commands(ROOT / "docs" / "train.md")].count("train") >= 6


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_code_compiles(page):
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")


def test_the_quickstart_runs(tmp_path, monkeypatch):
    """Its main block, with an epoch and a few images instead of all of them."""
    tune, measure = blocks(ROOT / "docs" / "quickstart.md", "python")
    monkeypatch.chdir(tmp_path)
    for old, new in (
        ("few_shot(16,", "few_shot(2,"),
        ("num_train_epochs=60", "num_train_epochs=1, eval_attack='pgd-2', use_cpu=True"),
        ('evaluate(task["test"])', 'evaluate(task["test"].select(range(20)))'),
    ):
        assert old in tune
        tune = tune.replace(old, new)
    for old, new in (('"autoattack"', '"pgd-3"'), ("range(100)", "range(20)")):
        assert old in measure
        measure = measure.replace(old, new)
    names = {}
    exec(tune, names)
    exec(measure, names)
    assert (tmp_path / "outputs" / "digits" / "adapter_model.safetensors").is_file()
    assert names["evaluation"].clean.n == 20


def test_the_trainers_block_evaluates_both_splits_and_the_record_of_its_run_fills_a_card(tmp_path, monkeypatch):
    """The block of train.md, then that of share.md, with an epoch and a few images."""
    [tune] = [code for code in blocks(ROOT / "docs" / "train.md", "python") if "CaptTrainer(" in code]
    [save] = [code for code in blocks(ROOT / "docs" / "share.md", "python") if "save_run(" in code]
    monkeypatch.chdir(tmp_path)
    for old, new in (
        ("few_shot(16,", "few_shot(1,"),
        ("num_train_epochs=60,", "num_train_epochs=1, eval_attack='pgd-2', use_cpu=True,"),
        ("eval_steps=100,", "eval_steps=1,"),
        ('task["validation"]', 'task["validation"].select(range(10))'),
        ('predict(task["test"])', 'predict(task["test"].select(range(10)))'),
    ):
        assert old in tune
        tune = tune.replace(old, new)
    names = {}
    exec(tune, names)
    logged = {name for entry in names["trainer"].state.log_history for name in entry}
    assert {"eval_seen_robust_accuracy", "eval_held_out_robust_accuracy"} <= logged
    assert len(names["adversarial"]) == 10
    assert 'task["test"]' in save
    exec(save.replace('task["test"]', 'task["test"].select(range(10))'), names)
    assert "10 images" in (tmp_path / "outputs" / "mine" / "README.md").read_text(encoding="utf-8")


def test_the_block_on_lora_runs(tmp_path, monkeypatch, capsys):
    """With a step and few images."""
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "docs" / "peft.md", "python")
    for old, new in (("few_shot(16,", "few_shot(1,"), ("num_train_epochs=15", "max_steps=1, use_cpu=True")):
        assert old in code
        code = code.replace(old, new)
    exec(code, {})
    assert "('0', '1', '2', '3', '4', '5', '6', '7', '8', '9') a photo of the digit {}." in capsys.readouterr().out


def test_the_blocks_on_retrieval_run(capsys):
    """With a bare model, a few images and one step of each attack."""
    adapter, bare = '"outputs/demo"', '"tiny_clip", class_names=("image", "text")'
    embed, measure = blocks(ROOT / "docs" / "retrieval.md", "python")
    names = {}
    for code, pairs in (
        (embed, [('data.images["image"]', 'data.images["image"][:9]')]),
        (measure, [(adapter, bare), ("sample(200)", "sample(12)"), ("pgd-20", "pgd-1")]),
    ):
        for old, new in pairs:
            assert old in code
            code = code.replace(old, new)
        exec(code, names)
    assert names["best"].shape == (2, 3)
    assert "| text → image | L-inf 4/255 | worst case | CAPT |" in capsys.readouterr().out


def test_the_block_on_strength_runs(tmp_path, monkeypatch, capsys):
    """With an adapter that was not tuned, a few images and one step."""
    monkeypatch.chdir(tmp_path)
    digits = capt_peft.load_task("digits")
    config = capt_peft.CaptConfig(template=digits.template, class_names=list(digits.class_names))
    get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), config).save_pretrained("outputs/demo")
    (code,) = blocks(ROOT / "docs" / "strength.md", "python")
    for old, new in (('digits["validation"]', 'digits["validation"].select(range(9))'), ("steps=20", "steps=1")):
        assert old in code
        code = code.replace(old, new)
    exec(code, {})
    assert "| strength | clean, % | robust (pgd-1, L-inf 10/255), % | H, % |" in capsys.readouterr().out
    assert Path("outputs/front.png").is_file() and Path("outputs/front.json").is_file()
    capt_peft.CaptConfig.from_pretrained("outputs/chosen")


def test_the_block_on_an_objective_of_ones_own_runs_and_it_makes_another_adapter(tmp_path, monkeypatch):
    """With a few images and two steps."""
    monkeypatch.chdir(tmp_path)
    [code] = [code for code in blocks(ROOT / "docs" / "benchmark.md", "python") if "tune=tune" in code]
    for old, new in (
        ("shots=[16]", "shots=[1], limit=8, attacks=['pgd-1']"),
        ("settings={", "settings={'max_steps': 2, 'logging_steps': 1, "),
    ):
        assert old in code
        code = code.replace(old, new)
    names = {"__name__": "own"}
    exec(code, names)
    plain, own = Lines(Path("outputs/own.jsonl")).read().values()
    assert (own["status"], own["cell"]["variant"]) == ("finished", "late frozen")
    assert own["adapter_fingerprint"] != plain["adapter_fingerprint"]
    assert own["training"]["log"][-1]["alpha"] == 0.25  # of the second of two steps


def test_the_blocks_on_calibration_run(tmp_path, monkeypatch, capsys):
    """With an adapter that was not tuned, a few images and one step."""
    monkeypatch.chdir(tmp_path)
    digits = capt_peft.load_task("digits")
    digits["test"][0]["image"].save("image.png")
    config = capt_peft.CaptConfig(template=digits.template, class_names=list(digits.class_names))
    get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), config).save_pretrained("outputs/demo")
    answer, measure = blocks(ROOT / "docs" / "calibrate.md", "python")
    for old, new in (
        ('digits["validation"]', 'digits["validation"].select(range(100))'),
        ('digits["test"]', 'digits["test"].select(range(9))'),
        ('load_task("letters")["test"]', 'load_task("letters")["test"].select(range(9))'),
        ("pgd-20", "pgd-1"),
    ):
        assert old in measure
        measure = measure.replace(old, new)
    names = {}
    loading, *answers = answer.splitlines(keepends=True)[:3], *answer.splitlines()[3:]
    exec("".join(loading), names)
    exec(measure, names)
    assert "Attacks try to get the 9 images of the classes accepted as a wrong class" in capsys.readouterr().out
    names["classifier"] = capt_peft.ZeroShotClassifier.from_pretrained("outputs/calibrated")
    exec("\n".join(answers), names)  # of the calibrated adapter
    assert f"temperature={names['found'].temperature!r}" in capsys.readouterr().out


def test_the_blocks_on_defences_run(monkeypatch):
    monkeypatch.setattr(capt_peft.defences, "_KINDS", dict(capt_peft.defences._KINDS))
    put, own = blocks(ROOT / "docs" / "defences.md", "python")
    names = {}
    exec(put, names)
    assert names["logits"].shape == (4, 10)
    exec(own, names)
    defended = capt_peft.Defended(names["classifier"], names["Posterize"]())
    given = names["pixels"].requires_grad_()
    assert capt_peft.parse_defence("posterize-4").levels == 4
    (way,) = defended.defence.ways
    defended.surface(way)(given).sum().backward()
    assert given.grad.abs().max() > 0


def test_the_block_on_siglip_runs(tmp_path, monkeypatch, capsys):
    """With random weights of another size, as none can be downloaded here."""
    (code,) = blocks(ROOT / "docs" / "how_it_works.md", "python")
    random_siglip().save_pretrained(tmp_path / "google" / "siglip-base-patch16-224")
    siglip_processor().save_pretrained(tmp_path / "google" / "siglip-base-patch16-224")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert "trainable params" in capsys.readouterr().out
    assert len(names["classifier"].predict(Image.new("RGB", (32, 32)))[0]) == 2


def test_documents_name_no_place_on_a_machine():
    notebook = ROOT / "examples" / "quickstart.ipynb"
    for path in [*PAGES, notebook]:
        text = path.read_text(encoding="utf-8")
        if path == notebook:  # pictures are base64, in which anything can occur
            cells = json.loads(text)["cells"]
            text = re.sub(r'"image/png": "[^"]*"', "", json.dumps(cells))
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users|mnt|opt)/", text), path


def test_the_page_on_export_runs(tmp_path, monkeypatch):
    """On an adapter that is not tuned, with a few images and queries."""
    exporting, serving, measuring = blocks(ROOT / "docs" / "export.md", "python")
    for old, new in (("range(100)", "range(10)"), ("square-200", "square-5")):
        assert old in measuring
        measuring = measuring.replace(old, new)
    monkeypatch.chdir(tmp_path)
    config = capt_peft.CaptConfig(class_names=[str(digit) for digit in range(10)], template="a photo of the digit {}.")
    get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), config).save_pretrained("outputs/demo")
    names = {}
    exec(exporting, names)
    assert names["difference"] < 1e-4
    capt_peft.export(names["classifier"], "outputs/demo/model.pt2", "torch")
    exec(serving, names)
    assert names["logits"].shape == (5, 10) and names["class_names"] == config.class_names
    capt_peft.export(names["classifier"], "outputs/demo/model.int8.onnx", int8=True)
    exec(measuring, names)
