"""Measures how robust an adapter, or a bare CLIP, really is.

capt-peft evaluate outputs/demo --attacks clean,pgd-20,pgd-100,autoattack --epsilon 10/255
capt-peft evaluate --base openai/clip-vit-base-patch32 --dataset_name path/to/images --epsilon 1/255,4/255 --limit 1000
torchrun --nproc_per_node 2 -m capt_peft evaluate outputs/demo    # processes share the images
capt-peft evaluate outputs/demo --retrieval --epsilon 4/255       # Recall@k of images and captions instead of accuracy
capt-peft evaluate outputs/demo --attacks apgd-ce --threats linf:10/255,l2:1,l1:6    # and their union
capt-peft evaluate outputs/demo --protocol fap            # as the paper of FAP measures; capt-peft protocols lists them
capt-peft evaluate outputs/demo --curve                   # accuracy against epsilon and steps, as pictures

A killed evaluation resumes where it stopped when the same command is given again.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel

from ..attacks import ThreatModel, get_protocol, parse_attack
from ..attacks.registry import fitting
from ..clip.calibration import calibration_for
from ..clip.classifier import ZeroShotClassifier
from ..data import Task, load_task
from ..data.captions import CaptionedImages
from ..data.corruptions import parse_corruptions
from ..data.texts import read_template
from ..defences import Defended, parse_defence
from ..evaluation import Evaluation, evaluate
from ..evaluation.curve import robustness_curves
from ..evaluation.retrieval import QueryAttack, parse_query_attack
from ..evaluation.scores import draw_scores
from ..evaluation.subject import DECISIONS, OF_FLOAT32, TARGETS, check_decisions, describe
from ..randomness import check_seed
from ..results.card import is_adapter
from ..results.hub import check_update, update_card
from ..results.kept import images_path
from ..results.retrieval import Retrieval
from ..tuner import adapters_in_use
from ..tuner.config import check_strength
from ..utils.machine import use_tf32
from ..utils.text import cut, shown
from .data import measured
from .ending import loading
from .naming import default_output
from .options import values_in
from .parser import Parser
from .places import check_places
from .protocols import settle, settle_data
from .retrieval import ANY_CLASSES, RetrievalArguments, measure
from .tuned import take_over

DTYPES = ("float32", "tf32", "bfloat16", "float16")
# options that cannot go with --defence, and why
WITHOUT_DEFENCE = {
    "attack_target": "a defended classifier is attacked by ways of its own",
    "attack_template": "a defended classifier is attacked by ways of its own",
    "out_of_class": 'the answer "none of these" is one of the classifier alone',
    "retrieval": "defences are of classifiers",
    "protocol": "a published protocol has no attacks on one",
    "curve": "its attacks do not know the defence",
    "update_card": "a card shows what the adapter does by itself",
    "corruptions": "they are measured without a defence",
}


@dataclass
class Arguments(RetrievalArguments):
    """What is measured, on what, and how.

    Args:
        adapter: Folder or Hub id of a CAPT adapter.
        base: Folder or Hub id of a CLIP: measured zero-shot, or the base of --adapter.
        split: Split that is measured.
        limit: Measure on this many images, drawn by seed 0.
        attacks: Comma-separated, e.g. clean,pgd-20,autoattack; an unknown name is answered with all that there are.
        norm: Norm of the threat model: linf, l2, l1, or patch (a square of any pixels).
        epsilon: Comma-separated radii in [0, 1] pixels, e.g. 1/255,4/255; by default that of the adapter's tuning.
        threats: Several threat models in place of --norm and --epsilon, with their union: linf:4/255,l2:0.5,l1:12,patch:1/8.
        attack_target: tuned (white box), or frozen: attack the base model and transfer.
        attack_template: Text of a class that attacks see, if not the classifying one; as --template.
        curve: Also sweep epsilon and steps, and draw both (zero-shot and adapter).
        defence: A defence at test time in front of the classifier, e.g. ttc; attacked by every way that knows it. An unknown
            name is answered with all that there are.
        decisions: How often an image is classified where the defence is random; an even number.
        out_of_class: Data set of images of no class (name, Hub id, folder or file): measure the answer "none of these" too.
        protocol: A published evaluation protocol, such as fap (capt-peft protocols lists them): it sets attacks, step size,
            norm, epsilon, split, images and a bare CLIP's text, and what contradicts it is refused.
        corruptions: Measure accuracy under common corruptions too: all, or kinds and severities such as fog,snow-3.
        strength: Measure the adapter at this strength, 0 to 1, without writing it; by default at its own.
        signs: Look for signs of masked gradients.
        output: JSON file for the results; by default one for these settings, in ADAPTER/evaluations or outputs/evaluation.
        overwrite: Measure again, and replace what is there.
        update_card: Put the results into the adapter's folder and its model card.
        save_images: Keep the worst-case images, for capt-peft verify; their size is said.
        batch_size: Images per piece of work.
        dtype: float32; tf32 (GPUs), bfloat16 or float16 are faster and less honest.
        seed: Seed of the attacks.
        use_cpu: Do not use an accelerator.
    """

    adapter: str | None = None
    base: str | None = None
    split: str = "test"
    limit: int | None = None
    attacks: str = "clean,pgd-20"
    norm: str = "linf"
    epsilon: str = "4/255"
    threats: str | None = None
    attack_target: str = "tuned"
    attack_template: str | None = None
    curve: bool = False
    defence: str | None = None
    decisions: int = DECISIONS
    out_of_class: str | None = None
    protocol: str | None = None
    corruptions: str | None = None
    strength: float | None = None
    signs: bool = True
    output: str | None = None
    overwrite: bool = False
    update_card: bool = False
    save_images: bool = False
    batch_size: int = 128
    dtype: str = "float32"
    seed: int = 0
    use_cpu: bool = False

    @property
    def model(self) -> str:
        """What is measured."""
        return self.adapter or self.base or ""


def parse_args(argv: list[str]) -> Arguments:
    """Reads the command line, and refuses what cannot work or would have no effect before anything is loaded."""
    (args,) = Parser(Arguments).into_dataclasses(argv)
    named = args.prepare({*values_in(argv)})
    if args.adapter is None and args.base is None:
        raise ValueError("Give --adapter (folder or Hub id of a CAPT adapter) or --base (of a CLIP, zero-shot).")
    check_places(asdict(args))
    if args.threats is not None and (twice := [name for name in ("norm", "epsilon") if name in named]):
        raise ValueError(f"--threats says norms and radii: leave --{twice[0]} out.")
    if args.threats is not None and args.protocol is not None:
        raise ValueError(f"--protocol {args.protocol} says norm and radii: leave --threats out.")
    given = named
    if args.protocol is not None:
        named = settle(args, named)
    if args.adapter is not None:
        of_threats = {"norm", "epsilon"} if args.threats is not None else set()
        take_over(args, args.model, {*named, *of_threats})
        check_places(asdict(args))
    if args.protocol is not None:
        settle_data(args, given)
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype={args.dtype!r} must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
    if args.retrieval and args.dtype not in OF_FLOAT32:
        raise ValueError(
            f"dtype={args.dtype!r}: --retrieval is measured in {' or '.join(OF_FLOAT32)}. Give one of them."
        )
    if args.attack_target not in TARGETS:
        raise ValueError(f"attack_target={args.attack_target!r} is unknown. Allowed: {', '.join(TARGETS)}.")
    check_seed(args.seed)
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            why = "there would be no images to evaluate; it" if value == 0 else "it"
            raise ValueError(f"{name}={value}: {why} must be at least 1.")
    if args.attack_template is not None:
        vars(args)["attack_template"] = read_template(args.attack_template)
    if args.corruptions is not None:
        parse_corruptions(args.corruptions)
    attacks = parse_attacks(args)
    idle = [name for name in ("attack_target", "attack_template", "save_images") if name in named and not attacks]
    if idle:
        raise ValueError(f"--{idle[0]} has no effect on clean accuracy, and --attacks names no attack.")
    check_strength_option(args)
    check_defence(args, named)
    if args.adapter is None and args.attack_target == "frozen":
        raise ValueError("--attack_target frozen needs --adapter: a bare --base is the frozen model itself.")
    if args.update_card:
        if not (args.adapter and is_adapter(Path(args.adapter))):
            raise ValueError("--update_card needs a local --adapter: the folder of one, with its weights.")
        check_update(args.adapter)
    return args


def check_strength_option(args: Arguments) -> None:
    """Refuses a strength out of range, of no adapter, or other than the one that a card shows."""
    if args.strength is not None:
        if args.adapter is None:
            raise ValueError("--strength needs --adapter: it says how much of an adapter acts.")
        if args.update_card:
            raise ValueError(
                "--update_card shows figures of the strength that the adapter is stored with: leave --strength out, or store it "
                f"first with capt-peft strength {shlex.quote(args.adapter)} --set {args.strength!r}."
            )
        check_strength(args.strength)


def check_defence(args: Arguments, named: set[str]) -> None:
    """Refuses an unknown defence, and options that have no meaning with one or without."""
    if args.defence is None:
        if "decisions" in named:
            raise ValueError("--decisions needs --defence: without one, the same image gets the same answer.")
        return
    defence = parse_defence(args.defence)
    if "decisions" in named and not defence.random:
        raise ValueError(f"--decisions has no effect on {args.defence}, which is not random.")
    check_decisions(args.decisions)
    for name, why in WITHOUT_DEFENCE.items():
        if name in named and getattr(args, name):
            raise ValueError(f"--{name} cannot go with --defence: {why}. Leave one of them out.")
    if args.dtype not in OF_FLOAT32:
        raise ValueError(f"dtype={args.dtype!r}: --defence is measured in {' or '.join(OF_FLOAT32)}. Give one of them.")


def parse_attacks(args: Arguments) -> list[Any]:
    """Returns every attack under every threat model that it is built for."""
    names = [name.strip() for name in args.attacks.split(",") if name.strip()]
    if not names:
        raise ValueError(f"attacks={args.attacks!r} names nothing; --attacks clean measures clean accuracy alone.")
    threats = threats_of(args)
    for name, values in (("attacks", names), ("epsilon" if args.threats is None else "threats", threats)):
        twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
        if twice is not None:
            raise ValueError(f"--{name} names {twice} twice.")
    for threat in threats:
        if threat.norm == "linf" and threat.epsilon == 1:
            logging.warning("epsilon=1 is the whole range of a pixel; one level of 255 is written 1/255.")
    names = [name for name in names if name != "clean"]
    if args.retrieval:
        return [parse_query_attack(name, threat) for threat in threats for name in names]
    pairs = fitting(names, threats)
    # a threat model that is left without an attack is told what it needs
    pairs += [(name, threat) for threat in threats for name in names[:1] if threat not in {each for _, each in pairs}]
    parse = parse_attack if args.protocol is None else get_protocol(args.protocol).attack
    return [parse(name, threat) for name, threat in pairs]


def threats_of(args: Arguments) -> list[ThreatModel]:
    """Returns the threat models: those of --threats, or one norm with every epsilon."""
    if args.threats is None:
        return [ThreatModel(args.norm, epsilon.strip()) for epsilon in args.epsilon.split(",")]
    return [ThreatModel.from_text(text) for text in args.threats.split(",")]


def load_classifier(
    args: Arguments, class_names: Sequence[str] | None, of_task: Mapping[str, Any], device: torch.device
) -> ZeroShotClassifier:
    """Returns the classifier over these classes, by default those of the adapter; a bare CLIP takes the texts of the task."""
    name = args.model
    settings = {"class_names": class_names, **(args.texts if args.adapter else of_task)}
    if args.adapter and args.base:
        settings["base"] = args.base
    with loading(name):
        classifier = ZeroShotClassifier.from_pretrained(
            name,
            dtype=torch.float32 if args.dtype == "tf32" else getattr(torch, args.dtype),
            **settings,
        )
    adapted = isinstance(classifier.model, PeftModel)
    if adapted and not args.adapter:
        raise ValueError(
            f"--base {name} is an adapter. Measure it with --adapter, or give the CLIP that it was tuned on."
        )
    if args.adapter and not adapted:
        raise ValueError(f"--adapter {name} is a CLIP without an adapter. Measure it with --base.")
    if args.adapter and args.template is None and of_task.get("template", classifier.template) != classifier.template:
        logging.warning(
            "%s classifies with its own template, %s; the task's is %s (--template).",
            name,
            shown(classifier.template),
            shown(of_task["template"]),
        )
    if args.strength is not None:
        classifier.strength = args.strength
    return classifier.to(device)


def warn_of_calibration(classifier: ZeroShotClassifier, task: Task, split: str) -> None:
    """Warns where scores and thresholds were fitted on the images that are measured, or do not hold for this classifier."""
    adapters = adapters_in_use(classifier.model)
    configs: Any = [classifier.model.peft_config[name] for name in adapters]
    found = classifier.calibration
    if found is None and any(getattr(config, "calibration", None) for config in configs):
        why = calibration_for(classifier)[1]
        logging.warning("Scores are measured at the model's own temperature: %s.", why)
    if found is not None and (found.task, found.split) == (task.name, split):
        logging.warning(
            "The adapter was calibrated on this very split: its calibration error and rejected images look better than they are. "
            "Measure another split."
        )


def main(argv: list[str]) -> Evaluation | dict[str, Retrieval]:
    """Measures, saves and shows."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_args(argv)
    attacks = parse_attacks(args)
    # Accelerate does not see by itself that the processes of torchrun have no GPU, and each would measure everything
    state = PartialState(cpu=args.use_cpu or not torch.accelerator.is_available(), timeout=timedelta(days=7))
    if state.device.type == "cuda":
        use_tf32(args.dtype == "tf32")
    elif args.dtype == "tf32":
        raise ValueError("dtype='tf32' is for CUDA GPUs, and there is none here, or --use_cpu is given. Give float32.")
    common: dict[str, Any] = {"batch_size": args.batch_size, "seed": args.seed, "overwrite": args.overwrite}
    if args.retrieval:
        return search(args, attacks, state.device, common)
    task = load_data(args, argv)
    data = measured(task, args.split, args.limit)
    of_task = {"template": task.template, "class_texts": task.class_texts}
    classifier = load_classifier(args, task.class_names, of_task, state.device)
    output = Path(args.output or default_output(args, classifier.model))
    details, outside = {"task": record_of(task, args)}, None
    if args.out_of_class is not None:
        others = load_task(args.out_of_class)
        outside = measured(others, args.split, args.limit)
        details["out_of_class"] = record_of(others, args)
    warn_of_calibration(classifier, task, args.split)
    common["details"] = details
    if args.update_card:
        check_update(args.model, {**details, "model": describe(classifier)})
    evaluation = evaluate(
        classifier if args.defence is None else Defended(classifier, parse_defence(args.defence)),
        data,
        attacks,
        attack_target=args.attack_target,
        attack_template=args.attack_template,
        signs=args.signs,
        output=output,
        save_images=args.save_images,
        out_of_class=outside,
        protocol=args.protocol,
        corruptions=parse_corruptions(args.corruptions) if args.corruptions else (),
        decisions=args.decisions,
        **common,
    )
    if state.is_main_process:
        show(evaluation, args)
        print(f"\nSaved to {output}")
        images = None if evaluation.images is None else images_path(output)
        if evaluation.images is not None:
            print(f"The worst-case images: {images} ({evaluation.images.size})")
        if evaluation.rejection is not None and find_spec("matplotlib") is not None:
            pictures = draw_scores(evaluation, output.with_name(f"{output.stem}.scores"))
            print("The scores: " + " and ".join(map(str, pictures)))
        if args.update_card:
            print(f"The card: {update_card(args.model, evaluation, images)}")
    if args.curve:
        draw(classifier, data, args, output, common)
    return evaluation


