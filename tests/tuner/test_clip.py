"""What is known of a CLIP's structure is known in one file; and what that file says of CLIP and SigLIP."""

import ast
import re
from pathlib import Path

import pytest
import torch
from helpers import random_clip
from transformers import SiglipConfig, SiglipModel

import capt_peft
from capt_peft.tuner import clip

PACKAGE = Path(capt_peft.__file__).parent
EXAMPLES = PACKAGE.parent / "examples"
# what models, their configurations and tokenizers call their parts
ATTRIBUTES = {
    "vision_model", "text_model", "encoder", "layers", "visual_projection", "text_projection", "embeddings", "token_embedding",
    "patch_embedding", "position_embedding", "class_embedding", "logit_scale", "logit_bias", "get_image_features",
    "get_text_features", "pooler_output", "text_embeds", "image_embeds",
    "vision_config", "text_config", "model_type", "max_position_embeddings", "vocab_size",
    "image_size", "hidden_size", "hidden_act", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id",
}  # fmt: skip
NAMES = re.compile(
    r"[\w.]*\b(vision_model|text_model|encoder\.layers|visual_projection|text_projection|logit_scale|logit_bias|siglip\w*|"
    r"metaclip\w*|clip_(text|vision)_model)\b[\w.]*"
)
CLASSES = re.compile(
    r"QuickGELU\w*|\w*(CLIP|Clip|Siglip)\w*(Model|Tokenizer\w*|Transformer|Encoder\w*|Embeddings|Config)"
)
OWNER = "tuner/clip.py"
# these write the form of published checkpoints and the configuration of the CLIPModel that one becomes
CHECKPOINTS = {"backbones/layout.py", "backbones/conversion.py", "backbones/model.py"}


def structure_in(tree):
    """The places in a module that look at the structure of a model or a tokenizer."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMES.fullmatch(node.value):
            yield node.lineno, node.value
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, name.name) for name in node.names if CLASSES.fullmatch(name.name))


def test_no_other_file_looks_at_the_structure_of_a_model_or_a_tokenizer():
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    files |= {
        path.name: path for path in EXAMPLES.glob("*.py") if path.name != "pretrain_tiny_clip.py"
    }  # it builds a CLIP
    found = {name: list(structure_in(ast.parse(path.read_text()))) for name, path in files.items()}
    assert len(found.pop(OWNER)) > 20
    assert {name: places for name, places in found.items() if places and name not in CHECKPOINTS} == {}


def test_the_sweep_sees_what_it_looks_for():
    code = "from transformers import CLIPModel\nm.vision_model\ngetattr(m, 'text_model')\nn.startswith('visual_projection.')\n"
    code += "t == 'siglip'\nraise ValueError('it has no vision_model')\nname = 'class_names'\n"
    assert [line for line, _ in structure_in(ast.parse(code))] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("eos_token_id", [59, 2], ids=["eos", "legacy eos"])
def test_the_end_of_a_text_is_found_by_either_rule(eos_token_id):
    model = random_clip(eos_token_id=eos_token_id)
    end = clip.end_token(model)
    assert end == (clip.HIGHEST if eos_token_id == 2 else 59) == clip.end_token(model.config)
    ids = torch.tensor([[58, 3, 59, 0, 0], [58, 3, 4, 59, 59]])
    assert clip.is_end(ids, end).int().argmax(-1).tolist() == [2, 3]


def test_logits_are_the_models_own_with_siglips_bias_too():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text, vision = (
        {**shape, "vocab_size": 60, "max_position_embeddings": 8},
        {**shape, "image_size": 32, "patch_size": 8},
    )
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        siglip.logit_bias.fill_(-3)
        for model in (random_clip(), siglip):
            ids, pixels = torch.randint(0, 58, (3, 8)), torch.randn(2, 3, 32, 32)
            own = model(input_ids=ids, pixel_values=pixels)
            assert torch.equal(clip.logits(model, own.image_embeds, own.text_embeds), own.logits_per_image)
            features = clip.image_features(model, pixels), clip.text_features(model, {"input_ids": ids})
            normalised = [f / f.norm(dim=-1, keepdim=True) for f in features]
            torch.testing.assert_close(clip.logits(model, *normalised), own.logits_per_image)
            assert clip.image_size(model) == 32
