"""Every test runs offline, without trackers, and with the embedded model where it needs real words."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import pytest
import torch
import transformers
from helpers import TINY_CLIP, random_clip
from transformers import AutoProcessor

torch.set_num_threads(1)  # the models are so small that threads only get in each other's way
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Reports of files whose names are not UTF-8 can be sent from a worker."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture
def clip():
    return random_clip()


@pytest.fixture(scope="session")
def processor():
    return AutoProcessor.from_pretrained(TINY_CLIP)


@pytest.fixture(scope="session")
def saved_clip(tmp_path_factory):
    """A random CLIP on disk, as adapters need one to name."""
    folder = tmp_path_factory.mktemp("base")
    random_clip().save_pretrained(folder)
    return str(folder)