def load_data(args: Arguments, argv: list[str]) -> Task:
    """Returns the data, by default those that the adapter was tuned on; if these are not here, the error says so."""
    try:
        return args.load()
    except FileNotFoundError as error:
        if args.adapter is None or "dataset_name" in values_in(argv):
            raise
        raise ValueError(
            f"{args.model} was tuned on {cut(args.dataset_name)}, which is not here: give --dataset_name."
        ) from error


def record_of(data: Task | CaptionedImages, args: Arguments) -> dict[str, Any]:
    """Returns which images are measured, for the record."""
    return {"name": data.name, "source": data.source, "split": args.split, "limit": args.limit}


def search(
    args: Arguments, attacks: list[QueryAttack], device: torch.device, common: dict[str, Any]
) -> dict[str, Retrieval]:
    """Measures retrieval instead of accuracy."""
    data = args.load_captions(args.split, args.limit)
    classifier = load_classifier(args, None if args.adapter else ANY_CLASSES, {}, device)
    output = Path(args.output or default_output(args, classifier.model))
    common |= {"caption_template": args.caption_template, "details": {"task": record_of(data, args)}}
    print(f"\n{args.model} on {args.dataset_name}: {len(data):,} images, {len(data.texts):,} captions")
    return measure(classifier, data, attacks, output, curve=args.curve, **common)


