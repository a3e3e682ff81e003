"""Tuning an adapter on adversarial images: the trainer, its arguments, and what it keeps and watches."""

from .arguments import CaptTrainingArguments
from .callbacks import TrainingStopped
from .trainer import CaptTrainer

__all__ = ["CaptTrainer", "CaptTrainingArguments", "TrainingStopped"]
