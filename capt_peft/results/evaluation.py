"""The result of an evaluation: numbers, tables and files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..attacks import Protocol, ThreatModel, known_protocols
from ..attacks.protocols import AUTOATTACK
from ..utils.files import DamagedFileError, read_json, write_json
from ..utils.markup import escape
from .accuracy import Accuracy, FigureError, by_threat, known_fields, readable, rows_by_threat
from .corrupted import CorruptedAccuracy
from .defence import WithoutDefence, defended_rows, on_defence
from .examples import check_counts, examples_path, read_examples, write_examples, wrong_under
from .kept import KeptImages, images_path
from .rejection import Rejection
from .reliability import BINS, Reliability

EVALUATION = "evaluation.json"  # in an adapter's folder
SUFFIXES = (".json", ".parquet", ".safetensors")  # of the figures, the examples and the worst-case images
ROBUST, TRANSFER = "robust", "transfer"


@dataclass(frozen=True)
class Sign:
    """One sign of masked gradients.

    Attributes:
        name: Which sign.
        raised: Whether the evaluation shows it; None where it was not checked.
        value: What was measured; None where it was not.
        threshold: The value above which the sign is raised.
        sentence: What it means, for people.
    """

    name: str
    raised: bool | None
    value: float | None
    threshold: float | None
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the sign, for results."""
        return asdict(self)


