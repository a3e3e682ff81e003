"""Scores an evaluation's worst-case images again on the weights: an upper bound of robust accuracy that needs no attack.

capt-peft verify outputs/demo
capt-peft verify you/tiny-capt --attacks pgd-20      # also tries the images that count as robust
capt-peft verify --base openai/clip-vit-base-patch32 --evaluation outputs/zero-shot.json

The exit status is 0 where clean accuracy, the worst case, data, weights and distances agree, and 1 otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from peft import PeftModel

from ..attacks import parse_attack
from ..attacks.registry import fitting
from ..clip.classifier import ZeroShotClassifier
from ..defences import Defended, parse_defence
from ..evaluation import Evaluation, Verification, verify
from ..evaluation.subject import describe
from ..results.evaluation import EVALUATION
from ..results.kept import images_path
from ..tuner.config import DEFAULT_TEMPLATE
from ..utils.markup import plain
from .data import measured
from .ending import loading
from .options import values_in
from .parser import Parser
from .places import check_places
from .tuned import TunedDataArguments, read_record, take_over

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Arguments(TunedDataArguments):
    """What is verified, and on which data."""

    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub id of a CAPT adapter."})
    base: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a CLIP: that of a zero-shot evaluation, or the adapter's base."},
    )
    evaluation: str | None = field(
        default=None, metadata={"help": "JSON file of the evaluation; by default the adapter's evaluation.json."}
    )
    attacks: str = field(
        default="", metadata={"help": "Comma-separated attacks on the images that count as robust, such as pgd-20."}
    )
    batch_size: int = field(default=128, metadata={"help": "Images that the model is run on at once."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use an accelerator."})


def main(argv: list[str]) -> None:
    """Verifies, and ends with exit status 1 unless everything agrees."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    (args,) = Parser(Arguments).into_dataclasses(argv)
    if args.adapter is None and (args.base is None or args.evaluation is None):
        raise ValueError("Give --adapter (folder or Hub id), or --base and --evaluation of a zero-shot evaluation.")
    if args.batch_size < 1:
        raise ValueError(f"batch_size={args.batch_size} must be 1 or more.")
    check_places({"adapter": args.adapter, "base": args.base})
    found = verified(args, {*values_in(argv)})
    print(found)
    if not found.verified:
        raise SystemExit(1)


def verified(args: Arguments, named: set[str]) -> Verification:
    """Returns what `verify` finds, of an adapter or a bare CLIP and the data of its record, if these can be had.

    Args:
        args: What is verified.
        named: Options that the command line gives.
    """
    path = find_evaluation(args)
    evaluation = Evaluation.load(path, with_examples=False)
    if evaluation.images is None:
        raise ValueError(f"{path} names no worst-case images. They are kept by capt-peft evaluate --save_images.")
    if not images_path(path).is_file():
        raise ValueError(f"{images_path(path).name}, the worst-case images of {path}, is missing.")
    state = PartialState(cpu=args.use_cpu or not torch.accelerator.is_available())
    names = [name.strip() for name in args.attacks.split(",") if name.strip()]
    attacks = [parse_attack(*pair) for pair in fitting(names, list(evaluation.worst_case))]
    recorded, settings, task = (_object(evaluation, name) for name in ("model", "defence", "task"))
    defence = parse_defence(str(settings.get("name"))) if settings else None
    classifier = load_recorded(args, recorded).to(state.device)
    defended = classifier if defence is None else Defended(classifier, defence).eval()
    data, why = load_data(args, named, task)
    result = verify(defended, evaluation, images_path(path), data, attacks=attacks, batch_size=args.batch_size)
    bases = (model.get("base") for model in (describe(classifier), recorded))
    own, told = (base.get("name") if isinstance(base, Mapping) else None for base in bases)
    if args.base is None and own != told:
        problem = f"the record names the base {plain(told, 80)}; the adapter's is {plain(own, 80)}."
        result = replace(result, problems=(*result.problems, problem))
    return result if not why else replace(result, unchecked=(*result.unchecked, why))


def _object(evaluation: Evaluation, name: str) -> Mapping[str, Any]:
    """Returns a part of the configuration of a record, which may be a stranger's; empty where it is missing."""
    found = evaluation.configuration.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"The record's {name} is {plain(found, 80)}, which is not a JSON object. Measure again.")
    return found or {}


def find_evaluation(args: Arguments) -> Path:
    """Returns the JSON file of the evaluation; of a Hub repository, downloaded with its images."""
    if args.evaluation is not None:
        if not Path(args.evaluation).is_file():
            raise ValueError(f"There is no file {args.evaluation} (--evaluation).")
        return Path(args.evaluation)
    adapter = str(args.adapter)
    if Path(adapter).is_dir():
        path = Path(adapter, EVALUATION)
        if not path.is_file():
            raise ValueError(
                f"{adapter} has no {EVALUATION}. capt-peft evaluate --save_images --update_card writes one."
            )
        return path
    try:
        hf_hub_download(adapter, images_path(Path(EVALUATION)).name)
        return Path(hf_hub_download(adapter, EVALUATION))
    except EntryNotFoundError as error:
        raise ValueError(
            f"{adapter} has no {EVALUATION} with worst-case images. They are kept by capt-peft evaluate --save_images."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"{adapter} is neither a folder here nor a repository on the Hub.") from error


def load_recorded(args: Arguments, model: Mapping[str, Any]) -> ZeroShotClassifier:
    """Returns the classifier that a record describes: these weights, over its classes, texts and precision."""
    name = str(args.adapter or args.base)
    names, precision = model.get("class_names"), str(model.get("precision", "float32"))
    if not (isinstance(names, list) and names and all(isinstance(each, str) for each in names)):
        raise ValueError("The record names no classes, so that it is not of a classifier of texts.")
    for key, kinds in (("template", (str, list)), ("class_texts", (dict,))):
        if model.get(key) and not isinstance(model[key], kinds):
            raise ValueError(f"The record's {key} is {plain(model[key], 80)}, which is no text. Measure again.")
    texts: Any = {"template": model.get("template") or DEFAULT_TEMPLATE, "class_texts": model.get("class_texts") or {}}
    base = {"base": args.base} if args.adapter and args.base else {}
    dtype = getattr(torch, precision) if precision in DTYPES else torch.float32
    with loading(name):
        classifier = ZeroShotClassifier.from_pretrained(name, class_names=names, dtype=dtype, **texts, **base)
    if isinstance(classifier.model, PeftModel) != (args.adapter is not None):
        raise ValueError(
            f"{name} is {'a CLIP without' if args.adapter else 'a CLIP with'} an adapter: see --adapter, --base."
        )
    return classifier


def load_data(args: Arguments, named: set[str], task: Mapping[str, Any]) -> tuple[Dataset | None, str]:
    """Returns the images of a record, or why they cannot be had; data that was named by hand must be there."""
    split, limit, source = task.get("split") or "test", task.get("limit"), task.get("source")
    by_hand = "dataset_name" in named
    try:
        record = read_record(str(args.adapter)).run if args.adapter else None
        if not by_hand and record is not None and record.task.source == source:
            take_over(args, str(args.adapter), named)
        elif not by_hand:
            if not isinstance(source, str) or not source:
                return None, "the record does not say which data it is of (--dataset_name)."
            args.dataset_name = source
        return measured(args.load(), str(split), limit if isinstance(limit, int) else None), ""
    except (OSError, ValueError, KeyError) as error:  # the last: no split of that name
        if by_hand:
            raise
        return (
            None,
            f"{plain(source, 80)}, the data of the record, cannot be loaded: {plain(error, 160)} (--dataset_name).",
        )
