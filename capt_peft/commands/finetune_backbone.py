"""Makes a robust backbone: fine-tunes a CLIP's image tower on adversarial images; the text tower stays as it is.

capt-peft finetune-backbone                # from tiny CLIP, with the settings that its robust twin was made with
accelerate launch -m capt_peft finetune-backbone --objective fare --model_name_or_path openai/clip-vit-base-patch32 \
        --dataset_name path/to/images --epsilon 4/255 --output_dir backbones/fare4

TeCoA (Mao et al. 2023, arXiv 2212.07016): the cross-entropy of adversarial images over the class texts.
FARE (Schlarmann et al. 2024, arXiv 2402.12336): adversarial images keep the features of the clean ones; without labels.
PMG-AFT (Wang et al. 2024, arXiv 2401.04350): TeCoA, held to the original's predictions and its own of clean images.
Sim-CLIP (Hossain and Imteaj 2024, arXiv 2407.14971): FARE with the cosine; without labels.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModel, AutoProcessor, PreTrainedModel, set_seed

from ..clip.classifier import ZeroShotClassifier
from ..data import Task, load_task
from ..data.task import task_features
from ..evaluation import Evaluation, evaluate
from ..objectives import AdversarialCrossEntropy, PmgAftObjective, SiameseCosine
from ..results.run import RESULTS, RunResults
from ..toy.images import FACTS, Facts, draw
from ..training import CaptTrainer, CaptTrainingArguments, FareTrainer
from ..training.fare import frozen_copy, train_image_tower_alone
from ..tuner.loading import load_pretrained
from ..utils.files import write_json
from ..utils.outputs import save_somewhere
from .data import measured
from .ending import loading
from .options import values_in
from .parser import Parser
from .places import check_places

DRAWN, PMG_AFT = "drawn", "pmg-aft"
OBJECTIVES, DTYPES = ("tecoa", "fare", PMG_AFT, "sim-clip"), ("float32", "float16", "bfloat16")
# those of RobustVLM, FARE's own code, for both objectives on ImageNet; each of 10 attack steps is epsilon / 4 long
PUBLISHED = {
    "optim": "adamw_torch", "learning_rate": 1e-5, "weight_decay": 1e-4, "warmup_steps": 0.07, "num_train_epochs": 2,
    "per_device_train_batch_size": 128, "attack_steps": 10, "save_total_limit": 1, "output_dir": "outputs/robust",
}  # fmt: skip
# without a model's name; chosen on validation images, see capt_peft/toy/tiny_clip_robust/README.md
TINY = {
    "learning_rate": 1e-3, "num_train_epochs": 4, "per_device_train_batch_size": 64, "attack_steps": 3, "epsilon": "10/255",
    "save_dtype": "float16", "save_strategy": "no", "logging_steps": 50, "use_cpu": True, "dataloader_pin_memory": False,
    "output_dir": "outputs/tiny_clip_robust",
}  # fmt: skip


@dataclass
class FinetuneArguments:
    """What is fine-tuned on what, and measured where."""

    objective: str = field(
        default="fare", metadata={"help": "tecoa or pmg-aft (with class texts), fare or sim-clip (without labels)."}
    )
    model_name_or_path: str = field(
        default="tiny_clip", metadata={"help": "Folder or Hub id of a CLIP; by default tiny CLIP."}
    )
    dataset_name: str = field(
        default=DRAWN,
        metadata={
            "help": "A task's name, a Hub id, a folder or file of images, or 'drawn': as tiny CLIP was pre-trained."
        },
    )
    drawn_images: int = field(default=16_000, metadata={"help": "How many images are drawn."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "What is measured; by default that dataset, or the digits if it is drawn."}
    )
    eval_split: str = field(default="validation", metadata={"help": "Split that the accuracies are measured on."})
    eval_limit: int | None = field(
        default=None, metadata={"help": "Measure on this many images of it, drawn by seed 0."}
    )
    save_dtype: str = field(
        default="float32", metadata={"help": "Precision of the file: float32, float16 or bfloat16."}
    )


def parse_args(argv: list[str]) -> tuple[FinetuneArguments, CaptTrainingArguments]:
    """Reads the command line; unless a model is named, the defaults are those of tiny CLIP."""
    parser = Parser([FinetuneArguments, CaptTrainingArguments])
    named = values_in(argv)
    parser.set_defaults(**(PUBLISHED if "model_name_or_path" in named else PUBLISHED | TINY))
    if named.get("objective") == PMG_AFT:
        parser.set_defaults(consistency=1.0)  # as in its code; CAPT's default is another
    script, training = parser.into_dataclasses(argv)
    for name, allowed in (("objective", OBJECTIVES), ("save_dtype", DTYPES)):
        if getattr(script, name) not in allowed:
            raise ValueError(f"{name}={getattr(script, name)!r} is unknown. Allowed: {', '.join(allowed)}.")
    if script.eval_limit is not None and script.eval_limit < 1:
        raise ValueError(f"eval_limit={script.eval_limit} must be at least 1 image.")
    for name, why in without_effect(script).items():
        if name in named:
            raise ValueError(f"--{name} has no effect here: {why}. Leave it out.")
    return script, training


def without_effect(script: FinetuneArguments) -> dict[str, str]:
    """Returns the options that change nothing with these settings, and why."""
    idle = dict.fromkeys(("weighting", "frozen_term"), "it belongs to CAPT's objective")
    if script.objective != PMG_AFT:
        idle["consistency"] = "it belongs to the objectives of CAPT and PMG-AFT"
    idle |= dict.fromkeys(("push_to_hub", "hub_model_id", "hub_token"), "nothing is uploaded; `hf upload` does that")
    if script.dataset_name != DRAWN:
        idle["drawn_images"] = f"the images are those of --dataset_name {script.dataset_name}"
    return idle


def thing(facts: Facts) -> str:
    """Returns what an image shows, one thing an image: "a star", "stars", "a dotted texture", "the letter A", "the digit 3"."""
    for noun in ("letter", "digit"):
        if noun in facts:
            return f"the {noun} {facts[noun]}"
    if "texture" in facts:
        return f"a {facts['texture']} texture"
    if facts["number"] == "one":
        return f"a {facts['shape']}"
    return f"{facts['shape']}{'es' if facts['shape'].endswith('s') else 's'}"


def drawn_task(size: int, seed: int) -> Task:
    """Draws training images as tiny CLIP was pre-trained on, from a stream of their own.

    No image holds a held-out pair of the procedural tasks, and none is a scan of the digits: both stay unseen.
    """
    if size < 1:
        raise ValueError(f"drawn_images={size} must be at least 1.")
    shown = [{"number": number, "shape": shape} for number in FACTS["number"] for shape in FACTS["shape"]]
    shown += [{name: value} for name in ("texture", "letter", "digit") for value in FACTS[name]]
    class_names = tuple(thing(facts) for facts in shown)
    rng = np.random.default_rng([seed, 4])  # pre-training draws from streams 1 to 3
    images, facts = zip(*(draw(rng) for _ in range(size)), strict=True)
    columns = {"image": list(images), "label": [class_names.index(thing(f)) for f in facts]}
    train = Dataset.from_dict(columns, features=task_features(class_names))
    return Task(DRAWN, class_names, {"train": train}, "a photo of {}.", source=f"{size} images, seed {seed}")


def load_bare(name_or_path: str) -> Any:
    """Loads a CLIP in float32 with all but its image tower frozen."""
    with loading(name_or_path):
        model = load_pretrained(AutoModel, name_or_path, dtype=torch.float32)
    if getattr(model, "peft_config", None):
        raise ValueError(f"{name_or_path} is an adapter. Fine-tune a CLIP, and tune the adapter on that.")
    return train_image_tower_alone(model)


def measure(
    model: PreTrainedModel, processor: Any, task: Task, data: Dataset, args: CaptTrainingArguments
) -> Evaluation:
    """Returns zero-shot clean and robust accuracy."""
    classifier = ZeroShotClassifier(model, processor, task.class_names, task.template, class_texts=task.class_texts)
    attack, batch = args.evaluation_attack, args.per_device_eval_batch_size
    return evaluate(classifier.to(args.device), data, attack, batch_size=batch, seed=args.seed, signs=False)


def save(model: PreTrainedModel, processor: Any, folder: str | Path, dtype: str) -> None:
    """Writes a plain CLIP with its processor, whole or not at all; it loads as float32, whatever `dtype` the file has."""
    for name in ("is_local", "local_files_only"):  # how the tokenizer was found, which transformers would write down
        processor.tokenizer.init_kwargs.pop(name, None)

    def write(temporary: Path) -> None:
        state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model.state_dict().items()}
        model.save_pretrained(temporary, state_dict=state)
        processor.save_pretrained(temporary)

    save_somewhere(folder, write)


def make_trainer(objective: str, model: Any, args: CaptTrainingArguments, task: Task, processor: Any) -> CaptTrainer:
    """Returns the trainer of one of `OBJECTIVES`, of which all but TeCoA's compare with the original."""
    own: dict[str, Any] = {"task": task, "processor": processor}
    if objective == "tecoa":
        return CaptTrainer(model, args, objective=AdversarialCrossEntropy(), **own)
    if objective == PMG_AFT:
        teacher = frozen_copy(model, processor, task) if args.consistency else None
        return CaptTrainer(model, args, objective=PmgAftObjective(args.consistency), teacher=teacher, **own)
    return FareTrainer(model, args, objective=SiameseCosine() if objective == "sim-clip" else None, **own)


