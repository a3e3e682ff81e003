"""A bare CLIP and an adapter with text and vision prompts, as classifiers, and images for them."""

import pytest
import torch
from helpers import TINY_CLIP, shake
from peft import get_peft_model
from transformers import CLIPModel

from capt_peft import CaptConfig, ZeroShotClassifier

NAMES = ("red circle", "green square", "seven", "blue star")


def classifier_of(kind, processor):
    model = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32).eval()
    if kind == "adapter":
        torch.manual_seed(0)
        model = get_peft_model(model, CaptConfig())
        shake(model)
    return ZeroShotClassifier(model.eval(), processor, NAMES)


@pytest.fixture(params=["bare", "adapter"])
def classifier(request, processor):
    return classifier_of(request.param, processor)


@pytest.fixture
def adapter(processor):
    return classifier_of("adapter", processor)


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
