"""The results in docs: their tables are those that the lines give, and the page shows no other."""

import re
from pathlib import Path

import pytest

from capt_peft.report import read_sections, section_tables, to_markdown

RESULTS = Path(__file__).parents[2] / "docs" / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob("*/lines.jsonl"))


def tables_of(text):
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tables_are_made_from_the_lines(folder):
    made = to_markdown([(section, section_tables(section)) for section in read_sections(folder / "lines.jsonl")])
    assert (folder / "tables.md").read_text(encoding="utf-8") == made, "run `make tables`"


def test_every_table_of_the_page_stands_in_the_tables_that_were_made():
    made = {table for folder in FOLDERS for table in tables_of((folder / "tables.md").read_text(encoding="utf-8"))}
    shown = tables_of((RESULTS.parent / "results.md").read_text(encoding="utf-8"))
    measured = [table for table in shown if re.search(r"\d\.\d", table)]
    assert measured and [table for table in measured if table not in made] == []
