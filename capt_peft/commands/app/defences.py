"""The defences that the page offers, and what it says of each; the attacker there always knows the one that is chosen."""

from __future__ import annotations

from dataclasses import dataclass

NO_DEFENCE = "none"


@dataclass(frozen=True)
class Offer:
    """A defence as the page offers it: what it is called there, and what it keeps under an attacker who knows it."""

    label: str
    keeps: str


OFFERS = {
    NO_DEFENCE: Offer("None", "A defence changes how an image is classified; the attack then goes through it."),
    "ttc": Offer("TTC (counter-attack)", ""),
    "rtpt-16": Offer("R-TPT (16 views)", ""),
    "tte-10": Offer("TTE (10 views)", ""),
    "smoothing-0.1x16": Offer("Smoothing (16 noisy copies)", ""),
    "noise-0.1": Offer("Gaussian noise", ""),
    "lowpass": Offer("Low-pass filter", ""),
    "tv": Offer("Total variation", ""),
    "clipure": Offer("CLIPure", ""),
}
