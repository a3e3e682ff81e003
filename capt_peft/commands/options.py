"""The options of a command, read from the sources that define them: help and misspelt options need no imports."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..utils.fractions import parse_fraction
from .ending import refuse, sentence, shorten
from .places import check_places

ELSEWHERE = ("transformers.training_args", "capt_peft.utils.versions")  # transformers' own, in the help after ours
# where the words are written down that an option takes
WORDS = {
    "method": ("capt_peft.methods", "METHODS", "ALIASES"),
    "methods": ("capt_peft.methods", "METHODS", "ALIASES"),
    "protocols": ("capt_peft.benchmark.plan", "PROTOCOLS"),
    "protocol": ("capt_peft.attacks", "protocols.yaml"),
    "norm": ("capt_peft.attacks.threat", "NORMS"),
    "coupling": ("capt_peft.tuner.config", "COUPLINGS"),
    "init": ("capt_peft.tuner.config", "INITS"),
    "attack_target": ("capt_peft.evaluation.subject", "TARGETS"),
}
FRACTIONS = ("epsilon", "attack_step_size", "eval_step_size")
LISTS = ("methods", "protocols", "epsilon")  # with commas, where the command says so


@dataclass(frozen=True)
class Option:
    """An option as its source describes it.

    Attributes:
        help: Its description.
        default: Its default, None where that is not a literal.
        kind: int or float where it takes such a number, else str.
        group: The heading that it stands under.
    """

    help: str
    default: Any = None
    kind: type = str
    group: str = "options"


def check_early(
    name: str, argv: Sequence[str], sources: Sequence[str], given: Sequence[str], needs: Mapping[str, str]
) -> None:
    """Shows the help, or refuses what needs no imports to be refused: unknown options, numbers that are none, absent places.

    Args:
        name: The command.
        argv: Its command line, with the names of all options.
        sources: Modules whose dataclasses and calls of `add_argument` define its options, its own one first.
        given: Options whose values may stand without their names.
        needs: Modules that have to be installed, with what installs each.
    """
    options = options_in(*sources)
    if "-h" in argv or "--help" in argv:
        show_help(name, sources[0], options, given)
    for module, extra in needs.items():
        if importlib.util.find_spec(module) is None:
            refuse(f"{module} is not installed: pip install '{extra}'.")
    try:
        check_options(argv, options)
        check_places(values_in(argv))
    except ValueError as error:
        refuse(sentence(error))


def source(module: str) -> Path:
    """Returns the file of a module, without importing it."""
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    inside = Path(spec.origin).parent.joinpath(*rest.split("."))
    return inside / "__init__.py" if inside.is_dir() else inside.with_suffix(".py")


def options_in(*modules: str) -> dict[str, Option]:
    """Reads which options modules define: fields of their dataclasses, and calls of `add_argument`. Imports nothing.

    A field that only gives another default to one of a later module keeps the description that it has there.
    """
    options: dict[str, Option] = {}
    for module in modules:
        for node in ast.walk(ast.parse(source(module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                found = dict(
                    _fields(node, "options of transformers' Trainer" if module in ELSEWHERE else _heading(node))
                )
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                settings = {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
                kind = next((ast.unparse(k.value) for k in node.keywords if k.arg == "type"), "str")
                name = str(_literal(node.args[0])).removeprefix("--")
                found = {name: Option(settings.get("help") or "", settings.get("default"), _kind(kind))}
            else:
                continue
            for name, option in found.items():
                options[name] = (
                    replace(options[name], help=options[name].help or option.help) if name in options else option
                )
    return options


def _heading(node: ast.ClassDef) -> str:
    title = re.split(r"[:.]", ast.get_docstring(node) or "options", maxsplit=1)[0]
    return title[0].lower() + title[1:]


def _fields(node: ast.ClassDef, group: str) -> Iterator[tuple[str, Option]]:
    # where a field has no help of its own, the class's docstring describes it
    words = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", ast.get_docstring(node) or "", re.MULTILINE))
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and not line.target.id.startswith("_"):
            call = line.value if isinstance(line.value, ast.Call) else None
            settings = {k.arg: _literal(k.value) for k in call.keywords} if call else {"default": _literal(line.value)}
            if settings.get("init") is not False:
                told = (settings.get("metadata") or {}).get("help") or words.get(line.target.id, "")
                kind = _kind(ast.unparse(line.annotation))
                yield line.target.id, Option(told, settings.get("default"), kind, group)


def _kind(annotation: str) -> type:
    plain = re.sub(r"^Optional\[(.*)\]$|\s*\|\s*None$", r"\1", annotation.strip("'\""))
    return {"int": int, "float": float}.get(plain, str)


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def show_help(name: str, module: str, options: Mapping[str, Option], given: Sequence[str]) -> NoReturn:
    """Prints what a command does and its options under their headings, ours before those of other packages, and ends."""
    words = [f"[{word.upper()}]" for word in given if word != "..."] + (["..."] if "..." in given else [])
    print("usage: capt-peft", name, *words, "[options]\n")
    print(ast.get_docstring(ast.parse(source(module).read_text(encoding="utf-8"))))
    for group in dict.fromkeys(option.group for option in options.values()):
        print(f"\n{group}:")
        for name, option in options.items():
            if option.group == group and name != "debug":
                told = " ".join(option.help.replace("%%", "%").split()) or "See transformers.TrainingArguments."
                shown = option.default not in (None, False, "") and "by default" not in told
                print(f"  --{name}\n        {told}{f' (default: {option.default})' if shown else ''}")
    print("\nalways:\n  --debug\n        Show the traceback of an error.")
    raise SystemExit(0)


def with_names(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns a command line whose first words, which are no options, have the names of options before them."""
    first = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    rest = list(argv[len(first) :])
    if "..." in names:
        return [f"--{names[0]}", *first, *rest] if first else rest
    named = [word for name, value in zip(names, first, strict=False) for word in (f"--{name}", value)]
    return [*named, *first[len(names) :], *rest]


