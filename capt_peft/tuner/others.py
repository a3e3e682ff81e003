"""Adapters of other PEFT methods: how they are loaded, and what is kept beside them, where their configurations have no place."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file
from torch import nn

from ..utils.files import DamagedFileError, read_json, write_json
from ..utils.text import cut, shown
from .config import MAX_BYTES, CaptConfig, OtherMethodError, check_class_texts, check_template
from .fingerprint import SAFETENSORS_NAME, adapter_fingerprint, base_fingerprint
from .loading import AGAIN, HUB_ARGUMENTS, check_adapter_files, check_adapter_tensors
from .model import check_base
from .switching import adapted_modules, adapters_in_use, change_of_base, check_base_is_there

logger = logging.getLogger(__name__)

CLASSES = "zero_shot.json"  # beside the weights of an adapter of another method
KEPT = ("class_names", "template", "class_texts", "base_model_fingerprint")  # fields of CaptConfig
NAMES = {"LORA": "LoRA", "LN_TUNING": "LN-tuning"}  # as people write them; the others are written as PEFT's type


def peft_name(config: Mapping[str, Any]) -> str:
    """Returns how the PEFT method of a configuration in JSON types is called: "CAPT", "LoRA", "IA3", ..."""
    kind = config.get("peft_type") or "CAPT"
    kind = str(getattr(kind, "value", kind))
    return NAMES.get(kind, kind)


def settings_of(config: PeftConfig) -> dict[str, Any]:
    """Returns an adapter's configuration in JSON types, with what is kept beside one of another method."""
    settings = {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}
    return {**settings, **{name: getattr(config, name) for name in KEPT if hasattr(config, name)}}


# ------------------------------------------------------------------------------------------------------ what is kept


def keep_classes(model: PeftModel, **classes: Any) -> None:
    """Lets a model's active adapter know what it is tuned on.

    Args:
        model: The model. The fields of an adapter of another method are kept as attributes of its configuration.
        classes: `class_names`, `template` and `class_texts`.
    """
    config: Any = model.peft_config[model.active_adapter]
    for name, value in classes.items():
        setattr(config, name, value)
    if not isinstance(config, CaptConfig):
        gone = change_of_base(config)  # which leaves no weights of the base to recognise it by
        config.base_model_fingerprint = None if gone else base_fingerprint(model)


def save_classes(model: Any, folder: Path) -> None:
    """Writes what is known of the adapters of other methods that PEFT has just saved in a folder beside their weights.

    PEFT's own `save_pretrained` knows nothing of it.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        home = folder if name == "default" else folder / name  # PEFT's layout
        known = {key: getattr(config, key) for key in KEPT if hasattr(config, key)}
        if known and not isinstance(config, CaptConfig) and (home / SAFETENSORS_NAME).is_file():
            write_json(home / CLASSES, {**known, "adapter_fingerprint": adapter_fingerprint(home)})


def _load_classes(config: Any, name_or_path: str, weights: str, where: Mapping[str, Any]) -> None:
    """Gives a configuration what is kept beside the adapter's weights, where there is such a file."""
    path = _find_classes(name_or_path, where)
    if path is None:
        return
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise DamagedFileError(f"it has more than {MAX_BYTES:,} bytes")
        content = read_json(path)
        names, template = content["class_names"], check_template(content["template"])
        base, texts = content["base_model_fingerprint"], check_class_texts(content["class_texts"])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("class_names must be a list of strings")
        if not isinstance(base, str | None):
            raise TypeError("base_model_fingerprint must be a string or null")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say what the adapter classifies: {cut(error)}. {AGAIN}") from error
    found = adapter_fingerprint(Path(weights).parent)
    if content.get("adapter_fingerprint") != found:
        raise ValueError(
            f"{path} is of other weights: their fingerprint is {shown(content.get('adapter_fingerprint'), 40)}, that of the "
            f"adapter is {found}. Save both together, with CaptTrainer.save_model, or remove the file and give the classes."
        )
    for name, value in zip(KEPT, (names, template, texts, base), strict=True):
        setattr(config, name, value)


def _find_classes(name_or_path: str, where: Mapping[str, Any]) -> Path | None:
    folder = Path(name_or_path, where.get("subfolder") or "")
    if folder.is_dir():
        return folder / CLASSES if (folder / CLASSES).is_file() else None
    hub = {key: value for key, value in where.items() if key in (*HUB_ARGUMENTS, "subfolder")}
    try:
        return Path(hf_hub_download(name_or_path, CLASSES, **hub))
    except LocalEntryNotFoundError:
        logger.warning("The Hub cannot tell whether %s has a %s; it is used without one.", name_or_path, CLASSES)
    except EntryNotFoundError:
        pass
    return None


