"""`capt-peft evaluate --retrieval`: its options, and Recall@k of a CLIP and of its adapter beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Set
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..clip.classifier import ZeroShotClassifier
from ..data.captions import CaptionedImages, load_captions
from ..evaluation.curve import ADAPTER, ZERO_SHOT, draw_recall
from ..evaluation.retrieval import QueryAttack, evaluate_retrieval
from ..results.retrieval import Retrieval, retrieval_table
from ..tuner import adapters_in_use
from ..tuner.config import check_template
from .tuned import TunedDataArguments

TOY = "captions"
ATTACKS = "clean,feature-pgd-20,caption-pgd-20,contrast-pgd-20"
ANY_CLASSES = ("image", "text")  # of a CLIP whose classes have no say
OPTIONS = ("caption_column", "caption_template")
IDLE = (
    "root", "train_split", "validation_split", "test_split", "label_column", "class_names", "template", "class_texts",
    "attack_target", "attack_template", "out_of_class", "corruptions", "signs", "update_card", "save_images",
)  # fmt: skip


@dataclass
class RetrievalArguments(TunedDataArguments):
    """Retrieval: images and captions instead of classes."""

    retrieval: bool = field(
        default=False, metadata={"help": "Measure Recall@k of image-text retrieval instead of accuracy."}
    )
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the captions, or several with commas, if it cannot be told."}
    )
    caption_template: str = field(default="a photo of {}", metadata={"help": "Text that a caption is put into."})

    def prepare(self, named: Set[str]) -> Set[str]:
        """Refuses options that have no effect, sets the defaults of retrieval, and returns the options that are settled."""
        idle = [name for name in (IDLE if self.retrieval else OPTIONS) if name in named]
        if idle:
            what = "has no effect with --retrieval" if self.retrieval else "has no effect without --retrieval"
            raise ValueError(f"--{idle[0]} {what}.")
        if not self.retrieval:
            return named
        check_template(self.caption_template)
        defaults: dict[str, Any] = {"dataset_name": TOY, "attacks": ATTACKS}
        for name in defaults.keys() - named:
            setattr(self, name, defaults[name])
        return named | {"dataset_name"}

    def load_captions(self, split: str, limit: int | None) -> CaptionedImages:
        """Returns the images and captions that they name, or this many of the images, drawn by seed 0."""
        return load_captions(
            self.dataset_name,
            split=split,
            name=self.dataset_config,
            image_column=self.image_column,
            caption_column=self.caption_column,
        ).sample(limit)


def measure(
    classifier: ZeroShotClassifier,
    data: CaptionedImages,
    attacks: list[QueryAttack],
    output: Path,
    *,
    curve: bool,
    **settings: Any,
) -> dict[str, Retrieval]:
    """Measures the base model and, where there is one, the adapter; saves each, shows both, and draws them.

    Args:
        classifier: The model.
        data: Images with captions.
        attacks: As for `evaluate_retrieval`.
        output: JSON file; that of the base model of an adapter has ".zero-shot" before its suffix.
        curve: Draw recall against epsilon.
        settings: Other arguments of `evaluate_retrieval`.

    Returns:
        The results by the names "zero-shot" and "CAPT".
    """
    files = {ZERO_SHOT: output}
    if adapters_in_use(classifier.model):
        files = {ZERO_SHOT: output.with_name(f"{output.stem}.{ZERO_SHOT}.json"), ADAPTER: output}
    results = {}
    for name, file in files.items():
        with classifier.frozen() if name == ZERO_SHOT else nullcontext():
            results[name] = evaluate_retrieval(classifier, data, attacks, output=file, **settings)
    if PartialState().is_main_process:
        _show(results, files)
        if curve:
            drawn = draw_recall(results, output.with_name(f"{output.stem}.curve"))
            print(f"The curves: {' and '.join(map(str, drawn))}")
    return results


def _show(results: Mapping[str, Retrieval], files: Mapping[str, Path]) -> None:
    print(f"\n{retrieval_table(results)}\n\nSaved to {' and '.join(map(str, files.values()))}")
