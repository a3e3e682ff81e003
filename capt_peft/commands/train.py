"""Tunes a CAPT adapter, or LoRA or another of PEFT, and measures clean and robust accuracy before and after.

capt-peft train                                        # handwritten digits with tiny CLIP
accelerate launch -m capt_peft train --model_name_or_path openai/clip-vit-base-patch32 --dataset_name path/to/images \
        --shots 16 --epsilon 1/255 --output_dir outputs/pets
torchrun --nproc_per_node 2 -m capt_peft train --use_cpu   # two processes on a CPU
capt-peft train --peft lora                            # LoRA instead of prompts, with the same objective
capt-peft train --config my.yaml --seed 1              # the command line wins over the file

Without --config and --model_name_or_path the settings are those of `--config digits`, which differ from the defaults below.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor, set_seed

from ..data import Task
from ..evaluation.strength import strength_front
from ..methods import PROMPTS, check_peft, get_method, make_trainer, method_settings
from ..results.hub import save_run
from ..results.run import RunResults
from ..results.strength import StrengthFront, check_keep_clean
from ..training import CaptTrainer, CaptTrainingArguments
from ..tuner.config import check_strength
from ..tuner.loading import load_pretrained
from ..utils.text import shown, some
from .data import DataArguments, measured
from .ending import loading
from .export import say_what_stays
from .options import values_in
from .parser import Parser
from .places import CONFIGS, check_places
from .strength import check_choice, draw, task_details, told

DIGITS, SHOTS = str(CONFIGS / "digits.yaml"), 16


@dataclass
class ScriptArguments(DataArguments):
    """What is tuned on what."""

    model_name_or_path: str = field(
        default="tiny_clip", metadata={"help": "Folder or Hub id of a CLIP; tiny CLIP by default."}
    )
    shots: str | None = field(
        default=None,
        metadata={
            "help": "Training images per class, or 'all'; by default 16, or what a class has where that is fewer."
        },
    )
    eval_split: str = field(default="test", metadata={"help": "Split that the accuracies are measured on."})
    eval_limit: int | None = field(
        default=None, metadata={"help": "Measure on this many images of it, drawn by seed 0."}
    )
    method: str = field(
        default="capt",
        metadata={"help": "capt, trades-maple, fap, pmg-aft, adv-maple, adv-vlp, adv-vp or adv-tp (apt)."},
    )
    peft: str = field(
        default="prompts",
        metadata={
            "help": "What is tuned: prompts, or lora, ln, ia3 or boft of PEFT, with the objective of the method."
        },
    )
    peft_kwargs: str | None = field(
        default=None,
        metadata={"help": """Settings of the latter, as PEFT names them: '{"r": 16, "lora_alpha": 16}'."""},
    )
    teacher: str | None = field(default=None, metadata={"help": "Another CLIP that guides the tuning."})
    coupling: str | None = field(default=None, metadata={"help": "text_to_vision, vision_to_text or none."})
    num_text_tokens: int | None = field(default=None, metadata={"help": "Text prompts per layer."})
    num_vision_tokens: int | None = field(default=None, metadata={"help": "Vision prompts per layer."})
    text_depth: int | None = field(default=None, metadata={"help": "Text layers with prompts."})
    vision_depth: int | None = field(default=None, metadata={"help": "Vision layers with prompts."})
    init: str | None = field(default=None, metadata={"help": "Start of the prompts: template, random or normal."})
    init_std: float | None = field(default=None, metadata={"help": "Standard deviation of random prompts (0.02)."})
    class_specific: bool = field(default=False, metadata={"help": "Every class has text prompts of its own."})
    strength: str | None = field(
        default=None,
        metadata={
            "help": "Store the tuned adapter with this strength, 0 to 1; 'auto': the best on the validation images. By default 1."
        },
    )
    keep_clean: float | None = field(
        default=None,
        metadata={
            "help": "The most robust one that keeps this share of the base's clean accuracy, e.g. 0.99; by default the one "
            "of the best H, the harmonic mean of clean and robust accuracy."
        },
    )

    @property
    def adapter_settings(self) -> dict[str, Any] | None:
        """`peft_kwargs` as a dictionary."""
        if self.peft_kwargs is None:
            return None
        try:
            found = json.loads(self.peft_kwargs)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                f"peft_kwargs={shown(self.peft_kwargs, 80)} must be a JSON object, such as '{{\"r\": 16}}'."
            )
        return found

    def prompts(self) -> dict[str, Any]:
        """Returns the fields of CaptConfig that were given."""
        shape = ("num_text_tokens", "num_vision_tokens", "text_depth", "vision_depth")
        names = ("coupling", *shape, "init", "init_std", "class_specific")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def parse_args(argv: list[str]) -> tuple[ScriptArguments, CaptTrainingArguments]:
    """Reads the command line, on top of a YAML file: that of `--config`, or that of the digits if no model is named."""
    parser = Parser([ScriptArguments, CaptTrainingArguments])
    parser.add_argument("--config", help="YAML file with any of these arguments.")
    parser.set_defaults(output_dir="outputs/capt")
    named = values_in(argv)
    early = parser.parse_known_args(argv)[0]
    path = early.config or (None if "model_name_or_path" in named else DIGITS)
    words = parser.read_file(path) if path else []
    values = vars(parser.parse_args([*words, *argv]))
    method, peft = values["method"], values["peft"]
    if path == DIGITS:  # they are CAPT's; another method has no use for some
        words = parser.read_file(DIGITS, skipped=_not_for(method, peft))
    # what a file asks for wins over the method's recipe; so does the command line
    asked = {*named} if path == DIGITS else {*named, *values_in(words)}
    recipe = method_settings(method, {name: values[name] for name in asked & values.keys() - {"config"}}, peft)
    parser.set_defaults(**{name: value for name, value in recipe.items() if name not in asked})
    try:
        script, training, _ = parser.into_dataclasses([*words, *argv])
    except (TypeError, ValueError) as error:
        if early.config is None or isinstance(error, TypeError):
            raise
        parser.error(f"{path} with the command line: {error}")
    return script, training


def _not_for(method: str, peft: str) -> set[str]:
    """Returns what the digits' settings, which are CAPT's, have and another method has no use for."""
    if peft != PROMPTS:
        return {"num_vision_tokens", "learning_rate"}
    recipe = get_method(method)
    coupled = recipe.fixed.get("coupling", "none") != "none"  # with as many vision prompts as text prompts
    return {*recipe.unused, *(["num_vision_tokens"] if coupled else [])}


def few_shot(task: Task, shots: str | None, seed: int) -> tuple[Task, str]:
    """Returns the task with this many training images per class and their number, or says how many there are."""
    counts = np.bincount(task.labels("train"), minlength=task.num_classes)
    smallest = task.class_names[counts.argmin()]
    if shots == "all":
        return task, shots
    if shots is None and counts.min() < SHOTS:
        few = [name for name, count in zip(task.class_names, counts, strict=True) if count < SHOTS]
        print(f"Fewer than {SHOTS} training images: {some(few, 5)}. All that there are of them are used (--shots).")
        return task.few_shot(SHOTS, seed, allow_fewer=True), f"up to {SHOTS}"
    shots = shots or str(SHOTS)
    if not 1 <= int(shots) <= counts.min():
        allowed = f"Give 1 to {counts.min()}, or 'all'" if counts.min() else "Give 'all'"
        raise ValueError(
            f"shots={shots}: the smallest class, {smallest!r}, has {counts.min()} training images. {allowed}."
        )
    return task.few_shot(int(shots), seed), shots


def check_strength_options(script: ScriptArguments, task: Task) -> None:
    """Raises a ValueError, before anything is tuned, if the strength that is asked for cannot be had."""
    if script.keep_clean is not None and script.strength != "auto":
        raise ValueError(f"keep_clean={script.keep_clean} has no effect without --strength auto.")
    if script.strength is None:
        return
    if script.strength == "auto":
        check_keep_clean(script.keep_clean)
        check_choice(task, "validation")
        if script.eval_split == "validation":
            logging.warning("The strength is chosen on the validation images, whose accuracy then overstates it.")
        return
    try:
        strength = float(script.strength)
    except ValueError:
        raise ValueError(f"strength={script.strength!r} must be a number from 0 to 1, or 'auto'.") from None
    check_strength(strength)


def set_strength(trainer: CaptTrainer, script: ScriptArguments) -> StrengthFront | None:
    """Gives the tuned adapter its strength; returns what it was chosen on, if it was."""
    if script.strength is None:
        return None
    if script.strength != "auto":
        trainer.classifier.strength = float(script.strength)
        return None
    args, task = trainer.args, trainer.task
    front = strength_front(
        trainer.classifier,
        task["validation"],
        args.evaluation_attack,
        keep_clean=script.keep_clean,
        seed=args.seed,
        batch_size=args.per_device_eval_batch_size,
        details=task_details(task, "validation"),
    )
    trainer.classifier.strength = front.chosen.strength
    return front


def main(argv: list[str]) -> RunResults:
    """Tunes, measures and saves; returns the results."""
    script, args = parse_args(argv)
    if get_method(script.method).objective is None:
        raise ValueError(f"{script.method} tunes nothing; capt-peft evaluate --base measures it.")
    check_peft(script.method, script.peft, script.adapter_settings)
    if script.shots not in (None, "all") and not script.shots.isdecimal():
        raise ValueError(f"shots={script.shots!r} must be a number or 'all'.")
    if script.eval_limit is not None and script.eval_limit < 1:
        raise ValueError(f"eval_limit={script.eval_limit} must be at least 1 image.")
    check_places(asdict(script))
    task = script.load()
    task, script.shots = few_shot(task, script.shots, args.seed)
    check_strength_options(script, task)
    images = measured(task, script.eval_split, script.eval_limit)

    set_seed(args.seed)
    with loading(script.model_name_or_path):
        processor = load_pretrained(AutoProcessor, script.model_name_or_path)
        # in float32, whatever precision it is stored in: pixel gradients vanish in less
        base = load_pretrained(AutoModel, script.model_name_or_path, dtype=torch.float32)
    trainer = make_trainer(
        script.method,
        base,
        args,
        task=task,
        processor=processor,
        prompts=script.prompts(),
        teacher=script.teacher,
        peft=script.peft,
        peft_kwargs=script.adapter_settings,
    )
    more = f" and so on, {len(task.texts):,} texts in all" if len(task.texts) > task.num_classes else ""
    print(f"{task.name}: {len(task['train'])} training images, {task.num_classes} classes, as {task.texts[0]!r}{more}")
    checkpoint = trainer.find_checkpoint(args.resume_from_checkpoint)

    with trainer.classifier.frozen():
        before = trainer.evaluate(images, metric_key_prefix="before")
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    front = set_strength(trainer, script)
    after = trainer.evaluate(images, metric_key_prefix="after")

    results = RunResults.of(
        trainer,
        before,
        after,
        method=script.method,
        split=script.eval_split,
        seconds=seconds,
        shots=script.shots,
        script=asdict(script),
    )
    if trainer.is_world_process_zero():
        output = str(args.output_dir)
        name = str(trainer.hub_model_id if args.push_to_hub else output)
        results = save_run(trainer.model, results, output, name, front)
        if front is not None:
            print(f"\n{front.table()}\n\n{draw(front, Path(output))}")
        trainer.unlock()
        print(f"\n{results.table()}\n\nSaved to {output} after {seconds:.0f} s of tuning.")
        if script.strength is not None:
            print(told(results.strength))
        say_what_stays(Path(output))
        if args.push_to_hub:
            commit: Any = trainer.push_to_hub()
            print(f"Uploaded to {commit.commit_url}")
    return results
