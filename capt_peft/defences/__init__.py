"""Defences at test time, in front of any classifier, and the ways to attack them that know them."""

from __future__ import annotations

from ..utils.patterns import Kind, add_kind, from_name, shapes_of
from .base import Defence, Defended, Purifier, Undefended, gradient_of
from .clipure import CLIPure
from .ensemble import Ensemble
from .filters import LowPass, TotalVariation
from .identity import Identity
from .noise import GaussianNoise, Smoothing
from .rtpt import RTPT
from .ttc import TTC
from .ways import WAYS, Through, adaptive

DEFENCES: tuple[type[Defence], ...] = (
    Identity,
    TTC,
    RTPT,
    Ensemble,
    GaussianNoise,
    Smoothing,
    LowPass,
    TotalVariation,
    CLIPure,
)

__all__ = [
    "DEFENCES",
    "RTPT",
    "TTC",
    "WAYS",
    "CLIPure",
    "Defence",
    "Defended",
    "Ensemble",
    "GaussianNoise",
    "Identity",
    "LowPass",
    "Purifier",
    "Smoothing",
    "Through",
    "TotalVariation",
    "Undefended",
    "adaptive",
    "defence_names",
    "gradient_of",
    "parse_defence",
    "register_defence",
]


_KINDS: dict[str, type[Defence]] = {kind.pattern: kind for kind in DEFENCES}


def register_defence(kind: Kind) -> Kind:
    """Adds a defence to those that `parse_defence` and the commands know by name; a decorator of its class.

    Args:
        kind: A subclass of `Defence` with a `pattern` and a `help`.

    Returns:
        The class itself.

    Raises:
        TypeError: Not such a class.
        ValueError: Another defence has the same pattern.
    """
    return add_kind(kind, Defence, _KINDS)


def defence_names() -> dict[str, str]:
    """Returns the names of all defences, or their shapes such as "tte-VIEWS", each with what it means."""
    return shapes_of(_KINDS.values())


def parse_defence(name: str) -> Defence:
    """Returns the defence of a name.

    Args:
        name: As in `defence_names`: "ttc", "tte-16", ...

    Raises:
        ValueError: Any other name, or a setting out of range.
    """
    defence: Defence = from_name("defence", name, _KINDS.values())
    return defence
