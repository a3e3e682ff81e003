"""What is published: robust CLIPs by name (`registry.yaml`), where each lies, and what its source says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..utils.embedded import REGISTRY
from ..utils.files import read_entries

LAYOUTS = {
    "transformers": "a folder of transformers, both towers",
    "open_clip": "open_clip, both towers, with its configuration beside it",
    "image tower": "the image tower alone (RobustVLM)",
    "tecoa": "the image tower in `vision_encoder_state_dict` (TeCoA's code)",
}
ALONE = ("image tower", "tecoa")


@dataclass(frozen=True)
class Backbone:
    """A published robust CLIP.

    Attributes:
        name: The name that `load_backbone` takes.
        method: How it was made robust: "FARE", "TeCoA", ...
        paper: arXiv number of its paper.
        where: Hub id of the repository that it lies in, or address of the file or of the page that links it.
        layout: One of `LAYOUTS`.
        architecture: As in "ViT-L/14".
        epsilon: Radius of its training, in the L-inf norm, as "4/255".
        activation: "quick_gelu" or "gelu"; no shape tells.
        processor: Hub id whose tokenizer it goes with.
        licence: What its source says of the licence of the weights.
        sources: What was read for all this.
        files: Names of its file in the repository, the first that is there; empty where it is not on the Hub.
        base: Of an image tower alone: the CLIP whose text tower it goes with.
        reported: What its source reports, in percent: "clean", and robust accuracy by radius.
        reported_on: What that is measured on.
        unverified: Which of these the sources do not say, or could not be read: inferred from the code or from its siblings.
        note: What a user should know.
    """

    name: str
    method: str
    paper: str
    where: str
    layout: str
    architecture: str
    epsilon: str
    activation: str
    processor: str
    licence: str
    sources: tuple[str, ...]
    files: tuple[str, ...] = ()
    base: str | None = None
    reported: Mapping[str, float] = field(default_factory=dict)
    reported_on: str = ""
    unverified: tuple[str, ...] = ()
    note: str = ""

    @property
    def on_hub(self) -> bool:
        """Whether it is fetched from the Hub; of the others, somebody has to download the file."""
        return bool(self.files)

    @property
    def address(self) -> str:
        """Where it lies, as an address."""
        return f"https://huggingface.co/{self.where}" if self.on_hub else self.where

    def say(self, name: str) -> str:
        """Returns an attribute as text, with a question mark where it is not verified."""
        value = getattr(self, name)
        text = ", ".join(value) if isinstance(value, tuple) else str(value or "none")
        return f"{text} (?)" if name in self.unverified else text

    @property
    def results(self) -> str:
        """What its source reports, as text."""
        numbers = [f"{value} {'clean' if name == 'clean' else f'at {name}'}" for name, value in self.reported.items()]
        mark = " (?)" if "reported" in self.unverified else ""
        return (", ".join(numbers) or "none found") + mark


def read_registry(path: Path = REGISTRY) -> dict[str, Backbone]:
    """Reads a registry.

    Args:
        path: The YAML file; by default that of the package.

    Returns:
        The backbones by name, in the order of the file.

    Raises:
        ValueError: An entry with a field that there is none of, without one that is needed, or with a layout or an unverified
            field that does not exist.
    """
    found = {}
    for name, values in read_entries(path).items():
        try:
            entry = found[name] = Backbone(name=name, **values)
        except TypeError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
        unknown = set(entry.unverified) - {f.name for f in fields(Backbone)}
        if entry.layout not in LAYOUTS or unknown or (entry.layout in ALONE) != bool(entry.base):
            raise ValueError(
                f"{path}: {name}: layout={entry.layout!r}, base={entry.base!r}, unverified={sorted(entry.unverified)}. Allowed: "
                f"{', '.join(LAYOUTS)}, with a base for {' and '.join(ALONE)} alone, and fields that exist."
            )
    return found


BACKBONES = read_registry()


def table(backbones: Mapping[str, Backbone] = BACKBONES) -> str:
    """Returns a table of published backbones, in Markdown; (?) marks what could not be verified."""
    heads = ("name", "method", "architecture", "epsilon", "licence", "layout", "where", "reported")
    rows: list[Any] = [heads, ["---"] * len(heads)]
    for entry in backbones.values():
        rows.append([*(entry.say(name) for name in heads[:6]), entry.address, entry.results])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def details(entry: Backbone) -> str:
    """Returns all that is known of a backbone, a line each; (?) marks what could not be verified."""
    lines: dict[str, Any] = {f.name: entry.say(f.name) for f in fields(Backbone)}
    lines |= {
        "where": entry.address,
        "reported": entry.results,
        "layout": f"{entry.say('layout')}: {LAYOUTS[entry.layout]}",
    }
    lines["unverified"] = ", ".join(entry.unverified) or "nothing"
    return "\n".join(f"{name:12} {value}" for name, value in lines.items() if value)
