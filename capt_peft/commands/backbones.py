"""Lists the robust CLIPs that are known by name, shows one, or gets one ready from its file.

capt-peft backbones
capt-peft backbones fare4-vit-l14
capt-peft backbones tecoa-vit-b32 --checkpoint TeCoAmodel_best.pth.tar     # for those that are not on the Hub

The names stand wherever a base model is named: capt-peft train --model_name_or_path fare4-vit-l14
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from ..backbones.registry import details, table
from ..backbones.store import backbone_folder, find_backbone
from .ending import loading
from .parser import Parser
from .places import check_places


@dataclass
class Arguments:
    """What is shown."""

    name: str | None = field(default=None, metadata={"help": "Name of one of them."})
    checkpoint: str | None = field(
        default=None, metadata={"help": "Its file, to be converted into the cache and used by its name from then on."}
    )


def main(argv: list[str]) -> None:
    """Prints the list, or what is known of one, having converted its file if one is given."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (args,) = Parser(Arguments).into_dataclasses(argv)
    check_places({"checkpoint": args.checkpoint})
    if args.name is None:
        if args.checkpoint:
            raise ValueError("--checkpoint has no effect without the name of a backbone.")
        print(f"{table()}\n\n(?): not verified. Of accuracies, sources differ in data sets, attacks and steps.")
        return
    print(details(find_backbone(args.name)))
    if args.checkpoint:
        with loading(args.checkpoint):
            print(f"\nConverted into {backbone_folder(args.name, checkpoint=args.checkpoint)}")
