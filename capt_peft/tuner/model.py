"""CaptModel: puts PromptLayers into a CLIP, pairs coupled ones, and lets the prompts start."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoTokenizer

from ..utils.text import cut, shown
from .clip import (
    OTHER_TOWER,
    Site,
    Tower,
    check_supported,
    encoder,
    end_token,
    find_sites,
    find_towers,
    in_tower,
    max_text_length,
    name_in_tower,
    pooling,
    prompt_places,
    reader,
    template_tokens,
    tokenize,
    vocabulary_size,
    whole_text,
)
from .config import DEFAULT_DEPTH, CaptConfig, check_strength
from .fingerprint import PEFT_PREFIX, base_fingerprint
from .layer import PromptLayer
from .loading import check_adapter_tensors, check_saved_modules, check_size, load_pretrained
from .switching import active_adapter, adapted_modules, switched_off

logger = logging.getLogger(__name__)
_TEXTS_AT_ONCE = 64


class CaptModel(BaseTuner):
    """Deep text and vision prompts for CLIP (CAPT, arXiv 2405.11154), as a PEFT tuner with one active adapter at a time.

    Args:
        model: A CLIPModel, one of its towers, or a MetaCLIP 2, SigLIP or SigLIP 2.
        peft_config: The adapter's configuration.
        adapter_name: Its name.

    Raises:
        ValueError: A model without CLIP's towers, a depth larger than the model's, or coupled prompts on a single tower.
    """

    prefix: str = "capt_"
    tuner_layer_cls = PromptLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (declared so by BaseTuner)

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # before PEFT changes anything: its own second adapter of a name is refused by PeftModel
        if any(adapter_name in module._get_available_adapters() for module in adapted_modules(model)):
            raise ValueError(
                f"The base model still has an adapter {adapter_name!r} in it, which would act beside the new one. Take it out "
                "with `unload()`, load the base model again, or give the new adapter another name (adapter_name=...)."
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter into the model, as PEFT does; a ValueError, with nothing changed, if torch cannot hold its name."""
        _check_name(adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names={cut(kwargs['adapter_names'], 120)}: CAPT has one active adapter for a whole batch. Call "
                "`set_adapter` instead, and run the images of each adapter by themselves."
            )
        yield

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for module in adapted_modules(self.model):
            # not by PEFT's version, which makes `modules_to_save` trainable, whatever they were
            module._disable_adapters = not enabled

    # --------------------------------------------------------------------------------------------------- injection

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        check_supported(model)
        towers = find_towers(model)
        self._sites: dict[str, Site] = find_sites(towers)
        if peft_config.coupling != "none" and len(towers) < 2:
            raise ValueError(
                f"{type(model).__name__} has one tower only, so its prompts cannot be coupled ({peft_config.coupling!r}). Use "
                "coupling='none'; `bake()` turns a coupled adapter into one that a single tower can load."
            )
        _fit_depths(peft_config, {kind: len(tower.modules) for kind, tower in towers.items()})
        if "text" in towers:
            _check_text_room(peft_config, model.get_submodule(towers["text"].name), towers["text"].start)
        check_size(peft_config, _count(peft_config, self._sites.values()))
        check_saved_modules(peft_config, model, self._sites)
        if len(towers) == 2 or peft_config.base_model_fingerprint is None:  # half a base has no fingerprint to compare
            check_base(peft_config, model)
        self._start: dict[int, torch.Tensor] = {}
        self._first_map: list[nn.Parameter] = []  # a list: a module here would be saved with the adapter
        if peft_config.inference_mode or "text" not in towers or not peft_config.depth("text"):
            return  # the values come from a file, or there are none
        if next(model.parameters()).device.type != "meta":
            tokenizer = _tokenizer(peft_config, model, towers["text"])
            if tokenizer is not None and peft_config.template_token_ids is None:
                peft_config.template_token_ids = template_tokens(tokenizer, peft_config.first_template)
            with switched_off(adapted_modules(model)):
                self._start = _text_start(peft_config, model, towers["text"], tokenizer)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        site = self._sites.get(key)
        return site is not None and site.index < peft_config.depth(site.tower)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, PromptLayer):
            layer = PromptLayer(target, self._sites[current_key])
            self._replace_module(parent, target_name, layer, target)
            target = layer
            if layer.site.tower == "vision" and layer.site.index == 0:
                layer.hooks.append(encoder(parent).register_forward_pre_hook(layer.weigh, with_kwargs=True))
                if (head := pooling(parent)) is not None:
                    layer.hooks.append(head.register_forward_pre_hook(layer.leave))
        site = target.site
        if site.tower == "text" and site.index == 0:
            target.end_token = end_token(self.model)
        start = self._start.get(site.index) if site.tower == "text" else None
        active = [name for name in self.active_adapters if name in self.peft_config]
        target.update_layer(adapter_name, peft_config, start, active, peft_config.inference_mode)
        if peft_config.init == "random" and site.index > 0 and adapter_name in target.capt_proj:
            self._copy_first_map(target.capt_proj[adapter_name])
        if peft_config.coupling != "none" and site.partner is not None:
            self._pair(target, self.model.get_submodule(site.partner), adapter_name)

    @torch.no_grad()
    def _copy_first_map(self, proj: nn.Module) -> None:
        """Lets a map between the towers start as a copy of the first one, as in MaPLe's and FAP's code."""
        self._first_map = self._first_map or list(proj.parameters())
        for own, first in zip(proj.parameters(), self._first_map, strict=True):
            if own.device.type != "meta":
                own.copy_(first)

    def _pair(self, layer: PromptLayer, partner: nn.Module, adapter_name: str) -> None:
        """Lets the one of two layers that maps prompts find the one that owns them, once both are there."""
        if not isinstance(partner, PromptLayer) or adapter_name not in partner._get_available_adapters():
            return
        mapping, owner = (layer, partner) if adapter_name in layer.capt_proj else (partner, layer)
        mapping.partners[adapter_name] = (owner,)
        if mapping.site.tower == "text" and mapping.site.index in self._start:
            mapping.fit(adapter_name, self._start[mapping.site.index])

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # BaseTuner's version reads the child's `weight`

    # ----------------------------------------------------------------------------------------------------- loading

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Checks the tensors on their way into the model: PEFT itself warns of a missing one and takes NaN as it is."""
        towers = find_towers(model)
        if config.coupling == "none" and len(towers) == 1:  # a single tower takes its half of an adapter for both
            ((kind, tower),) = towers.items()
            half: dict[str, torch.Tensor] = {}
            for name, tensor in state_dict.items():
                plain = name.removeprefix(PEFT_PREFIX)
                if not in_tower(plain, OTHER_TOWER[kind]):
                    half[name.removesuffix(plain) + name_in_tower(plain, kind, tower)] = tensor
            state_dict = half
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own, prompts = model.state_dict(), f".{cls.prefix}"
        expected = {
            name: tensor
            for name, tensor in own.items()
            if f".modules_to_save.{adapter_name}." in name
            or (prompts in name and adapter_name in name.split(prompts, 1)[1].split("."))
        }
        check_adapter_tensors(remapped, expected, getattr(config, "_weights_file", "The state dict"))
        return remapped

    # -------------------------------------------------------------------------------------------------- afterwards

    def set_strength(self, strength: float, adapter_name: str | None = None) -> None:
        """Sets how much of an adapter acts, as the function `set_strength` does for any model."""
        set_strength(self, strength, adapter_name or self.active_adapters[0])

    def bake(self, adapter_name: str | None = None) -> None:
        """Turns an adapter's coupled prompts into independent ones that give the same outputs.

        The result is small (it drops the maps between the towers: 23 thousand parameters instead of 3.6 million for a
        ViT-B/32 with the default shape) and can be loaded into a single tower. Optimizers made before hold the old parameters.

        Args:
            adapter_name: Which adapter; by default the active one.

        Raises:
            ValueError: No adapter of that name.
        """
        name = adapter_name or self.active_adapters[0]
        if name not in self.peft_config:
            raise ValueError(
                f"There is no adapter {name!r} to bake; there are {', '.join(map(repr, self.peft_config))}."
            )
        for layer in _prompt_layers(self.model):
            layer.bake(name)
        _configure(self, name, coupling="none")

    def unload(self) -> nn.Module:
        """Takes all adapters out and returns the base model; PEFT's version leaves `modules_to_save` in their places."""
        for module in adapted_modules(self.model):
            if isinstance(module, AuxiliaryTrainingWrapper):
                module._active_adapter = []
            elif isinstance(module, PromptLayer):
                for hook in module.hooks:
                    hook.remove()
        return super().unload()

    def _check_merge_allowed(self) -> None:
        raise ValueError("CAPT's prompts are extra tokens and cannot be merged into the weights. Use `unload()`.")


