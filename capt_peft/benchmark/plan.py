"""Cells: one method on one data set with one number of shots and one seed, and what it is measured on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from typing import Any

from ..attacks import Attack, Protocol, ThreatModel, get_protocol, known_protocols, parse_attack, parse_fraction
from ..attacks.pgd import with_step_size
from ..data.task import SPLITS
from ..defences import parse_defence
from ..methods import METHODS, PROMPT_FIELDS, conflicts, method_name, method_settings
from ..randomness import check_seed
from ..training import CaptTrainingArguments
from ..tuner import CaptConfig
from .suites import Suite

logger = logging.getLogger(__name__)

PROTOCOLS = ("few-shot", "base-to-new", "cross-dataset", "shift")
TRANSFERS = ("cross-dataset", "shift")  # tuned on the suite's source, measured on it and on other test sets
ZERO_SHOT = "zero-shot"
QUICK_LIMIT = 20  # test images of a data set, in a run that only shows that everything works
Shots = int | str  # training images per class, or "all"


@dataclass(frozen=True)
class Target:
    """What an adapter is measured on: a data set, all its classes or a half of them."""

    task: str
    classes: str = "all"


@dataclass(frozen=True)
class Cell:
    """One run of a benchmark. It holds all that its figures depend on, but the versions of packages.

    Args:
        suite: Name of the suite.
        protocol: One of `PROTOCOLS`.
        method: Name of the method.
        variant: Name of the variant of its settings; "" for none.
        task: The data set that it is tuned on.
        shots: Training images per class, "all", or 0 for zero-shot.
        seed: Seed of the images drawn, of the prompts and of all attacks.
        split: Split that is measured.
        model: Folder or Hub id of the CLIP.
        epsilon: Radius of the threat model, as a fraction of the [0, 1] range.
        norm: Its norm.
        attacks: Names of the attacks that measure robust accuracy.
        eval_step_size: Step size of PGD among them; None: see `PGD`.
        limit: Images of a split that are measured, drawn by seed 0; None: all.
        targets: What is measured.
        settings: Other fields of `CaptTrainingArguments`, and `teacher`.
        defence: Name of the defence in front of the classifier when it is measured; "" for none.
        prompts: Fields of `CaptConfig`; with a `template`, it is the text of all tuned methods on all data sets, as in the
            published protocols; without, each data set has its own.
        evaluation_protocol: The published protocol that it is measured by (`capt_peft.attacks.known_protocols`), which also
            says how many images and, of zero-shot, which text; None: none.
    """

    suite: str
    protocol: str
    method: str
    variant: str
    task: str
    shots: Shots
    seed: int
    split: str
    model: str
    epsilon: str
    norm: str
    attacks: tuple[str, ...]
    eval_step_size: str | None
    limit: int | None
    targets: tuple[Target, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, Any] = field(default_factory=dict)
    evaluation_protocol: str | None = None
    defence: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, in JSON types; without those of `_LATER` that are as before they were there."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in content.items() if name not in _LATER or value != _LATER[name]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Cell:
        """Reads what `to_dict` returned, also of versions that had fewer fields.

        Raises:
            KeyError, TypeError: Something else is missing.
            ValueError: An unknown protocol, or a number of shots that cannot be.
        """
        if content["protocol"] not in PROTOCOLS:
            raise ValueError(f"the protocol is {content['protocol']!r}")
        if content["shots"] != "all" and not isinstance(content["shots"], int):
            raise ValueError(f"the number of shots is {content['shots']!r}")
        values = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        attacks, targets = content["attacks"] or (), content.get("targets") or ()
        values |= {"attacks": tuple(attacks), "targets": tuple(Target(**target) for target in targets)}
        return cls(**{"variant": "", "eval_step_size": None, "limit": None, **values})

    @property
    def key(self) -> str:
        """Identifies the cell: 12 hexadecimal digits of a hash of all fields."""
        return _hash(self.to_dict())

    @property
    def training_key(self) -> str:
        """Identifies the adapter: cells that differ only in what is measured share one."""
        content = self.to_dict()
        measured = (
            "suite", "protocol", "variant", "split", "attacks", "eval_step_size", "limit", "targets", "evaluation_protocol",
            "defence",
        )  # fmt: skip
        return _hash({k: v for k, v in content.items() if k not in measured} | {"classes": self.train_classes})

    @property
    def train_classes(self) -> str:
        """The classes that it is tuned on: "all" or "base"."""
        return "base" if self.protocol == "base-to-new" else "all"

    def images_in(self, task: str) -> int | None:
        """Returns how many images of a data set are measured, drawn by seed 0; None: all."""
        if self.evaluation_protocol is None:
            return self.limit
        return get_protocol(self.evaluation_protocol).images_in(task)

    def parsed_attacks(self) -> list[Attack]:
        """Returns the attacks that measure it, PGD with its step size."""
        return [with_step_size(parse_attack(name, self.threat), self.eval_step_size) for name in self.attacks]

    @property
    def label(self) -> str:
        """The method, with the variant and the defence if it has them: "capt (short) + ttc"."""
        name = f"{self.method} ({self.variant})" if self.variant else self.method
        return f"{name} + {self.defence}" if self.defence else name

    @property
    def tuned(self) -> bool:
        """Whether it tunes an adapter; zero-shot stands for every number of shots and every seed."""
        return self.method != ZERO_SHOT

    @property
    def threat(self) -> ThreatModel:
        """The threat model of its attacks."""
        return ThreatModel(self.norm, self.epsilon)

    def __str__(self) -> str:
        shots = f", {shots_name(self.shots)}" if self.tuned else ""
        named = f", protocol {self.evaluation_protocol}" if self.evaluation_protocol else ""
        return f"{self.protocol}: {self.label} on {self.task}{shots}, seed {self.seed}{named}"


def shots_name(shots: Shots) -> str:
    """Returns "1 shot", "4 shots" or "all shots"."""
    return f"{shots} shot{'' if shots == 1 else 's'}"


@dataclass(frozen=True)
class Plan:
    """What to run.

    Args:
        suite: The data sets.
        model: Folder or Hub id of the CLIP.
        methods: Names of the methods.
        protocols: Of `PROTOCOLS`.
        shots: Numbers of shots of the protocol few-shot, or "all"; the others use `transfer_shots`.
        seeds: Seeds.
        tasks: A part of the suite's data sets; None: all.
        variants: Named settings that are tried in place of the method's own; {"": {}} is the method as it is.
        settings: Fields of `CaptTrainingArguments` and `CaptConfig` for all methods, on top of the suite's and its methods'. One
            that contradicts a method, or has no effect on it, is left out for this method if another method of the plan takes
            it, and refused otherwise.
        method_settings: The same for one method, on top of all these. As with variants, what contradicts the method is refused.
        attacks: Attacks in place of the suite's.
        limit: Images in place of the suite's; 0: all.
        split: Split that is measured; "validation" to choose settings.
        transfer_shots: Shots of base-to-new, cross-dataset and shift.
        evaluation_protocol: Name of a published protocol that is measured by: its attacks, step size, norm, epsilon and images
            in place of the suite's; what contradicts it is refused. The threat model is also that of the tuning. None: none.
        defences: Names of defences that each adapter is measured with; "" is none.
    """

    suite: Suite
    model: str
    methods: Sequence[str] = (ZERO_SHOT, *[name for name in METHODS if name != ZERO_SHOT])
    protocols: Sequence[str] = PROTOCOLS
    shots: Sequence[Shots] = (1, 4, 16, "all")
    seeds: Sequence[int] = (0, 1, 2)
    tasks: Sequence[str] | None = None
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    settings: Mapping[str, Any] = field(default_factory=dict)
    method_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    attacks: Sequence[str] | None = None
    limit: int | None = None
    split: str = "test"
    transfer_shots: Shots = 16
    evaluation_protocol: str | None = None
    defences: Sequence[str] = ("",)

    def __post_init__(self) -> None:
        for name in ("methods", "protocols", "shots", "seeds", "defences"):
            if not getattr(self, name):
                raise ValueError(f"There are no {name}, so that nothing would run.")
        for name, values, allowed in (
            ("protocols", self.protocols, PROTOCOLS),
            ("tasks", self.tasks or (), self.suite.tasks),
            ("splits", (self.split,), SPLITS),
        ):
            unknown = [value for value in values if value not in allowed]
            if unknown:
                of_papers = [value for value in unknown if name == "protocols" and value in known_protocols()]
                meant = "".join(
                    f" {each} is a published evaluation protocol: --protocol {each}." for each in of_papers[:1]
                )
                raise ValueError(f"Unknown {name} {', '.join(unknown)}. Allowed: {', '.join(allowed)}.{meant}")
        for shots in (*self.shots, self.transfer_shots):
            if shots != "all" and (not isinstance(shots, int) or shots < 1):
                raise ValueError(f"shots={shots!r} must be a whole number of at least 1, or 'all'.")
        for seed in self.seeds:
            check_seed(seed)
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"limit={self.limit} must be at least 1, or 0 for all images.")
        for attack in self.attacks or ():
            parse_attack(attack, ThreatModel("linf", "0"))  # or it would be refused when the first adapter is tuned
        for defence in filter(None, self.defences):
            parse_defence(defence)
        if self.evaluation_protocol is not None:
            self._check_protocol(get_protocol(self.evaluation_protocol))
            if any(self.defences):
                raise ValueError(
                    f"The protocol {self.evaluation_protocol} has attacks that know no defence: leave it out, or the defences."
                )

    def _check_protocol(self, named: Protocol) -> None:
        """Raises a ValueError where something that was asked for contradicts the published protocol."""
        lacking = named.lacking(self.attacks) if self.attacks else []
        wrong = f"attacks {', '.join(self.attacks or ())} (without {', '.join(lacking)})" if lacking else ""
        if self.limit is not None and (self.limit or None) != named.images:
            wrong = f"limit={self.limit}"
        if self.split != named.split:
            wrong = f"split={self.split}"
        for settings in (self.settings, *self.method_settings.values(), *self.variants.values()):
            found = {name: settings[name] for name in ("norm", "epsilon", "eval_step_size") if name in settings}
            wrong = next((f"{name}={found[name]}" for name in found if not _agrees(named, name, found)), wrong)
        if wrong:
            images = "all images" if named.images is None else f"{named.images:,} images"
            step = f", step size {named.step_size}" if named.step_size else ""
            raise ValueError(
                f"{wrong} contradicts the protocol {named.name}: {', '.join(named.attacks)}{step}, {named.norm}, epsilon "
                f"{' or '.join(named.epsilon)}, {images} of the {named.split} split. Leave one of the two out."
            )

    def cells(self) -> list[Cell]:
        """Returns the cells: all of the first seed, then of the second, so that what was cut short is whole for a seed.

        Raises:
            ValueError: Unknown settings, or settings that contradict a method or have no effect on it.
        """
        methods = [method_name(name) for name in self.methods]
        for method in methods:
            for why in self._unsuited(method).values():
                logger.info("%s The settings for all methods reach the others.", why)
        found: dict[str, Cell] = {}
        for seed, protocol, method in product(self.seeds, self.protocols, methods):
            shots: Sequence[Shots] = self.shots if protocol == "few-shot" else (self.transfer_shots,)
            if method == ZERO_SHOT:  # nothing is drawn and nothing is tuned: one seed, and no variants of tuning
                if seed != self.seeds[0]:
                    continue
                shots = (0,)
            for variant, changed in self.variants.items():
                name = "" if method == ZERO_SHOT else variant
                common = self._common(method, changed)
                for count, (task, targets), defence in product(shots, self._places(protocol), self.defences):
                    cell = Cell(
                        self.suite.name, protocol, method, name, task, count, seed, targets=targets, defence=defence, **common
                    )  # fmt: skip
                    found[cell.key] = cell
        return list(found.values())

    def _places(self, protocol: str) -> list[tuple[str, tuple[Target, ...]]]:
        """Returns what is tuned on under a protocol, each with what is measured."""
        tasks, source = tuple(self.tasks or self.suite.tasks), self.suite.source
        if protocol in TRANSFERS:
            others = tasks if protocol == "cross-dataset" else self.suite.shifts
            return [(source, (Target(source), *(Target(name) for name in others if name != source)))] if others else []
        if protocol == "base-to-new":
            whole = [name for name in tasks if name not in self.suite.few_classes]
            return [(name, (Target(name, "base"), Target(name, "new"))) for name in whole]
        return [(name, (Target(name),)) for name in tasks]

    def _unsuited(self, method: str) -> dict[str, str]:
        """Returns the settings for all methods that do not suit this one but another one of the plan, and why."""
        shared = {**self.suite.settings, **self.settings}
        others = [name for name in map(method_name, self.methods) if name not in (ZERO_SHOT, method)]
        return {
            setting: why
            for setting, why in conflicts(method, shared).items()
            if any(setting not in conflicts(other, shared) for other in others)
        }

    def _common(self, method: str, changed: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields that all cells of a method and a variant have in common."""
        unsuited, own = self._unsuited(method), {method_name(k): v for k, v in self.method_settings.items()}
        values = {
            **{name: value for name, value in self.suite.settings.items() if name not in unsuited},
            **self.suite.method_settings.get(method, {}),
            **{name: value for name, value in self.settings.items() if name not in unsuited},
            **own.get(method, {}),
            **changed,
        }
        # YAML reads 1e-3 as a word
        values |= {name: float(value) for name, value in values.items() if name in _FLOATS and isinstance(value, str)}
        attacks = self.attacks or self.suite.attacks
        limit = self.suite.limit if self.limit is None else self.limit or None
        if self.evaluation_protocol is not None:
            named = get_protocol(self.evaluation_protocol)
            asked = {**self.settings, **own.get(method, {}), **changed}  # the suite's own are not asked for
            epsilon = named.radius(asked.get("epsilon", named.epsilon[0]))
            values |= {"norm": named.norm, "epsilon": epsilon, "eval_step_size": named.step_size_at(epsilon)}
            attacks, limit = self.attacks or named.attacks, named.images
        if method != ZERO_SHOT:
            values = method_settings(method, values)
        common = {
            "split": self.split,
            "model": self.model,
            "epsilon": str(values.pop("epsilon", "4/255")),
            "norm": str(values.pop("norm", "linf")),
            "attacks": tuple(attacks),
            "eval_step_size": values.pop("eval_step_size", None),
            "limit": limit,
            "evaluation_protocol": self.evaluation_protocol,
        }
        unknown = sorted(values.keys() - _PROMPTS - _TRAINING)
        if unknown:
            raise ValueError(
                f"Unknown settings {', '.join(unknown)}: they are fields of neither CaptTrainingArguments nor CaptConfig."
            )
        if method == ZERO_SHOT:
            return common
        prompts = {name: value for name, value in values.items() if name in _PROMPTS}
        return common | {"settings": {k: v for k, v in values.items() if k not in _PROMPTS}, "prompts": prompts}


def _agrees(protocol: Protocol, name: str, settings: Mapping[str, Any]) -> bool:
    """Returns whether a setting is what a published protocol has: its norm, one of its radii, or its step size there."""
    try:
        epsilon = protocol.radius(settings.get("epsilon", protocol.epsilon[0]))
        if name == "eval_step_size":
            own = protocol.step_size_at(epsilon)
            return own is not None and parse_fraction(own) == parse_fraction(settings[name])
        return name == "epsilon" or settings["norm"] == protocol.norm
    except (TypeError, ValueError):
        return False


# fields that came later, which do not change the keys of cells that have no use for them
_LATER: dict[str, Any] = {"evaluation_protocol": None, "defence": ""}
_PROMPTS = PROMPT_FIELDS - {"class_names", "class_texts", "template_token_ids"}
_FLOATS = {f.name for kind in (CaptTrainingArguments, CaptConfig) for f in fields(kind) if f.type in (float, "float")}
_OF_A_RUN = {"output_dir", "seed", "eval_attack", "hub_token"}
_TRAINING = {f.name for f in fields(CaptTrainingArguments)} - _OF_A_RUN | {"teacher"}


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
