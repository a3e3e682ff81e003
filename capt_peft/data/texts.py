"""The texts of classes: templates, published sets of templates by name, and texts of one's own."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..tuner.config import check_class_texts, check_template
from ..utils.files import open_regular
from ..utils.text import cut, shown, some
from .names import name_places

Template = str | Sequence[str]
ClassTexts = Mapping[str, str | Sequence[str]]

TEMPLATES: dict[str, list[str]] = yaml.safe_load((files(__package__) / "templates.yaml").read_text(encoding="utf-8"))
"""Published sets of templates, by the names that `template` takes in place of a template."""


class ClassText(NamedTuple):
    """One text of a class: the class's label, the text, and the template that made it, None where it is the class's own."""

    label: int
    text: str
    template: str | None


def read_template(template: Template) -> str | list[str]:
    """Returns a template, or several as a list: those given, or the published set of this name.

    Raises:
        TypeError: Something else than a string or a list of strings.
        ValueError: A template without exactly one `{}` that is not the name of a set either; none; or one twice.
    """
    if isinstance(template, str) and template in TEMPLATES:
        return list(TEMPLATES[template])
    try:
        return check_template(template)
    except ValueError as error:
        if not isinstance(template, str) or "{" in template or "}" in template:
            raise
        raise ValueError(f"{error} Sets of templates have the names {', '.join(TEMPLATES)}.") from error


def read_class_texts(class_texts: ClassTexts | str | Path | None) -> dict[str, list[str]] | None:
    """Returns texts of classes as lists by class name: those given, or those of a JSON file; None where there are none.

    Raises:
        FileNotFoundError: There is no such file.
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
        class_texts: Texts by class name; a class may have none.
        strict: Raise for a name that is none of the classes; False: leave it out.

    Raises:
        ValueError: A name that is none of the classes.
    """
    given = check_class_texts(class_texts)
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

    Template and texts are as `read_template` and `texts_for` return them.
    """
    templates = [template] if isinstance(template, str) else template
    texts = []
    for label, name in enumerate(class_names):
        own = (class_texts or {}).get(name)
        if own is None:
            texts += [ClassText(label, one.format(name), one) for one in templates]
        else:
            texts += [ClassText(label, text.replace("{}", name), None) for text in own]
    return texts
