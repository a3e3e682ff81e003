"""Published evaluation protocols by name: attacks, step size, threat model, images and texts, from `protocols.yaml`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from importlib.resources import files

from ..utils.files import read_entries
from ..utils.fractions import parse_fraction
from .base import Attack
from .pgd import with_step_size
from .registry import parse_attack
from .threat import ThreatModel

AUTOATTACK = "autoattack"  # what the figure of a protocol is compared with


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a paper measures robust accuracy.

    Attributes:
        name: What `--protocol` calls it.
        title: What the paper calls it, or its method.
        paper: The paper.
        read: The repository that the settings were read in, and its commit.
        attacks: Names of the attacks whose worst case is its robust accuracy.
        step_size: Of PGD, also of PGD that is run beside: a number such as "1/255", or "epsilon/4"; None: PGD's own.
        norm: Norm of its threat models.
        epsilon: Their radii, such as "1/255", the usual one first.
        split: The split that is measured.
        images: Test images of a data set, drawn by seed 0; None: all.
        images_of: Other numbers of images, by data set.
        template: Text of a class for a bare CLIP, or the name of a set of templates; None: the data set's own. A tuned adapter
            keeps its own.
        templates: Others, by data set.
        beside: Other attacks that the source runs.
        sources: Where each setting was read.
        not_read: What could not be read in public; "" for nothing.
        differs: What is done in another way here than in the source's code.
    """

    name: str
    title: str
    paper: str
    read: str
    attacks: tuple[str, ...]
    step_size: str | None = None
    norm: str
    epsilon: tuple[str, ...]
    split: str
    images: int | None = None
    images_of: Mapping[str, int] = field(default_factory=dict)
    template: str | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    sources: Mapping[str, str]
    not_read: str = ""
    differs: tuple[str, ...] = ()

    def radius(self, epsilon: float | str) -> str:
        """Returns a radius as the protocol writes it.

        Raises:
            ValueError: It is not one of the protocol's.
        """
        for own in self.epsilon:
            if parse_fraction(own) == parse_fraction(epsilon):
                return own
        raise ValueError(f"protocol {self.name} is of epsilon {' or '.join(self.epsilon)}, not {epsilon}")

    def step_size_at(self, epsilon: float | str) -> str | None:
        """Returns PGD's step size at a radius of the protocol; None: PGD's own."""
        share = (self.step_size or "").partition("epsilon/")[2]
        return str(Fraction(self.radius(epsilon)) / int(share)) if share else self.step_size

    def attack(self, name: str, threat_model: ThreatModel) -> Attack:
        """Returns an attack of a name as the protocol runs it: PGD with its step size.

        Raises:
            ValueError: Another norm or radius than the protocol's, or an unknown name.
        """
        if threat_model.norm != self.norm:
            raise ValueError(f"protocol {self.name} is of the norm {self.norm}, not {threat_model.norm}")
        return with_step_size(parse_attack(name, threat_model), self.step_size_at(threat_model.epsilon))

    def attacks_at(self, epsilon: float | str | None = None) -> list[Attack]:
        """Returns its attacks at one of its radii, by default the usual one."""
        threat = ThreatModel(self.norm, self.radius(self.epsilon[0] if epsilon is None else epsilon))
        return [self.attack(name, threat) for name in self.attacks]

    def images_in(self, task: str) -> int | None:
        """Returns how many test images of a data set it measures, drawn by seed 0; None: all."""
        return self.images_of.get(task, self.images)

    def template_for(self, task: str) -> str | None:
        """Returns a bare CLIP's text of a class on a data set, or the name of a set of templates; None: the data set's own."""
        return self.templates.get(task, self.template)

    def lacking(self, attacks: Collection[str]) -> list[str]:
        """Returns which of its attacks are not among these names."""
        return [name for name in self.attacks if name not in attacks]

    def check(self, attacks: Sequence[Attack]) -> None:
        """Refuses attacks that do not have the protocol's own, with its settings, at each of their threat models.

        Raises:
            ValueError: Another norm or radius than the protocol's, or an attack that is missing or has other settings.
        """
        if not attacks:
            raise ValueError(f"protocol {self.name} measures {', '.join(self.attacks)}, and there is no attack")
        for threat in dict.fromkeys(attack.threat_model for attack in attacks):
            given = [attack for attack in attacks if attack.threat_model == threat]
            for own in (self.attack(name, threat) for name in self.attacks):
                if own not in given:
                    names = ", ".join(attack.name for attack in given)
                    raise ValueError(
                        f"protocol {self.name} measures {own.name} at {threat}, which is not among {names}: "
                        f"get_protocol({self.name!r}).attacks_at({self.radius(threat.epsilon)!r}) returns its attacks"
                    )


@lru_cache(maxsize=1)
def known_protocols() -> dict[str, Protocol]:
    """Returns all protocols by name, as `protocols.yaml` has them."""
    entries = read_entries(files(__package__) / "protocols.yaml")
    return {name: Protocol(name=name, **entry) for name, entry in entries.items()}


def get_protocol(name: str) -> Protocol:
    """Returns a published evaluation protocol.

    Args:
        name: As in `known_protocols()`: "fap", "apt", "tecoa", "robustvlm", "ttc" or "rtpt".

    Raises:
        ValueError: Another name.
    """
    known = known_protocols()
    if name not in known:
        raise ValueError(f"Unknown protocol {name!r}. Allowed: {', '.join(known)}.")
    return known[name]
