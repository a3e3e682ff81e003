"""CaptConfig: the shape of a CAPT adapter and where it came from."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType
from peft.utils import CONFIG_NAME

from ..utils.text import cut, shown
from .calibration import Calibration
from .loading import PICKLE_NAME, SAFETENSORS_NAME, check_adapter_files


class CaptPeftType(str, Enum):  # noqa: UP042  (PEFT's own PeftType is a (str, Enum); a StrEnum prints differently)
    """The PEFT type of CAPT. An enum hashes by name and equals by value, so the two must be the same word."""

    CAPT = "CAPT"


# A PeftType.CAPT inside PEFT, should there ever be one, wins.
CAPT: Any = getattr(PeftType, "CAPT", CaptPeftType.CAPT)
COUPLINGS = ("none", "text_to_vision", "vision_to_text")
DEFAULT_TEMPLATE = "a photo of a {}."
INITS = ("template", "random", "normal")
DEFAULT_DEPTH = 9
DEFAULT_VISION_TOKENS = 8
MAX_BYTES = 1 << 24  # of a configuration file: class names by the hundred thousand
MAX_TOKENS = 1000  # five times the patches of a ViT-B/16; more is a mistake, and would fill the memory
NUMBERS = ("num_text_tokens", "num_vision_tokens", "text_depth", "vision_depth")
TYPES: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (NUMBERS, int, "an integer"),
    (("coupling", "init"), str, "a string"),
    (("base_model_name_or_path", "revision", "base_model_fingerprint"), str | None, "a string or None"),
    (("auto_mapping", "calibration"), dict | None, "a dictionary or None"),
    (("class_specific",), bool, "True or False"),
    (("init_std", "strength"), int | float, "a number"),
)


class OtherMethodError(ValueError):
    """An adapter's configuration is of another PEFT method than CAPT."""


# set by `capt_peft` itself: writes the model card of an adapter that is being saved (folder, configuration, whether its
# weights are in the folder already)
write_saved_card: Callable[[Path, CaptConfig, bool], None] | None = None


