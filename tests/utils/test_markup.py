"""Text from outside in Markdown: whatever it is, it shows as it is and changes nothing around it."""

import ast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from capt_peft.utils.markup import Markdown, code, escape, plain, quoted, table_row

RENDERER = MarkdownIt("gfm-like", {"html": True, "linkify": False})
HOSTILE = [
    "a\n| capt | clean |  |  | 99.9 (99.0 to 100.0) | 1000 |", "---", "\n---\nlicense: mit", "<script>alert(1)</script>",
    "![x](http://x.y/z.png)", "[x](javascript:alert(1))", "`a` ``` ~~~", "a | b", "\\| a \\", "**bold** _it_ ~~no~~", "&lt;b&gt;",
    "<!-- x", "$x$", "\u2028| a |\x85| b |\x0b\x0c", "\u202egnp.exe", "\ud800", "{{ 7 * 7 }}{% x %}", "https://x.y www.x.y a@b.c",
    "# x", "- x", "1. x", "a" * 10_000, "", " ", "|", "\\", "\x00\x1b[31m", "[^1]: x", "<https://x.y>", "a__b__", "-->",
]  # fmt: skip
TEXTS = st.one_of(
    st.text(),
    st.lists(st.sampled_from([*HOSTILE, "\n", "\r", "|", "`", "<", ">", "*", "_", "[", "]", "(", "!", "\\", "&"])).map(
        "".join
    ),
)


def tokens(markdown):
    found = RENDERER.parse(markdown)
    return [*found, *(child for token in found for child in token.children or [])]


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_a_cell_stays_one_cell_of_plain_text_which_reads_as_the_text(text):
    check_cell(text)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_stays_one_cell(text):
    check_cell(text)


def check_cell(text):
    table = f"{table_row(['a', 'b'])}\n|---|---|\n{table_row([text, 'end'])}\n"
    assert len(table.splitlines()) == 3
    found = tokens(table)
    assert {token.type for token in found} <= {
        "table_open", "thead_open", "tbody_open", "tr_open", "th_open", "td_open", "inline", "text", "th_close", "td_close",
        "tr_close", "thead_close", "tbody_close", "table_close",
    }  # fmt: skip
    cells = [token.content for token in found if token.type == "inline"]
    assert len(cells) == 4 and cells[-1] == "end"
    inline = [token for token in RENDERER.parse(table) if token.type == "inline"][2]
    assert "".join(child.content for child in inline.children) == plain(text)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
@example(text="`` ` ``")
def test_code_and_string_literals_hold_nothing_but_the_text(text):
    line = f"before {code(text)} after\n"
    assert len(line.splitlines()) == 1
    assert {token.type for token in tokens(line)} <= {
        "paragraph_open",
        "inline",
        "text",
        "code_inline",
        "paragraph_close",
    }
    assert ast.literal_eval(quoted(text)) == plain(text)
    assert not set(quoted(text)) & set("<>`\n")


@pytest.mark.parametrize(
    "text",
    [
        "pgd-2",
        "L-inf 4/255",
        "text_to_vision",
        "blue_thing",
        "adv-maple",
        "a photo of a {}.",
        "Ünïcode 犬",
        "it's",
        "C#",
    ],
)
def test_usual_names_are_written_as_they_are(text):
    assert escape(text) == text


def test_markdown_is_not_escaped_again():
    assert escape(Markdown("**a**")) == "**a**"
    assert escape("https://x.y") == "https&#58;//x.y"
    assert escape("www.x.y") == "www&#46;x.y"
    assert plain("a" * 400) == "a" * 299 + "…"
