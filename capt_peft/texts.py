"""Class texts as tokens, and what must hold of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn

from .tuner import CaptConfig, PromptLayer

TEXT_INPUTS = ("input_ids", "attention_mask")


def max_text_length(model: nn.Module) -> int:
    """Returns the number of tokens that the model's texts may have."""
    config: Any = model.config
    return int(getattr(config, "text_config", config).max_position_embeddings)


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """Tokenizes texts, padded to the longest of them; CLIP sees nothing behind a text's end, so the rest would be waste.

    Raises:
        ValueError: A text with more than `max_length` tokens: cutting it would cut off its end token.
    """
    lengths = [len(ids) for ids in tokenizer(list(texts))["input_ids"]]
    longest = max(range(len(texts)), key=lengths.__getitem__)
    if lengths[longest] > max_length:
        raise ValueError(
            f"The text {texts[longest]!r} has {lengths[longest]} tokens, but the model takes {max_length}. Shorten the class "
            "name or the template."
        )
    # SigLIP was trained on padded texts and reads its last token, whatever it is
    siglip = "siglip" in type(tokenizer).__name__.lower()
    padding: dict[str, Any] = {"padding": "max_length", "max_length": max_length} if siglip else {"padding": True}
    inputs = tokenizer(list(texts), return_tensors="pt", **padding)
    return {name: inputs[name] for name in TEXT_INPUTS if name in inputs}


def check_end_tokens(model: nn.Module, input_ids: Tensor) -> None:
    """Raises a ValueError if the texts (N, L) lack the token at which the model reads them: its processor is another's."""
    config: Any = model.config
    text_config = getattr(config, "text_config", config)
    legacy = text_config.eos_token_id == 2  # CLIP's old configurations: the model then reads the highest id
    if text_config.model_type.startswith("siglip") or legacy:
        fits = int(input_ids.max()) < text_config.vocab_size
    else:
        fits = bool((input_ids == text_config.eos_token_id).any(-1).all())
    if not fits:
        raise ValueError(
            f"The processor does not belong to the model: its texts lack the model's end token ({text_config.eos_token_id}). "
            "Load both from the same name."
        )


def check_prompts_fit(model: nn.Module, tokenizer: Any, template: str) -> None:
    """Raises a ValueError if the text prompts of an adapter would overwrite more than the template's words.

    The n prompts replace the n tokens after the start token, so the template needs n tokens before the class name.
    """
    adapters = getattr(model, "peft_config", {})
    words = len(tokenizer(template.split("{}")[0].rstrip())["input_ids"]) - 2  # without start and end token
    for name, config in adapters.items():
        if isinstance(config, CaptConfig) and config.depth("text") and words < config.num_text_tokens:
            raise ValueError(
                f"The template {template!r} has {max(words, 0)} tokens before the class name, but the {config.num_text_tokens} "
                f"text prompts of adapter {name!r} would overwrite {config.num_text_tokens}. Put more words before {{}}, or "
                "set num_text_tokens lower."
            )


def check_classes_known(model: nn.Module, class_names: Sequence[str]) -> None:
    """Raises a ValueError if the adapter in use has class-specific prompts for other classes, or in another order."""
    layers = (layer for layer in model.modules() if isinstance(layer, PromptLayer) and layer.site.tower == "text")
    name = next((layer.applied_adapter for layer in layers), None)
    config = getattr(model, "peft_config", {}).get(name)
    if not isinstance(config, CaptConfig) or not config.class_specific:
        return
    tuned, given = config.class_names or [], list(class_names)
    if given == tuned:
        return
    i, (known, asked) = next(
        (i, pair) for i, pair in enumerate(zip_longest(tuned, given, fillvalue="missing")) if pair[0] != pair[1]
    )
    raise ValueError(
        f"Adapter {name!r} has class-specific text prompts for the {len(tuned)} classes {_first(tuned)}, but is given the "
        f"{len(given)} classes {_first(given)} (class {i} is {known!r} there and {asked!r} here). Give the classes that it was "
        "tuned on, in their order, or take an adapter with one context for all classes (class_specific=False)."
    )


def _first(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
