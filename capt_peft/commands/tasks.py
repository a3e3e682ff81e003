"""Lists the data sets that are known by name, or shows one.

capt-peft tasks
capt-peft tasks digits
capt-peft tasks path/to/images                # what a folder of class folders, a file or a Hub data set would be
capt-peft tasks oxford_pets --root /data
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data import list_tasks, load_task
from ..data.catalog import CATALOG
from ..toy.tasks import procedural_class_names
from .parser import Parser
from .places import check_places


@dataclass
class Arguments:
    """What is shown."""

    name: str | None = field(default=None, metadata={"help": "A task's name, a Hub id, or a folder or file of images."})
    root: str | None = field(default=None, metadata={"help": "Where a data set of the catalog lies here."})


def main(argv: list[str]) -> None:
    """Prints the list, or what one task holds."""
    (args,) = Parser(Arguments).into_dataclasses(argv)
    check_places({"dataset_name": args.name, "root": args.root})
    if args.name:
        print(load_task(args.name, root=args.root).summary())
        return
    if args.root:
        raise ValueError("--root has no effect without the name of a data set.")
    print("| name | classes | where from |\n|---|---|---|")
    for name in list_tasks():
        if name not in CATALOG:
            print(f"| {name} | {len(procedural_class_names(name))} | comes with capt-peft |")
            continue
        entry = CATALOG[name]
        print(f"| {name} | {entry.num_classes} | {entry.hub_id or f'a folder (--root): {entry.coop_folder}'} |")
