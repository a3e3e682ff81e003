"""The manners of every script here: wrong input ends in one sentence on stderr and exit status 2, most of it within a second.

What the command line alone tells (options that do not exist, folders that are not there) is said before PyTorch and transformers
are imported, which takes many seconds. A script does, at its top and at its end:

    if __name__ == "__main__":
        check_early(__file__)

    if __name__ == "__main__":
        run(main)
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from settings_file import as_words, read_mapping
from transformers import HfArgumentParser  # its own imports are light: 0.5 s

EXAMPLES = Path(__file__).resolve().parent
PACKAGE = Path(importlib.util.find_spec("capt_peft").origin).parent
# where the fields of CaptTrainingArguments are written down
TRAINING = (
    Path(importlib.util.find_spec("transformers").origin).parent / "training_args.py",
    PACKAGE / "training" / "arguments.py",
)
MODELS = ("model_name_or_path", "adapter", "base", "teacher", "processor")  # a folder, or a Hub id
DATA = ("dataset_name", "eval_dataset_name")  # a task's name, a Hub id, a folder or a file
FILES = ("config", "checkpoint", "root")  # a file or a folder here
MAX_SENTENCE, MAX_FOREIGN = 700, 300


# -------------------------------------------------------------------------------------------------------- how it ends


def run(main: Callable[[list[str]], Any]) -> None:
    """Runs a script's `main` on the command line; what it refuses becomes one sentence, with the traceback only after `--debug`.

    The exit status is 2 for wrong input, 1 for a run that stopped itself, 130 when interrupted. Anything that was not raised on
    purpose is a bug and keeps its traceback.
    """
    argv, debug = without_debug(sys.argv[1:])
    try:
        main(argv)
    except KeyboardInterrupt:
        say("Interrupted.")
        raise SystemExit(130) from None
    except Exception as error:
        if debug or not is_intended(error):
            raise
        say(sentence(error), everywhere=isinstance(error, OSError) and error.errno is not None)
        raise SystemExit(1 if isinstance(error, RuntimeError) else 2) from None


def without_debug(argv: list[str]) -> tuple[list[str], bool]:
    """Returns the command line without `--debug`, and whether it was there; transformers' `--debug VALUE` stays."""
    following = [*argv, "--"][1:]
    kept = [word for word, after in zip(argv, following, strict=True) if word != "--debug" or not after.startswith("-")]
    return kept, len(kept) < len(argv)


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
    file = Path(frames[-1].filename).resolve()
    return file.is_relative_to(PACKAGE) or file.is_relative_to(EXAMPLES)