def show(evaluation: Evaluation, args: Arguments) -> None:
    """Prints the table, what was changed for the model, and what the signs of masked gradients say."""
    print(f"\n{args.model} on {args.dataset_name}\n\n{evaluation.table()}")
    for outcome in evaluation.attacks:
        for part in outcome.parts:
            print(
                f"  {outcome.name}, {outcome.threat_model}: {part['name']} broke {part['broken']} of {part['attacked']}"
            )
        for note in outcome.notes:
            print(f"  {outcome.threat_model}: {note}")
    if evaluation.signs:
        raised = sum(sign.raised is True for sign in evaluation.signs)
        found = (
            f"{raised} of {len(evaluation.signs)} raised: the figures above may be too high"
            if raised
            else "none raised"
        )
        print(f"\nSigns of masked gradients, {found}:")
    for sign in evaluation.signs:
        mark = "?" if sign.raised is None else "!" if sign.raised else " "
        print(f"  {mark} {sign.name.replace('_', ' ')}: {sign.sentence}")


def draw(classifier: ZeroShotClassifier, data: Dataset, args: Arguments, output: Path, common: dict[str, Any]) -> None:
    """Sweeps epsilon and steps for the adapter and its base, and draws the curves."""
    threat = threats_of(args)[-1]
    path = output.with_suffix("")
    path = path.with_name(path.name + ".curve")
    robustness_curves(classifier, data, threat, path, **common)
    if PartialState().is_main_process:
        print(f"The curves: {path}.png and {path}.svg")
