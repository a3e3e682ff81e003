"""Small random CLIPs and what goes into them."""

import pytest
import torch
from peft import get_peft_model
from torch.utils._pytree import tree_map
from transformers import CLIPConfig, CLIPModel

from capt_peft import CaptConfig
from capt_peft.toy import TINY_CLIP  # noqa: F401 (tests take it from here)
from capt_peft.utils.versions import COMPILING_TORCH

VOCABULARY, START, END = 60, 58, 59
TEMPLATE_IDS = [START, 5, 6, 7]
# the arguments refuse torch_compile there, which a test of its own sees
compiles = pytest.mark.skipif(
    torch.__version__ < COMPILING_TORCH, reason=f"torch.compile needs torch {COMPILING_TORCH} here"
)
COUPLINGS = ("text_to_vision", "vision_to_text", "none")


def random_clip(seed=0, eos_token_id=END, text_layers=4, vision_layers=5, **text):
    """A CLIPModel with the given number of layers, towers of different widths, and random weights."""
    torch.manual_seed(seed)
    text_config = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": text_layers,
        "num_attention_heads": 4, "max_position_embeddings": 20, "eos_token_id": eos_token_id, "bos_token_id": START,
        "projection_dim": 24, **text,
    }  # fmt: skip
    vision_config = {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": vision_layers, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8, "projection_dim": 24,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=24))
    with torch.no_grad():  # CLIP's initial weights are so small that every layer is nearly the identity
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def clip_inputs(batch=3, lengths=(7, 6, 8)):
    """Token ids of texts that start with the template's words and end at different places, and random images."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        words = torch.randint(1, START, (length - 5,), generator=generator).tolist()
        ids[row, :length] = torch.tensor([*TEMPLATE_IDS, *words, END])
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}


def adapted(model, seed=1, adapter_name="default", **config):
    """The model with a CAPT adapter, coupled unless said otherwise, whose parameters are far from their start."""
    torch.manual_seed(seed)
    config = {"coupling": "text_to_vision", "num_vision_tokens": config.get("num_text_tokens", 2), **config}
    peft_model = get_peft_model(model, CaptConfig(**{"template_token_ids": TEMPLATE_IDS, **config}), adapter_name)
    shake(peft_model, seed)
    return peft_model.eval()


def shake(model, seed=1):
    """Adds noise to the trainable parameters, so that no test passes because they are at their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


class Quantised(torch.Tensor):
    """As torchao's weights: a tensor that has its values in parts and knows no `numpy`."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.scale = values.abs().max() / 127
        self.integers = (values / self.scale).round().to(torch.int8)

    def __tensor_flatten__(self):
        return ["scale", "integers"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return Quantised(tensors["integers"] * tensors["scale"])

    def dequantize(self):
        return self.integers * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        plain = tree_map(lambda value: value.dequantize() if isinstance(value, cls) else value, (args, kwargs or {}))
        return func(*plain[0], **plain[1])