def set_strength(model: Any, strength: float, adapter_name: str | None = None) -> None:
    """Sets how much of a CAPT adapter acts: 0 is the base model and 1 the whole adapter, both bitwise, at the cost of one model.

    In between, text prompts p act as h + s(p - h), where h are the states that the text has at their places, and every layer's
    attention gives vision prompts s times their weight. It is stored with the adapter (`CaptConfig.strength`).

    Args:
        model: A `PeftModel`, a `CaptModel`, or a model of transformers with adapters loaded into it.
        strength: s, from 0 to 1.
        adapter_name: Which adapter; by default the active one.

    Raises:
        TypeError: A strength that is no number.
        ValueError: A strength out of range; no CAPT adapter of that name; or one with `modules_to_save`, and a strength below 1.
    """
    config = capt_config(model, adapter_name)
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise TypeError(f"strength={shown(strength)} must be a number, not {type(strength).__name__}.")
    check_strength(strength, config.modules_to_save)
    _configure(model, adapter_name or active_adapter(model), strength=float(strength))


def _configure(model: Any, adapter_name: str, **changes: Any) -> None:
    """Changes an adapter's configuration, as a copy: other adapters and models may have been made of the same object."""
    config = copy.copy(model.peft_config[adapter_name])
    for name, value in changes.items():
        setattr(config, name, value)
    model.peft_config[adapter_name] = config
    for layer in _prompt_layers(model):
        if adapter_name in layer.configs:
            layer.configs[adapter_name] = config


