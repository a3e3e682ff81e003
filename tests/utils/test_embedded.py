"""The models that come with the package are found by name, and their folders in other environments are recognised."""

import os
from pathlib import Path

import pytest

from capt_peft.toy import TINY_CLIP, TINY_CLIP_ROBUST
from capt_peft.utils.embedded import embedded_name, model_path, recorded_path


def test_a_name_means_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_path("tiny_clip") == TINY_CLIP and model_path("tiny_clip_robust") == TINY_CLIP_ROBUST
    assert all(Path(folder, "model.safetensors").is_file() for folder in (TINY_CLIP, TINY_CLIP_ROBUST))


def test_a_folder_of_that_name_is_here_and_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("tiny_clip")
    assert model_path("tiny_clip") == recorded_path("tiny_clip") == "tiny_clip"
    assert model_path("tiny_clip_robust") == TINY_CLIP_ROBUST


@pytest.mark.parametrize(
    "name", ["openai/clip-vit-base-patch32", "/no/such/toy/tiny_clip", "you/tiny_clip", "tiny_clip/", "tiny"]
)
def test_what_a_user_types_means_nothing_else(name):
    assert model_path(name) == name


@pytest.mark.parametrize(
    ("recorded", "name"),
    [
        ("tiny_clip", "tiny_clip"),
        ("/another/lib/python3.12/site-packages/capt_peft/toy/tiny_clip_robust", "tiny_clip_robust"),
        (r"C:\Users\someone\capt-peft\examples\tiny_clip", "tiny_clip"),
        ("examples/tiny_clip", "tiny_clip"),
        ("/models/tiny_clip", None),
        ("you/tiny_clip", None),
        ("openai/clip-vit-base-patch32", None),
        ("", None),
    ],
)
def test_a_recorded_base_is_recognised_by_its_last_two_parts(recorded, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert embedded_name(recorded) == name
    here = {"tiny_clip": TINY_CLIP, "tiny_clip_robust": TINY_CLIP_ROBUST, None: recorded}
    assert recorded_path(recorded) == here[name]
