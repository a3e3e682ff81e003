"""Shows the versions and devices of this machine, for a bug report.

capt-peft env
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from ..utils.machine import describe_machine
from .parser import Parser

PACKAGES = (
    "capt-peft", "torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "safetensors", "numpy", "pillow",
    "pyarrow", "pandas", "matplotlib", "gradio",
)  # fmt: skip


def main(argv: list[str]) -> None:
    """Prints a Markdown list."""
    Parser([]).parse_args(argv)
    rows = {"Python": sys.version.split()[0], "platform": platform.platform(), "computes on": describe_machine()}
    for name in PACKAGES:
        try:
            rows[name] = version(name)
        except PackageNotFoundError:
            rows[name] = "not installed"
    if torch.cuda.is_available():
        rows["bfloat16"] = str(torch.cuda.is_bf16_supported())
    for name, value in rows.items():
        print(f"- {name}: {value}")
