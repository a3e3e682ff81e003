"""Checks that the settings of attacks share."""

from __future__ import annotations

from typing import Any

from .threat import ThreatModel


def check_threat_model(settings: Any) -> None:
    """Refuse a `threat_model` attribute that is not a `ThreatModel`.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(settings.threat_model, ThreatModel):
        raise TypeError(f"threat_model must be a ThreatModel, got {settings.threat_model!r}")


def check_counts(settings: Any, *names: str, least: int = 1) -> None:
    """Refuse attributes that are not whole numbers of `least` or more.

    Raises:
        TypeError: not an integer.
        ValueError: too small.
    """
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} must be an integer, {least} or more")
        if value < least:
            raise ValueError(f"{name}={value} must be {least} or more")
