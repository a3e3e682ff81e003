"""Class texts as tokens: what must hold of them, and their split into parts that bound the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..tuner import CaptConfig, PromptLayer
from ..tuner.clip import (
    end_token,
    is_end,
    max_text_length,
    prompt_places,
    special_tokens,
    template_tokens,
    tokenize,
    vocabulary_size,
)
from ..tuner.switching import adapted_modules
from ..utils.machine import moved
from ..utils.text import shown, some

WHOLE = 256  # up to so many texts run at once, unless a size is given
SIZE = 64  # texts of a part, above that
MAX_CHARACTERS = 10_000  # of a text; no model reads a hundredth of it


def tokenize_classes(
    model: nn.Module, tokenizer: Any, class_names: Sequence[str], texts: Sequence[str]
) -> dict[str, Tensor]:
    """Tokenizes the N class texts as the model reads them, having made sure that it can tell the classes apart.

    Raises:
        ValueError: As for `tokenize_texts`; or two names with the same tokens up to the end token.
    """
    inputs = tokenize_texts(model, tokenizer, texts)
    seen: dict[tuple[int, ...], str] = {}
    for name, tokens in zip(class_names, _read_tokens(inputs["input_ids"], end_token(model)), strict=True):
        if tokens in seen:
            raise ValueError(
                f"The class names {shown(seen[tokens])} and {shown(name)} are the same text to the model's tokenizer, so that "
                "the second would never be predicted. Rename one of them, or make them one class."
            )
        seen[tokens] = name
    return inputs


def check_texts(texts: Sequence[str]) -> None:
    """Raises a TypeError or ValueError unless these are texts, none of them empty."""
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Text {place} is {shown(text, 40)} ({type(text).__name__}); give strings.")
        if not text.strip():
            raise ValueError(f"Text {place} is empty. Give it words, or leave it out.")


def tokenize_texts(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Tokenizes texts, of classes or free ones, as the model reads them.

    Raises:
        ValueError: A text with more tokens than the model takes, or with a start or end token inside; or the tokenizer of
            another model.
    """
    huge = next((text for text in texts if len(text) > MAX_CHARACTERS), None)
    if huge is not None:
        raise ValueError(f"The text {shown(huge)} is too long. Shorten it, or the template around it.")
    lengths, most = [len(ids) for ids in tokenizer(list(texts))["input_ids"]], max_text_length(model)
    longest = max(range(len(texts)), key=lengths.__getitem__)
    if lengths[longest] > most:  # cutting it would cut off its end token
        raise ValueError(
            f"The text {shown(texts[longest])} has {lengths[longest]} tokens, but the model takes {most}. Shorten it, or the "
            "template around it."
        )
    inputs, end = tokenize(model, tokenizer, texts), end_token(model)
    ids = inputs["input_ids"]
    if ids.max() >= vocabulary_size(model) or not is_end(ids, end).any(-1).all():
        raise ValueError(
            "The processor does not belong to the model: its texts lack the model's end token. Load both from the same name."
        )
    _check_special_tokens(tokenizer, texts)
    return inputs


def _check_special_tokens(tokenizer: Any, texts: Sequence[str]) -> None:
    special = special_tokens(tokenizer)
    for text, ids in zip(texts, tokenizer(list(texts), add_special_tokens=False)["input_ids"], strict=True):
        found = next((i for i in ids if i in special), None)
        if found is not None:
            raise ValueError(
                f"The text {shown(text)} holds the tokenizer's special token {tokenizer.convert_ids_to_tokens(found)!r}, which "
                "marks the start or the end of a text. Take it out."
            )


def _read_tokens(input_ids: Tensor, end: int | str) -> list[tuple[int, ...]]:
    """Returns for each text (N, L) the tokens that decide its features: up to its end, behind which all are padding."""
    ends = is_end(input_ids, end).int().argmax(-1)
    return [tuple(ids[: last + 1]) for ids, last in zip(input_ids.tolist(), ends.tolist(), strict=True)]


def tokens_before_name(tokenizer: Any, template: str, input_ids: Tensor) -> int:
    """Returns the number of tokens of the texts (N, L) that come before the class name, start token included.

    A word that the tokenizer joins with the beginning of a name counts to the name.
    """
    ids = template_tokens(tokenizer, template)
    same = input_ids[:, : len(ids)] == torch.tensor(ids[: input_ids.shape[1]], dtype=torch.long)  # (N, n)
    return int(same.int().cumprod(-1).sum(-1).min())


def check_adapter_fits(model: nn.Module, class_names: Sequence[str], template: str, before_name: int) -> None:
    """Makes sure that the adapter in use can take these texts, by their `tokens_before_name`; inactive ones do not count.

    Raises:
        ValueError: The adapter's n text prompts, which replace the n tokens after the start token, would overwrite the class
            name; it has class-specific prompts for other classes, or in another order; or it is switched off in part.
    """
    found = _text_prompts(model)
    if found is None:
        return
    name, config, places = found
    _check_template_has_room(name, places, template, before_name)
    if config.class_specific:
        _check_classes_known(name, config.class_names or [], list(class_names))


