"""Writes an adapter on its CLIP, or a bare CLIP, as one file that runs without this package: ONNX, or a program of torch.

capt-peft export outputs/demo                             # outputs/demo/model.onnx
capt-peft export outputs/demo --int8                      # outputs/demo/model.int8.onnx: a third of the size, faster
capt-peft export outputs/demo --format torch              # outputs/demo/model.pt2
capt-peft export --base tiny_clip --class_names cat dog --output pets.onnx

The file takes pixels in [0, 1] and gives logits; class names and how images become pixels are described in it. ONNX needs
`pip install 'capt-peft[export]'`. docs/export.md has a server of a few lines.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel

from ..clip.classifier import ZeroShotClassifier
from ..clip.export import FORMATS, check_export, export
from ..utils.text import some
from .ending import loading
from .parser import Parser
from .places import check_places
from .texts import TextArguments


@dataclass
class Arguments(TextArguments):
    """What is exported, and to which file."""

    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub id of a CAPT adapter."})
    base: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a CLIP: exported bare, or the base of --adapter."}
    )
    format: str = field(default="onnx", metadata={"help": "onnx, or torch: a program for torch.export.load."})
    int8: bool = field(default=False, metadata={"help": "Quantise the linear layers to 8 bits (onnx alone)."})
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Class names in the order of the logits; by default the adapter's."}
    )
    output: str | None = field(
        default=None, metadata={"help": "The file; by default model.onnx or the like in the adapter's folder."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a file that is there."})

    @property
    def model(self) -> str:
        """What is exported."""
        return self.adapter or self.base or ""


def output_of(args: Arguments) -> Path:
    """Returns the file that is named, or one in the adapter's folder."""
    if args.output:
        return Path(args.output).expanduser()
    if args.adapter is None or not Path(args.adapter).is_dir():
        raise ValueError(
            f"{args.model} is not the folder of an adapter, which would get the file. Name it: --output model.onnx."
        )
    return Path(args.adapter, f"model{'.int8' if args.int8 else ''}{FORMATS.get(args.format, '')}")


def say_what_stays(folder: Path) -> None:
    """Says which exported files in a folder are of the adapter that was there before it changed."""
    files = sorted(path.name for path in folder.iterdir() if path.suffix in FORMATS.values())
    if files:
        print(
            f"Exported before this change, and still as it was then: {some(files)}. Write it again: capt-peft export."
        )


def main(argv: list[str]) -> Path:
    """Exports, and says what the file holds."""
    (args,) = Parser(Arguments).into_dataclasses(argv)
    if not args.model:
        raise ValueError("Give --adapter (folder or Hub id of a CAPT adapter) or --base (of a CLIP).")
    if args.adapter is None and not args.class_names:
        raise ValueError(f"--base {args.base} records no class names. Give them: --class_names cat dog.")
    check_places(vars(args))
    output = output_of(args)
    check_export(output, args.format, int8=args.int8, overwrite=args.overwrite)
    with loading(args.model):
        classifier = ZeroShotClassifier.from_pretrained(
            args.model,
            class_names=args.class_names,
            **args.texts,
            **({"base": args.base} if args.adapter and args.base else {}),
        )
    if isinstance(classifier.model, PeftModel) != (args.adapter is not None):
        kind, right = ("a CLIP without an adapter", "base") if args.adapter else ("an adapter", "adapter")
        raise ValueError(f"{args.model} is {kind}. Export it with --{right}.")
    difference = export(classifier, output, args.format, int8=args.int8, overwrite=args.overwrite)
    size = os.path.getsize(output)
    print(f"{output}: {size / 1e6:.1f} MB, {len(classifier.class_names)} classes")
    print(f"Its logits differ from the model's by {difference:.1e} at most, on random images.")
    return output
