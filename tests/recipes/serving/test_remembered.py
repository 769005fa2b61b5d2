"""Lists for who comes back: what is kept, how much of it, and what is forgotten first."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.recipes.serving.remembered import OVERHEAD, Remembered


def entry(n: int = 10) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(n), -np.arange(n, dtype=np.float32)


def test_a_list_is_found_by_its_question_and_cut_to_what_is_wanted() -> None:
    remembered = Remembered(10_000)
    remembered.put((b"1", None), *entry())
    items, scores = remembered.get((b"1", None), 3) or entry(0)
    assert items.tolist() == [0, 1, 2]
    assert scores.tolist() == [0, -1, -2]
    assert remembered.get((b"1", True), 3) is None
    assert remembered.get((b"1", None), 11) is None, "eleven items were never ranked"
    assert remembered.found == 1


def test_it_keeps_its_own_copy() -> None:
    remembered, (items, scores) = Remembered(10_000), entry()
    remembered.put((b"1",), items, scores)
    items[:] = -1
    assert (remembered.get((b"1",), 10) or entry(0))[0].tolist() == list(range(10))


def test_who_was_asked_for_longest_ago_leaves_first() -> None:
    size = OVERHEAD + 1 + 120
    remembered = Remembered(2 * size)
    for name in (b"1", b"2"):
        remembered.put((name,), *entry())
    remembered.get((b"1",), 1)
    remembered.put((b"3",), *entry())
    assert remembered.get((b"2",), 1) is None
    assert remembered.get((b"1",), 1) is not None
    assert remembered.bytes == 2 * size


def test_nothing_is_kept_without_memory() -> None:
    remembered = Remembered(0)
    remembered.put((b"1",), *entry())
    assert remembered.get((b"1",), 1) is None


@given(st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 40)), max_size=60), st.integers(0, 6000))
def test_memory_is_counted_right_and_never_more_than_allowed(puts: list[tuple[bytes, int]], most: int) -> None:
    remembered = Remembered(most)
    for name, n in puts:
        remembered.put((name, None), *entry(n))
        assert remembered.bytes <= most
    kept = {name: found for name, _ in puts if (found := remembered.get((name, None), 0)) is not None}
    last = {name: n for name, n in puts if OVERHEAD + len(name) + 12 * n <= most}  # what is too long changes nothing
    assert remembered.bytes == sum(OVERHEAD + len(name) + 12 * last[name] for name in kept)
