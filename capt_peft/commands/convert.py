"""Converts a published robust CLIP to a folder that transformers loads.

capt-peft convert --checkpoint vitb32_eps4.pth.tar --base openai/clip-vit-base-patch32 --output backbones/tecoa4
capt-peft convert --checkpoint open_clip_model.safetensors --processor openai/clip-vit-base-patch32 \
    --output backbones/fare4                       # a whole CLIP of open_clip, beside its open_clip_config.json

docs/backbones.md lists the checkpoints that exist. Then: capt-peft train --model_name_or_path backbones/tecoa4
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field

from ..backbones import BackboneInfo, convert_backbone
from .ending import loading
from .parser import Parser
from .places import check_places


@dataclass
class Arguments:
    """What is converted, and what its weights do not tell."""

    checkpoint: str = field(metadata={"help": "The file: .pt, .pth, .pth.tar, .bin or .safetensors."})
    output: str = field(metadata={"help": "The folder to write."})
    base: str | None = field(
        default=None,
        metadata={"help": "For an image tower alone: the CLIP it was fine-tuned from (folder, Hub id or such a file)."},
    )
    activation: str | None = field(
        default=None, metadata={"help": "quick_gelu (OpenAI; the default) or gelu (most of open_clip's own models)."}
    )
    head_width: int | None = field(default=None, metadata={"help": "Size of the image tower's heads, if not CLIP's."})
    processor: str | None = field(
        default=None, metadata={"help": "Folder or Hub id to take the tokenizer from; by default the base."}
    )
    dtype: str = field(default="float32", metadata={"help": "Precision to write: float32, float16 or bfloat16."})
    overwrite: bool = field(default=False, metadata={"help": "Write into a folder that is not empty."})


def main(argv: list[str]) -> BackboneInfo:
    """Converts, and says what it was."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (args,) = Parser(Arguments).into_dataclasses(argv)
    check_places(vars(args))
    with loading(args.base or args.processor or args.checkpoint):
        info = convert_backbone(**vars(args))
    for name, value in asdict(info).items():
        print(f"{name:16} {value}")
    print(f"\nSaved to {args.output}")
    return info
