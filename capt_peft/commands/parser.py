"""The parser of every command: a command line on top of a YAML file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from transformers import HfArgumentParser  # its own imports are light: 0.5 s

from .ending import MAX_FOREIGN, is_ours, refuse, shorten
from .options import no_option
from .settings_file import as_words, read_mapping


class Parser(HfArgumentParser):
    """HfArgumentParser without abbreviations and hidden files of arguments, whose complaints are one sentence."""

    where = ""  # what is being read, where it is not the command line

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Ends with a sentence and exit status 2."""
        message = re.sub(r"(--[\w-]+)/--[\w-]+", r"\1", message)  # the same option, with - for _
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
