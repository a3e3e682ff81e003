"""What is classified: tasks, their images and pixels, and which of them are trained on."""

from .captions import CaptionedImages, load_captions
from .catalog import CATALOG, Entry
from .corruptions import CORRUPTIONS, corrupt, corrupted, parse_corruptions
from .images import load_image
from .loading import list_tasks, load_task
from .pixels import PixelTransform
from .sampling import sample_shots, split_classes
from .task import Task, describe_task
from .texts import TEMPLATES

__all__ = [
    "CATALOG",
    "CORRUPTIONS",
    "TEMPLATES",
    "CaptionedImages",
    "Entry",
    "PixelTransform",
    "Task",
    "corrupt",
    "corrupted",
    "describe_task",
    "list_tasks",
    "load_captions",
    "load_image",
    "load_task",
    "parse_corruptions",
    "sample_shots",
    "split_classes",
]
