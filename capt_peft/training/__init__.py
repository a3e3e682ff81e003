"""Tuning an adapter on adversarial images: the trainer, its arguments, and the callbacks that watch a run."""

from .arguments import CaptTrainingArguments
from .callbacks import (
    CheckGradients,
    LogPictures,
    StopOnCollapse,
    StopOnOverfitting,
    TrainingStopped,
    WarnAtChance,
    WarnOnVanishedGradients,
)
from .fare import FareTrainer, train_image_tower_alone
from .trainer import CaptTrainer

__all__ = [
    "CaptTrainer",
    "CaptTrainingArguments",
    "CheckGradients",
    "FareTrainer",
    "LogPictures",
    "StopOnCollapse",
    "StopOnOverfitting",
    "TrainingStopped",
    "WarnAtChance",
    "WarnOnVanishedGradients",
    "train_image_tower_alone",
]
