"""Builds a static page that ranks adapters, bare CLIPs and defences, from folders, benchmark lines and the Hub.

capt-peft leaderboard outputs --output site
capt-peft leaderboard toy.jsonl outputs/demo --output site --verify
capt-peft leaderboard adversarial-robustness --output site       # every repository on the Hub with this tag

The page needs no server and loads nothing. What cannot be read is listed on it, with the reason.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import CONFIG_NAME

from ..evaluation import Verification
from ..report.boards import Source, collect, is_evaluation, told_by
from ..report.leaderboard import PAGE, write_leaderboard
from ..results.card import CARD
from ..results.evaluation import EVALUATION, Evaluation
from ..results.kept import images_path
from ..results.run import RESULTS
from ..tuner.fingerprint import SAFETENSORS_NAME
from ..tuner.others import CLASSES
from ..utils.files import make_writable
from ..utils.markup import plain
from ..utils.text import counted, some
from .parser import Parser
from .verify import Arguments as Verifying
from .verify import verified

logger = logging.getLogger(__name__)


@dataclass
class Arguments:
    """What is shown, and where it is written."""

    sources: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders of adapters, evaluations and lines; files of lines; or a tag of repositories on the Hub."
        },
    )
    output: str = field(default="site", metadata={"help": "Folder to write."})
    verify: bool = field(
        default=False,
        metadata={"help": "Verify all that has worst-case images: loads the weights and data that the records name."},
    )


def main(argv: list[str]) -> None:
    """Writes the page."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    (args,) = Parser(Arguments).into_dataclasses(argv)
    if not args.sources:
        raise ValueError(
            "Name what is shown: capt-peft leaderboard SOURCES, which are folders, files of lines, or a tag of the Hub."
        )
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, but a folder is written. Give another --output.")
    make_writable(output, PAGE, given="--output")
    lines: list[Path] = []
    sources: list[Source] = []
    left_out: list[tuple[str, str]] = []
    for name in args.sources:
        path = Path(name)
        if path.is_file():
            lines.append(path)
        elif path.is_dir():
            lines += sorted(path.rglob("*.jsonl"))
            sources += _in_folder(path, output, left_out)
        elif re.fullmatch(r"[\w.:-]+", name, re.ASCII) and not name.endswith((".jsonl", ".json")):
            if constants.HF_HUB_OFFLINE:
                raise ValueError(
                    f"There is no file or folder {name}, and no tag is looked for while HF_HUB_OFFLINE is set."
                )
            sources += _on_the_hub(name, left_out)
        else:
            raise ValueError(f"There is no file or folder {name}; a tag of the Hub has neither spaces nor slashes.")
    sources = list({source.path.resolve(): source for source in sources}.values())  # a folder may be in another
    if args.verify:
        sources = [_verified(source) for source in sources]
    found = collect(lines, sources, left_out)
    path = write_leaderboard(found, output)
    for place, reason in found.left_out:
        print(f"Not shown: {plain(place)}: {plain(reason)}")
    count = sum(len(board.entries) for board in found.boards)
    print(f"{counted(count, 'row')} on {counted(len(found.boards), 'board')}: {path}")


def _in_folder(folder: Path, output: Path, left_out: list[tuple[str, str]]) -> Iterator[Source]:
    """Yields the evaluations below a folder, copies once; those that contradict each other are added to what is left out.

    The cards of adapters are copied beside the page.
    """
    found: dict[Any, dict[str, Path]] = {}  # the first file with each of the figures, by the adapter's folder and how
    for path in sorted(folder.rglob("*.json"), key=lambda path: (path.name != EVALUATION, path)):
        if re.search(r"\.old\d+\.json$", path.name) or ".partial" in path.parent.name or not is_evaluation(path):
            continue
        try:
            how, figures = told_by(path)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
            how, figures = str(path), ""  # damaged, which reading it will tell
        found.setdefault((_adapter_of(path) or path.parent, how), {}).setdefault(figures, path)
    for several in found.values():
        names = {path: _name_of(path, folder) for path in several.values()}
        if len(names) > 1:
            for name in names.values():
                others = some(other for other in names.values() if other != name)
                left_out.append((name, f"its figures are others than those of {others}, measured in the same way"))
            continue
        for path, name in names.items():
            link = ""
            if path.name == EVALUATION and (path.parent / CARD).is_file():
                link = f"cards/{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.md"
                (output / "cards").mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path.parent / CARD, output / link)
            yield Source(path, name, link)


def _name_of(path: Path, folder: Path) -> str:
    """Returns what an evaluation is called: its adapter's folder, or its file, from the folder that is searched."""
    place = path.parent if path.name == EVALUATION else path
    return os.path.relpath(place, Path(os.path.abspath(folder)).parent)  # of ".", too


def _adapter_of(path: Path) -> Path | None:
    """Returns the folder of the adapter that an evaluation lies in, or in whose `evaluations`; None for neither."""
    folders = (path.parent, path.parent.parent) if path.parent.name == "evaluations" else (path.parent,)
    return next((folder for folder in folders if (folder / CONFIG_NAME).is_file()), None)


def _on_the_hub(tag: str, left_out: list[tuple[str, str]]) -> Iterator[Source]:
    """Yields the evaluations of the repositories with a tag, downloaded; what fails is added to what is left out."""
    api = HfApi()
    for repo in api.list_models(filter=tag):
        name = str(repo.id)
        try:
            path = Path(hf_hub_download(name, EVALUATION))
            for other in (CONFIG_NAME, SAFETENSORS_NAME):
                hf_hub_download(name, other)
            for other in (RESULTS, CARD, CLASSES):
                _if_there(name, other)
        except EntryNotFoundError as error:
            left_out.append((name, f"it has no {str(error).split('/')[-1].split()[0].rstrip('.')[:60]}"))
            continue
        except (OSError, ValueError) as error:
            left_out.append((name, plain(error, 160)))
            continue
        yield Source(path, name, f"{api.endpoint}/{quote(name)}")


def _if_there(repo: str, name: str) -> None:
    try:
        hf_hub_download(repo, name)
    except EntryNotFoundError:
        logger.info("%s has no %s.", repo, name)


def _verified(source: Source) -> Source:
    """Returns a source with what scoring its images on its weights has shown; what cannot be loaded is not checked."""
    try:
        evaluation = Evaluation.load(source.path, with_examples=False)
        if evaluation.images is None:
            return source
        if not images_path(source.path).is_file() and source.link.startswith("http"):
            hf_hub_download(source.name, images_path(source.path).name)
        found = verified(_whose(source.path, evaluation.configuration.get("model") or {}), set())
    except Exception as error:  # of whatever loads a stranger's weights and data
        reason = source.named(error) or type(error).__name__
        found = Verification(unchecked=(plain(reason, 160),))
    return replace(source, verification=found)


def _whose(path: Path, model: Mapping[str, Any]) -> Verifying:
    """Returns what the images of an evaluation are scored on: the adapter that it lies in, or the bare CLIP that it names."""
    if model.get("adapter"):
        folder = _adapter_of(path)
        if folder is None:
            raise ValueError("the adapter that it is of is not beside it.")
        return Verifying(adapter=str(folder), evaluation=str(path))
    base = (model.get("base") or {}).get("name")
    if not isinstance(base, str) or not base:
        raise ValueError("it names no CLIP that could be loaded.")
    return Verifying(base=base, evaluation=str(path))