def capt_config(model: Any, adapter_name: str | None = None) -> CaptConfig:
    """Returns the configuration of a model's CAPT adapter, by default the active one; a ValueError if it has none such."""
    configs = getattr(model, "peft_config", {})
    name = adapter_name if adapter_name is not None else active_adapter(model) if configs else None
    config = configs.get(name)
    if not isinstance(config, CaptConfig):
        there = ", ".join(f"{shown(each)} ({getattr(known, 'peft_type', None)})" for each, known in configs.items())
        raise ValueError(
            f"The model has no CAPT adapter{'' if name is None else f' {shown(name)}'}; it has {there or 'no adapter'}. Load one "
            "on it, or name another."
        )
    return config


def _prompt_layers(model: nn.Module) -> list[PromptLayer]:
    return [module for module in model.modules() if isinstance(module, PromptLayer)]


def _check_name(adapter_name: str) -> None:
    """Refuses names under which torch's dictionaries of parameters and modules keep nothing."""
    why = None
    if not adapter_name or "." in adapter_name:
        why = "is empty" if not adapter_name else "has a dot"
    elif any(hasattr(kind, adapter_name) for kind in (nn.ParameterDict(), nn.ModuleDict())):
        why = "is the name of an attribute of torch's modules"
    if why is not None:
        raise ValueError(
            f"An adapter cannot have the name {shown(adapter_name)}, which {why}. Give it another (adapter_name=...)."
        )


def _fit_depths(config: CaptConfig, layers: dict[str, int]) -> None:
    """Cuts the default depth to the model's, and refuses any other that is larger."""
    deepest = {tower: layers.get(tower, DEFAULT_DEPTH) for tower in ("text", "vision")}
    if config.coupling != "none":
        deepest = dict.fromkeys(deepest, min(deepest.values()))
    for tower, available in deepest.items():
        depth = getattr(config, f"{tower}_depth")
        if depth == DEFAULT_DEPTH > available:
            setattr(config, f"{tower}_depth", available)
        elif depth > available:
            coupled = " that both towers have, as coupled prompts need" if config.coupling != "none" else ""
            raise ValueError(
                f"{tower}_depth={depth} is more than the {available} layers{coupled}. Use {available} or fewer."
            )


def _check_text_room(config: CaptConfig, text_tower: nn.Module, start: int) -> None:
    room = max_text_length(text_tower) - start - 1  # the end token needs a place too
    if config.depth("text") and config.num_text_tokens > room:
        raise ValueError(
            f"num_text_tokens={config.num_text_tokens} is more than the {room} tokens that the model's texts have between their "
            f"start and their end. Use {room} or fewer."
        )
    highest, known = max(config.template_token_ids or [0]), vocabulary_size(text_tower)
    if highest >= known:
        raise ValueError(
            f"template_token_ids has {highest}, but the model knows the tokens 0 to {known - 1}. Leave it out: it is filled from "
            "the template by the model's tokenizer."
        )


