"""`capt-peft export`: the file stands beside the adapter, gives its logits, and wrong input is told before a model is loaded."""

import json
import shutil
import sys

import pytest
import torch
from helpers import TINY_CLIP

from capt_peft import OnnxClassifier, ZeroShotClassifier
from capt_peft.commands import main as command_line
from capt_peft.commands.export import main

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(name, **options):
    return ZeroShotClassifier.from_pretrained(str(name), **options)(PIXELS)


def test_an_adapter_gets_its_file_beside_it(adapter, capsys):
    path = main(["--adapter", str(adapter)])
    assert path == adapter / "model.onnx"
    assert torch.allclose(OnnxClassifier(path)(PIXELS), logits(adapter), rtol=0, atol=1e-4)
    told = capsys.readouterr().out
    assert (
        f"{path}: 3." in told and " MB, " in told and "by at most" not in told and "differ from the model's by" in told
    )
    small = main(["--adapter", str(adapter), "--int8"])
    assert small == adapter / "model.int8.onnx" and small.stat().st_size < 0.4 * path.stat().st_size
    assert OnnxClassifier(small).description["precision"] == "int8"


def test_a_bare_clip_is_exported_with_the_classes_that_are_named(tmp_path):
    output = tmp_path / "new" / "pets.pt2"
    words = ["--base", "tiny_clip", "--class_names", "cat", "dog", "--template", "a {} here.", "--format", "torch"]
    assert main([*words, "--output", str(output)]) == output
    expected = logits(TINY_CLIP, class_names=["cat", "dog"], template="a {} here.")
    assert torch.equal(torch.export.load(output).module()(PIXELS), expected)


def test_texts_come_from_files_as_for_the_other_commands(adapter, tmp_path):
    (tmp_path / "templates.txt").write_text("a photo of a {}.\na drawing of a {}.\n")
    (tmp_path / "texts.json").write_text(json.dumps({"three": ["a photo of a 3", "a photo of the {}."]}))
    texts = ["--template", str(tmp_path / "templates.txt"), "--class_texts", str(tmp_path / "texts.json")]
    path = main(["--adapter", str(adapter), "--format", "torch", *texts])
    own, templates = {"three": ["a photo of a 3", "a photo of the three."]}, ["a photo of a {}.", "a drawing of a {}."]
    extra = {"capt_peft.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    assert torch.equal(program(PIXELS), logits(adapter, template=templates, class_texts=own))
    about = json.loads(extra["capt_peft.json"])
    assert about["template"] == templates
    assert about["texts"] == {n: own.get(n, [t.format(n) for t in templates]) for n in about["class_names"]}
    bare = tmp_path / "bare.pt2"
    words = ["--base", "tiny_clip", "--class_names", "cat", "three", "--format", "torch", "--output", str(bare)]
    main([*words, *texts])
    expected = logits(TINY_CLIP, class_names=["cat", "three"], template=templates, class_texts=own)
    assert torch.equal(torch.export.load(bare).module()(PIXELS), expected)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "Give --adapter (folder or Hub id of a CAPT adapter) or --base"),
        ("--base tiny_clip", "--base tiny_clip records no class names. Give them: --class_names cat dog."),
        ("--base tiny_clip --class_names cat dog", "Name it: --output model.onnx"),
        ("{adapter} --format onx", "Unknown format 'onx'. Allowed: onnx, torch. Did you mean onnx?"),
        ("{adapter} --format torch --int8", "int8 is for the format onnx, not torch"),
        ("{adapter} --output {folder}/taken.onnx", "is there already. Give --overwrite to replace it"),
        ("{adapter} --output {folder}/taken.onnx/a.onnx", "Nothing can be written into output="),
        ("{adapter} --output {folder}/a.bin", "must end with .onnx"),
        ("{adapter} --template templates.txt", "'templates.txt' must hold exactly one {}, the place"),
        ("{adapter} --class_texts texts.json", "There is no file texts.json (--class_texts)"),
        ("./nowhere", "There is no folder ./nowhere (--adapter)"),
        (
            "{tiny} --output {folder}/a.onnx --class_names cat dog",
            "is a CLIP without an adapter. Export it with --base.",
        ),
        ("--base {adapter} --output {folder}/a.onnx --class_names 0 1", "is an adapter. Export it with --adapter."),
    ],
)
def test_wrong_input_is_one_sentence(adapter, tmp_path, monkeypatch, capfd, words, told):
    (tmp_path / "taken.onnx").write_text("mine")
    places = {"adapter": adapter, "folder": tmp_path, "tiny": TINY_CLIP}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["capt-peft", "export", *(word.format(**places) for word in words.split())])
    with pytest.raises(SystemExit) as ended:
        command_line()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("capt-peft export: ")]
    assert ended.value.code == 2 and told in line
    assert not list(tmp_path.rglob("*.onnx*"))[1:] and (tmp_path / "taken.onnx").read_text() == "mine"


def test_without_the_extra_a_sentence_says_what_to_install(adapter, monkeypatch, capfd):
    find_spec = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "onnxruntime" else find_spec(name, *a)
    )
    monkeypatch.setattr(sys, "argv", ["capt-peft", "export", str(adapter)])
    with pytest.raises(SystemExit) as ended:
        command_line()
    assert ended.value.code == 2
    assert capfd.readouterr().err.endswith(
        "capt-peft export: onnxruntime is not installed: pip install 'capt-peft[export]'.\n"
    )


def test_an_exported_file_does_not_make_the_adapter_another_one(adapter, tmp_path):
    before = logits(adapter)
    main(["--adapter", str(adapter), "--format", "torch"])
    moved = shutil.copytree(adapter, tmp_path / "moved")
    assert torch.equal(logits(moved), before)
