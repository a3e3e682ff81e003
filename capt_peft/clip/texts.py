"""Class texts as tokens: what must hold of them, their split into parts that bound the memory, and a class's mean of several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data.texts import ClassText
from ..tuner import CaptConfig, PromptLayer
from ..tuner.clip import (
    base_model,
    end_token,
    find_towers,
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
from ..utils.text import counted, shown, some

WHOLE = 256  # up to so many texts run at once, unless a size is given
SIZE = 64  # texts of a part, above that
MAX_CHARACTERS = 10_000  # of a text; no model reads a hundredth of it


def tokenize_classes(
    model: nn.Module, tokenizer: Any, class_names: Sequence[str], class_texts: Sequence[ClassText]
) -> dict[str, Tensor]:
    """Tokenizes the T texts of N classes as the model reads them, having made sure that it can tell the classes apart.

    Raises:
        ValueError: As for `tokenize_texts`; or two classes whose texts have the same tokens up to the end token, or two such
            texts of one class.
    """
    inputs = tokenize_texts(model, tokenizer, [one.text for one in class_texts])
    _check_apart(class_names, class_texts, _read_tokens(inputs["input_ids"], end_token(model)))
    return inputs


def _check_apart(
    class_names: Sequence[str], class_texts: Sequence[ClassText], tokens: Sequence[tuple[int, ...]]
) -> None:
    of_classes: list[dict[tuple[int, ...], str]] = [{} for _ in class_names]
    for one, ids in zip(class_texts, tokens, strict=True):
        known = of_classes[one.label]
        if ids in known:
            raise ValueError(
                f"The texts {shown(known[ids])} and {shown(one.text)} of class {shown(class_names[one.label])} are the same to "
                "the model's tokenizer, and would count twice. Take one of them out."
            )
        known[ids] = one.text
    seen: dict[frozenset[tuple[int, ...]], str] = {}
    for name, known in zip(class_names, of_classes, strict=True):
        texts = frozenset(known)
        if texts in seen:
            are = "are the same text" if len(texts) == 1 else f"have the same {len(texts)} texts"
            raise ValueError(
                f"The class names {shown(seen[texts])} and {shown(name)} {are} to the model's tokenizer, so that "
                "the second would never be predicted. Rename one of them, or make them one class."
            )
        seen[texts] = name


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


class Room(NamedTuple):
    """The text with the fewest tokens before the class name, its class, and their number, start token included."""

    text: ClassText
    class_name: str
    tokens: int


def room_for_prompts(
    tokenizer: Any, class_names: Sequence[str], class_texts: Sequence[ClassText], input_ids: Tensor, template: str
) -> Room:
    """Returns which of the texts (T, L) has the least room before the class name; a text prompt must not overwrite the name.

    A word that the tokenizer joins with the beginning of a name counts to the name. Words with which a class's own text begins as
    `template` does tell no class if its name stands behind them ("a photo of the letter a"); if it never has its name, all other
    words tell the class.
    """
    openings = [_openings(one, class_names[one.label], template) for one in class_texts]
    first, last = (_common(tokenizer, input_ids, words) for words in zip(*openings, strict=True))
    room = first.maximum(last.minimum(_common(tokenizer, input_ids, [template] * len(class_texts)))).tolist()
    i = min(range(len(room)), key=room.__getitem__)
    return Room(class_texts[i], class_names[class_texts[i].label], room[i])


def _common(tokenizer: Any, input_ids: Tensor, openings: Sequence[str]) -> Tensor:
    """Returns with how many tokens each of the texts (T, L) begins as its opening does, start token included: (T,)."""
    rows: dict[str, list[int]] = {}
    for i, words in enumerate(openings):
        rows.setdefault(words, []).append(i)
    common = torch.empty(len(openings), dtype=torch.long)
    for words, places in rows.items():
        ids = template_tokens(tokenizer, words)
        same = input_ids[places, : len(ids)] == torch.tensor(ids[: input_ids.shape[1]], dtype=torch.long)  # (n, l)
        common[places] = same.int().cumprod(-1).sum(-1)
    return common


def _openings(one: ClassText, name: str, template: str) -> tuple[str, str]:
    """Returns a text up to where it first has its class's name, and up to where it last has it; the template if it never has.

    A whole word is the name rather than the beginning of one, and a spelling that keeps the name's capitals rather than another.
    A capital at the beginning may be the sentence's: it is no name if the name comes again ("A drawing of the letter A").
    """
    if one.template is not None:
        return one.template, one.template
    text, words = one.text.replace("_", " "), name.replace("_", " ").split() or [name]
    spaced = r"\s+".join(map(re.escape, words))
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for found in re.finditer(rf"(?<!\w){spaced}(\w*)", text, re.IGNORECASE):
        pairs = zip("".join(words), "".join(found[0].split()), strict=False)
        other = any(ours != theirs and ours.isupper() for ours, theirs in pairs)
        kinds.setdefault((bool(found[1]), other), []).append(found.start())
    if not kinds:
        return template, template
    places = kinds[min(kinds)]
    if len(places) > 1 and places[0] == 0 and words[0][0].isupper() and text[0].isupper():
        del places[0]
    return text[: places[0]], text[: places[-1]]


def check_adapter_fits(model: nn.Module, class_names: Sequence[str], room: Room) -> None:
    """Makes sure that the adapter in use can take these texts, by their `room_for_prompts`; inactive ones do not count.

    Raises:
        ValueError: The adapter's n text prompts, which replace the n tokens after the start token, would overwrite the class
            name; it has class-specific prompts for other classes, or in another order; or it is switched off in part.
    """
    found = _text_prompts(model)
    if found is None:
        return
    name, config, places = found
    _check_room(name, places, room)
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
    _check_room(name, places, Room(ClassText(0, template, template), "", len(opening)))
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


def context_places(model: nn.Module, room: Room) -> slice:
    """Returns the positions of the tokens that tell no class: text prompts in use, or words before the name."""
    found = _text_prompts(model)
    return found[2] if found else slice(find_towers(base_model(model))["text"].start, room.tokens)


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


def _check_room(name: str, places: slice, room: Room) -> None:
    """Raises a ValueError that names the text if the prompts of adapter `name`, at these places, would overwrite the name."""
    if places.stop <= room.tokens:
        return
    words, prompts = max(room.tokens - places.start, 0), places.stop - places.start
    what, told, mark = f"The template {shown(room.text.template)}", "the class name", "{}"
    if room.text.template is None:
        what = f"The text {shown(room.text.text)} of class {shown(room.class_name)}"
        told, mark = "the words that tell the class", "them"
    raise ValueError(
        f"{what} has {counted(words, 'token')} before {told}, but the {counted(prompts, 'text prompt')} of adapter {name!r} "
        f"would overwrite {prompts}. Put more words before {mark}, or tune with fewer text prompts (num_text_tokens)."
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
    """Some of the T texts: the classes (n,) that they are of, and their `input_ids` and `attention_mask` (n, l)."""

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
    """The T texts of N classes in parts of equal size.

    Attributes:
        parts: The parts.
        places: Where (T,) each text's features stand in those of all parts together.
        counts: How many of the texts, class by class, are of each of the N classes.
    """

    parts: list[TextPart]
    places: Tensor
    counts: list[int]

    def join(self, features: Sequence[Tensor]) -> Tensor:
        """Returns the (N, D) normalised features of the classes from those of the parts' texts."""
        joined = torch.cat(list(features))  # (n, D)
        return class_means(joined[moved(self.places, joined.device)], self.counts)