def sentence(error: BaseException) -> str:
    """Returns what an error says, on one line and of bounded length, with the name that was probably meant."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if not is_ours(error):
        text = shorten(text.strip().split("\n")[0], MAX_FOREIGN)
    text = " ".join(text.split()).replace("overwrite=True", "--overwrite")
    return shorten(text, MAX_SENTENCE) + suggestion(text) if text else type(error).__name__


def shorten(text: str, length: int) -> str:
    """Returns a text, or its beginning."""
    return text if len(text) <= length else text[: length - 1] + "…"


_UNKNOWN = re.compile(
    r"(?:[Uu]nknown|[Hh]as no|[Tt]here is no) \w+ '?(?P<a>[\w./:-]*\w)|'(?P<b>[^']+)' is (?:unknown|not? )"
)


def suggestion(text: str) -> str:
    """Returns " Did you mean ...?" where a message names something unknown and, after it, something that is much like it."""
    found = _UNKNOWN.search(text)
    if found is None or "Did you mean" in text:
        return ""
    word = found["a"] or found["b"]
    listed = [name for name in re.findall(r"\w[\w./:-]*\w", text[found.end() :]) if name != word]
    near = difflib.get_close_matches(word, listed, 1, 0.65)
    return f" Did you mean {near[0]}?" if near else ""


# --------------------------------------------------------------------------------------------------------- the options


@dataclass(frozen=True)
class Option:
    """An option as its source describes it.

    Attributes:
        help: Its description.
        default: Its default, None where that is no literal.
    """

    help: str
    default: Any


def check_early(script: str, *more: Path, needs: Mapping[str, str] | None = None) -> None:
    """Shows the help, or refuses what needs no imports to be refused: unknown options and places that are not there.

    Args:
        script: The script's file.
        more: Other files whose dataclasses are options of it.
        needs: Modules that have to be installed, with what installs each.
    """
    argv, _ = without_debug(sys.argv[1:])
    options = options_in(*more, Path(script))
    if "-h" in argv or "--help" in argv:
        show_help(Path(script), options)
    for module, extra in (needs or {}).items():
        if importlib.util.find_spec(module) is None:
            refuse(f"{module} is not installed: pip install '{extra}'.")
    try:
        check_options(argv, options)
        check_places(given(argv))
    except ValueError as error:
        refuse(str(error))


def options_in(*files: Path) -> dict[str, Option]:
    """Reads which options source files define: fields of their dataclasses, and calls of `add_argument`. Imports nothing."""
    options: dict[str, Option] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                for name, option in _fields(node):  # a field that only has another default keeps its help
                    known = options.get(name, Option("", None)).help
                    options[name] = option if option.help else Option(known, option.default)
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                settings = {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
                name = str(_literal(node.args[0])).removeprefix("--")
                options[name] = Option(settings.get("help") or "", settings.get("default"))
    return options


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, Option]]:
    # where a field has no help of its own, the class's docstring describes it
    words = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", ast.get_docstring(node) or "", re.MULTILINE))
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and not line.target.id.startswith("_"):
            call = line.value if isinstance(line.value, ast.Call) else None
            settings = {k.arg: _literal(k.value) for k in call.keywords} if call else {"default": _literal(line.value)}
            if settings.get("init") is not False:
                told = (settings.get("metadata") or {}).get("help") or words.get(line.target.id, "")
                yield line.target.id, Option(told, settings.get("default"))


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def show_help(script: Path, options: Mapping[str, Option]) -> NoReturn:
    """Prints what the script does and its options, and ends."""
    print(ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))), "\n\noptions:")
    for name, option in options.items():
        default = "" if option.default in (None, False, "") else f" (default: {option.default})"
        print(f"  --{name}\n        {' '.join(option.help.split())}{default}")
    print("  --debug\n        Show the traceback of an error.")
    raise SystemExit(0)


def given(argv: Iterable[str]) -> dict[str, str]:
    """Returns the options that a command line gives, by name with underscores, with their first value ("" without one)."""
    words, found = list(argv), {}
    for word, after in zip(words, [*words, "--"][1:], strict=True):
        if word.startswith("--") and len(word) > 2:
            name, sign, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value if sign else "" if after.startswith("--") else after
    return found


def check_options(argv: Iterable[str], options: Mapping[str, Option]) -> None:
    """Raises a ValueError for an option that does not exist, with the one that was probably meant."""
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name = word[2:].partition("=")[0].replace("-", "_")
            negated = name.startswith("no_") and options.get(name[3:], Option("", None)).default is True
            if name not in options and not negated and name not in ("help", "debug"):
                raise ValueError(no_option(word.partition("=")[0], options))
        elif re.fullmatch(r"-[A-Za-z]\S+", word):
            raise ValueError(no_option(word, options))


def no_option(word: str, names: Iterable[str]) -> str:
    """Returns that there is no such option, and which one was probably meant."""
    name, names = word.lstrip("-").replace("-", "_"), list(names)
    near = difflib.get_close_matches(name, names, 1, 0.7) or [other for other in names if other.startswith(name)]
    return f"There is no option {shorten(word, 80)}; " + (
        f"did you mean --{near[0]}?" if near else "--help lists all options."
    )


class Parser(HfArgumentParser):
    """HfArgumentParser without abbreviations and hidden files of arguments, whose complaints are one sentence."""

    where = ""  # what is being read, where it is not the command line

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Ends with a sentence and exit status 2."""
        refuse(f"{self.where}: {message}" if self.where else message)

    @property
    def options(self) -> dict[str, argparse.Action]:
        """The options by name, without --help and --config."""
        return {action.dest: action for action in reversed(self._actions) if action.dest not in ("help", "config")}

    def read_file(self, path: str, skipped: Iterable[str] = ()) -> list[str]:
        """Returns a YAML file's `name: value` lines as words of a command line, each checked; what is wrong ends it.

        Args:
            path: The file. A name is an option's, and null leaves the option's default.
            skipped: Names that the file may hold and that are left out.
        """
        try:
            content = read_mapping(path, self.options)
        except ValueError as error:
            self.error(str(error))
        return self.words(path, {name: value for name, value in content.items() if name not in skipped})

    def words(self, where: str, values: Mapping[str, Any]) -> list[str]:
        """Returns values of options as words of a command line, each checked; what is wrong ends it and says where it was."""
        self.where = where
        words = []
        for name, value in values.items():
            try:
                of_one = as_words(self.options[name], value)
            except ValueError as error:
                self.error(str(error))
            self.parse_known_args(of_one)
            words += of_one
        self.where = ""
        return words

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parses as argparse does, and refuses what belongs to no option."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            option = rest[0].startswith("-")
            names = [name[2:] for action in self._actions for name in action.option_strings if name.startswith("--")]
            self.error(
                no_option(rest[0].partition("=")[0], names)
                if option
                else f"{shorten(rest[0], 80)!r} belongs to no option."
            )
        return found, rest

    def into_dataclasses(self, argv: list[str]) -> tuple[Any, ...]:
        """Returns the dataclasses that a command line fills in; a ValueError says what does not fit."""
        try:
            return self.parse_args_into_dataclasses(argv, look_for_args_file=False)
        except Exception as error:  # of transformers' many checks, too
            if is_ours(error):
                raise
            raise ValueError(f"The arguments do not fit together: {shorten(str(error), MAX_FOREIGN)}") from error