def check_free_texts_fit(
    model: nn.Module, tokenizer: Any, template: str, texts: Sequence[str], input_ids: Tensor
) -> None:
    """Makes sure that the adapter in use can take texts (N, L) that are not those of classes.

    Its n text prompts stand for the first n tokens of `template`; a text that begins otherwise would lose words of its own.

    Raises:
        ValueError: A text does not begin with these tokens, or the adapter has class-specific prompts.
    """
    found = _text_prompts(model)
    if found is None:
        return
    name, config, places = found
    if config.class_specific:
        raise ValueError(
            f"Adapter {name!r} has class-specific text prompts, which know the texts of its classes and no others. Take an "
            "adapter with one context for all texts (class_specific=False), or embed them with the base model: "
            "`with classifier.frozen():`."
        )
    opening = template_tokens(tokenizer, template)
    _check_template_has_room(name, places, template, len(opening))
    opening = opening[: places.stop]
    other = next(
        (text for text, ids in zip(texts, input_ids.tolist(), strict=True) if ids[: places.stop] != opening), None
    )
    if other is not None:
        words = tokenizer.decode(opening, skip_special_tokens=True)
        raise ValueError(
            f"The text {shown(other)} does not begin with {words!r}, the words of the template {shown(template)} that the "
            f"{config.num_text_tokens} text prompts of adapter {name!r} stand for, so that they would overwrite words of its "
            "own. Begin it with these words."
        )


def _text_prompts(model: nn.Module) -> tuple[str, CaptConfig, slice] | None:
    """Returns the adapter whose text prompts act, its configuration and the places of the tokens that they replace."""
    modules = adapted_modules(model)
    if len({module.disable_adapters for module in modules}) > 1:
        raise ValueError(
            "The model's adapters are switched off in some modules and on in others, as transformers' enable_adapters() leaves "
            "modules_to_save. Call enable_adapters(True) on the modules that are off, or load the adapter again."
        )
    layers = (layer for layer in modules if isinstance(layer, PromptLayer) and layer.site.tower == "text")
    layer = next((layer for layer in layers if layer.applied_adapter is not None), None)
    if layer is None:
        return None
    name = str(layer.applied_adapter)
    config = getattr(model, "peft_config", {}).get(name)
    if not isinstance(config, CaptConfig):
        return None
    return name, config, prompt_places(layer.site.start, config.num_text_tokens)


def _check_template_has_room(name: str, places: slice, template: str, before_name: int) -> None:
    if places.stop > before_name:
        words, prompts = max(before_name - places.start, 0), places.stop - places.start
        raise ValueError(
            f"The template {shown(template)} has {words} tokens before the class name, but the {prompts} text prompts of adapter "
            f"{name!r} would overwrite {prompts}. Put more words before {{}}, or set num_text_tokens lower."
        )


def _check_classes_known(name: str, tuned: list[str], given: list[str]) -> None:
    if given == tuned:
        return
    i, (known, asked) = next(
        (i, pair) for i, pair in enumerate(zip_longest(tuned, given, fillvalue="missing")) if pair[0] != pair[1]
    )
    raise ValueError(
        f"Adapter {name!r} has class-specific text prompts for the {len(tuned)} classes {some(tuned, 10, quote=True)}, but is "
        f"given the {len(given)} classes {some(given, 10, quote=True)} (class {i} is {shown(known)} there and {shown(asked)} "
        "here). Give the classes that it was tuned on, in their order, or take an adapter with one context for all classes "
        "(class_specific=False)."
    )


@dataclass(frozen=True)
class TextPart:
    """Some of the N class texts: their places among them (n,), and their `input_ids` and `attention_mask` (n, l)."""

    rows: Tensor
    inputs: dict[str, Tensor]

    def inputs_on(self, device: torch.device) -> dict[str, Tensor]:
        """Returns the inputs on a device, where they then stay."""
        for name, ids in self.inputs.items():
            if ids.device != device:
                with torch.inference_mode(False):
                    self.inputs[name] = moved(ids, device)
        return dict(self.inputs)


@dataclass(frozen=True)
class TextParts:
    """The N class texts in parts of equal size, and where (N,) each text's features stand in those of all parts together."""

    parts: list[TextPart]
    places: Tensor

    def join(self, features: Sequence[Tensor]) -> Tensor:
        """Returns the (N, D) features of all texts, in their order, from those of the parts."""
        joined = torch.cat(list(features))  # (n, D)
        return joined[moved(self.places, joined.device)]


def split_texts(inputs: dict[str, Tensor], size: int | None, *, cut: bool = True) -> TextParts | None:
    """Splits class texts (N, L) into parts of equal size, each cut at the end of its longest text; None if one part holds all.

    The texts are sorted by length first, which saves what short ones would be padded with. To make the parts equal, some texts
    may appear twice; the second time counts for nothing.

    Args:
        inputs: `input_ids` and perhaps `attention_mask`, (N, L).
        size: Texts of a part; None: all at once up to 256, 64 above that.
        cut: False leaves all parts at the length L, for code that is compiled for one shape.
    """
    count = len(inputs["input_ids"])
    if count <= (size or WHOLE):
        return None
    pieces = -(-count // (size or SIZE))
    size = -(-count // pieces)
    lengths = inputs["attention_mask"].sum(1) if "attention_mask" in inputs else torch.zeros(count)
    order = lengths.argsort(stable=True)
    order = torch.cat([order, order[-1:].expand(pieces * size - count)])
    places = torch.from_numpy(np.unique(order.numpy(), return_index=True)[1])  # the first time each appears
    parts = []
    for rows in order.view(pieces, size):
        longest = int(lengths[rows].max()) if cut else 0
        parts.append(TextPart(rows, {name: ids[rows, : longest or None] for name, ids in inputs.items()}))
    return TextParts(parts, places)