def _count(config: CaptConfig, sites: Iterable[Site]) -> int:
    """Returns the number of parameters that the configuration asks for at these places."""
    count = 0
    for site in sites:
        if site.index < config.depth(site.tower):
            own = config.owner(site.index) in (None, site.tower)
            count += site.dim * (math.prod(config.prompt_shape(site.tower)) if own else site.partner_dim + 1)
    return count


def check_base(config: Any, model: nn.Module) -> None:
    """Records the base model of a new adapter, and warns when an adapter is loaded onto another one."""
    fingerprint = base_fingerprint(model)
    if config.base_model_fingerprint is None or fingerprint is None:
        config.base_model_fingerprint = config.base_model_fingerprint or fingerprint
    elif config.base_model_fingerprint != fingerprint:
        dtype = next(model.parameters()).dtype
        reason = "" if dtype == torch.float32 else f" (or it is the same model, rounded to {dtype})"
        logger.warning(
            "The adapter was tuned on the base model %s with fingerprint %s, but is put on %s with fingerprint %s%s. Its "
            "accuracy, clean and robust, is not what its card says.",
            config.base_model_name_or_path,
            config.base_model_fingerprint,
            getattr(model, "name_or_path", "") or type(model).__name__,
            fingerprint,
            reason,
        )


def _tokenizer(config: CaptConfig, model: nn.Module, tower: Tower) -> Any:
    """Returns the base model's tokenizer, or None: it has none, or a causal tower, which needs but the ids that there are.

    Warns if that lets the prompts start at random.
    """
    if config.template_token_ids is not None and tower.causal:
        return None
    name = config.base_model_name_or_path or getattr(model, "name_or_path", None)
    try:
        if not name:  # it was never saved, for example
            raise ValueError("the model has no name")
        return reader(model, load_pretrained(AutoTokenizer, name, revision=config.revision))
    except (OSError, ValueError) as error:
        if config.template_token_ids is None:
            logger.warning(
                "No tokenizer for the base model%s (%s): the text prompts start at random instead of from the template %s. "
                "Set CaptConfig(template_token_ids=...) to start from it.",
                f" {name}" if name else "",
                cut(str(error).splitlines()[0]),
                shown(config.first_template),
            )
        return None


@torch.no_grad()
def _text_start(config: CaptConfig, model: nn.Module, tower: Tower, tokenizer: Any) -> dict[int, torch.Tensor]:
    """Returns the values from which the text prompts start, (n, dim) or (N, n, dim), by layer; absent layers start at random.

    They are what the frozen text tower holds in their places. If it is causal, its states at the template's first words do not
    depend on the class name, and prompts that start from them leave every text of the template exactly as it was. In another,
    SigLIP's, they do: class-specific prompts start from the states in the text of their class, which leaves it as it was, and
    others from the mean of the states over the classes' texts. All adapters of the model must be off.
    """
    places, ids = prompt_places(tower.start, config.num_text_tokens), config.template_token_ids
    if config.init == "normal" or not ids or len(ids) < places.stop:
        return {}
    embedding, text_model = model.get_submodule(tower.modules[0]), model.get_submodule(tower.name)
    device = next(embedding.parameters()).device
    first = torch.tensor(ids[: places.stop], device=device)  # (start + n,)
    start = {0: embedding(first[None])[0, places].float()}
    if config.init != "template":
        return start
    texts = first[None] if tower.causal else _start_texts(config, model, tokenizer, ids).to(device)  # (N, L)
    states: dict[int, list[torch.Tensor]] = {i: [] for i in range(1, config.text_depth)}
    for part in texts.split(_TEXTS_AT_ONCE):
        hidden = text_model(input_ids=part, output_hidden_states=True).hidden_states  # one more than layers
        for i, found in states.items():
            found.append(hidden[i][:, places].float())
    own = config.class_specific and len(texts) == len(config.class_names or [])
    return start | {i: torch.cat(found) if own else torch.cat(found).mean(0) for i, found in states.items()}


def _start_texts(config: CaptConfig, model: nn.Module, tokenizer: Any, ids: list[int]) -> torch.Tensor:
    """Returns tokens (N, L) of the classes' texts, or of the template's first words alone if the classes are not known."""
    names = list(config.class_names or [])
    if not config.class_specific:  # a mean of so many tells enough
        names = names[:: max(1, -(-len(names) // _TEXTS_AT_ONCE))]
    texts = [config.first_template.format(name) for name in names]
    if tokenizer is None or not texts or max(map(len, tokenizer(texts)["input_ids"])) > max_text_length(model):
        return whole_text(model, ids)
    return tokenize(model, tokenizer, texts)["input_ids"]
