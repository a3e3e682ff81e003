"""How a command ends: wrong input in one sentence on stderr and exit status 2, with the traceback only after `--debug`."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

PACKAGE = Path(__file__).resolve().parents[1]
MAX_SENTENCE, MAX_FOREIGN = 700, 300
# what messages recommend in Python, and the option that it is here
AS_OPTIONS = {
    "overwrite=True": "--overwrite",
    "(num_text_tokens)": "(--num_text_tokens)",
    "(out_of_class)": "(--out_of_class)",
}


def run(main: Callable[[], Any], debug: bool = False) -> None:
    """Runs a command; what it refuses becomes one sentence, with the traceback only after `--debug`.

    The exit status is 2 for wrong input, 1 for a run that stopped itself, 130 when interrupted. Anything that was not raised on
    purpose is a bug and keeps its traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # a bar may stand in this line
        say("Interrupted.")
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever reads, `head` for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        if debug or not is_intended(error):
            raise
        say(sentence(error), everywhere=isinstance(error, OSError) and error.errno is not None)
        raise SystemExit(1 if isinstance(error, RuntimeError) else 2) from None


def say(message: str, everywhere: bool = False) -> None:
    """Prints a message on stderr: of several processes, which all see the same input, the first one alone."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or everywhere:
        name = Path(sys.argv[0]).name + ("" if rank == "0" else f" (process {rank})")
        print(f"{name}: {message}", file=sys.stderr, flush=True)


def refuse(message: str) -> NoReturn:
    """Ends with a sentence and exit status 2."""
    say(message)
    raise SystemExit(2)


def is_intended(error: BaseException) -> bool:
    """Tells a refusal from a bug: a `raise` of this project's, a file system's error, or a package that is not installed."""
    if isinstance(error, OSError):
        return True
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("capt_peft"):
        return True
    if isinstance(error, RuntimeError):
        return type(error).__name__ == "TrainingStopped"  # of capt_peft, which is not imported here
    return isinstance(error, ValueError | TypeError | KeyError | ImportError) and is_ours(error)


def is_ours(error: BaseException) -> bool:
    """Tells whether an error comes from a `raise` in this project's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not str(frames[-1].line).startswith("raise"):
        return False
    return Path(frames[-1].filename).resolve().is_relative_to(PACKAGE)


def sentence(error: BaseException) -> str:
    """Returns what an error says, on one line and of bounded length, with the name that was probably meant."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if not is_ours(error):
        text = shorten(text.strip().split("\n")[0], MAX_FOREIGN)
    text = " ".join(text.split())
    for name, option in AS_OPTIONS.items():
        text = text.replace(name, option)
    return shorten(text, MAX_SENTENCE) + suggestion(text) if text else type(error).__name__


def shorten(text: str, length: int) -> str:
    """Returns a text, or its beginning."""
    return text if len(text) <= length else text[: length - 1] + "…"


_UNKNOWN = re.compile(
    r"[Uu]nknown \w+ '?(?P<a>[\w./:-]*\w)|(?:[Hh]as no|[Tt]here is no) \w+ '(?P<b>[^']+)'|'(?P<c>[^']+)' is (?:unknown|not? )"
)


def suggestion(text: str) -> str:
    """Returns " Did you mean ...?" where a message names something unknown and, after it, something that is much like it."""
    found = _UNKNOWN.search(text)
    if found is None or "did you mean" in text.lower():
        return ""
    word = next(filter(None, found.groups()))
    if word in ("nan", "inf"):
        return ""
    listed = [name for name in re.findall(r"\w[\w./:-]*\w", text[found.end() :]) if name != word]
    near = difflib.get_close_matches(word, listed, 1, 0.65)
    return f" Did you mean {near[0]}?" if near else ""


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Says in a sentence that a model cannot be loaded, where transformers or the Hub would say it in fifty lines."""
    try:
        yield
    except (OSError, ValueError) as error:
        if is_ours(error):
            raise
        reason = shorten(str(error).strip().split("\n")[0], MAX_FOREIGN)
        where = "" if os.path.isdir(name) else "There is no such folder here, and as a Hub id it failed: "
        raise ValueError(f"{name} cannot be loaded. {where}{reason}") from error
