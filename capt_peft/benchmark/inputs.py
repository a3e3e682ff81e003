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

from ..attacks import get_protocol
from ..data.loading import list_tasks, load_task
from ..data.pixels import PixelTransform, digest_images
from ..data.task import Task
from ..data.texts import Template, read_template
from ..tuner.fingerprint import adapter_fingerprint, base_fingerprint, configuration_digest
from ..tuner.loading import load_pretrained
from .plan import Cell, Target

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

    def digests(self, cell: Cell, base: tuple[nn.Module, Any] | None = None) -> dict[str, Any]:
        """Returns what has to be the same for a line of the cell to be its result, in JSON types.

        `measured_data` (for each target) and `training_data` are of all images that are used, their labels, the class names and
        the text; `measured_images` and `training_images` leave out the text, by which methods may differ. The others are of the
        weights and the configuration of base and teacher, and of how the processor makes pixels and tokens. `base` is what
        `load_base` returned for the cell, if it has been loaded.
        """
        text, teacher = cell.prompts.get("template"), cell.settings.get("teacher")
        training = (cell.task, cell.train_classes, cell.shots, cell.seed, text)
        named = (cell.evaluation_protocol, cell.tuned)
        measured = [
            self._once(
                "measured", (target, cell.split, cell.limit, text, *named), partial(self._measured, cell, target)
            )
            for target in cell.targets
        ]
        images, data = self._once("training", training, partial(self._training, cell)) if cell.tuned else (None, None)
        return {
            "measured_images": [of for of, _ in measured],
            "measured_data": [of for _, of in measured],
            "training_images": images,
            "training_data": data,
            **self._once("model", cell.model, lambda: _of_base(*(base or load_base(cell.model, "cpu")))),
            "teacher_fingerprint": self._once("teacher", teacher, partial(_of_teacher, teacher)),
        }

    def _once(self, what: str, about: Any, make: Callable[[], Any]) -> Any:
        if (what, about) not in self._known:
            self._known[what, about] = make()
        return self._known[what, about]

    def _measured(self, cell: Cell, target: Target) -> tuple[str, str]:
        task = read_task(target.task, target.classes, self.root)
        return _of_data(drawn(task[cell.split], cell.images_in(target.task)), task, template_of(cell, task))

    def _training(self, cell: Cell) -> tuple[str, str]:
        task = training_task(cell, self.root)
        return _of_data(task["train"], task, task.template)


def _of_data(data: datasets.Dataset, task: Task, template: Template) -> tuple[str, str]:
    content = [digest_images(data), list(task.class_names)]
    return _digest(content), _digest([*content, template, *([task.class_texts] if task.class_texts else [])])


def _of_base(model: nn.Module, processor: Any) -> dict[str, Any]:
    pixels = PixelTransform(processor).to_dict()
    settings = {name: pixels[name] for name in ("size", "resize", "center_crop", "resample", "mean", "std")}
    words = sorted(processor.tokenizer.get_vocab().items())
    return {
        "base_model_fingerprint": base_fingerprint(model),
        "base_configuration": configuration_digest(model),
        "processor": _digest([settings, words]),
    }


def _of_teacher(name: str | None) -> str | None:
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


def template_of(cell: Cell, task: Task) -> Template:
    """Returns the text of a class: of the published protocol for zero-shot, of the settings, or else the data set's own."""
    if cell.evaluation_protocol is not None and not cell.tuned:
        return read_template(get_protocol(cell.evaluation_protocol).template_for(task.name) or task.template)
    return read_template(cell.prompts.get("template", task.template))


def read_task(name: str, classes: str, root: Root) -> Task:
    """Returns a data set of the benchmark, or a half of its classes."""
    place = root.get(name) if isinstance(root, Mapping) else root
    in_catalog = name in list_tasks()
    return _load_task(name if in_catalog or place is None else place, place if in_catalog else None, classes)


@lru_cache(maxsize=128)
def _load_task(name: str, root: str | None, classes: str) -> Task:
    return load_task(name, root=root) if classes == "all" else _load_task(name, root, "all").half(classes)


def training_task(cell: Cell, root: Root) -> Task:
    """Returns the data set that a cell is tuned on, with the training images that it draws and its text of a class."""
    task = read_task(cell.task, cell.train_classes, root)
    if cell.shots != "all":
        task = task.few_shot(int(cell.shots), cell.seed)
    return replace(task, template=template_of(cell, task))


def drawn(data: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """Returns `limit` images of a split, drawn by seed 0, the same for all methods; all of them for None."""
    return data if limit is None else data.shuffle(seed=0).select(range(min(limit, len(data))))
