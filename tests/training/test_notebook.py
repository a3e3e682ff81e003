"""What a run shows in a notebook."""

import pytest
from training_helpers import make_trainer
from transformers.utils.notebook import NotebookProgressCallback

from capt_peft.training.progress import show_progress


class Output:
    """What a cell of a notebook shows."""

    def __init__(self):
        self.shown = []

    def display(self, content, display_id):
        self.update(content)
        return self

    def update(self, content):
        self.shown.append(content.data)


@pytest.fixture
def output(monkeypatch):
    output = Output()
    monkeypatch.setattr("transformers.utils.notebook.disp.display", output.display)
    return output


@pytest.fixture
def in_notebook(tmp_path, processor, monkeypatch):
    """Returns trainers as they are in a notebook."""
    monkeypatch.setattr("capt_peft.training.progress.is_in_notebook", lambda: True)
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    return lambda **settings: make_trainer(
        tmp_path, processor, **{"disable_tqdm": False, "logging_steps": 1, **settings}
    )


def test_the_table_has_both_accuracies_and_is_the_only_one(in_notebook, output):
    trainer = in_notebook(max_steps=2)
    assert sum(isinstance(callback, NotebookProgressCallback) for callback in trainer.callback_handler.callbacks) == 1
    trainer.train()
    table = output.shown[-1]
    assert all(f"<th>{head}</th>" in table for head in ("step", "epoch", "loss", "clean %", "robust %", "alpha"))
    assert table.count("<tr") == 3 and "Validation Loss" not in table and "No Log" not in table


def test_an_evaluation_on_the_way_is_in_the_row_of_its_step(in_notebook, output):
    trainer = in_notebook(max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    table = output.shown[-1]
    found = [line for line in trainer.state.log_history if "eval_clean_accuracy" in line]
    assert "<th>eval clean %</th>" in table and "<th>eval robust %</th>" in table and table.count("<tr") == 3
    assert all(f"<td>{100 * line['eval_clean_accuracy']:.1f}</td>" in table for line in found) and len(found) == 2
    assert "No Log" not in table


def test_the_bar_of_an_evaluation_counts_images_and_a_sentence_takes_its_place(in_notebook, output):
    trainer = in_notebook(per_device_eval_batch_size=4)
    n = len(trainer.eval_dataset)  # three batches
    metrics = trainer.evaluate()
    *bars, sentence = output.shown
    assert f"max='{n}'" in bars[0] and f"value='{n}'" in bars[-1] and "Clean and robust accuracy" in bars[0]
    assert sentence.startswith(f"Step 0, eval, {n} images: clean {100 * metrics['eval_clean_accuracy']:.1f}")
    assert metrics["eval_attack"] in sentence and "epoch" not in sentence


def test_without_bars_or_outside_of_a_notebook_nothing_of_it_is_there(in_notebook, output, capsys, monkeypatch):
    trainer = in_notebook(disable_tqdm=True, max_steps=1)
    trainer.train()
    assert not output.shown and "robust %" in capsys.readouterr().out
    monkeypatch.setattr("capt_peft.training.progress.is_in_notebook", lambda: False)
    trainer.add_callback(NotebookProgressCallback)  # a person's own
    show_progress(trainer)
    assert NotebookProgressCallback in map(type, trainer.callback_handler.callbacks)
