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
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import CONFIG_NAME

from ..report.entries import UNCHECKED, VERIFIED, Source, collect, is_evaluation, same_evaluation
from ..report.leaderboard import write_leaderboard
from ..results.card import CARD
from ..results.evaluation import EVALUATION, Evaluation
from ..results.kept import images_path
from ..results.run import RESULTS
from ..tuner.fingerprint import SAFETENSORS_NAME
from ..tuner.others import CLASSES
from ..utils.markup import plain
from ..utils.text import counted
from .parser import Parser
from .verify import Arguments as Verifying
from .verify import verified

logger = logging.getLogger(__name__)


@dataclass
class Arguments:
    """What is shown, and where it is written."""

    sources: list[str] = field(
        metadata={
            "help": "Folders of adapters, evaluations and lines; files of lines; or a tag of repositories on the Hub."
        }
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
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, but a folder is written. Give another --output.")
    lines: list[Path] = []
    sources: list[Source] = []
    left_out: list[tuple[str, str]] = []
    for name in args.sources:
        path = Path(name)
        if path.is_file():
            lines.append(path)
        elif path.is_dir():
            lines += sorted(path.rglob("*.jsonl"))
            sources += _in_folder(path, output)
        elif re.fullmatch(r"[\w.:-]+", name, re.ASCII) and not name.endswith((".jsonl", ".json")):
            if constants.HF_HUB_OFFLINE:
                raise ValueError(
                    f"There is no file or folder {name}, and no tag is looked for while HF_HUB_OFFLINE is set."
                )
            sources += _on_the_hub(name, left_out)
        else:
            raise ValueError(f"There is no file or folder {name}; a tag of the Hub has neither spaces nor slashes.")
    if args.verify:
        sources = [_verified(source) for source in sources]
    found = collect(lines, sources, left_out)
    path = write_leaderboard(found, output)
    for place, reason in found.left_out:
        print(f"Not shown: {plain(place)}: {plain(reason)}")
    count = sum(len(board.entries) for board in found.boards)
    print(f"{counted(count, 'row')} on {counted(len(found.boards), 'board')}: {path}")


def _in_folder(folder: Path, output: Path) -> Iterator[Source]:
    """Yields the evaluations below a folder, each once; the cards of adapters are copied beside the page."""
    known = set()
    for path in sorted(folder.rglob("*.json"), key=lambda path: (path.name != EVALUATION, path)):
        if re.search(r"\.old\d+\.json$", path.name) or ".partial" in path.parts[-2] or not is_evaluation(path):
            continue
        own = path.parent if path.name == EVALUATION else path
        try:
            same = path.parent.parent if path.parent.name == "evaluations" else path.parent, same_evaluation(path)
        except ValueError:
            same = path, ""  # damaged, which reading it will tell
        if same not in known:
            known.add(same)
            link = ""
            if path.name == EVALUATION and (path.parent / CARD).is_file():
                link = f"cards/{re.sub(r'[^A-Za-z0-9.-]+', '_', str(os.path.relpath(own, folder.parent)))}.md"
                (output / "cards").mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path.parent / CARD, output / link)
            yield Source(path, os.path.relpath(own, folder.parent), link)


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
    """Returns a source with what verifying its images on its weights has found."""
    try:
        if Evaluation.load(source.path, with_examples=False).images is None:
            return source
        local = source.path.parent
        if not images_path(source.path).is_file() and source.link.startswith("http"):
            hf_hub_download(source.name, images_path(source.path).name)
        found = verified(Verifying(adapter=str(local), evaluation=str(source.path)), set())
    except Exception as error:  # of whatever loads a stranger's weights and data
        reason = plain(str(error).replace(str(source.path.parent), source.name), 160)
        return replace(source, verified=f"not verified: {reason}")
    if found.problems:
        return replace(source, verified=f"not verified: {plain(found.problems[0], 200)}")
    return replace(source, verified=VERIFIED if found.verified else UNCHECKED)
