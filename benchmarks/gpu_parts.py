"""What `gpu.py` measures, with nothing but torch, transformers, PEFT and the parts of the package that need no more.

The step here is that of `CaptTrainer`, written out from the same parts; `tests/benchmarks/test_gpu.py` holds the two together.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measuring import peak, reset_peak, seconds
from peft import get_peft_model
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from capt_peft.attacks import PGD, ThreatModel, parse_attack
from capt_peft.clip.activations import lean_activations
from capt_peft.objectives import CaptObjective, Views
from capt_peft.randomness import example_generators
from capt_peft.tuner import CaptConfig, clip
from capt_peft.utils.machine import use_tf32

CLASSES, STEPS = 100, 3
TINY_CLASSES = 4
WORDS = 4  # of the template, before the class name
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PRECISIONS = ("float32", "tf32", "bf16")
# so small that no image is broken, and each costs all that the attack can
NARROW = ThreatModel("linf", 1e-7)


@dataclass
class Step:
    """A training step: clean images, attack, adversarial images, objective, and backward to the prompts.

    Attributes:
        model: A CLIP with a CAPT adapter.
        tokens: `input_ids` of the N class texts, and perhaps their `attention_mask`.
        pixels: (B, 3, H, W) in [0, 1].
        labels: (B,).
        indices: The B places of the images in their data set.
        frozen: (B, N) logits of the frozen model.
        attack: The training attack.
        bf16: Run the towers in bf16, as `--bf16` does.
        seed: Seed of the attack.
        compiled: `compile` was called.
    """

    model: Any
    tokens: dict[str, Tensor]
    pixels: Tensor
    labels: Tensor
    indices: list[int]
    frozen: Tensor
    attack: PGD
    bf16: bool = False
    seed: int = 0
    compiled: bool = False

    def compile(self, backend: str = "inductor") -> None:
        """Compiles the towers, as `--torch_compile` does."""
        for tower in clip.tower_modules(clip.base_model(self.model)):
            tower.forward = torch.compile(tower.forward, backend=backend, dynamic=False)
        self.compiled = True

    def run(self) -> Tensor:
        """Runs the step; leaves the prompts' gradients in `.grad` and returns the loss."""
        self.model.zero_grad()
        with lean_activations(self.model):
            with self._precision():
                texts, clean_features = clip.both_features(self.model, self.tokens, self._values(self.pixels))
            texts, clean_features = texts.float(), clean_features.float()
            clean = clip.logits(self.model, clean_features, texts)
            found = self.attack.run(
                lambda images: clip.logits(self.model, self.features(images), texts.detach()),
                self.pixels,
                self.labels,
                example_generators(self.seed, self.indices, device=self.pixels.device),
                clean_logits=clean.detach(),
            )
            adversarial = clip.logits(self.model, self.features(found.images), texts)
            loss, _ = CaptObjective()(Views(clean, adversarial, self.labels, self.frozen))
            loss.backward()
        return loss.detach()

    def features(self, pixels: Tensor) -> Tensor:
        """Runs the image tower: (B, 3, H, W) pixels in [0, 1] -> (B, D) normalised features."""
        with self._precision():
            features = clip.image_features(self.model, self._values(pixels)).float()
        return features / features.norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def floor(self) -> None:
        """Runs what a step cannot do without: (2K + 4) forwards of the image tower, and 2 of the text tower, never compiled."""
        # graphs without gradients, which no run has, would be among those that each call of a compiled tower looks through
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            for _ in range(2 * self.attack.steps + 4):
                self.features(self.pixels)
            for _ in range(2):
                with self._precision():
                    clip.text_features(self.model, self.tokens)

    def _values(self, pixels: Tensor) -> Tensor:
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        return (pixels - mean) / std

    def _precision(self) -> Any:
        return torch.autocast(self.pixels.device.type, torch.bfloat16, enabled=self.bf16)


