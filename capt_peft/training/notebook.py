"""How a run looks in a notebook: transformers' bars and table, with the columns that count here."""

from __future__ import annotations

from html import escape
from typing import Any

from IPython.display import HTML
from transformers.utils.notebook import NotebookProgressBar, NotebookProgressCallback, NotebookTrainingTracker

from .progress import COLUMNS, evaluated, evaluations


class ShowInNotebook(NotebookProgressCallback):
    """The Trainer's table in a notebook, with both accuracies, and bars that count images in evaluations."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar of steps, above a table whose columns come with the first log."""
        super().on_train_begin(args, state, control, **kwargs)
        self.training_tracker = NotebookTrainingTracker(state.max_steps)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Moves the bar of an evaluation by the images of a batch of all processes."""
        number = len(eval_dataloader.dataset)
        if self.prediction_bar is None:
            tracker, what = self.training_tracker, "Clean and robust accuracy"
            self.prediction_bar = tracker.add_child(number, what) if tracker else NotebookProgressBar(number, what)
            self.prediction_bar.update(0)
        self.prediction_bar.update(min(self.prediction_bar.value + args.eval_batch_size * args.world_size, number))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds a training step to the table, or to its row what an evaluation found there."""
        if self.training_tracker is None:
            return
        row = {}
        if "loss" in logs:
            row = {name: f"{logs[key] * factor:{form}}" for key, name, factor, form in COLUMNS if key in logs}
        for prefix in evaluations(logs):
            for kind in ("clean", "robust"):
                row[f"{prefix} {kind} %"] = f"{100 * logs[f'{prefix}_{kind}_accuracy']:.1f}"
        if row:
            self.training_tracker.write_line({"step": state.global_step, **row})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Closes the bar of an evaluation; outside of a training, a sentence takes its place."""
        if self.training_tracker is not None:
            self.training_tracker.remove_child()
            self._force_next_update = True
        elif self.prediction_bar is not None:
            said = [escape(evaluated(metrics, prefix, state.global_step)) for prefix in evaluations(metrics)]
            self.prediction_bar.output.update(HTML("<br>".join(said)))
        self.prediction_bar = None
