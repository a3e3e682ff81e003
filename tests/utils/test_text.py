"""Text in messages: lists that stop, values that are cut, and where two JSON contents differ."""

from __future__ import annotations

import pytest

from capt_peft.utils.text import counted, cut, differences, short, shown, some


def test_some_names_the_first_and_counts_the_others():
    assert some([]) == ""
    assert some(["a", "b", "c"]) == "a, b, c"
    assert some(range(5)) == "0, 1, 2 and 2 more"
    assert some((str(i) for i in range(5000)), 1) == "0 and 4,999 more"
    assert some(["a: 1", "b, c"], separator="; ") == "a: 1; b, c"
    assert some(["a'b", "c" * 50, "d"], 2, quote=True) == f"\"a'b\", '{'c' * 40}'... (50 characters) and 1 more"


def test_a_number_has_its_noun():
    assert [counted(n, "token") for n in (0, 1, 2000)] == ["0 tokens", "1 token", "2,000 tokens"]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]


def test_long_values_are_cut_and_say_how_long_they_were():
    assert shown("a" * 3) == "'aaa'" and shown({"a": 1}) == "{'a': 1}"
    assert shown("a" * 200) == f"'{'a' * 120}'... (200 characters)"
    assert cut(ValueError("b" * 9), 4) == "bbbb... (9 characters)"
    assert short(b"c" * 9, 4) == "...cccc" and short("c") == "c"


@pytest.mark.parametrize(
    ("new", "old", "found"),
    [
        ({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}, []),
        ({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 3}]}}, [(("a", "b", 1, "c"), 2, 3)]),
        ({"a": [1]}, {"a": [1, 2]}, [(("a",), [1], [1, 2])]),
        ({"a": 1}, {"b": 2}, [(("a",), 1, None), (("b",), None, 2)]),
        ({"a": {"b": 1}}, {"a": None}, [(("a",), {"b": 1}, None)]),
        (1, 2, [((), 1, 2)]),
    ],
)
def test_differences_of_two_json_contents(new, old, found):
    assert list(differences(new, old)) == found


def test_a_missing_entry_can_have_a_word_of_its_own():
    assert list(differences({"a": None}, {}, missing="nothing")) == [(("a",), None, "nothing")]
