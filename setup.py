"""What pyproject.toml cannot say: the description for a package index, where pictures and links into this folder lead nowhere."""

import re
from pathlib import Path

from setuptools import setup


def plain(match: re.Match[str]) -> str:
    """Returns a picture or link as its words and the file that it leads to."""
    picture, words, file = match.groups()
    return f"*{words}* (`{file}`)" if picture else f"`{file}`" if words == file else f"{words} (`{file}`)"


readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
setup(
    long_description=re.sub(r"(!?)\[([^\]]+)\]\((?![a-z]+:)([^)\s]+)\)", plain, readme),
    long_description_content_type="text/markdown",
)