def without_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Returns the command line without `--debug`, and whether it was there; transformers' `--debug VALUE` stays."""
    following = [*argv, "--"][1:]
    kept = [word for word, after in zip(argv, following, strict=True) if word != "--debug" or not after.startswith("-")]
    return kept, len(kept) < len(argv)


def values_in(argv: Iterable[str]) -> dict[str, str]:
    """Returns the options that a command line gives, by name with underscores, with their first value ("" without one)."""
    words, found = list(argv), {}
    for word, after in zip(words, [*words, "--"][1:], strict=True):
        if word.startswith("--") and len(word) > 2:
            name, sign, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value if sign else "" if after.startswith("--") else after
    return found


def check_options(argv: Iterable[str], options: Mapping[str, Option]) -> None:
    """Raises a ValueError for an option that does not exist, with the one that was probably meant, and for a bad value of one."""
    argv = list(argv)
    for before, word in zip(["", *argv], argv, strict=False):
        if word == "" or (word.startswith("--") and word.endswith("=")):
            raise ValueError(f"{before or word} is given without a value: leave it out, or write the value behind it.")
        if word.startswith("--") and len(word) > 2:
            name = word[2:].partition("=")[0].replace("-", "_")
            negated = name.startswith("no_") and options.get(name[3:], Option("")).default is True
            if name not in options and not negated and name not in ("help", "debug"):
                raise ValueError(no_option(word.partition("=")[0], options))
        elif re.fullmatch(r"-[A-Za-z]\S+", word):
            raise ValueError(no_option(word, options))
    for name, value in values_in(argv).items():
        kind = options[name].kind if name in options else str
        try:
            kind(value or 0)
        except ValueError:
            raise ValueError(f"argument --{name}: invalid {kind.__name__} value: {shorten(value, 80)!r}") from None
        for part in value.split(",") if name in LISTS else [value]:
            check_value(name, part.strip())


def check_value(name: str, value: str) -> None:
    """Raises a ValueError for a word that an option does not take, or for a fraction that is none."""
    if name in WORDS and value:
        allowed = _allowed(name)
        if value not in allowed:
            what = {"methods": "method", "protocols": "experiment"}.get(name, name)
            raise ValueError(
                f"Unknown {what} {shorten(value, 80)!r}. Allowed: {', '.join(allowed)}.{_other_option(name, value)}"
            )
    if name in FRACTIONS and value:
        try:
            parse_fraction(value)
        except ValueError as error:
            raise ValueError(f"--{name}: {error}.") from error


def _allowed(name: str) -> list[str]:
    module, *variables = WORDS[name]
    return [word for variable in variables for word in words_of(module, variable)]


def _other_option(name: str, value: str) -> str:
    """Returns that a word is one of the option of nearly the same name, or "" where it is not."""
    other = {"protocol": "protocols", "protocols": "protocol"}.get(name)
    if other is None or value not in _allowed(other):
        return ""
    does = "an experiment of the paper" if other == "protocols" else "a published evaluation protocol"
    return f" {value} is {does}: --{other} {value}."


def words_of(module: str, variable: str) -> list[str]:
    """Returns the names in a tuple, or the keys of a dictionary or a YAML file, that a module writes down; imports none."""
    if variable.endswith(".yaml"):
        return list(yaml.safe_load(source(module).with_name(variable).read_text(encoding="utf-8")))
    for node in ast.parse(source(module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if ast.unparse(target) == variable:
                content: Any = node.value
                items = content.keys if isinstance(content, ast.Dict) else content.elts
                return [str(_literal(item)) for item in items]
    raise LookupError(f"{module} has no {variable}.")


def unknown_command(name: str, names: Iterable[str]) -> str:
    """Returns that there is no such command, and which one was probably meant."""
    near = difflib.get_close_matches(name, names := list(names), 1, 0.6) or [n for n in names if n.startswith(name)]
    meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."
    return f"There is no command {shorten(name, 80)}; {meant}"


def no_option(word: str, names: Iterable[str]) -> str:
    """Returns that there is no such option, and which one was probably meant."""
    name, names = word.lstrip("-").replace("-", "_"), list(names)
    near = difflib.get_close_matches(name, names, 1, 0.7) or [other for other in names if other.startswith(name)]
    return f"There is no option {shorten(word, 80)}; " + (
        f"did you mean --{near[0]}?" if near else "--help lists all options."
    )
