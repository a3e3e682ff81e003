"""The options that name a data set, which training and evaluation share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data import TEMPLATES, Task, load_task
from ..data.texts import Template, read_class_texts, read_template


@dataclass
class DataArguments:
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
    template: str | None = field(
        default=None,
        metadata={
            "help": "Text of a class, e.g. 'a photo of a {}.'; or several: a published set, as clip-imagenet-7, or a file with "
            "one a line. By default the adapter's or the data set's."
        },
    )
    class_texts: str | None = field(
        default=None, metadata={"help": 'JSON file of texts of one\'s own: {"class name": ["text", ...], ...}.'}
    )

    def __post_init__(self) -> None:
        # what the files hold, which then stands in the records
        vars(self).update(template=read_templates(self.template), class_texts=read_class_texts(self.class_texts))

    @property
    def texts(self) -> dict[str, Any]:
        """The template and the texts of classes that were asked for, for a task or a classifier; None where none were."""
        return {"template": self.template, "class_texts": self.class_texts}

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


def read_templates(template: Template | None) -> Template | None:
    """Returns a template or the name of a published set as it is, or the templates of a file that has one on each line."""
    if not isinstance(template, str) or template in TEMPLATES:
        return template
    if "{" not in template and Path(template).expanduser().is_file():
        lines = Path(template).expanduser().read_text(encoding="utf-8", errors="replace").splitlines()
        return read_template([line for line in lines if line.strip()])
    return read_template(template)


def measured(task: Task, split: str, limit: int | None) -> Dataset:
    """Returns the images of a split, or this many of them, drawn by seed 0."""
    data = task[split]
    return data if limit is None else data.shuffle(seed=0).select(range(min(limit, len(data))))
