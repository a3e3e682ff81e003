"""Tunes a CAPT adapter and measures clean and robust accuracy before and after.

python examples/train.py                                        # handwritten digits with tiny CLIP
accelerate launch examples/train.py --model_name_or_path openai/clip-vit-base-patch32 --dataset_name path/to/images \
        --shots 16 --epsilon 1/255 --output_dir outputs/pets
torchrun --nproc_per_node 2 examples/train.py --use_cpu         # two processes on a CPU
python examples/train.py --config my.yaml --seed 1              # the command line wins over the file
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from command import EXAMPLES, TRAINING, Parser, check_early, check_places, given, loading, run

if __name__ == "__main__":
    check_early(__file__, *TRAINING)

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor, set_seed

from capt_peft import CaptTrainingArguments, Task, get_method, load_task
from capt_peft.methods import make_trainer, method_settings
from capt_peft.results.hub import save_run
from capt_peft.results.run import RunResults
from capt_peft.tuner.loading import load_pretrained

TINY_CLIP, DIGITS = str(EXAMPLES / "tiny_clip"), str(EXAMPLES / "configs" / "digits.yaml")


@dataclass
class ScriptArguments:
    """What is tuned on what."""

    model_name_or_path: str = field(
        default=TINY_CLIP, metadata={"help": "Folder or Hub id of a CLIP; tiny CLIP by default."}
    )
    dataset_name: str = field(
        default="digits", metadata={"help": "A task's name, a Hub id, or a folder or file of images."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    root: str | None = field(default=None, metadata={"help": "Where a data set of the catalog lies here."})
    train_split: str | None = field(default=None, metadata={"help": "Split to train on, if its name does not tell."})
    validation_split: str | None = field(
        default=None, metadata={"help": "The same for the split to choose settings on."}
    )
    test_split: str | None = field(default=None, metadata={"help": "The same for the split to measure accuracy on."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, if it cannot be told."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels, if it cannot be told."})
    class_names: list[str] | None = field(default=None, metadata={"help": "Class names in the order of the labels."})
    template: str | None = field(default=None, metadata={"help": "Text of a class, e.g. 'a photo of a {}.'"})
    shots: str = field(default="16", metadata={"help": "Training images per class, or 'all'."})
    eval_split: str = field(default="test", metadata={"help": "Split that the accuracies are measured on."})
    eval_limit: int | None = field(
        default=None, metadata={"help": "Measure on this many images of it, drawn by seed 0."}
    )
    method: str = field(
        default="capt", metadata={"help": "capt, trades-maple, fap, adv-maple, adv-vlp, adv-vp or adv-tp (apt)."}
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
    named = given(argv)
    early = parser.parse_known_args(argv)[0]
    path = early.config or (None if "model_name_or_path" in named else DIGITS)
    words = parser.read_file(path) if path else []
    values = vars(parser.parse_args([*words, *argv]))
    method = values["method"]
    if path == DIGITS:  # they are CAPT's; another method has no use for some
        words = parser.read_file(DIGITS, skipped=_not_for(method))
    # what a file asks for wins over the method's recipe; so does the command line
    asked = {*named} if path == DIGITS else {*named, *given(words)}
    recipe = method_settings(method, {name: values[name] for name in asked & values.keys() - {"config"}})
    parser.set_defaults(**{name: value for name, value in recipe.items() if name not in asked})
    try:
        script, training, _ = parser.into_dataclasses([*words, *argv])
    except (TypeError, ValueError) as error:
        if early.config is None or isinstance(error, TypeError):
            raise
        parser.error(f"{path} with the command line: {error}")
    return script, training


def _not_for(method: str) -> set[str]:
    """Returns what the digits' settings, which are CAPT's, have and another method has no use for."""
    recipe = get_method(method)
    coupled = recipe.fixed.get("coupling", "none") != "none"  # with as many vision prompts as text prompts
    return {*recipe.unused, *(["num_vision_tokens"] if coupled else [])}


def few_shot(task: Task, shots: int, seed: int) -> Task:
    """Returns the task with this many training images per class, or says how many there are."""
    counts = np.bincount(task.labels("train"), minlength=task.num_classes)
    if not 1 <= shots <= counts.min():
        smallest = task.class_names[counts.argmin()]
        allowed = f"Give 1 to {counts.min()}, or 'all'" if counts.min() else "Give 'all'"
        raise ValueError(
            f"shots={shots}: the smallest class, {smallest!r}, has {counts.min()} training images. {allowed}."
        )
    return task.few_shot(shots, seed)


def main(argv: list[str] | None = None) -> RunResults:
    """Tunes, measures and saves; returns the results."""
    script, args = parse_args(sys.argv[1:] if argv is None else argv)
    if get_method(script.method).objective is None:
        raise ValueError(f"{script.method} tunes nothing; python examples/evaluate.py --base measures it.")
    script.shots = str(script.shots)  # a number in a YAML file
    if script.shots != "all" and not script.shots.isdecimal():
        raise ValueError(f"shots={script.shots!r} must be a number or 'all'.")
    if script.eval_limit is not None and script.eval_limit < 1:
        raise ValueError(f"eval_limit={script.eval_limit} must be at least 1 image.")
    check_places(asdict(script))
    task = load_task(
        script.dataset_name,
        root=script.root,
        name=script.dataset_config,
        image_column=script.image_column,
        label_column=script.label_column,
        class_names=script.class_names,
        template=script.template,
        train_split=script.train_split,
        validation_split=script.validation_split,
        test_split=script.test_split,
    )
    if script.shots != "all":
        task = few_shot(task, int(script.shots), args.seed)
    measured = task[script.eval_split]
    if script.eval_limit is not None:
        measured = measured.shuffle(seed=0).select(range(min(script.eval_limit, len(measured))))

    set_seed(args.seed)
    with loading(script.model_name_or_path):
        processor = load_pretrained(AutoProcessor, script.model_name_or_path)
        # in float32, whatever precision it is stored in: pixel gradients vanish in less
        base = load_pretrained(AutoModel, script.model_name_or_path, dtype=torch.float32)
    prompts, teacher = script.prompts(), script.teacher
    trainer = make_trainer(script.method, base, args, task=task, processor=processor, prompts=prompts, teacher=teacher)
    print(f"{task.name}: {len(task['train'])} training images, {task.num_classes} classes, as {task.texts[0]!r}")
    checkpoint = trainer.find_checkpoint(args.resume_from_checkpoint)

    with trainer.classifier.frozen():
        before = trainer.evaluate(measured, metric_key_prefix="before")
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    after = trainer.evaluate(measured, metric_key_prefix="after")

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
        name = trainer.hub_model_id if args.push_to_hub else args.output_dir
        results = save_run(trainer.model, results, args.output_dir, name)
        trainer.unlock()
        print(f"\n{results.table()}\n\nSaved to {args.output_dir} after {seconds:.0f} s of tuning.")
        if args.push_to_hub:
            print(f"Uploaded to {trainer.push_to_hub().commit_url}")
    return results


if __name__ == "__main__":
    run(main)
