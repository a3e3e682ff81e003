"""The processor of a converted backbone: CLIP's image processor of the right size, and a tokenizer from elsewhere."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPConfig, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..tuner.clip import image_size
from ..tuner.loading import load_pretrained
from .settings import MEAN, STD, Settings

logger = logging.getLogger(__name__)


def pixel_statistics(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of a base's image processor; CLIP's if it has none."""
    try:
        processor = CLIPImageProcessorPil.from_pretrained(source)
    except OSError:
        return MEAN, STD
    return tuple(processor.image_mean), tuple(processor.image_std)


def load_tokenizer(source: str | None, required: bool) -> Any:
    """Loads a tokenizer from a folder or the Hub; None if there is none and none is required.

    Raises:
        ValueError: It is required and cannot be loaded.
    """
    try:
        return load_pretrained(AutoTokenizer, source) if source else None
    except (OSError, ValueError, KeyError) as error:
        if required:
            raise ValueError(
                f"processor={source!r} has no tokenizer that can be loaded: {error} Name a folder or Hub id with CLIP's "
                "(openai/clip-vit-base-patch32)."
            ) from error
        return None


def save_processor(folder: Path, tokenizer: Any, config: CLIPConfig, settings: Settings) -> None:
    """Writes the processor; without a tokenizer, the image processor alone, and says what is missing."""
    size = image_size(config)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size},
        image_mean=list(settings.mean), image_std=list(settings.std),
    )  # fmt: skip
    if tokenizer is None:
        image_processor.save_pretrained(folder)
        logger.warning(
            "The converted backbone has no tokenizer. Give processor=openai/clip-vit-base-patch32 (every CLIP of "
            "OpenAI has the same)."
        )
        return
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