# ----------------------------------------------------------------------------------------------------------- loading


def load_config(name_or_path: str | Path, **where: Any) -> Any:
    """Returns the configuration of a saved adapter of CAPT or another PEFT method, with what is kept beside the latter.

    Args:
        name_or_path: Folder or Hub id of the adapter.
        where: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`.

    Raises:
        ValueError: The configuration is missing, damaged, of a method that PEFT does not have or that changes the base
            model's weights, or the weights are no whole safetensors file.
    """
    name = str(name_or_path)
    try:
        return CaptConfig.from_pretrained(name, **where)
    except OtherMethodError as error:
        try:
            config: Any = PeftConfig.from_pretrained(name, **where)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"{error} PEFT cannot read it either: it is damaged, or of a method that this PEFT does not have."
            ) from error
    if type(config) is PeftConfig:
        raise ValueError(f"{name}/{CONFIG_NAME} does not say of which PEFT method the adapter is. {AGAIN}")
    check_method(config)
    if reason := change_of_base(config):
        raise ValueError(
            f"The adapter {name} changes the weights of the base model ({reason}), beside which there would be no frozen model. "
            "`peft.PeftModel` loads it."
        )
    config._weights_file, shapes = check_adapter_files(name, where.get("subfolder"), where)
    if shapes is None:
        raise ValueError(f"The adapter {name} has a configuration, but no {SAFETENSORS_NAME}. {AGAIN}")
    _load_classes(config, name, config._weights_file, where)
    return config


def load_adapter(base: nn.Module, name_or_path: str, config: PeftConfig, **where: Any) -> PeftModel:
    """Loads an adapter of another method on its base model, for inference; arguments as for `load_config`.

    Raises:
        ValueError: Its tensors are not those that its configuration describes on this base, or hold NaN.
    """
    file = str(vars(config)["_weights_file"])
    try:
        model = PeftModel.from_pretrained(base, name_or_path, config=config, **where)
    except RuntimeError as error:  # shapes; PEFT only warns of missing tensors
        raise ValueError(f"{file} does not fit {type(base).__name__}: {cut(error, 300)}") from error
    check_adapter_tensors(load_file(file), get_peft_model_state_dict(model), file)
    check_base_is_there(model)
    if hasattr(config, "base_model_fingerprint"):
        check_base(config, model)
    return model


# ---------------------------------------------------------------------------------------------------------- training


def check_method(config: PeftConfig) -> None:
    """Raises a ValueError for a PEFT method that cannot act on a CLIP as a classifier."""
    if config.is_prompt_learning or peft_name(config.to_dict()) == "XLORA":
        raise ValueError(
            f"{peft_name(config.to_dict())} is made for language models, and a CLIP cannot be classified with through it. Take "
            "CAPT's prompts, or a method that changes layers, such as LoRA."
        )
    if config.task_type is not None:
        raise ValueError(
            f"task_type={shown(config.task_type)}: PEFT's model of a task takes no images. Leave it out (None)."
        )


def check_tunable(model: PeftModel) -> None:
    """Raises a ValueError unless a model's active adapter, of another method than CAPT, can be tuned and saved by itself."""
    name = model.active_adapter
    config = model.peft_config[name]
    if isinstance(config, CaptConfig):
        return
    check_method(config)
    acting, merged = adapters_in_use(model), [m for module in adapted_modules(model) for m in module.merged_adapters]
    if merged:
        raise ValueError(
            f"Adapter {merged[0]!r} is merged into the base weights, so that nothing would be tuned. Call `unmerge_adapter()`."
        )
    if acting != [name]:
        raise ValueError(
            f"The adapters that act are {', '.join(map(repr, acting)) or 'none'}, and {name!r} alone would be saved. Let it act "
            f"alone: model.set_adapter({name!r}), with adapters enabled."
        )
    for key, value in config.to_dict().items():
        if "dropout" in key and value:
            logger.warning(
                "%s=%s: a step's attack, its clean and its adversarial pass each see another model, and a run depends on the "
                "batch size. Set it to 0 for a run that does not.", key, value,
            )  # fmt: skip
