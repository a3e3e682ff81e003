"""Named recipes: which prompts, which objective and which attack. None has a trainer of its own.

A setting comes from one of three places, with the same precedence in `capt-peft train` and in a benchmark:

1. What a method **is** (`Method.fixed`): "adv-vp" has no text prompts. Another value is refused.
2. What a user **asks for**: on the command line, in a file, or in a benchmark's plan or suite. What has no effect is refused.
3. What the method's **recipe** has (`Method.defaults`), where nothing else is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from peft import get_peft_model
from torch import nn

from .data.task import Task
from .objectives import AdversarialCrossEntropy, CaptObjective, FapObjective, Objective
from .training import CaptTrainer, CaptTrainingArguments
from .tuner import CaptConfig
from .utils.text import shown

# settings of objectives: a method has no use for those that its own objective does not name in `uses`
OBJECTIVE_SETTINGS = ("consistency", "weighting", "teacher")
# CoOp's toolbox (Dassl), on which the released code of FAP and APT is built
_TOOLBOX = {"weight_decay": 5e-4, "decay_biases": True, "lr_schedule": "epoch", "dataloader_drop_last": True}
# FAP's released code, for FAP and for its AdvMaPLe: deep vision prompts are mapped to text in both
_FAP_PROMPTS = {"coupling": "vision_to_text"}
_FAP_TRAINING = {**_TOOLBOX, "init": "random", "squash": True}


@dataclass(frozen=True)
class Method:
    """A way to tune prompts on adversarial images.

    Args:
        source: Paper that it comes from.
        objective: Makes the objective from the training arguments; None: nothing is tuned.
        fixed: Fields of `CaptConfig` and `CaptTrainingArguments` that make the method what it is.
        defaults: Other fields of them that its recipe sets, and that users may change.
        uses: Those of `OBJECTIVE_SETTINGS` that its objective has.
        no_prompts: Fields of `CaptConfig` that have no effect on it.
    """

    source: str
    objective: Callable[[CaptTrainingArguments], Objective] | None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    uses: tuple[str, ...] = ()
    no_prompts: tuple[str, ...] = ()

    @property
    def unused(self) -> tuple[str, ...]:
        """The settings that have no effect on it."""
        tuned = () if self.objective is None else OBJECTIVE_SETTINGS
        return (*(name for name in tuned if name not in self.uses), *self.no_prompts)


PROMPT_FIELDS = frozenset(f.name for f in fields(CaptConfig))
_PLAIN = {f.name: f.default for kind in (CaptConfig, CaptTrainingArguments) for f in fields(kind)}


def _adversarial(args: CaptTrainingArguments) -> Objective:
    return AdversarialCrossEntropy()


METHODS: dict[str, Method] = {
    "zero-shot": Method("the hand-written template (arXiv 2103.00020); nothing is tuned", None),
    "capt": Method(
        "arXiv 2405.11154",
        lambda args: CaptObjective(args.consistency, args.weighting),
        uses=OBJECTIVE_SETTINGS,
    ),
    "trades-maple": Method(
        "arXiv 1901.08573 with the prompts of arXiv 2210.03117",
        lambda args: CaptObjective(args.consistency, 0.0),
        {"coupling": "text_to_vision"},
        uses=("consistency",),
    ),
    "fap": Method(
        "arXiv 2403.14774, as in its code",
        lambda args: FapObjective(args.consistency),
        _FAP_PROMPTS,
        {**_FAP_TRAINING, "attack_loss": "kl"},
        uses=("consistency",),
    ),
    "adv-maple": Method("AdvMaPLe of arXiv 2403.14774, as in its code", _adversarial, _FAP_PROMPTS, _FAP_TRAINING),
    "adv-vlp": Method(
        "independent prompts; AdvVLP of arXiv 2403.14774, trained as CAPT is",
        _adversarial,
        {"coupling": "none"},
    ),
    "adv-vp": Method(
        "deep vision prompts alone, trained as CAPT is",
        _adversarial,
        {"coupling": "none", "text_depth": 0},
        no_prompts=("num_text_tokens", "init", "class_specific"),
    ),
    "adv-tp": Method(
        "arXiv 2403.01849 (APT), as in its code",
        _adversarial,
        {"coupling": "none", "text_depth": 1, "vision_depth": 0},
        {**_TOOLBOX, "init": "normal", "attack_clip_each_step": False},
        no_prompts=("num_vision_tokens",),
    ),
}
ALIASES = {"apt": "adv-tp"}


def method_name(name: str) -> str:
    """Returns the name under which `METHODS` has a method; a ValueError names those that there are."""
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise ValueError(f"Unknown method {name!r}. Allowed: {', '.join([*METHODS, *ALIASES])}.")
    return name


def get_method(name: str) -> Method:
    """Returns a method by name or alias.

    Raises:
        ValueError: An unknown name.
    """
    return METHODS[method_name(name)]


def conflicts(name: str, asked: Mapping[str, Any]) -> dict[str, str]:
    """Returns the settings that contradict a method, or have no effect on it, each with a sentence that says so.

    A setting that is None was not asked for. The default value of a setting without effect is let pass.
    """
    method = get_method(name)
    found = {}
    for setting, value in asked.items():
        if value is None:
            continue
        given = f"{setting}={shown(value, 100)}"
        if setting in method.fixed and value != method.fixed[setting]:
            found[setting] = (
                f"The method {name!r} has {setting}={method.fixed[setting]!r} by definition, but {given} is asked for. Leave it "
                "out, or choose another method."
            )
        elif setting in method.unused and value != _PLAIN.get(setting):
            found[setting] = f"{given} has no effect on the method {name!r}. Leave it out, or choose another method."
    return found


def method_settings(name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a method's settings: its recipe's, what is asked for on top of them, and what the method is.

    Raises:
        ValueError: An unknown name, or a setting that contradicts the method or has no effect on it.
    """
    method = get_method(name)
    for sentence in conflicts(name, asked).values():
        raise ValueError(sentence)
    return {**method.defaults, **asked, **method.fixed}


def make_trainer(
    name: str,
    base: nn.Module,
    args: CaptTrainingArguments,
    *,
    task: Task,
    processor: Any,
    prompts: Mapping[str, Any],
    teacher: str | None = None,
) -> CaptTrainer:
    """Returns the trainer of a method, with new prompts on a CLIP.

    Args:
        name: Name or alias of the method.
        base: The CLIP.
        args: The training arguments, with the settings of the method (see `method_settings`).
        task: The images, and the class names and their texts.
        processor: The processor of the CLIP.
        prompts: Other fields of `CaptConfig`.
        teacher: See `CaptTrainer`.

    Raises:
        ValueError: An unknown method, or one that tunes nothing.
    """
    method = get_method(name)
    if method.objective is None:
        raise ValueError(f"The method {name!r} tunes nothing.")
    texts = {"template": task.template, "class_names": list(task.class_names), "class_texts": task.class_texts}
    config = CaptConfig(**{**prompts, **texts})
    model = get_peft_model(base, config)
    objective = method.objective(args)
    return CaptTrainer(model, args, task=task, processor=processor, objective=objective, teacher=teacher)
