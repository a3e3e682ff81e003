"""No defence: a check of the ways, which must all find what the white-box attack on the classifier finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Defence, Undefended


@dataclass(frozen=True)
class Identity(Defence):
    """Classifies the image as it is. What is measured with it must be what is measured without a defence."""

    pattern: ClassVar[str] = "identity"
    help: ClassVar[dict[str, str]] = {"identity": "does nothing: a check of the measurement itself"}
    ways = ("straight-through", "unrolled")

    @property
    def name(self) -> str:
        """Always "identity"."""
        return "identity"

    def logits(self, model: Undefended, pixels: Tensor) -> Tensor:
        """Returns the logits of the image."""
        return model(pixels)