@dataclass
class CaptConfig(PeftConfig):
    """Configuration of a `CaptModel`.

    Args:
        num_text_tokens: Number of text prompts per layer; they replace the tokens 1..n after the start token, or the first n on
            SigLIP, which has none. At most 1000, as for vision, and no more than the model's texts have room for.
        num_vision_tokens: Number of vision prompts per layer; they are appended to the patches. By default 8, or, for coupled
            prompts, as many as there are text prompts.
        text_depth: Number of text layers with prompts of their own; 0 switches the text prompts off, 1 is the input only.
            The default, 9, is cut to the depth of the model.
        vision_depth: The same for the vision tower.
        coupling: `"none"` (the default; it learned best on validation images): both towers have prompts of their own.
            `"text_to_vision"` (MaPLe, arXiv 2210.03117): the text prompts are the parameters, each vision prompt is a linear
            map of its text prompt. `"vision_to_text"` (FAP, arXiv 2403.14774): as before at the input, but deeper prompts
            live in the vision tower and are mapped to text.
        template: The text of a class while tuning; `{}` stands for the class name. The prompts replace its first words. A list:
            a class has one text of each template, and its feature is their normalised mean, as CLIP's authors have it; the
            prompts start from the first.
        init: `"template"`: text prompts start as the states that the frozen text tower has at their places, so that a new
            adapter leaves the text features as they were. SigLIP's deeper states depend on the whole text: there class-specific
            prompts start from those in the text of their class, which stays as it was, and others from the mean over (up to 64
            of) `class_names`, or from those in the template's first words alone, which changes the features a little.
            `"random"`: as MaPLe does, the input prompts start from the template's token embeddings, the deeper ones from
            N(0, `init_std`), and the maps between the towers behind the input are copies of one. `"normal"`: as CoOp and APT do,
            every prompt starts from N(0, `init_std`), those of the input too.
        init_std: Standard deviation of the random start.
        template_token_ids: Token ids of the template up to the class name, with the start token if there is one. Filled from the
            tokenizer of the base model when it has one.
        class_names: The class names that the adapter was tuned on. For the record: any others can be used, unless the text
            prompts are class-specific.
        class_specific: Every class has text prompts of its own, as in APT's (arXiv 2403.01849) and CoOp's class-specific
            context. Needs `class_names`, and knows no classes but these, in their order.
        base_model_fingerprint: Hash of the base weights that the prompts were tuned on; filled in.
        strength: How much of the adapter acts, from 0 (the base model, bitwise) to 1 (all of it, the default); see
            `CaptModel.set_strength`, which changes it.
        calibration: Temperature and thresholds that were fitted on validation images, and what they hold for: the fields of
            `Calibration`. `capt-peft calibrate` fills it in; it changes no logits.
        target_modules: Not used; the places of the prompts follow from the model's structure.
        modules_to_save: Further modules of the base model to train and save, as in every PEFT method.
        class_texts: Own texts, by class name: a list for each class that has them, in place of the template's; `{}` in
            a text stands for the class name.

    Raises:
        TypeError: A field of another type.
        ValueError: A field out of range, or fields that contradict each other.
    """

    num_text_tokens: int = 2
    num_vision_tokens: int | None = None
    text_depth: int = DEFAULT_DEPTH
    vision_depth: int = DEFAULT_DEPTH
    coupling: str = "none"
    template: str | list[str] = DEFAULT_TEMPLATE
    init: str = "template"
    init_std: float = 0.02
    template_token_ids: list[int] | None = None
    class_names: list[str] | None = None
    class_specific: bool = False
    base_model_fingerprint: str | None = None
    strength: float = 1.0
    calibration: dict[str, Any] | None = None
    target_modules: list[str] | None = None  # BaseTuner reads the attribute
    modules_to_save: list[str] | None = None
    class_texts: dict[str, list[str]] | None = None

    def __post_init__(self) -> None:
        if self.task_type is not None:  # before PEFT, whose own message has no bound
            raise ValueError(
                f"task_type={shown(self.task_type)}: CAPT adds no head for a task, and PEFT's model of a task takes no images. "
                "Leave it out (None)."
            )
        super().__post_init__()
        self.peft_type = CAPT
        if self.num_vision_tokens is None:
            self.num_vision_tokens = DEFAULT_VISION_TOKENS if self.coupling == "none" else self.num_text_tokens
        self._check_types()
        self._check_values()
        self._check_coupling()
        self._check_class_specific()
        self.strength = float(self.strength)

    def _check_types(self) -> None:
        for names, kind, words in TYPES:
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                    raise TypeError(f"{name}={shown(value)} must be {words}, not {type(value).__name__}.")
        lists: list[tuple[str, type]] = [("template_token_ids", int), ("class_names", str), ("modules_to_save", str)]
        for name, kind in lists:
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, list | tuple) or not all(type(entry) is kind for entry in value):
                raise TypeError(f"{name}={shown(value)} must be a list of {kind.__name__}.")
            setattr(self, name, list(value))

    def _check_values(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name}={shown(value)} must not be negative; 0 switches the tower off.")
            if value > MAX_TOKENS:
                raise ValueError(f"{name}={shown(value)} is too many: {MAX_TOKENS} or fewer are allowed.")
        for name, allowed in (("coupling", COUPLINGS), ("init", INITS)):
            if getattr(self, name) not in allowed:
                words = ", ".join(map(repr, allowed))
                raise ValueError(f"{name}={shown(getattr(self, name))} is unknown. Allowed: {words}.")
        if not 0 <= self.init_std <= sys.float_info.max:  # NaN fails too
            raise ValueError(f"init_std={shown(self.init_std)} must be a finite number, 0 or more.")
        check_strength(self.strength, self.modules_to_save)
        if self.calibration is not None:
            Calibration.from_dict(self.calibration)
        self.template = check_template(self.template)
        self.class_texts = check_class_texts(self.class_texts)
        templates = [self.template] if isinstance(self.template, str) else self.template
        own = [text for name, texts in (self.class_texts or {}).items() for text in (name, *texts)]
        for text in (*templates, *(self.class_names or []), *own):
            if not text.isascii() and text != text.encode(errors="replace").decode():
                raise ValueError(f"{shown(text)} holds a half of a character (a lone surrogate); write the text again.")
        if self.target_modules is not None:
            raise ValueError(
                f"target_modules={shown(self.target_modules)}: CAPT finds its places itself; use text_depth and vision_depth."
            )
        if self.template_token_ids is not None and min(self.template_token_ids, default=-1) < 0:
            raise ValueError(
                f"template_token_ids={shown(self.template_token_ids)} must be token ids, 0 or more, and not empty."
            )
        if not self.depth("text") and not self.depth("vision"):
            raise ValueError(
                "The adapter has no prompts at all: give one tower a depth and a number of tokens above 0."
            )

    def _check_coupling(self) -> None:
        if self.coupling == "none":
            return
        for what, text, vision in (
            ("numbers of tokens", self.num_text_tokens, self.num_vision_tokens),
            ("depths", self.text_depth, self.vision_depth),
        ):
            if text != vision:
                raise ValueError(
                    f"Coupled prompts (coupling={self.coupling!r}) need equal {what} in both towers, got {text} for text "
                    f"and {vision} for vision. Make them equal, or set coupling='none'."
                )

    def _check_class_specific(self) -> None:
        if not self.class_specific:
            return
        if self.coupling != "none":
            raise ValueError(
                f"class_specific=True needs coupling='none', got {self.coupling!r}: a coupled vision prompt would depend on the "
                "class, which an image does not tell. Set coupling='none', or class_specific=False."
            )
        if not self.depth("text"):
            raise ValueError(
                f"class_specific=True needs text prompts, got text_depth={self.text_depth} and num_text_tokens="
                f"{self.num_text_tokens}. Set both to 1 or more, or class_specific=False."
            )
        if not self.class_names:
            raise ValueError(
                f"class_specific=True needs the classes that get text prompts of their own, got class_names={self.class_names}. "
                "Give their names in order, class_names=['cat', 'dog'], or set class_specific=False."
            )

    @property
    def first_template(self) -> str:
        """The template, and of several the first, from whose words the text prompts start."""
        return self.template if isinstance(self.template, str) else self.template[0]

    def depth(self, tower: str) -> int:
        """Returns the number of layers of `tower` ("text" or "vision") that get prompts; 0: the tower is left as it is."""
        depth = self.text_depth if tower == "text" else self.vision_depth
        return depth if self.num_tokens(tower) else 0

    def num_tokens(self, tower: str) -> int:
        """Returns the number of prompts per layer of `tower` ("text" or "vision")."""
        return self.num_text_tokens if tower == "text" else int(self.num_vision_tokens or 0)

    def prompt_shape(self, tower: str) -> tuple[int, ...]:
        """Returns the shape of one layer's prompts of `tower`, without its width: (n,), or (N, n) where class-specific."""
        classes = (len(self.class_names or []),) if self.class_specific and tower == "text" else ()
        return (*classes, self.num_tokens(tower))

    def owner(self, index: int) -> str | None:
        """Returns the tower whose prompts are the parameters at layer `index`, None where both have their own."""
        if self.coupling == "none":
            return None
        return "vision" if self.coupling == "vision_to_text" and index > 0 else "text"

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> CaptConfig:
        """Loads the configuration of an adapter as PEFT does, and makes sure that its weights file can be read.

        Raises:
            ValueError: There is no configuration; it is damaged, of another method, or a field of it is out of range or of
                another type; or the weights are a pickle, or a file that is cut short or damaged.
        """
        try:
            config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (TypeError, ValueError, RecursionError) as error:
            if str(error).startswith("Can't find"):
                raise
            path = os.path.join(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
            if isinstance(error, OtherMethodError):
                raise OtherMethodError(f"{path} is not that of a CAPT adapter: {cut(error)}") from error
            raise ValueError(
                f"{path} cannot be used: {cut(error)} Correct it, or download the adapter again."
            ) from error
        # no dataclass fields, so that they are never saved
        config._weights_file, config._weights_shapes = check_adapter_files(
            pretrained_model_name_or_path, subfolder, kwargs
        )
        loaded: CaptConfig = config
        return loaded

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Reads a configuration file for `from_pretrained`; a ValueError unless it is a JSON object up to 16 MB, CAPT's."""
        if os.path.getsize(path_json_file) > MAX_BYTES:
            raise ValueError(f"it has {os.path.getsize(path_json_file):,} bytes; up to {MAX_BYTES:,} are read.")
        try:
            content = super().from_json_file(path_json_file, **kwargs)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"it is not a JSON object ({cut(error)}).") from error
        if not isinstance(content, dict):
            raise ValueError(f"it is not a JSON object but a {type(content).__name__}.")
        if content.get("peft_type") != CAPT:
            raise OtherMethodError(f"its peft_type is {shown(content.get('peft_type'))}.")
        return content

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes the configuration, as PEFT does after an adapter's weights, and the model card: whoever saves calls this.

        PEFT does not tell an adapter of `safe_serialization=False` before it has written the weights; they are left there,
        without a configuration.

        Raises:
            ValueError: The weights in the folder are a pickle, which cannot be loaded again.
        """
        pickled = os.path.join(save_directory, PICKLE_NAME)
        if os.path.isfile(pickled) and not os.path.isfile(os.path.join(save_directory, SAFETENSORS_NAME)):
            raise ValueError(
                f"{pickled} is a pickle, which capt_peft does not load. Leave out safe_serialization=False, or remove the file."
            )
        after_weights = "auto_mapping_dict" in kwargs  # PEFT's way; transformers writes the weights afterwards
        super().save_pretrained(save_directory, **kwargs)
        if write_saved_card is not None:
            write_saved_card(Path(save_directory), self, after_weights)


def check_strength(strength: float, modules_to_save: Sequence[str] | None = None) -> None:
    """Raises a ValueError unless an adapter, with `modules_to_save` or without, can have this strength."""
    if not 0 <= strength <= 1:  # NaN fails too
        raise ValueError(f"strength={shown(strength)} must be from 0 (the base model) to 1 (the whole adapter).")
    if strength != 1 and modules_to_save:
        raise ValueError(
            f"strength={strength} needs an adapter of prompts alone: modules_to_save={shown(list(modules_to_save))} act wholly "
            "or not at all. Set strength=1, or tune without modules_to_save."
        )


def check_template(template: str | Sequence[str]) -> str | list[str]:
    """Returns a template, or several as a list; a single one of a list is returned by itself.

    Raises:
        TypeError: Something else than a string, a list or a tuple of strings.
        ValueError: One without exactly one place for the class name, `{}`, or with other braces; none; or one twice.
    """
    several = [template] if isinstance(template, str) else template
    if not isinstance(several, list | tuple) or not all(isinstance(one, str) for one in several):
        raise TypeError(
            f"template={shown(template)} must be a string or a list of strings, not {type(template).__name__}."
        )
    for one in several:
        if one.count("{}") != 1 or one.count("{") + one.count("}") != 2:
            raise ValueError(
                f"template={shown(one)} must hold exactly one {{}}, the place of the class name, and no other braces."
            )
    twice = _given_twice(several)
    if twice is not None:
        raise ValueError(f"template={shown(twice)} is given twice, and would count twice. Take one of them out.")
    if not several:
        raise ValueError("template=[] has no template. Give one or more, as 'a photo of a {}.'.")
    return several[0] if len(several) == 1 else list(several)


def check_class_texts(class_texts: Mapping[str, str | Sequence[str]] | None) -> dict[str, list[str]] | None:
    """Returns the texts of classes as lists by class name; None where no class has any.

    Raises:
        TypeError: Something else than a mapping of names to strings, or to lists or tuples of strings.
        ValueError: A class with no text, an empty one, or one twice; or more text than an adapter's configuration may hold.
    """
    if class_texts is None:
        return None
    if not isinstance(class_texts, Mapping) or not all(isinstance(name, str) for name in class_texts):
        raise TypeError(
            f"class_texts={shown(class_texts)} must map class names to lists of texts, as {{'crane': ['a bird', ...]}}."
        )
    found = {}
    for name, given in class_texts.items():
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"The texts of class {shown(name)} are {shown(given)}; they must be a list of strings.")
        if not texts or not all(text.strip() for text in texts):
            what = "an empty text" if texts else "no text"
            raise ValueError(f"Class {shown(name)} has {what} in class_texts. Give it a text, or leave the class out.")
        twice = _given_twice(texts)
        if twice is not None:
            raise ValueError(
                f"Class {shown(name)} has the text {shown(twice)} twice, and it would count twice. Take one of them out."
            )
        found[name] = list(texts)
    if len(json.dumps(found)) > MAX_BYTES // 2:
        raise ValueError(
            f"class_texts has {len(json.dumps(found)):,} characters; up to {MAX_BYTES // 2:,} are stored with an adapter. Give "
            "fewer texts per class."
        )
    return found or None


def _given_twice(texts: Sequence[str]) -> str | None:
    return next((text for text, count in Counter(texts).items() if count > 1), None)
