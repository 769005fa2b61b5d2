import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.data_gen.listed import list_words
from reasonrec.data_gen.values import is_nothing

WORD = (
    st.text(alphabet="ab &'\"\\,[](){}:é\n", min_size=1, max_size=8).map(str.strip).filter(lambda w: not is_nothing(w))
)
WORDS = st.lists(WORD, min_size=1, max_size=5)


@given(WORDS)
def test_every_spelling_of_a_list_gives_its_words(words: list[str]) -> None:
    spellings = [
        words,
        [words],
        tuple(words),
        str(words),
        str(tuple(words)),
        str([words]),
        json.dumps(words),
        json.dumps(words, ensure_ascii=False),
        json.dumps([words, [None]]),
        str(np.array(words, dtype=object)),
        repr(np.array(words, dtype=object)),
        str([np.str_(word) for word in words]),
        "{" + str(words)[1:-1] + "}",
        json.dumps([{"id": 3, "name": word} for word in words]),
        str([{"id": 3, "name": word} for word in words]),
    ]
    for spelling in spellings:
        assert list_words(spelling) == words


def test_long_and_many_dimensional_arrays_of_numpy() -> None:
    words = [f"k {number}" for number in range(2000)]
    assert list_words(str(np.array(words))) == [*words[:3], *words[-3:]]
    assert list_words(str(np.array([["a", "b"], ["c d", "e"]]))) == ["a", "b", "c d", "e"]
    assert list_words("[array(['a', 'b'], dtype=object) array(['c'], dtype='<U1')]") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", []),
        ("[None, nan, 'nan', '']", []),
        ("['it's warm' 'x']", ["it's warm", "x"]),
        ("['it's broken', 'but\\nread']", ["it's broken", "but read"]),
        ("[['it's', 'nested']]", ["it's", "nested"]),
        ("['rock 'n' roll', 'pop']", ["rock 'n' roll", "pop"]),
        ("[2003, 7]", ["2003", "7"]),
    ],
)
def test_odd_lists(text: str, words: list[str]) -> None:
    assert list_words(text) == words


@pytest.mark.parametrize(
    "text",
    ["", "plain", "a, b", "a|b", "[Rec]", "[Rec] 2", "(2003)", "('x') and ('y')", "['a'] ['b']",
     "[x, __import__('os')]", "{1}", "[", "'a' 'b'", "(some words)"],
)  # fmt: skip
def test_other_text_is_no_list(text: str) -> None:
    assert list_words(text) is None


def test_bare_words_are_a_list_only_where_asked_for() -> None:
    assert list_words("[Toys & Games, Puzzles]") is None
    assert list_words("[Toys & Games, Puzzles]", bare=True) == ["Toys & Games", "Puzzles"]
    assert list_words('{Toys,"Home & Kitchen"}', bare=True) == ["Toys", "Home & Kitchen"]
    assert list_words("[x, __import__('os')]", bare=True) is None
