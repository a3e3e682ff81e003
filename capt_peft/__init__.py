"""capt-peft: small adapters that make CLIP robust to adversarial images. Importing it registers CAPT with PEFT.

Names are imported when they are first used, so that the command line answers within a moment.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attacks import APGD, FAB, PGD, AutoAttack, Square, ThreatModel, parse_attack
    from .backbones import convert_backbone, load_backbone
    from .clip.classifier import ZeroShotClassifier
    from .clip.export import OnnxClassifier, export
    from .data import Task, describe_task, list_tasks, load_task
    from .defences import Defence, Defended, parse_defence
    from .evaluation import Evaluation, evaluate
    from .methods import METHODS, get_method
    from .objectives import AdversarialCrossEntropy, CaptObjective, FapObjective, PmgAftObjective, Views
    from .results.hub import push_adapter
    from .training import CaptTrainer, CaptTrainingArguments, FareTrainer, TrainingStopped
    from .tuner import CaptConfig, CaptModel, set_strength

__version__ = "0.1.0"

_ROOMS = {
    "attacks": ("APGD", "FAB", "PGD", "AutoAttack", "Square", "ThreatModel", "parse_attack"),
    "backbones": ("convert_backbone", "load_backbone"),
    "clip.classifier": ("ZeroShotClassifier",),
    "clip.export": ("OnnxClassifier", "export"),
    "data": ("Task", "describe_task", "list_tasks", "load_task"),
    "defences": ("Defence", "Defended", "parse_defence"),
    "evaluation": ("Evaluation", "evaluate"),
    "methods": ("METHODS", "get_method"),
    "objectives": ("AdversarialCrossEntropy", "CaptObjective", "FapObjective", "PmgAftObjective", "Views"),
    "results.hub": ("push_adapter",),
    "training": ("CaptTrainer", "CaptTrainingArguments", "FareTrainer", "TrainingStopped"),
    "tuner": ("CaptConfig", "CaptModel", "set_strength"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "APGD",
    "FAB",
    "METHODS",
    "PGD",
    "AdversarialCrossEntropy",
    "AutoAttack",
    "CaptConfig",
    "CaptModel",
    "CaptObjective",
    "CaptTrainer",
    "CaptTrainingArguments",
    "Defence",
    "Defended",
    "Evaluation",
    "FapObjective",
    "FareTrainer",
    "OnnxClassifier",
    "PmgAftObjective",
    "Square",
    "Task",
    "ThreatModel",
    "TrainingStopped",
    "Views",
    "ZeroShotClassifier",
    "convert_backbone",
    "describe_task",
    "evaluate",
    "export",
    "get_method",
    "list_tasks",
    "load_backbone",
    "load_task",
    "parse_attack",
    "parse_defence",
    "push_adapter",
    "set_strength",
]


def __getattr__(name: str) -> Any:
    """Imports a public name, or a room, when it is first asked for."""
    if name in _ROOM_OF:
        value = globals()[name] = getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _write_saved_card(folder: Any, config: Any, whole: bool) -> None:
    """Writes the card of an adapter that is saved, and keeps it where transformers uploads a folder."""
    from .results import card, hub  # noqa: F401

    card.write_saved_card(folder, config, whole)


def _after_peft() -> None:
    """Registers CAPT with PEFT."""
    importlib.import_module(".tuner", __name__)


def _after_tuner() -> None:
    """Lets configurations be saved with the card of their adapter."""
    config: Any = importlib.import_module(".tuner.config", __name__)
    config.write_saved_card = _write_saved_card


def _after_loading() -> None:
    """Lets `load_task` know the tasks that need no download."""
    importlib.import_module(".toy.tasks", __name__)


def _after_captions() -> None:
    """Lets `load_captions` know the toy captions."""
    importlib.import_module(".toy.captions", __name__)


def _prepare_published(name: str) -> str:
    """Returns the folder of a published backbone, fetched and converted at first use."""
    from .backbones import store

    return store.backbone_folder(name)


def _after_embedded() -> None:
    """Lets the name of a published backbone stand wherever that of a model does."""
    embedded: Any = importlib.import_module(".utils.embedded", __name__)
    embedded.prepare_published = _prepare_published


# what follows once a module has been imported, by whomever: none of them has to know what builds on it
_AFTER = {
    "peft": _after_peft,
    f"{__name__}.tuner": _after_tuner,
    f"{__name__}.utils.embedded": _after_embedded,
    f"{__name__}.data.loading": _after_loading,
    f"{__name__}.data.captions": _after_captions,
}


class _Follow(importlib.abc.MetaPathFinder):
    """Finds modules as ever; those of `_AFTER` are followed by what stands there."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Returns the module's own specification, whose loader does so."""
        if fullname not in _AFTER:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                _AFTER[fullname]()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Follow())
if "peft" in sys.modules:
    _after_peft()