@dataclass(frozen=True)
class AttackOutcome:
    """What became of the images under one attack.

    Attributes:
        attack: The attack's settings.
        accuracy: The share of images that are right before and after it.
        kind: "robust" for a white-box attack on what is measured, "transfer" for any other.
        broken: Images whose right answer it turned.
        forwards: Images that the attack ran the model on.
        gradients: Those of them with a gradient.
        parts: For an ensemble, how many images each attack was given and broke.
        notes: What had to be changed for the model.
        zero_gradient_share: Mean share of exactly zero pixel gradients at the first step; None without gradients.
        reliability: How far the scores of all images, after the attack, are from accuracy; None in older results.
    """

    attack: dict[str, Any]
    accuracy: Accuracy
    kind: str
    broken: int
    forwards: int
    gradients: int
    parts: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    zero_gradient_share: float | None = None
    reliability: Reliability | None = None

    @property
    def name(self) -> str:
        """The attack's name."""
        return str(self.attack["name"])

    @property
    def way(self) -> str:
        """The way to a defended classifier, such as "unrolled" (`defences.WAYS`); "" without a defence."""
        return str(self.attack.get("way", ""))

    @property
    def counts(self) -> bool:
        """Whether the worst case is taken over it: a white-box attack, or any way to a defended classifier."""
        return self.kind == ROBUST or bool(self.way)

    @property
    def threat_model(self) -> ThreatModel:
        """The ball that the attack stayed in."""
        return ThreatModel(**self.attack["threat_model"])

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, for results."""
        own = (each.name for each in fields(self) if each.name not in ("accuracy", "reliability"))
        row = {name: getattr(self, name) for name in own}
        row |= {"parts": list(self.parts), "notes": list(self.notes), **_given(reliability=self.reliability)}
        return {**row, **self.accuracy.to_dict()}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> AttackOutcome:
        """Reads what `to_dict` returned."""
        values = {each.name: row[each.name] for each in fields(cls) if each.name not in ("accuracy", "reliability")}
        values |= {
            "reliability": _read(Reliability, row.get("reliability")),
            "accuracy": Accuracy.from_dict(row),
            "parts": tuple(row["parts"]),
            "notes": tuple(row["notes"]),
        }
        outcome = cls(**values)
        _ = outcome.name, outcome.threat_model  # or it raises
        return outcome


@dataclass(frozen=True)
class Evaluation:
    """Clean accuracy, the accuracy under each attack, and the worst case over attacks, on the same images.

    An image counts as robust if the classifier is right on it and on its adversarial example, so that robust never exceeds clean.

    Attributes:
        clean: Accuracy without an attack.
        attacks: One outcome per attack, in the order they were given.
        worst_case: For each threat model, the share of images that no white-box attack broke; of a defended classifier, that no
            attack broke, by whatever way.
        signs: Signs of masked gradients; empty where they were not looked for.
        configuration: All that the figures depend on.
        machine: What they were computed on.
        examples: One row per image and attack: index, label, clean_prediction, attack, threat_model, prediction, broken,
            broken_by, perturbation (its length in the threat model's norm), score (of the prediction; null in older results and
            of random answers), decided (of a random defence, which decisions are right, as bits; else null) and undefended (the
            prediction without the defence on images made without it; else null); None where they were not kept beside the
            figures.
        reliability: How far the scores without an attack are from accuracy; None in older results.
        rejection: What the answer "none of these" does; None where it was not measured.
        images: Which file beside the figures has the worst-case images; None where they were not kept.
        corruptions: Accuracy under common corruptions, which are no adversary; None where it was not measured.
        union: The share of images that no white-box attack of any threat model broke; None where these have one norm.
        undefended: What the classifier does without its defence; None if it has none.
    """

    clean: Accuracy
    attacks: tuple[AttackOutcome, ...]
    worst_case: dict[ThreatModel, Accuracy]
    signs: tuple[Sign, ...]
    configuration: dict[str, Any]
    machine: str
    examples: pa.Table = field(default=None, compare=False, repr=False)
    reliability: Reliability | None = None
    rejection: Rejection | None = None
    images: KeptImages | None = None
    union: Accuracy | None = None
    corruptions: CorruptedAccuracy | None = None
    undefended: WithoutDefence | None = None

    @property
    def robust(self) -> Accuracy:
        """The worst case over attacks, where there is one threat model.

        Raises:
            ValueError: There is none, or several: `worst_case` has them all.
        """
        if len(self.worst_case) != 1:
            raise ValueError(
                f"There are {len(self.worst_case)} threat models with white-box attacks; look into `worst_case` and `union`."
            )
        return next(iter(self.worst_case.values()))

    def white_box(self, threat: ThreatModel | None = None) -> list[AttackOutcome]:
        """Returns the outcomes of white-box attacks, of all threat models or of one."""
        return [o for o in self.attacks if o.kind == ROBUST and threat in (None, o.threat_model)]

    @property
    def threats(self) -> str:
        """The threat models with white-box attacks, as in "L-inf 4/255, L2 0.5"."""
        return ", ".join(map(str, self.worst_case))

    @property
    def protocol(self) -> Protocol | None:
        """The published protocol that the evaluation is by; None for none, or for one that this version does not know."""
        return known_protocols().get(str(self.configuration.get("protocol")))

    def by_protocol(self, threat: ThreatModel) -> Accuracy | None:
        """Returns the robust accuracy by the published protocol: the share of images that none of its attacks broke.

        Attacks that were run beside the protocol's do not count. None without a protocol, where one of its attacks is missing,
        and, for several of them with others beside, without examples.
        """
        if self.protocol is None:
            return None
        try:
            wanted = [attack.to_dict() for attack in self.protocol.attacks_at(threat.epsilon)]
        except ValueError:  # a radius that is not the protocol's
            return None
        white_box = self.white_box(threat)
        outcomes = [outcome for outcome in white_box if outcome.attack in wanted]
        if len(outcomes) < len(wanted):
            return None
        if len(outcomes) == 1:
            return outcomes[0].accuracy
        if len(outcomes) == len(white_box):
            return self.worst_case[threat]
        if self.examples is None:
            return None
        return Accuracy(self.clean.n - len(wrong_under(self.examples, outcomes)), self.clean.n)

    def gap_to_autoattack(self, threat: ThreatModel) -> float | None:
        """Returns how many points the protocol's robust accuracy is above AutoAttack's, on the same images; None without both."""
        figure = self.by_protocol(threat)
        found = [outcome.accuracy for outcome in self.white_box(threat) if outcome.name == AUTOATTACK]
        return None if figure is None or not found else 100 * (figure.value - found[0].value)

    def on_protocol(self) -> str:
        """Returns a sentence on the published protocol and its gap to AutoAttack, as Markdown; "" without one."""
        if self.protocol is None:
            name = self.configuration.get("protocol")
            return f"Measured by the protocol {escape(name)}, which this version does not know." if name else ""
        said = []
        for threat in dict.fromkeys(outcome.threat_model for outcome in self.white_box()):
            if (figure := self.by_protocol(threat)) is not None:
                gap = self.gap_to_autoattack(threat)
                beside = "" if gap is None else f", gap to AutoAttack {gap:.1f} points"
                said.append(f"{threat}: {100 * figure.value:.1f}% robust{beside}")
        named = f"Measured by the protocol {self.protocol.name} ({escape(self.protocol.title)}; {escape(self.protocol.paper)})"
        return f"{named}. {'; '.join(said)}." if said else f"{named}."

    def of_worst_case(self, threat: ThreatModel) -> list[AttackOutcome]:
        """Returns the outcomes that the worst case of a threat model is taken over."""
        return [o for o in self.attacks if threat == o.threat_model and o.counts]

    def table(self) -> str:
        """Returns a Markdown table: which accuracy, under which attack, with the 95% interval, and of which images."""
        if self.undefended is not None:
            return "\n".join([*defended_rows(self), "", self._counted_on()])
        lines = ["| accuracy | threat model | attack | % (95% interval) |", "|---|---|---|---|"]
        lines.append(f"| clean | | | {self.clean.percent} |")
        for outcome in self.attacks:
            kind = outcome.kind if outcome.kind == ROBUST else "under a transferred attack"
            lines.append(f"| {kind} | {outcome.threat_model} | {escape(outcome.name)} | {outcome.accuracy.percent} |")
        for threat, accuracy in self.worst_case.items():
            if len(self.white_box(threat)) > 1:
                lines.append(f"| **robust** | {threat} | worst case | **{accuracy.percent}** |")
        if self.union is not None:
            lines.append(f"| **robust** | {self.threats} | union | **{self.union.percent}** |")
        lines += ["", self._counted_on()]
        below = [] if self.corruptions is None else [self.corruptions.text()]
        texts = [*filter(None, [self.on_protocol()]), *self.on_scores(), *below]
        return "\n".join([*lines, *(line for text in texts for line in ("", text))])

    def _counted_on(self) -> str:
        task = self.configuration.get("task")
        known = task if isinstance(task, Mapping) else {}
        split = f" of the {escape(known['split'])} split" if known.get("split") else ""
        name = f" of {escape(known['name'])}" if known.get("name") else ""
        return f"n = {self.clean.n} images{split}{name}. {on_defence(self)}".rstrip()

    def on_scores(self) -> list[str]:
        """Returns what is known of the scores, as Markdown: how reliable they are, and what the answer "none of these" does."""
        return [text for text in (self._on_reliability(), self._on_rejection()) if text]

    def _on_reliability(self) -> str:
        """Returns a sentence on the expected calibration error, clean and under each attack; "" without one."""
        if self.reliability is None:
            return ""
        temperature = self.configuration.get("temperature")
        at = "the model's own temperature" if temperature is None else f"the adapter's temperature, {temperature:.4g}"
        found = [f"{100 * self.reliability.ece:.1f}% clean"]
        for outcome in self.attacks:
            if outcome.reliability is not None:
                under = f"{escape(outcome.name)}, {outcome.threat_model}"
                found.append(f"{100 * outcome.reliability.ece:.1f}% under {under}")
        return f"Expected calibration error ({BINS} bins, scores at {at}): {'; '.join(found)}."

    def _on_rejection(self) -> str:
        """Returns a table of what the answer "none of these" does, with a sentence on its rows; "" without one."""
        if self.rejection is None:
            return ""
        n, m = self.rejection.outcomes[0].right.n, self.rejection.outcomes[0].accepted.n
        known = self.configuration.get("out_of_class")
        name = f" ({escape(known['name'])})" if isinstance(known, Mapping) and known.get("name") else ""
        return (
            f'With "none of these" below a largest logit of {self.rejection.threshold:.4g}. Attacks try to get the {n} images of '
            f"the classes accepted as a wrong class, and the {m} images of no class{name} accepted as any class.\n\n"
            f"{self.rejection.table()}\n\n"
            "These attacks are others than those on accuracy: on class and score. A rejected image is not right. "
            "AUROC: 1 is best, 0.5 is chance; risk area: 0 is best."
        )

    def has_images(self, path: Path) -> bool:
        """Tells whether its worst-case images, and no others, lie beside its figures."""
        file = images_path(path)
        return self.images is not None and file.is_file() and KeptImages.of(file) == self.images

    def warnings(self) -> list[str]:
        """Returns the sentences of the signs that are raised."""
        return [sign.sentence for sign in self.signs if sign.raised]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the examples, in JSON types."""
        return {
            "kind": "evaluation",
            "clean": self.clean.to_dict(),
            "attacks": [outcome.to_dict() for outcome in self.attacks],
            "worst_case": rows_by_threat(self.worst_case),
            "signs": [sign.to_dict() for sign in self.signs],
            "configuration": self.configuration,
            "machine": self.machine,
            **_given(
                reliability=self.reliability,
                rejection=self.rejection,
                images=self.images,
                union=self.union,
                corruptions=self.corruptions,
                undefended=self.undefended,
            ),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], examples: pa.Table = None) -> Evaluation:
        """Reads what `to_dict` returned.

        Raises:
            ValueError: A figure cannot be true. What has another shape raises a KeyError, TypeError or AttributeError.
        """
        evaluation = cls(
            clean=Accuracy.from_dict(content["clean"]),
            attacks=tuple(map(AttackOutcome.from_dict, content["attacks"])),
            worst_case=by_threat(content["worst_case"]),
            signs=tuple(known_fields(Sign, sign) for sign in content["signs"]),
            configuration=dict(content["configuration"]),
            machine=str(content.get("machine", "unknown")),
            examples=examples,
            reliability=_read(Reliability, content.get("reliability")),
            rejection=_read(Rejection, content.get("rejection")),
            images=_read(KeptImages, content.get("images")),
            union=_read(Accuracy, content.get("union")),
            corruptions=_read(CorruptedAccuracy, content.get("corruptions")),
            undefended=_read(WithoutDefence, content.get("undefended")),
        )
        evaluation._check()
        return evaluation

    def save(self, path: str | Path) -> None:
        """Writes the figures to a JSON file and the examples to a parquet file beside it, each whole or not at all."""
        write_examples(examples_path(Path(path)), self.examples, self.clean.correct)
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path, *, with_examples: bool = True) -> Evaluation:
        """Reads what `save` wrote, and counts again what the examples show.

        Args:
            path: The JSON file, or the folder of an adapter with an `evaluation.json`.
            with_examples: False: the file may stand alone, as on the Hub; examples that are there count all the same.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file holds something else, is damaged, or its figures are not those of the examples (the last two are
                a `DamagedFileError`).
        """
        path = Path(path, EVALUATION) if Path(path).is_dir() else Path(path)
        content = read_json(path)
        if content.get("kind") != "evaluation":
            raise ValueError(f"{path} does not hold an evaluation.")
        if not with_examples and not examples_path(path).is_file():
            with readable(path):
                return cls.from_dict(content)
        try:
            examples, clean = read_examples(examples_path(path))
            evaluation = cls.from_dict(content, examples)
            check_counts(evaluation, clean)
        except (KeyError, TypeError, ValueError, AttributeError, OSError, pa.ArrowException) as error:
            raise DamagedFileError(
                f"{path}, or the examples in {examples_path(path).name} beside it, are damaged ({str(error)[:200]})."
            ) from error
        return evaluation

    def _check(self) -> None:
        """Raises a FigureError if figures contradict each other, or are of other images."""
        for outcome in self.attacks:
            outcome.accuracy.check_at_most(self.clean, f"has {outcome.name} and clean accuracy of")
        if self.worst_case.keys() != {outcome.threat_model for outcome in self.attacks if outcome.counts}:
            raise FigureError("has worst cases under other threat models than those of its attacks.")
        for threat, worst in self.worst_case.items():
            for outcome in self.of_worst_case(threat):
                worst.check_at_most(outcome.accuracy, f"has a worst case and {outcome.name} of")
        self._check_union()
        _check_reliability(self.reliability, self.clean)
        for outcome in self.attacks:
            _check_reliability(outcome.reliability, outcome.accuracy)
        beside = [] if self.corruptions is None else [*self.corruptions.accuracies.values()]
        beside += [] if self.undefended is None else [self.undefended.clean]
        if any(accuracy.n != self.clean.n for accuracy in beside):
            raise FigureError(
                "has accuracies under corruptions, or without the defence, of other images than clean accuracy."
            )

    def _check_union(self) -> None:
        """Raises a FigureError unless the union is at most every worst case, and no less than their losses together leave."""
        if self.union is None:
            return
        if not has_union(self.worst_case):
            raise FigureError("has a union of threat models, but not two norms with white-box attacks.")
        for worst in self.worst_case.values():
            self.union.check_at_most(worst, "has a union of threat models and a worst case of")
        lost = sum(self.clean.correct - worst.correct for worst in self.worst_case.values())
        if self.union.decisions == 1 and self.union.correct < self.clean.correct - lost:
            raise FigureError(
                f"says that a union of threat models leaves {self.union.correct} of {self.clean.correct} images, but their worst "
                f"cases break no more than {lost}."
            )


def has_union(threats: Iterable[ThreatModel]) -> bool:
    """Returns whether threat models have more than one norm, so that no ball of them is in another."""
    return len({threat.norm for threat in threats}) > 1


def _check_reliability(reliability: Reliability | None, accuracy: Accuracy) -> None:
    """Raises a FigureError unless the bins of scores are of as many images, and as many right ones, as an accuracy."""
    if reliability is not None and (reliability.n, sum(reliability.right)) != (accuracy.n, accuracy.correct):
        raise FigureError(
            f"has {reliability.n} scores, {sum(reliability.right)} of right answers, and an accuracy of {accuracy.correct} of "
            f"{accuracy.n} images."
        )


def _given(**records: Any) -> dict[str, Any]:
    """Returns records in JSON types, without those that are None: older results have none."""
    return {name: record.to_dict() for name, record in records.items() if record is not None}


def _read(kind: Any, content: Any) -> Any:
    return None if content is None else kind.from_dict(content)