def main(argv: list[str]) -> RunResults:
    """Measures, fine-tunes, saves, measures what was saved; returns the results."""
    script, args = parse_args(argv)
    output = str(args.output_dir)
    check_places(asdict(script))
    drawn = script.dataset_name == DRAWN
    other = load_task(script.eval_dataset_name or ("digits" if drawn else script.dataset_name))
    data = measured(other, script.eval_split, script.eval_limit)
    set_seed(args.seed)
    model = load_bare(script.model_name_or_path)
    with loading(script.model_name_or_path):
        processor = load_pretrained(AutoProcessor, script.model_name_or_path)
    task = drawn_task(script.drawn_images, args.seed) if drawn else load_task(script.dataset_name)
    trainer = make_trainer(script.objective, model, args, task, processor)
    more = f" and so on, {len(task.texts):,} texts in all" if len(task.texts) > task.num_classes else ""
    print(f"{task.name}: {len(task['train'])} training images, {task.num_classes} classes, as {task.texts[0]!r}{more}")
    checkpoint = trainer.find_checkpoint(args.resume_from_checkpoint)

    before = measure(model, processor, other, data, args)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    if trainer.is_world_process_zero():
        save(model, processor, output, script.save_dtype)
    trainer.accelerator.wait_for_everyone()
    after = measure(load_bare(output), processor, other, data, args)

    results = RunResults.of(
        trainer,
        before,
        after,
        method=script.objective,
        split=script.eval_split,
        seconds=seconds,
        script=asdict(script),
        measured=other.name,
    )
    if trainer.is_world_process_zero():
        write_json(Path(output) / RESULTS, results.to_dict())
        trainer.unlock()
        print(f"\n{results.table()}\n\nSaved to {output} after {seconds:.0f} s of fine-tuning.")
    return results
