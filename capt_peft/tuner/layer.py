"""PromptLayer: writes one site's prompts into the token sequence."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..utils.machine import moved
from .clip import Site, first_end, prompt_places
from .config import CaptConfig


class PromptLayer(nn.Module, BaseTunerLayer):
    """Wraps one module of a CLIP and writes the active adapter's prompts into its token sequence.

    An adapter either owns prompts here (`capt_prompt`) or maps those of the same layer of the other tower (`capt_proj`).

    Args:
        base_layer: The wrapped module: token embedding, vision embeddings or an encoder layer.
        site: Where in the model it stands.
    """

    adapter_layer_names = ("capt_prompt", "capt_proj")

    def __init__(self, base_layer: nn.Module, site: Site) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.site = site
        # PEFT keeps it in the class until it changes, for which torch.compile would compile again
        self._disable_adapters = False
        self.end_token: int | str | None = None  # see `clip.end_token`; the text prompts must not overwrite it
        # the classes whose texts come next; None for all (class-specific prompts only)
        self.rows: torch.Tensor | None = None
        self.capt_prompt = nn.ParameterDict()
        self.capt_proj = nn.ModuleDict()
        self.configs: dict[str, CaptConfig] = {}  # of the adapters here, whose strength acts; see `set_strength`
        self.hooks: list[RemovableHandle] = []  # of `weigh` and `leave`, where the vision prompts are appended
        # a tuple hides the other tower's layer from nn.Module, whose parameters it would list twice
        self.partners: dict[str, tuple[PromptLayer]] = {}

    def __getattr__(self, name: str) -> Any:
        """Hands out attributes of the wrapped module, such as `vision_model.embeddings.patch_embedding`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    # ----------------------------------------------------------------------------------------------------- prompts

    def update_layer(
        self, adapter_name: str, config: CaptConfig, start: torch.Tensor | None, active: list[str], inference_mode: bool
    ) -> None:
        """Creates an adapter's parameters here; its prompts start from `start` (n, dim), or from N(0, `config.init_std`)."""
        if config.owner(self.site.index) in (None, self.site.tower):
            prompt = torch.empty(*config.prompt_shape(self.site.tower), self.site.dim)  # (n, dim) or (N, n, dim)
            if prompt.device.type != "meta":
                nn.init.normal_(prompt, std=config.init_std)
                if start is not None:
                    prompt.copy_(start)
            self.capt_prompt[adapter_name] = nn.Parameter(prompt)
        else:
            self.capt_proj[adapter_name] = nn.Linear(self.site.partner_dim, self.site.dim)
        self.configs[adapter_name] = config
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(active, inference_mode=inference_mode)

    def prompt(self, adapter_name: str) -> torch.Tensor:
        """Returns the prompts that `adapter_name` writes here: (n, dim), or (N, n, dim) where class-specific."""
        if adapter_name in self.capt_prompt:
            return self.capt_prompt[adapter_name]
        return self.capt_proj[adapter_name](self.partners[adapter_name][0].capt_prompt[adapter_name])

    @torch.no_grad()
    def fit(self, adapter_name: str, target: torch.Tensor) -> None:
        """Sets the map from the other tower's prompts p (n, d) so that it gives `target` (n, dim), by the smallest weights W.

        The bias is the mean of the targets, W the minimum-norm solution of W p_i = target_i - bias.
        """
        proj: Any = self.capt_proj[adapter_name]
        prompts = self.partners[adapter_name][0].capt_prompt[adapter_name]
        if prompts.device.type == "meta" or proj.weight.device.type == "meta":
            return
        bias = target.double().mean(0)
        weight = torch.linalg.pinv(prompts.double()) @ (target.double() - bias).to(prompts.device)  # (d, n) @ (n, dim)
        proj.weight.copy_(weight.T)
        proj.bias.copy_(bias)

    @torch.no_grad()
    def bake(self, adapter_name: str) -> None:
        """Turns prompts that are mapped from the other tower into prompts of this layer, with the same values."""
        if adapter_name not in self.capt_proj:
            return
        proj: Any = self.capt_proj[adapter_name]
        trainable = proj.weight.requires_grad
        baked = self.prompt(adapter_name).clone()
        del self.capt_proj[adapter_name], self.partners[adapter_name]
        self.capt_prompt[adapter_name] = nn.Parameter(baked, requires_grad=trainable)

    def write(self, hidden: torch.Tensor, prompt: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """Writes the prompts into the tokens.

        Args:
            hidden: (B, L, dim) tokens of this tower.
            prompt: (n, dim), or (N, n, dim) for N = B texts with prompts of their own.
            strength: Of text prompts p, in (0, 1]: the tokens h become h + strength * (p - h).

        Returns:
            Text: (B, L, dim), the tokens of `prompt_places` replaced. Vision: (B, L + n, dim) at the embeddings, where the
            prompts are appended; (B, L, dim) at the layers, where the last n tokens are replaced.

        Raises:
            ValueError: Class-specific prompts, and another number of texts than of classes (or of `rows`).
        """
        n = prompt.shape[-2]
        if prompt.ndim == 3 and len(prompt) != len(hidden):
            raise ValueError(
                f"Got {len(hidden)} texts, but the adapter has {len(prompt)} classes: its class-specific context knows only the "
                "classes it was tuned on, in their order, and takes the texts of all of them in one batch."
            )
        prompt = prompt.to(hidden.device, hidden.dtype).expand(hidden.shape[0], -1, -1)  # (B, n, dim)
        if self.site.tower == "text":
            places = prompt_places(self.site.start, n)
            if strength < 1:
                prompt = torch.lerp(hidden[:, places], prompt, strength)
            return torch.cat([hidden[:, : places.start], prompt, hidden[:, places.stop :]], dim=1)
        patches = hidden if self.site.index == 0 else hidden[:, : hidden.shape[1] - n]
        return torch.cat([patches, prompt], dim=1)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs the wrapped module with the active adapter's prompts in its output (embeddings) or input (layers)."""
        adapter_name = self.applied_adapter
        if adapter_name is None:
            return self.base_layer(hidden_states, *args, **kwargs)
        prompt = self.prompt(adapter_name)
        if prompt.ndim == 3 and self.rows is not None:
            prompt = prompt[moved(self.rows, prompt.device)]
        strength = self.configs[adapter_name].strength
        if self.site.index > 0:
            return self.base_layer(self.write(hidden_states, prompt, strength), *args, **kwargs)
        if self.site.tower == "text":
            self._check_room(hidden_states, prompt.shape[-2])
        return self.write(self.base_layer(hidden_states, *args, **kwargs), prompt, strength)

    def weigh(self, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives the vision prompts the weight s, their strength, in attention: the vision encoder's forward pre-hook.

        A key's weight is exp(logit) before softmax divides by the sum, so that log s is added to the prompts' logits.
        """
        adapter_name = self.applied_adapter
        if adapter_name is None or (strength := self.configs[adapter_name].strength) == 1:
            return None
        implementation = encoder.config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"A strength of {strength:g} needs attention with a mask: load the model with attn_implementation='sdpa' or "
                f"'eager', not {implementation!r}, or set the strength to 0 or 1."
            )
        embeddings = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]  # (B, L, dim)
        mask = embeddings.new_zeros(1, 1, 1, embeddings.shape[1])
        mask[..., -self.prompt(adapter_name).shape[-2] :] = math.log(strength)
        return args, {**kwargs, "attention_mask": mask}

    def leave(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        """Takes the vision prompts out of the tokens (B, L, dim) that SigLIP's head pools: the head's forward pre-hook.

        They act on the image's features through the layers' attention alone, as they do in CLIP.
        """
        name = self.applied_adapter
        return None if name is None else args[0][:, : -self.prompt(name).shape[-2]]

    @property
    def applied_adapter(self) -> str | None:
        """The adapter whose prompts are written here; None if they are switched off, of strength 0, or not here."""
        if self.disable_adapters:
            return None
        present = (name for name in self.active_adapters if name in self.configs)
        return next((name for name in present if self.configs[name].strength), None)

    def _check_room(self, input_ids: torch.Tensor, n: int) -> None:
        """Refuses texts whose end the prompts would overwrite, which would silently classify something else."""
        room = input_ids.shape[-1]
        if self.end_token is not None and not torch.compiler.is_compiling():
            room = first_end(input_ids, self.end_token)
        if room < prompt_places(self.site.start, n).stop:
            raise ValueError(
                f"A text is too short for {n} text prompts: they replace its first {n} words, and would overwrite its "
                f"end. Put at least {n} words before the class name, as in the template 'a photo of a {{}}.'."
            )

    # ------------------------------------------------------------------------------------------- BaseTunerLayer's API

    def train(self, mode: bool = True) -> PromptLayer:
        """Sets the mode; `eval()`, which transformers calls after it has loaded prompts unchecked, refuses what is not finite."""
        if not mode:
            for name, parameter in self.named_parameters():
                if name.startswith("capt_") and parameter.device.type != "meta" and not torch.isfinite(parameter).all():
                    raise ValueError(
                        f"The prompts of {self.site.tower} layer {self.site.index} hold NaN or infinite values ({name}). The "
                        "adapter is damaged or its training diverged; load another one."
                    )
        return super().train(mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the adapters on or off.

        PEFT's version also toggles `requires_grad`, which makes an adapter loaded for inference trainable after
        `with disable_adapter()`, and makes torch.compile compile again.
        """
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter the active one; prompts of several adapters do not compose."""
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"CAPT has one active adapter at a time, got {list(adapter_names)}. Set one of them.")
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter's parameters from this site."""
        self.partners.pop(adapter_name, None)
        self.configs.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def unmerge(self) -> None:
        """Raises a ValueError: prompts cannot be merged, which `CaptModel` refuses."""
        raise ValueError("CAPT's prompts are extra tokens and were never merged into the weights. Use `unload()`.")

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        # PEFT's version looks for a `weight`, which an encoder layer does not have
        parameter = next((p for p in base_layer.parameters() if p.is_floating_point()), None)
        return (None, None) if parameter is None else (parameter.device, parameter.dtype)
