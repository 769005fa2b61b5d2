"""Rewards of code sets, against numbers worked by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.rewards.sets import Codewords, path, set_overlap
from reasonrec.tokenizers.errors import UserError

# Three levels of two codes whose vectors add up to (4a + c, 2b); all eight items are there, numbered 4a + 2b + c.
CODES = list(product((0, 1), repeat=3))
WORDS = Codewords(CODES, [[[0, 0], [4, 0]], [[0, 0], [0, 2]], [[0, 0], [1, 0]]])


def near(predicted: tuple[int, ...] | None, target: tuple[int, ...] = (1, 1, 1), **options: object) -> float:
    (value,) = path(
        predicted_codes=[predicted], target_codes=[target], target_items=[CODES.index(target[:3])], codewords=WORDS,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return value


def test_set_overlap_has_no_order() -> None:
    predicted = [None, (7, 8, 9), (1, 8, 9), (7, 2, 3), (7, 8, 3), (1, 2, 3), (1, 2, 3, 0)]
    values = set_overlap(predicted_codes=predicted, target_codes=[(1, 2, 3)] * 7)
    assert values == pytest.approx([0, 0, 1 / 3, 2 / 3, 1 / 3, 1, 3 / 4])
    assert set_overlap(predicted_codes=[(2, 1)], target_codes=[(1, 2)]) == [0], "the same numbers of other codebooks"


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=2, max_size=2))
def test_set_overlap_is_a_similarity(pair: list[tuple[int, ...]]) -> None:
    (there,), (back,) = (set_overlap(predicted_codes=[p], target_codes=[t]) for p, t in (pair, pair[::-1]))
    assert there == back
    assert 0 <= there <= 1
    assert (there == 1) == (pair[0] == pair[1])


@pytest.mark.parametrize(
    ("predicted", "wrong", "place"),
    [
        ((1, 1, 1), 0, 1),  # (5, 2), the target itself
        ((1, 1, 0), 1, 2),  # (4, 2), where item 6 is
        ((1, 0, 1), 1, 3),  # (5, 0): items 5 and 4 are nearer
        ((0, 1, 1), 1, 7),  # (1, 2): all but the target and item 5
        ((1, 0, 0), 2, 4),  # (4, 0): items 4, 5 and 6 are nearer
        ((0, 0, 1), 2, 8),  # (1, 0): all are nearer
    ],
)
def test_path(predicted: tuple[int, ...], wrong: int, place: int) -> None:
    """The target's place behind the sum of the right codes, if no more are wrong."""
    for allowed in (0, 1, 2):
        expected = [float(allowed >= wrong and n >= place) for n in range(1, 9)]
        assert [near(predicted, n=n, wrong=allowed) for n in range(1, 9)] == expected


def test_path_of_nothing_that_is_right() -> None:
    assert near((0, 0, 0), n=8, wrong=2) == 0
    assert near(None, n=8, wrong=None) == 0
    assert path(predicted_codes=[], target_codes=[], target_items=[], codewords=WORDS) == []


def test_path_of_all_codes_that_were_written() -> None:
    """Algorithm 2 adds up what is wrong as well: (4, 2) is item 6, then come item 7 and the target."""
    assert near((1, 1, 0), (1, 0, 0), n=1, wrong=1) == 1
    assert [near((1, 1, 0), (1, 0, 0), n=n, wrong=None) for n in (1, 2, 3)] == [0, 0, 1]


def test_path_knows_no_disambiguation_code_and_rows_of_their_own() -> None:
    values = path(
        predicted_codes=[(1, 1, 1, 4), (1, 1, 0), (1, 1, 0), (1, 1, 1)],
        target_codes=[(1, 1, 1, 0), (1, 1, 1), (1, 1, 0), (1, 1, 1)],
        target_items=[7, 7, 6, 7], codewords=WORDS, n=1,
    )  # fmt: skip
    assert values == [1, 0, 1, 1]


def test_items_that_are_as_near_do_not_push_the_target_out() -> None:
    twins = Codewords([[0], [0], [1]], [[[0.1, 0.7], [5.0, 5.0]]])
    assert path(predicted_codes=[(0, 1)], target_codes=[(0, 0)], target_items=[1], codewords=twins, n=1, wrong=0) == [
        1
    ]


def test_near_is_what_distances_say_however_many_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    codes, books = rng.integers(0, 5, (40, 3)), rng.normal(size=(3, 5, 6))
    words = Codewords(codes, books)
    points, items = rng.normal(size=(9, 6)), rng.integers(0, 40, 9)
    sums = sum(books[level][codes[:, level]] for level in range(3))
    distance = np.linalg.norm(points[:, None] - sums, axis=2)
    expected = (distance < distance[np.arange(9), items][:, None] - 1e-9).sum(1)
    for cells in (2**24, 80, 1):
        monkeypatch.setattr("reasonrec.rewards.sets._CELLS", cells)
        np.testing.assert_array_equal(words.nearer(points, items), expected)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"^n=0 has to be a whole number, at least 1$"):
        near((1, 1, 1), n=0)
    with pytest.raises(UserError, match=r"^wrong=3 has to be a whole number, from 0 to 2$"):
        near((1, 1, 1), wrong=3)
    with pytest.raises(UserError, match=r"codes up to \[1, 2\] do not fit codebooks of \[2, 2\] vectors"):
        Codewords([[0, 2], [1, 0]], [np.eye(2)] * 2)