def make_step(batch: int, *, device: str, tiny: bool, bf16: bool = False) -> Step:
    """Returns a step of random weights, texts and images: a ViT-B/32 of true shape with 100 classes, or a small one with 4."""
    torch.manual_seed(0)
    config = small_config() if tiny else CLIPConfig()
    text, size = config.text_config, config.vision_config.image_size
    classes = TINY_CLASSES if tiny else CLASSES
    words = torch.randint(3, text.vocab_size - 3, (WORDS + classes,)).tolist()
    template = [text.bos_token_id, *words[:WORDS]]
    ids = torch.tensor([[*template, name, text.eos_token_id] for name in words[WORDS:]])
    model = get_peft_model(CLIPModel(config), CaptConfig(template_token_ids=template)).to(device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(batch, 3, size, size, generator=generator).to(device)
    labels = torch.randint(0, classes, (batch,), generator=generator).to(device)
    frozen = torch.randn(batch, classes, generator=generator).to(device)
    attack = PGD(ThreatModel("linf", "4/255"), steps=STEPS)
    return Step(model, {"input_ids": ids.to(device)}, pixels, labels, list(range(batch)), frozen, attack, bf16)


def small_config() -> CLIPConfig:
    """Returns the shape of a CLIP that a CPU runs in milliseconds."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 60, "bos_token_id": 58, "eos_token_id": 59, "max_position_embeddings": 16}
    return CLIPConfig(
        text_config={**shape, **tokens, "projection_dim": 16},
        vision_config={**shape, "image_size": 32, "patch_size": 16, "projection_dim": 16},
        projection_dim=16,
    )


def measure_step(
    *, batch: int, precision: str, compiled: bool, device: str, tiny: bool, repetitions: int
) -> dict[str, Any]:
    """Returns the times of a step and of its floor, in turns, its images per second and its peak of memory.

    Args:
        batch: Images, B.
        precision: One of `PRECISIONS`.
        compiled: Compile the towers for the step, not for its floor.
        device: "cpu" or "cuda".
        tiny: A small CLIP.
        repetitions: Timed turns, after one that warms up.
    """
    if device == "cuda":
        use_tf32(precision == "tf32")
    step = make_step(batch, device=device, tiny=tiny, bf16=precision == "bf16")
    if compiled:
        step.compile()
    before = reset_peak(device)
    first, loss = seconds(step.run, device)
    seconds(step.floor, device)
    rounds = [(seconds(step.run, device)[0], seconds(step.floor, device)[0]) for _ in range(repetitions)]
    memory = peak(device) - before
    taken, floor = (statistics.median(times) for times in zip(*rounds, strict=True))
    return {
        "batch": batch, "precision": precision, "compiled": compiled, "first_step_seconds": first, "seconds": taken,
        "floor_seconds": floor, "share_of_floor": floor / taken, "images_per_second": batch / taken,
        "peak_bytes_above_model": memory, "loss": loss.item(), "rounds": rounds,
    }  # fmt: skip


def measure_attack(*, attack: str, images: int, device: str, tiny: bool) -> dict[str, Any]:
    """Returns how many images an attack finishes in a second that stand all of it, which is what costs most; in float32.

    Args:
        attack: Its name.
        images: How many, in one batch.
        device: "cpu" or "cuda".
        tiny: A small CLIP.
    """
    if device == "cuda":
        use_tf32(False)
    step = make_step(images, device=device, tiny=tiny)
    model = step.model.eval().requires_grad_(False)
    passes = 0

    def logits_fn(pixels: Tensor) -> Tensor:
        nonlocal passes
        passes += len(pixels) * (2 if pixels.requires_grad else 1)
        logits: Tensor = clip.logits(model, step.features(pixels), texts)
        return logits

    with torch.no_grad():
        texts = nn.functional.normalize(clip.text_features(model, step.tokens), dim=1)
        labels = logits_fn(step.pixels).argmax(1)  # and it warms up
    passes = 0
    run: Callable[[], Any] = partial(parse_attack(attack, NARROW).run, logits_fn, step.pixels, labels, 0)
    taken, found = seconds(run, device)
    used = passes
    with torch.no_grad():
        standing = int((logits_fn(found.images).argmax(1) == labels).sum())
    return {
        "attack": attack, "images": images, "standing": standing, "seconds": taken, "images_per_second": images / taken,
        "passes_per_image": used / images, "passes_per_second": used / taken,
    }  # fmt: skip
