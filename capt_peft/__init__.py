"""capt-peft: small adapters that make CLIP robust to adversarial images. Importing it registers CAPT with PEFT."""

from .attacks import APGD, FAB, PGD, AutoAttack, Square, ThreatModel, parse_attack
from .backbones import convert_backbone
from .clip.classifier import ZeroShotClassifier
from .data import Task, describe_task, list_tasks, load_task
from .evaluation import Evaluation, evaluate
from .methods import METHODS, get_method
from .objectives import AdversarialCrossEntropy, CaptObjective, FapObjective, Views
from .results.hub import push_adapter
from .toy import tasks as _tasks  # noqa: F401 (they are among those of load_task)
from .training import CaptTrainer, CaptTrainingArguments, FareTrainer, TrainingStopped
from .tuner import CaptConfig, CaptModel

__version__ = "0.1.0"

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
