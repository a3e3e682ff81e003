"""What PEFT has put into a model: which adapters act, the base model below them, and switching all of them off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

# LoRA's ways to start that leave the base weights as they are; the others move a part of them into the adapter
_STARTS_BESIDE_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def adapted_modules(model: nn.Module) -> list[Any]:
    """Returns the modules in which PEFT has put something beside or around the base model's: each has a switch."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def adapters_in_use(model: nn.Module) -> list[str]:
    """Returns the names of the adapters, of any PEFT method, that act on a model now: active and on, or merged into its weights.

    Args:
        model: A `PeftModel`, a model of transformers with adapters loaded into it, or a model without any.
    """
    names: dict[str, None] = {}
    for module in adapted_modules(model):
        present = set(module._get_available_adapters())
        if isinstance(module, BaseTunerLayer):
            present |= set(module._all_available_adapter_names())
        active = [] if module.disable_adapters else [name for name in module.active_adapters if name in present]
        names |= dict.fromkeys([*module.merged_adapters, *active])
    return list(names)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters of the base model by their original names, whatever adapters PEFT has put into it."""
    seen: set[int] = set()
    for name, module in _base_modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:  # weights that two modules share count once, as in `named_parameters`
                seen.add(id(parameter))
                yield f"{name}.{key}" if name else key, parameter


def _base_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, PeftModel | PeftMixedModel):
        yield from _base_modules(model.base_model, name)
    elif isinstance(model, BaseTuner):
        yield from _base_modules(model.model, name)
    elif isinstance(model, BaseTunerLayer):
        yield from _base_modules(model.base_layer, name)  # type: ignore[arg-type]
    elif isinstance(model, AuxiliaryTrainingWrapper):
        yield from _base_modules(model.original_module, name)
    else:
        yield name, model
        for child_name, child in model.named_children():
            yield from _base_modules(child, f"{name}.{child_name}" if name else child_name)


def active_adapter(model: Any) -> str:
    """Returns the name of the active adapter of a `PeftModel` or of a model of transformers with an adapter."""
    active = model.active_adapters
    return str((active() if callable(active) else active)[0])  # a method in transformers, a property in PEFT


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it, the model is its base model, to the last bit, whatever PEFT has put on it.

    Afterwards every switch is as it was. `requires_grad` stays as it is, within and afterwards, unlike in PEFT's
    `disable_adapter`. It can be nested, in itself and in PEFT's own.

    Args:
        model: A `PeftModel`, a model of transformers with adapters loaded into it, or a model without any.

    Raises:
        ValueError: The base model is no longer there: an adapter is merged into it, has changed it at its start (PiSSA, OLoRA,
            ...) or trains its biases, or parameters of it are trained beside the adapter.
    """
    modules = adapted_modules(model)
    check_base_is_there(model)
    with switched_off(modules):
        yield


@contextmanager
def switched_off(modules: list[Any]) -> Iterator[None]:
    """Within it, these modules of `adapted_modules` pass on what their base modules give."""
    before = [module._disable_adapters for module in modules]
    for module in modules:
        module._disable_adapters = True  # `enable_adapters` would change requires_grad
    try:
        yield
    finally:
        for module, disabled in zip(modules, before, strict=True):
            module._disable_adapters = disabled


def check_base_is_there(model: nn.Module) -> None:
    """Raises a ValueError, which says why, unless switching all adapters of a model off gives its base model."""
    modules = adapted_modules(model)
    if not modules:
        return
    merged = next((name for module in modules for name in module.merged_adapters), None)
    if merged is not None:
        raise ValueError(
            f"Adapter {merged!r} is merged into the base weights, so that switching it off does not give the base model. Call "
            "`unmerge_adapter()` first, or load the base model again."
        )
    for name, reason in _changes_of_base(model):
        raise ValueError(
            f"Adapter {name!r} changes the weights of the base model ({reason}), so that switching it off does not give the base "
            "model. Load the base model by itself for that."
        )
    first = next((name for name, parameter in base_parameters(model) if parameter.requires_grad), None)
    if first is not None:
        raise ValueError(
            f"The base model's own {first} is being trained beside the adapter (requires_grad=True), so that switching the "
            "adapter off does not give the base model. Train a copy of the module (modules_to_save), or freeze it."
        )


def _changes_of_base(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yields the adapters, wherever in the model they were put, that change the base's own weights, and by which setting."""
    for module in model.modules():
        configs = module.__dict__.get("peft_config")
        for name, config in configs.items() if isinstance(configs, dict) else ():
            if isinstance(config, PeftConfig) and (reason := change_of_base(config)):
                yield name, reason


def change_of_base(config: PeftConfig) -> str | None:
    """Returns the setting by which an adapter changes the base's own weights, such as "bias='all'", or None if it does not."""
    bias, start = getattr(config, "bias", "none"), getattr(config, "init_lora_weights", None)
    if bias != "none":
        return f"bias={bias!r}"
    if start not in _STARTS_BESIDE_THE_BASE:
        return f"init_lora_weights={start!r}"
    return "kasa_config" if getattr(config, "kasa_config", None) is not None else None
