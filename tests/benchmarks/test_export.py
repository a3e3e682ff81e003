"""benchmarks/export.py: every file is measured on the same images, and the table says what the record holds."""

import json
import sys
from pathlib import Path

import pytest
from helpers import TINY_CLIP
from peft import get_peft_model
from transformers import CLIPModel

from capt_peft import CaptConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import export as benchmark  # noqa: E402


def test_the_record_has_model_and_files_and_the_table_shows_it(tmp_path, capsys):
    config = CaptConfig(class_names=[str(digit) for digit in range(10)], template="a photo of the digit {}.")
    get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), config).save_pretrained(tmp_path / "adapter")
    options = ["--limit", "20", "--attack", "pgd-3", "--square", "5", "--square_images", "8", "--repetitions", "2"]
    places = ["--json", str(tmp_path / "export.json"), "--picture", str(tmp_path / "export.png")]
    record = benchmark.main([str(tmp_path / "adapter"), *options, *places])
    assert json.loads((tmp_path / "export.json").read_text()) == record
    model, files = record["files"][benchmark.MODEL], record["files"]
    assert list(files) == [benchmark.MODEL, "torch", "onnx", "onnx, int8"]
    for kind, count in (("clean", 20), ("transfer", 20), ("square", 8)):
        assert {one[kind]["n"] for one in files.values()} == {count}
        for name in ("torch", "onnx"):
            assert files[name][kind] == model[kind]
    assert model["transfer"]["correct"] < model["clean"]["correct"]
    assert files["torch"]["difference"] == 0 < files["onnx"]["difference"] < 1e-4 < files["onnx, int8"]["difference"]
    assert files["onnx, int8"]["bytes"] < 0.4 * files["onnx"]["bytes"]
    assert all(seconds > 0 for one in files.values() for seconds in one["seconds"].values())
    told = capsys.readouterr().out
    assert f"| {100 * model['clean']['accuracy']:.1f} | {100 * model['transfer']['accuracy']:.1f} |" in told
    assert (tmp_path / "export.png").stat().st_size > 10_000


def test_an_adapter_or_the_vit_is_needed(capsys):
    for words in ([], ["adapter", "--vit_b32"]):
        with pytest.raises(SystemExit):
            benchmark.parse(words)
        assert "give an adapter, or --vit_b32" in capsys.readouterr().err
