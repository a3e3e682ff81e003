"""An adapter with the records of a run and of an evaluation, as the commands find one."""

import shutil

import pytest
from helpers import TINY_CLIP
from hub_client import save_adapter


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(TINY_CLIP, 0, str(folder))
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    """Its folder, which a test may change."""
    return shutil.copytree(saved, tmp_path / "adapter")
