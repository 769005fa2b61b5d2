"""The set index against brute force over all items."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.recipes.policies.parallel_codes import sets as sets_module
from reasonrec.recipes.policies.parallel_codes.sets import SetIndex
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import build_index


@st.composite
def worlds(draw: st.DrawFn) -> tuple[np.ndarray, list[int], np.random.Generator]:
    """Codes of items, sizes of codebooks, and what draws the rest."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    every = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1).reshape(-1, len(sizes))
    return rng.permutation(every)[: draw(st.integers(1, 40))], sizes, rng


@pytest.mark.parametrize("most", [0, sets_module._PAIRED])
@given(world=worlds())
def test_what_is_left_is_what_brute_force_finds(
    most: int, world: tuple[np.ndarray, list[int], np.random.Generator]
) -> None:
    codes, sizes, rng = world
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets_module, "_PAIRED", most)
        sets = SetIndex.from_codes(codes, sizes)
    assert len(sets.paired) == (sum(sizes) if most else 0)
    items, depth = codes.shape
    n, users = 12, 3
    known = codes[rng.integers(items, size=n)]
    chosen = np.where(rng.random((n, depth)) < 0.5, known, -1)
    chosen[0] = -1
    books = np.where(chosen >= 0, -1, np.arange(depth))
    barred, user = rng.random((users, items)) < 0.3, rng.integers(users, size=n)
    first = np.cumsum([0, *sizes[:-1]])
    after = sets.after(
        torch.from_numpy(np.where(chosen >= 0, chosen + first, -1)),
        torch.from_numpy(books),
        sets.barred([np.flatnonzero(row) for row in barred]),
        torch.from_numpy(user),
    )
    for row in range(n):
        fits = ((chosen[row] < 0) | (codes == chosen[row])).all(1)
        for book in range(depth):
            for code in range(sets.widest):
                these = np.flatnonzero(fits & (codes[:, book] == code)) if books[row, book] >= 0 else []
                assert after.fits[row, book, code] == len(these)
                assert after.left[row, book, code] == sum(not barred[user[row], item] for item in these)
                assert int(after.item[row, book, code]) in (these if len(these) else [-1])


def test_items_with_equal_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="same codes"):
        SetIndex.from_codes(np.array([[0, 1], [0, 1]]), [2, 2])
    with pytest.raises(UserError, match="unique: reassign"):
        SetIndex.from_index(build_index(np.array([[0, 1], [0, 1]]), [2, 2]))


def test_excluded_items_have_to_exist() -> None:
    sets = SetIndex.from_codes(np.array([[0, 1], [1, 1]]), [2, 2])
    assert sets.barred([[], []]) is None
    with pytest.raises(UserError, match="item 2 is not in the catalogue"):
        sets.barred([[2]])


def test_unforced_steps_are_those_with_a_choice() -> None:
    alone = SetIndex.from_codes(np.array([[0, 0], [1, 1]]), [2, 2])  # the first code, in either order, tells the item
    assert alone.unforced() == 1
    full = SetIndex.from_codes(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), [2, 2])
    assert full.unforced() == 2
