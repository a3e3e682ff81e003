"""The texts of classes: templates, published sets of templates by name, and own texts."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..tuner.config import check_class_texts, check_template
from ..utils.files import open_regular
from ..utils.text import cut, shown, some
from .names import name_places

Template = str | Path | Sequence[str]
ClassTexts = Mapping[str, str | Sequence[str]] | str | Path

TEMPLATES: dict[str, list[str]] = yaml.safe_load((files(__package__) / "templates.yaml").read_text(encoding="utf-8"))
"""Published sets of templates, by the names that `template` takes in place of a template."""


class ClassText(NamedTuple):
    """One text of a class: the class's label, the text, and the template that made it, None where it is the class's own."""

    label: int
    text: str
    template: str | None


def read_template(template: Template) -> str | list[str]:
    """Returns a template, or several as a list: those given, those of a text file with one a line, or the set of this name.

    Raises:
        FileNotFoundError: The file is missing (a `Path`).
        TypeError: Something else than a string, a path or a list of strings.
        ValueError: A template without exactly one `{}` that is the name of neither a set nor a file; none; or one twice.
    """
    if isinstance(template, str) and template in TEMPLATES:
        return list(TEMPLATES[template])
    nameable = isinstance(template, str) and "{" not in template and "}" not in template
    if isinstance(template, Path) or (nameable and os.path.isfile(os.path.expanduser(str(template)))):
        return _read_lines(Path(str(template)).expanduser())
    try:
        return check_template(template)
    except ValueError as error:
        if not nameable:
            raise
        raise ValueError(
            f"{error} No file has this name either. Sets of templates have the names {', '.join(TEMPLATES)}."
        ) from error


def _read_lines(path: Path) -> str | list[str]:
    with open_regular(path) as file:
        lines = file.read().decode(errors="replace").splitlines()
    try:
        return check_template([line for line in lines if line.strip()])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_class_texts(class_texts: ClassTexts | None) -> dict[str, list[str]] | None:
    """Returns texts of classes as lists by class name: those given, or those of a JSON file; None where there are none.

    Raises:
        FileNotFoundError: The file is missing.
        TypeError: Something else than a mapping of names to lists of texts.
        ValueError: A file that is not a JSON object, or names a class twice; a class with no text, an empty one, or one twice.
    """
    if not isinstance(class_texts, str | Path):
        return check_class_texts(class_texts)
    path = Path(class_texts).expanduser()
    try:
        with open_regular(path) as file:
            content = json.loads(file.read().decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The class texts in {path} cannot be read ({cut(error, 200)}).") from error
    try:
        return check_class_texts(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {shown(next(n for n in names if names.count(n) > 1), 80)} twice")
    return content


def texts_for(
    class_names: Sequence[str], class_texts: ClassTexts | None, *, strict: bool = True
) -> dict[str, list[str]] | None:
    """Returns the texts of these classes, under their names here and in their order; see `labels_by_name` for spellings.

    Args:
        class_names: The N class names.
        class_texts: Texts by class name, or a JSON file of them; a class may have none.
        strict: Raise for a name that is none of the classes; False: leave it out.

    Raises:
        ValueError: A name that is none of the classes.
    """
    given = read_class_texts(class_texts)
    if given is None:
        return None
    places = dict(zip(given, name_places(list(given), class_names), strict=True))
    lost = [name for name, place in places.items() if place is None]
    if lost and strict:
        near = next((n for name in lost for n in difflib.get_close_matches(name, class_names, 1, 0.7)), None)
        raise ValueError(
            f"class_texts has texts for {some(lost, 3, quote=True)}, but the classes are {some(class_names, 5, quote=True)}."
            f"{f' Did you mean {shown(near, 40)}?' if near else ''} Write the names as they are there, or take the texts out."
        )
    by_place = {place: name for name, place in places.items()}
    return {name: given[by_place[i]] for i, name in enumerate(class_names) if i in by_place} or None


def texts_of(class_names: Sequence[str], template: Template, class_texts: ClassTexts | None) -> list[ClassText]:
    """Returns the texts of N classes, class by class: a class's own where it has any, or else one of each template.

    Own texts are under the names of the classes, as `texts_for` returns them.
    """
    read, given, texts = read_template(template), read_class_texts(class_texts) or {}, []
    templates = [read] if isinstance(read, str) else read
    for label, name in enumerate(class_names):
        own = given.get(name)
        if own is None:
            texts += [ClassText(label, one.format(name), one) for one in templates]
        else:
            texts += [ClassText(label, text.replace("{}", name), None) for text in own]
    return texts
