"""The defences that the page offers, and what it says of each; the attacker there always knows the one that is chosen."""

from __future__ import annotations

from dataclasses import dataclass

NO_DEFENCE = "none"
WITHOUT = 54.0  # accuracy of tiny CLIP without a defence, as below


@dataclass(frozen=True)
class Offer:
    """A defence as the page offers it.

    Attributes:
        label: What it is called there.
        unknown: Accuracy (%) of tiny CLIP with it where the attacker does not know of it: 200 test digits, L-inf 4/255, PGD-20.
        known: The same where the attacker knows it: the worst case of docs/defences.md.
    """

    label: str
    unknown: float = WITHOUT
    known: float = WITHOUT

    @property
    def keeps(self) -> str:
        """What it keeps under an attacker who knows it, as the one here does."""
        if self is OFFERS[NO_DEFENCE]:
            return "A defence changes how an image is classified. The attack goes through it: it knows the defence."
        return (
            f"Tiny CLIP with it, L-inf 4/255: {self.unknown:g}% right where the attacker does not know of it, "
            f"{self.known:g}% where the attacker does, as here; without it {WITHOUT:g}%."
        )


OFFERS = {
    NO_DEFENCE: Offer("None"),
    "ttc": Offer("TTC (counter-attack)", 79.2, 48.9),
    "rtpt-16": Offer("R-TPT (16 views)", 55.9, 53.1),
    "tte-10": Offer("TTE (10 views)", 57.0, 39.0),
    "smoothing-0.1x16": Offer("Smoothing (16 noisy copies)", 55.7, 55.2),
    "noise-0.1": Offer("Gaussian noise", 54.1, 53.4),
    "lowpass": Offer("Low-pass filter", 80.5, 71.0),
    "tv": Offer("Total variation", 71.5, 69.0),
    "clipure": Offer("CLIPure", 37.0, 37.0),
}
