"""What the page does: checks what it is given, attacks each model, puts the outcome in words.

There is no Gradio here, and no state but the models: any number of threads may call `Page.run` at once.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from PIL import Image
from torch import Tensor

from ...attacks import PGD, LogitsFn, ThreatModel
from ...clip.classifier import ZeroShotClassifier
from ...clip.loading import load_model
from ...data import Task, load_task
from ...data.images import load_image
from ...data.loading import MADE
from ...data.texts import texts_for
from ...defences import Defended, Undefended, parse_defence
from ...randomness import example_generators
from ...results.run import RunResults
from ...tuner.config import check_template
from ...tuner.others import peft_name
from ...utils.embedded import TINY_CLIP, embedded_name, recorded_path
from ..tuned import read_record
from .defences import NO_DEFENCE, OFFERS

CLIP, CAPT = "CLIP", "CLIP + CAPT"
NONE = "“none of these”"
DIGITS, DIGITS_TEMPLATE = [str(digit) for digit in range(10)], "a photo of the digit {}."
MAX_EPSILON = 32  # levels of 255, on the page
MAX_SIDE, MAX_RATIO, MAX_BYTES = 4096, 20, 10_000_000
MAX_CLASSES, MAX_NAME, MAX_TEMPLATE, MAX_TEMPLATES, MAX_STEPS = 100, 100, 200, 100, 200
MAX_PASSES = 1000  # of one image through a defended model's image tower, in one attack
DECISIONS = 8  # of a model with a random defence, whose mean scores are shown
SHOWN = 256  # pixels that a shown image has at least
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


class Refused(ValueError):
    """Input that is not accepted; the message is one or two sentences for the user."""


class Cancelled(Exception):
    """The answer is not wanted any more."""


@dataclass(frozen=True)
class Outcome:
    """What an attack did to one model.

    Attributes:
        name: The model's name.
        true_class: The class that the attack leads away from.
        images: The image as the model sees it, the adversarial example, and the noise, as PIL images of at least 256 pixels.
        clean: Probability of each class for the image.
        attacked: The same for the adversarial example.
        rejected: Whether the answer to each of both is “none of these”, which only a calibrated adapter gives.
    """

    name: str
    true_class: str
    images: tuple[Image.Image, Image.Image, Image.Image]
    clean: dict[str, float]
    attacked: dict[str, float]
    rejected: tuple[bool, bool] = (False, False)

    @property
    def held(self) -> bool:
        """Whether the model names the true class before and after the attack."""
        return self.true_class == best(self.clean)[0] == best(self.attacked)[0] and not any(self.rejected)

    @property
    def sentence(self) -> str:
        """What happened, for people."""
        (before, p), (after, q) = best(self.clean), best(self.attacked)
        attacked = NONE if self.rejected[1] else f"“{after}” ({q:.0%})"
        if self.rejected[0]:
            return f"answers {NONE} before any attack (“{before}” comes first, {p:.0%}); attacked, {attacked}"
        if before != self.true_class:
            return f"is wrong before any attack: “{before}” ({p:.0%}), not “{self.true_class}”; attacked, {attacked}"
        if self.rejected[1]:
            return f"is not fooled, and does not know: “{before}” ({p:.0%}), and attacked {NONE}"
        if self.held:
            return f"holds: “{before}” ({p:.0%}), and attacked still “{after}” ({q:.0%})"
        return f"is fooled: “{before}” ({p:.0%}) becomes “{after}” ({q:.0%})"


def best(scores: dict[str, float]) -> tuple[str, float]:
    """Returns the class with the highest score, and the score."""
    return max(scores.items(), key=lambda item: item[1])


class Page:
    """The models, loaded once, and what a request does with them.

    The base and the base with the adapter are two models, because switching an adapter off would switch it off for
    everybody. The classifier of a request is its own; they only share the weights.

    Args:
        adapter: Folder or Hub id of a CAPT adapter; without one, only CLIP is attacked.
        base: Folder or Hub id of the CLIP; by default the adapter's, or tiny CLIP.

    Attributes:
        examples: The task that the adapter was tuned on, if its record names one that is made without files; else None.
        epsilon: L-inf epsilon to begin with, in levels of 255: the one that the adapter was tuned at, if its record has it.
        method: How the adapter's PEFT method is called: "CAPT", "LoRA", ...
    """

    def __init__(self, adapter: str | None = None, base: str | None = None) -> None:
        self.class_names, self.template = DIGITS, DIGITS_TEMPLATE
        self.class_texts: dict[str, list[str]] | None = None
        self.base, revision = base or TINY_CLIP, None
        self.examples: Task | None = None
        self.epsilon, self.method = 10.0, "CAPT"
        if adapter is not None:
            config: Any = PeftConfig.from_pretrained(adapter)
            self.method = peft_name(config.to_dict())
            if base is None:
                self.base, revision = recorded_path(config.base_model_name_or_path or ""), config.revision
            self.class_names = list(getattr(config, "class_names", None) or DIGITS)[:MAX_CLASSES]
            template = getattr(config, "template", None) or DIGITS_TEMPLATE
            self.template = template if isinstance(template, str) else "\n".join(template)
            self.class_texts = getattr(config, "class_texts", None)
            self._take_over(read_record(adapter).run)
        self.class_text = as_text(self.class_names)
        self.models = {CLIP: load_model(self.base, revision=revision)}
        if isinstance(self.models[CLIP][0], PeftModel):
            raise ValueError(
                f"{self.base} is an adapter. Give it as the adapter, and as the base the CLIP that it was tuned on."
            )
        if adapter is not None:
            self.models[CAPT] = load_model(adapter, base=base)
        for model, _ in self.models.values():
            model.requires_grad_(False)
        self._lock = threading.Lock()

    def _take_over(self, record: RunResults | None) -> None:
        """Takes what an adapter was tuned on from its record; a place that somebody else's record names is not looked into."""
        if record is None:
            return
        if record.task.source in MADE:
            task = load_task(record.task.source)
            self.examples = task if {*task.class_names} & {*self.class_names} else None
        tuned_at = ThreatModel(**record.training.attack["threat_model"])
        levels = round(2 * 255 * tuned_at.epsilon) / 2  # of the page's steps
        if tuned_at.norm == "linf" and 0 < levels <= MAX_EPSILON:
            self.epsilon = levels

    def called(self, name: str) -> str:
        """Returns what people read for a model's name: tiny CLIP is called that, never CLIP, and LoRA is not called CAPT."""
        name = name.replace("CAPT", self.method)
        return name if embedded_name(self.base) is None else name.replace("CLIP", "Tiny CLIP")

    def run(
        self,
        image: Any,
        class_names: Any,
        template: Any,
        epsilon_levels: Any,
        steps: Any,
        true_class: Any = None,
        defence: Any = NO_DEFENCE,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> tuple[list[Outcome], str]:
        """Attacks each model itself.

        Args:
            image: Path of an image file.
            class_names: The classes, separated by commas, or one a line.
            template: The text of a class; `{}` stands for its name. Several: one a line. While it is the adapter's, classes
                that have own texts in the adapter have these.
            epsilon_levels: L-inf epsilon in levels of 255, 0 to 255.
            steps: Steps of the attack, 1 to 200.
            true_class: The class to lead away from; by default each model's own clean answer.
            defence: Of both models, a name of `OFFERS`; the attack goes through it.
            cancelled: Asked before every step; True ends the attack.

        Returns:
            The outcome for each model, and sentences on what was done.

        Raises:
            Refused: Anything is not as described, or too large.
            Cancelled: `cancelled` said so.
        """
        if cancelled():
            raise Cancelled
        names, templates = read_class_names(class_names), read_templates(template)
        own = texts_for(names, self.class_texts, strict=False) if templates == self.template.splitlines() else None
        true_class, defence = read_true_class(true_class, names), read_defence(defence)
        attack = PGD(ThreatModel("linf", read_epsilon(epsilon_levels)), steps=read_steps(steps))
        picture = read_image(image)
        classifiers = list(self._classifiers(names, templates, own))
        outcomes = [attack_one(name, c, picture, attack, true_class, defence, cancelled) for name, c in classifiers]
        return outcomes, describe(attack, true_class, len(outcomes), defence)

    def _classifiers(
        self, names: list[str], templates: list[str], own: dict[str, list[str]] | None
    ) -> Iterator[tuple[str, ZeroShotClassifier]]:
        for name, (model, processor) in self.models.items():
            try:
                with self._lock:  # a tokenizer keeps its padding in itself
                    classifier = ZeroShotClassifier(model, processor, names, templates, class_texts=own)
            except ValueError as error:  # a text is too long, or so short that prompts would overwrite the class name
                raise Refused(str(error)) from error
            yield name, classifier


class Subject:
    """One model as it is attacked: what decides, and what an attack that knows its defence sees.

    Args:
        classifier: The model.
        defence: A name of `OFFERS`.
        cancelled: Asked before every step; True ends the attack.

    Attributes:
        seen: What to attack through, one after the other.
        passes: Images that the image tower runs on for one answer, once there was one.
        calibration: The adapter's, which is one of the model without a defence.
    """

    def __init__(self, classifier: ZeroShotClassifier, defence: str, cancelled: Callable[[], bool]) -> None:
        self._cancelled, self._model, self._draws = cancelled, Undefended(classifier), 1
        if defence == NO_DEFENCE:
            self._decide: LogitsFn = self._model
            self.seen, self.scores = [self._while_awaited(self._model)], lambda logits: classifier.scores(logits)[0]
            self.calibration = classifier.calibration
        else:
            known = parse_defence(defence)
            defended = Defended(classifier, known)
            self._decide = defended.surface("black-box", self._model)
            self.seen = [self._while_awaited(defended.surface(way, self._model)) for way in known.ways]
            self._draws = DECISIONS if known.random else 1
            self.scores, self.calibration = lambda logits: logits.softmax(-1).mean(0), None
        self.passes = 1

    def answers(self, images: Tensor) -> Tensor:
        """Returns the logits (R, N) of one image (1, 3, H, W); several times where the defence is random."""
        before, decide = self._model.forwards, self._while_awaited(self._decide)
        with torch.no_grad():
            logits = torch.cat([decide(images) for _ in range(self._draws)])
        self.passes = (self._model.forwards - before) // self._draws
        return logits

    def best(self, logits: Tensor) -> int:
        """Returns the class that the logits (R, N) decide for."""
        return int(logits.argmax()) if len(logits) == 1 else int(self.scores(logits).argmax())

    def _while_awaited(self, function: LogitsFn) -> LogitsFn:
        def logits_fn(images: Tensor) -> Tensor:
            if self._cancelled():
                raise Cancelled
            return function(images)

        return logits_fn


def attack_one(
    name: str,
    classifier: ZeroShotClassifier,
    picture: Image.Image,
    attack: PGD,
    true_class: str | None,
    defence: str,
    cancelled: Callable[[], bool],
) -> Outcome:
    """Attacks one model with one image; without a true class, away from the model's own answer.

    A defended model is attacked by one way after the other that knows the defence, until it is wrong.
    """
    pixels = classifier.transform(picture)[None]  # (1, 3, H, W)
    subject = Subject(classifier, defence, cancelled)
    try:
        clean = subject.answers(pixels)  # (R, N)
    except ValueError as error:  # a template with no words that R-TPT could tune
        raise Refused(str(error)) from error
    if attack.steps * subject.passes > MAX_PASSES:
        raise Refused(
            f"{OFFERS[defence].label} runs the image tower {subject.passes} times in a step: take up to "
            f"{MAX_PASSES // subject.passes} steps."
        )
    label = subject.best(clean) if true_class is None else classifier.class_names.index(true_class)
    for seen in subject.seen:
        adversarial = attack(seen, pixels, torch.tensor([label]), example_generators(0, [0], stream="evaluation"))
        attacked = subject.answers(adversarial)
        if subject.best(attacked) != label:
            break
    calibration = subject.calibration
    rejected = [calibration is not None and not calibration.accepts(logits).item() for logits in (clean, attacked)]
    before, after = (
        dict(zip(classifier.class_names, subject.scores(logits).tolist(), strict=True)) for logits in (clean, attacked)
    )
    noise = 0.5 + magnification(attack) * (adversarial - pixels)
    return Outcome(
        name,
        classifier.class_names[label],
        (to_picture(pixels), to_picture(adversarial), to_picture(noise)),
        before,
        after,
        rejected=(rejected[0], rejected[1]),
    )


def magnification(attack: PGD) -> float:
    """Returns the factor that makes the largest possible noise fill the range of a pixel."""
    epsilon = attack.threat_model.epsilon
    return 0.5 / epsilon if epsilon else 1.0


def to_picture(pixels: Tensor) -> Image.Image:
    """Returns (1, 3, H, W) pixels as an image, each pixel as a square where there are few of them."""
    array = (pixels[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    scale = max(1, math.ceil(SHOWN / min(array.shape[:2])))
    picture = Image.fromarray(array)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def describe(attack: PGD, true_class: str | None, models: int, defence: str = NO_DEFENCE) -> str:
    """Says which attack was run, under which threat model, and what counts as right."""
    who = "The model is" if models == 1 else "Each model is"
    whom = "the model's" if models == 1 else "each model's"
    truth = (
        f"The true class is “{true_class}”." if true_class else f"No true class was chosen: {whom} clean answer counts."
    )
    steps = f"{attack.steps} step{'s' if attack.steps > 1 else ''}"
    through = "its own gradients" if defence == NO_DEFENCE else f"the defence, {OFFERS[defence].label}, which it knows"
    return (
        f"{who} attacked itself (white box, through {through}) with {attack.name.upper()}: {steps} up the "
        f"cross-entropy from a random start (seed 0), {attack.threat_model} on pixels in [0, 1]. {truth} The noise is shown "
        f"× {magnification(attack):.3g}. An answer that holds may still fall to a stronger attack."
    )


def example_files(folder: str, page: Page) -> list[list[str]]:
    """Writes the first test image of each class of the page's data; returns what an example fills in.

    Returns:
        Image, classes, template and true class of each; digits where the page has no task of its own.
    """
    task, names, template = page.examples, page.class_names, page.template
    if task is None:
        task, names, template = load_task("digits"), DIGITS, DIGITS_TEMPLATE
    rows = []
    for label, name in enumerate(task.class_names):
        if name in names:
            path = os.path.join(folder, f"example_{label}.png")
            task["test"][task["test"]["label"].index(label)]["image"].save(path)
            rows.append([path, as_text(names), template, name])
    return rows


# ------------------------------------------------------------------------------------------------ what users give


def read_image(path: Any) -> Image.Image:
    """Reads an image file that may be anything; its size is known before its pixels are decoded."""
    if not isinstance(path, str) or not os.path.isfile(path):
        raise Refused("There is no image: choose an example or upload one.")
    if (size := os.path.getsize(path)) > MAX_BYTES:
        raise Refused(f"The file has {size / 1e6:.1f} MB; images of up to {MAX_BYTES / 1e6:.0f} MB are read.")
    try:
        with Image.open(path, formats=FORMATS) as opened:
            width, height = opened.size
    except Image.DecompressionBombError:
        raise Refused(f"The image is too large; up to {MAX_SIDE} pixels a side are read.") from None
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise Refused(f"The file cannot be read as an image ({', '.join(FORMATS)}).") from error
    if max(width, height) > MAX_SIDE:
        raise Refused(
            f"The image has {width} x {height} pixels; up to {MAX_SIDE} a side are read. Make it smaller first."
        )
    if max(width, height) > MAX_RATIO * min(width, height):  # resizing the short side would make the long one huge
        raise Refused(f"The image has {width} x {height} pixels; one side may be {MAX_RATIO} times the other at most.")
    try:
        return load_image(path)
    except Exception as error:
        raise Refused("The image is damaged or cut short: its pixels cannot be read.") from error


def as_text(class_names: Sequence[str]) -> str:
    """Returns class names as `read_class_names` reads them."""
    return ("\n" if any("," in name for name in class_names) else ", ").join(class_names)


def read_class_names(text: Any) -> list[str]:
    """Returns the class names in a text, in their order: one a line, or on a single line separated by commas."""
    if not isinstance(text, str):
        raise Refused("The class names must be a text, separated by commas, or one a line.")
    if text.count(",") + text.count("\n") > 10 * MAX_CLASSES or len(text) > 2 * MAX_CLASSES * MAX_NAME:
        raise Refused(f"That is too much: up to {MAX_CLASSES} class names of {MAX_NAME} characters are allowed.")
    parts = text.split("\n") if "\n" in text.strip() else text.split(",")
    names = [name for part in parts if (name := " ".join(part.split()))]
    if not 2 <= len(names) <= MAX_CLASSES:
        raise Refused(f"2 to {MAX_CLASSES} class names are needed, got {len(names)}. Separate them by commas.")
    for i, name in enumerate(names):
        if len(name) > MAX_NAME:
            raise Refused(f"“{name[:20]}…” has {len(name)} characters; a class name may have {MAX_NAME}.")
        if not name.isprintable():
            raise Refused(f"Class name {i + 1} holds characters that cannot be shown.")
        if name in names[:i]:
            raise Refused(f"“{name}” is there twice; class names must differ.")
    return names


def read_templates(text: Any) -> list[str]:
    """Returns templates, one a line, that are short, can be shown and have one place for a class name each."""
    lines = text.splitlines() if isinstance(text, str) and len(text) <= MAX_TEMPLATE * MAX_TEMPLATES else []
    if not 1 <= len(lines) <= MAX_TEMPLATES or any(
        len(line) > MAX_TEMPLATE or not line.isprintable() for line in lines
    ):
        raise Refused(
            f"The template must be one line of up to {MAX_TEMPLATE} characters, or up to {MAX_TEMPLATES} of them."
        )
    try:
        check_template(lines)
    except ValueError:
        raise Refused(
            "The template must hold {} once, the place of the class name, and no other braces; several must differ."
        ) from None
    return lines


def read_true_class(text: Any, names: list[str]) -> str | None:
    """Returns the true class, or None if none was chosen."""
    if text is None or text == "":
        return None
    if not isinstance(text, str) or " ".join(text.split()) not in names:
        raise Refused(f"The true class {shorten(text)} is not among the class names.")
    return " ".join(text.split())


def read_defence(name: Any) -> str:
    """Returns the name of a defence that the page offers."""
    if not isinstance(name, str) or name not in OFFERS:
        raise Refused(f"The defence {shorten(name)} is not one of {', '.join(OFFERS)}.")
    return name


def read_epsilon(levels: Any) -> float:
    """Returns epsilon in [0, 1] from levels of 255."""
    if isinstance(levels, bool) or not isinstance(levels, int | float) or not 0 <= levels <= 255:  # NaN too
        raise Refused(f"Epsilon must be 0 to 255 levels (255 is the whole range, 1), got {shorten(levels)}.")
    return levels / 255


def read_steps(steps: Any) -> int:
    """Returns the number of attack steps."""
    number = not isinstance(steps, bool) and isinstance(steps, int | float)
    if not number or not 1 <= steps <= MAX_STEPS or steps != int(steps):
        raise Refused(f"The attack takes a whole number of steps from 1 to {MAX_STEPS}, got {shorten(steps)}.")
    return int(steps)


def shorten(value: Any) -> str:
    """Returns what was given, for a message."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return text if len(text) <= 40 else text[:40] + "…"
