"""capt-peft: small adapters that make CLIP robust to adversarial images. Importing it registers CAPT with PEFT."""

from .tuner import CaptConfig, CaptModel

__all__ = ["CaptConfig", "CaptModel"]
__version__ = "0.1.0"
