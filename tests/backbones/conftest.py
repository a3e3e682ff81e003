"""A small CLIP in OpenAI's layout, and in transformers' as the base of image towers."""

import pytest
import torch
from helpers import TINY_CLIP
from openai_clip import SMALL, openai_state_dict

from capt_peft.backbones import convert_backbone


@pytest.fixture
def state():
    return openai_state_dict(SMALL)


@pytest.fixture
def base(state, tmp_path):
    """The whole CLIP in transformers' form, whose text tower image towers go with; with tiny CLIP's tokenizer."""
    torch.save(state, tmp_path / "base.pt")
    convert_backbone(tmp_path / "base.pt", tmp_path / "base", processor=TINY_CLIP)
    return str(tmp_path / "base")
