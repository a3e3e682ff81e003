"""Shows the versions and devices of this machine, for a bug report.

capt-peft env
"""

from __future__ import annotations

import platform

import torch

from ..utils.machine import describe_machine, versions
from .parser import Parser

MORE = ("huggingface_hub", "pyarrow", "pandas", "matplotlib", "gradio", "onnxruntime", "onnxscript")


def main(argv: list[str]) -> None:
    """Prints a Markdown list."""
    Parser([]).parse_args(argv)
    rows = {"platform": platform.platform(), "computes on": describe_machine()}
    if torch.cuda.is_available():
        rows["bfloat16"] = str(torch.cuda.is_bf16_supported())
    for name, value in (rows | versions(*MORE)).items():
        print(f"- {name}: {value}")
