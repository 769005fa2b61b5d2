"""New items in an old index."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.grow import add_embeddings, check_grown, grown_index, nearest_tuples, place_items
from reasonrec.tokenizers.index import (
    EMBEDDINGS_FILE,
    ItemIndex,
    build_index,
    embedding_size,
    load_embeddings,
    load_says,
    save_embeddings,
)
from reasonrec.tokenizers.said import Said
from reasonrec.tokenizers.trie import Trie

# Two levels in one dimension: the sums are 0, 1, 10, 11.
BOOKS = [np.array([[0.0], [10.0]], np.float32), np.array([[0.0], [1.0]], np.float32)]


def vectors(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def test_nearest_tuples_by_hand() -> None:
    codes, distances = nearest_tuples(vectors(9.0), BOOKS, 4)
    assert codes[0].tolist() == [[1, 0], [1, 1], [0, 1], [0, 0]]
    assert distances[0].tolist() == [1, 4, 64, 81]


def test_items_join_their_equals_or_go_to_the_next_free_place() -> None:
    # (0, 0) is one item's alone; (1, 1) is a group of two, and no group has a third last code.
    index = build_index(np.array([[0, 0], [1, 1], [1, 1]]), [2, 2])
    assert index.level_sizes == (2, 2, 2)
    placed = place_items(index, BOOKS, vectors(0.1, 11.0, 10.0, 10.2))
    # The closed places send them to their neighbours, and the last finds (1, 0) full but for one place.
    assert placed.codes.tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 1], [0, 1, 1]]
    assert placed.displaced.tolist() == [True, True, False, True]
    assert placed.nearest.tolist() == pytest.approx([0.01, 0, 0, 0.04], rel=1e-4)
    assert placed.distance.tolist() == pytest.approx([0.81, 1, 0, 9.2**2])
    grown = grown_index(index, placed.codes)
    check_grown(index, grown, "the catalogue")
    with pytest.raises(UserError, match="none of the 4 tuples of codes is free"):
        place_items(grown, BOOKS, vectors(5.0))


def test_an_index_without_equals_has_no_last_code_to_give() -> None:
    index = build_index(np.array([[0, 0], [1, 1]]), [2, 2])
    assert place_items(index, BOOKS, vectors(0.0, 0.0)).codes.tolist() == [[0, 1, -1], [1, 0, -1]]


def test_more_than_the_nearest_few_are_looked_at() -> None:
    books = [np.arange(100, dtype=np.float32)[:, None]]
    index = build_index(np.arange(99)[:, None], [100])
    assert place_items(index, books, vectors(0.0)).codes.tolist() == [[99, -1]]


@given(st.data())
def test_a_grown_index_keeps_what_it_had_and_stays_free_of_prefixes(data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    sizes = data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=3))
    books = [random.normal(size=(size, 3)).astype(np.float32) for size in sizes]
    n, new = data.draw(st.integers(1, 30)), data.draw(st.integers(0, 30))
    index = build_index(np.stack([random.integers(0, size, n) for size in sizes], axis=1), sizes)
    try:
        placed = place_items(index, books, random.normal(size=(new, 3)).astype(np.float32))
    except UserError:  # only where all is taken
        free = max(index.level_sizes[-1], 1) * int(np.prod(sizes)) - n
        assert new > free - int((index.codes[:, -1] < 0).sum()) * max(index.level_sizes[-1] - 1, 0)
        return
    grown = grown_index(index, placed.codes)
    assert (grown.n_items, grown.level_sizes) == (n + new, index.level_sizes)
    assert (grown.codes[:n] == index.codes).all()
    assert (placed.distance >= placed.nearest).all()
    trie = Trie.from_codes(grown.codes, grown.level_sizes)  # refuses equals and prefixes
    assert trie.n_items == n + new


def test_embeddings_of_new_items_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    old, new = (random.normal(size=(n, 3)).astype(np.float32) for n in (5, 2))
    says = Said(*(random.normal(size=shape).astype(np.float32) for shape in ((3, 2), (2,))))
    for number, kept in enumerate((None, says)):
        parent, folder, again = (tmp_path / f"{name}{number}" for name in ("parent", "grown", "again"))
        for one in (parent, folder, again):
            one.mkdir()
        save_embeddings(parent, old, kept)
        for before, after, rows in ((parent, folder, new[:1]), (folder, again, new[1:])):
            shutil.copyfile(before / EMBEDDINGS_FILE, after / EMBEDDINGS_FILE)
            add_embeddings(before, after, rows)
        for one, rows in ((folder, new[:1]), (again, new)):
            np.testing.assert_array_equal(load_embeddings(one), np.concatenate([old, rows]))
            assert embedding_size(one) == 3
            found = load_says(one)
            if kept is None:
                assert found is None
            else:
                assert all(np.array_equal(a, b) for a, b in zip(found, kept, strict=True))


def test_another_index_is_refused() -> None:
    old = build_index(np.array([[0, 0], [1, 1]]), [2, 2])
    with pytest.raises(UserError, match=r"grown has levels of \[3, 2, 0\] codes, the model of \[2, 2, 0\]"):
        check_grown(old, build_index(np.array([[0, 0], [1, 1]]), [3, 2]), "grown")
    with pytest.raises(UserError, match="1 items, fewer than the model's 2"):
        check_grown(old, ItemIndex(old.codes[:1], old.level_sizes), "grown")
    with pytest.raises(UserError, match=r"item 1 has the codes \[1, 0, -1\], in the model \[1, 1, -1\]"):
        check_grown(old, build_index(np.array([[0, 0], [1, 0]]), [2, 2]), "grown")