# ---------------------------------------------------------------------------------------------------------- the places


def check_places(values: Mapping[str, Any]) -> None:
    """Raises a ValueError for a model, data set or file that is not there, as far as that is known without asking a Hub.

    Args:
        values: Values by the names of their options.
    """
    for name, value in values.items():
        if not isinstance(value, str) or not value:
            continue
        if os.path.exists(os.path.expanduser(value)):
            if name == "adapter" and not {"adapter_config.json", "config.json"} & {
                *os.listdir(os.path.expanduser(value))
            }:
                raise ValueError(f"{shorten(value, 300)} is not an adapter: it has no adapter_config.json (--adapter).")
            continue
        if name in FILES or (name in (*MODELS, *DATA) and is_path(value)):
            kind = "folder" if name in (*MODELS, "root") else "file" if name in FILES else "folder or file"
            raise ValueError(f"There is no {kind} {shorten(value, 300)} (--{name}).{_near_path(value)}")
        if name in MODELS and constants.HF_HUB_OFFLINE and not is_cached(value):
            raise ValueError(
                f"--{name} {shorten(value, 300)} is neither a folder here nor a Hub model in the cache, and the Hub is not asked "
                "while HF_HUB_OFFLINE is set."
            )


def is_path(value: str) -> bool:
    """Tells whether a value can only be meant as a path, where a Hub id is the other possibility."""
    if value.startswith((".", "/", "~")) or value.endswith("/") or value.count("/") > 1:
        return True
    return "/" in value and os.path.isdir(value.split("/")[0]) and not is_cached(value)


def is_cached(name: str) -> bool:
    """Tells whether the Hub's cache has a model or adapter of this name."""
    try:
        files = (try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json"))
        return any(isinstance(file, str) for file in files)
    except HFValidationError:
        return False


def _near_path(value: str) -> str:
    path = Path(os.path.expanduser(value))
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), 1, 0.7)
    return f" Did you mean {path.with_name(near[0])}?" if near else ""


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


def check_installed(module: str, extra: str, option: str) -> None:
    """Raises an ImportError unless a module that an option needs is there: before the work, and not at its end."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{option} needs {module}: pip install '{extra}'.")
