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
    from .backbones import convert_backbone
    from .clip.classifier import ZeroShotClassifier
    from .data import Task, describe_task, list_tasks, load_task
    from .evaluation import Evaluation, evaluate
    from .methods import METHODS, get_method
    from .objectives import AdversarialCrossEntropy, CaptObjective, FapObjective, Views
    from .results.hub import push_adapter
    from .training import CaptTrainer, CaptTrainingArguments, FareTrainer, TrainingStopped
    from .tuner import CaptConfig, CaptModel

__version__ = "0.1.0"

_ROOMS = {
    "attacks": ("APGD", "FAB", "PGD", "AutoAttack", "Square", "ThreatModel", "parse_attack"),
    "backbones": ("convert_backbone",),
    "clip.classifier": ("ZeroShotClassifier",),
    "data": ("Task", "describe_task", "list_tasks", "load_task"),
    "evaluation": ("Evaluation", "evaluate"),
    "methods": ("METHODS", "get_method"),
    "objectives": ("AdversarialCrossEntropy", "CaptObjective", "FapObjective", "Views"),
    "results.hub": ("push_adapter",),
    "training": ("CaptTrainer", "CaptTrainingArguments", "FareTrainer", "TrainingStopped"),
    "tuner": ("CaptConfig", "CaptModel"),
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
    "Evaluation",
    "FapObjective",
    "FareTrainer",
    "Square",
    "Task",
    "ThreatModel",
    "TrainingStopped",
    "Views",
    "ZeroShotClassifier",
    "convert_backbone",
    "describe_task",
    "evaluate",
    "get_method",
    "list_tasks",
    "load_task",
    "parse_attack",
    "push_adapter",
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


# what else is imported once a module is: CAPT is registered with PEFT, adapters are saved with their card, `load_task` knows
# the tasks that need no download, and none of the modules on the left has to know those on the right
_AFTER = {"peft": "tuner", f"{__name__}.tuner": "results.hub", f"{__name__}.data.loading": "toy.tasks"}


class _ImportMore(importlib.abc.MetaPathFinder):
    """Finds modules as ever; those of `_AFTER` import another one after they have run, whoever imports them."""

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
                importlib.import_module(f".{_AFTER[fullname]}", __name__)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _ImportMore())
if "peft" in sys.modules:
    importlib.import_module(".tuner", __name__)
