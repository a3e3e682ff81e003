"""The clean-robust front of an adapter over its strength, and which strength is chosen on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..attacks import ThreatModel
from ..utils.files import read_json, write_json
from ..utils.markup import Markdown, escape, table_row
from .accuracy import Accuracy, FigureError, harmonic_mean, readable

STRENGTH = "strength.json"  # in an adapter's folder
_KIND = "strength front"


@dataclass(frozen=True)
class StrengthPoint:
    """Clean and robust accuracy of a classifier at one strength of its adapter.

    Attributes:
        strength: How much of the adapter acts, 0 to 1.
        clean: Accuracy without an attack.
        robust: Accuracy in the worst case over the attacks, of the same images.
    """

    strength: float
    clean: Accuracy
    robust: Accuracy

    def __post_init__(self) -> None:
        self.robust.check_at_most(self.clean, f"has, at strength {self.strength:g}, robust and clean accuracy of")

    @property
    def h(self) -> float:
        """H, the harmonic mean of clean and robust accuracy, in [0, 1]."""
        return float(harmonic_mean(self.clean.value, self.robust.value))

    def to_dict(self) -> dict[str, Any]:
        """Returns the point, for results."""
        return {
            "strength": self.strength,
            "clean": self.clean.to_dict(),
            "robust": self.robust.to_dict(),
            "H": self.h,
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> StrengthPoint:
        """Reads what `to_dict` returned."""
        point = cls(float(row["strength"]), *(Accuracy.from_dict(row[kind]) for kind in ("clean", "robust")))
        if abs(point.h - row["H"]) > 1e-6:
            raise FigureError(f"says H = {row['H']!r} at strength {point.strength:g}, and it is {point.h:.6g}.")
        return point


@dataclass(frozen=True)
class StrengthFront:
    """Clean against robust accuracy of one classifier over strengths of its adapter, on the same images.

    Attributes:
        points: A point for each strength, in increasing order; the first one is of strength 0, the base model.
        configuration: All that the figures depend on but the strength, as in an `Evaluation`; the adapter's fingerprint is the
            one of strength 1.
        machine: What they were computed on.
        keep_clean: The rule by which `chosen` chooses, see `choose`; None is the best H.

    Raises:
        ValueError: Points in another order, without strength 0, or of different numbers of images.
    """

    points: tuple[StrengthPoint, ...]
    configuration: dict[str, Any]
    machine: str
    keep_clean: float | None = None

    def __post_init__(self) -> None:
        strengths = [point.strength for point in self.points]
        if strengths != sorted(set(strengths)) or not strengths or strengths[0] != 0 or strengths[-1] > 1:
            raise FigureError(f"has the strengths {strengths[:10]}; they must increase from 0 and not exceed 1.")
        if len({point.clean.n for point in self.points}) > 1:
            raise FigureError("has points of different numbers of images.")
        check_keep_clean(self.keep_clean)

    @property
    def base(self) -> StrengthPoint:
        """The point of strength 0: the base model."""
        return self.points[0]

    @property
    def chosen(self) -> StrengthPoint:
        """The point that `choose` picks by the front's own rule, `keep_clean`."""
        return self.choose(self.keep_clean)

    def choose(self, keep_clean: float | None = None) -> StrengthPoint:
        """Returns the point to use; the base model is one of them.

        Args:
            keep_clean: None: the point of the best H, which is never below that of the base model. A share k in (0, 1]: the point
                of the best robust accuracy among those whose clean accuracy is at least k times that of the base model.

        Returns:
            The point; of equal ones the one of the smallest strength, which is nearest to the base model.

        Raises:
            ValueError: `keep_clean` out of range.
        """
        check_keep_clean(keep_clean)
        if keep_clean is None:
            return max(self.points, key=lambda point: (round(point.h, 12), -point.strength))
        least = Fraction(str(keep_clean)) * self.base.clean.correct  # exact: 0.99 is 99/100
        kept = [point for point in self.points if point.clean.correct >= least]
        return max(kept, key=lambda point: (point.robust.correct, -point.strength))

    def with_rule(self, keep_clean: float | None) -> StrengthFront:
        """Returns this front with another rule for `chosen`."""
        return replace(self, keep_clean=keep_clean)

    @property
    def rule(self) -> str:
        """The rule of `chosen`, in words."""
        if self.keep_clean is None:
            return "best harmonic mean H of clean and robust accuracy"
        return f"best robust accuracy that keeps {100 * self.keep_clean:g}% of the base model's clean accuracy"

    @property
    def attack(self) -> str:
        """Names of the attacks and their threat model, such as "pgd-20, L-inf 4/255"."""
        attacks = self.configuration["attacks"]
        return f"{' and '.join(str(each['name']) for each in attacks)}, {ThreatModel(**attacks[0]['threat_model'])}"

    @property
    def images(self) -> str:
        """The number of images and, where the configuration says it, their split and task."""
        task = self.configuration.get("task")
        known = task if isinstance(task, Mapping) else {}
        split = f" of the {known['split']} split" if known.get("split") else ""
        return f"{self.base.clean.n} images{split}" + (f" of {known['name']}" if known.get("name") else "")

    @property
    def fingerprint(self) -> str:
        """The fingerprint that the adapter has at strength 1."""
        return str(self.configuration["model"]["adapter"]["fingerprint"])

    def table(self) -> str:
        """Returns a Markdown table of the points, the chosen one in bold."""
        lines = [table_row(["strength", "clean, %", f"robust ({self.attack}), %", "H, %"]), "|---|---|---|---|"]
        for point in self.points:
            cells = [f"{point.strength:g}", point.clean.percent, point.robust.percent, f"{100 * point.h:.1f}"]
            bold = point == self.chosen
            lines.append(table_row([Markdown(f"**{cell}**") if bold else cell for cell in cells]))
        caption = f"n = {escape(self.images)}; in brackets the 95% interval. In bold: {self.rule}."
        return Markdown("\n".join([*lines, "", caption]))

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, in JSON types."""
        return {
            "kind": _KIND,
            "chosen": self.chosen.strength,
            "rule": self.rule,
            "keep_clean": self.keep_clean,
            "points": [point.to_dict() for point in self.points],
            "configuration": self.configuration,
            "machine": self.machine,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> StrengthFront:
        """Reads what `to_dict` returned.

        Raises:
            ValueError: A figure cannot be true. What has another shape raises a KeyError, TypeError or AttributeError.
        """
        front = cls(
            tuple(map(StrengthPoint.from_dict, content["points"])),
            dict(content["configuration"]),
            str(content["machine"]),
            content["keep_clean"],
        )
        if front.chosen.strength != content["chosen"]:
            raise FigureError(f"says strength {content['chosen']!r}, but its rule chooses {front.chosen.strength:g}.")
        _ = front.attack, front.images, front.fingerprint  # or it raises
        return front

    def save(self, path: str | Path) -> None:
        """Writes the front to a JSON file, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> StrengthFront:
        """Reads what `save` wrote.

        Args:
            path: The file, or the folder of an adapter with a `strength.json`.

        Raises:
            DamagedFileError: It holds something else, or a figure that cannot be true.
            FileNotFoundError: The file is missing.
        """
        path = Path(path, STRENGTH) if Path(path).is_dir() else Path(path)
        with readable(path):
            content = read_json(path)
            if content.get("kind") != _KIND:
                raise FigureError("does not hold a front over strengths.")
            return cls.from_dict(content)


def check_keep_clean(keep_clean: float | None) -> None:
    """Raises a ValueError unless this is a share of clean accuracy that can be asked for."""
    if keep_clean is not None and not 0 < keep_clean <= 1:  # NaN fails too
        raise ValueError(
            f"keep_clean={keep_clean} must be above 0 and at most 1, such as 0.99: the share of the base model's clean accuracy "
            "to keep. Leave it out for the best harmonic mean."
        )
