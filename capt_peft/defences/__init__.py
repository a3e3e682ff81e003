"""Defences at test time, in front of any classifier, and the ways to attack them that know them."""

from __future__ import annotations

from ..utils.patterns import from_name, shapes_of
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
]


def defence_names() -> dict[str, str]:
    """Returns the names of all defences, or their shapes such as "tte-VIEWS", each with what it means."""
    return shapes_of(DEFENCES)


def parse_defence(name: str) -> Defence:
    """Returns the defence of a name.

    Args:
        name: As in `defence_names`: "ttc", "tte-16", ...

    Raises:
        ValueError: Any other name, or a setting out of range.
    """
    defence: Defence = from_name("defence", name, DEFENCES)
    return defence
