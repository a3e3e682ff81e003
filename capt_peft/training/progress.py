"""How a run looks while it goes on: bars that count steps and images, and a table of its logs instead of dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import is_in_notebook

from ..results.accuracy import Accuracy

HEADER_EVERY = 20  # lines of the table
# what the table shows of a log, as (key, heading, factor, format); the rest is in `trainer.state.log_history` and in trackers
COLUMNS = (
    ("epoch", "epoch", 1, "8.2f"),
    ("loss", "loss", 1, "10.4g"),
    ("clean_accuracy", "clean %", 100, "9.1f"),
    ("robust_accuracy", "robust %", 100, "10.1f"),
    ("alpha", "alpha", 1, "7.3f"),
    ("learning_rate", "learning rate", 1, "15.3g"),
)


class LogTable:
    """Turns the logs of a run into lines of a table, with its head where the columns change and every `HEADER_EVERY` lines."""

    def __init__(self) -> None:
        self._columns: list[str] = []
        self._lines = 0

    def lines(self, logs: Mapping[str, Any], step: int) -> list[str]:
        """Returns the lines that show a log: of a training step, of an evaluation, or of the end of the training."""
        shown = [column for column in COLUMNS if isinstance(logs.get(column[0]), int | float)]
        if "loss" in logs and shown:
            keys = [key for key, *_ in shown]
            head = f"{'step':>7}" + "".join(f"{name:>{form.split('.')[0]}}" for _, name, _, form in shown)
            row = f"{step:7}" + "".join(f"{logs[key] * factor:{form}}" for key, _, factor, form in shown)
            begins = keys != self._columns or self._lines % HEADER_EVERY == 0
            self._columns, self._lines = keys, 1 if keys != self._columns else self._lines + 1
            attack = f"  (training images; adversarial ones by {logs['attack']})" if "attack" in logs else ""
            return [head + attack, row] if begins else [row]
        if "train_runtime" in logs:
            return [f"Trained to step {step} in {logs['train_runtime']:.0f} s."]
        return [evaluated(logs, prefix, step) for prefix in evaluations(logs)]


def evaluations(logs: Mapping[str, Any]) -> list[str]:
    """Returns the prefixes of the evaluations whose accuracies a log holds."""
    return [key.removesuffix("_robust_accuracy") for key in logs if key.endswith("_robust_accuracy")]


def evaluated(metrics: Mapping[str, Any], prefix: str, step: int) -> str:
    """Returns what an evaluation of the trainer found, in a sentence with both accuracies and the attack."""
    n = int(metrics[f"{prefix}_n"])
    clean, robust = (
        Accuracy(round(metrics[f"{prefix}_{kind}_accuracy"] * n), n).percent for kind in ("clean", "robust")
    )
    attack = metrics[f"{prefix}_attack"]
    return f"Step {step}, {prefix}, {n} images: clean {clean} %, robust {robust} % under {attack}."


class ShowProgress(ProgressCallback):
    """The Trainer's bars, which count images in evaluations, and a table of the logs."""

    def __init__(self) -> None:
        super().__init__()
        self._table = LogTable()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar of steps."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("Training steps")

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Moves the bar of an evaluation by the images of a batch of all processes."""
        if not state.is_world_process_zero:
            return
        number = len(eval_dataloader.dataset)
        bar: Any = self.prediction_bar
        if bar is None:
            bar = tqdm(
                total=number, desc="Clean and robust accuracy", unit="image", leave=self.training_bar is None,
                dynamic_ncols=True,
            )  # fmt: skip
        self.prediction_bar = bar
        bar.update(min(args.eval_batch_size * args.world_size, number - bar.n))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Writes a log above the bars."""
        if state.is_world_process_zero and self.training_bar is not None:
            for line in self._table.lines(logs or {}, state.global_step):
                self.training_bar.write(line)


class PrintLogs(PrinterCallback):
    """The table of the logs without bars, for `disable_tqdm`."""

    def __init__(self) -> None:
        self._table = LogTable()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Writes a log."""
        if state.is_world_process_zero:
            for line in self._table.lines(logs or {}, state.global_step):
                tqdm.write(line)


def show_progress(trainer: Any) -> None:
    """Puts these callbacks in the place of the Trainer's own; what a user put there stays."""
    ours: dict[type, type] = {ProgressCallback: ShowProgress, PrinterCallback: PrintLogs}
    if is_in_notebook():
        from transformers.utils.notebook import NotebookProgressCallback

        from .notebook import ShowInNotebook  # imports IPython

        ours[NotebookProgressCallback] = ShowInNotebook
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) in ours:
            trainer.remove_callback(callback)
            trainer.add_callback(ours[type(callback)]())
