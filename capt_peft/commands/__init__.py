"""The command line: `capt-peft COMMAND` or `python -m capt_peft COMMAND`.

Help and wrong input are answered before PyTorch is imported.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib import import_module

TRAINER = ("capt_peft.training.arguments", "transformers.training_args", "capt_peft.utils.versions")
TEXTS = ("capt_peft.commands.texts",)
DATA = ("capt_peft.commands.data", *TEXTS)
TUNED_DATA = ("capt_peft.commands.tuned", *DATA)


@dataclass(frozen=True)
class Command:
    """One of the commands.

    Attributes:
        does: What it does, in one line.
        module: Its module in `capt_peft.commands`.
        given: Options whose values may be given without their names, in this order; after one, "..." lets it take all.
        also: Other modules whose dataclasses are options of it.
        needs: Modules that have to be installed, with what installs each.
    """

    does: str
    module: str
    given: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    needs: dict[str, str] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """The modules that define its options."""
        return (f"{__name__}.{self.module}", *self.also)


COMMANDS = {
    "demo": Command("tunes, measures, saves and loads back an adapter on handwritten digits", "demo", also=(
        "capt_peft.commands.train", *DATA, *TRAINER)),
    "train": Command("tunes an adapter, and measures it before and after", "train", also=(*DATA, *TRAINER)),
    "evaluate": Command("measures how robust an adapter, or a bare CLIP, really is", "evaluate", ("adapter",), also=(
        "capt_peft.commands.retrieval", *TUNED_DATA)),
    "verify": Command("scores an evaluation's worst-case images again on the weights", "verify", ("adapter",), TUNED_DATA),
    "calibrate": Command("fits an adapter's temperature, and the answer none of these", "calibrate", ("adapter",), TUNED_DATA),
    "strength": Command("measures an adapter over its strength from 0 to 1, and sets one", "strength", ("adapter",), TUNED_DATA),
    "benchmark": Command("compares methods by the paper's protocols", "benchmark"),
    "reproduce": Command("runs a published protocol on real CLIP, and writes our figures beside the published ones", "reproduce"),
    "report": Command("makes tables and plots of a benchmark's lines", "report", ("lines", "...")),
    "leaderboard": Command("builds a static page that ranks adapters and defences", "leaderboard", ("sources", "...")),
    "card": Command("writes an adapter's model card again", "card", ("adapter",)),
    "push": Command("uploads an adapter with its card and results to the Hub", "push", ("adapter", "repo_id")),
    "export": Command("writes an adapter, or a bare CLIP, as one ONNX file or torch program", "export", ("adapter",), TEXTS),
    "app": Command("opens a page to try an adapter on", "app", ("adapter",), needs={"gradio": "capt-peft[app]"}),
    "convert": Command("converts a published robust CLIP to a folder that transformers loads", "convert", (
        "checkpoint", "output")),
    "backbones": Command("lists the published robust CLIPs that are known by name", "backbones", ("name",)),
    "finetune-backbone": Command("fine-tunes an image tower on adversarial images (TeCoA, FARE, ...)", "finetune_backbone",
                                 also=TRAINER),
    "protocols": Command("lists the published evaluation protocols, or shows one", "protocols", ("name",)),
    "tasks": Command("lists the data sets that are known by name", "tasks", ("name",)),
    "env": Command("shows versions and devices, for a bug report", "env"),
}  # fmt: skip


def overview() -> str:
    """Returns the help of the command line as a whole."""
    lines = [f"  {name:18} {command.does}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: capt-peft COMMAND [options]\n",
            "Small adapters that make CLIP robust to adversarial images.\n",
            "commands:",
            *lines,
            "\n`capt-peft COMMAND --help` lists a command's options. On several GPUs: accelerate launch -m capt_peft train ...",
        ]
    )


def main(name: str | None = None) -> None:
    """Runs the command that the command line names; or the one called `name`, with the command line as its options."""
    from . import ending, options

    argv = sys.argv[1:]
    if name is None:
        sys.argv[0] = "capt-peft"
        if not argv or argv[0] in ("-h", "--help", "help"):
            return ending.run(lambda: print(overview(), flush=True))
        if argv[0] == "--version":
            from .. import __version__

            print(f"capt-peft {__version__}")
            return
        name, *argv = argv
        if name not in COMMANDS:
            ending.refuse(options.unknown_command(name, COMMANDS))
        sys.argv = [f"capt-peft {name}", *argv]
    command = COMMANDS[name]
    argv, debug = options.without_debug(options.with_names(argv, command.given))
    ending.run(lambda: options.check_early(name, argv, command.sources, command.given, command.needs))
    ending.run(lambda: import_module(f".{command.module}", __name__).main(argv), debug)
