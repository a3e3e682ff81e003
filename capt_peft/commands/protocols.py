"""Lists the published evaluation protocols, or shows one with the source of each setting.

capt-peft protocols
capt-peft protocols fap
capt-peft evaluate outputs/demo --protocol fap            # what evaluate and benchmark do with one
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..attacks import Protocol, get_protocol, known_protocols
from ..attacks.pgd import PGD
from ..data.texts import read_template
from ..utils.markup import table_row
from ..utils.text import shown
from .parser import Parser

HEADER = (
    "protocol", "paper", "attacks", "step size", "loss", "epsilon", "images per data set", "text of a bare CLIP", "beside",
)  # fmt: skip


@dataclass
class Arguments:
    """What is shown."""

    name: str | None = field(default=None, metadata={"help": "A protocol: all that is known of it, with sources."})


def main(argv: list[str]) -> None:
    """Prints the table of all, or what one is made of."""
    (args,) = Parser(Arguments).into_dataclasses(argv)
    chosen = known_protocols().values() if args.name is None else [get_protocol(args.name)]
    print("\n".join([table_row(HEADER), "|" + "---|" * len(HEADER), *(table_row(row_of(one)) for one in chosen)]))
    if args.name is not None:
        print(f"\n{details_of(get_protocol(args.name))}")


def row_of(protocol: Protocol) -> tuple[str, ...]:
    """Returns a protocol as a row of the table."""
    attacks = protocol.attacks_at()
    steps = protocol.step_size or "its own" if any(isinstance(attack, PGD) for attack in attacks) else "its own"
    losses = dict.fromkeys(str(getattr(attack, "loss", "")) for attack in attacks)
    images = ["all" if protocol.images is None else f"{protocol.images:,}"]
    images += [f"{task}: {number:,}" for task, number in protocol.images_of.items()]
    texts = [protocol.template or "the data set's own", *(["sets of templates"] if protocol.templates else [])]
    return (
        protocol.name, protocol.paper, ", ".join(protocol.attacks), steps, ", ".join(losses),
        f"{protocol.norm} {', '.join(protocol.epsilon)}", "; ".join(images), "; ".join(texts), ", ".join(protocol.beside) or "-",
    )  # fmt: skip


def details_of(protocol: Protocol) -> str:
    """Returns where each setting of a protocol was read, and what is done in another way here."""
    lines = [f"{protocol.title} ({protocol.paper}), read in {protocol.read}:"]
    lines += [f"- {name}: {place}" for name, place in protocol.sources.items()]
    if protocol.templates:
        lines.append("- templates: " + ", ".join(f"{task} {name}" for task, name in protocol.templates.items()))
    if protocol.not_read:
        lines.append(f"Not read: {protocol.not_read}.")
    return "\n".join([*lines, *(f"Here: {sentence}." for sentence in protocol.differs)])


def settle(args: Any, named: Set[str]) -> Set[str]:
    """Gives `evaluate` the settings of its `--protocol`, and refuses options that contradict it.

    Args:
        args: Its arguments; attacks, norm, epsilon and split are set in place.
        named: Options that the command line gives.

    Returns:
        The options that are settled: those that are named, and those that the protocol says.

    Raises:
        ValueError: An option that contradicts the protocol; its result would not be one of this name.
    """
    protocol = get_protocol(args.protocol)
    for name in ("retrieval", "attack_target", "attack_template"):
        if name in named and getattr(args, name) not in (False, None, "tuned"):
            raise contradiction(name, getattr(args, name), protocol, "the accuracy under white-box attacks")
    for name, own in (("norm", protocol.norm), ("split", protocol.split)):
        if name in named and getattr(args, name) != own:
            raise contradiction(name, getattr(args, name), protocol, f"--{name} {own}")
        setattr(args, name, own)
    epsilons = args.epsilon if "epsilon" in named else protocol.epsilon[0]
    args.epsilon = ",".join(_radius(protocol, text.strip()) for text in epsilons.split(","))
    args.attacks = ",".join(_attacks(protocol, args.attacks.split(",") if "attacks" in named else []))
    return named | {"norm", "split", "epsilon", "attacks"}


def settle_data(args: Any, named: Set[str]) -> None:
    """Gives `evaluate` the number of images of its protocol on its data set and, of a bare CLIP, the text of a class.

    Raises:
        ValueError: As for `settle`.
    """
    protocol, task = get_protocol(args.protocol), Path(args.dataset_name).name
    limit = protocol.images_in(task)
    if "limit" in named and args.limit != limit:
        measured = "all images" if limit is None else f"{limit:,} images of {task}"
        raise contradiction("limit", args.limit, protocol, measured)
    args.limit = limit
    if args.adapter is not None:
        return
    own = protocol.template_for(task)
    if "class_texts" in named:
        raise contradiction("class_texts", args.class_texts, protocol, "the same text for all classes of a bare CLIP")
    if "template" not in named:
        args.template = own
    elif own is None or read_template(args.template) != read_template(own):
        measured = f"--template {shown(own)}" if own else "a bare CLIP with the data set's own template"
        raise contradiction("template", args.template, protocol, measured)


def _radius(protocol: Protocol, given: str) -> str:
    """Returns an epsilon as the protocol writes it; a ValueError says that it is not among its own."""
    try:
        return protocol.radius(given)
    except ValueError:
        raise contradiction("epsilon", given, protocol, f"--epsilon {' or '.join(protocol.epsilon)}") from None


def _attacks(protocol: Protocol, given: list[str]) -> list[str]:
    """Returns the names of attacks that are run, by default the protocol's; a ValueError says which of these are left out."""
    names = [name.strip() for name in given if name.strip()] or list(protocol.attacks)
    if lacking := protocol.lacking(names):
        both = ",".join([*protocol.attacks, *(name for name in names if name not in ("clean", *protocol.attacks))])
        raise ValueError(
            f"--attacks {','.join(names)} leaves out {', '.join(lacking)}, which --protocol {protocol.name} measures: give "
            f"--attacks {both} to have others beside it, or leave --protocol out."
        )
    return names


def contradiction(option: str, value: Any, protocol: Protocol, measured: str) -> ValueError:
    """Returns the error of an option that contradicts a protocol."""
    return ValueError(
        f"--{option} {shown(value)} contradicts --protocol {protocol.name}, which measures {measured}: leave one of the two out. "
        "Without --protocol the result does not carry its name."
    )
