"""The start of the text prompts: what the frozen text tower holds in their places.

The text tower is causal, so its states at the template's first words do not depend on the class name. Prompts that start
from those states leave every text of the template exactly as it was.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from ..utils.text import cut, shown
from .clip import Tower
from .config import CaptConfig
from .loading import load_pretrained

logger = logging.getLogger(__name__)


def template_ids(config: CaptConfig, model: nn.Module) -> list[int] | None:
    """Returns the token ids of the template up to the class name, start token first, by the base model's tokenizer.

    None, with a warning, where the base model has no tokenizer (a model that was never saved, for example).
    """
    if config.template_token_ids is not None:
        return config.template_token_ids
    name = config.base_model_name_or_path or getattr(model, "name_or_path", None)
    try:
        if not name:
            raise ValueError("the model has no name")
        tokenizer = load_pretrained(AutoTokenizer, name, revision=config.revision)
        prefix = config.template.split("{}")[0].rstrip()
        return list(tokenizer(prefix, add_special_tokens=True)["input_ids"][:-1])  # without the end token
    except (OSError, ValueError) as error:
        logger.warning(
            "No tokenizer for the base model %s (%s): the text prompts start at random instead of from the template %s. "
            "Set CaptConfig(template_token_ids=...) to start from it.",
            name or "",
            cut(str(error).splitlines()[0]),
            shown(config.template),
        )
        return None


@torch.no_grad()
def text_start(config: CaptConfig, model: nn.Module, tower: Tower) -> dict[int, torch.Tensor]:
    """Returns the (n, dim) values from which the text prompts start, by layer index; absent layers start at random.

    Class-specific prompts start from the same values for every class.

    Args:
        config: The adapter's configuration, with `template_token_ids`.
        model: The model, its adapters switched off.
        tower: Its text tower.
    """
    n, ids = config.num_text_tokens, config.template_token_ids
    if config.init == "normal" or not ids or len(ids) < tower.start + n:
        return {}
    text_model: Any = model.get_submodule(tower.name)
    rows = slice(tower.start, tower.start + n)
    input_ids = torch.tensor(
        [ids[: tower.start + n]], device=text_model.get_input_embeddings().weight.device
    )  # (1, 1 + n)
    start = {0: model.get_submodule(tower.modules[0])(input_ids)[0, rows]}
    if config.init == "template" and tower.start > 0:  # SigLIP, without a start token, is not causal
        hidden = text_model(input_ids=input_ids, output_hidden_states=True).hidden_states  # one more than layers
        start |= {i: hidden[i][0, rows] for i in range(1, config.text_depth)}
    return {i: value.float() for i, value in start.items()}
