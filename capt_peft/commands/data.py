"""The options that name a data set, which training and evaluation share."""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import Dataset

from ..data import Task, load_task
from .texts import TextArguments


@dataclass
class DataArguments(TextArguments):
    """Data: where the images and their class names come from."""

    dataset_name: str = field(
        default="digits", metadata={"help": "A task's name, a Hub id, or a folder or file of images."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    root: str | None = field(default=None, metadata={"help": "Where a data set of the catalog lies here."})
    train_split: str | None = field(default=None, metadata={"help": "Split to train on, if its name does not tell."})
    validation_split: str | None = field(
        default=None, metadata={"help": "The same for the split to choose settings on."}
    )
    test_split: str | None = field(default=None, metadata={"help": "The same for the split to measure accuracy on."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, if it cannot be told."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels, if it cannot be told."})
    class_names: list[str] | None = field(default=None, metadata={"help": "Class names in the order of the labels."})

    def load(self) -> Task:
        """Returns the task that they name."""
        return load_task(
            self.dataset_name,
            root=self.root,
            name=self.dataset_config,
            image_column=self.image_column,
            label_column=self.label_column,
            class_names=self.class_names,
            **self.texts,
            train_split=self.train_split,
            validation_split=self.validation_split,
            test_split=self.test_split,
        )


def measured(task: Task, split: str, limit: int | None) -> Dataset:
    """Returns the images of a split, or this many of them, drawn by seed 0."""
    data = task[split]
    return data if limit is None else data.shuffle(seed=0).select(range(min(limit, len(data))))
