"""`capt-peft evaluate --retrieval`: base and adapter beside each other, their files, and options that have no effect."""

import json
from pathlib import Path

import pytest
from helpers import TINY_CLIP

from capt_peft.commands.evaluate import main
from capt_peft.data import load_captions
from capt_peft.results.retrieval import Retrieval, retrieval_table

QUICK = ["--retrieval", "--split", "validation", "--limit", "30", "--use_cpu"]


def test_a_clip_and_its_adapter_are_measured_beside_each_other(adapter, capsys):
    results = main(
        ["--adapter", str(adapter), *QUICK, "--attacks", "clean,feature-pgd-1", "--epsilon", "1/255,4/255", "--curve"]
    )
    shown = capsys.readouterr().out
    assert list(results) == ["zero-shot", "CAPT"] and retrieval_table(results) in shown
    assert "30 images" in shown
    first, second = sorted((adapter / "evaluations").glob("*.json"), key=lambda path: ".zero-shot" in path.name)
    assert first.name.startswith("captions-validation-30-linf-1of255+4of255-clean+feature-pgd-1-")
    assert second.name == f"{first.stem}.zero-shot.json"
    assert (Retrieval.load(first), Retrieval.load(second)) == (results["CAPT"], results["zero-shot"])
    for kind in ("png", "svg"):
        assert first.with_name(f"{first.stem}.curve.{kind}").is_file()
    content = json.loads(first.read_text())["configuration"]
    assert content["task"] == {"name": "captions", "source": "captions", "split": "validation", "limit": 30}
    assert content["model"]["adapter"] and not json.loads(second.read_text())["configuration"]["model"]["adapter"]
    assert content["data"]["fingerprint"] == load_captions("captions", split="validation").sample(30).fingerprint()


def test_a_bare_clip_needs_no_classes_and_a_file_of_images_no_more_than_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = load_captions("captions").select(range(12))
    captions = [list(own) for own in data.captions]
    data.images.add_column("words", captions).to_parquet("test.parquet")
    output = Path("results.json")
    arguments = [
        "--base",
        str(TINY_CLIP),
        "--retrieval",
        "--dataset_name",
        "test.parquet",
        "--use_cpu",
        "--output",
        str(output),
    ]
    results = main([*arguments, "--attacks", "clean", "--caption_template", "an image of {}"])
    assert list(results) == ["zero-shot"] and Retrieval.load(output) == results["zero-shot"]
    assert results["zero-shot"].clean.text_to_image[0].queries == len(data.texts)
    assert results["zero-shot"].configuration["caption_template"] == "an image of {}"
    main([*arguments, "--attacks", "clean", "--caption_template", "an image of {}"])
    assert [path.name for path in Path().glob("results*")] == ["results.json"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--retrieval", "--class_names", "a", "b"], "--class_names has no effect with --retrieval"),
        (["--retrieval", "--signs", "false"], "--signs has no effect with --retrieval"),
        (["--retrieval", "--out_of_class", "shapes"], "--out_of_class has no effect with --retrieval"),
        (["--retrieval", "--update_card"], "--update_card has no effect with --retrieval"),
        (["--caption_column", "text"], "--caption_column has no effect without --retrieval"),
        (["--retrieval", "--attacks", "pgd-20"], "'pgd-20' is not an attack on retrieval. Known: feature-pgd-STEPS"),
        (["--retrieval", "--caption_template", "text"], "{}"),
        (["--retrieval", "--dtype", "bfloat16"], "dtype=.bfloat16.: --retrieval is measured in float32 or tf32"),
    ],
)
def test_options_that_have_no_effect_or_cannot_work_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        main(["--base", str(TINY_CLIP), "--use_cpu", *options])
