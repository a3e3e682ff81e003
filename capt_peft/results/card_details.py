"""What a person adds to a card, and whose card a README.md is."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..utils.markup import plain

MARK = "<!-- Written by capt-peft, which writes it again with the adapter. To keep words of your own, delete this line. -->"
_BY_PEFT = re.compile(r"### Framework versions|- PEFT [\w.@+]+|This is the model card of a 🤗 transformers model .*")
_OWN_TAGS = {"capt", "adversarial-robustness", "clip", "peft", "transformers"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)

Names = Any  # a string, a sequence of strings, or None; a tuple once it is checked


@dataclass(frozen=True, kw_only=True)
class CardDetails:
    """What a person adds to a card: the arguments of transformers' `Trainer.create_model_card`, and TRL's `dataset_name`.

    Args:
        model_name: The model's name in the metadata; by default that of the repository or folder.
        language: Languages of the class texts.
        license: The adapter's licence.
        tags: Further tags.
        tasks: Task names; they become tags.
        finetuned_from: Hub id of the base model, where the adapter's configuration names a local folder.
        dataset_name: Data that it was tuned on; Hub ids go into the metadata.
        dataset: The same.
        dataset_tags: The same.
        dataset_args: Which configuration of it.

    Raises:
        TypeError: One of them is neither a string nor a list of strings.
    """

    model_name: str | None = None
    language: Names = ()
    license: str | None = None
    tags: Names = ()
    tasks: Names = ()
    finetuned_from: str | None = None
    dataset_name: Names = ()
    dataset: Names = ()
    dataset_tags: Names = ()
    dataset_args: Names = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default == ():
                names = () if value is None else (value,) if isinstance(value, str) else value
                if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) for name in names):
                    raise TypeError(f"{field.name}={plain(repr(value), 100)} must be a string or a list of strings.")
                object.__setattr__(self, field.name, tuple(names))
            elif value is not None and not isinstance(value, str):
                raise TypeError(f"{field.name}={plain(repr(value), 100)} must be a string.")

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> CardDetails:
        """Returns them from keyword arguments; raises a TypeError that names what a card has no place for."""
        known = [field.name for field in fields(cls)]
        for name in arguments:
            if name not in known:
                raise TypeError(f"{name} is unknown here: a card takes {', '.join(known)}.")
        return cls(**arguments)

    @property
    def datasets(self) -> tuple[str, ...]:
        """All data sets that were named."""
        return tuple(dict.fromkeys((*self.dataset_name, *self.dataset, *self.dataset_tags)))

    @property
    def dataset_words(self) -> str:
        """The configuration of the data set, to stand behind its name."""
        return f" ({', '.join(self.dataset_args)})" if self.dataset_args else ""

    @property
    def all_tags(self) -> tuple[str, ...]:
        """All tags, those of tasks included."""
        return (*self.tags, *self.tasks)

    def over(self, kept: CardDetails) -> CardDetails:
        """Returns these, with what they leave open from others; tags add up."""
        values = {field.name: getattr(self, field.name) or getattr(kept, field.name) for field in fields(self)}
        return CardDetails(**{**values, "tags": (*self.tags, *kept.tags)})


def is_hub_id(name: str) -> bool:
    """Tells whether a name can be the id of a repository: it has the form of one and is not a folder here."""
    return len(name) <= 96 and _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def is_replaceable(path: Path) -> bool:
    """Tells whether a README.md says nothing that a person wrote: it is not there, ours, or a template that nobody filled in."""
    if not path.is_file():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    return MARK in text or _is_blank(text)


def _is_blank(text: str) -> bool:
    template = {line.strip() for line in str(ModelCard.from_template(ModelCardData())).splitlines()}
    body = re.sub(r"\A\s*---\s*\n.*?\n---\s*(\n|\Z)", "", text, flags=re.DOTALL)
    lines = (line.strip() for line in body.splitlines())
    return all(not line or line in template or _BY_PEFT.fullmatch(line) for line in lines)


def without_local_paths(text: str) -> str:
    """Returns somebody's card without the folder of the base model that PEFT writes into its header; the Hub refuses it there."""
    try:
        card: Any = ModelCard(text)
        base, tags = card.data.base_model, card.data.tags or []
        local = [tag for tag in tags if tag.startswith("base_model:") and not is_hub_id(tag.split(":")[-1])]
        if not local and (not isinstance(base, str) or is_hub_id(base)):
            return text
        card.data.tags = [tag for tag in tags if tag not in local] or None
        card.data.base_model = base if isinstance(base, str) and is_hub_id(base) else None
        return str(card)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError):
        return text  # a header that cannot be read is the person's own: PEFT would not have written into it


def kept_details(path: Path, fingerprint: str | None) -> CardDetails:
    """Returns what a person added to the card that is there, which shall stay when it is written again.

    Args:
        path: The card.
        fingerprint: That of the weights: the data is kept only if the card is of the same.
    """
    if not path.is_file():
        return CardDetails()
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        data: Any = ModelCard(text).data
        same = MARK in text and fingerprint is not None and f"fingerprint `{fingerprint}`" in text
        tags = [tag for tag in data.tags or [] if tag not in _OWN_TAGS and not tag.startswith("base_model:")]
        base = data.base_model if same and isinstance(data.base_model, str) and is_hub_id(data.base_model) else None
        return CardDetails(
            language=data.language,
            license=data.license,
            tags=tags,
            dataset=data.datasets if same else (),
            finetuned_from=base,
        )
    except (yaml.YAMLError, ValueError, TypeError, AttributeError):
        return CardDetails()  # somebody's header that cannot be read keeps nothing
