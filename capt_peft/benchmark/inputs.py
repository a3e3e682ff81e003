"""What a cell's figures depend on beside its settings: images, labels, texts and weights, and digests of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import AutoModel, AutoProcessor

from ..data.halves import half
from ..data.loading import list_tasks, load_task
from ..data.pixels import digest_images
from ..data.task import Task
from ..data.transforms import PixelTransform
from ..tuner.fingerprint import adapter_fingerprint, base_fingerprint, configuration_digest
from ..tuner.loading import load_pretrained
from .plan import ZERO_SHOT, Cell, Target

Root = str | Mapping[str, str] | None
TUNED_WITH = ("training_data", "base_model_fingerprint", "base_configuration", "teacher_fingerprint", "processor")


class Inputs:
    """The inputs of cells, each read once.

    Args:
        root: Where the data sets of the catalog lie (CoOp's `$DATA`), or the place of each data set by its name; None: the Hub.
    """

    def __init__(self, root: Root = None) -> None:
        self.root = root
        self._known: dict[Any, Any] = {}

    def digests(self, cell: Cell) -> dict[str, Any]:
        """Returns what has to be the same for a line of the cell to be its result, in JSON types.

        `measured_data` has a digest for each target, and `training_data` one for the training images or None: of all images
        that are used, their labels, the class names and the text; `measured_images` and `training_images` leave out the text,
        by which methods may differ. The others are of the weights and the configuration of base and teacher, and of how the
        processor makes pixels and tokens.
        """
        tuned, text = cell.method != ZERO_SHOT, cell.prompts.get("template")
        teacher = cell.settings.get("teacher") if tuned else None
        training = (cell.task, cell.train_classes, cell.shots, cell.seed, text)
        measured = [
            self._once("measured", (target, cell.split, cell.limit, text), partial(self._measured, cell, target))
            for target in cell.targets
        ]
        images, data = self._once("training", training, partial(self._training, cell)) if tuned else (None, None)
        return {
            "measured_images": [of for of, _ in measured],
            "measured_data": [of for _, of in measured],
            "training_images": images,
            "training_data": data,
            **self._once("model", (cell.model,), partial(_model_digests, cell.model)),
            "teacher_fingerprint": self._once("teacher", (teacher,), partial(_teacher, teacher)),
        }

    def _once(self, what: str, about: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if (what, about) not in self._known:
            self._known[what, about] = make()
        return self._known[what, about]

    def _measured(self, cell: Cell, target: Target) -> tuple[str, str]:
        task = read_task(target.task, target.classes, self.root)
        return _data_digests(drawn(task[cell.split], cell.limit), task, template_of(cell, task))

    def _training(self, cell: Cell) -> tuple[str, str]:
        task = training_task(cell, self.root)
        return _data_digests(task["train"], task, task.template)


def _data_digests(data: datasets.Dataset, task: Task, template: str) -> tuple[str, str]:
    """Returns a digest of images, labels and class names, and one of these and the text."""
    content = [digest_images(data), list(task.class_names)]
    return _digest(content), _digest([*content, template])


def _model_digests(name: str) -> dict[str, Any]:
    model, processor = load_base(name, "cpu")
    return model_digests(model, processor)


def model_digests(model: nn.Module, processor: Any) -> dict[str, Any]:
    """Returns the digests of a base model and of what its processor does to images and words."""
    pixels = PixelTransform(processor).to_dict()
    settings = {name: pixels[name] for name in ("size", "resize", "center_crop", "resample", "mean", "std")}
    words = sorted(processor.tokenizer.get_vocab().items())
    return {
        "base_model_fingerprint": base_fingerprint(model),
        "base_configuration": configuration_digest(model),
        "processor": _digest([settings, words]),
    }


def _teacher(name: str | None) -> str | None:
    if name is None:
        return None
    if Path(name, CONFIG_NAME).exists():
        return adapter_fingerprint(name)
    model = load_pretrained(AutoModel, name, dtype=torch.float32)
    return _digest([base_fingerprint(model), configuration_digest(model)])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------- the inputs themselves


def load_base(name: str, device: Any = None) -> tuple[nn.Module, Any]:
    """Returns a CLIP, on this process's device unless told otherwise, and its processor."""
    # in float32, whatever precision it is stored in: pixel gradients vanish in less
    model = load_pretrained(AutoModel, name, dtype=torch.float32).eval()
    processor = load_pretrained(AutoProcessor, name)
    return model.to(PartialState().device if device is None else device), processor


def template_of(cell: Cell, task: Task) -> str:
    """Returns the text of a class: the same for all data sets where the settings say so, or else the data set's own."""
    return str(cell.prompts.get("template", task.template))


def read_task(name: str, classes: str, root: Root) -> Task:
    """Returns a data set of the benchmark, or a half of its classes."""
    place = root.get(name) if isinstance(root, Mapping) else root
    in_catalog = name in list_tasks()
    return _load_task(name if in_catalog or place is None else place, place if in_catalog else None, classes)


@lru_cache(maxsize=128)
def _load_task(name: str, root: str | None, classes: str) -> Task:
    return load_task(name, root=root) if classes == "all" else half(_load_task(name, root, "all"), classes)


def training_task(cell: Cell, root: Root) -> Task:
    """Returns the data set that a cell is tuned on, with the training images that it draws and its text of a class."""
    task = read_task(cell.task, cell.train_classes, root)
    if cell.shots != "all":
        task = task.few_shot(int(cell.shots), cell.seed)
    return replace(task, template=template_of(cell, task))


def drawn(data: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """Returns `limit` images of a split, drawn by seed 0, the same for all methods; all of them for None."""
    return data if limit is None else data.shuffle(seed=0).select(range(min(limit, len(data))))
