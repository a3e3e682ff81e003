"""What needs no download: procedural images, the tasks made of them, the handwritten digits; `load_task` knows them by name."""

from functools import partial

from ..data.loading import MADE
from .tasks import load_procedural_task, procedural_tasks

MADE.update({name: partial(load_procedural_task, name) for name in procedural_tasks()})