def class_means(features: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns the features of N classes from the normalised ones of their T texts: (T, D) -> (N, D), normalised.

    A class with one text has that text's feature. Of several it has the mean, scaled to length 1, as CLIP's authors have it
    (arXiv 2103.00020, section 3.1.4); it is taken in float32 at least.
    """
    if len(counts) == len(features):
        return features
    precise = features.to(torch.promote_types(features.dtype, torch.float32))
    means = [texts[0] if len(texts) == 1 else normalize(texts.mean(0)) for texts in precise.split(list(counts))]
    return torch.stack(means).to(features.dtype)


def normalize(features: Tensor) -> Tensor:
    """Scales each row to length 1."""
    return features / features.norm(dim=-1, keepdim=True)


def split_texts(
    inputs: dict[str, Tensor], size: int | None, *, labels: Sequence[int] | None = None, cut: bool = True
) -> TextParts | None:
    """Splits texts (T, L) into parts of equal size, each cut at the end of its longest; None: one has all, one text a class.

    The texts are sorted by length first, which saves what short ones would be padded with. To make the parts equal, some texts
    may appear twice; the second time counts for nothing.

    Args:
        inputs: `input_ids` and perhaps `attention_mask`, (T, L).
        size: Texts of a part; None: all at once up to 256, 64 above that.
        labels: The classes of the texts, in order, 0 to N - 1 and each at least once; None: every text is a class.
        cut: False leaves all parts at the length L, for code that is compiled for one shape.
    """
    count = len(inputs["input_ids"])
    classes = torch.arange(count) if labels is None else torch.tensor(labels)
    counts = torch.bincount(classes).tolist()
    if count <= (size or WHOLE):
        if len(counts) == count:
            return None
        size = count
    pieces = -(-count // (size or SIZE))
    size = -(-count // pieces)
    lengths = inputs["attention_mask"].sum(1) if "attention_mask" in inputs else torch.zeros(count)
    order = lengths.argsort(stable=True)
    order = torch.cat([order, order[-1:].expand(pieces * size - count)])
    places = torch.from_numpy(np.unique(order.numpy(), return_index=True)[1])  # the first time each appears
    parts = []
    for rows in order.view(pieces, size):
        longest = int(lengths[rows].max()) if cut else 0
        parts.append(TextPart(classes[rows], {name: ids[rows, : longest or None] for name, ids in inputs.items()}))
    return TextParts(parts, places, counts)
