"""What a run shows: a table of its logs, bars that count images, no warnings that nobody can act on."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_helpers import make_trainer
from transformers import PrinterCallback, ProgressCallback

from capt_peft.training.progress import HEADER_EVERY, LogTable, PrintLogs, ShowProgress

STEP = {"epoch": 1.0, "loss": 16.7, "clean_accuracy": 0.95, "robust_accuracy": 0.05, "alpha": 0.449, "learning_rate": 0.3,
        "grad_norm": 42.0, "attack": "pgd-3"}  # fmt: skip
EVALUATION = {
    "eval_n": 300,
    "eval_clean_accuracy": 0.75,
    "eval_robust_accuracy": 16 / 300,
    "eval_attack": "pgd-20, L-inf 10/255",
}


def test_steps_are_rows_under_a_head_that_names_the_attack():
    table = LogTable()
    head, row = table.lines(STEP, 1)
    assert head.split()[:2] == ["step", "epoch"] and "clean %" in head and "robust %" in head and "by pgd-3" in head
    assert row.split() == ["1", "1.00", "16.7", "95.0", "5.0", "0.449", "0.3"]
    lengths = [len(table.lines(STEP, step)) for step in range(2, HEADER_EVERY + 2)]
    assert lengths == [1] * (HEADER_EVERY - 1) + [2]
    assert len(table.lines({"epoch": 1.0, "loss": 2.0}, 9)) == 2  # other columns, another head


def test_an_evaluation_is_a_sentence_with_both_accuracies_and_the_attack():
    (line,) = LogTable().lines(EVALUATION, 3)
    assert line == (
        "Step 3, eval, 300 images: clean 75.0 (69.8 to 79.6) %, robust 5.3 (3.3 to 8.5) % under pgd-20, L-inf 10/255."
    )
    assert LogTable().lines({"train_runtime": 12.3, "train_loss": 1.0}, 60) == ["Trained to step 60 in 12 s."]
    assert LogTable().lines({"something": 1}, 1) == []


@pytest.mark.parametrize(
    ("silent", "ours", "theirs"), [(False, ShowProgress, ProgressCallback), (True, PrintLogs, PrinterCallback)]
)
def test_the_trainer_shows_its_logs_so_and_they_can_be_taken_away(tmp_path, processor, silent, ours, theirs):
    trainer = make_trainer(tmp_path, processor, disable_tqdm=silent)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(ours) == 1 and theirs not in kinds
    trainer.remove_callback(theirs)
    assert ours not in [type(callback) for callback in trainer.callback_handler.callbacks]


def test_a_bar_counts_the_images_of_an_evaluation(tmp_path, processor, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    trainer = make_trainer(tmp_path, processor, disable_tqdm=False, per_device_eval_batch_size=4)
    n = len(trainer.eval_dataset)  # three batches
    trainer.evaluate()
    text = shown.getvalue()
    assert "Clean and robust accuracy" in text and f"{n}/{n}" in text and "image" in text


def test_no_dictionary_is_printed(tmp_path, processor, capsys):
    trainer = make_trainer(tmp_path, processor, disable_tqdm=True, logging_steps=1, max_steps=2)
    trainer.train()
    out = capsys.readouterr().out
    assert "{" not in out and "robust %" in out and "Trained to step 2" in out


def test_an_adapter_is_put_on_a_model_without_a_warning():
    code = """
from helpers import random_clip
from peft import get_peft_model
import capt_peft
get_peft_model(random_clip(), capt_peft.CaptConfig(template_token_ids=[58, 5, 6, 7]))
"""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "is_gradient_checkpointing" not in done.stderr
