"""The result of image-text retrieval: Recall@k in both directions, without an attack and under each, as tables and files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..attacks import ThreatModel
from ..utils.files import DamagedFileError, read_json, write_json
from ..utils.markup import Markdown, table_row
from .accuracy import FigureError, readable, wilson_interval

CLEAN, WORST = "clean", "worst case"  # names of rows beside those of attacks
DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Recall:
    """The share of queries that find what belongs to them among the first k, with its 95% Wilson interval.

    Captions of one image are not independent queries, so that the interval counts images, each of them as one trial.

    Args:
        k: How many answers are looked at, at least 1.
        found: Queries that find something of their own.
        queries: Queries: images, or captions.
        images: Images that the queries belong to.

    Raises:
        ValueError: Numbers out of range.
    """

    k: int
    found: int
    queries: int
    images: int

    def __post_init__(self) -> None:
        if not (self.k >= 1 and 0 <= self.found <= self.queries and 1 <= self.images <= self.queries):
            raise ValueError(
                f"{self.found} of {self.queries} queries of {self.images} images at k={self.k} are not a recall: k must be at "
                "least 1, and no count larger than the number of queries."
            )

    @property
    def value(self) -> float:
        """The recall, in [0, 1]."""
        return self.found / self.queries

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson score interval, in [0, 1]."""
        return wilson_interval(self.images * self.found / self.queries, self.images)

    @property
    def percent(self) -> str:
        """The recall and its interval in percent: "30.8 (25.5 to 36.6)"."""
        share, low, high = (f"{100 * value:.1f}" for value in (self.value, *self.interval))
        return f"{share} ({low} to {high})"

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers, for results."""
        return {"recall": self.value, **vars(self), "interval_95": list(self.interval)}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Recall:
        """Reads what `to_dict` returned; a FigureError if the numbers are not those of one share."""
        recall = cls(**{name: int(row[name]) for name in ("k", "found", "queries", "images")})
        told, true = (row["recall"], *row["interval_95"]), (recall.value, *recall.interval)
        if len(told) != 3 or any(abs(a - b) > _ROUNDING for a, b in zip(told, true, strict=True)):
            raise FigureError(f"says that {recall.found} of {recall.queries} are {told}; they must agree.")
        return recall


class RetrievalRow(NamedTuple):
    """Recall@k without an attack, under one, or in the worst case over those of a threat model.

    Attributes:
        name: "clean", the name of an attack, or "worst case".
        threat_model: The ball of the attack; None without one.
        image_to_text: Recall at each k of images that look for their captions.
        text_to_image: The same of captions that look for their image.
        cosine: Mean cosine of an attacked image's feature and its clean one; None where none was attacked.
        attack: The settings of the attack; None where the row is not of one.
    """

    name: str
    threat_model: ThreatModel | None
    image_to_text: tuple[Recall, ...]
    text_to_image: tuple[Recall, ...]
    cosine: float | None = None
    attack: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the row in JSON types."""
        threat = None if self.threat_model is None else self.threat_model.to_dict()
        recalls = {name: [recall.to_dict() for recall in getattr(self, name)] for name in DIRECTIONS}
        return {**self._asdict(), "threat_model": threat, **recalls}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> RetrievalRow:
        """Reads what `to_dict` returned."""
        recalls = {name: tuple(map(Recall.from_dict, row[name])) for name in DIRECTIONS}
        threat = row["threat_model"]
        return cls(**{**row, "threat_model": None if threat is None else ThreatModel(**threat), **recalls})


@dataclass(frozen=True)
class Retrieval:
    """Recall@k of image-text retrieval, clean and under attacks, on the same images and captions.

    A query counts as found under an attack only if it is found without it too: the adversary may leave an image as it is.

    Attributes:
        rows: Clean first, then one per attack in the order they were given, then the worst case of each threat model.
        configuration: All that the figures depend on.
        machine: What they were computed on.
    """

    rows: tuple[RetrievalRow, ...]
    configuration: dict[str, Any]
    machine: str

    def __post_init__(self) -> None:
        clean = self.clean
        for row, direction in ((row, direction) for row in self.rows for direction in DIRECTIONS):
            for recall, before in zip(getattr(row, direction), getattr(clean, direction), strict=True):
                if (recall.k, recall.queries) != (before.k, before.queries) or recall.found > before.found:
                    raise FigureError(
                        f"has {recall.found} of {recall.queries} found at k={recall.k} under {row.name}, and {before.found} of "
                        f"{before.queries} at k={before.k} without an attack; the first cannot be more."
                    )

    @property
    def clean(self) -> RetrievalRow:
        """The row without an attack."""
        return self.rows[0]

    @property
    def worst_case(self) -> dict[ThreatModel, RetrievalRow]:
        """The worst case over the attacks of each threat model; that of one attack alone is its own row."""
        return {row.threat_model: row for row in self.rows if row.threat_model is not None}

    def table(self) -> str:
        """Returns a Markdown table of all rows; see `retrieval_table`."""
        return retrieval_table({"": self})

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, in JSON types."""
        rows = [row.to_dict() for row in self.rows]
        return {"kind": "retrieval", "rows": rows, "configuration": self.configuration, "machine": self.machine}

    def save(self, path: str | Path) -> None:
        """Writes everything to a JSON file, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Retrieval:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: The file is missing.
            ValueError: It holds something else, is damaged, or its figures cannot be true.
        """
        content = read_json(Path(path))
        if content.get("kind") != "retrieval":
            raise DamagedFileError(f"{path} does not hold a retrieval.")
        with readable(path):
            rows = tuple(map(RetrievalRow.from_dict, content["rows"]))
            return cls(rows, dict(content["configuration"]), str(content["machine"]))


def retrieval_table(results: Mapping[str, Retrieval]) -> str:
    """Returns a Markdown table of several models beside each other: each direction and attack, and Recall@k in percent.

    Args:
        results: By the names of the models; with one name alone, "" leaves out their column.

    Raises:
        ValueError: They were measured at different k.
    """
    levels = {tuple(recall.k for recall in result.clean.image_to_text) for result in results.values()}
    if len(levels) != 1:
        raise ValueError(f"The results have Recall@k at different k: {sorted(levels)}. Measure all at the same.")
    (ks,) = levels
    named = [*results] != [""]
    head = [
        "direction",
        "threat model",
        "attack",
        *(["model"] if named else []),
        *(Markdown(f"R@{k} (95% interval)") for k in ks),
    ]
    lines = [
        table_row(head),
        table_row([Markdown("---")] * len(head)),
        *(table_row(row) for row in _rows(results, named)),
    ]
    first = next(iter(results.values())).clean
    counts = f"{first.image_to_text[0].queries} images, {first.text_to_image[0].queries} captions; percent."
    return "\n".join([*lines, "", counts])


def _rows(results: Mapping[str, Retrieval], named: bool) -> Iterator[list[str]]:
    keys = dict.fromkeys((row.name, row.threat_model) for result in results.values() for row in result.rows)
    for direction, words in DIRECTIONS.items():
        for (name, threat), (model, result) in product(keys, results.items()):
            for row in (row for row in result.rows if (row.name, row.threat_model) == (name, threat)):
                shares = [recall.percent for recall in getattr(row, direction)]
                yield [words, "" if threat is None else str(threat), name, *([model] if named else []), *shares]
