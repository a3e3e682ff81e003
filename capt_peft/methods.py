"""Named recipes: which prompts or other adapter, which objective and which attack. None has a trainer of its own.

A setting comes from one of three places, with the same precedence in `capt-peft train` and in a benchmark:

1. What a method **is** (`Method.fixed`): "adv-vp" has no text prompts. Another value is refused.
2. What a user **asks for**: on the command line, in a file, or in a benchmark's plan or suite. What has no effect is refused.
3. What the method's **recipe** has (`Method.defaults`), where nothing else is asked for; of another adapter than prompts, what
   that has (`Adapter.training`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from peft import BOFTConfig, IA3Config, LNTuningConfig, LoraConfig, PeftConfig, get_peft_model
from torch import nn

from .data.task import Task
from .objectives import AdversarialCrossEntropy, CaptObjective, FapObjective, Objective, PmgAftObjective
from .training import CaptTrainer, CaptTrainingArguments
from .tuner import CaptConfig
from .utils.text import cut, shown

# settings of objectives: a method has no use for those that its own objective does not name in `uses`
OBJECTIVE_SETTINGS = ("consistency", "weighting", "frozen_term", "teacher")
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
        any_adapter: Whether its objective is what it is known for, so that another adapter can take the place of its prompts.
    """

    source: str
    objective: Callable[[CaptTrainingArguments], Objective] | None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    uses: tuple[str, ...] = ()
    no_prompts: tuple[str, ...] = ()
    any_adapter: bool = False

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
        lambda args: CaptObjective(args.consistency, args.weighting, args.frozen_term),
        uses=OBJECTIVE_SETTINGS,
        any_adapter=True,
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
        any_adapter=True,
    ),
    "pmg-aft": Method(
        "the objective of arXiv 2401.04350, on prompts as CAPT has them",
        lambda args: PmgAftObjective(args.consistency),
        defaults={"consistency": 1.0},
        uses=("consistency", "teacher"),
        any_adapter=True,
    ),
    "adv-maple": Method("AdvMaPLe of arXiv 2403.14774, as in its code", _adversarial, _FAP_PROMPTS, _FAP_TRAINING),
    "adv-vlp": Method(
        "independent prompts; AdvVLP of arXiv 2403.14774, trained as CAPT is",
        _adversarial,
        {"coupling": "none"},
        any_adapter=True,
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


@dataclass(frozen=True)
class Adapter:
    """A method of PEFT that takes the place of prompts, in both towers of a CLIP.

    Args:
        config: Its configuration.
        settings: Fields of it that are not as PEFT has them: where in a CLIP it acts.
        training: Fields of `CaptTrainingArguments` that it is trained with by default.
    """

    config: Callable[..., PeftConfig]
    settings: Mapping[str, Any]
    training: Mapping[str, Any]


PROMPTS = "prompts"
# the learning rates are not tuned: one or two each were looked at on validation images of the digits
ADAPTERS: dict[str, Adapter] = {
    "lora": Adapter(
        LoraConfig, {"target_modules": ["q_proj", "v_proj"]}, {"optim": "adamw_torch", "learning_rate": 5e-3}
    ),
    "ln": Adapter(
        LNTuningConfig,
        {"target_modules": ["pre_layrnorm", "layer_norm1", "layer_norm2", "post_layernorm", "final_layer_norm"]},
        {"optim": "adamw_torch", "learning_rate": 1e-2},
    ),
    "ia3": Adapter(
        IA3Config,
        {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
        {"optim": "adamw_torch", "learning_rate": 5e-2},
    ),
    "boft": Adapter(
        BOFTConfig, {"target_modules": ["q_proj", "v_proj"]}, {"optim": "adamw_torch", "learning_rate": 2e-2}
    ),
}
# what a run itself says about texts, and any adapter keeps
_TEXTS = ("template", "class_names", "class_texts")


def get_adapter(peft: str) -> Adapter:
    """Returns what takes the place of prompts, by name; a ValueError names those that there are."""
    if peft not in ADAPTERS:
        raise ValueError(f"Unknown peft {shown(peft, 40)}. Allowed: {', '.join([PROMPTS, *ADAPTERS])}.")
    return ADAPTERS[peft]


def adapter_config(peft: str, given: Mapping[str, Any]) -> PeftConfig:
    """Returns the configuration of an adapter that takes the place of prompts.

    Args:
        peft: A name of `ADAPTERS`.
        given: Fields of PEFT's configuration, such as `r`, that win over the recipe's.

    Raises:
        ValueError: An unknown name or field, or a value that PEFT refuses.
    """
    adapter = get_adapter(peft)
    known = [f.name for f in fields(adapter.config) if f.init]  # type: ignore[arg-type]
    for name in given:
        if name not in known or name in PeftConfig.__dataclass_fields__:
            raise ValueError(
                f"peft_kwargs: {shown(name, 40)} is not a setting of {peft}. See PEFT's {adapter.config.__name__}."
            )
    try:
        return adapter.config(**{**adapter.settings, **given})
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft_kwargs={shown(dict(given), 100)}: {cut(error, 200)}") from error


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


def conflicts(name: str, asked: Mapping[str, Any], peft: str = PROMPTS) -> dict[str, str]:
    """Returns the settings that contradict a method, or have no effect on it, each with a sentence that says so.

    A setting that is None was not asked for. The default value of a setting without effect is let pass.
    """
    method = get_method(name)
    if peft != PROMPTS:
        return _conflicts_of_adapter(name, asked, peft)
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


def _conflicts_of_adapter(name: str, asked: Mapping[str, Any], peft: str) -> dict[str, str]:
    method, found = get_method(name), {}
    get_adapter(peft)
    if not method.any_adapter:
        others = ", ".join(other for other, known in METHODS.items() if known.any_adapter)
        found["method"] = (
            f"The method {name!r} is what its prompts are, so that peft={peft!r} would make another of it. Leave one of them "
            f"out, or choose {others}, whose objective any adapter can have."
        )
    for setting, value in asked.items():
        given = f"{setting}={shown(value, 100)}"
        if setting in PROMPT_FIELDS.difference(_TEXTS) and value != _PLAIN.get(setting) and value is not None:
            found[setting] = f"{given} is about prompts and has no effect on peft={peft!r}. Leave one of them out."
        elif setting in method.unused and value is not None and value != _PLAIN.get(setting):
            found[setting] = f"{given} has no effect on the method {name!r}. Leave it out, or choose another method."
    return found


def method_settings(name: str, asked: Mapping[str, Any], peft: str = PROMPTS) -> dict[str, Any]:
    """Returns a method's settings: its recipe's, what is asked for on top of them, and what the method is.

    Args:
        name: Name or alias of the method.
        asked: What is asked for.
        peft: What is tuned: prompts, or a name of `ADAPTERS`.

    Raises:
        ValueError: An unknown name, or a setting that contradicts the method or has no effect on it.
    """
    method = get_method(name)
    for sentence in conflicts(name, asked, peft).values():
        raise ValueError(sentence)
    # asked for one of the two ways to bring an image to the model's size, a recipe's other one is out
    other = {"squash": "augment", "augment": "squash"}
    recipe = {name: value for name, value in method.defaults.items() if not asked.get(other.get(name, ""))}
    if peft == PROMPTS:
        return {**recipe, **asked, **method.fixed}
    of_training = {name: value for name, value in recipe.items() if name not in PROMPT_FIELDS}
    return {**of_training, **get_adapter(peft).training, **asked}


def check_peft(name: str, peft: str, peft_kwargs: Mapping[str, Any] | None) -> None:
    """Raises a ValueError, before anything is loaded, for an adapter that the method cannot have or settings of none."""
    for sentence in conflicts(name, {}, peft).values():
        raise ValueError(sentence)
    if peft != PROMPTS:
        adapter_config(peft, peft_kwargs or {})
    elif peft_kwargs:
        raise ValueError(
            f"peft_kwargs={shown(dict(peft_kwargs), 100)} has no effect on prompts, whose settings are options of their own. "
            f"Leave it out, or give peft: {', '.join(ADAPTERS)}."
        )


def make_trainer(
    name: str,
    base: nn.Module,
    args: CaptTrainingArguments,
    *,
    task: Task,
    processor: Any,
    prompts: Mapping[str, Any],
    teacher: str | None = None,
    peft: str = PROMPTS,
    peft_kwargs: Mapping[str, Any] | None = None,
) -> CaptTrainer:
    """Returns the trainer of a method, with new prompts, or another new adapter, on a CLIP.

    Args:
        name: Name or alias of the method.
        base: The CLIP.
        args: The training arguments, with the settings of the method (see `method_settings`).
        task: The images, and the class names and their texts.
        processor: The processor of the CLIP.
        prompts: Other fields of `CaptConfig`.
        teacher: See `CaptTrainer`.
        peft: What is tuned: prompts, or a name of `ADAPTERS`.
        peft_kwargs: Fields of PEFT's configuration of the latter, as for `adapter_config`.

    Raises:
        ValueError: An unknown method or adapter, a method that tunes nothing, or settings that contradict each other.
    """
    check_peft(name, peft, peft_kwargs)
    method = get_method(name)
    if method.objective is None:
        raise ValueError(f"The method {name!r} tunes nothing.")
    if peft == PROMPTS:
        texts = {"template": task.template, "class_names": list(task.class_names), "class_texts": task.class_texts}
        config: PeftConfig = CaptConfig(**{**prompts, **texts})
    else:
        config = adapter_config(peft, peft_kwargs or {})
    with warnings.catch_warnings():
        # of layers that other tuners do not know, and of a CUDA extension that is not needed
        expected = "Unsupported layer type|Failed to load the CUDA extension|Setting boft_n_butterfly"
        warnings.filterwarnings("ignore", expected)
        model: Any = get_peft_model(base, config)
    objective = method.objective(args)
    return CaptTrainer(model, args, task=task, processor=processor, objective=objective, teacher=teacher)
