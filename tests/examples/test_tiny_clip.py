"""Tiny CLIP: the model that the examples start from, and the script that makes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

from capt_peft.clip.classifier import ZeroShotClassifier
from capt_peft.toy import TINY_CLIP
from capt_peft.toy.tasks import load_digits_task, load_toy_task

EXAMPLES = Path(__file__).parents[2] / "examples"


def zero_shot_accuracy(task, split: str) -> float:
    model, processor = CLIPModel.from_pretrained(TINY_CLIP).eval(), CLIPProcessor.from_pretrained(TINY_CLIP)
    classifier = ZeroShotClassifier(model, processor, task.class_names, task.template)
    with torch.no_grad():
        predicted = classifier(classifier.transform.batch(task[split]["image"])).argmax(-1)
    return (predicted == torch.tensor(task[split]["label"])).float().mean().item()


def test_it_weighs_at_most_8_mb_and_loads_in_float32_as_any_clip() -> None:
    assert sum(path.stat().st_size for path in Path(TINY_CLIP).iterdir()) <= 8_000_000
    model = CLIPModel.from_pretrained(TINY_CLIP)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_its_tokenizer_knows_the_words_of_the_captions_and_spells_any_other() -> None:
    tokenizer, text = AutoTokenizer.from_pretrained(TINY_CLIP), CLIPModel.from_pretrained(TINY_CLIP).config.text_config
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (text.bos_token_id, text.eos_token_id)
    assert text.eos_token_id != 2 and text.vocab_size == len(tokenizer)
    words = ["a</w>", "photo</w>", "of</w>", "the</w>", "digit</w>", "seven</w>", ".</w>"]
    assert tokenizer.tokenize("A photo of the digit Seven.") == words
    ids = tokenizer("naïve Boeing 漢").input_ids
    assert text.eos_token_id not in ids[:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "naïve boeing 漢"


def test_it_reads_scanned_digits_that_it_never_saw() -> None:
    assert zero_shot_accuracy(load_digits_task(), "validation") > 0.45


@pytest.mark.parametrize(("name", "least"), [("colors", 0.7), ("positions", 0.7), ("textures", 0.7)])
def test_it_names_pairs_of_facts_that_it_never_saw_together(name: str, least: float) -> None:
    task = load_toy_task(name, seed=3, train_per_class=1, validation_per_class=10, test_per_class=1)
    assert zero_shot_accuracy(task, "validation") > least


def test_the_script_pre_trains_saves_and_measures(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "pretrain_tiny_clip.py", "--quick", "--output", tmp_path / "tiny"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert "step 3 loss" in run.stdout and "digits, validation" in run.stdout
    assert CLIPModel.from_pretrained(tmp_path / "tiny").num_parameters() > 1_000_000
    assert sorted(path.suffix for path in (tmp_path / "tiny").iterdir()) == [".json"] * 4 + [".safetensors"]
